"""Resuming: from a damaged newest checkpoint, from an older one, into a folder that another run
holds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil

import pytest
import torch

from tests import runs
from tests.dist import run_distributed

STEPS = 4


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(small_llama, data, tmp_path_factory):
    """A run of four steps with a checkpoint of each."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = runs.flags(small_llama, data, run, steps=STEPS, save_interval=1)
    assert run_distributed(runs.train, 1, flags) == [0]
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def names(run) -> set[str]:
    return {p.name.removeprefix("iter_000000") for p in run.glob("iter_*")}


def tracker(run) -> str:
    return (run / "latest_checkpointed_iteration.txt").read_text().strip()


def spoil(run, iteration: int) -> None:
    shard = next((run / f"iter_{iteration:07d}").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def refused(rank: int, world_size: int, argv: list[str]) -> str:
    """The error of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runs.train(rank, world_size, argv)
        except ValueError as error:
            return str(error)
    return ""


def test_pruning_after_a_damaged_newest_checkpoint(run, small_llama, data) -> None:
    """It is set aside, and the one that the run resumed from goes only when a new one is there."""
    spoil(run, 4)
    flags = runs.flags(small_llama, data, run, steps=STEPS, keep_last=1)
    ((code, said),) = run_distributed(runs.train_and_say, 1, flags)
    assert code == 0 and f"resuming from {run / 'iter_0000003'}" in said
    assert "iter_0000004.abandoned" in said
    assert names(run) == {"4", "4.abandoned"} and tracker(run) == "4"
    ((code, said),) = run_distributed(runs.train_and_say, 1, flags)
    assert said.splitlines()[-1] == "nothing to do: the run is complete at step 4"


def test_resuming_from_an_older_checkpoint(run, trained, small_llama, data) -> None:
    """The newer ones are set aside in one line, the metrics with them; --keep-last counts the new
    ones; the next --load RUN continues from these."""
    argv = runs.flags(
        small_llama, data, run, steps=3, load=run / "iter_0000001", keep_last=2, save_interval=1
    )
    ((code, said),) = run_distributed(runs.train_and_say, 1, argv)
    assert code == 0
    (line,) = [line for line in said.splitlines() if line.startswith("set aside in ")]
    for i in (2, 3, 4):
        assert f"iter_000000{i}.abandoned" in line
    assert names(run) == {"2", "3", "2.abandoned", "3.abandoned", "4.abandoned"}
    assert tracker(run) == "3"
    runs.assert_same(run / "iter_0000004.abandoned", trained / "iter_0000004")
    rows = (run / "metrics.jsonl.abandoned").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    argv = runs.flags(small_llama, data, run, steps=STEPS, keep_last=2)
    ((_, said),) = run_distributed(runs.train_and_say, 1, argv)
    assert f"resuming from {run / 'iter_0000003'}" in said
    assert names(run) >= {"3", "4", "2.abandoned", "3.abandoned", "4.abandoned"}


def test_a_checkpoint_that_was_left_continues_elsewhere_only(run, small_llama, data) -> None:
    (run / "iter_0000004").rename(run / "iter_0000004.abandoned")
    left = run / "iter_0000004.abandoned"
    argv = runs.flags(small_llama, data, run, steps=5, load=left)
    (said,) = run_distributed(refused, 1, argv)
    assert "the run in --save" in said and "has left this checkpoint" in said
    argv = runs.flags(small_llama, data, run.parent / "other", steps=5, load=left)
    assert run_distributed(runs.train, 1, argv) == [0]


def test_a_slash_more_is_the_same_folder(small_llama, data, tmp_path) -> None:
    argv = runs.flags(small_llama, data, tmp_path / "run", steps=1, load=f"{tmp_path}/x/../run/")
    assert run_distributed(runs.train, 1, argv) == [0]
    assert run_distributed(runs.train, 1, argv) == [0]


def short_patience(rank: int, world_size: int, argv: list[str]) -> str:
    from rmega.checkpointing import lock

    original = lock.hold
    lock.hold = lambda folder: original(folder, patience=1.0)
    try:
        return refused(rank, world_size, argv)
    finally:
        lock.hold = original


def test_a_second_run_in_the_same_folder_is_refused(small_llama, data, tmp_path) -> None:
    """It names the first, and touches nothing of it; both ranks end."""
    run = tmp_path / "run"
    first = runs.start(
        1,
        runs.flags(small_llama, data, run, steps=10_000, save_interval=1, keep_last=2),
        launcher="python",
    )
    try:
        for line in first.stdout:
            if line.startswith("saved "):
                break
        argv = runs.flags(small_llama, data, run, steps=10_000)
        for said in run_distributed(short_patience, 2, argv):
            assert f"--save {run}: in use by another run (process {first.pid} on " in said
        assert first.poll() is None
        first.terminate()
        out, _ = first.communicate(timeout=60)
        assert first.returncode == 75, out
        assert "not written" not in out and not (run / "run.lock").exists()
        rows = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, len(rows) + 1))
    finally:
        first.kill()


def test_every_flag_has_a_class() -> None:
    """What a flag does that differs from the checkpoint's: a new flag needs an entry."""
    from rmega.config import group_types
    from rmega.training.resume import BOUND, CONTENT, EFFECT, HARMLESS

    known = [field.name for group in group_types().values() for field in dataclasses.fields(group)]
    assert len(set(known)) == len(known)  # a name tells the flag, whatever its group
    assert sorted(known) == sorted([*BOUND, *CONTENT, *EFFECT, *HARMLESS])


@pytest.mark.parametrize(
    "more", [{}, {"no_use_distributed_optimizer": True}, {"precision": "bf16"}]
)
def test_a_lower_learning_rate_takes_effect(more, small_llama, data, tmp_path) -> None:
    """So do all values that the optimizer's groups carry; the log and the records say it."""
    run = tmp_path / "run"
    flags = {"lr_warmup_fraction": 0, "lr_decay_style": "constant", **more}
    assert run_distributed(runs.train, 1, runs.flags(small_llama, data, run, steps=2, **flags)) == [
        0
    ]
    argv = runs.flags(small_llama, data, run, steps=4, adam_beta1=0.5, adam_eps=1e-3, **flags)
    argv[argv.index("--lr") + 1] = "1e-6"
    ((code, said),) = run_distributed(runs.train_and_say, 1, argv)
    (line,) = [x for x in said.splitlines() if x.startswith("differs from the checkpoint's run")]
    for part in (
        "--lr 1e-06 (was 0.001)",
        "--adam-beta1 0.5 (was 0.9)",
        "--adam-eps 0.001 (was 1e-08)",
        "--train-steps 4 (was 2)",
    ):
        assert part in line
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [1e-3, 1e-3, 1e-6, 1e-6]
    common = torch.load(run / "iter_0000004" / "common.pt")
    optimizer = common["optimizer"]
    for group in optimizer.get("optimizer", optimizer)["param_groups"]:
        assert (group["max_lr"], tuple(group["betas"]), group["eps"]) == (1e-6, (0.5, 0.999), 1e-3)
    info = json.loads((run / "iter_0000004" / "rmega.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert info["changes"] == config["run"]["changes"]
    (change,) = info["changes"]
    assert change["iteration"] == 2 and change["--lr"] == [1e-3, 1e-6]


def test_auto_keeps_the_precision_of_the_checkpoint(run, small_llama, data, tmp_path) -> None:
    """Whatever is faster on this processor; another one by name is listed."""
    for precision, listed in (("auto", False), ("bf16", True)):
        argv = runs.flags(
            small_llama, data, tmp_path / precision, steps=5, load=run, precision=precision
        )
        ((_, said),) = run_distributed(runs.train_and_say, 1, argv)
        assert ("--precision bf16 (was fp32)" in said) == listed
        assert f"compute: {'bf16' if listed else 'fp32'}, " in said


@pytest.mark.parametrize(
    "flag,value,says",
    [
        ("--head-init", "zero", "--head-init zero: the checkpoint's run has normal"),
        ("--seed", "5", "--seed 5: the checkpoint's run has 42"),
        ("--global-batch-size", "3", "--global-batch-size 3: the checkpoint's run has 6"),
    ],
)
def test_what_is_bound_is_refused(flag, value, says, run, small_llama, data) -> None:
    (said,) = run_distributed(
        refused, 1, [*runs.flags(small_llama, data, run, steps=5), flag, value]
    )
    assert says in said


def test_a_loss_scale_in_fp32_is_refused(run, small_llama, data) -> None:
    """Which precision auto keeps is known only from the checkpoint."""
    flags = ["--precision", "auto", "--initial-loss-scale", "1024"]
    (said,) = run_distributed(
        refused, 1, [*runs.flags(small_llama, data, run, steps=5, precision=None), *flags]
    )
    assert "--initial-loss-scale 1024.0 has no effect: the run computes in fp32" in said
