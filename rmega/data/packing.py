"""``PackedBatch``, the one batch format: packed tokens, segments, pooled rows, pairs.

Shape letters: t tokens of a pack, n responses (pooled tokens) in it, m pairs, s attention segments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rmega.data.pairs import response_pairs, tied_responses
from rmega.data.token_keys import chain, keys


@dataclasses.dataclass(eq=False)
class Segments:
    """Who attends to whom in a pack: s segments, int32 CPU tensors of shape [s].

    Query rows ``q_start .. q_start + q_len`` of a segment see the key rows ``prefix_start .. +
    prefix_len`` in full and ``k_start .. + k_len`` causally, aligned bottom right (query i sees own
    keys j <= i + k_len - q_len). ``cache`` is room for what an attention backend prepares once per
    pack.
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

    tokens, position_ids: [1, t] int64. segments: every token as query. pooled_segments: the n
    pooled tokens as queries (for the last layer). pooled: [n] int64, the row of each response's
    last token. chosen, rejected: [m] int64 into the n responses. rating_gap, length_gap: [m]
    float32, what the chosen response has more than the rejected one of rating (NaN without ratings)
    and of tokens (the same with and without a shared prefix).
    tied: [2, T] int64 into the n responses, the tied pairs, with --loss rao_kupper only (else T=0).
    num_choices: different chosen responses, each the choice of one among its rejected ones.
    documents: [c] numbers of the comparisons in the dataset; responses: [n] number of each response
    in the dataset's list of all responses (for evaluation). real_tokens: tokens that a padding-free
    trainer without prefix sharing would compute; t of this pack is less by what was shared and more
    by ``padding`` (rounding for sequence parallelism). token_keys: [t] int32, see
    ``rmega.data.token_keys``; in batches for training with dropout only.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    pooled_segments: Segments
    pooled: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    tied: torch.Tensor
    rating_gap: torch.Tensor
    length_gap: torch.Tensor
    documents: torch.Tensor
    responses: torch.Tensor
    num_choices: int
    real_tokens: int
    padding: int
    token_keys: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Computed tokens t, padding included."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with the tensors that the model reads on ``device`` (segments stay on the
        CPU). On a GPU through pinned memory, without waiting for it."""
        if device.type == "cpu":
            return self
        pin = device.type == "cuda"
        moved: dict[str, Any] = {
            f.name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def _segments(rows: Sequence[Sequence[int]]) -> Segments:
    columns = torch.tensor(rows, dtype=torch.int32).T.contiguous()  # [6, s]
    return Segments(*columns)


class _Builder:
    """Collects the rows of a pack."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.num_tokens = 0
        self.segments: list[tuple[int, ...]] = []
        self.pooled_segments: list[tuple[int, ...]] = []
        self.pooled: list[int] = []
        # (comparison, response or -1, first position, length) of the tokens, in their order
        self.origins: list[tuple[int, int, int, int]] = []

    def rows(self, ids: np.ndarray, first_position: int) -> int:
        """Append ids [n] at positions first_position .. + n; the row of the first."""
        start = self.num_tokens
        self.tokens.append(np.asarray(ids, dtype=np.int64))
        self.positions.append(np.arange(first_position, first_position + len(ids), dtype=np.int64))
        self.num_tokens += len(ids)
        return start

    # Rows of `Segments`: (q_start, q_len, k_start, k_len, prefix_start, prefix_len).
    def segment(self, start: int, length: int, prefix_start: int = 0, prefix_len: int = 0) -> None:
        if length:
            self.segments.append((start, length, start, length, prefix_start, prefix_len))

    def pool(self, start: int, length: int, prefix_start: int, prefix_len: int) -> None:
        # In the last layer only the last token of a response is a query: query row i is response i.
        self.pooled_segments.append((len(self.pooled), 1, start, length, prefix_start, prefix_len))
        self.pooled.append(start + length - 1)

    def responses(
        self, c: int, prefix: np.ndarray, suffixes: Sequence[np.ndarray], share_prefix: bool
    ) -> None:
        if share_prefix:
            prefix_start = self.rows(prefix, 0)  # once, for all responses
            self.origins.append((c, -1, 0, len(prefix)))
            self.segment(prefix_start, len(prefix))
            for i, suffix in enumerate(suffixes):
                start = self.rows(suffix, len(prefix))
                self.origins.append((c, i, len(prefix), len(suffix)))
                self.segment(start, len(suffix), prefix_start, len(prefix))
                self.pool(start, len(suffix), prefix_start, len(prefix))
        else:
            for i, suffix in enumerate(suffixes):
                conversation = np.concatenate([prefix, suffix])
                start = self.rows(conversation, 0)
                self.origins += [(c, -1, 0, len(prefix)), (c, i, len(prefix), len(suffix))]
                self.segment(start, len(conversation))
                self.pool(start, len(conversation), 0, 0)


