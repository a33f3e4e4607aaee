"""Runs with each loss through the program: the first logged loss, and the flags in the run's
files."""

from __future__ import annotations

import json
import math

import pytest

from rmega.preferences.preprocess import PreprocessArgs, preprocess
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
