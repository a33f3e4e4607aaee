"""Evaluations stored in a run folder (no torch).

A file is what tools/evaluate.py --json writes, with one set and the "step" beside it. Written by
``rmega.evaluation.in_training``, read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = "evaluations"
FORMAT_VERSION = 2
LONGEST_NAME = 120


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each validation set -> name of its folder, the same where that is a plain file name.

    Other characters are written as in a URL (%2F). A very long name, and one that differs from
    another by upper and lower case alone (one file to some file systems), ends with a checksum
    after "~", which no plain name holds.
    """
    names = list(names)
    out = {}
    for name in names:
        safe = quote(name, safe="", errors="surrogatepass").replace("~", "%7E")
        if safe.startswith(".") or not safe:
            safe = f"%2E{safe[1:]}" if safe else "~"
        if len(safe) > LONGEST_NAME or [n.casefold() for n in names].count(name.casefold()) > 1:
            checksum = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            safe = f"{safe[:LONGEST_NAME]}~{checksum}"
        out[name] = safe
    return out


def step_file(folder: Path, step: int) -> Path:
    """The file of one evaluation in the folder of its set."""
    return folder / f"step_{step:07d}.json"


def _step_of(path: Path) -> int:
    digits = path.name.partition(".")[0].removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def drop_after(run: str | Path, step: int | None) -> None:
    """Remove the evaluations of later steps (all, for None) and what a write that was cut short has
    left. OSError."""
    for path in list(Path(run, FOLDER).glob("*/step_*.json*")):
        if path.suffix == ".partial" or step is None or _step_of(path) > step:
            path.unlink()
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


def read_evaluations(run: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of a run: set -> step -> result (null where ``evaluate`` has NaN), steps in order.

    {} for a run that wrote none. ValueError names a file that is none of ours.
    """
    out: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(
        Path(run, FOLDER).glob("*/step_*.json"), key=lambda p: (p.parent.name, _step_of(p))
    ):
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            version, step, sets = whole["format_version"], int(whole["step"]), dict(whole["sets"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not an evaluation of a run") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}"
            )
        for name, result in sets.items():
            out.setdefault(name, {})[step] = result
    return out


def eval_rows(run: Path | str) -> list[dict[str, Any]]:
    """The evaluations in a run's metrics.jsonl, as they were written; none without that file. The
    line that a killed run was writing is left out."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if row.get("type") == "eval"]
