"""One training step; rewards of a data set; one evaluation.

Shape letters: t tokens of a pack, n responses, m pairs. The loss is a sum over pairs with a count
(design rule 5): the summed gradient is divided by the count of the whole global batch, so no layout
changes what a step means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from rmega import ops
from rmega.config import LossArgs
from rmega.data.batching import Batcher
from rmega.data.packing import PackedBatch
from rmega.distributed import is_reporting_rank, sum_over_ranks
from rmega.evaluation import results
from rmega.evaluation.token_probes import View, probe_stored
from rmega.megatron import param_gather
from rmega.training.update import update_parameters

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
    terms = _num_terms(args, batch)
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
    terms = _num_terms(args, batch)
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


def _forward_train(args: LossArgs, sums, iterator: Iterator[PackedBatch], model):
    batch = next(iterator)
    loss_of = partial(pair_loss, args, batch)
    if args.loss == "rao_kupper":
        loss_of = partial(rao_kupper_loss, args, batch, _tie_threshold(model))
    if args.batch_centering:
        loss_of = partial(with_centering, loss_of, args.batch_centering, batch, sums)
    return model(batch), loss_of


def _num_terms(args: LossArgs, batch: PackedBatch) -> int:
    """What the loss of a pack is a sum over."""
    if args.loss == "plackett_luce":
        return batch.num_choices
    return len(batch.chosen) + batch.tied.shape[1]


@torch.no_grad()
def _sums_before_backward(
    wrapped: Sequence, packs: list[PackedBatch], args: LossArgs
) -> torch.Tensor | None:
    """``sums`` of :func:`with_centering`, by a forward pass of its own; None without need."""
    alone = len(packs) == 1 and parallel_state.get_data_parallel_world_size() == 1
    if not args.batch_centering or alone:
        return None
    sums = torch.zeros(3, dtype=torch.float64, device=packs[0].tokens.device)
    with _evaluating(wrapped):
        outputs = run_schedule(wrapped, packs, _forward_rewards, forward_only=True)
    if is_reporting_rank():
        for numbers, rewards in outputs:
            sums[0] += torch.where(numbers >= 0, rewards, 0.0).double().sum()
            sums[1] += (numbers >= 0).sum()
        sums[2] += sum(_num_terms(args, batch) for batch in packs)
    return sum_over_ranks(sums)


@contextlib.contextmanager
def _evaluating(wrapped: Sequence) -> Iterator[None]:
    """The chunks in evaluation mode."""
    modes = [chunk.training for chunk in wrapped]
    for chunk in wrapped:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(wrapped, modes, strict=True):
            chunk.train(mode)


def _tie_threshold(model) -> torch.Tensor | None:
    """The parameter on the last stage, of a wrapped chunk."""
    while not hasattr(model, "tie_threshold"):
        model = model.module
    return model.tie_threshold


def _rewards_of(batch: PackedBatch, rewards: torch.Tensor, non_loss_data: bool = True):
    return batch.responses, rewards.detach()


def _forward_rewards(iterator: Iterator[PackedBatch], model):
    batch = next(iterator)
    return model(batch), partial(_rewards_of, batch)


def run_schedule(
    wrapped: Sequence, packs: list[PackedBatch], forward: Callable, *, forward_only: bool
) -> list[Any]:
    """Send the packs of a step through megatron-core's pipeline schedule; what the last stage
    reported per pack."""
    iterators = [iter(packs) for _ in wrapped]
    single = len(wrapped) == 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators[0] if single else iterators,
        model=wrapped[0] if single else list(wrapped),
        num_microbatches=len(packs),
        seq_length=max(pack.num_tokens for pack in packs),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


@dataclasses.dataclass
class StepReport:
    """What one step did, the same on every rank. Means are over the pairs of the global batch; the
    loss's is over ``num_terms``: pairs, or the choices of ``--loss plackett_luce``."""

    loss: float
    acc: float
    chosen_score_mean: float
    rejected_score_mean: float
    grad_norm: float | None
    updated: bool
    num_pairs: int
    num_terms: int
    num_samples: int
    num_tokens: int
    real_tokens: int
    num_microbatches: int
    padding: int
    tie_threshold: float | None = None
    """eta of ``--loss rao_kupper``, before the update."""
    wishes: list[float] = dataclasses.field(default_factory=list)
    """Sums over all ranks of what ``wishes`` of :func:`train_step` answered."""


SUMMED = (*REPORTED, "num_tokens", "real_tokens", "padding", "num_microbatches")


