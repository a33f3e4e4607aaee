"""Which files of a folder are its data, and of which split."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
}
"""Words in names of files and folders -> the split that they mean."""
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_SHARD = re.compile(r"([-_. ]+\d+)+([-_. ]of[-_. ]\d+)?$")
# Of editors, archives, file systems, and of programs that write beside the data.
_HIDDEN = re.compile(
    r"[._~#@$].*|.*~|lost\+found|(backups?|bak|trash)|.*\.(bak|old|orig|tmp)", re.I
)
_CACHE = re.compile(r"cache-.*\.arrow|tmp.*\.arrow")
_NOT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
)


def files_of_folder(
    folder: str,
    split: str | None,
    flag: str,
    has_data: Callable[[Path], bool],
    note: Callable[[str], None],
) -> list[str]:
    """The data files of a folder, in order of their names; ``has_data`` knows them by their suffix.

    Hidden and backup files are left out with a ``note``, as are caches beside a data set that the
    datasets library saved. ValueError where there are several splits and none is chosen.
    """
    root, left_out = Path(folder), []
    paths: list[Path] = []
    for path in sorted(p for p in root.rglob("*") if p.is_file() and has_data(p)):
        parts = path.relative_to(root).parts
        if path.name in _NOT_DATA:
            continue
        saved = _saved_files(path.parent)
        hidden = any(_HIDDEN.fullmatch(part) for part in parts) or _CACHE.fullmatch(path.name)
        unnamed = saved is not None and path.name not in saved
        (left_out if hidden or unnamed else paths).append(path)
    for parent in {path.parent for path in paths}:
        for name in _saved_files(parent) or ():
            if not (parent / name).is_file():
                raise ValueError(f"{flag} {parent / name}: missing, though state.json names it")
    if left_out:
        first = left_out[0].relative_to(root)
        note(f"{folder}: {len(left_out)} hidden, backup or cache files left out, as {first}")
    chosen = _of_split(root, paths, split, flag)
    if not chosen:
        wanted = f" for --split {split}" if split else ""
        raise ValueError(f"{flag} {folder}: no data file in this folder{wanted}")
    return [str(path) for path in chosen]


def _saved_files(folder: Path) -> set[str] | None:
    """The files that ``Dataset.save_to_disk`` names; None in other folders."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split_of(path: str) -> str:
    """``data/train_prefs-00000-of-00001.parquet`` -> ``train_prefs``: the name of the file, or else
    of a folder around it, from the word that means a split; "" for none."""
    *folders, name = path.lower().split(os.sep)
    stem = name.split(".", 1)[0] if not name.startswith(".") else name
    for part in (_SHARD.sub("", stem), *reversed(folders)):
        match = _WORD.search(part)
        if match:
            return part[match.start() :]
    return ""


def _of_split(root: Path, paths: list[Path], split: str | None, flag: str) -> list[Path]:
    of = {path: split_of(str(path.relative_to(root))) for path in paths}
    names = sorted(set(of.values()) - {""})
    choose = "choose one with --split, or name the files (a glob takes several)"
    if split is None:
        if len({_SPLITS.get(name, name) for name in names}) > 1:
            raise ValueError(f"{flag} {root}: holds several splits ({', '.join(names)}); {choose}")
        return paths
    wanted = split.lower()
    fitting = [name for name in names if name == wanted]
    if not fitting:  # --split train, with train-v2.jsonl; --split dev, with validation.jsonl
        fitting = [
            name
            for name in names
            if _SPLITS[_WORD.match(name)[0]] == _SPLITS.get(wanted, wanted)  # type: ignore[index]
        ]
    if len({_SPLITS.get(name, name) for name in fitting}) > 1:
        raise ValueError(
            f"{flag} {root}: --split {split} fits several ({', '.join(fitting)}); {choose}"
        )
    if not fitting:
        known = f"its splits are {', '.join(names)}" if names else "its files name no split"
        raise ValueError(f"{flag} {root}: no data file in this folder for --split {split}; {known}")
    return [path for path in paths if of[path] in fitting]
