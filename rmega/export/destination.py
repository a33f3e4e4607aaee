"""Where an export may be written, and how it replaces an older one.

An export is written beside its destination, as ``OUTPUT.partial``, and renamed when it is complete.
It removes nothing but an older export whose files are all exactly as they were written, and that
only after its successor has been verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmega import hub
from rmega.checkpointing import run_folder
from rmega.hub import RECIPE
from rmega.io import fingerprint, free_name, sync_folder, sync_tree

UNVERIFIED = "UNVERIFIED"
MARK = "Written by rmega and not verified."  # first line of UNVERIFIED
# Every name that an export can have: what a killed one has left is removed by it.
NAMES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json|README\.md"
    r"|(configuration|modeling)_internlm2\.py|LICENSE.*|tokenizer.*|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|vocab\.json|merges\.txt|" + f"{UNVERIFIED}|{RECIPE}"
)


def mark_unverified(folder: Path, reason: str) -> None:
    """Mark a folder whose rewards have not been, or could not be, confirmed."""
    (folder / UNVERIFIED).write_text(f"{MARK}\n{reason.rstrip()}\n", encoding="utf-8")


def is_marked(folder: Path) -> bool:
    """Whether the folder has the marker that ``mark_unverified`` writes."""
    try:
        with open(folder / UNVERIFIED, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip() == MARK
    except OSError:
        return False


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """``reward_recipe.json``; None where there is none, a damaged one, or another program's."""
    try:
        recipe = hub.read_recipe(folder)
    except ValueError:
        return None
    ours = isinstance(recipe, dict) and str(recipe.get("written_by")).startswith("rmega ")
    return recipe if ours and isinstance(recipe.get("files"), dict) else None


def list_files(folder: Path) -> dict[str, list[int]]:
    """Name -> [bytes, crc32] of every file that an export has written, but for the recipe that
    holds this list and the marker."""
    return {
        path.name: fingerprint(path)
        for path in sorted(folder.iterdir())
        if path.name not in (RECIPE, UNVERIFIED)
    }


def changed_files(folder: Path, files: dict[str, list[int]]) -> list[str]:
    """Names of the files that are missing or differ from ``list_files``."""

    def same(name: str) -> bool:
        path = folder / name
        regular = path.is_file() and not path.is_symlink()
        return regular and fingerprint(path) == files[name]

    return [name for name in files if not same(name)]


def not_ours(folder: Path) -> str | None:
    """What keeps a folder from being removed: a clause that names what the export did not write;
    None where there is nothing."""
    recipe = read_recipe(folder)
    if recipe is None:
        return f"holds no {RECIPE} of an export"
    known = {*recipe["files"], RECIPE, *([UNVERIFIED] if is_marked(folder) else [])}
    if foreign := sorted({path.name for path in folder.iterdir()} - known):
        return f"holds {_some(foreign)}, not written by the export"
    present = [name for name in recipe["files"] if os.path.lexists(folder / name)]
    if edited := changed_files(folder, {name: recipe["files"][name] for name in present}):
        return f"holds {_some(edited)}, changed since the export"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def check(
    output: Path,
    *,
    load: Path,
    checkpoint: Path,
    base: str | None,
    force: bool,
    verify: bool,
    named: str = "--load ",
) -> Path:
    """The resolved destination. Raises ValueError where an export must not be written.

    ``load`` is what the user named, as ``named``, ``checkpoint`` the folder that is read, ``base``
    the base model (protected where it is a folder). With ``force`` an older export is replaced, but
    nothing else: no folder with files that the export did not write, and no verified export without
    ``verify``.
    """
    where = f"--output {output}"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in str(output)):
        raise ValueError(f"{where!r}: control characters or bytes that are no text in the name")
    folder = Path(os.path.realpath(output))
    protected = [(named, load), (named, checkpoint)]
    protected += [("the base model ", Path(base).expanduser())] if base else []
    for what, path in protected:
        if relation := _relation(folder, path):
            if relation == "lies in" and what != named:
                continue
            raise ValueError(f"{where}: {relation} {what}{path}; choose a folder outside it")
    for what, path in (("the current directory", Path.cwd()), ("the home folder", Path.home())):
        if _relation(folder, path) in ("is", "holds"):
            raise ValueError(f"{where}: {_relation(folder, path)} {what} {path}")
    for parent in (folder, *folder.parents):
        if (parent / run_folder.INFO).is_file():
            raise ValueError(f"{where}: lies in the checkpoint {parent}")
        if (parent / run_folder.TRACKER).is_file() or run_folder.list_iterations(parent):
            raise ValueError(f"{where}: lies in the run folder {parent}")
    partial = partial_of(folder)
    if os.path.lexists(partial) and not _is_left_over(partial):
        raise ValueError(
            f"{where}: written as {partial} first, which exists and is not what an interrupted"
            " export leaves: move it away"
        )
    if not os.path.lexists(folder):
        return folder
    if not folder.is_dir():
        raise ValueError(f"{where}: exists and is not a folder")
    if not any(folder.iterdir()):
        return folder
    if not force:
        raise ValueError(f"{where}: exists already; --force replaces an older export")
    if problem := not_ours(folder):
        raise ValueError(
            f"{where}: {problem}; --force replaces only unchanged exports: move it away, or choose"
            " another folder"
        )
    if not verify and not is_marked(folder):
        raise ValueError(
            f"{where}: a verified export; --no-verify does not replace it: choose another folder"
        )
    return folder