def _sum_gradients(
    wrapped: Sequence, packs: list[PackedBatch], args: LossArgs, wishes: Callable[[], list[float]]
) -> torch.Tensor:
    """Gradients of the loss summed over a global batch's pairs into the buffers (reduced over
    ranks); ``SUMMED`` and the answers of ``wishes``, summed over ranks: fp64 on the device."""
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    before = _sums_before_backward(wrapped, packs, args)
    forward = partial(_forward_train, args, before)
    reports = run_schedule(wrapped, packs, forward, forward_only=False)
    device = packs[0].tokens.device
    own = [0.0] * len(SUMMED)
    first_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    if first_rank and parallel_state.is_pipeline_first_stage():
        own[len(REPORTED) :] = (
            sum(p.num_tokens for p in packs),
            sum(p.real_tokens for p in packs),
            sum(p.padding for p in packs),
            len(packs),
        )
    # From pinned memory, because a copy from elsewhere waits for the device.
    sums = torch.tensor(
        [*own, *wishes()], dtype=torch.float64, pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    if first_rank and parallel_state.is_pipeline_last_stage():
        sums[: len(REPORTED)] = sum(report.detach().double() for report in reports)
    return sum_over_ranks(sums)


def forward_backward(
    wrapped: Sequence, packs: list[PackedBatch], args: LossArgs
) -> dict[str, float]:
    """Gradients of the loss summed over a global batch's pairs into the buffers (reduced over
    ranks); ``SUMMED`` by name."""
    return dict(zip(SUMMED, _sum_gradients(wrapped, packs, args, list).tolist(), strict=True))


def train_step(
    wrapped: Sequence,
    optimizer,
    packs: list[PackedBatch],
    args: LossArgs,
    num_samples: int,
    wishes: Callable[[], list[float]] = list,
) -> StepReport:
    """One optimizer step on this rank's packs of a global batch of ``num_samples`` comparisons.
    ``wishes`` is asked after the backward pass; its answers are summed over ranks on the way.

    The host waits for the device once, for all that is reported (see ``update_parameters`` for
    optimizers with which it must wait before the update)."""
    optimizer.zero_grad()
    sums = _sum_gradients(wrapped, packs, args, wishes)
    at = SUMMED.index
    terms = sums[at("num_terms")].clamp(min=1.0)
    loss = (sums[at("base_loss")] + sums[at("penalty")]) / terms
    outcome = update_parameters(optimizer, loss, terms)
    result = torch.stack(outcome or (torch.full_like(loss, math.nan), torch.zeros_like(loss)))
    mean_loss, norm, updated, *values = torch.cat([loss[None], result, sums]).tolist()
    s = dict(zip(SUMMED, values, strict=False))
    pairs = max(s["num_pairs"], 1.0)
    return StepReport(
        loss=mean_loss,
        acc=s["num_correct"] / pairs,
        chosen_score_mean=s["chosen_score"] / pairs,
        rejected_score_mean=s["rejected_score"] / pairs,
        grad_norm=norm if outcome else None,
        updated=bool(updated),
        num_pairs=int(s["num_pairs"]),
        num_terms=int(s["num_terms"]),
        num_samples=num_samples,
        num_tokens=int(s["num_tokens"]),
        real_tokens=int(s["real_tokens"]),
        num_microbatches=int(s["num_microbatches"]),
        padding=int(s["padding"]),
        wishes=values[len(SUMMED) :],
        tie_threshold=s["tie_threshold"] / max(s["num_terms"], 1.0)
        if args.loss == "rao_kupper"
        else None,
    )


def _head_is_zero(wrapped: Sequence, device: torch.device) -> bool:
    """The same on every rank; only the last stage has the head."""
    names = (item for chunk in wrapped for item in chunk.named_parameters())
    heads = [head for name, head in names if name.endswith("reward_head.weight")]
    return not sum_over_ranks(torch.tensor(sum(bool(h.any()) for h in heads), device=device))


@torch.no_grad()
def compute_rewards(
    wrapped: Sequence,
    batcher: Batcher,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    batches: int | None = None,
) -> np.ndarray:
    """Rewards of every response of ``batcher.dataset``, in stored order, on every rank: float32
    [responses].

    With ``batches`` only that many global batches are scored, and the other rewards are 0. A head
    of zeros, that of a fresh model, gives 0 to every response: no forward is run."""
    param_gather.finish(wrapped)
    if _head_is_zero(wrapped, device):
        if progress:
            progress(len(batcher.dataset))
        return np.zeros(batcher.num_responses, dtype=np.float32)
    out = torch.zeros(batcher.num_responses, dtype=torch.float32, device=device)
    with _evaluating(wrapped):
        for packs in itertools.islice(batcher.sweep(), batches):
            packs = [pack.to(device) for pack in packs]
            for numbers, rewards in run_schedule(
                wrapped, packs, _forward_rewards, forward_only=True
            ):
                if is_reporting_rank():
                    real = numbers >= 0
                    out[numbers[real]] = rewards[real]
            if progress:
                progress(
                    batcher.global_batch_size
                )  # on every rank after every batch; what it raises ends the sweep
    return sum_over_ranks(out).cpu().numpy()


def evaluate(
    wrapped: Sequence,
    batcher: Batcher,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    num_probed: int = 0,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards of a held-out set's responses, and its ``rmega.evaluation.results.evaluate`` with
    "reward_mean" and "reward_std" over all of them; the same on every rank. ``num_probed``
    comparisons are scored again in other forms. Where rewards are not finite, the result is only
    {"not_finite": how many, "num_rewards": of how many}.
    """
    rewards = compute_rewards(wrapped, batcher, device, progress)
    if not_finite := int((~np.isfinite(rewards)).sum()):
        return rewards, {"not_finite": not_finite, "num_rewards": len(rewards)}
    items = results.stored_items(batcher.dataset, rewards)

    def score(view: View) -> np.ndarray:
        return compute_rewards(wrapped, batcher.over(view), device, progress)

    probes = (
        probe_stored(
            batcher.dataset,
            items,
            score,
            num_probed,
            max_tokens=batcher.max_tokens,
            share_prefix=batcher.share_prefix,
        )
        if num_probed
        else None
    )
    return rewards, {
        **results.evaluate(items, length_unit="tokens", probes=probes),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }


class Clock:
    """Time since it was made or last read, in seconds."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._at, elapsed = now, now - self._at
        return elapsed
