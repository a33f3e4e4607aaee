"""Figures and tables of evaluation results, shared by the reports on evaluations and runs."""

from __future__ import annotations

import math
from typing import Any

from rmega.evaluation.findings import percent
from rmega.evaluation.table import margin_label, number
from rmega.report import page
from rmega.report.figures import BLUE, GREY, ORANGE, WIDE, drawing

MAX_SOURCES = 25


def between(low: float | None, high: float | None) -> str:
    """The ends of an interval, such as "23.2 to 31.7 %"."""
    return f"{100 * (math.nan if low is None else low):.1f} to {percent(high)}"


def interval(row: dict[str, Any]) -> str:
    """The 95 % interval of an accuracy in words."""
    return between(row["accuracy_low"], row["accuracy_high"]) if row["num_pairs"] else "-"


def tiles(j: dict[str, Any]) -> str:
    """Key numbers."""
    length, c = j["length"], j["calibration"]
    return page.tiles(
        [
            (
                "Accuracy (ties half)",
                percent(j["accuracy"]),
                f"95 %: {interval(j)}; {j['num_ties']:,} ties",
            ),
            (
                "Always taking the longer",
                percent(length["always_longer"]),
                "accuracy of that rule on these pairs",
            ),
            (
                "Accuracy at equal length",
                percent(length["controlled_accuracy"]),
                f"95 %: {between(length['controlled_low'], length['controlled_high'])}",
            ),
            (
                "Reward follows length",
                number(length["spearman_within"], 2),
                "Spearman within pairs; 0 = not at all",
            ),
            (
                "Calibration error (ECE)",
                number(c["ece"]),
                f"Brier {number(c['brier'])} (chance level: 0.250)",
            ),
            (
                "Fitted temperature",
                f"{c['temperature']:.3g}" if c["temperature"] else "none",
                (
                    "1 = as sure as it should be; above 1: too sure"
                    if c["temperature"]
                    else c["reason"]
                ),
            ),
            ("Mean margin", number(j["mean_margin"], 3), "reward of chosen minus rejected"),
            ("Swapped labels", percent(j["swap"]["accuracy"]), "must be 100 % minus the accuracy"),
        ]
    )


# ---- figures


def reliability_figure(prefix: str, c: dict[str, Any]) -> str:
    """How often right against how sure, of the result's "calibration". ``prefix`` here and
    below: words before the title that no other figure of the page has."""
    curve = c["reliability"]
    title = "Is it as sure as it should be?"
    rows = {"nrows": 2, "sharex": True, "height_ratios": [3, 1]}
    with drawing(title, prefix=prefix, **rows) as (fig, (ax, counts)):
        ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="perfectly calibrated")
        x, y = [b["confidence"] for b in curve], [b["accuracy"] for b in curve]
        ax.vlines(
            x,
            [b["accuracy_low"] for b in curve],
            [b["accuracy_high"] for b in curve],
            color=BLUE,
            linewidth=1.5,
        )
        ax.plot(x, y, "o-", color=BLUE, label="this model, 95 % interval")
        low = min(0.5, min((b["accuracy_low"] for b in curve), default=0.5))
        ax.set(ylim=(max(0.0, low - 0.03), 1.02), ylabel="how often right")
        ax.legend(loc="lower right" if low > 0.3 else "upper left", fontsize=9)
        counts.bar(
            [b["low"] for b in curve],
            [b["num_pairs"] for b in curve],
            [b["high"] - b["low"] for b in curve],
            align="edge",
            color=GREY,
            edgecolor="white",
        )
        counts.set(ylabel="pairs", xlabel="confidence = sigmoid(|margin|)", xlim=(0.495, 1.005))
    return page.figure(
        fig.svg,
        "Points under the dashed line: surer than right, above it: less sure. Expected "
        f"calibration error {number(c['ece'])}; of its surest pair the model is "
        f"{percent(c['surest'])} sure.",
    )


def bars_figure(
    prefix: str, title: str, rows: dict[str, dict[str, Any]], label: str, caption: str
) -> str:
    """Accuracy with its interval for each of a few named groups; a group without pairs has a place
    but no mark."""
    with drawing(title, prefix=prefix) as (fig, ax):
        for x, row in enumerate(rows.values()):
            if row["num_pairs"]:
                ax.vlines(x, row["accuracy_low"], row["accuracy_high"], color=BLUE, linewidth=2)
                ax.plot(x, row["accuracy"], "o", color=BLUE, markersize=7)
            ax.text(x, 1.04, f"{row['num_pairs']:,}", ha="center", fontsize=8, color=GREY)
        ax.axhline(0.5, color=GREY, linestyle=":")
        ax.set_xticks(range(len(rows)), list(rows), fontsize=9)
        ax.set(xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1.1), xlabel=label, ylabel="accuracy")
    return page.figure(fig.svg, caption)


def margin_figure(prefix: str, j: dict[str, Any]) -> str:
    """Accuracy by margin of human ratings; "" where there are none."""
    if not j["by_margin"]:
        return ""
    return bars_figure(
        prefix,
        "Accuracy by margin of the ratings",
        {margin_label(row): row for row in j["by_margin"]},
        "difference of the two ratings",
        "Where people saw a wider gap, a good model is more often right. Bars are 95 % intervals.",
    )


