"""Epoch order, global batches, and this rank's packs.

Which comparisons a step sees is a function of (seed, epoch, step) alone (design rule 5); how they
are cut into micro-batches and over data-parallel ranks is decided afterwards, by cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from rmega.config import TrainingConfig
from rmega.data.balance import CostModel, balanced_bins
from rmega.data.indexed import open_preferences, split_label
from rmega.data.packing import PackedBatch, pack


def epoch_order(num_comparisons: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits the comparisons: int64 [num_comparisons], by its
    arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_comparisons)


class Mixture:
    """Several datasets as one: dataset i is visited ``weights[i]`` times per epoch (0.5: half of
    it, the other half in the next epoch). It has the vectorized accessors of a single dataset,
    and the order of an epoch.
    """

    def __init__(self, datasets: Sequence, weights: Sequence[float], *, seed: int) -> None:
        self.datasets, self.weights, self.seed = list(datasets), list(weights), seed
        self.manifest = datasets[0].manifest
        self.prefix = datasets[0].prefix
        self._firsts = np.cumsum([0, *(len(d) for d in datasets)])
        if len(datasets) == 1:
            self.document_indices = datasets[0].document_indices
            self.sequence_lengths = datasets[0].sequence_lengths
        else:
            starts = np.cumsum([0, *(len(d.sequence_lengths) for d in datasets)])
            self.document_indices = np.concatenate(
                [d.document_indices[:-1] + s for d, s in zip(datasets, starts, strict=False)]
                + [starts[-1:]]
            )
            self.sequence_lengths = np.concatenate([d.sequence_lengths for d in datasets])

    @classmethod
    def open(cls, paths: Sequence[str], *, seed: int) -> Mixture:
        """Open ``PREFIX`` or ``WEIGHT=PREFIX`` arguments."""
        datasets, weights = [], []
        for text in paths:
            weight, prefix = split_label(text)
            try:
                weights.append(1.0 if weight is None else float(weight))
            except ValueError:
                raise ValueError(
                    f"--data-path {text}: {weight} is not a number (WEIGHT=PREFIX)"
                ) from None
            if not 0 < weights[-1] < math.inf:
                raise ValueError(f"--data-path {text}: the weight must be greater than 0")
            datasets.append(open_preferences(prefix))
            if (visits := weights[-1] * len(datasets[-1])) >= 2**31:  # the order is held in memory
                raise ValueError(
                    f"--data-path {text}: {visits:.3g} comparisons per epoch; the weight says how"
                    " often an epoch visits the dataset (2: twice)"
                )
        return cls(datasets, weights, seed=seed)

    @property
    def identity(self) -> list[list]:
        """What the order of an epoch depends on beside the seed: weight and checksum of each
        dataset, in order."""
        return [
            [weight, dataset.manifest.get("checksums", {}).get(".bin")]
            for weight, dataset in zip(self.weights, self.datasets, strict=True)
        ]

    def __len__(self) -> int:
        """Comparisons of one epoch."""
        return sum(self._share(i) for i in range(len(self.datasets)))

    def _share(self, i: int) -> int:
        return max(1, round(self.weights[i] * len(self.datasets[i])))

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the comparisons that epoch ``epoch`` visits, in order: int64 [len(self)]."""
        if self.weights == [1.0]:
            return epoch_order(len(self), seed=self.seed, epoch=epoch)
        numbers = np.concatenate(
            [first + self._visits(i, epoch) for i, first in enumerate(self._firsts[:-1])]
        )
        return numbers[epoch_order(len(self), seed=self.seed, epoch=epoch)]

    def _visits(self, i: int, epoch: int) -> np.ndarray:
        """What dataset i gives to an epoch: the next part of an endless row of its own shuffled
        passes, so that every comparison is visited equally often, to within one, after any
        number of epochs."""
        size, share = len(self.datasets[i]), self._share(i)
        start = epoch * share
        passes = range(start // size, (start + share - 1) // size + 1)
        row = np.concatenate([epoch_order(size, seed=self.seed + i + 1, epoch=p) for p in passes])
        return row[start % size : start % size + share]

    def get(self, number: int):
        """The comparison with this number."""
        i = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.datasets[i].get(number - int(self._firsts[i]))


@dataclass(eq=False)
class Batcher:
    """The packs of any step for any data-parallel rank, without state: position is a count of
    consumed comparisons."""

    dataset: Any
    _: KW_ONLY
    global_batch_size: int
    max_tokens: int
    seed: int
    cost: CostModel = CostModel()
    num_ranks: int = 1
    rank: int = 0
    share_prefix: bool = True
    ties: bool = False
    """Packs hold tied pairs."""
    with_keys: bool = False
    """The packs of a step hold keys for dropout."""
    token_multiple: int = 1
    microbatch_multiple: int = 1
    max_consumed: int | None = None
    same_length: bool = False
    """The packs of a step are padded to as many tokens as the longest of this rank's has."""
    _epoch: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        dataset,
        geometry: Any,
        *,
        num_ranks: int,
        rank: int = 0,
        max_consumed: int | None = None,
        same_length: bool = False,
    ) -> Batcher:
        """The batcher of a run on ``num_ranks`` data-parallel ranks. geometry: of the backbone
        (``rmega.models.geometry.Geometry``)."""
        return cls(
            dataset,
            global_batch_size=config.train.global_batch_size,
            max_tokens=config.data.max_tokens_per_microbatch,
            seed=config.train.seed,
            cost=CostModel.of(geometry),
            num_ranks=num_ranks,
            rank=rank,
            share_prefix=config.data.share_prefix,
            ties=config.loss.loss == "rao_kupper",
            with_keys=config.lora.lora_dropout > 0,
            token_multiple=config.token_multiple,
            microbatch_multiple=config.microbatch_multiple,
            max_consumed=max_consumed,
            same_length=same_length,
        )

    def over(self, dataset) -> Batcher:
        """The same cutting into packs for another dataset, from its beginning to its end."""
        return replace(self, dataset=dataset, ties=False, with_keys=False, max_consumed=None)

    def documents(self, consumed: int) -> np.ndarray:
        """The comparisons of the step that starts after ``consumed`` of them: int64 [<=
        global_batch_size].

        A batch may span two epochs; only ``max_consumed`` (the end of the run) can make one
        shorter.
        """
        size, count = len(self.dataset), self.global_batch_size
        if self.max_consumed is not None:
            count = min(count, self.max_consumed - consumed)
        out = []
        while count > 0:
            epoch, offset = divmod(consumed, size)
            if self._epoch is None or self._epoch[0] != epoch:
                order = getattr(self.dataset, "order", None)
                self._epoch = (
                    epoch,
                    order(epoch) if order else epoch_order(size, seed=self.seed, epoch=epoch),
                )
            part = self._epoch[1][offset : offset + count]
            out.append(part)
            consumed += len(part)
            count -= len(part)
        return np.concatenate(out)

    def plan(self, documents: np.ndarray) -> list[list[list[int]]]:
        """``plan[rank][microbatch]`` = comparisons (numbers in the dataset) of one global batch."""
        tokens, costs = zip(*(self.size(int(d)) for d in documents), strict=True)
        bins = balanced_bins(
            tokens,
            costs,
            num_ranks=self.num_ranks,
            capacity=self.max_tokens,
            multiple=self.microbatch_multiple,
        )
        return [[[int(documents[i]) for i in b] for b in rank] for rank in bins]

    def lengths(self, document: int) -> tuple[int, list[int]]:
        """Prefix length and suffix lengths of one comparison."""
        first, last = self.dataset.document_indices[document : document + 2]
        lengths = self.dataset.sequence_lengths[first:last]
        return int(lengths[0]), [int(x) for x in lengths[1:]]

    def size(self, document: int) -> tuple[int, float]:
        """Computed tokens of one comparison, and their cost."""
        prefix, suffixes = self.lengths(document)
        if not self.share_prefix:
            prefix, suffixes = 0, [prefix + suffix for suffix in suffixes]
        return prefix + sum(suffixes), self.cost(prefix, suffixes)

    def packs(self, documents: np.ndarray, consumed: int | None = None) -> list[PackedBatch]:
        """This rank's micro-batches for the given comparisons. ``consumed``: in training, the
        comparisons before this step."""
        bins = self.plan(documents)[self.rank]
        sizes = [sum(self.size(d)[0] for d in b) for b in bins]
        length = max(sizes, default=0) if self.same_length else 0
        return [self.pack(b, length, consumed) for b in bins]

    def pack(
        self, documents: Sequence[int], length: int = 0, consumed: int | None = None
    ) -> PackedBatch:
        """The comparisons with these numbers as one pack of at least ``length`` tokens."""
        # Each document is one prefix and its responses, so responses before document d = sequences
        # before it - d.
        firsts = [int(self.dataset.document_indices[d]) - d for d in documents]
        return pack(
            [self.dataset.get(d) for d in documents],
            documents=documents,
            responses=firsts,
            share_prefix=self.share_prefix,
            ties=self.ties,
            multiple=self.token_multiple,
            length=length,
            draw=(self.seed, consumed) if self.with_keys and consumed is not None else None,
        )

    def sweep(self) -> Iterator[list[PackedBatch]]:
        """This rank's packs of every comparison once, in stored order, a global batch at a time
        (for evaluation)."""
        for start in range(0, len(self.dataset), self.global_batch_size):
            yield self.packs(
                np.arange(start, min(start + self.global_batch_size, len(self.dataset)))
            )

    @cached_property
    def num_responses(self) -> int:
        """Responses in the whole dataset."""
        return len(self.dataset.sequence_lengths) - len(self.dataset)
