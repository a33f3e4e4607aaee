"""The plan of a layout against bytes that are really there, and what it refuses."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rmega.config import LoraArgs
from tests import runs
from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama


def measure(
    rank: int, world_size: int, text: str, folder: str, dtype: str, lora: LoraArgs | None = None
) -> dict:
    """(planned, measured) bytes of this rank after one step; activations of one forward pass of one
    micro-batch."""
    from megatron.core import parallel_state

    from rmega.precision import DTYPES
    from rmega.training import plan, train
    from rmega.training.components import make_batcher
    from rmega.training.parity import Layout, build, layout_config

    layout = Layout.parse(text)
    config = layout_config(
        layout,
        hf_model=folder,
        steps=1,
        global_batch_size=8,
        max_tokens=100_000,
        lr=1e-3,
        lora=lora,
    )
    wrapped, optimizer, _, geometry, _ = build(config, DTYPES[dtype])
    batcher = make_batcher(config, InMemory(random_comparisons(24, seed=1)), geometry)
    packs = batcher.packs(batcher.documents(0))
    assert len(packs) == 1
    train.train_step(wrapped, optimizer, packs, config.loss, 8)
    weights = {p.untyped_storage().data_ptr() for chunk in wrapped for p in chunk.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hold = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (hold.append(t), note(t))[1], lambda t: t
    ):
        train.forward_backward(wrapped, packs, config.loss)
    states = [part.optimizer for part in optimizer.chained_optimizers]
    moments = sum(v.nbytes for o in states for s in o.state.values() for v in s.values() if v.ndim)
    copies = (
        sum(p.nbytes for o in states for g in o.param_groups for p in g["params"])
        if dtype == "bf16"
        else 0
    )
    stages = plan.plan_stages(
        config,
        geometry,
        replicas=layout.dp,
        bytes_per_element=2 if dtype == "bf16" else 4,
        tokens=packs[0].num_tokens,
        microbatches=1,
    )
    return {
        "plan": stages[parallel_state.get_pipeline_model_parallel_rank()],
        "parameters": sum(p.numel() for chunk in wrapped for p in chunk.parameters()),
        "weights": sum(p.nbytes for chunk in wrapped for p in chunk.parameters()),
        "gradients": sum(b.grad_data.nbytes for chunk in wrapped for b in chunk.buffers),
        "optimizer": moments + copies,
        "activations": sum(kept.values()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), hidden=128, ffn=320, layers=6))


@pytest.mark.parametrize(
    "text,dtype",
    [
        ("1", "fp32"),
        ("1", "bf16"),
        ("tp2", "fp32"),
        ("tp2,sp", "fp32"),
        ("pp2", "fp32"),
        ("dp2", "bf16"),
        ("pp2,first2,last4", "bf16"),
    ],
)
def test_planned_bytes_are_there(text, dtype, folder):
    """Weights exactly, gradients and optimizer up to padding of buffers, activations within a
    quarter."""
    from rmega.training.parity import Layout

    for seen in run_distributed(measure, Layout.parse(text).world_size, text, folder, dtype):
        plan = seen["plan"]
        assert seen["parameters"] == plan.parameters
        assert seen["weights"] == plan.weights
        assert seen["gradients"] == pytest.approx(plan.gradients, rel=0.01)
        assert seen["optimizer"] == pytest.approx(plan.optimizer, rel=0.03)
        assert seen["activations"] == pytest.approx(plan.activations, rel=0.25)


@pytest.mark.parametrize(
    "text,dtype,target",
    [("1", "fp32", "all-linear"), ("dp2", "bf16", "all-linear"), ("tp2,sp", "bf16", "qkv,fc2")],
)
def test_planned_bytes_with_adapters_are_there(text, dtype, target, folder):
    """Frozen weights have no gradients, fp32 copies or moments."""
    from rmega.training.parity import Layout

    lora = LoraArgs(lora_rank=4, lora_target=target)
    world = Layout.parse(text).world_size
    for seen in run_distributed(measure, world, text, folder, dtype, lora):
        plan = seen["plan"]
        assert plan.trained < plan.parameters / 10
        assert seen["parameters"] == plan.parameters
        assert seen["weights"] == plan.weights
        assert seen["gradients"] == pytest.approx(plan.gradients, rel=0.02)
        assert seen["optimizer"] == pytest.approx(plan.optimizer, rel=0.05)
        assert seen["activations"] == pytest.approx(plan.activations, rel=0.25)


def test_layers_of_stages():
    from rmega.training.plan import layers_of_stages

    assert layers_of_stages(32, 4) == [8, 8, 8, 8]
    assert layers_of_stages(30, 4, first=7, last=7) == [7, 8, 8, 7]
    assert layers_of_stages(5, 2, first=2) == [2, 3]
    assert layers_of_stages(5, 2, last=2) == [3, 2]


def test_micro_batches_in_flight():
    """1F1B holds pp - stage; one chunk of an interleaved schedule more than the plain one holds."""
    from rmega.training.plan import in_flight

    assert [in_flight(s, 4, None, 100) for s in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, None, 2) == 2
    assert in_flight(0, 4, 2, 100) == (3 * 2 + 4 + 1) / 2


INTERNLM2_20B = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "intermediate_size": 16384,
    "vocab_size": 92544,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA_3_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def big_models(tmp_path_factory):
    """config.json of two large models, and no weights: (folder, million parameters without the
    language-model head)."""
    found = {}
    for name, config, size in (
        ("internlm2-20b", INTERNLM2_20B, 19_293),
        ("llama-3-70b", LLAMA_3_70B, 69_503),
    ):
        found[name] = (tmp_path_factory.mktemp(name), size)
        (found[name][0] / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"prune_last_layer": False}, {"share_prefix": False}], ids=str
)
def test_the_flop_of_a_step_are_those_of_its_packs(changes, tmp_path):
    """Counted from lengths alone, against a count over the segments of the packs."""
    from benchmarks.common import step_flops
    from rmega.data.batching import Batcher
    from rmega.models.hf import read_geometry
    from rmega.training.dry_run import flops_of
    from rmega.training.parity import Layout, layout_config
    from tests.tiny import InMemory, random_comparisons, tiny_llama

    geometry, _ = read_geometry(tiny_llama(tmp_path))
    config = layout_config(
        Layout.parse("1"),
        hf_model=str(tmp_path),
        steps=1,
        global_batch_size=12,
        max_tokens=300,
        lr=1e-3,
        **changes,
    )
    data = InMemory(random_comparisons(12, seed=1))
    batcher = Batcher.of(config, data, geometry, num_ranks=1)
    expected = sum(
        step_flops(
            geometry,
            pack.segments,
            pack.pooled_segments,
            prune_last_layer=config.model.prune_last_layer,
        )
        for pack in batcher.packs(batcher.documents(0))
    )
    counted = sum(flops_of(config, geometry, batcher, number) for number in range(12))
    assert counted == pytest.approx(expected, rel=1e-12)
    config.loss.batch_centering = 0.1  # a second forward pass
    centered = sum(flops_of(config, geometry, batcher, number) for number in range(12))
    assert centered == pytest.approx(expected * 4 / 3, rel=1e-12)


@pytest.fixture(scope="module")
def big_model(big_models):
    return big_models["internlm2-20b"][0]


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


def dry(*argv: str) -> int:
    from examples import pretrain_reward

    return pretrain_reward.main(["--dry-run", "--train-steps", "100", *argv])


@pytest.mark.parametrize("name", ["internlm2-20b", "llama-3-70b"])
def test_a_layout_larger_than_the_machine(name, big_models, data, capsys):
    """512 ranks planned in this one process, from config.json and the lengths of the data alone."""
    folder, size = big_models[name]
    begun = time.monotonic()
    assert (
        dry(
            "--hf-model",
            str(folder),
            "--data-path",
            data,
            "--tp",
            "8",
            "--pp",
            "4",
            "--dp",
            "16",
            "--precision",
            "bf16",
            "--device-memory-gb",
            "80",
        )
        == 0
    )
    assert time.monotonic() - begun < 20
    out = capsys.readouterr().out
    assert (
        "= 512 ranks" in out
        and out.count("\nstage ") == 4
        and "pipeline bubble" in out
        and " FLOP per step, " in out
        and "fits" in out
    )
    rows = [
        [float(x) for x in line.replace(" M ", " ").split()[2:]]
        for line in out.splitlines()
        if line.startswith("stage ")
    ]
    assert sum(row[1] for row in rows) * 8 == pytest.approx(size, rel=1e-3)
    layers, parameters, weights, gradients, optimizer, activations, total = rows[
        1
    ]  # in the middle: nothing but layers
    assert weights == pytest.approx(parameters * 2 / 1e3, abs=0.01)
    assert gradients == pytest.approx(parameters * 4 / 1e3, abs=0.01)
    assert optimizer == pytest.approx(parameters * 12 / 16 / 1e3, abs=0.01)
    assert total == pytest.approx(weights + gradients + optimizer + activations, abs=0.03)


@pytest.mark.parametrize(
    "argv,says",
    [
        (
            ["--tp", "2", "--pp", "1", "--device-memory-gb", "80"],
            "this layout needs .* GB on each rank of stage 0",
        ),
        (["--tp", "3"], "--tp 3 does not divide the model's 8 key/value heads"),
        (["--pp", "5"], "--pp 5 does not divide the model's 48 layers"),
        (["--pp", "4", "--vpp", "5"], "--vpp 5 does not divide"),
        (["--cp", "2"], "--cp 2: context parallelism is not supported"),
        (["--dp", "128"], "--global-batch-size 64 is smaller than the 128 data-parallel ranks"),
        (["--sp"], "--sp needs --tp greater than 1"),
    ],
)
def test_refused_before_anything_is_read(argv, says, big_model, data):
    with pytest.raises(ValueError, match=says):
        dry("--hf-model", str(big_model), "--data-path", data, *argv)


def test_a_dry_run_says_what_recomputation_would_leave(big_model, data, capsys):
    flags = ("--hf-model", str(big_model), "--data-path", data, "--lora-rank", "16")
    totals = {}
    for recompute in ("full", "none"):
        assert dry(*flags, "--precision", "bf16", "--recompute", recompute) == 0
        out = capsys.readouterr().out
        (row,) = (line for line in out.splitlines() if line.startswith("stage "))
        totals[recompute] = row.split()[-1]
        hint = [line for line in out.splitlines() if "memory with --recompute full" in line]
        assert len(hint) == (recompute != "full")
    assert f": {totals['full']} GB on the fullest rank instead of {totals['none']}," in hint[0]
