"""Statistics of a dataset: counts, lengths, savings, accuracy of trivial heuristics, decoded
comparisons.

Vectorized over memory maps: ten million comparisons need no Python object each.

Shapes: N comparisons, S sequences, M pairs (better, worse).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmega.data.indexed import PreferenceDataset
from rmega.data.pairs import pairs
from rmega.metrics import wilson_interval


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens."""

    prefix: np.ndarray
    """int32 [N]"""
    suffix: np.ndarray
    """int32 [S - N]"""
    conversation: np.ndarray
    """int64 [S - N], prefix and suffix"""
    num_responses: np.ndarray
    """int64 [N]"""


def lengths_of(dataset: PreferenceDataset) -> Lengths:
    """All lengths of a dataset."""
    indices = np.asarray(dataset.document_indices)
    is_prefix = np.zeros(len(dataset.sequence_lengths), bool)
    is_prefix[indices[:-1]] = True
    prefix, suffix = dataset.sequence_lengths[is_prefix], dataset.sequence_lengths[~is_prefix]
    num_responses = np.diff(indices) - 1
    return Lengths(
        prefix, suffix, np.repeat(prefix, num_responses).astype(np.int64) + suffix, num_responses
    )


def _share(wins: float, num: float) -> dict[str, Any]:
    low, high = wilson_interval(wins, num)
    return {"accuracy": wins / num if num else None, "interval": [low, high], "pairs": int(num)}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    p5, median, p95 = np.percentile(values, (5, 50, 95))
    return {
        "mean": float(values.mean()),
        "p5": float(p5),
        "median": float(median),
        "p95": float(p95),
        "max": float(values.max()),
    }


def summarize(dataset: PreferenceDataset) -> dict[str, Any]:
    """All numbers of ``inspect_data.py PREFIX stats``, ready for JSON."""
    lengths, manifest = lengths_of(dataset), dataset.manifest
    graded = np.asarray(dataset.scores)[np.asarray(dataset.document_indices[:-1])] > 0
    wins = num_pairs = margin_sum = 0.0
    for which, better, worse in pairs(dataset.document_indices, dataset.scores):
        difference = (
            dataset.sequence_lengths[better].astype(np.int64) - dataset.sequence_lengths[worse]
        )
        wins += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        num_pairs += len(which)
        margin_sum += float(
            ((dataset.scores[better] - dataset.scores[worse]) * graded[which]).sum()
        )
    first_suffix = np.cumsum(lengths.num_responses) - lengths.num_responses
    tokens = lengths.prefix + (
        np.add.reduceat(lengths.suffix, first_suffix, dtype=np.int64) if len(dataset) else 0
    )
    by_source = np.bincount(dataset.source_ids, minlength=len(dataset.sources))
    tokens_by_source = np.bincount(
        dataset.source_ids, weights=tokens, minlength=len(dataset.sources)
    )
    stored, apart = int(tokens.sum()), int(lengths.conversation.sum())
    position = manifest.get("position_heuristic") or {}
    k_values, k_counts = np.unique(lengths.num_responses, return_counts=True)
    return {
        "comparisons": len(dataset),
        "responses": len(lengths.suffix),
        "pairs": int(num_pairs),
        "tied_pairs": dataset.num_tied_pairs,
        "ties": manifest.get("ties", "drop"),
        "graded_comparisons": int(graded.sum()),
        "mean_margin": margin_sum / num_pairs if num_pairs else None,
        "responses_per_comparison": {
            str(k): int(n) for k, n in zip(k_values, k_counts, strict=True)
        },
        "prefix_tokens": _spread(lengths.prefix),
        "suffix_tokens": _spread(lengths.suffix),
        "conversation_tokens": _spread(lengths.conversation),
        "tokens": {
            "stored": stored,
            "without_sharing": apart,
            "padded_in_fours": _padded(lengths, 4),
        },
        "sources": {
            name: {"comparisons": int(n), "tokens": int(t)}
            for name, n, t in zip(dataset.sources, by_source, tokens_by_source, strict=True)
            if n
        },
        "length_heuristic": _share(wins, num_pairs),
        "position_heuristic": _share(position.get("first_wins", 0), position.get("pairs", 0)),
        "scripts": manifest.get("scripts", {}),
    }


def _padded(lengths: Lengths, size: int) -> int:
    """Tokens if ``size`` comparisons at a time are padded to their longest conversation, as plain
    trainers do."""
    ends = np.cumsum(lengths.num_responses)
    if not len(ends):
        return 0
    longest = np.maximum.reduceat(lengths.conversation, ends - lengths.num_responses)
    starts = np.arange(0, len(longest), size)
    return int(
        (
            np.maximum.reduceat(longest, starts) * np.add.reduceat(lengths.num_responses, starts)
        ).sum()
    )


