"""Statistics of rewards: accuracy with intervals, correlations, best of N.

Arrays in, numbers out; numpy only, so that scores of any origin can be evaluated without torch.
``rmega.evaluation`` decides which pairs there are.

Shape letters: n = pairs (chosen, rejected); m = responses; k = responses of one prompt. d [n] =
reward of the chosen minus reward of the rejected; a tie (d = 0) counts half wherever something is
counted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Z95 = 1.96


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion: ``successes`` of ``n`` trials, ``z``
    standard deviations.

    ``successes`` may be fractional (a tie counts half). Unlike p +- z*s/sqrt(n) it stays inside [0,
    1] and keeps its coverage for few trials and for proportions near 0 or 1. ``n = 0`` gives (0,
    1): nothing is known. Source: E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22 (1927).
    """
    if n < 0 or not -1e-9 <= successes <= n + 1e-9:
        raise ValueError(f"wilson_interval: {successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    p = min(max(successes / n, 0.0), 1.0)
    denominator = 1.0 + z * z / n
    center = (p + z * z / (2.0 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1.0 - p) / n + z * z / (4.0 * n * n))
    # the bound is exact at the ends; do not let rounding move it off 0 or 1
    return (0.0 if p == 0.0 else max(0.0, center - half)), (
        1.0 if p == 1.0 else min(1.0, center + half)
    )


def difference_interval(
    successes: tuple[float, float], n: tuple[float, float]
) -> tuple[float, float, float]:
    """p_1 - p_2 of two independent proportions with its 95 % interval: (difference, low, high).

    Source: R. G. Newcombe, "Interval estimation for the difference between independent
    proportions", Statistics in Medicine 17 (1998), method 10 (built from the two Wilson intervals).
    An empty side gives (nan, -1, 1).
    """
    if min(n) == 0:
        return math.nan, -1.0, 1.0
    p1, p2 = successes[0] / n[0], successes[1] / n[1]
    (low1, high1), (low2, high2) = (
        wilson_interval(successes[0], n[0]),
        wilson_interval(successes[1], n[1]),
    )
    low = p1 - p2 - math.sqrt((p1 - low1) ** 2 + (high2 - p2) ** 2)
    return p1 - p2, low, p1 - p2 + math.sqrt((high1 - p1) ** 2 + (p2 - low2) ** 2)


def correct(d: np.ndarray) -> np.ndarray:
    """1 where the chosen has the higher reward, 0 where the rejected has it, 0.5 at a tie. [n] ->
    [n]"""
    return np.where(d > 0, 1.0, np.where(d < 0, 0.0, 0.5))


def accuracy(d: np.ndarray, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """Pair accuracy (ties half) with its 95 % Wilson interval, the ties, and the mean margin.

    clusters [n]: the comparison a pair comes from. The pairs of one prompt are not independent (K
    responses give up to K(K-1)/2 of them), so the interval is taken at the effective number of
    pairs p(1-p)/v, v = variance of the ratio estimate over comparisons (E. L. Korn, B. I. Graubard,
    Survey Methodology 24, 1998); never more than n. With one pair per comparison it is the plain
    interval.
    """
    n = int(d.size)
    wins = correct(d)
    effective = float(n)
    if n and clusters is not None:
        ids, inverse = np.unique(clusters, return_inverse=True)
        if ids.size < n:
            pairs_of = np.bincount(inverse)
            p = wins.mean()
            residual = np.bincount(inverse, weights=wins) - p * pairs_of
            variance = ids.size / max(ids.size - 1, 1) * float((residual**2).sum()) / n**2
            # every comparison alike (all right, or all wrong): count comparisons
            effective = min(n, p * (1 - p) / variance) if variance > 0 else float(ids.size)
    p = float(wins.mean()) if n else math.nan
    low, high = wilson_interval(p * effective, effective) if n else (0.0, 1.0)
    return {
        "num_pairs": n,
        "num_ties": int((d == 0).sum()),
        "accuracy": p,
        "accuracy_low": low,
        "accuracy_high": high,
        "effective_pairs": effective,
        "mean_margin": float(d.mean()) if n else math.nan,
    }


def accuracy_by_group(
    d: np.ndarray, groups: np.ndarray, clusters: np.ndarray | None = None
) -> dict[str, Any]:
    """``accuracy`` of every group, groups in order of their names; groups [n] of str."""
    out = {}
    for name in np.unique(groups):
        mask = groups == name
        out[str(name)] = accuracy(d[mask], None if clusters is None else clusters[mask])
    return out


def accuracy_by_margin(
    d: np.ndarray, margin: np.ndarray, clusters: np.ndarray | None = None, max_bins: int = 5
) -> list[dict[str, Any]]:
    """``accuracy`` in bins of the human rating margin [n] (NaN = the pair has no ratings and is
    left out).

    Few distinct margins are their own bins; otherwise bins of about equal count. Each bin has "low"
    and "high", the smallest and the largest margin in it. A good reward model is more often right
    where people were surer.
    """
    known = ~np.isnan(margin)
    if not known.any():
        return []
    # ratings are decimal numbers: 0.8 - 0.6 and 0.4 - 0.2 are one margin
    rounded = np.round(margin, 6)
    distinct = np.unique(rounded[known])
    edges = (
        distinct
        if distinct.size <= max_bins
        else np.unique(
            np.quantile(rounded[known], np.linspace(0, 1, max_bins + 1)[:-1], method="higher")
        )
    )
    bins = np.searchsorted(edges, rounded, side="right") - 1
    out = []
    for b in range(edges.size):
        mask = known & (bins == b)
        out.append(
            {
                "low": float(rounded[mask].min()),
                "high": float(rounded[mask].max()),
                **accuracy(d[mask], None if clusters is None else clusters[mask]),
            }
        )
    return out


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


# ---- correlation


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share the mean of their ranks. [m] -> [m] float"""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; NaN where either side is constant or there are fewer than two values."""
    if x.size < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / norm)) if norm > 0 else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman rank correlation, equal values at their mean rank."""
    return pearson(ranks(x), ranks(y))


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b of two rankings of k things: (concordant - discordant) / sqrt(pairs untied in
    x * untied in y).

    NaN where either is constant. Source: M. G. Kendall, "The treatment of ties in ranking
    problems", Biometrika 33.
    """
    i, j = np.triu_indices(x.size, 1)
    a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
    norm = math.sqrt(float(np.abs(a).sum()) * float(np.abs(b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else math.nan


# ---- more than two


def ranked_report(rewards: list[np.ndarray], scores: list[np.ndarray]) -> dict[str, Any]:
    """Prompts with several responses: rewards and human scores, one [k] array each per prompt.

    best_of_n     how often the response of the highest reward is one of the best by the human
                  scores (equal highest rewards share the point), over prompts whose scores are not
                  all equal; chance = a random pick
    picked_score, mean_score, best_score   mean human score of the pick, of a random pick, of the
                  best
    kendall_tau_b mean over prompts where both rankings have an order; num_tau of them
    """
    wins, chance, picked, blind, best, taus = [], [], [], [], [], []
    for reward, score in zip(rewards, scores, strict=True):
        if score.max() == score.min():
            continue
        top, good = reward == reward.max(), score == score.max()
        wins.append(float(good[top].mean()))
        chance.append(float(good.mean()))
        picked.append(float(score[top].mean()))
        blind.append(float(score.mean()))
        best.append(float(score.max()))
        tau = kendall_tau_b(reward, score)
        if not math.isnan(tau):
            taus.append(tau)
    n = len(wins)

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    low, high = wilson_interval(sum(wins), n)
    return {
        "num_prompts": n,
        "num_unordered": len(scores) - n,
        "best_of_n": mean(wins),
        "best_of_n_low": low,
        "best_of_n_high": high,
        "chance": mean(chance),
        "picked_score": mean(picked),
        "mean_score": mean(blind),
        "best_score": mean(best),
        "kendall_tau_b": mean(taus),
        "num_tau": len(taus),
    }


def prompt_share(rewards: list[np.ndarray]) -> float:
    """Share of the reward's variance that lies between prompts, in [0, 1]; 1 = the response changes
    nothing.

    Between-prompt sum of squares over the total one (eta squared). What lies between prompts cannot
    rank the responses of one prompt.
    """
    if not rewards:
        return math.nan
    every = np.concatenate(rewards)
    total = float(((every - every.mean()) ** 2).sum())
    between = sum(r.size * float(r.mean() - every.mean()) ** 2 for r in rewards)
    return between / total if total > 0 else math.nan
