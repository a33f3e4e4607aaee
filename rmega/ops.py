"""The operators: plain-torch reference, native version (``rmega._C``), and the choice between
them.

Imports torch and ``rmega._C`` only, and works without ``_C`` (then every operator is its
reference).

Letters: t tokens, h hidden, n responses, m pairs, s segments, g key groups, a heads, d head size, f
MLP size.
"""

from __future__ import annotations

import functools
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

_why_not_built = ""
try:
    from rmega import _C

    # csrc/bindings.cpp; 4 lacks operators that only GPUs use
    if getattr(_C, "interface", 1) not in (4, 5):
        _C, _why_not_built = None, "it was built from older sources; build it again"
except ImportError as _error:  # not built, or built for another torch
    _C, _why_not_built = None, str(_error)

SCORE_RANGE = 5.0  # the log barrier holds scores inside +-SCORE_RANGE (InternLM2)
BARRIER_EDGE = 1e-3  # from SCORE_RANGE - BARRIER_EDGE outwards the barrier is continued

LOSSES = ("ranking", "focal", "plackett_luce")
PENALTIES = ("none", "log_barrier", "l2", "center")
IMPLEMENTATIONS = ("auto", "native", "reference")

STATS = (
    "num_pairs",
    "base_loss",
    "penalty",
    "num_correct",
    "num_ties",
    "chosen_score",
    "rejected_score",
    "abs_diff",
)

_implementation = "auto"
_said: set[str] = set()  # devices whose fallback was reported


def set_implementation(name: str) -> None:
    """Choose ``"native"`` (raises where ``rmega._C`` is not built), ``"reference"`` or ``"auto"``
    (native if built)."""
    global _implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {name!r}"
        )
    if name == "native" and _C is None:
        raise ValueError(
            f"native operators are not built ({_why_not_built}): pip install --no-build-isolation"
            " -e ."
        )
    _implementation = name


def active_implementation(device: str | torch.device = "cpu") -> str:
    """``"native"`` or ``"reference"``: what an operator on ``device`` runs now."""
    return "reference" if _why_reference(torch.device(device)) else "native"


def _why_reference(device: torch.device) -> str:
    if _implementation == "reference":
        return "asked for"
    if _C is None:
        return f"rmega._C is not available ({_why_not_built})"
    return _why_not_cuda(device) if device.type == "cuda" else ""


@functools.cache
def _why_not_cuda(device: torch.device) -> str:
    if not _C.has_cuda:
        return "rmega._C was built without CUDA"
    if _C.interface < 5:
        return "rmega._C was built from older sources; build it again"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):  # the oldest that setup.py builds for
        return f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def _native(device: torch.device) -> bool:
    why = _why_reference(device)
    if not why:
        return True
    if _implementation == "native":
        raise RuntimeError(f"native operators were asked for on {device.type}, but {why}")
    if _implementation == "auto" and device.type not in _said:
        _said.add(device.type)
        if os.environ.get("RANK", "0") == "0":
            print(f"rmega: operators on {device.type} run in plain torch: {why}", file=sys.stderr)
    return False


def _operator(name: str, fake):
    """``torch.ops.rmega.<name>``, given its shape-only kernel; csrc/autograd.cpp has the real ones,
    and derivatives."""
    if _C is None or not hasattr(torch.ops.rmega, name):
        return None
    if fake is not None:
        torch.library.register_fake(f"rmega::{name}", fake)
    return getattr(
        torch.ops.rmega, name
    ).default  # the overload itself: finding it at each call takes a microsecond


# ---- gather_last_token


def gather_last_token(hidden: Tensor, last: Tensor) -> Tensor:
    """Rows ``last`` [n] (int64) of ``hidden`` [t, h] -> [n, h]. Rows may repeat; their gradients
    add in fixed order."""
    if not _native(hidden.device):
        return gather_last_token_ref(hidden, last)
    return _gather_last_token(hidden, last)


def gather_last_token_ref(hidden: Tensor, last: Tensor) -> Tensor:
    """Plain torch form of :func:`gather_last_token`."""
    # The backward of indexing sorts on CUDA, that of index_select adds in order on a CPU: a fixed
    # order in both.
    return hidden[last] if hidden.is_cuda else hidden.index_select(0, last)


_gather_last_token = _operator(
    "gather_last_token", lambda hidden, last: hidden.new_empty(last.shape[0], hidden.shape[1])
)
_operator("gather_last_token_backward", lambda grad, last, t: grad.new_empty(t, grad.shape[1]))


# ---- pairwise_loss


