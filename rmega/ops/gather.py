"""Rows of a pack: the last token of each response, and the keys and values of each segment."""

from __future__ import annotations

import torch
from torch import Tensor

from rmega.ops.implementation import native_operator, runs_native


def gather_last_token(hidden: Tensor, last: Tensor) -> Tensor:
    """Rows ``last`` [n] (int64) of ``hidden`` [t, h] -> [n, h]. Rows may repeat; their gradients
    add in fixed order."""
    if not runs_native(hidden.device):
        return gather_last_token_ref(hidden, last)
    return _gather_last_token(hidden, last)


def gather_last_token_ref(hidden: Tensor, last: Tensor) -> Tensor:
    """Plain torch form of :func:`gather_last_token`."""
    # The backward of indexing sorts on CUDA, that of index_select adds in order on a CPU: a fixed
    # order in both.
    return hidden[last] if hidden.is_cuda else hidden.index_select(0, last)


_gather_last_token = native_operator(
    "gather_last_token", lambda hidden, last: hidden.new_empty(last.shape[0], hidden.shape[1])
)
native_operator(
    "gather_last_token_backward", lambda grad, last, t: grad.new_empty(t, grad.shape[1])
)


def gather_prefix_kv(
    x: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    own_start: Tensor,
    own_len: Tensor,
    total: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """For each of s segments its prefix rows of ``x`` [t, g, d], then its own rows -> [total, g,
    d].

    ``prefix_start, prefix_len, own_start, own_len`` [s], int32 or int64. ``total`` = sum of both
    lengths; give it when the index tensors lie on a GPU, else it is read from there (a
    synchronization). ``index`` is their :func:`prefix_index` on x's device; on a GPU it is made
    anew without it, after waiting for the tensors. A prefix row's gradient is the sum over the
    segments that share it, in the order of segments.
    """
    if not runs_native(x.device):
        return gather_prefix_kv_ref(x, prefix_start, prefix_len, own_start, own_len, total)
    if total is None:
        total = int((prefix_len + own_len).sum())
    columns = (prefix_start, prefix_len, own_start, own_len)
    if not x.is_cuda:  # the CPU's kernel reads the columns
        return _gather_prefix_kv(x, *columns, total)
    return _gather_prefix_kv(x, *columns, total, index)


def gather_prefix_kv_ref(
    x: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    own_start: Tensor,
    own_len: Tensor,
    total: int | None = None,
) -> Tensor:
    """Plain torch form of :func:`gather_prefix_kv`."""
    starts = torch.stack([prefix_start, own_start], 1).flatten().to(torch.int64)
    lens = torch.stack([prefix_len, own_len], 1).flatten().to(torch.int64)
    shift = starts - (lens.cumsum(0) - lens)  # source row - output row, constant in each run
    rows = torch.repeat_interleave(shift, lens, output_size=total)
    rows = rows + torch.arange(rows.numel(), device=rows.device)
    return gather_last_token_ref(x, rows.to(x.device))


_gather_prefix_kv = native_operator(
    "gather_prefix_kv",
    lambda x, ps, pl, os, ol, total, index=None: x.new_empty(total, *x.shape[1:]),
)
native_operator(
    "gather_prefix_kv_backward",
    lambda grad, ps, pl, os, ol, t, index=None: grad.new_empty(t, *grad.shape[1:]),
)


def prefix_index(
    prefix_start: Tensor, prefix_len: Tensor, own_start: Tensor, own_len: Tensor, t: int
) -> Tensor:
    """What kernels need to know of a pack's segments, made once per pack on the CPU: int32
    [2 total + t + 1] = ``rows`` [total], the row of ``x`` [t, ...] that each output row of
    :func:`gather_prefix_kv` is; ``offsets`` [t + 1] and ``sources`` [total]: row i of x is in the
    output rows ``sources[offsets[i] : offsets[i + 1]]``, in the order of segments.
    """
    if not runs_native(torch.device("cpu")) or _prefix_index is None:
        return prefix_index_ref(prefix_start, prefix_len, own_start, own_len, t)
    return _prefix_index(prefix_start, prefix_len, own_start, own_len, t)


def prefix_index_ref(
    prefix_start: Tensor, prefix_len: Tensor, own_start: Tensor, own_len: Tensor, t: int
) -> Tensor:
    """Plain torch form of :func:`prefix_index`."""
    numbers = torch.arange(t)[:, None, None]  # [t, 1, 1]
    rows = gather_prefix_kv_ref(numbers, prefix_start, prefix_len, own_start, own_len).flatten()
    offsets = torch.cat([torch.zeros(1).long(), torch.bincount(rows, minlength=t).cumsum(0)])
    return torch.cat([rows, offsets, rows.argsort(stable=True)]).int()


_prefix_index = native_operator(
    "prefix_index", None
)  # integers of the CPU: no shape to know before
