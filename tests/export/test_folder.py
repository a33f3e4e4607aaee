"""The exported folder's recipe: what it takes from the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmega.checkpointing.run_folder import FORMAT_VERSION, INFO, info_text
from rmega.export.destination import RECIPE
from rmega.export.folder import held_out_rewards, rewards_of_model
from rmega.export.model_card import write_card
from tests.export.test_usage import recipe

EVALUATIONS = [
    {"type": "eval", "name": name, "step": step, "reward_mean": mean, "reward_std": std}
    for name, step, mean, std in (
        ("hh", 0, 0.0, 0.0),
        ("uf", 0, 0.0, 0.0),
        ("hh", 5, 0.25, 1.5),
        ("uf", 5, 9.0, 9.0),
        ("hh", 10, 0.5, 2.0),
        ("hh", 15, 7.0, 7.0),
    )
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Step 10 of a run that went on."""
    folder = tmp_path / "run" / "iter_0000010"
    folder.mkdir(parents=True)
    (folder / INFO).write_text(info_text({"format_version": FORMAT_VERSION, "iteration": 10}))
    lines = [{"type": "train", "step": 1}, *EVALUATIONS]
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_held_out_rewards_are_those_of_the_first_set_at_the_step(checkpoint: Path) -> None:
    expected = {"mean": 0.5, "std": 2.0, "set": "hh", "step": 10}
    assert rewards_of_model(checkpoint) == expected
    export = checkpoint.parent.parent / "export"
    export.mkdir()
    assert rewards_of_model(export) is None  # a model of another program
    (export / RECIPE).write_text(json.dumps({"evaluation": EVALUATIONS[:5]}))
    assert rewards_of_model(export) == expected


def test_evaluations_that_recorded_none() -> None:
    assert held_out_rewards([]) is None
    assert held_out_rewards([{"name": "hh", "step": 3, "accuracy": 0.5}]) is None
    rows = [EVALUATIONS[2], {"name": "hh", "step": 7, "reward_mean": None, "reward_std": None}]
    assert held_out_rewards(rows)["step"] == 5


def test_the_card_states_them(tmp_path: Path) -> None:
    for rewards, text in (
        (held_out_rewards(EVALUATIONS[:3]), "mean 0.2500, standard deviation 1.5000 (hh)"),
        (None, "not recorded"),
    ):
        write_card(tmp_path, "x", recipe(held_out_rewards=rewards), tmp_path / "nothing")
        assert f"| rewards of held-out responses | {text} |" in (tmp_path / "README.md").read_text()
