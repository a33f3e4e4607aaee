"""The segments of a pack, as attention reads them.

A segment is a run of query rows. Each of its queries sees the whole prefix (if any) and, causally
aligned bottom right, the segment's own keys: query i of q_len sees own keys j <= i + k_len - q_len.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class SegmentsLike(Protocol):
    """What attention reads of a pack: int32 CPU tensors [s] and a dict that keeps what was derived
    from them."""

    q_start: Tensor
    q_len: Tensor
    k_start: Tensor
    k_len: Tensor
    prefix_start: Tensor
    prefix_len: Tensor
    cache: dict


class Segment(NamedTuple):
    """One segment as Python integers."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    prefix_start: int
    prefix_len: int


class Part(NamedTuple):
    """A block of the attention matrix: these query rows against these key rows, in full or causal
    (then square)."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    causal: bool


def segment_list(segments: SegmentsLike) -> list[Segment]:
    """The segments as Python integers, read from the tensors once per pack."""
    if "segment_list" not in segments.cache:
        columns = [getattr(segments, name).tolist() for name in Segment._fields]
        segments.cache["segment_list"] = [Segment(*row) for row in zip(*columns, strict=True)]
    return segments.cache["segment_list"]


def attention_parts(segments: SegmentsLike) -> list[Part]:
    """Cut the attention of a pack into blocks that are full or square causal; each block is
    computed by itself.

    The suffixes of a comparison read the same prefix from neighboring query rows, so they share
    one full block.
    """
    if "attention_parts" not in segments.cache:
        own: list[Part] = []
        shared: list[Part] = []
        for s in segment_list(segments):
            # own keys that every query of the segment sees
            seen = s.k_len - s.q_len if s.q_len > 1 else s.k_len
            if seen:
                own.append(Part(s.q_start, s.q_len, s.k_start, seen, False))
            if s.q_len > 1:
                own.append(Part(s.q_start, s.q_len, s.k_start + seen, s.q_len, True))
            if s.prefix_len:
                last = shared[-1] if shared else None
                if (
                    last
                    and last[2:4] == (s.prefix_start, s.prefix_len)
                    and last.q_start + last.q_len == s.q_start
                ):
                    shared[-1] = last._replace(q_len=last.q_len + s.q_len)
                else:
                    shared.append(Part(s.q_start, s.q_len, s.prefix_start, s.prefix_len, False))
        segments.cache["attention_parts"] = own + shared
    return segments.cache["attention_parts"]
