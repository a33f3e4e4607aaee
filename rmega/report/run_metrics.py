"""The rows of a run's ``metrics.jsonl``: reading, columns, running means, progress."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def read_metrics(run: str | Path) -> tuple[list[Row], list[Row]]:
    """Rows of RUN/metrics.jsonl: (training, evaluation), each in the order of steps.

    A step that was written again after a resume counts once, as it was written last. A line cut
    short at the very end (the run was stopped while writing, or still writes) is left out; anything
    else broken is a ValueError.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a run writes it into its --save folder")
    train: dict[int, Row] = {}
    evals: dict[tuple[int, str], Row] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            if n == len(lines):
                continue
            raise ValueError(f"{path}:{n}: not a row of metrics") from None
        if row.get("type") == "train":
            train[step] = row
        elif row.get("type") == "eval":
            evals[step, str(row.get("name", "valid"))] = {"name": "valid", **row}
    if not train and not evals:
        raise ValueError(f"{path}: no rows of training or evaluation yet")
    return [train[s] for s in sorted(train)], [evals[k] for k in sorted(evals)]


def column(rows: Sequence[Row], *names: str) -> np.ndarray:
    """A column [rows] as floats, NaN where a row has none of the names."""
    values = [
        next((row[n] for n in names if isinstance(row.get(n), (int, float))), math.nan)
        for row in rows
    ]
    return np.array(values, dtype=np.float64)


def mean_of(y: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    return float(np.nanmean(y)) if not np.isnan(y).all() else math.nan


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the last ``window`` values, NaN left out. [n] -> [n]"""
    known = ~np.isnan(y)
    total, count = np.cumsum(np.where(known, y, 0.0)), np.cumsum(known)
    total[window:], count[window:] = (
        total[window:] - total[:-window],
        count[window:] - count[:-window],
    )
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def running_median(y: np.ndarray, window: int) -> np.ndarray:
    """Median of the last ``window`` values, NaN left out. [n] -> [n]"""
    out = np.full(y.shape, math.nan)
    for i in range(y.size):
        part = y[max(0, i - window + 1) : i + 1]
        part = part[~np.isnan(part)]
        out[i] = np.median(part) if part.size else math.nan
    return out


def flat(config: Row, prefix: str = "") -> Row:
    """Nested settings as one level, "train.lr": groups are joined by a dot."""
    out: Row = {}
    for key, value in config.items():
        out |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return out


def head(train: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """[progress, make], from the training rows in the order of steps and config.json; a line that
    has nothing to say is left out. A run of an earlier version says less in its files."""
    run, settings = config.get("run", {}), config.get("train", {})
    done: list[str] = []
    if train:
        step, planned = train[-1]["step"], run.get("steps") or settings.get("train_steps")
        if planned is None:
            done.append(f"step {step:,}")
        else:
            state = "finished" if step >= planned else "unfinished, or still running"
            done.append(f"{state}: {step:,} of {planned:,} steps")
        if seconds := time_taken(train):
            done.append(str(datetime.timedelta(seconds=round(seconds))))
        pairs = sum(row.get("num_pairs", row.get("num_samples")) or 0 for row in train)
        if pairs:
            done.append(f"{pairs:,} pairs seen")
    made = [
        str(config.get("model", {}).get("hf_model") or ""),
        run.get("layout", ""),
        run.get("precision", ""),
    ]
    return [line for line in ("; ".join(filter(None, done)), "; ".join(filter(None, made))) if line]


def time_taken(train: Sequence[dict[str, Any]]) -> float:
    """Seconds of the run up to its last row: as the row says, or the sum of its steps (a row has
    their mean since the row before it)."""
    if recorded := train[-1].get("train_seconds"):
        return recorded
    steps = [0, *(row["step"] for row in train)]
    return sum(
        (row.get("time") or 0.0) * (end - start)
        for row, start, end in zip(train, steps, steps[1:], strict=False)
    )
