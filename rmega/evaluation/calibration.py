"""Whether the margins of rewards are right as probabilities.

Shape letters and ties as in rmega/metrics.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmega.metrics import Z95, accuracy, sigmoid


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
    """Is sigmoid(d) the probability of being right? Confidence is max(p, 1 - p), p = sigmoid(d);
    being right is d > 0.

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
