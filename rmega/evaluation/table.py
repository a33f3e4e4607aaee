"""Results as text for the terminal."""

from __future__ import annotations

import textwrap
from typing import Any

from rmega.evaluation.findings import length_flag, percent

MARKS = {"good": "ok", "warn": "!", "bad": "!!", "note": "-"}


def number(x: float | None, digits: int = 3) -> str:
    """0.12345 -> "0.123"; NaN and None -> "-"."""
    return "-" if x is None or x != x else f"{x:.{digits}f}"


def interval(row: dict[str, Any]) -> str:
    """ "0.272  (0.232 to 0.317)"; "-" where there is no pair."""
    if not row["num_pairs"]:
        return "-"
    return f"{row['accuracy']:.3f}  ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"


def table_of(name: str, j: dict[str, Any]) -> str:
    """The findings, then the numbers."""
    lines = [name, "=" * len(name)]
    for v in j["findings"]:
        mark = f"[{MARKS[v['level']]}]".ljust(5)
        lines += textwrap.wrap(v["text"], 110, initial_indent=mark, subsequent_indent=" " * 5)
    if not j["num_pairs"]:
        return "\n".join(lines)
    length, c = j["length"], j["calibration"]
    rows = [
        (
            "pairs (comparisons, ties)",
            f"{j['num_pairs']:,} ({j['num_comparisons']:,}, {j['num_ties']:,})",
        ),
        ("accuracy, ties half", interval(j)),
        ("accuracy, labels swapped", number(j["swap"]["accuracy"])),
        ("mean margin", number(j["mean_margin"], 4)),
        (
            "mean reward chosen / rejected",
            f"{j['chosen_score_mean']:.4f} / {j['rejected_score_mean']:.4f}",
        ),
        (f"length bias (in {j['length_unit']})", length_flag(length)),
        ("  accuracy of always-longer", number(length["always_longer"])),
        ("  prefers the longer", number(length["prefers_longer"])),
        ("  accuracy, chosen is longer", interval(length["chosen_longer"])),
        ("  accuracy, chosen is shorter", interval(length["chosen_shorter"])),
        ("  mean of the two", number(length["balanced_accuracy"])),
        (
            "  length-controlled accuracy",
            (
                f"{number(length['controlled_accuracy'])}  "
                f"({number(length['controlled_low'])} to {number(length['controlled_high'])})"
            ),
        ),
        (
            "  reward and length, all",
            f"Pearson {number(length['pearson'])}, Spearman {number(length['spearman'])}",
        ),
        (
            "  reward and length, within pairs",
            (
                f"Pearson {number(length['pearson_within'])}, Spearman"
                f" {number(length['spearman_within'])}"
            ),
        ),
        (
            "calibration: ECE / Brier / log loss",
            f"{number(c['ece'])} / {number(c['brier'])} / {number(c['log_loss'])}",
        ),
        (
            "  fitted temperature",
            (
                f"{c['temperature']:.4g}  ({c['low']:.4g} to"
                f" {'infinity' if c['high'] is None else format(c['high'], '.4g')}), ECE then"
                f" {number(c['ece_scaled'])}"
                if c["temperature"]
                else f"none: {c['reason']}"
            ),
        ),
        ("reward variance between prompts", percent(j["prompt"]["share_of_variance"])),
    ]
    lines += ["", *(f"{label:<38}{value}" for label, value in rows)]
    if len(j["by_source"]) > 1:
        lines += ["", f"{'by source':<38}{'pairs':>7}  accuracy (95 % interval)"]
        lines += [
            f"  {n[:34]:<36}{row['num_pairs']:>7,}  {interval(row)}"
            for n, row in j["by_source"].items()
        ]
    if j["by_margin"]:
        lines += ["", f"{'by margin of the ratings':<38}{'pairs':>7}  accuracy (95 % interval)"]
        lines += [
            f"  {margin_label(row):<36}{row['num_pairs']:>7,}  {interval(row)}"
            for row in j["by_margin"]
        ]
    lines += _more(j)
    return "\n".join(lines)


def margin_label(row: dict[str, Any]) -> str:
    """ "0.5" or "0.5 to 1"."""
    return f"{row['low']:g}" if row["low"] == row["high"] else f"{row['low']:g} to {row['high']:g}"


def _more(j: dict[str, Any]) -> list[str]:
    lines = []
    if j["ranked"]:
        r = j["ranked"]
        lines += [
            "",
            (
                f"{'ranked prompts (all equal, left out)':<38}{r['num_prompts']:,}"
                f" ({r['num_unordered']:,})"
            ),
            (
                f"{'  best-of-N accuracy':<38}{number(r['best_of_n'])} "
                f" ({number(r['best_of_n_low'])} to {number(r['best_of_n_high'])}), blind pick"
                f" {number(r['chance'])}"
            ),
            (
                f"{'  mean score of the pick':<38}{number(r['picked_score'])}  (blind"
                f" {number(r['mean_score'])}, best {number(r['best_score'])})"
            ),
            (
                f"{'  Kendall tau-b, mean per prompt':<38}{number(r['kendall_tau_b'])} "
                f" ({r['num_tau']:,} prompts)"
            ),
        ]
    if j["reward_bench"]:
        b = j["reward_bench"]
        half = b["ties_half"]
        lines += ["", f"{'RewardBench (ties wrong, as published)':<46}ties half"]
        lines += [
            f"  {name:<36}{number(value):<8}{number(half['sections'][name])}"
            for name, value in b["sections"].items()
        ]
        lines.append(f"  {'overall':<36}{number(b['overall']):<8}{number(half['overall'])}")
        if b["missing"]:
            lines.append(f"  subsets not in the data: {', '.join(b['missing'])}")
    if j["reward_bench_2"]:
        b = j["reward_bench_2"]
        lines += ["", f"{'RewardBench 2':<38}prompts  score"]
        lines += [
            f"  {name:<36}{b['num_prompts'][name]:>7,}  {number(value)}"
            for name, value in b["subsets"].items()
        ]
        lines.append(f"  {'overall':<43}  {number(b['overall'])}")
        if b["ties"]:
            t = b["ties"]
            lines.append(
                f"  Ties: right with several answers {number(t['tied_accuracy'])}, with one "
                f"{number(t['ref_accuracy'])}; gap above spread {number(t['preferred'])}, hard "
                f"{number(t['preferred_hard'])}; margin {number(t['margin'])}"
            )
        if b["missing"]:
            lines.append(f"  subsets not in the data: {', '.join(b['missing'])}")
    if j["rm_bench"]:
        b = j["rm_bench"]
        lines += ["", f"{'RM-Bench (ties wrong, as published)':<38}  easy   normal   hard"]
        lines += [
            f"  {n:<36}{number(v['easy'])}    {number(v['normal'])}    {number(v['hard'])}"
            for n, v in [*b["domains"].items(), ("overall", b)]
        ]
        lines.append(
            f"  {'average':<36}{number(b['average'])}  (ties half:"
            f" {number(b['ties_half']['average'])})"
        )
    return lines
