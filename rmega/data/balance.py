"""Balanced assignment of comparisons to ranks and micro-batches, by tokens and attention cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Relative cost of a comparison: ``linear`` per computed token and ``quadratic`` per attended
    query-key pair.

    Forward multiply-adds per token of one layer: h (a + 2 g) d for the query-key-value projection,
    h a d for the output projection, 3 h f for the gated MLP; per attended pair 2 a d (scores and
    values).
    """

    linear: float = 1.0
    quadratic: float = 0.0

    @classmethod
    def of(cls, geometry) -> CostModel:
        """The cost model of a backbone (``rmega.models.geometry.Geometry``)."""
        g = geometry
        qkv = g.hidden_size * (g.num_attention_heads + 2 * g.num_query_groups) * g.head_dim
        proj = g.hidden_size * g.num_attention_heads * g.head_dim
        return cls(
            linear=float(qkv + proj + 3 * g.hidden_size * g.ffn_hidden_size),
            quadratic=2.0 * g.num_attention_heads * g.head_dim,
        )

    def __call__(self, prefix: int, suffixes: Sequence[int]) -> float:
        tokens = prefix + sum(suffixes)
        pairs = prefix * (prefix + 1) / 2 + sum(s * prefix + s * (s + 1) / 2 for s in suffixes)
        return self.linear * tokens + self.quadratic * pairs


def balanced_bins(
    tokens: Sequence[int],
    costs: Sequence[float],
    *,
    num_ranks: int,
    capacity: int,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Deal comparisons out to ``num_ranks`` ranks in micro-batches of at most ``capacity`` tokens,
    evenly in cost.

    Returns ``bins[rank][microbatch]`` = indices into ``tokens``. Every rank gets the same number of
    micro-batches (a multiple of ``multiple``, as interleaved pipelines require); one may be empty
    when there are fewer comparisons than bins. A comparison of more than ``capacity`` tokens has a
    bin to itself. Deterministic.

    First the ranks are filled longest first and then improved by moves and swaps until the most
    expensive rank cannot be made cheaper; then each rank's share is cut into micro-batches, again
    longest first.
    """
    assert num_ranks >= 1 and capacity >= 1 and multiple >= 1
    # Longest first: each goes to the rank with the least load (ties to the lower number).
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for i in order:
        r = min(range(num_ranks), key=lambda r: (load[r], r))
        ranks[r].append(i)
        load[r] += costs[i]
    _improve(ranks, load, costs)
    # All ranks take part in every micro-batch of a step, so all need the same number: cut again
    # with the most that any rank came to, until no rank needs more.
    most = 1
    while True:
        count = -(-most // multiple) * multiple
        shares = [_cut(share, tokens, costs, capacity, count) for share in ranks]
        most = max(len(share) for share in shares)
        if most == count:  # each has at least that many, so all have the same
            return shares


def _improve(
    ranks: list[list[int]], load: list[float], costs: Sequence[float], rounds: int = 200
) -> None:
    """Lower the load of the most expensive rank by the best single move or swap with any other
    rank, until none helps."""

    def move(item: int, source: int, target: int) -> None:
        ranks[source].remove(item)
        ranks[target].append(item)
        load[source] -= costs[item]
        load[target] += costs[item]

    for _ in range(rounds):
        top = max(range(len(ranks)), key=lambda r: (load[r], -r))
        best_gain, best = 1e-9 * max(load[top], 1.0), None
        for other in range(len(ranks)):
            gap = load[top] - load[other]  # a shift of half the gap would even the two out
            if other == top or gap <= 0:
                continue
            for i in ranks[top]:
                for j in (None, *ranks[other]):
                    # i goes over, and j comes back; None: a move without return
                    shift = costs[i] - (0.0 if j is None else costs[j])
                    if 0 < shift < gap:
                        gain = min(shift, gap - shift)  # how far the larger of the two loads falls
                        if gain > best_gain:
                            best_gain, best = gain, (other, i, j)
        if best is None:
            return
        other, i, j = best
        move(i, top, other)
        if j is not None:
            move(j, other, top)


def _cut(
    share: list[int], tokens: Sequence[int], costs: Sequence[float], capacity: int, at_least: int
) -> list[list[int]]:
    """Cut one rank's share into at least ``at_least`` bins within capacity, the fewest that work,
    even in cost."""
    share = sorted(share, key=lambda i: (-tokens[i], i))
    # No fewer bins than the tokens fill; one above capacity fills one alone.
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
