"""Norm, activation and rotation, each one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmega.ops.implementation import native_operator, runs_native_elementwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension of ``x`` [..., h];
    ``weight`` [h], x's dtype.

    Statistics in fp32, the normalized value rounded to x's dtype before it is multiplied (Hugging
    Face's LlamaRMSNorm).
    """
    if not runs_native_elementwise(x):
        return rms_norm_ref(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain torch form of :func:`rms_norm`."""
    x32 = x if x.dtype == torch.float64 else x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm_fake(x, weight, eps):
    h = x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.numel() // h if h else 0, dtype=torch.float32)


_rms_norm = native_operator("rms_norm", _norm_fake)
native_operator(
    "rms_norm_backward",
    lambda grad, x, weight, inv: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def fuses_add_rms_norm(x: Tensor) -> bool:
    """Whether :func:`add_rms_norm` is one kernel for tensors such as ``x``."""
    return x.is_cuda and runs_native_elementwise(x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``total = residual + x`` [..., h], rounded to their dtype, and its :func:`rms_norm`:
    (total, normalized)."""
    if _add_rms_norm is None or not runs_native_elementwise(x):
        total = residual + x
        return total, rms_norm(total, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)[:2]


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain torch form of :func:`add_rms_norm`."""
    total = residual + x
    return total, rms_norm_ref(total, weight, eps)


_add_rms_norm = native_operator(
    "add_rms_norm",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), *_norm_fake(x, weight, eps)),
)
native_operator(
    "add_rms_norm_backward",
    lambda grad_total, grad, total, weight, inv: (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
    ),
)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``x`` [..., 2f] = [gate, up] -> [..., f]; natively in fp32 with one
    rounding."""
    return _swiglu(x) if runs_native_elementwise(x) else swiglu_ref(x)


def swiglu_ref(x: Tensor) -> Tensor:
    """Plain torch form of :func:`swiglu`."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


_swiglu = native_operator("swiglu", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
native_operator("swiglu_backward", lambda grad, x: x.new_empty(x.shape))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of ``x`` [t, a, d] by the angles of its token: ``[x1 cos - x2
    sin, x2 cos + x1 sin]`` (Hugging Face's ``rotate_half``).

    ``cos``, ``sin`` [t, d/2] in fp32 or x's dtype, without gradient. Natively in fp32 with one
    rounding; a view into a fused projection is read in place.
    """
    return _rope(x, cos, sin, False) if runs_native_elementwise(x) else rope_ref(x, cos, sin)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain torch form of :func:`rope`, in the wider dtype of ``x`` and the tables."""
    x1, x2 = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


_rope = native_operator("rope", lambda x, cos, sin, backwards: x.new_empty(x.shape))
