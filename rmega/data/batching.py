"""From stored comparisons to packs: the order of an epoch, global batches, balanced packing, the one batch format.

Shape letters: t tokens of a pack, n responses (pooled tokens) in it, m pairs, s attention segments.

Which comparisons a step sees is a function of (seed, epoch, step) alone (law 5); how they are cut into micro-batches
and over data-parallel ranks is decided here, afterwards, by cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch


@dataclasses.dataclass(eq=False)
class Segments:
    """Who attends to whom in a pack: s segments, int32 CPU tensors of shape [s].

    Query rows ``q_start .. q_start + q_len`` of a segment see the key rows ``prefix_start .. + prefix_len`` in full and
    ``k_start .. + k_len`` causally, aligned bottom right (query i sees own keys j <= i + k_len - q_len).
    ``cache`` is room for what an attention backend prepares once per pack.
    """

    q_start: torch.Tensor
    q_len: torch.Tensor
    k_start: torch.Tensor
    k_len: torch.Tensor
    prefix_start: torch.Tensor
    prefix_len: torch.Tensor
    cache: dict = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.q_len)


@dataclasses.dataclass(eq=False)
class PackedBatch:
    """Some comparisons as one sequence without padding between them.

    tokens, position_ids: [1, t] int64. segments: every token as query. pooled_segments: the n pooled tokens as
    queries (for the last layer). pooled: [n] int64, the row of each response's last token. chosen, rejected: [m]
    int64 into the n responses. margin, weight: [m] float32. documents: [c] numbers of the comparisons in the dataset;
    responses: [n] number of each response in the dataset's list of all responses (for evaluation).
    real_tokens: tokens that a padding-free trainer without prefix sharing would compute; t of this pack is less by
    what was shared and more by ``padding`` (rounding for sequence parallelism).
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    pooled_segments: Segments
    pooled: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    documents: torch.Tensor
    responses: torch.Tensor
    real_tokens: int
    padding: int

    @property
    def num_tokens(self) -> int:
        """Computed tokens t, padding included."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with the tensors that the model reads on ``device`` (segments stay on the CPU)."""
        if device.type == "cpu":
            return self
        moved = {f.name: value.to(device, non_blocking=True) for f in dataclasses.fields(self)
                 if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Relative cost of a comparison: ``linear`` per computed token and ``quadratic`` per attended query-key pair.

    Forward multiply-adds per token of one layer: h (a + 2 g) d for the query-key-value projection, h a d for the
    output projection, 3 h f for the gated MLP; per attended pair 2 a d (scores and values).
    """

    linear: float = 1.0
    quadratic: float = 0.0

    @classmethod
    def of(cls, geometry) -> CostModel:
        """The cost model of a backbone (``rmega.models.geometry.Geometry``)."""
        g = geometry
        qkv = g.hidden_size * (g.num_attention_heads + 2 * g.num_query_groups) * g.head_dim
        proj = g.hidden_size * g.num_attention_heads * g.head_dim
        return cls(linear=float(qkv + proj + 3 * g.hidden_size * g.ffn_hidden_size),
                   quadratic=2.0 * g.num_attention_heads * g.head_dim)

    def __call__(self, prefix: int, suffixes: Sequence[int]) -> float:
        tokens = prefix + sum(suffixes)
        pairs = prefix * (prefix + 1) / 2 + sum(s * prefix + s * (s + 1) / 2 for s in suffixes)
        return self.linear * tokens + self.quadratic * pairs


def balanced_bins(tokens: Sequence[int], costs: Sequence[float], *, num_ranks: int, capacity: int,
                  multiple: int = 1) -> list[list[list[int]]]:
    """Deal comparisons out to ``num_ranks`` ranks in micro-batches of at most ``capacity`` tokens, evenly in cost.

    Returns ``bins[rank][microbatch]`` = indices into ``tokens``. Every rank gets the same number of micro-batches (a
    multiple of ``multiple``, as interleaved pipelines ask for); one may be empty when there are fewer comparisons
    than bins. A comparison of more than ``capacity`` tokens has a bin to itself. Deterministic.

    First the ranks are filled longest first and then improved by moves and swaps until the dearest rank cannot be
    made cheaper; then each rank's share is cut into micro-batches, again longest first.
    """
    assert num_ranks >= 1 and capacity >= 1 and multiple >= 1
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for i in order:
        r = min(range(num_ranks), key=lambda r: (load[r], r))
        ranks[r].append(i)
        load[r] += costs[i]
    _improve(ranks, load, costs)
    most = 1
    while True:
        count = -(-most // multiple) * multiple
        shares = [_cut(share, tokens, costs, capacity, count) for share in ranks]
        most = max(len(share) for share in shares)
        if most == count:  # each has at least that many, so all have the same
            return shares


def _improve(ranks: list[list[int]], load: list[float], costs: Sequence[float], rounds: int = 200) -> None:
    """Lower the dearest rank's load by the best single move or swap with any other rank, until none helps."""
    if len(ranks) == 1:
        return
    for _ in range(rounds):
        top = max(range(len(ranks)), key=lambda r: (load[r], -r))
        best_gain, best = 1e-9 * max(load[top], 1.0), None
        for other in range(len(ranks)):
            gap = load[top] - load[other]
            if other == top or gap <= 0:
                continue
            for i in ranks[top]:
                for j in (None, *ranks[other]):
                    shift = costs[i] - (0.0 if j is None else costs[j])
                    if 0 < shift < gap:
                        gain = min(shift, gap - shift)  # how far the larger of the two loads falls
                        if gain > best_gain:
                            best_gain, best = gain, (other, i, j)
        if best is None:
            return
        other, i, j = best
        ranks[top].remove(i)
        ranks[other].append(i)
        load[top] -= costs[i]
        load[other] += costs[i]
        if j is not None:
            ranks[other].remove(j)
            ranks[top].append(j)
            load[other] -= costs[j]
            load[top] += costs[j]


def _cut(share: list[int], tokens: Sequence[int], costs: Sequence[float], capacity: int,
         at_least: int) -> list[list[int]]:
    """Cut one rank's share into at least ``at_least`` bins within capacity, the fewest that work, even in cost."""
    share = sorted(share, key=lambda i: (-tokens[i], i))
    count = max(at_least, -(-sum(min(tokens[i], capacity) for i in share) // capacity), 1)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled, load = [0] * count, [0.0] * count
        for i in share:
            fits = [b for b in range(count) if not bins[b] or filled[b] + tokens[i] <= capacity]
            if not fits:
                break
            b = min(fits, key=lambda b: (load[b], b))
            bins[b].append(i)
            filled[b] += tokens[i]
            load[b] += costs[i]
        else:
            return [sorted(b) for b in bins]
        count += 1


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class _Builder:
    """Collects the rows of a pack."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.num_tokens = 0
        self.segments: list[tuple[int, ...]] = []
        self.pooled_segments: list[tuple[int, ...]] = []
        self.pooled: list[int] = []

    def rows(self, ids: np.ndarray, first_position: int) -> int:
        start = self.num_tokens
        self.tokens.append(np.asarray(ids, dtype=np.int64))
        self.positions.append(np.arange(first_position, first_position + len(ids), dtype=np.int64))
        self.num_tokens += len(ids)
        return start

    def segment(self, start: int, length: int, prefix_start: int = 0, prefix_len: int = 0) -> None:
        if length:
            self.segments.append((start, length, start, length, prefix_start, prefix_len))

    def pool(self, start: int, length: int, prefix_start: int, prefix_len: int) -> None:
        self.pooled_segments.append((len(self.pooled), 1, start, length, prefix_start, prefix_len))
        self.pooled.append(start + length - 1)

    def responses(self, prefix: np.ndarray, suffixes: Sequence[np.ndarray], share_prefix: bool) -> None:
        if share_prefix:
            prefix_start = self.rows(prefix, 0)
            self.segment(prefix_start, len(prefix))
            for suffix in suffixes:
                start = self.rows(suffix, len(prefix))
                self.segment(start, len(suffix), prefix_start, len(prefix))
                self.pool(start, len(suffix), prefix_start, len(prefix))
        else:
            for suffix in suffixes:
                whole = np.concatenate([prefix, suffix])
                start = self.rows(whole, 0)
                self.segment(start, len(whole))
                self.pool(start, len(whole), 0, 0)


def response_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) index pairs of one comparison's responses; ties give none."""
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]


def pack(comparisons: Sequence, *, documents: Sequence[int] | None = None, responses: Sequence[int] | None = None,
         share_prefix: bool = True, multiple: int = 1, pad_id: int = 0) -> PackedBatch:
    """Build one ``PackedBatch`` from objects with ``prefix``, ``suffixes``, ``scores`` and ``graded``.

    ``responses`` holds the number of each comparison's first response in the dataset's list of all responses. The
    tokens are rounded up to a ``multiple`` (sequence parallelism asks for the tensor-parallel size) by tokens that
    attend only to themselves. Without comparisons the pack is one padding token and no pairs, so that a rank with
    nothing to do still takes part in the step.
    """
    build = _Builder()
    chosen: list[int] = []
    rejected: list[int] = []
    margin: list[float] = []
    numbers: list[int] = []
    real_tokens = 0
    for c, comparison in enumerate(comparisons):
        first = len(build.pooled)
        build.responses(comparison.prefix, comparison.suffixes, share_prefix)
        real_tokens += sum(len(comparison.prefix) + len(suffix) for suffix in comparison.suffixes)
        for better, worse in response_pairs(comparison.scores):
            chosen.append(first + better)
            rejected.append(first + worse)
            margin.append(float(comparison.scores[better] - comparison.scores[worse]) if comparison.graded else 0.0)
        base = responses[c] if responses is not None else first
        numbers.extend(range(base, base + len(comparison.suffixes)))
    padding = -build.num_tokens % multiple if build.num_tokens else multiple
    if padding:
        start = build.rows(np.full(padding, pad_id), 0)
        build.segment(start, padding)
        if not build.pooled:  # the pooled row of an empty pack belongs to no pair
            build.pool(start, 1, 0, 0)
            numbers.append(-1)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(build.tokens))[None],
        position_ids=torch.from_numpy(np.concatenate(build.positions))[None],
        segments=Segments(*(_int32(list(column)) for column in zip(*build.segments, strict=True))),
        pooled_segments=Segments(*(_int32(list(column)) for column in zip(*build.pooled_segments, strict=True))),
        pooled=torch.tensor(build.pooled, dtype=torch.int64),
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        margin=torch.tensor(margin, dtype=torch.float32),
        weight=torch.ones(len(chosen), dtype=torch.float32),
        documents=torch.tensor(list(documents) if documents is not None else [], dtype=torch.int64),
        responses=torch.tensor(numbers, dtype=torch.int64),
        real_tokens=real_tokens,
        padding=padding,
    )


