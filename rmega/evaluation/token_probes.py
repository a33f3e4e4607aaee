"""The probes on stored token ids, for evaluation during training.

The ids do not say where a prompt ends and its responses begin, only how far all responses of a
comparison are alike (its prefix). So a blanked response keeps the words with which all responses of
its prompt begin, and under a wrong prompt it begins with the words with which that prompt's
responses do.

Shapes: K responses of a comparison; its tokens are those of the prefix and of K suffixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rmega.data.indexed import StoredComparison
from rmega.evaluation.probes import pick, prompt_numbers, swap_numbers
from rmega.evaluation.results import ScoredComparison
from rmega.preferences.overlong import common_length


class View:
    """Comparisons in memory with what ``rmega.data.batching.Batcher`` reads of a stored dataset."""

    def __init__(self, comparisons: Sequence[StoredComparison]) -> None:
        self.comparisons = list(comparisons)
        parts = [[len(c.prefix), *map(len, c.suffixes)] for c in self.comparisons]
        self.sequence_lengths = np.array([n for row in parts for n in row], dtype=np.int32)
        self.document_indices = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.comparisons)

    def get(self, index: int) -> StoredComparison:
        return self.comparisons[index]


ScoreStored = Callable[[View], np.ndarray]
"""A view -> rewards [responses] of all its responses, in order."""


def probe_stored(
    dataset: Any,
    items: Sequence[ScoredComparison],
    score: ScoreStored,
    count: int,
    *,
    max_tokens: int,
    share_prefix: bool = True,
) -> dict[str, dict[str, Any]]:
    """{"swap": .., "prompt": ..} for ``evaluate``, over ``count`` comparisons spread evenly; {}
    where there is none.

    dataset: open, as the ``items`` (``results.stored_items``) were made from. max_tokens,
    share_prefix: of the packs, see ``wrong_prompts``. "prompt" has one number more than that of
    text, "num_cut_prompts".
    """
    numbers = pick(range(len(dataset)), count)
    if not numbers:
        return {}
    some, own = [items[i] for i in numbers], [dataset.get(i) for i in numbers]
    wrong, cut = wrong_prompts(own, max_tokens=max_tokens, share_prefix=share_prefix)
    forms = [*reversed_responses(own), *blanked(own), *wrong]  # in one sweep: fewer, fuller packs
    rewards, n = _by_comparison(score(View(forms)), forms), len(own)
    again, blank, shifted = rewards[:n], rewards[n : 2 * n], rewards[2 * n :]
    return {
        "swap": swap_numbers(some, again),
        "prompt": {**prompt_numbers(some, blank, shifted), "num_cut_prompts": cut},
    }


def _by_comparison(
    rewards: np.ndarray, comparisons: Sequence[StoredComparison]
) -> list[np.ndarray]:
    ends = np.cumsum([len(c.suffixes) for c in comparisons])
    assert len(rewards) == ends[-1], "a reward per response"
    return np.split(rewards, ends[:-1])


def reversed_responses(comparisons: Sequence[StoredComparison]) -> list[StoredComparison]:
    """The responses of each comparison in reverse order, each with its score."""
    return [replace(c, suffixes=c.suffixes[::-1], scores=c.scores[::-1]) for c in comparisons]


def blanked(comparisons: Sequence[StoredComparison]) -> list[StoredComparison]:
    """Every response replaced by what all of them end with, the template's end of a turn and the
    reward token, so that all responses of a comparison are one. None is longer than its
    comparison's shortest."""
    texts = [np.concatenate([c.prefix, s]) for c in comparisons for s in c.suffixes]
    ending = texts[0][len(texts[0]) - common_length([text[::-1] for text in texts]) :]
    return [
        replace(
            c,
            suffixes=[ending[max(0, len(ending) - min(map(len, c.suffixes))) :]] * len(c.suffixes),
        )
        for c in comparisons
    ]


def wrong_prompts(
    comparisons: Sequence[StoredComparison], *, max_tokens: int, share_prefix: bool = True
) -> tuple[list[StoredComparison], int]:
    """Each comparison's responses under the next one's prefix; (comparisons, how many of those
    prefixes were cut).

    No text becomes longer than the longest of ``comparisons`` and no pass larger than
    ``max_tokens`` or than the comparison itself, so that neither the model's positions nor the
    memory of the training are exceeded: a prefix that is too long loses its oldest tokens after
    those with which all prefixes begin.
    """
    longest = max(len(c.prefix) + len(s) for c in comparisons for s in c.suffixes)
    head = common_length([c.prefix for c in comparisons])
    out, cut = [], 0
    for i, c in enumerate(comparisons):
        prefix, copies = (
            comparisons[(i + 1) % len(comparisons)].prefix,
            (1 if share_prefix else len(c.suffixes)),
        )
        responses = sum(map(len, c.suffixes))
        room = (max(max_tokens, copies * len(c.prefix) + responses) - responses) // copies
        keep = min(len(prefix), room, longest - max(map(len, c.suffixes)))
        if keep < len(prefix):
            cut += 1
            first = min(head, keep)
            prefix = np.concatenate([prefix[:first], prefix[len(prefix) - (keep - first) :]])
        out.append(replace(c, prefix=prefix))
    return out, cut
