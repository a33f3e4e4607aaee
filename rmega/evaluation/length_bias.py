"""How far rewards follow the length of a response.

Shape letters and ties as in rmega/metrics.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmega.metrics import Z95, accuracy, correct, difference_interval, pearson, sigmoid, spearman


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
    estimate, low, high = sigmoid(np.array([w[0], w[0] - error, w[0] + error])).tolist()
    return estimate, low, high


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
