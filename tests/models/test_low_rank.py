"""The matmuls of an adapter against autograd's."""

from __future__ import annotations

import pytest
import torch

from rmega.models import low_rank

T, K, R = 7, 6, 2


@pytest.mark.parametrize("rows,groups", [((12, 4, 4), 2), ((6, 6), 1), ((9,), 1)])
@pytest.mark.parametrize("buffers", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_autograd(rows, groups, buffers, dtype):
    """In fp32 parts are multiplied one by one, else as one block."""
    torch.manual_seed(0)
    weight = torch.randn(sum(rows), K, dtype=dtype)
    a = torch.randn(len(rows) * R, K, dtype=dtype, requires_grad=True)
    parts = [torch.randn(n, R, dtype=dtype, requires_grad=True) for n in rows]
    x = torch.randn(T, 1, K, dtype=dtype, requires_grad=True)
    upstream = torch.randn(T, 1, sum(rows), dtype=dtype)
    own = [b @ one for b, one in zip(parts, a.chunk(len(rows)), strict=True)]
    expected = x @ (weight + 1.5 * low_rank.interleave(own, groups)).t()
    grads = torch.autograd.grad(expected, [x, a, *parts], upstream)

    for parameter in (a, *parts) if buffers else ():
        parameter.main_grad = torch.ones_like(parameter)
    passed, u = low_rank.down(x, a, 1.5, fused=False)
    frozen = passed @ weight.t()
    out = low_rank.up(frozen, u, parts, groups, fused=False)
    assert out.data_ptr() == frozen.data_ptr()  # added in place
    torch.testing.assert_close(out, expected)
    out.backward(upstream)
    torch.testing.assert_close(x.grad, grads[0])
    for parameter, grad in zip((a, *parts), grads[1:], strict=True):
        if buffers:
            assert parameter.grad_added_to_main_grad
            torch.testing.assert_close(parameter.main_grad - 1, grad)
        else:
            torch.testing.assert_close(parameter.grad, grad)


def test_an_input_without_gradient_stays_so():
    """The frozen layer above a frozen embedding then computes no gradient of its input."""
    x, a = torch.randn(T, 1, K), torch.randn(R, K, requires_grad=True)
    passed, u = low_rank.down(x, a, 1.0, fused=False)
    assert passed is x and not x.requires_grad and u.requires_grad
    u.sum().backward()
    torch.testing.assert_close(a.grad, x.sum((0, 1)).expand(R, K))


def test_what_was_kept_for_backward_is_not_changed_unseen():
    x, a = torch.randn(T, 1, K), torch.randn(R, K, requires_grad=True)
    b = torch.randn(K, R, requires_grad=True)
    kept = torch.randn(T, 1, K, requires_grad=True).exp()  # whose backward reads its output
    out = low_rank.up(kept, low_rank.down(x, a, 1.0, fused=False)[1], [b], 1, fused=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
