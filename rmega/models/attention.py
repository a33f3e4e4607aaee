"""Packed attention with shared prefixes, and the choice of its kernel.

Shape letters: t tokens (rows) of the pack, tq query rows (tq = t, or one row per response in a
pruned layer), s segments, a query heads, g key/value groups (a = r * g, query head i reads group i
// r), d head dimension.

A segment is a run of query rows. Each of its queries sees the whole prefix (if any) and, causally
aligned bottom right, the segment's own keys: query i of q_len sees own keys j <= i + k_len - q_len.
Rows that no segment covers give zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmega import ops
from rmega.distributed import log_once
from rmega.models import varlen
from rmega.models.attention_cpu import native_obstacle, packed_attention_cpu
from rmega.models.segments import SegmentsLike, segment_list


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
    if backend == "reference":
        return packed_attention_ref(q, k, v, segments, scale)
    if backend == "cpu":
        return packed_attention_cpu(q, k, v, segments, scale)
    _, function = varlen.varlen_function()
    return varlen.packed_attention_varlen(q, k, v, segments, scale, function)


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
            log_once(f"attention: {obstacle}: the plain reference runs instead (slow)")
            return "reference"
        return "cuda" if q.is_cuda else "cpu"
    if backend == "cuda" and obstacle:
        raise ValueError(f"attention backend cuda cannot run: {obstacle}")
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"attention backend cpu cannot run: the tensors are on {q.device}")
    return backend


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


def active_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What ``packed_attention`` runs for tensors of this device, dtype and head dimension, in a
    word or two for the log."""
    backend = choose_backend(torch.empty(0, 1, head_dim, device=device, dtype=dtype))
    if backend == "cpu":
        return "flash (ATen)" if native_obstacle(dtype) else "native"
    if backend == "cuda":
        return f"varlen ({varlen.varlen_function()[0]})"
    return "plain torch (slow)"
