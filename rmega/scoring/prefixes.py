"""What token sequences share: equal ones, and common beginnings that are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from rmega.preferences.overlong import common_prefix_length

MIN_SHARED = 16  # tokens: less is not worth a segment
MAX_DEPTH = 64  # of nested beginnings that are looked at


def distinct_sequences(sequences: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The sequences without repetitions, in order, and which of these each one is."""
    found: dict[bytes, tuple[int, Sequence[int]]] = {}
    which = [
        found.setdefault(np.asarray(s, dtype=np.int64).tobytes(), (len(found), s))[0]
        for s in sequences
    ]
    return [s for _, s in found.values()], which


def parts_of(sequences: Sequence[Sequence[int]], capacity: int) -> Iterator[SimpleNamespace]:
    """The shared prefix of an item and the rest of each sequence; several times where they are too
    many for a pack."""
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    for array in arrays:
        if not len(array):
            raise ValueError("an empty token sequence has no reward")
    length = common_prefix_length(arrays) if len(arrays) > 1 else 0
    suffixes = [a[length:] for a in arrays]
    ends = np.cumsum([len(s) for s in suffixes])
    start = 0
    while start < len(suffixes):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + capacity - length, side="right")))
        yield SimpleNamespace(
            prefix=arrays[0][:length],
            suffixes=suffixes[start:end],
            graded=False,
            scores=[0.0] * (end - start),
            ends_item=end == len(suffixes),
        )
        start = end


def group_by_prefix(sequences: Sequence[np.ndarray], at_least: int = MIN_SHARED) -> list[list[int]]:
    """Numbers of the sequences (int32 arrays) in groups that share a beginning of ``at_least``
    tokens.

    Sequences are sorted, so that those with equal beginnings are neighbors; the sorted row is then
    cut where that saves most tokens: a group of m that shares p tokens saves p (m - 1). Groups are
    in the order of their first member.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
    shared = [
        common_prefix_length([sequences[a], sequences[b]])
        for a, b in zip(order, order[1:], strict=False)
    ]
    groups: list[list[int]] = []

    def best(first: int, end: int, depth: int) -> tuple[int, list[tuple[int, int]]]:
        """(tokens saved, ranges) of the best way to cut ``order[first:end]``."""
        if end - first == 1:
            return 0, [(first, end)]
        least = min(shared[first : end - 1])
        whole = least * (end - first - 1) if least >= at_least else 0
        if depth == MAX_DEPTH and whole:
            return whole, [(first, end)]
        cuts = [
            i + 1
            for i in range(first, end - 1)
            if shared[i] <= (least if depth < MAX_DEPTH else at_least)
        ]
        saved, ranges = 0, []
        for a, b in zip([first, *cuts], [*cuts, end], strict=True):
            more, parts = best(a, b, min(depth + 1, MAX_DEPTH))
            saved, ranges = saved + more, ranges + parts
        return (whole, [(first, end)]) if whole and whole >= saved else (saved, ranges)

    if sequences:
        groups = [sorted(order[a:b]) for a, b in best(0, len(order), 0)[1]]
    return sorted(groups, key=lambda group: group[0])
