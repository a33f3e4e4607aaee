"""The loss of pairs of rewards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmega.ops.gather import gather_last_token_ref
from rmega.ops.implementation import native_operator, runs_native

SCORE_RANGE = 5.0  # the log barrier holds scores inside +-SCORE_RANGE (InternLM2)
BARRIER_EDGE = 1e-3  # from SCORE_RANGE - BARRIER_EDGE outwards the barrier is continued

LOSSES = ("ranking", "focal", "plackett_luce")
PENALTIES = ("none", "log_barrier", "l2", "center")

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
    if not runs_native(rewards.device):
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


_pairwise_loss = native_operator("pairwise_loss", _pairwise_fake)
native_operator(
    "pairwise_loss_backward", lambda grad, upstream, dtype: grad.new_empty(grad.shape, dtype=dtype)
)
