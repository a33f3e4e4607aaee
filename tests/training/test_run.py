"""A run as a whole: stopped by signals, out of time, out of disk, with numbers that go wrong;
errors said once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import time
from importlib.util import find_spec

import pytest
from transformers import LlamaForCausalLM

from tests import runs
from tests.dist import run_distributed

STEPS = 8


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(small_llama, data, tmp_path_factory):
    """The last checkpoint of a run that nothing disturbed, by number of data-parallel ranks."""
    out = {}
    for ranks in (1, 2):
        run = tmp_path_factory.mktemp("unbroken") / "run"
        codes = run_distributed(runs.train, ranks, runs.flags(small_llama, data, run, steps=STEPS))
        assert codes == [0] * ranks
        out[ranks] = run / f"iter_{STEPS:07d}"
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_at_random_steps(ranks, small_llama, data, unbroken, tmp_path):
    """Stopped several times, by a signal on one rank only; the end is bit for bit that of an
    unbroken run."""
    rng = random.Random(ranks)
    run, done, stops = tmp_path / "run", 0, 0
    while done < STEPS:
        after = rng.randint(1, 3)
        signal = rng.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
        codes = run_distributed(
            runs.train,
            ranks,
            runs.flags(small_llama, data, run, steps=STEPS),
            {after: (signal, rng.randrange(ranks))},
        )
        done += after
        assert codes == [75 if done < STEPS else 0] * ranks
        stops += done < STEPS
    assert stops >= 2
    runs.assert_same(run / f"iter_{STEPS:07d}", unbroken[ranks])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["type"] == "train"] == list(range(1, STEPS + 1))


def interrupted_evaluation(rank: int, world_size: int, argv: list[str], number: int) -> int:
    """A run whose last rank gets SIGTERM in the middle of its evaluation ``number``."""
    import rmega.training.evaluator as evaluator
    import rmega.training.train as engine

    original, evaluations, within = engine.run_schedule, [], []
    evaluate = evaluator.evaluate

    def counted(*args):
        evaluations.append(0)
        within.append(True)
        try:
            return evaluate(*args)
        finally:
            within.pop()

    def run_schedule(*args, forward_only: bool):
        if forward_only and within:  # a checkpoint has rewards, too
            evaluations[-1] += 1
            if len(evaluations) == number and evaluations[-1] == 2 and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(evaluations) != number or evaluations[-1] <= 2, "the evaluation went on"
        return original(*args, forward_only=forward_only)

    engine.run_schedule, evaluator.evaluate = run_schedule, counted
    try:
        return runs.train(rank, world_size, argv)
    finally:
        engine.run_schedule, evaluator.evaluate = original, evaluate


@pytest.mark.parametrize("number,saved", [(1, []), (2, [4]), (3, [4, STEPS])])
def test_a_signal_ends_an_evaluation(number, saved, small_llama, data, unbroken, tmp_path):
    """Before the first step, in the middle and at the end: it is left after the batch, the run
    saves and goes on."""
    run = tmp_path / "run"
    argv = runs.flags(small_llama, data, run, steps=STEPS, eval_interval=4, valid_data_path=data)
    assert run_distributed(interrupted_evaluation, 2, argv, number) == [75, 75]
    assert sorted(f.name for f in run.glob("iter_*")) == [
        f"iter_{i:07d}" for i in saved
    ]  # 4: the best so far
    assert run_distributed(runs.train, 2, argv) == [0, 0]
    runs.assert_same(run / f"iter_{STEPS:07d}", unbroken[2])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["type"] == "eval"] == [0, 4, STEPS]


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(small_llama, data, tmp_path):
    """The signal comes in the step after which an evaluation is due; --load may be another run."""
    run = tmp_path / "run"
    argv = runs.flags(small_llama, data, run, steps=STEPS, eval_interval=4, valid_data_path=data)
    assert run_distributed(runs.train, 1, argv, {4: ("SIGTERM", 0)}) == [75]
    argv += ["--load", str(run), "--save", str(tmp_path / "other")]
    assert run_distributed(runs.train, 1, argv, {2: ("SIGTERM", 0)}) == [75]
    for folder, steps in ((run, [0]), (tmp_path / "other", [4])):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["type"] == "eval"] == steps
    best = json.loads((tmp_path / "other" / "iter_0000006" / "rmega.json").read_text())["best"]
    assert best[1] == 4 and (tmp_path / "other" / "iter_0000004").is_dir()


def not_finite(rank: int, world_size: int, argv: list[str], number: int) -> tuple[int, str]:
    """A run whose evaluation ``number`` gets a reward that is not finite."""
    import rmega.training.rewards as engine

    original, count = engine.compute_rewards, [0]

    def compute_rewards(*args, **kwargs):
        count[0] += 1
        rewards = original(*args, **kwargs)
        if count[0] == number:
            rewards[3] = float("nan")
        return rewards

    engine.compute_rewards = compute_rewards
    try:
        return runs.train_and_say(rank, world_size, argv)
    finally:
        engine.compute_rewards = original


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_reward_that_is_not_finite_does_not_end_the_run(number, small_llama, data, tmp_path):
    """It is counted and reported, there is no accuracy of that evaluation, and the run saves."""
    run = tmp_path / "run"
    argv = runs.flags(small_llama, data, run, steps=4, eval_interval=2, valid_data_path=data)
    ((code, said),) = run_distributed(not_finite, 1, argv, number)
    step = (0, 2, 4)[number - 1]
    assert code == 0 and f"warning: step {step}: rows: 1 of 120 rewards are not finite" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["type"] == "eval"] == [
        s for s in (0, 2, 4) if s != step
    ]
    (failed,) = [row for row in rows if row["type"] == "eval_failed"]
    assert (failed["step"], failed["not_finite"], failed["num_rewards"]) == (step, 1, 120)
    assert (run / "iter_0000004").is_dir()


def test_without_a_run_folder_nobody_is_told_to_start_again(small_llama, data):
    """Exit code 75 promises that a second start goes on."""
    argv = runs.flags(small_llama, data, steps=10_000)
    assert run_distributed(runs.train, 1, argv, {2: ("SIGTERM", 0)}) == [1]


@pytest.mark.parametrize("save", [False, True])
def test_what_will_not_be_kept_is_said_at_the_start(save, small_llama, data, tmp_path):
    said = run_distributed(
        spoken, 2, runs.flags(small_llama, data, tmp_path / "run" if save else None, steps=1)
    )
    notes = [line for line in said[0].splitlines() if line.startswith("note: no --save")]
    assert said[1] == "" and len(notes) == (0 if save else 1)
    assert save or (notes[0] == said[0].splitlines()[0] and "--save FOLDER keeps them" in notes[0])


@pytest.mark.parametrize(
    "steps,given,expected",
    [(3, None, [1, 2, 3]), (100, None, list(range(2, 101, 2))), (3, 2, [2, 3])],
)
def test_a_short_run_leaves_rows_enough_for_curves(
    steps, given, expected, small_llama, data, tmp_path
):
    argv = runs.flags(small_llama, data, tmp_path / "run", steps=steps, batch=1, log_interval=given)
    assert run_distributed(runs.train, 1, argv) == [0]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if row["type"] == "train"] == expected
    assert (
        rows[-1]["train_seconds"] > 0
    )  # for the page of the run, as is what config.json has beside the flags
    known = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert (
        known["steps"] == steps
        and known["layout"].startswith("tp 1, pp 1, dp 1")
        and known["precision"] == "fp32"
    )


def test_time_is_over(small_llama, data, tmp_path):
    run = tmp_path / "run"
    codes = run_distributed(
        runs.train, 1, runs.flags(small_llama, data, run, steps=10_000, exit_duration_min=0.01)
    )
    assert codes == [75]
    assert len(list(run.glob("iter_*"))) == 1


def test_keeps_the_last_and_the_best(small_llama, data, tmp_path):
    """--keep-last 2 with saves at 2, 4, 6, 8; the best evaluation's checkpoint stays as well."""
    run = tmp_path / "run"
    run_distributed(
        runs.train,
        1,
        runs.flags(
            small_llama,
            data,
            run,
            steps=STEPS,
            save_interval=2,
            eval_interval=1,
            keep_last=2,
            valid_data_path=data,
        ),
    )
    kept = {int(folder.name[5:]) for folder in run.glob("iter_*")}
    best = json.loads((run / "iter_0000008" / "rmega.json").read_text())["best"][1]
    assert kept - {best} >= {8} and best in kept and len(kept) <= 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["accuracy"] for row in rows if row["type"] == "eval" and row["step"]}
    assert scores[best] == max(scores.values())


