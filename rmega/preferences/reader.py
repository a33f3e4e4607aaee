"""Rows of an input with their schema: one reader and one sampling rule for preprocessing,
evaluation and scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from rmega.preferences import sources
from rmega.preferences.chunks import Chunk, Item
from rmega.preferences.closest_schema import columns_of, what_is_missing
from rmega.preferences.resolve import Input
from rmega.preferences.schemas import Schema, recognize, schema_named

SAMPLE_ROWS, SAMPLE_CHUNKS = 50, 8
"""The schema is recognized from this many of the first rows, in at most this many chunks."""


@dataclass
class Plan:
    """An input with the schema of its rows."""

    source: Input
    schema: Schema | None
    """None under --map, and where none is needed and none fits."""
    sample: list[dict[str, Any]] = field(default_factory=list)
    """Its first rows."""
    stream: Iterator[Chunk] | None = None
    """The chunks of an input that can be read only once: a hub's data set, a pipe."""

    def __reduce__(self) -> tuple[Any, ...]:  # workers need no more
        return Plan, (self.source, self.schema)

    def chunks(self, index: int = 0, hashes: dict[str, str] | None = None) -> Iterator[Any]:
        """All chunks, with rows grouped where the schema requires it; see
        ``sources.read_chunks``."""
        chunks = self.stream
        if chunks is None:
            chunks = sources.read_chunks(self.source, index, hashes)
        if self.schema is not None and self.schema.groups_by:
            chunks = sources.group_rows(chunks, self.schema.groups_by)
        for chunk in chunks:
            chunk.input_index = index
            yield chunk

    def rows(self) -> Iterator[Item]:
        """All rows, see `Item`."""
        for chunk in self.chunks():
            yield from sources.decode(chunk)


def plan_input(
    source: Input,
    format_name: str = "auto",
    flag: str = "--input",
    *,
    mapped: bool = False,
    needed: bool = True,
) -> Plan:
    """Look at the first rows of an input and recognize their schema.

    mapped: a --map function gives the rows, so none is looked for. needed: ValueError if no row can
    be read or no schema fits; else the schema is None.
    """
    chunks = sources.read_chunks(source, 0)
    head: list[Chunk] = []
    items: list[Item] = []
    sample: list[dict[str, Any]] = []
    for chunk in islice(chunks, SAMPLE_CHUNKS):
        head.append(chunk)
        items = list(sources.decode(chunk))
        sample += [row for _, row, _ in items if isinstance(row, dict)]
        if len(sample) >= SAMPLE_ROWS:
            break
    sample = sample[:SAMPLE_ROWS]
    stream = None if os.path.isfile(source.name) else chain(head, chunks)
    if needed and not sample:
        if not items:
            raise ValueError(f"{flag} {source.name}: no rows")
        number, why, _ = next(item for chunk in head for item in sources.decode(chunk))
        raise ValueError(
            f"{flag} {source.name}:{number}: {why}; no row of its beginning can be read"
        )
    if mapped:
        return Plan(source, None, sample, stream)
    schema = recognize(sample) if format_name == "auto" else schema_named(format_name)
    if schema is None and needed:
        raise ValueError(
            f"{flag} {source.name}: no known schema has the columns {columns_of(sample[0])};"
            f" {what_is_missing(sample[0])}. --format names a schema"
            + (", --map brings other rows into one" if flag == "--input" else "")
        )
    return Plan(source, schema, sample, stream)
