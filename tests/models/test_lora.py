"""LoRA against peft on plain transformers, and every layout against one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama

RANK, ALPHA = 4, 6.0


def gradients(rank: int, world_size: int, folder: str) -> tuple:
    """Of a step from an adapter folder: rewards, gradients in peft's names, loss."""
    from rmega.config import LoraArgs, LossArgs
    from rmega.models.lora import adapter_table
    from rmega.training import train
    from rmega.training.parity import Layout, build, gather_global, layout_config

    lora = LoraArgs(lora_rank=RANK, lora_alpha=ALPHA)
    config = layout_config(
        Layout.parse("1"),
        hf_model=folder,
        steps=1,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
        loss=LossArgs(loss="ranking", penalty="none", use_margin=True),
        lora=lora,
    )
    wrapped, _, _, geometry, device = build(config)
    data = InMemory(random_comparisons(10, seed=1))
    batcher = train.make_batcher(config, data, geometry)
    rewards = train.compute_rewards(wrapped, batcher, device)
    sums, _ = train.forward_backward(wrapped, batcher.packs(batcher.documents(0)), config.loss)
    rules = {rule.name: rule for rule in adapter_table(geometry, lora)}
    grads = {}
    for name, tensor in gather_global(wrapped, geometry, lambda p: p.main_grad, lora).items():
        if name == "reward_head.weight":
            grads["score.weight"] = tensor
            continue
        for offset, part in rules[name].overlaps(0, len(tensor)):
            grads[part.name] = tensor[offset : offset + part.stop - part.start]
    return torch.from_numpy(rewards), grads, sums["base_loss"]


def peft_folder(base: Path, folder: Path, b_scale: float = 0.2, **options) -> Path:
    """An adapter with a reward head as peft saves it, B random."""
    from transformers import AutoModelForSequenceClassification

    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, b_scale)
            elif "score.modules_to_save" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    return folder


def by_peft(base: Path, folder: Path, data) -> tuple:
    """The same by peft on plain transformers, one response at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    own = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    rewards, loss = [], torch.zeros(())
    for comparison in data:
        each = []
        for suffix in comparison.suffixes:
            ids = torch.tensor([[*comparison.prefix.tolist(), *suffix.tolist()]])
            hidden = model.model.model(ids).last_hidden_state[0, -1]
            each.append(model.model.score(hidden)[0])
        for i in range(len(each)):
            for j in range(i + 1, len(each)):
                margin = float(comparison.scores[i] - comparison.scores[j]) * comparison.graded
                loss = loss - torch.nn.functional.logsigmoid(each[i] - each[j] - margin)
        rewards += [x.item() for x in each]
    loss.backward()
    return torch.tensor(rewards), {name: p.grad for name, p in own.items()}, loss.item()


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize("b_scale", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_values_and_gradients_are_those_of_peft(family, b_scale, tmp_path):
    base = tiny_llama(tmp_path / "base", family=family)
    folder = peft_folder(base, tmp_path / "adapter", b_scale)
    rewards, grads, loss = run_distributed(gradients, 1, str(folder))[0]
    theirs, their_grads, their_loss = by_peft(base, folder, random_comparisons(10, seed=1))
    assert grads.keys() == their_grads.keys() and len(grads) == 4 * 7 * 2 + 1
    assert largest(rewards, theirs) < 1e-5
    assert loss == pytest.approx(their_loss, rel=1e-5)
    for name, grad in grads.items():
        if b_scale or not name.endswith("lora_A.weight"):
            assert largest(grad, their_grads[name]) < 2e-5, name
        else:
            assert not grad.any()


LAYOUTS = [
    "tp2",
    "tp2,sp",
    "pp2",
    "pp2,vpp2",
    "dp2",
    "dp2,plainopt",
    "tp2,pp2",
    "tp2,recompute",
    "tp2,sp,recompute",
    "tp2,sp,selective",
    "pp2,first1,last3",
    "pp2,recompute",
    "dp2,overlap",
]
"""Those of tests/training/test_layouts.py, and full recomputation where a frozen embedding is."""


def run(rank: int, world_size: int, text: str, folder: str, target: str, switches: dict) -> object:
    from rmega.config import LoraArgs
    from rmega.training.parity import Layout, layout_config, run_layout

    config = layout_config(
        Layout.parse(text),
        hf_model=folder,
        steps=3,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
        lora=LoraArgs(lora_rank=RANK, lora_alpha=ALPHA, lora_target=target),
        **switches,
    )
    return run_layout(config, InMemory(random_comparisons(24, seed=1)))


def result_of(text: str, folder, target: str = "all-linear", **switches):
    from rmega.training.parity import Layout

    world = Layout.parse(text).world_size
    return run_distributed(run, world, text, str(folder), target, switches)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return peft_folder(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def single(folder):
    return result_of("1", folder)


def test_adapters_and_head_learn_and_nothing_else(single):
    assert len(single.params) == 4 * (4 + 2 + 3 + 2) + 1
    assert len(set(single.losses)) == 3 and all(norm > 1e-3 for norm in single.grad_norms)


@pytest.mark.parametrize("text", LAYOUTS)
def test_parity(text, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder), single)
    assert max(differences.values()) <= 1e-5, differences
