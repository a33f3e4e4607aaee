"""Probes: inputs whose result is known (responses swapped, blanked, with a wrong prompt).

Here as text, for tools/evaluate.py; ``rmega.evaluation.token_probes`` does the same to token ids,
for a training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from rmega.evaluation.results import ScoredComparison, pairs_of
from rmega.metrics import correct
from rmega.preferences.comparison import Comparison

T = TypeVar("T")

NUM_PROBED = 16
"""Comparisons that are scored again by default."""

Score = Callable[[list[Comparison]], list[list[float]]]
"""Comparisons -> rewards, one list per comparison in the order of its responses."""


def pick(items: Sequence[T], count: int) -> list[T]:
    """``count`` comparisons spread evenly over the set (all, where it has no more); no
    randomness."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def _mean_correct(items: Sequence[ScoredComparison]) -> float:
    d = pairs_of(items).d
    return float(correct(d).mean()) if d.size else 0.5


def noise(items: Sequence[ScoredComparison]) -> float:
    """Differences of rewards below this are rounding: a thousandth of the spread of the margins."""
    d = pairs_of(items).d
    return 1e-3 * float(d.std()) + 1e-6 if d.size else 1e-6


def _settled(rewards: Sequence[float], tolerance: float) -> np.ndarray:
    """Rewards that lie within ``tolerance`` of the next lower one become equal to it."""
    values = np.asarray(rewards, dtype=np.float64).copy()
    order = np.argsort(values, kind="stable")
    for low, high in zip(order, order[1:], strict=False):
        if values[high] - values[low] <= tolerance:
            values[high] = values[low]
    return values


def probe_texts(items: Sequence[ScoredComparison], score: Score) -> dict[str, dict[str, Any]]:
    """{"swap": .., "prompt": ..} for ``evaluate``: the responses in reverse order, every response
    blanked, and each comparison's responses under the prompt of the next one (a response-only
    baseline in the words the model knows). {} where there is none."""
    if not items:
        return {}
    own, n = [item.comparison for item in items], len(items)
    wrong = [replace(c, prompt=own[(i + 1) % n].prompt) for i, c in enumerate(own)]
    rewards = score([*map(_reversed, own), *map(_blanked, own), *wrong])
    return {
        "swap": swap_numbers(items, rewards[:n]),
        "prompt": prompt_numbers(items, rewards[n : 2 * n], rewards[2 * n :]),
    }


def swap_numbers(
    items: Sequence[ScoredComparison], again: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Compare ``again``, the rewards [k] of each item's responses in reverse order: no reward may
    change.

    {"num_comparisons", "max_difference" of a reward, "changed_share" of comparisons whose ranking
    changed, "rescored_accuracy": with the labels reversed too, so one minus the accuracy if all is
    well}.
    """
    changed, largest, turned, tolerance = 0, 0.0, [], noise(items)
    for item, rewards in zip(items, again, strict=True):
        values = np.asarray(rewards, dtype=np.float64)[::-1]
        largest = max(largest, float(np.abs(values - item.rewards).max()))
        # two rewards that are equal up to rounding may be ordered either way
        contradicts = _signs(values) * _signs(item.rewards) < 0
        moved = (
            np.abs((values[:, None] - values) - (item.rewards[:, None] - item.rewards)) > tolerance
        )
        changed += bool((contradicts & moved).any())
        turned.append(_with(item, rewards=values, scores=-item.scores))
    return {
        "num_comparisons": len(items),
        "max_difference": largest,
        "changed_share": changed / len(items),
        "rescored_accuracy": _mean_correct(turned),
    }


def prompt_numbers(
    items: Sequence[ScoredComparison],
    blank: Sequence[Sequence[float]],
    shifted: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Accuracies of the rewards [k] of each item with every response blanked (all pairs must tie,
    so it must be a half), and of its responses under another prompt.

    {"num_comparisons", "blank_accuracy", "shuffled_accuracy", "own_accuracy" on the same
    comparisons}.
    """
    tolerance = noise(items)
    return {
        "num_comparisons": len(items),
        "blank_accuracy": _mean_correct(
            [_with(i, rewards=_settled(r, tolerance)) for i, r in zip(items, blank, strict=True)]
        ),
        "shuffled_accuracy": _mean_correct(
            [_with(i, rewards=np.asarray(r)) for i, r in zip(items, shifted, strict=True)]
        ),
        "own_accuracy": _mean_correct(items),
    }


def _with(
    item: ScoredComparison, *, rewards: np.ndarray, scores: np.ndarray | None = None
) -> ScoredComparison:
    return replace(
        item, rewards=rewards.astype(np.float64), scores=item.scores if scores is None else scores
    )


def _signs(x: np.ndarray) -> np.ndarray:
    return np.sign(x[:, None] - x[None, :])


def _reversed(comparison: Comparison) -> Comparison:
    # scores go along, so that they stay with their responses; the scorer must not read them
    return replace(comparison, responses=comparison.responses[::-1], scores=comparison.scores[::-1])


def _blanked(comparison: Comparison) -> Comparison:
    blank = [{"role": "assistant", "content": " "}]
    return replace(comparison, responses=[blank for _ in comparison.responses])
