"""Packs that a thread prepares are those that the step would make itself, and errors arrive with
their step."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from rmega.data.batching import Batcher
from rmega.training.packs_ahead import PacksAhead
from tests.tiny import InMemory, random_comparisons

CPU = torch.device("cpu")


def batcher(count: int = 9) -> Batcher:
    return Batcher(
        InMemory(random_comparisons(count)),
        global_batch_size=4,
        max_tokens=160,
        seed=3,
        max_consumed=22,
    )


def same(one, other) -> bool:
    documents, packs = one
    others, other_packs = other
    return np.array_equal(documents, others) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(packs, other_packs, strict=True)
        for name in (
            "tokens",
            "position_ids",
            "pooled",
            "chosen",
            "rejected",
            "length_gap",
            "documents",
        )
    )


@pytest.mark.parametrize("start", [0, 8])
def test_the_same_packs(start):
    """From the beginning and from where a run resumes, over the end of an epoch, to a short last
    step."""
    ahead, plain = PacksAhead(batcher(), CPU, ahead=True), PacksAhead(batcher(), CPU)
    assert plain._thread is None  # on a CPU nothing is prepared ahead
    consumed, steps = start, 0
    while consumed < 22:
        step = ahead.take(consumed)
        assert same(step, plain.take(consumed))
        consumed, steps = consumed + len(step[0]), steps + 1
    assert ahead._next is None  # nothing beyond the end
    assert steps == -(-(22 - start) // 4)
    ahead.close()


def test_another_position_than_expected():
    ahead, plain = PacksAhead(batcher(), CPU, ahead=True), PacksAhead(batcher(), CPU)
    for consumed in (0, 12, 4, 4):
        assert same(ahead.take(consumed), plain.take(consumed))
    ahead.close()


def test_an_error_arrives_with_its_step():
    broken = batcher(30)  # no comparison twice
    get, bad = broken.dataset.get, int(broken.documents(8)[1])

    def fails(number):
        if number == bad:
            raise OSError(f"comparison {number} cannot be read")
        return get(number)

    broken.dataset.get = fails
    ahead = PacksAhead(broken, CPU, ahead=True)
    ahead.take(0)
    ahead.take(4)  # the next step has failed by now, or will
    for _ in range(2):
        with pytest.raises(OSError, match=f"comparison {bad} cannot be read"):
            ahead.take(8)
    broken.dataset.get = get
    assert len(ahead.take(8)[0]) == 4
    ahead.close()


def test_the_thread_ends():
    before = threading.active_count()
    ahead = PacksAhead(batcher(), CPU, ahead=True)
    ahead.take(0)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
