"""Packed attention on CUDA: varlen attention of torch or flash-attn over gathered keys.

Shape letters: t tokens, tq query rows, s segments, a query heads, g key/value groups, d head
dimension.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rmega import ops
from rmega.models.segments import SegmentsLike, segment_list

# (q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale) -> causal attention of each sequence,
# aligned bottom right
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


class VarlenPlan(NamedTuple):
    """What varlen attention needs of a pack, made once; tensors are int32 on the device of the
    queries."""

    cu_seqlens_q: Tensor  # [s + 1]
    cu_seqlens_k: Tensor  # [s + 1]
    max_q: int
    max_k: int
    num_queries: int
    num_keys: int
    gather: (
        tuple[Tensor, Tensor, Tensor, Tensor] | None
    )  # None: the keys already lie one segment after the other
    index: Tensor  # of keys and values: ops.prefix_index


def varlen_plan(segments: SegmentsLike, device: torch.device, num_rows: int) -> VarlenPlan:
    """The plan of a pack whose keys are ``num_rows`` rows on ``device``, copied there once and kept
    in ``segments.cache``."""
    key = ("varlen_plan", device)
    if key not in segments.cache:
        rows = segment_list(segments)
        q_ends = list(itertools.accumulate((s.q_len for s in rows), initial=0))
        k_ends = list(itertools.accumulate((s.prefix_len + s.k_len for s in rows), initial=0))
        if any(s.q_start != end for s, end in zip(rows, q_ends, strict=False)):
            raise ValueError(
                "varlen attention needs segments in the order of their query rows, without gaps"
            )
        in_place = all(
            s.prefix_len == 0 and s.k_start == end for s, end in zip(rows, k_ends, strict=False)
        )
        names = ("prefix_start", "prefix_len", "k_start", "k_len")
        columns = [torch.tensor(q_ends, dtype=torch.int32), torch.tensor(k_ends, dtype=torch.int32)]
        own = [getattr(segments, name).int() for name in names]
        columns += [ops.prefix_index(*own, num_rows), *([] if in_place else own)]
        if device.type == "cuda":
            columns = [column.pin_memory().to(device, non_blocking=True) for column in columns]
        segments.cache[key] = VarlenPlan(
            *columns[:2],
            # Some releases fold query groups into rows when the longest query is 1: a path made for
            # decoding.
            max_q=max([2, *(s.q_len for s in rows)]),
            max_k=max([0, *(s.prefix_len + s.k_len for s in rows)]),
            num_queries=q_ends[-1],
            num_keys=k_ends[-1],
            gather=None if in_place else tuple(columns[3:]),
            index=columns[2],
        )
    return segments.cache[key]


def packed_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentsLike, scale: float, varlen: Varlen
) -> Tensor:
    """As packed_attention, by one varlen call over keys that are gathered per segment (prefix, then
    own)."""
    plan = varlen_plan(segments, q.device, k.shape[0])
    if plan.gather is None:
        k, v = _first_rows(k, plan.num_keys), _first_rows(v, plan.num_keys)
    else:
        k, v = (ops.gather_prefix_kv(x, *plan.gather, plan.num_keys, plan.index) for x in (k, v))
    return attention_over_gathered(q, k, v, plan, scale, varlen)


def fuses_projection(
    device: torch.device, dtype: torch.dtype, head_dim: int, qk_norm: bool = False
) -> bool:
    """Whether attention may take the fused projection as it is: varlen attention runs, and one
    kernel splits, rotates and gathers; with ``qk_norm`` also normalizes queries and keys."""
    if qk_norm and not ops.fuses_qkv_norm(head_dim):
        return False
    return ops.fuses_qkv(device, dtype) and not obstacle(device, dtype, head_dim)


def attention_over_gathered(
    q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, varlen: Varlen
) -> Tensor:
    """[tq, a * d]: queries [tq, a, d] against keys and values [num_keys, g, d] that lie one segment
    after the other."""
    cu_q, cu_k = plan.cu_seqlens_q, plan.cu_seqlens_k
    out = varlen(
        _first_rows(q, plan.num_queries), k, v, cu_q, cu_k, plan.max_q, plan.max_k, scale
    ).flatten(1)
    uncovered = q.shape[0] - plan.num_queries
    return F.pad(out, (0, 0, 0, uncovered)) if uncovered else out


def _first_rows(x: Tensor, count: int) -> Tensor:
    """x[:count]; x itself where that is all of it: the backward of a slice is a copy, and padding
    by nothing is too."""
    return x if x.shape[0] == count else x[:count]


@functools.cache
def varlen_function() -> tuple[str, Varlen] | None:
    """("torch", its varlen attention), ("flash_attn", that of this package) where torch has none,
    or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        return "torch", adapt_varlen(varlen_attn)
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        return "flash_attn", adapt_varlen(flash_attn_varlen_func)
    except ImportError:
        return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, asked once."""
    return torch.cuda.get_device_capability(device)


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why varlen attention cannot run for tensors of this device, dtype and head dimension; "" if
    it can. The limits are those of FlashAttention 2, on which both implementations rest."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"varlen attention takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        )
    if varlen_function() is None:
        return (
            f"torch {torch.__version__} has no varlen attention (2.10 or later has) and flash_attn"
            " is not installed"
        )
    if head_dim % 8 or head_dim > 256:
        return (
            "varlen attention takes head dimensions that are multiples of 8 up to 256, not"
            f" {head_dim}"
        )
    if capability(device) < (8, 0):
        major, minor = capability(device)
        return f"varlen attention needs compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def adapt_varlen(function: Callable) -> Varlen:
    """A varlen function of any supported release, called in one way. The releases name causality
    differently:

    torch 2.10 ``is_causal``, torch 2.11 and later ``window_size=(-1, 0)``, flash_attn ``causal``;
    torch 2.12 and later want ``enable_gqa``. flash_attn sums the gradient of the queries in a fixed
    order where it is told ``deterministic``; torch asks its own global setting.
    """
    names = inspect.signature(function).parameters
    if "is_causal" in names:
        options = {"is_causal": True}
    elif "causal" in names:
        options = {"causal": True}
    else:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    scale_name = next((name for name in ("scale", "softmax_scale") if name in names), None)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        given = dict(options)
        if "deterministic" in names:
            given["deterministic"] = torch.are_deterministic_algorithms_enabled()
        default = q.shape[-1] ** -0.5
        if scale_name:
            given[scale_name] = scale
        elif not math.isclose(scale, default):  # a release that knows no other scale
            q = q * (scale / default)
        return function(q, k, v, cu_q, cu_k, max_q, max_k, **given)

    return varlen
