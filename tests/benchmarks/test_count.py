"""The count of kernels and waits: what the documents say of it, and that no wait has come back."""

from __future__ import annotations

import pytest

from benchmarks import count
from rmega import distributed


@pytest.fixture(autouse=True)
def engine():
    distributed.initialize()
    yield
    distributed.finish()


def test_a_step_waits_once():
    """Of a step of two packs: nothing per pack or parameter, nothing before the update."""
    ((place, times),) = count.waits().items()
    assert times == 1 and "train.py: mean_loss, norm, updated, *values" in place


def test_kernels_and_bytes_of_a_layer():
    separate, fused = (count.per_layer(path) for path in ("separate", "fused"))
    assert [row["kernels"] for row in fused] == [4, 10]
    assert [row["kernels"] for row in separate] == [26, 32]
    for one, other in zip(fused, separate, strict=True):
        assert one["U"] < 0.85 * other["U"]


def test_norms_of_heads_cost_no_kernel_of_their_own():
    """Forward none, backward the sum of their weights' partial gradients."""
    from rmega import ops

    if ops.qkv._qkv_norm_rope is None:
        pytest.skip("rmega._C is from older sources")
    plain, normalized = (count.per_layer(path) for path in ("fused", "heads normalized, fused"))
    assert normalized[0]["kernels"] == plain[0]["kernels"]
    before = count.per_layer("heads normalized, separate")
    for one, other in zip(normalized, before, strict=True):
        assert one["kernels"] < other["kernels"] and one["U"] < other["U"]