@pytest.mark.parametrize(
    "flags,first,valid,expected",
    [
        ([], 0, False, (1, 1, 1)),
        (["--save-interval", "10"], 0, False, (3, 3, 3)),
        (["--save-interval", "10"], 10, False, (2, 2, 2)),
        (["--save-interval", "10"], 23, False, (0, 0, 0)),
        (["--eval-interval", "10"], 0, True, (1, 3, 3)),
        (["--eval-interval", "10"], 0, False, (1, 1, 1)),
        (["--eval-interval", "10", "--no-save-best"], 0, True, (1, 1, 1)),
        (
            ["--save-interval", "5", "--eval-interval", "10"],
            0,
            True,
            (5, 5, 5),
        ),  # the best are saved anyway
        (["--save-interval", "5", "--eval-interval", "4"], 0, True, (5, 9, 9)),
        (["--save-interval", "2", "--keep-last", "2"], 0, False, (12, 12, 3)),
        (
            ["--save-interval", "2", "--keep-last", "2", "--eval-interval", "5"],
            0,
            True,
            (12, 14, 4),
        ),
    ],
)
def test_how_many_checkpoints_are_to_come(flags, first, valid, expected):
    from rmega.cli import parse_args
    from rmega.config import TrainingConfig
    from rmega.training import disk

    config = parse_args(
        TrainingConfig,
        ["--hf-model", "m", "--data-path", "d", "--train-steps", "23", "--save", "run", *flags],
    )
    assert disk.to_come(config, first=first, steps=23, best_of_evaluations=valid) == expected


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, {}),
        (1, {"precision": "bf16"}),
        (2, {"tp": 2, "precision": "bf16"}),
        (1, {"no_use_distributed_optimizer": True}),
    ],
)
def test_the_disk_that_checkpoints_take_is_announced(ranks, layout, small_llama, data, tmp_path):
    """The size that is said is that of the folder, to 10 %, whatever the layout writes."""
    run = tmp_path / "run"
    said = run_distributed(
        spoken, ranks, runs.flags(small_llama, data, run, steps=3, save_interval=2, **layout)
    )[0]
    (line,) = [line for line in said.splitlines() if line.startswith("disk: ")]
    assert (
        ", 2 are to come: " in line
        and line.endswith(f" GB free at {run}")
        and "warning: --save" not in said
    )
    told = float(line.split()[5]) * {"GB": 1e9, "MB": 1e6}[line.split()[6].strip(",")]
    written = sum(file.stat().st_size for file in (run / "iter_0000003").rglob("*"))
    assert told == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, {"precision": "bf16"}),
        (1, {"precision": "fp16"}),
        (2, {"tp": 2, "precision": "bf16"}),
        (2, {"pp": 2, "precision": "bf16", "num_layers_in_first_pipeline_stage": 2}),
        (2, {"precision": "fp32"}),
    ],
)
def test_without_the_distributed_optimizer_a_run_goes_on(
    ranks, layout, small_llama, data, tmp_path
):
    """The undistributed optimizer holds the fp32 head beside copies of everything else."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = {"steps": 4, "save_interval": 2, "no_use_distributed_optimizer": True, **layout}
    if layout["precision"] == "fp16":
        options["initial_loss_scale"] = 256
    assert (
        run_distributed(runs.train, ranks, runs.flags(small_llama, data, whole, **options))
        == [0] * ranks
    )
    shutil.copytree(whole, part)
    shutil.rmtree(part / "iter_0000004")
    (part / "latest_checkpointed_iteration.txt").write_text("2")
    assert (
        run_distributed(runs.train, ranks, runs.flags(small_llama, data, part, **options))
        == [0] * ranks
    )
    rows = [
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in map(json.loads, lines)
            if row["type"] == "train"
        ]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (whole, part))
    ]
    assert [row[0] for row in rows[0]] == [1, 2, 3, 4] and rows[0] == rows[1]


def test_checkpoints_that_will_not_fit_are_warned_about(tmp_path, monkeypatch):
    from rmega.cli import parse_args
    from rmega.config import TrainingConfig
    from rmega.training import disk

    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10e9, 6e9, 4e9)
    )
    for flags, size, says in (
        (["--save-interval", "10"], 1e9, ""),
        (["--save-interval", "10"], 2e9, "will not fit"),
        (["--eval-interval", "10"], 2e9, "may not fit"),
        (["--save-interval", "10", "--keep-last", "1"], 1.9e9, ""),
    ):
        config = parse_args(
            TrainingConfig,
            [
                "--hf-model",
                "m",
                "--data-path",
                "d",
                "--train-steps",
                "23",
                "--save",
                str(tmp_path),
                *flags,
            ],
        )
        line, *more = disk.announce(config, int(size), first=0, steps=23, best_of_evaluations=True)
        assert f"about {size / 1e9:.2f} GB" in line and f"4.00 GB free at {tmp_path}" in line
        assert [says in text for text in more] == [True] * bool(says)


def test_an_uneven_last_batch_does_not_hang(small_llama, data, tmp_path):
    """7 comparisons in batches of 6 and 1: one of two ranks has nothing in the last step."""
    four_layers = tmp_path / "four"  # two stages of two chunks
    shutil.copytree(small_llama, four_layers)
    model = LlamaForCausalLM.from_pretrained(small_llama)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    for file in ("config.json", "model.safetensors"):
        (four_layers / file).unlink()
    model.save_pretrained(four_layers)
    for name, folder, layout in (
        ("dp2", small_llama, {"dp": 2}),
        ("pp2", small_llama, {"pp": 2, "num_layers_in_first_pipeline_stage": 2}),
        ("vpp2", four_layers, {"pp": 2, "vpp": 2}),
    ):
        run = tmp_path / name
        codes = run_distributed(
            runs.train,
            2,
            runs.flags(folder, data, run, steps=None, train_epochs=7 / 60, **layout),
            timeout=60,
        )
        assert codes == [0, 0]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["num_samples"] for row in rows if row["type"] == "train"] == [6, 1]


def test_a_batch_smaller_than_the_ranks_is_refused(small_llama, data):
    with pytest.raises(
        RuntimeError, match="--global-batch-size 1 is smaller than the 2 data-parallel ranks"
    ):
        run_distributed(runs.train, 2, runs.flags(small_llama, data, batch=1))


def poisoned(rank: int, world_size: int, argv: list[str], bad: list[int], after: int = 0) -> str:
    """A run in which a pack that holds one of the comparisons ``bad`` gives an infinite loss after
    step ``after``."""
    import rmega.training.train as engine
    from examples import pretrain_reward

    original, count = engine.pair_loss, [0]
    step = engine.train_step

    def pair_loss(args, batch, rewards):
        loss, number, stats = original(args, batch, rewards)
        if count[0] > after and set(bad) & set(batch.documents.tolist()):
            loss = loss * float("inf")
        return loss, number, stats

    def train_step(*args):
        count[0] += 1
        return step(*args)

    engine.pair_loss, engine.train_step = pair_loss, train_step
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return f"{pretrain_reward.main(argv)}\n{said.getvalue()}"
    except ValueError as error:
        return str(error)
    finally:
        engine.pair_loss, engine.train_step = original, step


@pytest.mark.parametrize("layout", [{}, {"tp": 2}])
def test_a_poisoned_comparison_is_skipped_and_named(layout, small_llama, data, tmp_path):
    """One bad comparison costs one update; its batch is named, and the run goes on to the end."""
    order = 0
    out = run_distributed(
        poisoned,
        2 if layout else 1,
        runs.flags(small_llama, data, tmp_path / "run", steps=10, **layout),
        [order],
    )
    assert all(text.startswith("0\n") for text in out)
    said = [
        line for text in out for line in text.splitlines() if "update skipped" in line
    ]  # only rank 0 speaks
    assert len(said) == 1 and "(1 in a row, 1 in all)" in said[0]
    named = json.loads(said[0].split("comparisons ")[1])
    assert order in named and len(named) == 6


def test_too_many_skipped_updates_leave_a_file_that_replays(small_llama, data, tmp_path):
    from rmega.commands import replay

    run = tmp_path / "run"
    (said,) = run_distributed(
        poisoned,
        1,
        runs.flags(small_llama, data, run, steps=10, max_skipped_steps=2),
        list(range(60)),
        3,
    )
    assert said.startswith(
        "--max-skipped-steps 2: so many updates in a row had no finite gradient; python tools/"
    )
    file = run / "skipped_5.json"
    kept = json.loads(file.read_text())
    assert len(kept["documents"]) == 6
    (rows,) = run_distributed(replayed, 1, str(file))
    assert [row.document for row in rows] == kept["documents"]
    assert all(
        row.finite for row in rows
    )  # the poison was the test's own, so the replay finds the batch sound
    assert replay.table(rows).count("\n") == 7


def test_replay_takes_its_file_as_the_refusal_names_it(tmp_path):
    from rmega.commands import replay

    with pytest.raises(
        ValueError, match="skipped_5.json: not a file that a run left for replaying"
    ):
        replay.main([str(tmp_path / "skipped_5.json")])


def replayed(rank: int, world_size: int, file: str):
    from rmega.commands import replay

    return replay.replay(file)


def spoken(rank: int, world_size: int, argv: list[str]) -> str:
    """What a run prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runs.train(rank, world_size, argv)
    return said.getvalue()


