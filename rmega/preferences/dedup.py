"""Decisions over all comparisons at once: duplicates, contradictions, overlap with held-out data,
the split by prompt.

Works on a table with one row of numbers per comparison, so that ten million comparisons need
neither ten million Python objects nor their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np

from rmega.data.pairs import response_pairs
from rmega.preferences.comparison import Comparison, Message

DOCUMENT = np.dtype(
    [
        ("file", "<u4"),
        ("line", "<u8"),
        ("num_sequences", "<u4"),
        ("num_tokens", "<u8"),
        ("source", "<u4"),
        ("prompt", "<u8"),
        ("opening", "<u8"),
        ("responses", "<u8"),
        ("order", "<u8"),
        ("first_wins", "<u4"),
        ("first_pairs", "<u4"),
        ("script", "u1"),
    ]
)
"""One comparison: where it came from, its size, 64-bit hashes of its texts, the position heuristic,
its script."""

_SCRIPT_RANGES = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Devanagari": "\u0900-\u097f",
    "Greek": "\u0370-\u03ff",
    "Hebrew": "\u0590-\u05ff",
    "Thai": "\u0e00-\u0e7f",
}
SCRIPTS = (*_SCRIPT_RANGES, "other")
_SCRIPT_RUNS = [re.compile(f"[{r}]+") for r in _SCRIPT_RANGES.values()]
_NOT_ASCII = re.compile("[^\x00-\x7f]+")
_KANA = SCRIPTS.index("Kana")
_MASK = (1 << 64) - 1
RANK_FACTORS = [pow(0x9E3779B97F4A7C15, r + 1, 1 << 64) for r in range(64)]
"""Odd numbers: the sum of responses' hashes times their rank's factor names the set of responses
and its order."""


def hash_messages(messages: Iterable[Message]) -> int:
    """64-bit hash of messages: roles, and texts without the white space around them."""
    parts: list[str] = []
    for message in messages:
        parts += (message["role"], message["content"].strip())
        if len(message) > 2:
            parts.append(
                repr(
                    sorted((k, repr(v)) for k, v in message.items() if k not in ("role", "content"))
                )
            )
    return int.from_bytes(
        blake2b("\0".join(parts).encode("utf-8"), digest_size=8).digest(), "little"
    )


def document_row(
    comparison: Comparison, file: int, line: int, num_tokens: int, source: int
) -> tuple[Any, ...]:
    """The comparison's row of the table (`DOCUMENT`)."""
    prompt, scores = comparison.prompt, comparison.scores
    prompt_hash = hash_messages(prompt)
    opening = prompt_hash
    if len(prompt) > 1:
        first_user = next((i for i, m in enumerate(prompt) if m["role"] == "user"), len(prompt) - 1)
        opening = hash_messages([m for m in prompt[: first_user + 1] if m["role"] != "system"])
    responses = [hash_messages(r) for r in comparison.responses]
    ranks = [sum(other > score for other in scores) for score in scores]
    wins, pairs = position_counts(comparison)
    return (
        file,
        line,
        len(responses) + 1,
        num_tokens,
        source,
        prompt_hash,
        opening,
        sum(responses) & _MASK,
        sum(h * RANK_FACTORS[r % 64] for h, r in zip(responses, ranks, strict=True)) & _MASK,
        wins,
        pairs,
        script_of(comparison),
    )


def position_counts(comparison: Comparison) -> tuple[int, int]:
    """(pairs whose better response stood first in the row, all pairs); (0, 0) where the row's order
    is the label."""
    positions = comparison.positions
    if positions is None:
        return 0, 0
    found = response_pairs(comparison.scores)
    return sum(positions[i] < positions[j] for i, j in found), len(found)


def script_of(comparison: Comparison) -> int:
    """Index into `SCRIPTS`: the script most letters of the last question and the first response are
    written in."""
    text = comparison.prompt[-1]["content"][:1000] + comparison.responses[0][-1]["content"][:1000]
    if text.isascii():
        return 0
    foreign = "".join(_NOT_ASCII.findall(text))
    if len(foreign) * 10 < len(text):
        return 0
    counts = [sum(map(len, runs.findall(text))) for runs in _SCRIPT_RUNS]
    best = int(np.argmax(counts))
    if best == 1 and counts[_KANA] * 5 > counts[1]:
        return _KANA  # Japanese is written with both
    return best if counts[best] else len(SCRIPTS) - 1


def find_duplicates(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(duplicate of an earlier one [N] bool, part of a contradiction [N] bool).

    Two comparisons of the same responses to the same prompt are duplicates if their rankings
    agree. If some rankings differ, all of them contradict each other: nothing tells which one is
    right.
    """
    num = len(documents)
    duplicate, contradiction = np.zeros(num, bool), np.zeros(num, bool)
    if num == 0:
        return duplicate, contradiction
    key = documents["prompt"] * np.uint64(0x9E3779B97F4A7C15) ^ documents["responses"]
    order = np.lexsort((np.arange(num), documents["order"], key))
    keys, orders = key[order], documents["order"][order]
    same_key = keys[1:] == keys[:-1]
    same_order = same_key & (orders[1:] == orders[:-1])
    duplicate[order[1:][same_order]] = True
    group = np.concatenate([[0], np.cumsum(~same_key)])
    differs = np.bincount(group[1:][same_key & ~same_order], minlength=group[-1] + 1) > 0
    contradiction[order] = differs[group]
    return duplicate & ~contradiction, contradiction


def split_by_prompt(documents: np.ndarray, keep: np.ndarray, fraction: float) -> np.ndarray:
    """True [N] for the validation side: about ``fraction`` of the kept comparisons, whole groups of
    one opening.

    A group is all comparisons with the same first question (without the system prompt), so that
    neither a prompt nor the earlier turns of a dialogue are on both sides.
    """
    openings = documents["opening"][keep]
    unique, inverse, counts = np.unique(openings, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise ValueError(
            "--valid-fraction: all comparisons begin with the same question: no split by prompt"
            " exists"
        )
    rank = np.random.Generator(np.random.Philox(key=0)).permutation(len(unique))
    before = np.concatenate([[0], np.cumsum(counts[rank])[:-1]])
    wanted = max(1.0, fraction * len(openings))
    chosen = np.zeros(len(unique), bool)
    chosen[rank[before < wanted]] = True
    if chosen.all():
        chosen[rank[-1]] = False
    valid = np.zeros(len(documents), bool)
    valid[np.flatnonzero(keep)] = chosen[inverse]
    return valid
