"""Rewards of a dataset by the model in training, and its evaluation.

Shape letters: n responses of a pack.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rmega.data.batching import Batcher
from rmega.distributed import is_reporting_rank, sum_over_ranks
from rmega.evaluation import results
from rmega.evaluation.token_probes import View, probe_stored
from rmega.megatron import param_gather
from rmega.training import train


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
            outputs = train.run_schedule(wrapped, packs, train.forward_rewards, forward_only=True)
            for numbers, rewards in outputs:
                if is_reporting_rank():
                    real = numbers >= 0
                    out[numbers[real]] = rewards[real]
            if progress:  # on every rank after every batch; what it raises ends the sweep
                progress(batcher.global_batch_size)
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
