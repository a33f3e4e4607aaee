"""Wishes to stop travel with the sums of a step: which rank's, and which comes first."""

from __future__ import annotations

import signal

import pytest

from rmega.training.stopping import StopRequest
from tests.dist import run_distributed


@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield StopRequest
    StopRequest.noted = 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_wishes(stop):
    request = stop(None)
    assert request.requests() == [0, 0, 0, 0] and request.reason(request.requests()) is None
    for number in stop.SIGNALS:
        signal.raise_signal(number)
        assert request.reason(request.requests()) == f"signal {number.name}"
    assert stop(0.0).reason(stop(0.0).requests()) == "--exit-duration-min 0.0 is over"
    assert stop(1e6).reason(stop(1e6).requests()) is None


def test_sums_over_ranks(stop):
    request = stop(5)
    assert request.reason([0, 3, 1, 0]) == "signal SIGUSR1"
    assert request.reason([1, 3, 1, 4]) == "signal SIGTERM"
    assert request.reason([0, 0, 0, 4]) == "--exit-duration-min 5 is over"


def agree(rank: int, world_size: int) -> str | None:
    import torch

    from rmega import distributed

    distributed.initialize()
    request = StopRequest(None)
    if rank == 1:
        signal.raise_signal(signal.SIGUSR1)
    try:
        return request.agreed(torch.device("cpu"))
    finally:
        StopRequest.noted = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_one_rank_is_enough():
    assert run_distributed(agree, 2) == ["signal SIGUSR1"] * 2
