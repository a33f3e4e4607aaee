"""The matmuls of a LoRA adapter, each added to what the frozen linear layer computes.

Beside a layer of millions of weights an adapter has few, so what costs is not its arithmetic but
passes over activations. Here the adapter's share of an output or of an input's gradient is
accumulated by the matmul itself into the tensor that the frozen layer made, and nothing else of its
size is allocated, copied or kept for the backward pass.

Shape letters: t tokens, r rank, p parts (3 for qkv, 2 for fc1, else 1), k inputs and n outputs of
the linear layer on this tensor rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from torch import Tensor

from rmega import ops


def down(x: Tensor, a: Tensor, scale: float, *, fused: bool) -> tuple[Tensor, Tensor]:
    """(x, scale x A^T): [t, 1, k] and [t, 1, p r] from ``x`` [t, 1, k] and ``a`` [p r, k].

    The frozen layer must be the only reader of the x that is returned: the adapter's part of the
    input's gradient is added in place to what comes back through it. ``fused``: Megatron-Core's
    ``gradient_accumulation_fusion``.
    """
    passed, u = _Down.apply(x, a, scale, fused)
    # What needs no gradient (the output of a frozen embedding) must not seem to need one.
    return (passed if x.requires_grad else x), u


def up(out: Tensor, u: Tensor, parts: Sequence[Tensor], groups: int, *, fused: bool) -> Tensor:
    """``out`` [t, 1, n] with u B^T added in place: ``u`` [t, 1, p r], B [rows, r] of each part, and
    the columns of out in the order of ``interleave``. Nothing may have kept ``out`` for the
    backward pass."""
    return _Up.apply(out, u, groups, fused, *parts)


def interleave(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Rows of the parts in the order of the fused layer's: for each group its share of every part
    (q, k, v), or one part after the other (``groups`` 1: gate, up)."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def block(parts: Sequence[Tensor], groups: int) -> Tensor:
    """B of all parts as one matrix [n, p r]: each part in its own r columns, zeros elsewhere."""
    last = len(parts) - 1
    r = parts[0].shape[1]
    padded = [F.pad(part, (i * r, (last - i) * r)) for i, part in enumerate(parts)]
    return interleave(padded, groups)


def split_block(whole: Tensor, parts: Sequence[Tensor], groups: int) -> list[Tensor]:
    """What ``block`` has of each part: [n, p r] -> [rows, r] each."""
    rows = whole.unflatten(0, (groups, -1)).split([len(b) // groups for b in parts], dim=1)
    r = parts[0].shape[1]
    return [one[..., i * r : (i + 1) * r].flatten(0, 1) for i, one in enumerate(rows)]


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, scale: float, fused: bool):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a)
        ctx.scale, ctx.fused = scale, fused
        return x, ops.linear(x, a).mul_(scale)

    @staticmethod
    def backward(ctx, dx: Tensor | None, du: Tensor | None):
        if du is None:
            return dx, None, None, None
        x, a = ctx.saved_tensors
        du = du * ctx.scale
        rows = (one.contiguous().flatten(0, -2) for one in (du, x))
        da = _new_gradient(a, _grad_weight(*rows, ctx.fused))
        if dx is not None:
            dx = dx.contiguous()
            _accumulate(dx, du, a, ops.linear_grad_input)
        elif ctx.needs_input_grad[0]:
            dx = ops.linear_grad_input(du, a)
        return dx, da, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, u: Tensor, groups: int, fused: bool, *parts: Tensor):
        ctx.save_for_backward(u, *parts)
        ctx.groups, ctx.fused = groups, fused
        # Not marked as modified: autograd refuses that for what a function such as Megatron-Core's
        # reductions passed through. The derivative by ``out`` is one in either case, and had
        # anything kept it, its version number would stop the backward pass.
        flat, u = out.view(-1, out.shape[-1]), u.flatten(0, -2)
        for rows, columns, b in _pieces(parts, groups):
            _accumulate(flat[:, rows], u[:, columns], b, ops.linear)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, *parts = ctx.saved_tensors
        du = torch.empty_like(u, memory_format=torch.contiguous_format)
        flat, flat_u = grad.contiguous().flatten(0, -2), u.contiguous().flatten(0, -2)
        grads = []
        for rows, columns, b in _pieces(parts, ctx.groups):
            du.view(flat_u.shape)[:, columns] = ops.linear_grad_input(flat[:, rows], b)
            grads.append(_grad_weight(flat_u[:, columns], flat[:, rows], ctx.fused).t())
        if len(grads) < len(parts):
            grads = split_block(grads[0], parts, ctx.groups)
        return grad, du, None, None, *map(_new_gradient, parts, grads)


def _pieces(parts: Sequence[Tensor], groups: int) -> list[tuple[slice, slice, Tensor]]:
    """(columns of the output, columns of u, B of both). Matmuls of fp32 on a CPU read and write
    slices as they are, which saves the zeros of a ``block``; the others want whole matrices."""
    b = parts[0]
    if groups > 1 or b.is_cuda or b.dtype is not torch.float32:
        return [(slice(None), slice(None), block(parts, groups))]
    ends, r = list(itertools.accumulate((len(part) for part in parts), initial=0)), b.shape[1]
    return [
        (slice(*ends[i : i + 2]), slice(i * r, (i + 1) * r), part) for i, part in enumerate(parts)
    ]


def _accumulate(out: Tensor, x: Tensor, weight: Tensor, matmul: Callable) -> None:
    """``out`` [..., n] += ``matmul``(x [..., k], weight), which is ``ops.linear`` or
    ``ops.linear_grad_input``."""
    if ops.active_matmul(out.device, out.dtype) == "torch":
        matrix = weight.t() if matmul is ops.linear else weight
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix)
    else:
        out.add_(matmul(x, weight))


def _grad_weight(grad: Tensor, x: Tensor, fused: bool) -> Tensor:
    """grad^T x in fp32, [n, k] from ``grad`` [t, n] and ``x`` [t, k]."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(grad.shape[1], x.shape[1], dtype=wide, device=x.device)
    if fused:
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, total)
    else:
        ops.linear_grad_weight(grad, x, total)
    return total


def _new_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """What autograd gets: ``gradient``, or nothing of use where it could be added to
    Megatron-Core's fp32 buffer, whose hook must still run."""
    if not hasattr(parameter, "main_grad"):
        return gradient.to(parameter.dtype)
    parameter.main_grad.add_(gradient)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)
