"""A number for each token of a training batch, from which dropout draws its mask.

It depends on the seed, the comparisons consumed before the step, the comparison, the response and
the position, and so is the same in every layout, with and without a shared prefix, in a recomputed
forward pass and after a resume.
"""

from __future__ import annotations

import numpy as np


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection whose output bits look random (the finalizer of SplitMix64,
    Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def chain(*numbers: int) -> np.ndarray:
    """uint64 [1] of any integers, in order."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state + np.uint64(number % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def keys(state: np.ndarray, first: int, count: int) -> np.ndarray:
    """int32 [count] of the numbers first, first + 1, ... after ``state`` of ``chain``."""
    at = np.arange(first, first + count, dtype=np.uint64)
    return (mix(state + mix(at)) >> np.uint64(32)).astype(np.uint32).view(np.int32)
