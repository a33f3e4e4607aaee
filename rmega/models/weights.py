"""One weight table serves both directions: which rows of which Hugging Face tensors make up each
rmega tensor.

A rule is data, not code: a *global* (unsharded) rmega tensor is a stack, along dim 0, of row ranges
of Hugging Face tensors. Loading reads the rule forwards, an export reads it backwards, so the two
cannot disagree, and both are exact.

Shape letters: V vocabulary, h hidden size, f MLP width, a query heads, g key/value groups, d head
dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` (exclusive) of the Hugging Face tensor ``name``."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One global rmega tensor and the parts that it is stacked from.

    ``shard_dim`` is the dimension that tensor parallelism cuts (None: every rank holds all of it).
    ``shard_blocks`` says into how many equal row blocks dim 0 falls before it is cut: 2 for
    ``linear_fc1``, whose rank holds its rows of the gate and then its rows of the up projection.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shard_dim: int | None = None
    shard_blocks: int = 1

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """The smallest shape that a rank can hold; the engine may pad the cut dimension with zeros
        beyond it."""
        if self.shard_dim is None:
            return self.shape
        share = self.shard_blocks * -(-(self.shape[self.shard_dim] // self.shard_blocks) // tp_size)
        return (*self.shape[: self.shard_dim], share, *self.shape[self.shard_dim + 1 :])

    def local_rows(self, tp_rank: int, held: int) -> list[tuple[int, int]]:
        """The global row ranges that rank ``tp_rank``, holding ``held`` rows, holds, in its own
        order.

        Where the engine pads (the vocabulary, groups of heads), a range may reach beyond
        ``shape[0]``.
        """
        if self.shard_dim != 0:
            return [(0, held)]
        block, share = self.shape[0] // self.shard_blocks, held // self.shard_blocks
        return [
            (b * block + tp_rank * share, b * block + (tp_rank + 1) * share)
            for b in range(self.shard_blocks)
        ]

    def local_columns(self, tp_rank: int, held: int) -> tuple[int, int] | None:
        """The columns of the global tensor that rank ``tp_rank``, holding ``held`` columns, has;
        None means all."""
        if self.shard_dim != 1 or held >= self.shape[1]:
            return None
        return min(tp_rank * held, self.shape[1]), min((tp_rank + 1) * held, self.shape[1])

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, Part]]:
        """Cut the parts to the global rows ``start`` to ``stop``; yields (rows after ``start``,
        part)."""
        at = 0
        for part in self.parts:
            size = part.stop - part.start
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                yield low - start, Part(part.name, part.start + low - at, part.start + high - at)
            at += size


def whole(name: str, rows: int) -> tuple[Part, ...]:
    """A tensor that is one Hugging Face tensor, unchanged."""
    return (Part(name, 0, rows),)


def grouped_qkv(
    q: str, k: str, v: str, *, groups: int, heads_per_group: int, head_dim: int
) -> tuple[Part, ...]:
    """megatron-core's ``linear_qkv`` from separate projections: for each group its query heads, its
    key, its value."""
    r, d = heads_per_group * head_dim, head_dim
    parts: list[Part] = []
    for i in range(groups):
        parts += [
            Part(q, i * r, (i + 1) * r),
            Part(k, i * d, (i + 1) * d),
            Part(v, i * d, (i + 1) * d),
        ]
    return tuple(parts)


def hf_shapes(table: list[WeightRule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor that the table speaks of, in the table's
    order."""
    rows: dict[str, int] = {}
    tail: dict[str, tuple[int, ...]] = {}
    for rule in table:
        for part in rule.parts:
            rows[part.name] = max(rows.get(part.name, 0), part.stop)
            tail[part.name] = rule.shape[1:]
    return {name: (count, *tail[name]) for name, count in rows.items()}
