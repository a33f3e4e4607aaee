"""What ``--input`` names (files, folders, globs, hub datasets) -> inputs."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rmega.io import refuse_pointer
from rmega.preferences.folders import files_of_folder

_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Input:
    """One file, or one data set of a hub."""

    name: str
    """For messages: the path or the hub's name."""
    label: str
    """The default name of its rows' source."""
    kind: str
    """lines, json, csv, parquet, arrow, hub or modelscope."""
    compression: str | None = None
    num_bytes: int = 0
    """Size on disk, 0 if unknown."""
    split: str | None = None
    revision: str | None = None

    @property
    def unit(self) -> str:
        return "line" if self.kind in ("lines", "csv") else "row"


def _to_stderr(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


def resolve(
    specs: list[str],
    *,
    split: str | None = None,
    flag: str = "--input",
    note: Callable[[str], None] = _to_stderr,
) -> list[Input]:
    """Paths, globs, folders, hub names (``[modelscope:]org/name[:config][@revision]``) -> inputs,
    in order. ``note`` is told what was left out of a folder."""
    return [source for spec in specs for source in _resolve_one(spec, split, flag, note)]


def check_split(split: str | None, specs: list[str]) -> None:
    """ValueError where ``--split`` has no effect: all ``specs`` are files or globs."""
    if split is not None and not any(os.path.isdir(spec) or _is_hub_name(spec) for spec in specs):
        raise ValueError(
            f"--split {split} has no effect on {' '.join(specs)}: files have no splits, only"
            " folders and hub datasets do"
        )


def _is_hub_name(spec: str) -> bool:
    return spec.startswith("modelscope:") or bool(
        not os.path.exists(spec)
        and _HUB_NAME.fullmatch(spec)
        and not any(spec.endswith(s) for s in (*_KINDS, *_COMPRESSIONS))
    )


def _resolve_one(
    spec: str, split: str | None, flag: str, note: Callable[[str], None]
) -> list[Input]:
    if spec.startswith("modelscope:"):
        return [_hub_input(spec.removeprefix("modelscope:"), "modelscope", split)]
    if os.path.isdir(spec):
        paths = files_of_folder(spec, split, flag, _is_data, note)
    elif os.path.exists(spec):
        paths = [spec]
    elif glob.has_magic(spec):
        paths = sorted(p for p in glob.glob(spec, recursive=True) if os.path.isfile(p))
        if not paths:
            raise ValueError(f"{flag} {spec}: no file matches")
    elif _is_hub_name(spec):
        return [_hub_input(spec, "hub", split)]
    else:
        raise ValueError(f"{flag} {spec}: no such file or folder")
    return [_file_input(p, flag) for p in paths]


def _hub_input(spec: str, kind: str, split: str | None) -> Input:
    name, _, revision = spec.partition("@")
    return Input(name=name, label=name, kind=kind, split=split, revision=revision or None)


def _file_input(path: str, flag: str) -> Input:
    stem, kind, compression = _suffixes(path)
    if kind is None:
        raise ValueError(
            f"{flag} {path}: unknown kind of file; known are {', '.join(_KINDS)}, also with .gz or"
            " .zst"
        )
    if compression and kind in ("parquet", "arrow"):
        raise ValueError(f"{flag} {path}: a compressed {kind} file; unpack it first")
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        raise ValueError(f"{flag} {path}: the file is empty")
    refuse_pointer(path, flag)
    return Input(
        name=path,
        label=os.path.basename(stem),
        kind=kind,
        compression=compression,
        num_bytes=num_bytes,
    )


def _suffixes(path: str) -> tuple[str, str | None, str | None]:
    """(path without its suffixes, kind of file, compression); None where unknown."""
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if compression:
        stem, suffix = os.path.splitext(stem)
    return stem, _KINDS.get(suffix.lower()), compression


def _is_data(path: Path) -> bool:
    return _suffixes(path.name)[1] is not None