def epoch_order(num_comparisons: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits the comparisons: int64 [num_comparisons], by its arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_comparisons)


class Mixture:
    """Several datasets as one: dataset i is visited ``weights[i]`` times per epoch (0.5: half of it, the other half in
    the next epoch). It has the vectorised accessors of a single dataset, and the order of an epoch.
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
                [d.document_indices[:-1] + s for d, s in zip(datasets, starts, strict=False)] + [starts[-1:]])
            self.sequence_lengths = np.concatenate([d.sequence_lengths for d in datasets])

    @classmethod
    def open(cls, paths: Sequence[str], *, seed: int) -> Mixture:
        """Open ``PREFIX`` or ``WEIGHT=PREFIX`` arguments."""
        from rmega.data.indexed import open_preferences

        datasets, weights = [], []
        for text in paths:
            weight, equals, prefix = text.partition("=")
            try:
                weights.append(float(weight) if equals else 1.0)
            except ValueError:
                raise ValueError(f"--data-path {text}: {weight} is not a number (WEIGHT=PREFIX)") from None
            if not weights[-1] > 0:
                raise ValueError(f"--data-path {text}: the weight must be greater than 0")
            datasets.append(open_preferences(prefix if equals else text))
        return cls(datasets, weights, seed=seed)

    @property
    def identity(self) -> list[list]:
        """What the order of an epoch depends on beside the seed: weight and checksum of each dataset, in order."""
        return [[weight, dataset.manifest.get("checksums", {}).get(".bin")]
                for weight, dataset in zip(self.weights, self.datasets, strict=True)]

    def __len__(self) -> int:
        """Comparisons of one epoch."""
        return sum(self._share(i) for i in range(len(self.datasets)))

    def _share(self, i: int) -> int:
        return max(1, round(self.weights[i] * len(self.datasets[i])))

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the comparisons that epoch ``epoch`` visits, in order: int64 [len(self)]."""
        if self.weights == [1.0]:
            return epoch_order(len(self), seed=self.seed, epoch=epoch)
        numbers = np.concatenate([first + self._visits(i, epoch) for i, first in enumerate(self._firsts[:-1])])
        return numbers[epoch_order(len(self), seed=self.seed, epoch=epoch)]

    def _visits(self, i: int, epoch: int) -> np.ndarray:
        """What dataset i gives to an epoch: the next part of an endless row of its own shuffled passes, so that every
        comparison is visited equally often, to within one, after any number of epochs."""
        size, share = len(self.datasets[i]), self._share(i)
        start = epoch * share
        passes = range(start // size, (start + share - 1) // size + 1)
        row = np.concatenate([epoch_order(size, seed=self.seed + i + 1, epoch=p) for p in passes])
        return row[start % size : start % size + share]

    def get(self, number: int):
        """The comparison with this number."""
        i = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.datasets[i].get(number - int(self._firsts[i]))


class Batcher:
    """The packs of any step for any data-parallel rank, without state: position is a count of consumed comparisons."""

    def __init__(self, dataset, *, global_batch_size: int, max_tokens: int, seed: int, cost: CostModel | None = None,
                 num_ranks: int = 1, rank: int = 0, share_prefix: bool = True, token_multiple: int = 1,
                 microbatch_multiple: int = 1, max_consumed: int | None = None) -> None:
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.max_tokens = max_tokens
        self.seed = seed
        self.cost = cost or CostModel()
        self.num_ranks = num_ranks
        self.rank = rank
        self.share_prefix = share_prefix
        self.token_multiple = token_multiple
        self.microbatch_multiple = microbatch_multiple
        self.max_consumed = max_consumed
        self._epoch: tuple[int, np.ndarray] | None = None

    def documents(self, consumed: int) -> np.ndarray:
        """The comparisons of the step that starts after ``consumed`` of them: int64 [<= global_batch_size].

        A batch may span two epochs; only ``max_consumed`` (the end of the run) can make one shorter.
        """
        size, count = len(self.dataset), self.global_batch_size
        if self.max_consumed is not None:
            count = min(count, self.max_consumed - consumed)
        out = []
        while count > 0:
            epoch, offset = divmod(consumed, size)
            if self._epoch is None or self._epoch[0] != epoch:
                order = getattr(self.dataset, "order", None)
                self._epoch = (epoch, order(epoch) if order else epoch_order(size, seed=self.seed, epoch=epoch))
            part = self._epoch[1][offset : offset + count]
            out.append(part)
            consumed += len(part)
            count -= len(part)
        return np.concatenate(out)

    def plan(self, documents: np.ndarray) -> list[list[list[int]]]:
        """``plan[rank][microbatch]`` = comparisons (numbers in the dataset) of one global batch."""
        lengths = [self.lengths(int(d)) for d in documents]
        tokens = [p + sum(s) if self.share_prefix else sum(p + x for x in s) for p, s in lengths]
        if self.share_prefix:
            costs = [self.cost(p, s) for p, s in lengths]
        else:
            costs = [self.cost(0, [p + x for x in s]) for p, s in lengths]
        bins = balanced_bins(tokens, costs, num_ranks=self.num_ranks, capacity=self.max_tokens,
                             multiple=self.microbatch_multiple)
        return [[[int(documents[i]) for i in b] for b in rank] for rank in bins]

    def lengths(self, document: int) -> tuple[int, list[int]]:
        """Prefix length and suffix lengths of one comparison."""
        first, last = self.dataset.document_indices[document : document + 2]
        lengths = self.dataset.sequence_lengths[first:last]
        return int(lengths[0]), [int(x) for x in lengths[1:]]

    def packs(self, documents: np.ndarray) -> list[PackedBatch]:
        """This rank's micro-batches for the given comparisons."""
        return [self.pack(b) for b in self.plan(documents)[self.rank]]

    def pack(self, documents: Sequence[int]) -> PackedBatch:
        """The comparisons with these numbers as one pack."""
        # Each document is one prefix and its responses, so responses before document d = sequences before it - d.
        firsts = [int(self.dataset.document_indices[d]) - d for d in documents]
        return pack([self.dataset.get(d) for d in documents], documents=documents, responses=firsts,
                    share_prefix=self.share_prefix, multiple=self.token_multiple)

    def sweep(self) -> Iterator[list[PackedBatch]]:
        """This rank's packs of every comparison once, in stored order, a global batch at a time (for evaluation)."""
        for start in range(0, len(self.dataset), self.global_batch_size):
            yield self.packs(np.arange(start, min(start + self.global_batch_size, len(self.dataset))))

    @cached_property
    def num_responses(self) -> int:
        """Responses in the whole dataset."""
        return len(self.dataset.sequence_lengths) - len(self.dataset)