def pairwise_loss(
    rewards: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor,
    weight: Tensor,
    *,
    loss: str = "ranking",
    penalty: str = "none",
    penalty_weight: float = 0.01,
    label_smoothing: float = 0.0,
    barrier_clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over pairs of ``weight * (base + penalty_weight * penalty)``, and what to report of it.

    ``rewards`` [n] any float dtype; ``chosen``, ``rejected`` [m] int64 rows of it; ``margin``,
    ``weight`` [m]. Computed in fp32 (fp64 for fp64 rewards). With ``d = r_c - r_r``, ``x = d -
    margin``, ``e = label_smoothing``:

    - base, ranking: ``-(1-e) logsigmoid(x) - e logsigmoid(-x)``
    - base, focal: the same times ``(1 - 2 relu(sigmoid(x) - 1/2))^2``, gradient through the factor
      (InternLM2 report)
    - plackett_luce: adjacent pairs with the same ``chosen`` are one choice, of that response among
      their rejected ones. base of the choice: ``ln(1 + sum over its pairs of exp(-x))`` times the
      mean of their weights; penalty: the mean over its pairs. The choices of a comparison with K
      different scores are the Plackett-Luce likelihood of its order (a choice among the best and
      all worse ones, then the second best, ...). Without label smoothing
    - penalty, log_barrier: ``B(r_c) + B(r_r)``, ``B(s) = -ln(5 - s) - ln(5 + s)``; beyond +-4.999
      it continues as the tangent there, so a score that has left the range is pulled back;
      ``barrier_clamp`` clamps the score instead (XTuner: no gradient outside)
    - penalty, l2: ``r_c^2 + r_r^2``;  center: ``(r_c + r_r)^2`` (TRL)

    Returns ``(loss_sum [], stats [8])``; stats carries no gradient and is in the order of
    ``STATS``: num_pairs (m), sum of weighted base, sum of weighted penalty (``penalty_weight``
    included, so [1] + [2] = loss_sum), pairs with d > 0 (ties count half), ties (d == 0), sum of
    r_c, of r_r, of |d|. Only ``rewards`` gets a gradient, once.
    """
    if not _native(rewards.device):
        return pairwise_loss_ref(
            rewards,
            chosen,
            rejected,
            margin,
            weight,
            loss=loss,
            penalty=penalty,
            penalty_weight=penalty_weight,
            label_smoothing=label_smoothing,
            barrier_clamp=barrier_clamp,
        )
    _check_loss(loss, penalty, label_smoothing)
    loss_sum, stats, _ = _pairwise_loss(
        rewards,
        chosen,
        rejected,
        margin,
        weight,
        loss,
        penalty,
        penalty_weight,
        label_smoothing,
        barrier_clamp,
    )
    return loss_sum, stats


def pairwise_loss_ref(
    rewards: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor,
    weight: Tensor,
    *,
    loss: str = "ranking",
    penalty: str = "none",
    penalty_weight: float = 0.01,
    label_smoothing: float = 0.0,
    barrier_clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain torch form of :func:`pairwise_loss`; its gradient is autograd's."""
    _check_loss(loss, penalty, label_smoothing)
    compute = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    scores, margin, weight = (
        rewards.to(compute),
        margin.detach().to(compute),
        weight.detach().to(compute),
    )
    r_c, r_r = gather_last_token_ref(scores, chosen), gather_last_token_ref(scores, rejected)
    d = r_c - r_r
    x = d - margin
    base = -F.logsigmoid(x)
    if label_smoothing != 0.0:
        base = base + label_smoothing * x  # -logsigmoid(-x) = x - logsigmoid(x)
    if loss == "focal":
        # 1 - 2 relu(sigmoid(x) - 1/2), written without its cancellation; no gradient at x = 0, as
        # relu has none.
        base = base * torch.where(x > 0, 2 * torch.sigmoid(-x), torch.ones_like(x)).square()
    if penalty == "log_barrier":
        extra = _barrier(r_c, barrier_clamp) + _barrier(r_r, barrier_clamp)
    elif penalty == "l2":
        extra = r_c.square() + r_r.square()
    elif penalty == "center":
        extra = (r_c + r_r).square()
    else:
        extra = torch.zeros_like(d)
    extra = weight * penalty_weight * extra
    if loss == "plackett_luce":
        base, pairs = _choices(x, chosen, weight)
        extra = extra / pairs
    else:
        base = weight * base
    loss_sum = (base + extra).sum()
    with torch.no_grad():
        ties = (d == 0).to(compute).sum()
        stats = torch.stack(
            [
                torch.full_like(ties, d.numel()),
                base.sum(),
                extra.sum(),
                (d > 0).to(compute).sum() + 0.5 * ties,
                ties,
                r_c.sum(),
                r_r.sum(),
                d.abs().sum(),
            ]
        )
    return loss_sum, stats


def _choices(x: Tensor, chosen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[m] weighted loss of each choice, at its first pair; [m] how many pairs the choice of a pair
    has."""
    _, choice, pairs = torch.unique_consecutive(chosen, return_inverse=True, return_counts=True)
    zero = x.new_zeros(len(pairs))
    peak = zero.scatter_reduce(0, choice, -x.detach(), "amax")  # of all -x and the chosen one's 0
    total = torch.exp(-peak).index_add(0, choice, torch.exp(-x - peak[choice]))
    base = zero.index_add(0, choice, weight) / pairs * (peak + total.log())
    return torch.zeros_like(x).index_copy(0, pairs.cumsum(0) - pairs, base), pairs[choice]


def _barrier(score: Tensor, clamp: bool) -> Tensor:
    edge = SCORE_RANGE - BARRIER_EDGE
    inside = score.clamp(-edge, edge)
    barrier = -torch.log(SCORE_RANGE - inside) - torch.log(SCORE_RANGE + inside)
    if clamp:
        return barrier
    slope = 2 * edge / (SCORE_RANGE**2 - edge**2)
    return barrier + slope * (score.abs() - edge).relu()


def _check_loss(loss: str, penalty: str, label_smoothing: float) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, not {penalty!r}")
    if loss == "plackett_luce" and label_smoothing != 0.0:
        raise ValueError(f"label_smoothing {label_smoothing}: plackett_luce has none")


def _pairwise_fake(rewards, chosen, rejected, margin, weight, *options):
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return (
        rewards.new_empty((), dtype=dtype),
        rewards.new_empty(len(STATS), dtype=dtype),
        rewards.new_empty(rewards.shape[0], dtype=dtype),
    )


_pairwise_loss = _operator("pairwise_loss", _pairwise_fake)
_operator(
    "pairwise_loss_backward", lambda grad, upstream, dtype: grad.new_empty(grad.shape, dtype=dtype)
)


# ---- gather_prefix_kv


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
    if not _native(x.device):
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


_gather_prefix_kv = _operator(
    "gather_prefix_kv",
    lambda x, ps, pl, os, ol, total, index=None: x.new_empty(total, *x.shape[1:]),
)
_operator(
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
    if not _native(torch.device("cpu")) or _prefix_index is None:
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


_prefix_index = _operator("prefix_index", None)  # integers of the CPU: no shape to know before


# ---- qkv_rope


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
    if _qkv_rope is None or not _native_elementwise(x):
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
    if _qkv_norm_rope is None or not _native_elementwise(x):
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


_qkv_rope = _operator("qkv_rope", _qkv_fake)
_operator(
    "qkv_rope_backward",
    lambda dq, dk, dv, cos, sin, index: dq.new_empty(
        dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dk.shape[2]
    ),
)


_qkv_norm_rope = _operator(
    "qkv_norm_rope",
    lambda x, q_weight, k_weight, cos, sin, index, heads, groups, eps: _qkv_fake(
        x, cos, sin, index, heads, groups
    ),
)
_operator(
    "qkv_norm_rope_backward",
    lambda dq, dk, dv, x, q_weight, k_weight, cos, sin, index, eps: (
        dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dk.shape[2]),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    ),
)


# ---- fused elementwise
# For fp32 and bf16, on a GPU also fp16: other dtypes ("native" or not) are plain torch.

_ELEMENTWISE = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _native_elementwise(x: Tensor) -> bool:
    return x.dtype in _ELEMENTWISE.get(x.device.type, ()) and _native(x.device)


def active_elementwise(device: torch.device, dtype: torch.dtype) -> str:
    """``"native"`` or ``"torch"``: what norm, rotation and activation run for tensors of this
    device and dtype."""
    return "native" if _native_elementwise(torch.empty(0, device=device, dtype=dtype)) else "torch"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension of ``x`` [..., h];
    ``weight`` [h], x's dtype.

    Statistics in fp32, the normalized value rounded to x's dtype before it is multiplied (Hugging
    Face's LlamaRMSNorm).
    """
    if not _native_elementwise(x):
        return rms_norm_ref(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain torch form of :func:`rms_norm`."""
    x32 = x if x.dtype == torch.float64 else x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm_fake(x, weight, eps):
    h = x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(x.numel() // h if h else 0, dtype=torch.float32)


_rms_norm = _operator("rms_norm", _norm_fake)
_operator(
    "rms_norm_backward",
    lambda grad, x, weight, inv: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def fuses_add_rms_norm(x: Tensor) -> bool:
    """Whether :func:`add_rms_norm` is one kernel for tensors such as ``x``."""
    return x.is_cuda and _native_elementwise(x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``total = residual + x`` [..., h], rounded to their dtype, and its :func:`rms_norm`:
    (total, normalized)."""
    if _add_rms_norm is None or not _native_elementwise(x):
        total = residual + x
        return total, rms_norm(total, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)[:2]


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain torch form of :func:`add_rms_norm`."""
    total = residual + x
    return total, rms_norm_ref(total, weight, eps)


_add_rms_norm = _operator(
    "add_rms_norm",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), *_norm_fake(x, weight, eps)),
)
_operator(
    "add_rms_norm_backward",
    lambda grad_total, grad, total, weight, inv: (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
    ),
)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``x`` [..., 2f] = [gate, up] -> [..., f]; natively in fp32 with one
    rounding."""
    return _swiglu(x) if _native_elementwise(x) else swiglu_ref(x)


def swiglu_ref(x: Tensor) -> Tensor:
    """Plain torch form of :func:`swiglu`."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


_swiglu = _operator("swiglu", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_operator("swiglu_backward", lambda grad, x: x.new_empty(x.shape))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of ``x`` [t, a, d] by the angles of its token: ``[x1 cos - x2
    sin, x2 cos + x1 sin]`` (Hugging Face's ``rotate_half``).

    ``cos``, ``sin`` [t, d/2] in fp32 or x's dtype, without gradient. Natively in fp32 with one
    rounding; a view into a fused projection is read in place.
    """
    return _rope(x, cos, sin, False) if _native_elementwise(x) else rope_ref(x, cos, sin)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain torch form of :func:`rope`, in the wider dtype of ``x`` and the tables."""
    x1, x2 = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


_rope = _operator("rope", lambda x, cos, sin, backwards: x.new_empty(x.shape))


# ---- linear
# The three matmuls of a linear layer in half precision on a CPU, where torch's are slow: natively
# in bfloat16 on CPUs with AMX (csrc/cpu/linear.cpp); in fp32, rounded once at the end, on CPUs
# without instructions for the dtype; torch's elsewhere. They have no gradient of their own:
# Megatron-Core's linear layers call them in their forward and backward (rmega/megatron/fusion.py).

_HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_native_linear() -> bool:
    """Whether this CPU has the tiles that the native matmuls need."""
    return _C is not None and _C.linear_has_tiles()


def best_matmul(device: str | torch.device, dtype: torch.dtype) -> str:
    """``"native"``, ``"fp32"`` or ``"torch"``: what suits the matmuls of linear layers of this
    device and dtype."""
    if torch.device(device).type != "cpu" or dtype not in _HALF:
        return "torch"
    if dtype is torch.bfloat16 and has_native_linear():
        return "native"
    return "torch" if _has_instructions(dtype) else "fp32"


def active_matmul(device: str | torch.device, dtype: torch.dtype) -> str:
    """What they run now: torch's where the implementation is "reference"."""
    return "torch" if _implementation == "reference" else best_matmul(device, dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in ``dtype`` itself. Without such instructions ATen's matmuls are
    loops (0.5 to 10 GFLOP/s per core on AVX2, where fp32 reaches 80), or oneDNN emulates bf16 with
    AVX-512 at a fifth of the rate of fp32.
    """
    supported = getattr(torch.ops.mkldnn, _HALF[dtype], None)  # absent in a build without oneDNN
    if supported is None or not supported():
        return False
    emulated = dtype is torch.bfloat16 and torch.cpu._is_avx512_supported()
    return (
        not emulated or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., k] times ``weight`` [n, k] transposed -> [..., n], without a gradient."""
    run = active_matmul(x.device, x.dtype)
    if run == "native":
        return _linear(x, weight)
    if run == "fp32":
        return torch.matmul(x.float(), weight.float().t()).to(x.dtype)
    return torch.matmul(x, weight.t())


def linear_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` [..., n] times ``weight`` [n, k] -> [..., k]."""
    run = active_matmul(grad.device, grad.dtype)
    if run == "native":
        return _linear_grad_input(grad, weight)
    if run == "fp32":
        return torch.matmul(grad.float(), weight.float()).to(grad.dtype)
    return torch.matmul(grad, weight)


def linear_grad_weight(grad: Tensor, x: Tensor, total: Tensor) -> None:
    """``total`` [n, k] += ``grad`` [t, n] transposed times ``x`` [t, k]. An fp32 total of
    half-precision matmuls is summed without rounding in between where those are native or in
    fp32."""
    run = active_matmul(grad.device, grad.dtype)
    if run == "native":
        _linear_grad_weight(grad, x, total)
    elif run == "fp32" and total.dtype is torch.float32:
        total.addmm_(grad.float().t(), x.float())
    elif total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
    else:
        total.add_(grad.t() @ x)


_linear = _operator("linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
_linear_grad_input = _operator(
    "linear_grad_input", lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1])
)
_linear_grad_weight = _operator("linear_grad_weight", lambda grad, x, total: None)
