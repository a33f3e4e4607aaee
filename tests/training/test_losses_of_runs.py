"""Runs with each loss through the program: the first logged loss, and the flags in the run's
files."""

from __future__ import annotations

import json
import math

import pytest

from rmega.export.convert import convert
from rmega.preferences.preprocess import PreprocessArgs, preprocess
from rmega.report.training import write_run_report
from tests import runs
from tests.dist import run_distributed
from tests.made_rows import write_lines


@pytest.fixture(scope="module")
def ranked(small_llama, tmp_path_factory) -> str:
    """Twelve prompts with three answers each, rated 3, 1 and 0."""
    folder = tmp_path_factory.mktemp("ranked")
    rows = [
        {
            "prompt": f"What is {i}?",
            "responses": [f"the number {i}", f"{i} apples", "no"],
            "scores": [3, 1, 0],
        }
        for i in range(12)
    ]
    write_lines(folder / "rows.jsonl", rows)
    preprocess(
        PreprocessArgs(
            input=(str(folder / "rows.jsonl"),),
            tokenizer=str(small_llama),
            output_prefix=str(folder / "rows"),
            max_length=128,
        )
    )
    return str(folder / "rows")


@pytest.fixture(scope="module")
def tied(small_llama, tmp_path_factory) -> str:
    """Twelve prompts with three answers each, two of them as good as each other, and eight with two
    answers that are."""
    folder = tmp_path_factory.mktemp("tied")
    rows = [
        {
            "prompt": f"What is {i}?",
            "responses": [f"the number {i}", f"{i} apples", "no"][: 3 if i < 12 else 2],
            "scores": [3, 1, 1] if i < 12 else [2, 2],
        }
        for i in range(20)
    ]
    write_lines(folder / "rows.jsonl", rows)
    options = dict(tokenizer=str(small_llama), max_length=128)
    for name, keep in (("keep", ["ties"]), ("drop", [])):
        preprocess(
            PreprocessArgs(
                input=[str(folder / "rows.jsonl")],
                output_prefix=str(folder / name),
                keep=keep,
                **options,
            )
        )
    return str(folder / "keep")


FIRST = "num_layers_in_first_pipeline_stage"


def rows_of(run, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["type"] == kind]


