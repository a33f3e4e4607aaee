"""What a set of rewards is worth: accuracy with an interval, and everything that accuracy alone hides.

numpy only, so that scores of any origin can be judged without torch.
"""

from __future__ import annotations

import math


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion: ``successes`` of ``n`` trials, ``z`` standard deviations.

    ``successes`` may be fractional (a tie counts half). Unlike p +- z*s/sqrt(n) it stays inside [0, 1] and keeps its
    coverage for few trials and for proportions near 0 or 1. ``n = 0`` gives (0, 1): nothing is known.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if n < 0 or not -1e-9 <= successes <= n + 1e-9:
        raise ValueError(f"wilson_interval: {successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    p = min(max(successes / n, 0.0), 1.0)
    denominator = 1.0 + z * z / n
    center = (p + z * z / (2.0 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1.0 - p) / n + z * z / (4.0 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
