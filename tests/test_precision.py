"""The self-test that chooses number formats: what it promises, whatever this machine is."""

from __future__ import annotations

import itertools

import pytest
import torch

from rmega import precision
from tests.dist import run_distributed


@pytest.fixture(autouse=True)
def restore_matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def fake_rates(
    monkeypatch, *, plain: float, medium: float, half: float, medium_error: float = 1e-7
) -> None:
    """Pretend to be a machine with these rates and this error of "medium"."""

    def rate(dtype, setting, threads, matmul):
        return half if dtype is torch.bfloat16 else medium if setting == "medium" else plain

    monkeypatch.setattr(precision, "_measured_rate", rate)
    monkeypatch.setattr(precision, "_measured_errors", lambda: (1e-7, medium_error))


@pytest.mark.parametrize(
    ("rates", "setting", "dtype"),
    [
        (dict(plain=170, medium=336, half=873), "medium", torch.bfloat16),  # AVX512-BF16 on AMD
        (
            dict(plain=170, medium=1500, half=1600, medium_error=2e-3),
            "highest",
            torch.bfloat16,
        ),  # AMX: medium rounds
        (dict(plain=170, medium=171, half=20), "highest", torch.float32),  # bf16 is emulated
        (dict(plain=170, medium=336, half=400), "medium", torch.float32),  # not worth the rounding
    ],
)
def test_auto(monkeypatch, rates, setting, dtype) -> None:
    fake_rates(monkeypatch, **rates)
    chosen = precision.choose()
    assert (chosen.matmul_precision, chosen.dtype) == (setting, dtype)
    assert torch.get_float32_matmul_precision() == setting
    assert ("rounds to bf16" in chosen.description) == (rates.get("medium_error", 0) > 1e-4)


def test_a_named_choice_is_kept(monkeypatch) -> None:
    fake_rates(monkeypatch, plain=100, medium=300, half=900, medium_error=1e-3)
    for name, setting in itertools.product(precision.DTYPES, ("highest", "high", "medium")):
        chosen = precision.choose(name, setting)
        assert (chosen.dtype, chosen.matmul_precision) == (precision.DTYPES[name], setting)
        assert name in chosen.description and setting in chosen.description
        assert torch.get_float32_matmul_precision() == setting


def test_on_this_machine_auto_is_as_exact_as_fp32() -> None:
    chosen = precision.choose("fp32")
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 500, generator=g), torch.randn(500, 200, generator=g)
    exact = a.double() @ b.double()

    def error() -> float:
        return ((a @ b).double() - exact).norm().item() / exact.norm().item()

    ours = error()
    torch.set_float32_matmul_precision("highest")
    assert ours <= 3 * error(), chosen.description
    assert "GFLOP/s" in chosen.description and chosen.dtype == torch.float32


def test_a_process_measures_once(monkeypatch) -> None:
    """A server or an evaluation that loads several models asks the machine for the first."""
    precision._measured_rate.cache_clear()
    first = precision.choose()
    monkeypatch.setattr(precision, "_rate", None)  # would fail
    torch.set_float32_matmul_precision("high")
    assert precision.choose() == first
    assert torch.get_float32_matmul_precision() == first.matmul_precision
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(TypeError):
            precision.choose()
    finally:
        torch.set_num_threads(threads)


def ask(rank: int, world_size: int) -> tuple:
    from rmega import distributed

    device, choose = distributed.initialize(), precision.choose
    if rank:
        precision.choose = None  # a rank that measured for itself might choose otherwise
    try:
        return (
            precision.choose_together("auto", "auto", device),
            torch.get_float32_matmul_precision(),
        )
    finally:
        precision.choose = choose
        torch.set_float32_matmul_precision("highest")


def test_all_ranks_take_the_first_ones_choice() -> None:
    (first, setting), (second, other) = run_distributed(ask, 2)
    assert first == second and setting == other == first.matmul_precision
