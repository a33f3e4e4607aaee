"""Which responses of a comparison make a pair: those whose scores differ, and ties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rmega.data.indexed import StoredComparison


def response_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) index pairs of one comparison's responses; ties give none."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def tied_responses(comparison: StoredComparison) -> list[tuple[int, int]]:
    """All index pairs (i < j) of responses with equal scores; equal responses are no pair."""
    scores, suffixes = comparison.scores, comparison.suffixes
    return [
        (i, j)
        for j in range(len(scores))
        for i in range(j)
        if scores[i] == scores[j] and not np.array_equal(suffixes[i], suffixes[j])
    ]


def pairs(
    document_indices: np.ndarray, scores: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(comparison, better sequence, worse sequence), int64 [m] each, block by block: all pairs of a
    dataset, from its ``document_indices`` [N + 1] and ``scores`` [S] as stored."""
    document_indices, scores = np.asarray(document_indices), np.asarray(scores)
    num_responses = np.diff(document_indices) - 1
    for k in np.unique(num_responses).tolist():
        which = np.flatnonzero(num_responses == k)  # comparisons of k responses
        first = document_indices[which] + 1
        for i in range(k):
            for j in range(i + 1, k):  # scores fall within a comparison
                differs = scores[first + i] != scores[first + j]
                yield which[differs], first[differs] + i, first[differs] + j


def count_pairs(document_indices: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """int64 [N]: pairs of responses with different scores of each comparison; see `pairs`."""
    counts = np.zeros(len(document_indices) - 1, np.int64)
    for which, _, _ in pairs(document_indices, scores):
        counts[which] += 1
    return counts
