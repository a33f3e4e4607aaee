"""A run from data to an exported folder in bf16: save, resume, evaluate, score, export, on a GPU
and, so that the test itself is known to be right, on a CPU."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.dist import run_distributed
from tests.gpu import ON_CPU, ON_GPU

DEMO = runs.ROOT / "examples" / "data"
STEPS, HALF = 6, 3


def prepare(model: Path, folder: Path, split: str, count: int) -> tuple[str, Path]:
    """(prefix of the tokenized rows, the rows) of the first ``count`` demonstration comparisons."""
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    rows = folder / f"{split}.jsonl"
    with open(DEMO / f"demo.{split}.jsonl", encoding="utf-8") as file:
        rows.write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    prefix = str(folder / split)
    preprocess(
        PreprocessArgs(
            input=(str(rows),), tokenizer=str(model), output_prefix=prefix, max_length=256
        )
    )
    return prefix, rows


def train(rank: int, world_size: int, argv: list[str]) -> dict:
    """Exit code of a run, and whether it took a GPU."""
    from rmega import ops

    try:
        code = runs.train(rank, world_size, argv)
        gpu = torch.cuda.is_available()
        return {
            "code": code,
            "peak": torch.cuda.max_memory_allocated() if gpu else 0,
            "operators": ops.active_implementation("cuda" if gpu else "cpu"),
        }
    finally:
        torch.use_deterministic_algorithms(False)


def evaluate(rank: int, world_size: int, model: str, rows: str, output: str) -> dict:
    from rmega.commands import evaluate as program

    program.main(program.EvaluateArgs(model=model, data=[rows], json=output, probes=8))
    return json.loads(Path(output).read_text())


def score(rank: int, world_size: int, model: str, rows: str, output: str) -> list[dict]:
    from rmega.commands import score as program

    assert program.main(program.ScoreArgs(model=model, input=(rows,), output=output)) == 0
    return [json.loads(line) for line in Path(output).read_text().splitlines()]


def export(rank: int, world_size: int, run: str, output: str) -> int:
    from rmega.commands.export import main

    return main(["--load", run, "--output", output])


@pytest.mark.parametrize("device", [ON_GPU, ON_CPU])
def test_from_data_to_an_exported_folder(small_llama, tmp_path, device):
    def call(function, *args):
        return run_distributed(function, 1, *args, gpus=device == "cuda", timeout=200)[0]

    data, _ = prepare(small_llama, tmp_path, "train", 60)
    valid, rows = prepare(small_llama, tmp_path, "valid", 30)
    whole, half = tmp_path / "whole", tmp_path / "half"

    def flags(run: Path, **more) -> list[str]:
        more = {"precision": "bf16", "save_interval": HALF, "valid_data_path": valid, **more}
        return runs.flags(small_llama, data, run, steps=STEPS, deterministic=True, **more)

    result = call(train, flags(whole))
    assert result["code"] == 0 and bool(result["peak"]) == (device == "cuda")
    assert json.loads((whole / "config.json").read_text())["train"]["deterministic"] is True
    losses = [
        row["loss"]
        for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
        if row["type"] == "train"
    ]
    assert len(losses) == STEPS and all(0 < loss < 5 for loss in losses)

    # Resuming from the middle ends in the same bits.
    half.mkdir()
    shutil.copytree(whole / f"iter_{HALF:07d}", half / f"iter_{HALF:07d}")
    (half / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    assert call(train, flags(half))["code"] == 0
    runs.assert_same(whole / f"iter_{STEPS:07d}", half / f"iter_{STEPS:07d}")

    # A run and its export give the same rewards through every program.
    assert call(export, str(whole), str(tmp_path / "export")) == 0
    assert not list((tmp_path / "export").glob("UNVERIFIED*"))
    result = call(evaluate, str(whole), str(rows), str(tmp_path / "evaluation.json"))
    (numbers,) = result["sets"].values()
    assert numbers["num_pairs"] == 30 and 0 <= numbers["accuracy"] <= 1
    ours, exported = (
        call(score, str(model), str(rows), str(tmp_path / f"{model.name}.jsonl"))
        for model in (whole, tmp_path / "export")
    )
    values = [torch.tensor([row["rewards"] for row in answer]) for answer in (ours, exported)]
    assert values[0].shape == (30, 2) and values[0].std() > 0
    # The checkpoint holds fp32 weights, the export bf16 ones; a GPU also computes in bf16.
    tolerance = (4 if device == "cuda" else 1) * 2.0**-8
    assert (values[0] - values[1]).abs().max() <= tolerance * values[0].abs().max()
