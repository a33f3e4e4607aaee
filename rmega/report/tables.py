"""Tables of evaluation results, and how their numbers are made; for the reports on evaluations and
runs."""

from __future__ import annotations

import math
from typing import Any

from rmega.evaluation.findings import percent
from rmega.evaluation.table import margin_label, number
from rmega.report import page


def between(low: float | None, high: float | None) -> str:
    """The ends of an interval, such as "23.2 to 31.7 %"."""
    return f"{100 * (math.nan if low is None else low):.1f} to {percent(high)}"


def interval(row: dict[str, Any]) -> str:
    """The 95 % interval of an accuracy in words."""
    return between(row["accuracy_low"], row["accuracy_high"]) if row["num_pairs"] else "-"


def tables(j: dict[str, Any]) -> str:
    """Accuracies of the whole and its parts; ranked prompts and public benchmarks where there are
    any."""
    out = "<h3>Numbers</h3>\n" + _accuracies(j)
    for key, table_of in (
        ("ranked", _ranked),
        ("reward_bench", _reward_bench),
        ("reward_bench_2", _reward_bench_2),
        ("rm_bench", _rm_bench),
    ):
        if j[key]:
            out += table_of(j[key])
    return out


def _accuracies(j: dict[str, Any]) -> str:
    length, sources = j["length"], j["by_source"]
    rows = [
        ("all", j),
        ("chosen is the longer", length["chosen_longer"]),
        ("chosen is the shorter", length["chosen_shorter"]),
        *((f"source: {name}", row) for name, row in sources.items() if len(sources) > 1),
        *((f"rating margin {margin_label(row)}", row) for row in j["by_margin"]),
    ]
    cells = [
        [
            name,
            f"{row['num_pairs']:,}",
            percent(row["accuracy"]),
            interval(row),
            number(row["mean_margin"]),
        ]
        for name, row in rows
    ]
    return page.table(["pairs", "number", "accuracy", "95 % interval", "mean margin"], cells)


def _ranked(r: dict[str, Any]) -> str:
    best = between(r["best_of_n_low"], r["best_of_n_high"])
    prompts = f"{r['num_prompts']:,} ({r['num_unordered']:,})"
    scores = f"blind: {number(r['mean_score'])}; best: {number(r['best_score'])}"
    rows = [
        ["prompts (all scores equal, left out)", prompts, ""],
        [
            "best-of-N accuracy",
            percent(r["best_of_n"]),
            f"95 %: {best}; blind: {percent(r['chance'])}",
        ],
        ["mean score of the pick", number(r["picked_score"]), scores],
        [
            "rank correlation (Kendall tau-b)",
            number(r["kendall_tau_b"]),
            f"{r['num_tau']:,} prompts",
        ],
    ]
    return page.table(["prompts with several responses", "value", "compare"], rows)


def _reward_bench(b: dict[str, Any]) -> str:
    half = b["ties_half"]
    rows = [[n, percent(v), percent(half["sections"][n])] for n, v in b["sections"].items()]
    rows.append(["overall", percent(b["overall"]), percent(half["overall"])])
    head = ["RewardBench section", "ties wrong (as published)", "ties half"]
    return page.table(head, rows) + _missing(b)


def _reward_bench_2(b: dict[str, Any]) -> str:
    rows = [[n, f"{b['num_prompts'][n]:,}", number(v)] for n, v in b["subsets"].items()]
    rows.append(["overall", "", number(b["overall"])])
    out = page.table(["RewardBench 2 subset", "prompts", "score"], rows)
    if t := b["ties"]:
        questions = (
            f"Ties ({t['num_questions']:,} questions, each with one and with several right answers)"
        )
        shares = {
            "every right answer above every wrong one, several right": "tied_accuracy",
            "the same, one right": "ref_accuracy",
            "right and wrong further apart than the right ones among themselves": "preferred",
            "the same, also with the gap where one is right": "preferred_hard",
        }
        out += page.table([questions, "share"], [[n, number(t[k])] for n, k in shares.items()])
    return out + _missing(b)


def _rm_bench(b: dict[str, Any]) -> str:
    half = b["ties_half"]
    rows = {
        **b["domains"],
        f"overall (average {percent(b['average'])})": b,
        f"ties half (average {percent(half['average'])})": half,
    }
    levels = ("easy", "normal", "hard")
    return page.table(
        ["RM-Bench (ties wrong, as published)", *levels],
        [[name, *(percent(row[level]) for level in levels)] for name, row in rows.items()],
    )


def _missing(b: dict[str, Any]) -> str:
    """What of a benchmark the data lack."""
    names = page.escape(", ".join(b["missing"]))
    return f'<p class="sub">Not in the data: {names}</p>\n' if names else ""


def explanations(unit: str) -> str:
    """How the numbers are made; ``unit`` of lengths."""
    rows = [
        (
            "Accuracy",
            (
                "share of pairs whose chosen response gets the higher reward; a tie counts half."
                " The interval is Wilson's; pairs of one prompt are not counted as independent."
            ),
        ),
        (
            "Length",
            (
                f"in {unit}. Bias is called strong where the accuracy differs by 30 points or more"
                " between pairs whose chosen response is the longer and the shorter one, or the"
                " rewards follow length (Spearman 0.7); some, from 10 points on; both only where"
                " the 95 % interval of the difference excludes 0."
            ),
        ),
        (
            "At equal length",
            (
                "a logistic regression of being right on tanh(length difference / its standard "
                "deviation), read at 0 (Dubois et al. 2024, Length-Controlled AlpacaEval)."
            ),
        ),
        (
            "Calibration",
            (
                "sigmoid(margin) read as a probability. ECE over 10 equal bins of confidence; the"
                " temperature is the divisor of all rewards that makes the labels most likely."
            ),
        ),
    ]
    return "<h2>How these numbers are made</h2>\n" + "".join(
        f"<p><b>{page.escape(n)}</b>: {page.escape(t)}</p>\n" for n, t in rows
    )