def heuristic_text(share: dict[str, Any]) -> str:
    """Accuracy of a rule with its 95 % interval; "-" where no pair can tell."""
    if not share["pairs"]:
        return "-"
    low, high = share["interval"]
    return f"{share['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {share['pairs']:,} pairs"


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary as lines of text."""

    def spread(name: str) -> str:
        s = summary[name]
        return (
            f"mean {s['mean']:,.0f}   5 % {s['p5']:,.0f}   median {s['median']:,.0f}   95 %"
            f" {s['p95']:,.0f}   longest {s['max']:,.0f}"
            if s
            else "-"
        )

    tokens, num = summary["tokens"], max(1, summary["comparisons"])
    responses = ", ".join(f"{n:,} with {k}" for k, n in summary["responses_per_comparison"].items())
    margin = (
        f", mean margin {summary['mean_margin']:.3g} over all pairs"
        if summary["graded_comparisons"]
        else ""
    )
    saved = 1 - tokens["stored"] / tokens["without_sharing"] if tokens["without_sharing"] else 0.0
    position = heuristic_text(summary["position_heuristic"])
    if position == "-":
        position = "- (the order in the rows is the label itself)"
    lines = [
        f"comparisons          {summary['comparisons']:,} (responses: {responses})",
        (
            f"pairs                {summary['pairs']:,}; {summary['tied_pairs']:,} tied pairs"
            f" {'are kept' if summary['ties'] == 'keep' else 'give none'}"
        ),
        f"rated                {summary['graded_comparisons']:,} comparisons have ratings{margin}",
        f"prefix tokens        {spread('prefix_tokens')}",
        f"suffix tokens        {spread('suffix_tokens')}",
        f"conversation tokens  {spread('conversation_tokens')}",
        (
            f"tokens               {tokens['stored']:,} stored, {tokens['without_sharing']:,}"
            f" without the shared prefix ({saved:.1%} saved), {tokens['padded_in_fours']:,} padded"
            " in fours"
        ),
        (
            f"    per comparison   {tokens['stored'] / num:,.0f} stored,"
            f" {tokens['without_sharing'] / num:,.0f} without the shared prefix,"
            f" {tokens['padded_in_fours'] / num:,.0f} padded in fours"
        ),
        f"longer response wins {heuristic_text(summary['length_heuristic'])}",
        f"first response wins  {position}",
        "scripts              "
        + (", ".join(f"{k} {v:,}" for k, v in summary["scripts"].items()) or "-"),
    ]
    total = max(1, tokens["stored"])
    for name, s in sorted(summary["sources"].items(), key=lambda item: -item[1]["tokens"])[:40]:
        share = s["tokens"] / total
        lines.append(
            f"source {name}: {s['comparisons']:,} comparisons, {s['tokens']:,} tokens ({share:.1%})"
        )
    if len(summary["sources"]) > 40:
        lines.append(f"... and {len(summary['sources']) - 40} more sources")
    return lines


_COLORS = {
    "prefix": "\x1b[2m",
    "good": "\x1b[32m",
    "bad": "\x1b[31m",
    "special": "\x1b[35m",
    "end": "\x1b[0m",
}


def show(
    dataset: PreferenceDataset, index: int, tokenizer: Any, *, color: bool = False
) -> list[str]:
    """Comparison ``index`` as text, prefix and suffixes apart; IndexError as ValueError for the
    user."""
    try:
        item = dataset.get(index)
    except IndexError as error:
        raise ValueError(str(error)) from None

    def paint(text: str, name: str) -> str:
        return f"{_COLORS[name]}{text}{_COLORS['end']}" if color else text

    def text_of(ids: np.ndarray) -> str:
        return tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    lines = [
        (
            f"comparison {index} of {dataset.prefix}: source {item.source}, {len(item.suffixes)}"
            f" responses, {'rated' if item.graded else 'ranked'}"
        ),
        paint(f"-- prefix, {len(item.prefix)} tokens", "special"),
        paint(text_of(item.prefix), "prefix"),
    ]
    for number, (suffix, score) in enumerate(
        zip(item.suffixes, item.scores.tolist(), strict=True), 1
    ):
        lines.append(
            paint(f"-- response {number}, score {score:g}, {len(suffix)} tokens", "special")
        )
        lines.append(paint(text_of(suffix), "good" if score == item.scores[0] else "bad"))
    return lines
