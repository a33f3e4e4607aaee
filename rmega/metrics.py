"""Statistics of rewards: accuracy with intervals, calibration, length bias, correlations.

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


# ---- length


def length_controlled_accuracy(
    d: np.ndarray, delta: np.ndarray, ridge: float = 1e-2
) -> tuple[float, float, float]:
    """What the accuracy would be if chosen and rejected were equally long: (accuracy, low, high).

    A logistic regression P(correct) = sigmoid(a + b * tanh(delta / s)) is fitted to the pairs,
    delta [n] = length of the chosen minus length of the rejected, s its standard deviation, and
    read at delta = 0: sigmoid(a), with the 95 % interval of a. Source: Y. Dubois et al.,
    "Length-Controlled AlpacaEval" (2024, arXiv:2404.04475), their model with the chosen answer as
    the model and the rejected one as the baseline, without the terms per instruction. A pure length
    heuristic comes out near a half, however often the longer answer is the better one. ``ridge`` is
    the weight of b^2/2 against the summed likelihood; it keeps b finite where length decides all
    pairs.
    """
    n = int(d.size)
    if n == 0:
        return math.nan, 0.0, 1.0
    y = correct(d)
    scale = float(np.std(delta))
    x = np.stack([np.ones(n), np.tanh(delta / scale) if scale > 0 else np.zeros(n)], 1)
    # a too is held, far more weakly: a model that is never wrong has no finite a
    penalty = np.array([1e-3, ridge])
    w = np.zeros(2)

    def value(w: np.ndarray) -> float:
        z = x @ w
        return float((np.logaddexp(0.0, z) - y * z).sum() + 0.5 * (penalty * w * w).sum())

    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - y) + penalty * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        size, now = 1.0, value(w)
        while value(w - size * step) > now and size > 1e-8:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    error = Z95 * math.sqrt(float(np.linalg.inv(hessian)[0, 0]))
    accuracy, low, high = sigmoid(np.array([w[0], w[0] - error, w[0] + error])).tolist()
    return accuracy, low, high


def rank_correlation_interval(rho: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of Spearman's correlation of n pairs: Fisher's transform with the variance 1.06
    / (n - 3) (Fieller, Hartley and Pearson, 1957). (NaN, NaN) below 4 pairs; at +-1 it is that
    point, so ask for a number of pairs too.
    """
    if n < 4 or math.isnan(rho):
        return math.nan, math.nan
    if abs(rho) >= 1:
        return rho, rho
    half = z * math.sqrt(1.06 / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def length_report(
    d: np.ndarray, chosen_length: np.ndarray, rejected_length: np.ndarray
) -> dict[str, Any]:
    """How far the rewards follow length, over pairs. Lengths [n] in any unit (characters, tokens).

    always_longer    accuracy of the rule "the longer one is better" on the same pairs: what the
                     labels prefer
    prefers_longer   how often the higher reward goes to the longer response: what the model prefers
    chosen_longer, chosen_shorter   accuracy where the chosen is the longer / the shorter one
    gap (low, high)  the difference of those two, Newcombe's interval; 0 for a model that ignores
                     length, 1 for one that sees nothing else, negative for one that likes short
                     answers
    balanced_accuracy     mean of the two, so a half for any rule that reads length alone
    controlled_accuracy   ``length_controlled_accuracy``
    pearson_within, spearman_within   correlation of the reward difference with the length
                     difference, each pair counted in both directions so that which one was chosen
                     plays no part
    spearman_pairs (low, high)   the same with each pair counted once, chosen minus rejected. Where
                     the chosen is nearly always the longer one, an accurate model has a high
                     ``spearman_within`` from the signs alone; this one is then 0 unless longer by
                     more also means better by more
    """
    delta = (chosen_length - rejected_length).astype(np.float64)
    longer, shorter, same = delta > 0, delta < 0, delta == 0
    apart = ~same
    gap, low, high = difference_interval(
        (correct(d[longer]).sum(), correct(d[shorter]).sum()),
        (int(longer.sum()), int(shorter.sum())),
    )
    both = accuracy(d[longer]), accuracy(d[shorter])
    controlled, controlled_low, controlled_high = length_controlled_accuracy(d, delta)
    follows = spearman(d[apart], delta[apart])
    follows_low, follows_high = rank_correlation_interval(follows, int(apart.sum()))
    signed = np.concatenate([d, -d]), np.concatenate([delta, -delta])
    return {
        "num_equal_length": int(same.sum()),
        "always_longer": float(correct(delta).mean()) if d.size else math.nan,
        "prefers_longer": (
            float(correct((d * np.sign(delta))[apart]).mean()) if apart.any() else math.nan
        ),
        "chosen_longer": both[0],
        "chosen_shorter": both[1],
        "gap": gap,
        "gap_low": low,
        "gap_high": high,
        "balanced_accuracy": (both[0]["accuracy"] + both[1]["accuracy"]) / 2,
        "controlled_accuracy": controlled,
        "controlled_low": controlled_low,
        "controlled_high": controlled_high,
        "pearson_within": pearson(*signed),
        "spearman_within": spearman(*signed),
        "spearman_pairs": follows,
        "spearman_pairs_low": follows_low,
        "spearman_pairs_high": follows_high,
    }


# ---- calibration


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def fit_temperature(d: np.ndarray) -> dict[str, Any]:
    """The T > 0 that makes sigmoid(d / T) most likely, with a 95 % interval: {"temperature", "low",
    "high"}.

    One parameter, maximum likelihood (C. Guo et al., "On Calibration of Modern Neural Networks",
    2017, on pairs). T > 1: the margins are too large for how often they are right. T is None where
    no finite positive T is best: "reason" then is "no errors" (every d > 0, T -> 0) or "no signal"
    (mean d <= 0: chance is as likely).
    """
    none = {"temperature": None, "low": None, "high": None}
    if d.size == 0:
        return {**none, "reason": "no pairs"}
    if d.mean() <= 0:
        return {**none, "reason": "no signal"}
    if (d >= 0).all():
        return {**none, "reason": "no errors"}
    # convex in b = 1/T; the slope is negative at 0 and grows, so bisection in log b cannot miss
    unit = float(np.abs(d).max())
    x = d / unit

    def slope(b: float) -> float:
        return -float((x * sigmoid(-b * x)).sum())

    low, high = 0.0, 1.0
    while slope(high) < 0 and high < 1e12:
        low, high = high, high * 2
    for _ in range(200):
        b = (low + high) / 2
        low, high = (b, high) if slope(b) < 0 else (low, b)
    p = sigmoid(b * x)
    error = Z95 / math.sqrt(max(float((x * x * p * (1 - p)).sum()), 1e-300))
    return {
        "temperature": unit / b,
        "low": unit / (b + error),
        "high": unit / (b - error) if b > error else None,
        "reason": "",
    }


def calibration(d: np.ndarray, num_bins: int = 10) -> dict[str, Any]:
    """Does sigmoid(d) mean what it says? Confidence is max(p, 1 - p), p = sigmoid(d); being right
    is d > 0.

    ece      expected calibration error: sum over equal-width bins of [0.5, 1] of share *
             |accuracy - confidence| (M. P. Naeini et al., AAAI 2015). Some of it is noise: a
             perfect model of n pairs shows about 0.4 * sqrt(bins / n).
    brier    mean (1 - p)^2 (G. W. Brier, 1950); 0.25 = chance level
    log_loss mean -log p; ln 2 = chance level
    surest   the largest confidence of all
    reliability   the bins that are not empty: low, high, confidence (mean), accuracy,
             accuracy_low/high, num_pairs
    temperature   ``fit_temperature``; ece_scaled is the ECE after it
    """
    if d.size == 0:
        return {
            "ece": math.nan,
            "brier": math.nan,
            "log_loss": math.nan,
            "surest": math.nan,
            "reliability": [],
            "ece_scaled": None,
            **fit_temperature(d),
        }

    def bins(d: np.ndarray) -> list[dict[str, Any]]:
        confidence = sigmoid(np.abs(d))
        edges = np.linspace(0.5, 1.0, num_bins + 1)
        index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
        return [
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "confidence": float(confidence[index == b].mean()),
                **accuracy(d[index == b]),
            }
            for b in range(num_bins)
            if (index == b).any()
        ]

    def ece(curve: list[dict[str, Any]]) -> float:
        return sum(b["num_pairs"] * abs(b["accuracy"] - b["confidence"]) for b in curve) / d.size

    curve, fitted = bins(d), fit_temperature(d)
    t = fitted["temperature"]
    return {
        "ece": ece(curve),
        "brier": float((sigmoid(-d) ** 2).mean()),
        "log_loss": float(np.logaddexp(0.0, -d).mean()),
        "surest": float(sigmoid(np.abs(d)).max()),
        "reliability": curve,
        "ece_scaled": ece(bins(d / t)) if t else None,
        **fitted,
    }


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
