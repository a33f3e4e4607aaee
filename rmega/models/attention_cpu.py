"""Packed attention on a CPU: the native kernel, or ATen's flash kernel where that is not built.

Shape letters as in ``attention.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmega import ops
from rmega.distributed import log_once
from rmega.models.segments import Part, Segment, SegmentsLike, attention_parts


def packed_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float
) -> Tensor:
    """As packed_attention, on the kernel that can run."""
    if obstacle := native_obstacle(q.dtype):
        log_once(f"attention: {obstacle}: ATen's flash kernel runs instead (slower)")
        return packed_attention_flash(q, k, v, segments, scale)
    return packed_attention_native(q, k, v, segments, scale)


def packed_attention_flash(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float
) -> Tensor:
    """As packed_attention, on ATen's flash kernel for CPUs: slower than the native kernel, but
    always there."""
    return _FlashParts.apply(q, k, v, attention_parts(segments), scale).flatten(1)


def packed_attention_native(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float
) -> Tensor:
    """As packed_attention, on the kernel in csrc/cpu/packed_attention.cpp: CPU, fp32 and bf16."""
    if "table" not in segments.cache:
        columns = [getattr(segments, name) for name in Segment._fields]
        segments.cache["table"] = torch.stack(columns).to("cpu", torch.int32)
    return torch.ops.rmega.packed_attention(q, k, v, segments.cache["table"], scale)[0].flatten(1)


def native_obstacle(dtype: torch.dtype) -> str:
    """Why the native kernel cannot run for tensors of this dtype; "" if it can."""
    if ops.active_implementation("cpu") == "reference" or not hasattr(
        torch.ops.rmega, "packed_attention"
    ):
        return "the native kernel is not built or not wanted"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"the native kernel takes no {dtype}"


def _native_setup(ctx, inputs, output) -> None:
    q, k, v, table, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, table)
    ctx.set_materialize_grads(False)


def _native_backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return None, None, None, None, None
    grads = torch.ops.rmega.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


# Defined by rmega._C, which rmega.ops has loaded if it is built.
if hasattr(torch.ops.rmega, "packed_attention"):
    torch.library.register_fake(
        "rmega::packed_attention",
        lambda q, k, v, table, scale: (
            q.new_empty(q.shape),
            q.new_empty(q.shape[:2], dtype=torch.float32),
        ),
    )
    torch.library.register_fake(
        "rmega::packed_attention_backward",
        lambda grad, q, k, v, out, lse, table, scale: tuple(
            x.new_empty(x.shape) for x in (q, k, v)
        ),
    )
    torch.library.register_autograd(
        "rmega::packed_attention", _native_backward, setup_context=_native_setup
    )


class _FlashParts(torch.autograd.Function):
    """ATen's CPU flash kernel on each part, merged by log-sum-exp.

    The backward kernel rebuilds a part's weights as exp(scores - lse). Given the lse and the output
    of the whole row, not of the part, those are the row's true weights, so the gradients of the
    parts just add up.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], scale: float) -> Tensor:
        out = q.new_zeros(q.shape)  # [tq, a, d]
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=compute)  # [tq, a]
        for p in parts:
            rows = slice(p.q_start, p.q_start + p.q_len)
            part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(q, p.q_start, p.q_len),
                _heads(k, p.k_start, p.k_len),
                _heads(v, p.k_start, p.k_len),
                0.0,
                p.causal,
                scale=scale,
            )
            part_out, part_lse = part_out[0].transpose(0, 1), part_lse[0].transpose(0, 1)
            # Two partial softmaxes make one: each output [q_len, a, d] is weighted by its share
            # exp(lse - total) of the sum [q_len, a].
            before, total = lse[rows], torch.logaddexp(lse[rows], part_lse)
            share = (before - total).exp_().unsqueeze(-1)
            out[rows] = out[rows] * share + part_out * (1 - share)
            lse[rows] = total
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
        for p in ctx.parts:
            part_q, part_k, part_v = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    _heads(grad, p.q_start, p.q_len),
                    _heads(q, p.q_start, p.q_len),
                    _heads(k, p.k_start, p.k_len),
                    _heads(v, p.k_start, p.k_len),
                    _heads(out, p.q_start, p.q_len),
                    lse[None, p.q_start : p.q_start + p.q_len].transpose(1, 2),
                    0.0,
                    p.causal,
                    scale=ctx.scale,
                )
            )
            grad_q[p.q_start : p.q_start + p.q_len] += part_q[0].transpose(0, 1)
            grad_k[p.k_start : p.k_start + p.k_len] += part_k[0].transpose(0, 1)
            grad_v[p.k_start : p.k_start + p.k_len] += part_v[0].transpose(0, 1)
        return grad_q, grad_k, grad_v, None, None


def _heads(x: Tensor, start: int, length: int) -> Tensor:
    """Rows of [t, n, d] as [1, n, length, d], a view."""
    return x.narrow(0, start, length).transpose(0, 1).unsqueeze(0)
