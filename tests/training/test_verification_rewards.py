"""The rewards that a run writes into its checkpoints: an export compares its own with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import runs
from tests.dist import run_distributed

LAYOUTS = {
    "one rank": (1, {}),
    "tp2 with sequence parallel": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2 with distributed optimizer": (2, {"dp": 2}),
    "pp2 x 2 chunks": (2, {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Four layers, for two stages of two chunks."""
    from tests.made_models import make_llama
    from tests.tiny import tiny_llama

    folder = tiny_llama(
        tmp_path_factory.mktemp("model") / "model", layers=4, vocab=512, reward_head=False
    )
    for file in make_llama(tmp_path_factory.mktemp("tokenizer") / "t").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> str:
    return runs.make_data(model, tmp_path_factory.mktemp("data"))


def rewards_of(folder: Path) -> list[float]:
    kept = json.loads((folder / "rmega.json").read_text())["verification"]
    assert len(kept) == 16
    return [reward for comparison in kept for reward in comparison["rewards"]]


def curve(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if row["type"] == "train"]


QUICK = {("one rank", "bf16"), ("tp2 with sequence parallel", "fp32"), ("pp2 x 2 chunks", "bf16")}
QUICK |= {("dp2 with distributed optimizer", "fp32")}


@pytest.mark.parametrize(
    "layout, precision",
    [
        pytest.param(
            layout, precision, marks=[] if (layout, precision) in QUICK else pytest.mark.slow
        )
        for layout in LAYOUTS
        for precision in ("fp32", "bf16")
    ],
)
def test_rewards_are_written_and_training_does_not_notice(
    layout: str, precision: str, model: Path, data: str, tmp_path: Path
) -> None:
    """Every checkpoint holds the rewards of its own weights, and the run is bit for bit the one
    that computes none."""
    from rmega.export.average import read_part
    from rmega.export.verify import TRAINING_TOLERANCE, rewards_of_parts, training_difference

    ranks, flags = LAYOUTS[layout]
    flags = {**flags, "precision": precision}
    run, silent = tmp_path / "run", tmp_path / "silent"
    argv = runs.flags(model, data, run, steps=6, save_interval=2, **flags)
    assert run_distributed(runs.train, ranks, argv) == [0] * ranks
    argv = runs.flags(model, data, silent, steps=6, num_verification_comparisons=0, **flags)
    assert run_distributed(runs.train, ranks, argv) == [0] * ranks
    assert curve(run) == curve(silent) and len(curve(run)) == 6
    runs.assert_same(run / "iter_0000006", silent / "iter_0000006")

    written = [rewards_of(run / f"iter_{step:07d}") for step in (2, 4, 6)]
    assert written[0] != written[1] != written[2]
    for step in (2, 4, 6):
        folder = run / f"iter_{step:07d}"
        kept = json.loads((folder / "rmega.json").read_text())["verification"]
        items = [[[*c["prefix"], *s] for s in c["suffixes"]] for c in kept]
        (exact,) = rewards_of_parts([read_part(folder)], items, ("float32",))
        difference = training_difference(kept, exact)
        assert difference is not None
        assert difference <= {"fp32": 1e-5, "bf16": TRAINING_TOLERANCE["bfloat16"]}[precision]


def forwards_of_saves(rank: int, world_size: int, argv: list[str]) -> list[tuple[int, int]]:
    """A run; (step, comparisons scored) of every forward that a save waited for."""
    import rmega.training.checkpointer as checkpointer

    original, calls = checkpointer.compute_rewards, []
    save = checkpointer.Checkpointer.save

    def saved(self, **kwargs):
        calls.append([self.model.state.iteration, 0])
        save(self, **kwargs)

    def counted(wrapped, batcher, device):
        calls[-1][1] += len(batcher.dataset)
        return original(wrapped, batcher, device)

    checkpointer.compute_rewards, checkpointer.Checkpointer.save = counted, saved
    try:
        assert runs.train(rank, world_size, argv) == 0
    finally:
        checkpointer.compute_rewards, checkpointer.Checkpointer.save = original, save
    return [tuple(call) for call in calls]


@pytest.mark.parametrize("ranks, flags", [(1, {}), (2, {"dp": 2})])
def test_an_evaluation_has_computed_the_rewards_of_a_checkpoint(
    ranks: int, flags: dict, model: Path, data: str, tmp_path: Path
) -> None:
    """A save after an evaluation scores only what the validation sets lack; each checkpoint holds
    the rewards of its own weights."""
    from rmega.data.indexed import open_preferences
    from rmega.export.average import read_part
    from rmega.export.verify import rewards_of_parts, training_difference

    folder = tmp_path / "few"
    folder.mkdir()
    few = runs.make_data(model, folder, count=5)
    valid, run = [f"few={few}", f"other={few}"], tmp_path / "run"
    argv = runs.flags(model, data, run, steps=6, save_interval=2, eval_interval=4, **flags)
    argv += ["--valid-data-path", *valid, "--no-save-best"]
    count = 2 * len(open_preferences(few))
    assert 0 < count < 16
    want = [(2, 16), (4, 16 - count), (6, 16 - count)]
    assert run_distributed(forwards_of_saves, ranks, argv) == [want] * ranks
    for step in (2, 4, 6):
        folder = run / f"iter_{step:07d}"
        kept = json.loads((folder / "rmega.json").read_text())["verification"]
        assert [c["held_out"] for c in kept] == [True] * count + [False] * (16 - count)
        items = [[[*c["prefix"], *s] for s in c["suffixes"]] for c in kept]
        (exact,) = rewards_of_parts([read_part(folder)], items, ("float32",))
        difference = training_difference(kept, exact)
        assert difference is not None and difference <= 1e-5
