"""A model on the path that GPUs take, with stand-ins for what only they have: attention from the
fused projection, and residual additions that prepare the next norm. Rewards and gradients are those
of the other path."""

from __future__ import annotations

import pytest
import torch

from rmega import ops
from rmega.config import LoraArgs, LossArgs, ParallelArgs
from rmega.data.packing import pack
from rmega.models import layers, lora, varlen
from rmega.models.hf import load_hf, read_geometry
from rmega.models.reward_model import RewardModel, transformer_config
from rmega.training.loss import pair_loss
from tests.models.test_attention import fake_varlen
from tests.tiny import random_comparisons, tiny_llama


@pytest.fixture(scope="module", autouse=True)
def engine():
    from rmega import distributed

    torch.set_float32_matmul_precision("highest")
    distributed.initialize()
    yield
    distributed.finish()


@pytest.fixture
def calls(monkeypatch):
    """Switches to the path of GPUs, and counts operators by name from then on."""
    counts: dict[str, int] = {}

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def switch():
        monkeypatch.setattr(varlen, "varlen_function", lambda: ("stand-in", fake_varlen))
        monkeypatch.setattr(varlen, "fuses_projection", lambda *a: True)
        monkeypatch.setattr(ops, "fuses_add_rms_norm", lambda x: True)
        for name in ("rms_norm", "add_rms_norm", "qkv_rope", "qkv_norm_rope", "rope"):
            counted(ops, name)
        counted(layers, "packed_attention")
        return counts

    return switch


def run(model, batch):
    """(rewards, gradients by name)"""
    model.zero_grad()
    rewards = model(batch)
    total, count, _ = pair_loss(LossArgs(), batch, rewards)
    (total / count).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return rewards.detach(), {n: p.grad.clone() for n, p in trained}


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * max(expected.abs().max().item(), 1e-12)


@pytest.mark.parametrize("prune,share", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rewards_and_gradients(family, prune, share, calls, tmp_path):
    folder, depth = tiny_llama(tmp_path, family=family, layers=3), 3
    geometry, _ = read_geometry(folder)
    model = RewardModel(transformer_config(geometry), geometry, prune_last_layer=prune)
    load_hf(model, folder, geometry)
    comparisons = random_comparisons(6, seed=2)
    expected, gradients = run(model, pack(comparisons, share_prefix=share, multiple=8))
    counts = calls()
    # A pack of its own: the plan of attention is kept with it.
    found, found_gradients = run(model, pack(comparisons, share_prefix=share, multiple=8))
    close(found, expected)
    for name, gradient in gradients.items():
        close(found_gradients[name], gradient)
    # Every addition prepares a norm, and every prepared norm is used: only the first is made alone.
    heads_norms = int(prune and family == "qwen3")  # the pruned layer's queries
    assert counts["add_rms_norm"] == 2 * depth
    assert counts.get("rms_norm", 0) == 1 + heads_norms
    fused = "qkv_norm_rope" if family == "qwen3" else "qkv_rope"
    assert counts[fused] == depth and "packed_attention" not in counts
    if ops.qkv._qkv_norm_rope is not None:  # else the kernel's plain form counts as well
        assert counts.get("qkv_rope", 0) + counts.get("qkv_norm_rope", 0) == depth
    assert counts.get("rope", 0) == int(prune)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(recompute, calls, tmp_path):
    folder = tiny_llama(tmp_path, layers=3)
    geometry, _ = read_geometry(folder)
    results = []
    for again in ("none", recompute):
        if again != "none":
            counts = calls()
        model = RewardModel(
            transformer_config(geometry, ParallelArgs(recompute=again)), geometry
        ).train()
        load_hf(model, folder, geometry)
        results.append(run(model, pack(random_comparisons(6, seed=2))))
    (expected, gradients), (found, found_gradients) = results
    close(found, expected)
    for name, gradient in gradients.items():
        close(found_gradients[name], gradient)
    # Recomputed layers see copies of their inputs, so no layer prepares the norm of the next.
    additions = {"selective": 6, "full": 2 * 3}[recompute]
    assert counts["add_rms_norm"] == additions
    assert all(
        module._prepared is None for module in model.modules() if hasattr(module, "_prepared")
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters(family, calls, tmp_path):
    """What LoRA adds to the projection is rotated and gathered with it; frozen norms take no
    gradient."""
    folder = tiny_llama(tmp_path, family=family, layers=3)
    geometry, _ = read_geometry(folder)
    model = RewardModel(transformer_config(geometry), geometry)
    load_hf(model, folder, geometry)
    lora.attach(model, LoraArgs(lora_rank=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    comparisons = random_comparisons(6, seed=2)
    expected, gradients = run(model, pack(comparisons))
    calls()
    found, found_gradients = run(model, pack(comparisons))
    close(found, expected)
    assert gradients.keys() == found_gradients.keys() and any("lora" in n for n in gradients)
    for name, gradient in gradients.items():
        close(found_gradients[name], gradient)
