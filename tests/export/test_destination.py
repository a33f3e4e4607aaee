"""Where an export may be written: nothing that it did not write itself is ever removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rmega.export import destination
from rmega.export.destination import RECIPE, UNVERIFIED, mark_unverified


def write_export(folder: Path, *, verified: bool = True) -> Path:
    """The smallest folder that counts as an export."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    recipe = {"written_by": "rmega 0", "files": destination.list_files(folder)}
    (folder / RECIPE).write_text(json.dumps(recipe))
    if not verified:
        mark_unverified(folder, "why not")
    return folder


def check(output: Path, root: Path, **options) -> Path:
    settings = {"load": root / "run", "base": None, "force": True, "verify": True, **options}
    return destination.check(
        output, **{**settings, "checkpoint": settings["load"] / "iter_0000010"}
    )


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with a checkpoint, a base model, an export."""
    (tmp_path / "run" / "iter_0000010").mkdir(parents=True)
    (tmp_path / "run" / "iter_0000010" / "rmega.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write_export(tmp_path / "export")
    return tmp_path


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "notes.md").write_text("mine"), "holds notes.md, not written by"),
        (lambda f: (f / ".cache").mkdir(), "holds .cache, not written by"),
        (lambda f: (f / "config.json").write_text('{"a": 1}'), "holds config.json, changed since"),
        (lambda f: (f / UNVERIFIED).write_text("my own note"), "holds UNVERIFIED, not written by"),
        (lambda f: (f / RECIPE).unlink(), "holds no reward_recipe.json"),
        (lambda f: (f / RECIPE).write_text("{}"), "holds no reward_recipe.json"),
        (lambda f: (f / RECIPE).write_text("[" * 100000), "holds no reward_recipe.json"),
        (
            lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/hosts")),
            "holds config.json, changed since",
        ),
    ],
)
def test_what_a_user_added_or_edited_is_kept(root: Path, spoil, message: str) -> None:
    spoil(root / "export")
    before = tree(root)
    with pytest.raises(ValueError, match=f"--output .*export: {message}"):
        check(root / "export", root)
    assert tree(root) == before


def test_an_export_with_files_missing_is_replaced(root: Path) -> None:
    (root / "export" / "config.json").unlink()
    assert check(root / "export", root) == root / "export"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "name, message",
    [
        ("run", "is --load"),
        ("run/iter_0000010", "lies in --load"),
        ("run/iter_0000010/hf", "lies in --load"),
        ("run/new/export", "lies in --load"),
        (".", "holds --load"),
        ("base", "is the base model"),
        ("other-run", "lies in the run folder"),
        ("other-run/new", "lies in the run folder"),
        ("other-run/iter_0000020", "lies in the checkpoint"),
        ("other-run/iter_0000020/hf", "lies in the checkpoint"),
        ("link-to-run", "is --load"),
        ("link-to-run/new", "lies in --load"),
        ("run/../run", "is --load"),
    ],
)
def test_runs_and_the_base_model_are_never_replaced(
    root: Path, name: str, message: str, force: bool
) -> None:
    other = root / "other-run"
    write_export(other / "iter_0000020" / "hf")  # trained on from an export, which is copied there
    (other / "iter_0000020" / "rmega.json").write_text("{}")
    (other / RECIPE).write_text((root / "export" / RECIPE).read_text())
    (root / "link-to-run").symlink_to(root / "run")
    before = tree(root)
    with pytest.raises(ValueError, match=f"--output .*: {message}"):
        check(root / name, root, base=str(root / "base"), force=force)
    assert tree(root) == before


def test_working_home_and_root_folder(root: Path, monkeypatch) -> None:
    away = {"load": Path("/nowhere/run")}
    inside = root / "export" / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for output in (Path("."), inside, root / "export"):
        with pytest.raises(ValueError, match="(is|holds) the current directory"):
            check(output, root, **away)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(root / "export"))
    for output, what in ((root / "export", "is the home folder"), (root, "holds the home folder")):
        with pytest.raises(ValueError, match=what):
            check(output, root, **away)
    with pytest.raises(ValueError, match="holds --load"):  # and everything else
        check(Path("/"), root, **away)


def test_an_export_that_is_the_base_model_of_this_run_is_kept(root: Path) -> None:
    with pytest.raises(ValueError, match="is the base model"):
        check(root / "export", root, base=str(root / "export"))
    assert check(root / "export", root, base="somebody/model") == root / "export"


def test_other_things_of_that_name(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        check(root / "file", root)
    (root / "file.partial").mkdir()
    with pytest.raises(ValueError, match="exists and is not what an interrupted export leaves"):
        check(root / "file", root)
    for name in ("a\nb", "a\tb", "\udcff"):
        with pytest.raises(ValueError, match="control characters") as error:
            check(root / name, root)
        assert "\n" not in str(error.value) and str(error.value).isprintable()
    with pytest.raises(ValueError, match="exists already; --force replaces"):
        check(root / "export", root, force=False)
    with pytest.raises(ValueError, match="a verified export; --no-verify does not replace it"):
        check(root / "export", root, verify=False)
    (root / "empty").mkdir()
    assert check(root / "empty", root, force=False) == root / "empty"


def publish(folder: Path, *, verified: bool) -> Path:
    with destination.being_written(folder) as partial:
        (partial / "config.json").write_text("new")
        if verified:
            (partial / UNVERIFIED).unlink()
        return destination.publish(partial, folder)


@pytest.mark.parametrize("old", [None, "empty", "verified", "unverified"])
@pytest.mark.parametrize("new", [True, False])
def test_publishing(old: str | None, new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    if old == "empty":
        folder.mkdir()
    elif old:
        write_export(folder, verified=old == "verified")
    published = publish(folder, verified=new)
    stays = old == "verified" and not new
    assert published == (tmp_path / "export.unverified" if stays else folder)
    assert (published / "config.json").read_text() == "new"
    assert (folder / "config.json").read_text() == ("{}" if stays else "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ["export", "export.unverified"] if stays else ["export"]
    )


def test_the_old_one_is_put_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch
) -> None:
    folder = write_export(tmp_path / "export")
    before = tree(folder)
    rename = os.replace

    def fails(source, target) -> None:
        if str(source).endswith(".partial"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        publish(folder, verified=True)
    assert tree(folder) == before and [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_file_that_is_added_meanwhile_is_kept_aside(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    with destination.being_written(folder) as partial:
        (folder / "notes.md").write_text("mine")
        (partial / UNVERIFIED).unlink()
        destination.publish(partial, folder)
    assert (tmp_path / "export.old" / "notes.md").read_text() == "mine"


def test_other_folders_beside_it_are_left_alone(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    for name in ("export.old", "export.unverified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    publish(folder, verified=False)
    publish(folder, verified=True)
    for name in ("export.old", "export.unverified"):
        assert (tmp_path / name / "file").read_text() == "mine"
    assert (tmp_path / "export.unverified-2" / "config.json").read_text() == "new"


def test_a_failed_export_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with pytest.raises(KeyboardInterrupt), destination.being_written(folder):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    partial = destination.partial_of(folder)
    partial.mkdir()
    mark_unverified(partial, "killed")
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert check(folder, tmp_path) == folder
    assert publish(folder, verified=True) == folder
    (tmp_path / "export.partial").mkdir()
    mark_unverified(partial, "killed")
    (partial / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="not what an interrupted export leaves"):
        check(tmp_path / "export", tmp_path)


def test_two_exports_to_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with destination.being_written(folder) as partial:
        with pytest.raises(ValueError, match="another process is writing it"):
            publish(folder, verified=True)
        assert (partial / UNVERIFIED).exists()
