"""Suggest the closest schema for rows that none matches, and name the missing columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmega.preferences.comparison import Rejected
from rmega.preferences.messages import Row
from rmega.preferences.schemas import SCHEMA_NAMES, SCHEMAS, Schema

# Of several that lack equally little, the plainest comes first.
_PLAIN = ("messages", "strings")
_TWINS = {
    "chosen": "rejected",
    "rejected": "chosen",
    "conversation_a": "conversation_b",
    "conversation_b": "conversation_a",
}
_OTHERS: dict[str, Any] = {"responses": [{"score": 1}], "scores": [1]}


def nearest(row: Row) -> tuple[Schema, list[str]] | None:
    """The schema of whose columns the row lacks least, and those columns; None if it has none of
    any."""
    best: tuple[tuple[bool, bool, float], Schema, list[str]] | None = None
    for schema in sorted(SCHEMAS, key=lambda s: s.name not in _PLAIN):
        needs = schema.needs
        missing = [options for options in needs if all(row.get(n) is None for n in options)]
        if len(missing) == len(needs):
            continue
        # Several schemas have the same columns: prefer the one that the row would be recognized
        # as with the missing columns filled.
        filled = {
            **row,
            **{o[0]: row.get(_TWINS.get(o[0], ""), _OTHERS.get(o[0], "text")) for o in missing},
        }
        rank = not missing, schema.fits(filled), 1 - len(missing) / len(needs)
        if best is None or rank > best[0]:
            best = rank, schema, [o[0] + (" (it is null)" if o[0] in row else "") for o in missing]
    return best[1:] if best else None


def what_is_missing(row: Row) -> str:
    """For a row that no schema fits: the nearest one, and what is missing or of another type."""
    found = nearest(row)
    if found is None:
        return f"known schemas: {', '.join(SCHEMA_NAMES)}"
    schema, missing = found
    text = f"nearest is {schema.name} ({schema.columns})"
    if missing:
        return f"{text}; missing: {', '.join(missing)}"
    try:
        schema.convert(row)
    except Rejected as error:
        return f"{text}; but {error.detail or error}"
    return f"{text}; nothing is missing"


def columns_of(row: Row) -> str:
    """Names of the columns, for a message: not more than fit on a line."""
    names = list(map(str, row))
    shown = ", ".join(names[:8])[:120]
    return (shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "none"


def most_common(counts: Mapping[str, int]) -> str:
    """``{"rejected": 3, "chosen": 1}`` -> "rejected 3 x, chosen"; at most three."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{name} {n:,} x" if n > 1 and len(ordered) > 1 else name for name, n in ordered[:3]]
    return ", ".join(named) + (" and others" if len(ordered) > 3 else "")


def left_out(reason_text: str, reason: str, details: Mapping[str, Any]) -> str:
    """The words for a reason, with the columns where a column is what is missing."""
    return (
        f"{reason_text}: {most_common(details)}"
        if reason == "missing_field" and details
        else reason_text
    )
