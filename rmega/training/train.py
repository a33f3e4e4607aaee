"""One training step.

Shape letters: t tokens of a pack, n responses, m pairs. The loss is a sum over pairs with a count
(design rule 5): the summed gradient is divided by the count of the whole global batch, so no layout
changes what a step means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from rmega.config import LossArgs
from rmega.data.packing import PackedBatch
from rmega.distributed import is_reporting_rank, sum_over_ranks
from rmega.training.loss import REPORTED, num_terms, pair_loss, rao_kupper_loss, with_centering
from rmega.training.update import update_parameters


def _forward_train(args: LossArgs, sums, iterator: Iterator[PackedBatch], model):
    batch = next(iterator)
    loss_of = partial(pair_loss, args, batch)
    if args.loss == "rao_kupper":
        threshold = get_attr_wrapped_model(model, "tie_threshold")  # None but on the last stage
        loss_of = partial(rao_kupper_loss, args, batch, threshold)
    if args.batch_centering:
        loss_of = partial(with_centering, loss_of, args.batch_centering, batch, sums)
    return model(batch), loss_of


@torch.no_grad()
def _sums_before_backward(
    wrapped: Sequence, packs: list[PackedBatch], args: LossArgs
) -> torch.Tensor | None:
    """``sums`` of :func:`with_centering`, by a forward pass of its own; None without need."""
    alone = len(packs) == 1 and parallel_state.get_data_parallel_world_size() == 1
    if not args.batch_centering or alone:
        return None
    sums = torch.zeros(3, dtype=torch.float64, device=packs[0].tokens.device)
    outputs = run_schedule(wrapped, packs, forward_rewards, forward_only=True)
    if is_reporting_rank():
        for numbers, rewards in outputs:
            sums[0] += torch.where(numbers >= 0, rewards, 0.0).double().sum()
            sums[1] += (numbers >= 0).sum()
        sums[2] += sum(num_terms(args, batch) for batch in packs)
    return sum_over_ranks(sums)


def _rewards_of(batch: PackedBatch, rewards: torch.Tensor, non_loss_data: bool = True):
    return batch.responses, rewards.detach()


def forward_rewards(iterator: Iterator[PackedBatch], model):
    """``forward`` of :func:`run_schedule` for rewards: reports (numbers of responses, rewards), [n]
    each."""
    batch = next(iterator)
    return model(batch), partial(_rewards_of, batch)


def run_schedule(
    wrapped: Sequence, packs: list[PackedBatch], forward: Callable, *, forward_only: bool
) -> list[Any]:
    """Run the packs of a step through Megatron-Core's pipeline schedule; what the last stage
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
    requests: list[float] = dataclasses.field(default_factory=list)
    """What ``requests`` of :func:`train_step` returned, summed over all ranks."""


SUMMED = (*REPORTED, "num_tokens", "real_tokens", "padding", "num_microbatches")


def _sum_gradients(
    wrapped: Sequence, packs: list[PackedBatch], args: LossArgs, requests: Callable[[], list[float]]
) -> torch.Tensor:
    """Gradients of the loss summed over a global batch's pairs into the buffers (reduced over
    ranks); ``SUMMED`` and what ``requests`` returns, summed over ranks: fp64 on the device."""
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
        [*own, *requests()], dtype=torch.float64, pin_memory=device.type == "cuda"
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
    requests: Callable[[], list[float]] = list,
) -> StepReport:
    """One optimizer step on this rank's packs of a global batch of ``num_samples`` comparisons.
    ``requests`` is called after the backward pass; what it returns is summed over ranks on the way.

    The host waits for the device once, for all that is reported (see ``update_parameters`` for
    optimizers with which it must wait before the update)."""
    optimizer.zero_grad()
    sums = _sum_gradients(wrapped, packs, args, requests)
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
        requests=values[len(SUMMED) :],
        tie_threshold=s["tie_threshold"] / max(s["num_terms"], 1.0)
        if args.loss == "rao_kupper"
        else None,
    )