def test_a_small_held_out_set_is_filled_up_for_verification(small_llama, data, tmp_path):
    """Three held-out comparisons are too few to verify an export; training comparisons take the
    other places, and say so."""
    from rmega.data.indexed import open_preferences

    train = open_preferences(data)
    few = runs.make_data(small_llama, tmp_path, count=3)
    run_distributed(
        spoken, 1, runs.flags(small_llama, data, tmp_path / "run", steps=1, valid_data_path=few)
    )
    kept = json.loads((tmp_path / "run" / "iter_0000001" / "rmega.json").read_text())[
        "verification"
    ]
    assert [c["held_out"] for c in kept] == [True] * 3 + [False] * 13
    assert kept[3]["prefix"] == train.get(0).prefix.tolist()


@pytest.mark.parametrize("kept", [4, 16])
def test_too_few_comparisons_to_verify_are_reported_at_the_start(kept, small_llama, data, tmp_path):
    (said,) = run_distributed(
        spoken,
        1,
        runs.flags(small_llama, data, tmp_path / "run", steps=1, num_verification_comparisons=kept),
    )
    assert (
        f"verifying an export takes 16 comparisons, checkpoints of this run will hold {kept} "
        in said
    ) == (kept < 16)
    absent = [name for name in ("transformer_engine", "apex") if find_spec(name) is None]
    assert said.count("not installed") == bool(absent)  # in one line, whatever Megatron-Core prints
    assert not absent or f"; not installed: {', '.join(absent)}\n" in said


def test_errors_are_said_once(small_llama, data, tmp_path):
    """A user's error on both ranks: one line, exit code 2, no traceback."""
    begun = time.monotonic()
    process = runs.start(2, runs.flags(small_llama, str(tmp_path / "nothing")))
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 2
    assert (
        out.count("no preference dataset here") == 2
    )  # the rank's line, and the launcher's last one
    assert out.splitlines()[-1].startswith("launch: rank 0 failed first: error: ")
    assert "Traceback" not in out
    assert time.monotonic() - begun < 60


def test_the_example_is_the_run(small_llama) -> None:
    """examples/pretrain_reward.py, the file to copy, has the same function as the program."""
    import ast
    import inspect

    from examples import pretrain_reward
    from rmega.training import run

    def body(module) -> str:
        (function,) = ast.parse(inspect.getsource(module.train)).body
        kept = [part for part in function.body if not isinstance(part, ast.ImportFrom)]
        return "\n".join(map(ast.unparse, kept))

    assert body(pretrain_reward) == body(run)
