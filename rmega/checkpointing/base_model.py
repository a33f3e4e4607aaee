"""The frozen base model of a run with adapters: what its checkpoints record of it, and where to
find it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmega import distributed
from rmega.hub import resolve_model
from rmega.io import fingerprint
from rmega.models.hf_folder import HfFolder


def record(folder: Path) -> dict[str, Any]:
    """The field ``base`` of rmega.json: the folder, and [bytes, crc32] of each of its weight files.
    The ranks of a process group, all of which call it, share the reading."""
    files, (first, count) = sorted(set(HfFolder(folder).files.values())), distributed.own_share()
    own = {name: fingerprint(folder / name) for name in files[first::count]}
    parts = distributed.gather(own)
    return {
        "folder": str(folder.resolve()),
        "files": {name: value for part in parts for name, value in sorted(part.items())},
    }


def check(info: dict[str, Any], found: Path, own: dict[str, Any], flag: str) -> None:
    """ValueError where the adapters of checkpoint ``found`` were trained on other weights than
    those of ``own``, a ``record``."""
    saved, files = info["base"]["files"], own["files"]
    changed = sorted(n for n in saved.keys() | files.keys() if saved.get(n) != files.get(n))
    if changed:
        raise ValueError(
            f"{flag} {own['folder']}: not the weights that the adapters of {found} were trained on"
            f" ({changed[0]} differs)"
        )


def find(info: dict[str, Any], found: Path, flag: str) -> Path:
    """The folder of the base model of checkpoint ``found``: where it was, or what its name resolves
    to. ``flag``, which may be empty, begins messages."""
    folder, named = Path(info["base"]["folder"]), f"{flag.rstrip()} {found}: base model".lstrip()
    if not folder.is_dir():
        folder = resolve_model(info["base_model"], flag=named)
    check(info, found, record(folder), named)
    return folder