@pytest.mark.parametrize(
    "world,layout",
    [(1, {}), (1, {"lora_rank": 4}), (2, {"pp": 2, FIRST: 2}), (2, {"tp": 2, "sp": True})],
)
def test_a_run_with_ties(world, layout, small_llama, tied, tmp_path) -> None:
    """Resumed bit for bit on the same ranks, to 1e-5 on others; exported with its threshold."""
    options = dict(penalty="none", head_init="zero", loss="rao_kupper", head_lr=0.05, lr=1e-3)
    options |= dict(weight_decay=0.1, adam_eps=0.1, eval_interval=2, **layout)
    options |= dict(valid_data_path=f"held={tied}")

    def train(run, ranks, steps=4, events=None, **more):
        argv = runs.flags(small_llama, tied, run, steps=steps, **{**options, **more})
        assert set(run_distributed(runs.train, ranks, argv, events)) <= {0, 75}

    train(tmp_path / "run", world)
    rows = rows_of(tmp_path / "run", "train")
    # With equal rewards win, loss and tie have the probability 1/3: eta = ln 2.
    assert rows[0]["loss"] == pytest.approx(math.log(3), rel=1e-6)
    assert rows[0]["tie_threshold"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert abs(rows[-1]["tie_threshold"] - math.log(2)) > 1e-3
    held = rows_of(tmp_path / "run", "eval")
    assert held and {row["num_pairs"] for row in held} == {24}  # of 44: ties do not count
    for folder, resumed_on, more in (
        ("same", world, {}),
        ("other", 1, {"pp": None, "tp": None, FIRST: None}),
    ):
        if folder == "other" and world == 1:
            continue
        train(tmp_path / folder, world, events={2: ("SIGTERM", 0)})
        assert not (tmp_path / folder / "iter_0000004").exists()
        more = {"sp": None, **more} if more else {}
        train(tmp_path / folder, resumed_on, **more)
        one, two = (runs.tensors(tmp_path / f / "iter_0000004") for f in ("run", folder))
        assert one.keys() == two.keys() and "tie_threshold" in one
        if folder == "same":
            runs.assert_same(*(tmp_path / f / "iter_0000004" for f in ("run", folder)))
        for name, value in one.items():
            assert (value - two[name]).abs().max() <= 1e-5 * value.abs().max(), name
    assert convert(run=tmp_path / "run", output=tmp_path / "export") == 0
    recipe = json.loads((tmp_path / "export" / "reward_recipe.json").read_text())
    (raw,) = runs.tensors(tmp_path / "run" / "iter_0000004")["tie_threshold"].tolist()
    assert recipe["tie_threshold"] == pytest.approx(math.log1p(math.exp(raw)), rel=1e-6)


def test_the_threshold_has_the_heads_rate_and_no_decay(small_llama, tied, tmp_path) -> None:
    """The first step of Adam from a gradient g is lr g / (|g| + eps), warm-up ends at step 1."""
    for decay in (0.0, 0.5):
        run = tmp_path / f"run{decay}"
        options = dict(penalty="none", head_init="zero", loss="rao_kupper", head_lr=0.05, lr=1e-3)
        options |= dict(weight_decay=decay, lr_warmup_fraction=0, lr_decay_style="constant")
        argv = runs.flags(small_llama, tied, run, steps=2, clip_grad=0, **options)
        assert run_distributed(runs.train, 1, argv) == [0]
        first, second = (row["tie_threshold"] for row in rows_of(run, "train"))
        moved = math.log(math.expm1(second)) - math.log(math.expm1(first))
        assert abs(moved) == pytest.approx(0.05, rel=1e-4)


def test_ties_and_their_loss_need_each_other(small_llama, tied, ranked) -> None:
    for data, loss, says in (
        (tied, "ranking", "has tied pairs .--keep ties., which --loss ranking does not read"),
        (ranked, "rao_kupper", "was written without its ties"),
        (tied.replace("keep", "drop"), "rao_kupper", "was written without its ties"),
    ):
        argv = runs.flags(small_llama, data, steps=2, loss=loss)
        with pytest.raises(RuntimeError, match=says):
            run_distributed(runs.train, 1, argv)


def test_any_loss_reads_data_that_kept_no_tie(small_llama, tmp_path) -> None:
    data = runs.make_data(small_llama, tmp_path, 12, keep=["ties"])
    argv = runs.flags(small_llama, data, steps=1)
    assert run_distributed(runs.train, 1, argv) == [0]


def test_data_of_ties_alone(small_llama, tmp_path) -> None:
    """They train the threshold and have no accuracy: no row states one."""
    rows = [
        {"prompt": f"{i}?", "responses": ["yes", f"no {i}"], "scores": [1, 1]} for i in range(6)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    data = str(tmp_path / "ties")
    preprocess(
        PreprocessArgs(
            input=[str(tmp_path / "rows.jsonl")],
            tokenizer=str(small_llama),
            output_prefix=data,
            max_length=128,
            keep=["ties"],
        )
    )
    run, options = tmp_path / "run", dict(steps=2, batch=3, loss="rao_kupper")
    assert run_distributed(runs.train, 1, runs.flags(small_llama, data, run, **options)) == [0]
    for row in rows_of(run, "train"):
        assert row["num_pairs"] == 0 and row["acc"] is None and row["chosen_score_mean"] is None
        assert row["loss"] > 0 and row["tie_threshold"] > 0
    assert write_run_report(run).is_file()
    argv = runs.flags(small_llama, data, **options, valid_data_path=f"held={data}")
    with pytest.raises(RuntimeError, match=f"--valid-data-path {data}: all its pairs are tied"):
        run_distributed(runs.train, 1, argv)


@pytest.mark.parametrize(
    "options,first",
    [
        ({"loss": "plackett_luce"}, (math.log(3) + math.log(2)) / 2),  # two choices a prompt
        ({"loss": "ranking"}, math.log(2)),
        ({"loss": "ranking", "scale_by_rating": True}, (2 + 3 + 1) / 3 * math.log(2)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_the_first_loss_of_a_zero_head(options, first, small_llama, ranked, tmp_path) -> None:
    run = tmp_path / "run"
    argv = runs.flags(
        small_llama, ranked, run, steps=2, penalty="none", head_init="zero", **options
    )
    assert set(run_distributed(runs.train, 2, argv)) == {0}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["type"] == "train"]
    assert rows[0]["loss"] == pytest.approx(first, rel=1e-6) and rows[0]["num_pairs"] == 18
    assert rows[1]["loss"] < rows[0]["loss"]
    saved = json.loads((run / "iter_0000002" / "rmega.json").read_text())["config"]["loss"]
    assert saved.items() >= options.items()