def _relation(folder: Path, other: Path) -> str | None:
    """``is``, ``holds`` or ``lies in``, links and other names of the same folder included."""

    def same(a: Path, b: Path) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samefile(a, b)
        return a == b

    other = Path(os.path.realpath(other))
    if same(folder, other):
        return "is"
    if any(same(folder, parent) for parent in other.parents):
        return "holds"
    return "lies in" if any(same(parent, other) for parent in folder.parents) else None


def partial_of(folder: Path) -> Path:
    """The folder that becomes ``folder`` when it is complete."""
    return folder.with_name(folder.name + ".partial")


def _is_left_over(partial: Path) -> bool:
    """Whether a partial folder holds what a killed export can have left there, and nothing else."""
    if partial.is_symlink() or not is_marked(partial):
        return False
    entries = list(os.scandir(partial))
    return all(e.is_file(follow_symlinks=False) and NAMES.fullmatch(e.name) for e in entries)


@contextlib.contextmanager
def being_written(folder: Path) -> Iterator[Path]:
    """The partial folder, empty but for its marker; removed where the export fails.

    What a killed export has left there is removed first. Raises ValueError where another process
    is writing there.
    """
    partial = partial_of(folder)
    with _lock(partial):
        if _is_left_over(partial):
            shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with _lock(partial):
        mark_unverified(partial, "The export was interrupted before its verification.")
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where it exists and its file system has locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is writing it") from None
        yield
    finally:
        os.close(descriptor)


def publish(partial: Path, folder: Path) -> Path:
    """Give a complete export its name; returns that name.

    An older export is moved aside, put back if the renaming fails, and removed when the new one is
    in place. Where the new one is marked as unverified and the older one is not, the older one
    stays and the new one becomes ``OUTPUT.unverified``.
    """
    sync_tree(partial)
    if not folder.is_dir() or not any(folder.iterdir()):
        os.replace(partial, folder)
        sync_folder(folder.parent)
        return folder
    if is_marked(partial) and not is_marked(folder):
        beside = free_name(folder.with_name(folder.name + ".unverified"))
        os.replace(partial, beside)
        return beside
    aside = free_name(folder.with_name(folder.name + ".old"))
    os.replace(folder, aside)
    try:
        os.replace(partial, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    sync_folder(folder.parent)
    if not_ours(aside) is None:  # files may have been added while the new one was written
        shutil.rmtree(aside, ignore_errors=True)
    return folder
