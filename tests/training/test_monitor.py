"""What a run says of numbers that go wrong, and that it says nothing of those that do not."""

from __future__ import annotations

import contextlib
import io
import json
import math

import pytest

from tests import runs
from tests.dist import run_distributed


def report(**changed):
    from rmega.training.train import StepReport

    usual = dict(
        loss=0.6,
        acc=0.5,
        chosen_score_mean=0.1,
        rejected_score_mean=0.0,
        grad_norm=2.0,
        updated=True,
        num_pairs=4,
        num_terms=4,
        num_samples=4,
        num_tokens=100,
        real_tokens=100,
        num_microbatches=1,
        padding=0,
    )
    return StepReport(**{**usual, **changed})


@pytest.fixture
def watch():
    """A watch that has seen 20 normal steps."""
    from rmega.training.monitor import Watch

    watch = Watch()
    for step in range(20):
        assert (
            watch.look(
                step, report(grad_norm=1.5 + step % 3, chosen_score_mean=0.1 * (step % 5)), [1, 2]
            )
            == []
        )
    return watch


def test_a_gradient_spike_names_its_comparisons(watch):
    assert watch.look(20, report(grad_norm=24.9), [7]) == []  # nearly ten times the median of 2.5
    (line,) = watch.look(21, report(grad_norm=100.0), [7, 9])
    assert line == "warning: step 21: gradient norm 100, 40 times the usual 2.5; comparisons [7, 9]"
    assert watch.look(22, report(grad_norm=2.5), [7]) == []  # one spike does not move the usual


def test_the_first_steps_have_no_usual():
    from rmega.training.monitor import Watch

    watch = Watch()
    assert [watch.look(step, report(grad_norm=10.0**step), [1]) for step in range(5)] == [[]] * 5


def test_scores_that_leave_their_range_are_said_once(watch):
    (line,) = watch.look(20, report(chosen_score_mean=4.5, rejected_score_mean=3.0), [1])
    assert line == "warning: step 20: mean scores 4.50 (chosen) and 3.00 (rejected) have left +-4"
    assert watch.look(21, report(chosen_score_mean=4.6, rejected_score_mean=3.0), [1]) == []
    assert watch.look(22, report(), [1]) == []
    (line,) = watch.look(
        23, report(chosen_score_mean=0.0, rejected_score_mean=-4.01), [1]
    )  # left it anew
    assert "-4.01 (rejected)" in line


def test_scores_that_jump(watch):
    for step in range(20, 60):  # a loss without penalty may sit at any level
        watch.look(step, report(chosen_score_mean=3.5, rejected_score_mean=3.4), [1])
    (line,) = watch.look(60, report(chosen_score_mean=-3.5, rejected_score_mean=-3.4), [1])
    assert line == "warning: step 60: scores jumped to a mean of -3.45 from 3.45"
    for step in range(61, 80):  # and said once
        assert watch.look(step, report(chosen_score_mean=-3.5, rejected_score_mean=-3.4), [1]) == []


@pytest.mark.parametrize(
    "changed",
    [dict(loss=math.nan, grad_norm=math.nan), dict(grad_norm=math.inf), dict(grad_norm=None)],
)
def test_skipped_updates_are_counted(watch, changed):
    for step, (row, count) in enumerate([(1, 1), (2, 2), (0, 2), (1, 3)]):
        said = watch.look(20 + step, report(updated=not row, **(changed if row else {})), [3, 4])
        assert (watch.skipped_in_a_row, watch.skipped) == (row, count)
        assert len(said) == bool(row)
        assert all(
            f"update skipped ({row} in a row, {count} in all); comparisons [3, 4]" in line
            for line in said
        )


def spiked(rank: int, world_size: int, argv: list[str], at: int) -> str:
    """What a run says whose loss is 300 times itself in step ``at``, and whose scores are 3.5
    higher from there on."""
    import rmega.training.train as engine
    from examples import pretrain_reward

    pair_loss, train_step, step = engine.pair_loss, engine.train_step, [0]

    def loud(args, batch, rewards):
        loss, number, stats = pair_loss(args, batch, rewards + (6.0 if step[0] > at else 0.0))
        return loss * (300 if step[0] == at else 1), number, stats

    def counted(*args):
        step[0] += 1
        return train_step(*args)

    engine.pair_loss, engine.train_step = loud, counted
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            assert pretrain_reward.main(argv) == 0
    finally:
        engine.pair_loss, engine.train_step = pair_loss, train_step
    return said.getvalue()


@pytest.mark.parametrize("layout", [{}, {"dp": 2}])
def test_a_run_says_it(layout, small_llama, tmp_path):
    """On one rank or two: the spike with the documents of its batch, then the scores, each once and
    by one rank."""
    data = runs.make_data(small_llama, tmp_path)
    argv = runs.flags(
        small_llama, data, steps=16, loss="ranking", penalty="none", lr=1e-6, **layout
    )
    out = "".join(run_distributed(spiked, 2 if layout else 1, argv, 14))
    warnings = [line for line in out.splitlines() if line.startswith("warning: step")]
    assert len(warnings) == 2, warnings
    assert (
        warnings[0].startswith("warning: step 14: gradient norm ")
        and " times the usual " in warnings[0]
    )
    assert len(json.loads(warnings[0].split("comparisons ")[1])) == 6
    assert warnings[1].startswith("warning: step 15: ") and "scores" in warnings[1]
