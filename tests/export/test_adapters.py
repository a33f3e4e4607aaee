"""Runs with adapters: resumed bit for bit, refused on another base model, exported merged and as
peft has them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE
from tests import runs
from tests.dist import run_distributed

LORA = {"lora_rank": 4, "lora_alpha": 6, "head_lr": 2e-3, "lr": 3e-2, "adam_eps": 0.1}


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


def train(model, data, run, *, world: int = 1, events=None, **options) -> None:
    argv = runs.flags(model, data, run, **{**LORA, **options})
    assert set(run_distributed(runs.train, world, argv, events)) <= {0, 75}


@pytest.fixture(scope="module")
def run(small_llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small_llama, data, folder, steps=4)
    return folder


def test_a_checkpoint_holds_adapters_and_head_alone(run, small_llama):
    held = runs.tensors(run / "iter_0000004")
    names = {name for name in held if not name.startswith("optimizer")}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in names} == {
        *("lora_qkv", "lora_proj", "lora_fc1", "lora_fc2", "reward_head")
    }
    info = json.loads((run / "iter_0000004" / "rmega.json").read_text())
    assert info["base"]["folder"] == str(small_llama.resolve())
    assert list(info["base"]["files"]) == ["model.safetensors"]


def test_a_stopped_run_resumes_bit_for_bit(small_llama, data, run, tmp_path):
    stopped = tmp_path / "run"
    train(small_llama, data, stopped, steps=4, events={2: ("SIGTERM", 0)})
    assert (stopped / "iter_0000002").is_dir() and not (stopped / "iter_0000004").exists()
    train(small_llama, data, stopped, steps=4)
    runs.assert_same(stopped / "iter_0000004", run / "iter_0000004")


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "sp": True}, {"pp": 2, "num_layers_in_first_pipeline_stage": 2}, {}]
)
def test_a_checkpoint_of_two_ranks_resumes_on_one(layout, small_llama, data, run, tmp_path):
    train(
        small_llama, data, tmp_path / "run", world=2, steps=4, events={2: ("SIGTERM", 1)}, **layout
    )
    train(small_llama, data, tmp_path / "run", steps=4)
    one, other = (runs.tensors(folder / "iter_0000004") for folder in (run, tmp_path / "run"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize(
    "change,says",
    [
        ({"lora_rank": 8}, "--lora-rank 8: the checkpoint's run has 4"),
        ({"lora_alpha": 8}, "--lora-alpha 8.0: the checkpoint's run has 6.0"),
        ({"lora_target": "qkv"}, "--lora-target qkv: the checkpoint's run has all-linear"),
        ({"lora_rank": None, "lora_alpha": None}, "--lora-rank 0: the checkpoint's run has 4"),
    ],
)
def test_other_adapters_are_refused(change, says, small_llama, data, run):
    with pytest.raises(RuntimeError, match=says):
        train(small_llama, data, run, steps=6, **change)


def test_another_base_model_is_refused(small_llama, data, run, tmp_path):
    """Of the same shape: nothing but its weights tells."""
    other = shutil.copytree(small_llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RuntimeError, match=f"--hf-model {other}: not the weights that the adapters"
    ):
        train(other, data, run, steps=6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_export_has_the_rewards_of_the_training(run, dtype, tmp_path, small_llama):
    assert convert(run=run, output=tmp_path / "merged", dtype=dtype) == 0
    verification = json.loads((tmp_path / "merged" / RECIPE).read_text())["verification"]
    assert verification["passed"] and verification["training_difference"] < 1e-5
    assert verification["relative_difference"] < 1e-5
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(small_llama / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert merged[name].dtype == getattr(torch, dtype)
    assert (merged[name].float() - base[name]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["merged", "adapter", "average"])
def test_the_base_model_is_read_for_its_checksums_once(kind, run, tmp_path, monkeypatch):
    """Writing, comparing and scoring all need it, and reading it takes minutes for a large one."""
    from rmega.checkpointing import base_model

    record, calls = base_model.record, []
    monkeypatch.setattr(base_model, "record", lambda folder: calls.append(folder) or record(folder))
    copies = [run]
    if kind == "average":
        copies.append(shutil.copytree(run, tmp_path / "copy"))
    family = "adapter" if kind == "adapter" else "auto"
    assert convert(run=run, output=tmp_path / "out", average_with=copies[1:], family=family) == 0
    assert len(calls) == len(copies)


def test_the_adapter_export_is_one_of_peft(run, tmp_path, small_llama, data):
    """Verified with peft; scored, and trained further, as what it is."""
    pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path / "adapter"
    assert convert(run=run, output=folder, family="adapter") == 0
    recipe = json.loads((folder / RECIPE).read_text())
    assert recipe["verification"]["relative_difference"] < 1e-5
    assert recipe["adapter_of"] == str(small_llama.resolve())
    assert "PeftModel.from_pretrained" in (folder / "README.md").read_text()
    assert not (folder / "config.json").exists()
    (rewards,) = run_distributed(score_both, 1, str(run), str(folder))
    assert torch.allclose(*rewards, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="trained further with --lora-rank 4 --lora-alpha 6"):
        train(folder, data, tmp_path / "next", steps=1, lora_alpha=8)
    train(folder, data, tmp_path / "next", steps=1, lr=1e-12, head_lr=1e-12)
    one, other = runs.tensors(run / "iter_0000004"), runs.tensors(tmp_path / "next/iter_0000001")
    for name in other:
        if not name.startswith("optimizer"):
            assert torch.allclose(one[name], other[name], atol=1e-9), name
    assert verify_only(run=run, output=folder) == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"][0, 0] += 1e-4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert verify_only(run=run, output=folder) == 1


def score_both(rank: int, world_size: int, run: str, folder: str) -> list[torch.Tensor]:
    from rmega.scoring.scorer import load_scorer

    sequences = [[1, 5, 9, 2], [1, 5, 80, 33, 2], [1, 7, 2]]
    return [
        torch.tensor(load_scorer(path, dtype="fp32").score_sequences(sequences))
        for path in (run, folder)
    ]


def test_an_adapter_of_a_run_without_is_refused(small_llama, data, tmp_path):
    plain = {"lora_rank": None, "lora_alpha": None}
    train(small_llama, data, tmp_path / "run", steps=1, **plain)
    with pytest.raises(ValueError, match="--format adapter: the run trained all weights"):
        convert(run=tmp_path / "run", output=tmp_path / "x", family="adapter")
    assert not (tmp_path / "x").exists()