def sources_figure(prefix: str, j: dict[str, Any]) -> str:
    """Accuracy by source, the largest ``MAX_SOURCES`` of them."""
    rows = sorted(j["by_source"].items(), key=lambda item: -item[1]["num_pairs"])
    shown = sorted(rows[:MAX_SOURCES], key=lambda item: item[1]["accuracy"])
    size = (WIDE[0], 1.1 + 0.27 * len(shown))
    with drawing("Accuracy by source", size, prefix=prefix) as (fig, ax):
        for y, (_, row) in enumerate(shown):
            color = (
                BLUE
                if row["accuracy_low"] > 0.5
                else ORANGE
                if row["accuracy_high"] < 0.5
                else GREY
            )
            ax.hlines(y, row["accuracy_low"], row["accuracy_high"], color=color, linewidth=2.2)
            ax.plot(row["accuracy"], y, "o", color=color, markersize=7)
        ax.axvline(0.5, color=GREY, linestyle=":")
        label = f"all: {percent(j['accuracy'])}"
        ax.axvline(j["accuracy"], color=BLUE, linestyle="--", linewidth=1.2, label=label)
        ax.set_yticks(
            range(len(shown)),
            [f"{n if len(n) <= 44 else n[:43] + '…'}  ({row['num_pairs']:,})" for n, row in shown],
        )
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.6, len(shown) - 0.4))
        ax.set_xlabel("accuracy, 95 % interval (pairs in brackets); dotted: chance level")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    more = (
        f" The {len(shown)} largest of {len(rows)} sources; all are in the table."
        if len(rows) > len(shown)
        else ""
    )
    return page.figure(
        fig.svg,
        f"Blue: better than chance. Orange: worse. Grey: neither is certain.{more}",
        wide=True,
    )


# ---- tables, text


def tables(j: dict[str, Any]) -> str:
    """Accuracies of the whole and its parts; ranked prompts and public benchmarks where there are
    any."""
    length = j["length"]
    out = [
        "<h3>Numbers</h3>\n",
        page.table(
            ["pairs", "number", "accuracy", "95 % interval", "mean margin"],
            [
                [
                    name,
                    f"{row['num_pairs']:,}",
                    percent(row["accuracy"]),
                    interval(row),
                    number(row["mean_margin"]),
                ]
                for name, row in [
                    ("all", j),
                    ("chosen is the longer", length["chosen_longer"]),
                    ("chosen is the shorter", length["chosen_shorter"]),
                    *(
                        (f"source: {n}", row)
                        for n, row in j["by_source"].items()
                        if len(j["by_source"]) > 1
                    ),
                    *((f"rating margin {margin_label(row)}", row) for row in j["by_margin"]),
                ]
            ],
        ),
    ]
    if j["ranked"]:
        r = j["ranked"]
        out.append(
            page.table(
                ["prompts with several responses", "value", "compare"],
                [
                    [
                        "prompts (all scores equal, left out)",
                        f"{r['num_prompts']:,} ({r['num_unordered']:,})",
                        "",
                    ],
                    [
                        "best-of-N accuracy",
                        percent(r["best_of_n"]),
                        (
                            f"95 %: {between(r['best_of_n_low'], r['best_of_n_high'])}; blind:"
                            f" {percent(r['chance'])}"
                        ),
                    ],
                    [
                        "mean score of the pick",
                        number(r["picked_score"]),
                        f"blind: {number(r['mean_score'])}; best: {number(r['best_score'])}",
                    ],
                    [
                        "rank correlation (Kendall tau-b)",
                        number(r["kendall_tau_b"]),
                        f"{r['num_tau']:,} prompts",
                    ],
                ],
            )
        )
    if j["reward_bench"]:
        b = j["reward_bench"]
        half = b["ties_half"]
        rows = [[n, percent(v), percent(half["sections"][n])] for n, v in b["sections"].items()]
        rows.append(["overall", percent(b["overall"]), percent(half["overall"])])
        head = ["RewardBench section", "ties wrong (as published)", "ties half"]
        out.append(page.table(head, rows))
        if b["missing"]:
            out.append(
                f'<p class="sub">Not in the data: {page.escape(", ".join(b["missing"]))}</p>\n'
            )
    if j["reward_bench_2"]:
        b = j["reward_bench_2"]
        rows = [[n, f"{b['num_prompts'][n]:,}", number(v)] for n, v in b["subsets"].items()]
        out.append(
            page.table(
                ["RewardBench 2 subset", "prompts", "score"],
                [*rows, ["overall", "", number(b["overall"])]],
            )
        )
        if b["ties"]:
            t = b["ties"]
            out.append(
                page.table(
                    [
                        (
                            f"Ties ({t['num_questions']:,} questions, each with one and with"
                            " several right answers)"
                        ),
                        "share",
                    ],
                    [
                        [
                            "every right answer above every wrong one, several right",
                            number(t["tied_accuracy"]),
                        ],
                        ["the same, one right", number(t["ref_accuracy"])],
                        [
                            "right and wrong further apart than the right ones among themselves",
                            number(t["preferred"]),
                        ],
                        [
                            "the same, also with the gap where one is right",
                            number(t["preferred_hard"]),
                        ],
                    ],
                )
            )
        if b["missing"]:
            out.append(
                f'<p class="sub">Not in the data: {page.escape(", ".join(b["missing"]))}</p>\n'
            )
    if j["rm_bench"]:
        b = j["rm_bench"]
        out.append(
            page.table(
                ["RM-Bench (ties wrong, as published)", "easy", "normal", "hard"],
                [
                    [n, *(percent(v[k]) for k in ("easy", "normal", "hard"))]
                    for n, v in [
                        *b["domains"].items(),
                        (f"overall (average {percent(b['average'])})", b),
                        (
                            f"ties half (average {percent(b['ties_half']['average'])})",
                            b["ties_half"],
                        ),
                    ]
                ],
            )
        )
    return "".join(out)


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
