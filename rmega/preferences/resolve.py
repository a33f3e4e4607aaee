"""What the user names with --input: files, folders, globs, data sets of the hubs."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_NOT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SPLITS = {
    "train": "train",
    "test": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


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
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None

    @property
    def unit(self) -> str:
        return "line" if self.kind in ("lines", "csv") else "row"

    def identity(self) -> list[Any]:
        """Changes when the file does (for --resume)."""
        if not os.path.exists(self.name):
            return [self.name, self.split, self.revision]
        stat = os.stat(self.name)
        return [self.name, stat.st_size, stat.st_mtime_ns]


def resolve(
    specs: list[str],
    *,
    split: str | None = None,
    revision: str | None = None,
    weights: list[float] | None = None,
    flag: str = "--input",
) -> list[Input]:
    """Paths, globs, folders, hub names (``org/name[:config]``, ``modelscope:org/name``) -> inputs,
    in order."""
    if weights is not None and len(weights) != len(specs):
        raise ValueError(f"--weights: {len(weights)} given for {len(specs)} values of {flag}")
    inputs: list[Input] = []
    for spec, weight in zip(specs, weights or [1.0] * len(specs), strict=True):
        if not 0 < weight < 1000:
            raise ValueError(f"--weights {weight:g}: must lie above 0 and below 1000")
        inputs += _resolve_one(spec, weight, split, revision, flag)
    return inputs


def _resolve_one(
    spec: str, weight: float, split: str | None, revision: str | None, flag: str
) -> list[Input]:
    if spec.startswith("modelscope:"):
        name = spec.removeprefix("modelscope:")
        return [
            Input(
                name=name,
                label=name,
                kind="modelscope",
                weight=weight,
                split=split,
                revision=revision,
            )
        ]
    if os.path.isdir(spec):
        paths = _files_of_folder(spec, split, flag)
    elif os.path.exists(spec):
        paths = [spec]
    elif glob.has_magic(spec):
        paths = sorted(p for p in glob.glob(spec, recursive=True) if os.path.isfile(p))
        if not paths:
            raise ValueError(f"{flag} {spec}: no file matches")
    elif _HUB_NAME.fullmatch(spec) and not any(spec.endswith(s) for s in (*_KINDS, *_COMPRESSIONS)):
        return [
            Input(name=spec, label=spec, kind="hub", weight=weight, split=split, revision=revision)
        ]
    else:
        raise ValueError(f"{flag} {spec}: no such file or folder")
    return [_file_input(p, weight, flag) for p in paths]


def _file_input(path: str, weight: float, flag: str) -> Input:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if compression:
        stem, suffix = os.path.splitext(stem)
    kind = _KINDS.get(suffix.lower())
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
    return Input(
        name=path,
        label=os.path.basename(stem),
        kind=kind,
        compression=compression,
        num_bytes=num_bytes,
        weight=weight,
    )


def _files_of_folder(folder: str, split: str | None, flag: str) -> list[str]:
    paths = sorted(str(p) for p in Path(folder).rglob("*") if p.is_file() and _is_data(p))
    by_split: dict[str, list[str]] = {}
    for path in paths:
        words = re.split(r"[^a-z]+", os.path.relpath(path, folder).lower())
        by_split.setdefault(next((_SPLITS[w] for w in words if w in _SPLITS), ""), []).append(path)
    if split is not None and any(by_split):
        paths = by_split.get(_SPLITS.get(split, split), [])
    elif len(by_split.keys() - {""}) > 1:
        raise ValueError(
            f"{flag} {folder}: holds several splits ({', '.join(sorted(by_split.keys() - {''}))}); "
            "choose one with --split, or name the files"
        )
    if not paths:
        raise ValueError(
            f"{flag} {folder}: no data file in this"
            f" folder{f' for --split {split}' if split else ''}"
        )
    return paths


def _is_data(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if path.name in _NOT_DATA or path.name.startswith(".") or not suffixes:
        return False
    return suffixes[-1] in _KINDS or (
        len(suffixes) == 2 and suffixes[1] in _COMPRESSIONS and suffixes[0] in _KINDS
    )
