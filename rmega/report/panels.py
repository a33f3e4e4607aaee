"""Key numbers and figures of evaluation results, shared by the reports on evaluations and runs."""

from __future__ import annotations

from typing import Any

from rmega.evaluation.findings import percent
from rmega.evaluation.table import margin_label, number
from rmega.report import page
from rmega.report.figures import BLUE, GREY, ORANGE, WIDE, drawing
from rmega.report.tables import between, interval

MAX_SOURCES = 25


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