def pack(
    comparisons: Sequence,
    *,
    documents: Sequence[int] | None = None,
    responses: Sequence[int] | None = None,
    share_prefix: bool = True,
    ties: bool = False,
    multiple: int = 1,
    length: int = 0,
    pad_id: int = 0,
    draw: tuple[int, int] | None = None,
) -> PackedBatch:
    """Build one ``PackedBatch`` from objects with ``prefix``, ``suffixes``, ``scores`` and
    ``graded``.

    ``ties``: responses with equal scores are tied pairs. ``responses`` holds the number of each
    comparison's first response in the dataset's list of all responses. The tokens are filled up to
    ``length`` and rounded up to a ``multiple`` (sequence parallelism needs the tensor-parallel
    size) by tokens that attend only to themselves. Without comparisons the pack is padding and no
    pairs, so that a rank with nothing to do still takes part in the step. ``draw``: seed and
    consumed comparisons, for ``token_keys``, which take ``documents``.
    """
    build = _Builder()
    chosen: list[int] = []
    rejected: list[int] = []
    tied: list[tuple[int, int]] = []
    rating_gap: list[float] = []
    length_gap: list[int] = []
    numbers: list[int] = []
    real_tokens = 0
    for c, comparison in enumerate(comparisons):
        first = len(build.pooled)
        build.responses(c, comparison.prefix, comparison.suffixes, share_prefix)
        real_tokens += sum(len(comparison.prefix) + len(suffix) for suffix in comparison.suffixes)
        for better, worse in response_pairs(comparison.scores):
            chosen.append(first + better)
            rejected.append(first + worse)
            rating_gap.append(
                float(comparison.scores[better] - comparison.scores[worse])
                if comparison.graded
                else math.nan
            )
            suffixes = comparison.suffixes
            length_gap.append(len(suffixes[better]) - len(suffixes[worse]))
        if ties:
            tied += [(first + i, first + j) for i, j in tied_responses(comparison)]
        base = responses[c] if responses is not None else first
        numbers.extend(range(base, base + len(comparison.suffixes)))
    wanted = max(build.num_tokens, length, 1)
    padding = wanted + -wanted % multiple - build.num_tokens
    if padding:
        start = build.rows(np.full(padding, pad_id), 0)
        build.segment(start, padding)
        if not build.pooled:  # the pooled row of an empty pack belongs to no pair
            build.pool(start, 1, 0, 0)
            numbers.append(-1)
    token_keys = None
    if draw is not None:
        assert documents is not None
        parts = [
            keys(chain(*draw, documents[c], response), first, count)
            for c, response, first, count in build.origins
        ]
        token_keys = torch.from_numpy(np.concatenate([*parts, np.zeros(padding, np.int32)]))  # [t]
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(build.tokens))[None],  # [1, t]
        position_ids=torch.from_numpy(np.concatenate(build.positions))[None],  # [1, t]
        segments=_segments(build.segments),
        pooled_segments=_segments(build.pooled_segments),
        pooled=torch.tensor(build.pooled, dtype=torch.int64),  # [n]
        chosen=torch.tensor(chosen, dtype=torch.int64),  # [m]
        rejected=torch.tensor(rejected, dtype=torch.int64),  # [m]
        tied=torch.tensor(tied, dtype=torch.int64).view(-1, 2).T.contiguous(),  # [2, T]
        rating_gap=torch.tensor(rating_gap, dtype=torch.float32),  # [m]
        length_gap=torch.tensor(length_gap, dtype=torch.float32),  # [m]
        documents=torch.tensor(list(documents) if documents is not None else [], dtype=torch.int64),
        responses=torch.tensor(numbers, dtype=torch.int64),
        num_choices=len(set(chosen)),
        real_tokens=real_tokens,
        padding=padding,
        token_keys=token_keys,
    )
