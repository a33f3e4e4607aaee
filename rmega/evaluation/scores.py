"""Scores files of any origin, matched to the rows of a data file.

Accepted, also with .gz:

- JSONL, or a JSON list, one row per row of the data: {"scores": [1.3, -0.2]}, in the order in which
  the data row writes its responses (chosen before rejected), or {"chosen": 1.3, "rejected": -0.2};
  a number or a list of numbers each, as in RM-Bench's and RewardBench 2's results. An "id" is
  optional.
- JSON with columns: {"scores_chosen": [...], "scores_rejected": [...], "id": [...]}, RewardBench's
  published results; {"scores": [[..], ..], "id": [...], "model": ...}, RewardBench 2's.
- CSV, TSV or spaced text with a number per response; a first line of names ("chosen,rejected",
  "id,chosen,rejected").

Where every row of both files has an id, rows are matched by it; else by their order, and the counts
must agree.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmega.io import refuse_pointer

LISTS = ("scores", "rewards")
PAIRS = (
    ("chosen", "rejected"),
    ("scores_chosen", "scores_rejected"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_scores", "rejected_scores"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_rewards", "rejected_rewards"),
    ("reward_chosen", "reward_rejected"),
    ("rewards_chosen", "rewards_rejected"),
)
ACCEPTED = '"scores": [..] or a pair of columns such as chosen, rejected (numbers)'


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """Scores [k] of one row in the order the data row writes its responses; where = "FILE:LINE" for
    errors."""

    scores: np.ndarray
    id: str | None
    where: str


def read_scores(path: str | Path) -> list[ScoreRow]:
    """All rows of a scores file (see the head of this file). ValueError names file and row."""
    path = Path(path)
    refuse_pointer(path, "--scores")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--scores {path}: not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError(f"--scores {path}: empty")
    if text.lstrip()[0] not in "{[":
        return _read_table(text, path)
    whole = _json(text)
    if isinstance(whole, dict):
        if isinstance(whole.get("results"), dict) and not _is_columns(whole):
            whole = whole["results"]
        if _is_columns(whole):
            return _read_columns(whole, path)
    if isinstance(whole, list) and whole and isinstance(whole[0], (dict, list)):
        return [_row(value, f"{path}: row {i}") for i, value in enumerate(whole, 1)]
    rows = []
    # not splitlines: a JSON string may hold U+2028, U+0085 and the like
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            value = _json(line)
            if value is None:
                raise ValueError(f"--scores {path}:{number}: not JSON")
            rows.append(_row(value, f"{path}:{number}"))
    return rows


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbers(value: Any, where: str) -> list[float]:
    """A number, a list of numbers, or a list of one-element lists (models whose head gives
    [[x]])."""
    values = value if isinstance(value, list) else [value]
    values = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in values]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v):
            raise ValueError(f"--scores {where}: {json.dumps(v)[:60]} is not a finite number")
    return [float(v) for v in values]


def _find_pair(keys: Any) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in keys and pair[1] in keys), None)


def _row(value: Any, where: str) -> ScoreRow:
    if isinstance(value, list):
        return ScoreRow(np.array(_numbers(value, where)), None, where)
    if not isinstance(value, dict):
        raise ValueError(f"--scores {where}: neither an object nor a list; expected {ACCEPTED}")
    name = next((n for n in LISTS if isinstance(value.get(n), list)), None)
    if name:
        numbers = _numbers(value[name], where)
    else:
        pair = _find_pair(value)
        # a data row with text under chosen and rejected may carry its scores under other names
        if pair == ("chosen", "rejected") and not isinstance(value["chosen"], (int, float)):
            pair = _find_pair({k: v for k, v in value.items() if k not in pair}) or pair
        if pair is None:
            raise ValueError(
                f"--scores {where}: no scores; expected {ACCEPTED}, found"
                f" {', '.join(list(value)[:8])}"
            )
        numbers = _numbers(value[pair[0]], where) + _numbers(value[pair[1]], where)
    id_ = value.get("id")
    return ScoreRow(np.array(numbers), None if id_ is None else str(id_), where)


def _is_columns(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    named = not value.keys().isdisjoint(("model", "subset")) or isinstance(value.get("id"), list)
    lists = next((value[n] for n in LISTS if isinstance(value.get(n), list)), [])
    if (
        lists
        and all(isinstance(v, list) for v in lists)
        and (named or all(len(v) > 1 for v in lists))
    ):
        return True
    pair = _find_pair(value)
    # one JSONL row of lists is not columns: columns are longer than a row has responses, or have
    # ids beside them
    return (
        pair is not None
        and isinstance(value[pair[0]], list)
        and (
            isinstance(value.get("id"), list)
            or isinstance(value.get("subset"), list)
            or "model" in value
            or len(value[pair[0]]) > 16
        )
    )


def _read_columns(columns: dict[str, Any], path: Path) -> list[ScoreRow]:
    pair = _find_pair(columns)
    names = pair or [next(n for n in LISTS if isinstance(columns.get(n), list))]
    given = [columns[name] for name in names]
    ids = columns["id"] if isinstance(columns.get("id"), list) else [None] * len(given[0])
    sizes = [
        (len(values), name) for values, name in zip((*given, ids), (*names, "id"), strict=True)
    ]
    if len({size for size, _ in sizes}) > 1:
        counts = ", ".join(f"{size} {name}" for size, name in sizes)
        raise ValueError(f"--scores {path}: columns of different lengths: {counts}")
    keys = ("chosen", "rejected") if pair else ("scores",)
    return [
        _row({**dict(zip(keys, values, strict=True)), "id": id_}, f"{path}: row {number}")
        for number, (id_, *values) in enumerate(zip(ids, *given, strict=True), 1)
    ]


def _read_table(text: str, path: Path) -> list[ScoreRow]:
    table: list[tuple[int, list[str]]] = []
    lines = io.StringIO(text, newline="").readlines()  # a cell in quotes keeps its line breaks
    content = [line for line in lines if line.strip() and not line.startswith("#")]
    if not content:
        raise ValueError(f"--scores {path}: no rows")
    delimiter = next((c for c in ",\t;" if c in content[0]), None)
    if delimiter is None:
        plain = "".join(lines).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rows_of_cells = [(n, line.split()) for n, line in enumerate(plain, 1)]
        table = [(n, c) for n, c in rows_of_cells if c and not c[0].startswith("#")]
    else:
        reader, first = csv.reader(lines, delimiter=delimiter, strict=True), 1
        try:
            for cells in reader:
                if any(map(str.strip, cells)) and not cells[0].startswith("#"):
                    table.append((first, cells))
                first = reader.line_num + 1  # of the next row: one may take several lines
        except csv.Error as error:
            raise ValueError(f"--scores {path}:{first}: {error}") from None
    names: list[str] | None = None
    if not any(_is_number(cell) for cell in table[0][1]):
        names = [cell.strip().lower() for cell in table.pop(0)[1]]
    rows = []
    for number, cells in table:
        where, id_ = f"{path}:{number}", None
        cells = [cell.strip() for cell in cells]
        if names:
            if len(cells) != len(names):
                raise ValueError(
                    f"--scores {where}: {len(cells)} cells, but {len(names)} names in the first"
                    " line"
                )
            named = dict(zip(names, cells, strict=True))
            id_, pair = named.get("id"), _find_pair(named)
            cells = [named[p] for p in pair] if pair else [c for n, c in named.items() if n != "id"]
        if not all(_is_number(cell) for cell in cells):
            raise ValueError(f"--scores {where}: not numbers: {', '.join(cells)[:80]}")
        rows.append(ScoreRow(np.array(_numbers([float(c) for c in cells], where)), id_, where))
    return rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def match_scores(rows: Sequence[ScoreRow], ids: Sequence[str | None], data: str) -> list[ScoreRow]:
    """One score row per data row, in data order. ids: of every data row (None where it has none);
    data: its name.

    By id where every row on both sides has one and none repeats; else by order. ValueError says
    what is missing.
    """
    given = [row.id for row in rows]
    if (
        None not in given
        and None not in ids
        and len(set(given)) == len(given)
        and len(set(ids)) == len(ids)
    ):
        table = {row.id: row for row in rows}
        missing = [i for i in ids if i not in table]
        if missing:
            raise ValueError(
                f"--scores {rows[0].where}: no scores for {len(missing)} of {len(ids)} rows of"
                f" {data}, the first: id {missing[0]!r}"
            )
        return [table[i] for i in ids]
    if len(rows) != len(ids):
        raise ValueError(
            f"--scores {rows[0].where}: {len(rows)} rows of scores for {len(ids)} rows of {data} "
            "(rows are matched by order unless both files have a unique id in every row)"
        )
    for row, id_ in zip(rows, ids, strict=True):
        if row.id is not None and id_ is not None and row.id != id_:
            raise ValueError(f"--scores {row.where}: id {row.id!r} where {data} has {id_!r}")
    return list(rows)
