"""Evaluations of the same data side by side: seeds of one recipe, an average and its parts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmega.evaluation.files import FORMAT_VERSION
from rmega.evaluation.table import number
from rmega.io import refuse_repeated

COLUMNS = (
    ("accuracy", ("accuracy",)),
    ("length-contr.", ("length", "controlled_accuracy")),
    ("prefers longer", ("length", "prefers_longer")),
    ("RewardBench", ("reward_bench", "overall")),
    ("RewardBench 2", ("reward_bench_2", "overall")),
    ("RM-Bench", ("rm_bench", "average")),
)
"""Title of a column, and where a set's result has its value; left out where no file has it."""


def read(path: str) -> dict[str, Any]:
    """What ``--json`` wrote. ValueError names a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--join {path}: cannot be read ({error})") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION or not isinstance(content.get("sets"), dict):
        raise ValueError(
            f"--join {path}: not an evaluation that --json of this version wrote (format version"
            f" {version}, {FORMAT_VERSION} expected)"
        )
    return content


def join(paths: Sequence[str]) -> str:
    """A table per set: a row per file, then mean and standard deviation over the files (n - 1).
    ValueError where the files are not about the same sets with the same pairs."""
    if len(paths) < 2:
        raise ValueError("--join: two or more files were expected")
    refuse_repeated("--join", paths)
    runs = [read(path) for path in paths]
    for path, run in zip(paths[1:], runs[1:], strict=True):
        if (sets := _pairs(run)) != (expected := _pairs(runs[0])):
            raise ValueError(
                f"--join {path}: is about {_text(sets)}, {paths[0]} about {_text(expected)}"
            )
    return "\n\n".join(
        _table(name, paths, [run["sets"][name] for run in runs]) for name in runs[0]["sets"]
    )


def _pairs(run: dict[str, Any]) -> dict[str, int]:
    return {name: result["num_pairs"] for name, result in run["sets"].items()}


def _text(sets: dict[str, int]) -> str:
    return ", ".join(f"{name} ({pairs:,} pairs)" for name, pairs in sets.items())


def _table(name: str, paths: Sequence[str], results: list[dict[str, Any]]) -> str:
    columns = []
    for title, where in COLUMNS:
        values: list[Any] = []
        for result in results:
            value: Any = result
            for key in where:
                value = (value or {}).get(key)
            values.append(value)
        if any(value is not None for value in values):
            columns.append((title, values))
    width = max(24, *(len(path) for path in paths))

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(f"{cell:>15}" for cell in cells)

    lines = [
        name,
        "=" * len(name),
        line(f"{results[0]['num_pairs']:,} pairs", [t for t, _ in columns]),
    ]
    lines += [
        line(path, [number(values[i], 4) for _, values in columns]) for i, path in enumerate(paths)
    ]
    for label, function in (("mean", statistics.fmean), ("standard deviation", statistics.stdev)):
        cells = [number(None if None in v else function(v), 4) for _, v in columns]
        lines.append(line(label, cells))
    return "\n".join(lines)
