"""From a fused projection to rotated queries, keys and values, in one kernel on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from rmega.ops.elementwise import rms_norm_ref, rope_ref
from rmega.ops.gather import gather_last_token_ref
from rmega.ops.implementation import active_elementwise, native_operator, runs_native_elementwise


def fuses_qkv(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`qkv_rope` is one kernel for tensors of this device and dtype."""
    return device.type == "cuda" and active_elementwise(device, dtype) == "native"


def fuses_qkv_norm(head_dim: int) -> bool:
    """Whether :func:`qkv_norm_rope` is one kernel where :func:`qkv_rope` is: a head's lanes have to
    divide a warp."""
    return _qkv_norm_rope is not None and head_dim in (16, 32, 64, 128, 256)


def qkv_rope(
    x: Tensor, cos: Tensor, sin: Tensor, index: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection ``x`` [t, (a + 2 g) d] of a pack -> queries [t, a, d] and keys
    [total, g, d], rotated by :func:`rope` with ``cos``, ``sin`` [t, d/2], and values [total, g, d];
    keys and values gathered by ``index`` (:func:`prefix_index`).

    Columns of x: [g, a/g + 2, d], for each of g = ``groups`` its queries, key and value; for
    ``heads`` = a = 0 [2, g, d], all keys before all values. The gradient of a key or value is
    summed in fp32 over the segments that share it, in their order.
    """
    if _qkv_rope is None or not runs_native_elementwise(x):
        return qkv_rope_ref(x, cos, sin, index, heads, groups)
    return _qkv_rope(x, cos, sin, index, heads, groups)


def qkv_rope_ref(
    x: Tensor, cos: Tensor, sin: Tensor, index: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch form of :func:`qkv_rope`."""
    t, d = x.shape[0], 2 * cos.shape[1]
    rows = index[: (len(index) - t - 1) // 2].long()  # [total]
    if heads:
        r = heads // groups
        query, key, value = x.view(t, groups, r + 2, d).split([r, 1, 1], dim=2)
        query = rope_ref(query.reshape(t, heads, d), cos, sin)
        key, value = key.squeeze(2), value.squeeze(2)
    else:
        query = x.new_empty(t, 0, d)
        key, value = x.view(t, 2, groups, d).unbind(1)
    key = rope_ref(key, cos, sin)
    return query, gather_last_token_ref(key, rows), gather_last_token_ref(value, rows)


def qkv_norm_rope(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    heads: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qkv_rope` of queries and keys that have been normalized: :func:`rms_norm` over each
    head, with weights [d] of x's dtype. A GPU rounds once, after the rotation."""
    if _qkv_norm_rope is None or not runs_native_elementwise(x):
        return qkv_norm_rope_ref(x, q_weight, k_weight, cos, sin, index, heads, groups, eps)
    return _qkv_norm_rope(x, q_weight, k_weight, cos, sin, index, heads, groups, eps)


def qkv_norm_rope_ref(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    heads: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch form of :func:`qkv_norm_rope`."""
    t, d = x.shape[0], 2 * cos.shape[1]
    if heads:
        query, key, value = x.view(t, groups, -1, d).split([heads // groups, 1, 1], dim=2)
        parts = [rms_norm_ref(query, q_weight, eps), rms_norm_ref(key, k_weight, eps), value]
        x = torch.cat(parts, dim=2).view(t, -1)
    else:
        key, value = x.view(t, 2, groups, d).unbind(1)
        x = torch.stack([rms_norm_ref(key, k_weight, eps), value], dim=1).view(t, -1)
    return qkv_rope_ref(x, cos, sin, index, heads, groups)


def _qkv_fake(x, cos, sin, index, heads, groups):
    t, d = x.shape[0], 2 * cos.shape[1]
    total = (index.shape[0] - t - 1) // 2
    key = x.new_empty(total, groups, d)
    return x.new_empty(t, heads, d), key, torch.empty_like(key)


_qkv_rope = native_operator("qkv_rope", _qkv_fake)
native_operator(
    "qkv_rope_backward",
    lambda dq, dk, dv, cos, sin, index: dq.new_empty(
        dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dk.shape[2]
    ),
)


_qkv_norm_rope = native_operator(
    "qkv_norm_rope",
    lambda x, q_weight, k_weight, cos, sin, index, heads, groups, eps: _qkv_fake(
        x, cos, sin, index, heads, groups
    ),
)
native_operator(
    "qkv_norm_rope_backward",
    lambda dq, dk, dv, x, q_weight, k_weight, cos, sin, index, eps: (
        dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dk.shape[2]),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    ),
)
