"""The loss of a pack: pairs, choices, ties, batch-wide centering.

Shape letters: n responses, m pairs, T ties.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rmega import ops
from rmega.config import LossArgs
from rmega.data.packing import PackedBatch

REPORTED = (*ops.STATS, "num_terms", "tie_threshold")
"""What the last stage reports of a pack, to be summed. num_terms: of what the loss is the mean
over; tie_threshold: with ``--loss rao_kupper`` eta times num_terms, else 0."""
STAT = {name: i for i, name in enumerate(ops.STATS)}


def pair_loss(args: LossArgs, batch: PackedBatch, rewards: torch.Tensor):
    """Sum of the loss over a pack's pairs, their number, and ``REPORTED`` sums.

    ``--loss plackett_luce`` is a sum over choices, and their number is returned.

    ``--length-penalty`` A: the logit gains A (length of chosen - length of rejected), as if length
    alone won preferences, and the reward explains the rest (R-DPO, arXiv:2403.19159).
    ``--scale-by-rating``: scaled Bradley-Terry, -gap logsigmoid(d) over the number of pairs
    (HelpSteer2-Preference, arXiv:2410.01257), so that a pair of gap 2 counts as two pairs, its
    penalty included. Without ratings the margin is 0 and the weight 1.
    ``--loss rao_kupper``: :func:`rao_kupper_loss`.
    """
    gap = batch.rating_gap  # [m], NaN without ratings
    margin, weight = torch.zeros_like(gap), torch.ones_like(gap)
    if args.use_margin:
        margin = torch.where(gap.isnan(), margin, gap)
    if args.length_penalty:
        margin = margin - args.length_penalty * batch.length_gap
    if args.scale_by_rating:
        weight = torch.where(gap.isnan(), weight, gap)
    loss, stats = ops.pairwise_loss(
        rewards,
        batch.chosen,
        batch.rejected,
        margin,
        weight,
        loss=args.loss,
        penalty=args.penalty,
        penalty_weight=args.penalty_weight,
        label_smoothing=args.label_smoothing,
        barrier_clamp=args.barrier_clamp,
    )
    terms = num_terms(args, batch)
    # torch.tensor would copy from the host and wait for it.
    count = torch.full((), terms, dtype=torch.int, device=rewards.device)
    return loss, count, torch.cat([stats, count[None].to(stats.dtype), stats.new_zeros(1)])


def rao_kupper_loss(
    args: LossArgs, batch: PackedBatch, threshold: torch.Tensor, rewards: torch.Tensor
):
    """As :func:`pair_loss`, with ties (Rao and Kupper, J. Amer. Statist. Assoc. 62, 1967): with
    eta = softplus(``threshold`` [1]) and d = r_a - r_b, P(a wins) = sigmoid(d - eta) and P(tie) =
    (exp(2 eta) - 1) sigmoid(d - eta) sigmoid(-d - eta). Sums are ``REPORTED``; pairs and scores in
    them are those of pairs that are not tied.

    Apart from the factor that holds eta alone, a tie is two pairs of ``ops.pairwise_loss``, won by
    either side with the margin eta; its penalty is that of one pair.
    """
    compute = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    eta = F.softplus(threshold.to(compute))  # [1]
    margin = eta.detach()
    first, second = batch.tied  # [T] each
    winners, losers = torch.cat([first, second]), torch.cat([second, first])  # [2T]
    one = torch.ones_like(margin)

    def directed(chosen, rejected, penalty_weight):
        return ops.pairwise_loss(
            rewards,
            chosen,
            rejected,
            margin.expand(len(chosen)),
            one.expand(len(chosen)),
            loss="ranking",
            penalty=args.penalty,
            penalty_weight=penalty_weight,
            barrier_clamp=args.barrier_clamp,
        )

    loss, stats = directed(batch.chosen, batch.rejected, args.penalty_weight)
    tie_loss, tie_stats = directed(winners, losers, args.penalty_weight / 2)
    # -ln(exp(2 eta) - 1) for each tie
    factor = -len(first) * (2 * margin + torch.log(-torch.expm1(-2 * margin)))  # [1]
    # The operator has no gradient for margins: d loss / d eta is the sum of sigmoid(eta - d) over
    # directed pairs, minus 2 / (1 - exp(-2 eta)) for each tie.
    scores = rewards.detach().to(compute)
    won = torch.cat([batch.chosen, winners])  # [m + 2T]
    lost = torch.cat([batch.rejected, losers])
    slope = torch.sigmoid(margin - (scores[won] - scores[lost])).sum()
    slope = slope + 2 * len(first) / torch.expm1(-2 * margin)
    loss = loss + tie_loss + factor.sum() + (slope * (eta - margin)).sum()
    terms = num_terms(args, batch)
    count = torch.full((), terms, dtype=torch.int, device=rewards.device)
    stats = stats.clone()
    stats[STAT["base_loss"]] += tie_stats[STAT["base_loss"]] + factor.sum()
    stats[STAT["penalty"]] += tie_stats[STAT["penalty"]]
    return loss, count, torch.cat([stats, count[None].to(stats.dtype), terms * margin])


def with_centering(loss_of: Callable, weight: float, batch: PackedBatch, sums, rewards):
    """``loss_of(rewards)`` with ``--batch-centering``: the pack's share of terms * weight * m^2,
    where m is the mean reward of the global batch and terms what the loss is the mean over.

    ``sums`` [3] fp64: rewards, responses and terms of the global batch; None where it is this pack.
    The derivative by each of the n rewards of the batch is terms * 2 weight m / n.
    """
    loss, count, report = loss_of(rewards)
    real = batch.responses >= 0  # [n]; the pooled row of an empty pack is no response
    own = torch.where(real, rewards, 0.0).sum()
    if sums is None:
        sums = torch.stack([own.detach().double(), real.sum().double(), count.double()])
    total, number, terms = sums.unbind()
    slope = (terms * 2 * weight * total / number**2).to(loss.dtype)
    share = (terms * weight * (total / number) ** 2 * real.sum() / number).to(loss.dtype)
    report = report.clone()
    report[STAT["penalty"]] += share
    return loss + share + slope * (own - own.detach()), count, report


def num_terms(args: LossArgs, batch: PackedBatch) -> int:
    """What the loss of a pack is a sum over."""
    if args.loss == "plackett_luce":
        return batch.num_choices
    return len(batch.chosen) + batch.tied.shape[1]
