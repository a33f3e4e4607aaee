"""Packed attention with shared prefixes, forward and backward, and the choice of its kernel.

Shape letters: t tokens (rows) of the pack, tq query rows (tq = t, or one row per response in a
pruned layer), s segments, a query heads, g key/value groups (a = r * g, query head i reads group i
// r), d head dimension.

A segment is a run of query rows. Each of its queries sees the whole prefix (if any) and, causally
aligned bottom right, the segment's own keys: query i of q_len sees own keys j <= i + k_len - q_len.
Rows that no segment covers give zeros.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rmega import ops
from rmega.distributed import log
from rmega.models import varlen
from rmega.models.segments import Part, Segment, SegmentsLike, attention_parts, segment_list


class HeadNorms(NamedTuple):
    """RMS norms over each head of queries and keys: weights [d] and epsilon."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


BACKENDS = ("auto", "cuda", "cpu", "reference")


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float, backend: str = "auto"
) -> Tensor:
    """softmax(scale * q k^T) v within each segment and its prefix.

    q is [tq, a, d]; k and v are [t, g, d], all of one dtype and already rotated. Returns [tq, a *
    d]. ``backend`` auto: CUDA tensors -> cuda, fp64 -> reference, other CPU tensors -> cpu. A named
    backend that cannot run on these tensors raises ValueError.
    """
    backend = choose_backend(q, backend)
    run = {"cuda": _cuda_attention, "cpu": _cpu_attention, "reference": packed_attention_ref}[
        backend
    ]
    return run(q, k, v, segments, scale)


def projection_attention(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    groups: int,
    segments: SegmentsLike,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotation and attention of a pack from its fused projection x [t, (a + 2 g) d] (columns as
    ``ops.qkv_rope`` has them), where ``varlen.fuses_projection``: [t, a * d]. ``norms`` of queries
    and keys come before the rotation."""
    plan = varlen.varlen_plan(segments, x.device, x.shape[0])
    q, k, v = _split_and_rotate(x, cos, sin, plan.index, heads, groups, norms)
    return varlen.attention_over_gathered(q, k, v, plan, scale, varlen.varlen_function()[1])


def pooled_attention(
    q: Tensor,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: SegmentsLike,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Attention of rotated queries [n, a, d] over keys and values that are still one projection
    key_value [t, 2 g d], keys first and neither normalized (``norms``) nor rotated: [n, a * d]."""
    t, d = key_value.shape[0], q.shape[-1]
    groups = key_value.shape[1] // (2 * d)
    if varlen.fuses_projection(q.device, q.dtype, d, norms is not None):
        plan = varlen.varlen_plan(segments, q.device, t)
        _, k, v = _split_and_rotate(key_value, cos, sin, plan.index, 0, groups, norms)
        return varlen.attention_over_gathered(q, k, v, plan, scale, varlen.varlen_function()[1])
    k, v = key_value.view(t, 2, groups, d).unbind(1)
    if norms is not None:
        k = ops.rms_norm(k, norms.k_weight, norms.eps)
    return packed_attention(q, ops.rope(k, cos, sin), v, segments, scale)


def _split_and_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    heads: int,
    groups: int,
    norms: HeadNorms | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if norms is None:
        return ops.qkv_rope(x, cos, sin, index, heads, groups)
    q_weight, k_weight, eps = norms
    return ops.qkv_norm_rope(x, q_weight, k_weight, cos, sin, index, heads, groups, eps)


def choose_backend(q: Tensor, backend: str = "auto") -> str:
    """The backend that runs for a query tensor such as q: "cuda", "cpu" or "reference". Raises as
    packed_attention."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    obstacle = varlen.obstacle(q.device, q.dtype, q.shape[-1])
    if backend == "auto":
        if q.dtype == torch.float64:
            return "reference"
        if q.is_cuda and obstacle:
            _say_once(f"attention: {obstacle}: the plain reference runs instead (slow)")
            return "reference"
        return "cuda" if q.is_cuda else "cpu"
    if backend == "cuda" and obstacle:
        raise ValueError(f"attention backend cuda cannot run: {obstacle}")
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"attention backend cpu cannot run: the tensors are on {q.device}")
    return backend


@functools.cache
def _say_once(message: str) -> None:
    log(message)


def packed_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float
) -> Tensor:
    """The definition, one dense softmax per segment in plain torch: any device and dtype, slow. As
    packed_attention."""
    tq, a, d = q.shape
    r = a // k.shape[1]
    out = q.new_zeros(tq, a, d)
    for s in segment_list(segments):
        rows = torch.cat(
            [
                torch.arange(s.prefix_start, s.prefix_start + s.prefix_len, device=q.device),
                torch.arange(s.k_start, s.k_start + s.k_len, device=q.device),
            ]
        )
        queries = slice(s.q_start, s.q_start + s.q_len)
        keys = k[rows].repeat_interleave(r, dim=1)  # [prefix + own, a, d]
        scores = torch.einsum("qad,kad->aqk", q[queries], keys) * scale  # [a, q_len, prefix + own]
        # Causal, aligned bottom right: the last query sees every key.
        visible = torch.ones(s.q_len, len(rows), dtype=torch.bool, device=q.device)
        visible = visible.tril(diagonal=len(rows) - s.q_len)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[queries] = torch.einsum("aqk,kad->qad", weights, v[rows].repeat_interleave(r, dim=1))
    return out.reshape(tq, a * d)


# ---- cpu


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


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float) -> Tensor:
    obstacle = _native_obstacle(q.dtype)
    if obstacle:
        _say_once(f"attention: {obstacle}: ATen's flash kernel runs instead (slower)")
        return packed_attention_flash(q, k, v, segments, scale)
    return packed_attention_native(q, k, v, segments, scale)


def _native_obstacle(dtype: torch.dtype) -> str:
    if ops.active_implementation("cpu") == "reference" or not hasattr(
        torch.ops.rmega, "packed_attention"
    ):
        return "the native kernel is not built or not wanted"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"the native kernel takes no {dtype}"


def active_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What ``packed_attention`` runs for tensors of this device, dtype and head dimension, in a
    word or two for the log."""
    backend = choose_backend(torch.empty(0, 1, head_dim, device=device, dtype=dtype))
    if backend == "cpu":
        return "flash (ATen)" if _native_obstacle(dtype) else "native"
    if backend == "cuda":
        return f"varlen ({varlen.varlen_function()[0]})"
    return "plain torch (slow)"


def _native_setup(ctx, inputs, output) -> None:
    q, k, v, table, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, table)
    ctx.set_materialize_grads(False)


def _native_backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return None, None, None, None, None
    return (
        *torch.ops.rmega.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale),
        None,
        None,
    )


if hasattr(
    torch.ops.rmega, "packed_attention"
):  # defined by rmega._C, which rmega.ops has loaded if it is built
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
        out = q.new_zeros(q.shape)
        lse = q.new_full(
            q.shape[:2],
            float("-inf"),
            dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
        )
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
            merged = out[rows] * share + part_out * (1 - share)
            out[rows] = merged
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


def _cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float
) -> Tensor:
    return varlen.packed_attention_varlen(q, k, v, segments, scale, varlen.varlen_function()[1])
