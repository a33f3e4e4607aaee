"""Verification: what makes it fail, and what it leaves in a folder that was written before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rmega.commands import export
from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE, UNVERIFIED, changed_files
from rmega.export.verify import training_difference
from tests.export.test_convert import change, make_run, reward_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    return make_run(reward_folder(root / "base", "llama"), root / "run")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert convert(run=run, output=folder) == 0
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def recipe_of(folder: Path) -> dict:
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def test_the_recipe_lists_every_file(folder, run) -> None:
    names = {path.name for path in folder.iterdir()}
    assert set(recipe_of(folder)["files"]) == names - {RECIPE}
    assert changed_files(folder, recipe_of(folder)["files"]) == []
    before, recipe = {path.name: path.read_bytes() for path in folder.iterdir()}, recipe_of(folder)
    assert verify_only(run=run, output=folder) == 0
    # Matrix products of a CPU library may round differently by where in memory their operands lie:
    # what was measured may change in its last digits, and with it the card that cites it.
    for part in (recipe, again := recipe_of(folder)):
        for name in ("relative_difference", "largest_difference", "training_difference"):
            assert (part["verification"].pop(name) or 0) < 1e-5
        assert set(part.pop("files")) == names - {RECIPE} and part.pop("checksum")
    assert json.dumps(again, indent=1) == json.dumps(recipe, indent=1)
    unchanged = names - {RECIPE, "README.md"}
    assert all((folder / name).read_bytes() == before[name] for name in unchanged)


def test_without_verification_the_folder_is_marked_until_it_is_made_up_for(run, tmp_path) -> None:
    folder = tmp_path / "out"
    assert convert(run=run, output=folder, verify=False) == 0
    assert "--verify-only does that" in (folder / UNVERIFIED).read_text()
    assert recipe_of(folder)["verification"] is None
    assert "**Not verified**" in (folder / "README.md").read_text()
    assert verify_only(run=run, output=folder) == 0
    assert not (folder / UNVERIFIED).exists() and recipe_of(folder)["verification"]["passed"]
    assert "they agree" in (folder / "README.md").read_text()
    assert changed_files(folder, recipe_of(folder)["files"]) == []


def test_a_changed_file_beside_the_weights_fails(folder, run, capsys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    assert verify_only(run=run, output=folder) == 1
    assert "Changed since the export: config.json." in capsys.readouterr().out
    assert "config.json" in (folder / UNVERIFIED).read_text()


def test_an_edited_card_keeps_its_text(folder, run, capsys) -> None:
    (folder / "README.md").write_text("my own words")
    assert verify_only(run=run, output=folder) == 0
    assert (folder / "README.md").read_text() == "my own words"
    assert "has been edited: it keeps its text" in capsys.readouterr().out


def test_a_folder_that_is_no_export_is_left_alone(run, tmp_path) -> None:
    base = reward_folder(tmp_path / "base", "llama")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for other in (base, run, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="no export of rmega"):
            verify_only(run=run, output=other)
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}


def test_another_checkpoint_than_the_exported_one(folder, run, tmp_path) -> None:
    """Naming it must not mark a good export."""
    runs = tmp_path / "run"
    shutil.copytree(run, runs)
    shutil.copytree(runs / "iter_0000010", runs / "iter_0000020")
    change(runs / "iter_0000020", iteration=20)
    (runs / "latest_checkpointed_iteration.txt").write_text("20\n")
    with pytest.raises(ValueError, match=r"was exported from iter_0000010, .*--iteration 10"):
        verify_only(run=runs, output=folder)
    assert not (folder / UNVERIFIED).exists()
    assert verify_only(run=runs, output=folder, iteration="10") == 0


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--no-verify"], "--no-verify"),
        (["--force"], "--force"),
        (["--format", "llama"], "--format"),
        (["--dtype", "float32"], "--dtype"),
        (["--max-shard-size", "1GB"], "--max-shard-size"),
    ],
)
def test_flags_that_would_be_ignored(flags, named, folder, run) -> None:
    with pytest.raises(ValueError, match=f"{named} does not go with it"):
        export.main(["--load", str(run), "--output", str(folder), "--verify-only", *flags])


def with_rewards(run: Path, tmp_path: Path, shift: float, dtype: str = "float32") -> Path:
    """The run with the rewards that its training computed, each off by ``shift``."""
    from rmega.export.average import read_part
    from rmega.export.rewards import rewards_of_parts

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = copy / "iter_0000010"
    kept = json.loads((checkpoint / "rmega.json").read_text())["verification"]
    items = [[[*c["prefix"], *s] for s in c["suffixes"]] for c in kept]
    rewards = rewards_of_parts([read_part(checkpoint)], items, ["float32"])[0] + shift
    rewards = iter(rewards.tolist())
    kept = [{**c, "rewards": [next(rewards) for _ in c["suffixes"]]} for c in kept]
    change(checkpoint, verification=kept, dtype=dtype)
    return copy


@pytest.mark.parametrize(
    "shift, dtype, code", [(0.0, "float32", 0), (0.02, "float32", 1), (0.02, "bfloat16", 0)]
)
def test_rewards_that_the_training_computed(shift, dtype, code, run, tmp_path, capsys) -> None:
    other = with_rewards(run, tmp_path, shift, dtype)
    assert convert(run=other, output=tmp_path / "out", dtype="float32") == code
    assert "rewards that the training computed" in capsys.readouterr().out
    difference = recipe_of(tmp_path / "out")["verification"]["training_difference"]
    assert difference == pytest.approx(shift / 1.6, abs=0.2 * shift + 1e-5)


def test_differences_of_kept_rewards() -> None:
    rewards = torch.tensor([1.0, 2.0, -4.0, 9.0])
    kept = [{"suffixes": [[1], [2]]}, {"suffixes": [[3]]}]
    assert training_difference(kept, rewards) is None
    kept[1]["rewards"] = [-5.0]
    assert training_difference(kept, rewards) == pytest.approx(0.2)
    kept[0]["rewards"] = [1.0]  # one of two
    assert not training_difference(kept, rewards) <= 1e9
    kept[0]["rewards"] = [float("nan"), 2.0]
    assert not training_difference(kept, rewards) <= 1e9
