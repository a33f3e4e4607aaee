"""Report on an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmega.evaluation.findings import length_flag, percent
from rmega.evaluation.results import ScoredComparison, pairs_of
from rmega.evaluation.table import number
from rmega.metrics import accuracy
from rmega.report import page, panels, tables
from rmega.report.figures import BLUE, GREEN, GREY, ORANGE, SMALL, WIDE, drawing, require_matplotlib

MAX_TEXT = 1500
MAX_POINTS = 4000


def write_evaluation_report(
    folder: Path,
    subject: str,
    results: dict[str, dict[str, Any]],
    items: dict[str, list[ScoredComparison]],
    worst: dict[str, list[dict[str, Any]]],
) -> Path:
    """FOLDER/report.html for results by set; items and worst mistakes of the same sets. Returns
    the path."""
    require_matplotlib("--report")
    names = list(results)
    # the whole first, then its parts
    names = [n for n in names if n == "all files"] + [n for n in names if n != "all files"]
    body = [f"<h1>Evaluation of {page.escape(subject)}</h1>\n"]
    if len(names) > 1:
        body.append(page.nav("set", names))
        body.append(
            page.table(
                ["set", "pairs", "accuracy", "95 % interval", "length bias", "ECE"],
                [
                    [
                        n,
                        f"{results[n]['num_pairs']:,}",
                        percent(results[n]["accuracy"]),
                        tables.interval(results[n]),
                        length_flag(results[n]["length"]),
                        number(results[n]["calibration"]["ece"]),
                    ]
                    for n in names
                ],
            )
        )
    alone = len(names) == 1
    body += [
        _section(i, name, results[name], items[name], worst[name], alone=alone)
        for i, name in enumerate(names)
    ]
    body.append(tables.explanations(results[names[0]]["length_unit"]))
    return page.write_page(folder / "report.html", f"Evaluation of {subject}", "".join(body))


def _section(
    i: int,
    name: str,
    j: dict[str, Any],
    items: Sequence[ScoredComparison],
    worst: list[dict[str, Any]],
    *,
    alone: bool,
) -> str:
    out = []
    left = sum(j.get("left_out", {}).values())
    sub = f"{name}: {j['num_comparisons']:,} comparisons, {j['num_pairs']:,} pairs" + (
        f"; {left:,} rows could not be used" if left else ""
    )
    sub += "".join(f"; {n:,} responses: {note}" for note, n in sorted(j.get("notes", {}).items()))
    out.append(
        f'<p class="sub">{page.escape(sub)}</p>\n'
        if alone
        else f'<h2 id="set-{i}">{page.escape(name)}</h2><p class="sub">{page.escape(sub)}</p>\n'
    )
    out.append(page.findings(j["findings"]))
    if not j["num_pairs"]:
        return "".join(out)
    out.append(panels.tiles(j))
    out.append(page.figures(_figures(f"set {i} ", j, items)))
    out.append(tables.tables(j))
    out.append(f"<h3>The {len(worst)} worst mistakes</h3>\n" if worst else "<h3>No mistakes</h3>\n")
    if worst:
        out.append(
            '<p class="sub">Pairs in which the rejected response got the higher reward by the'
            " widest margin. Wrong labels show here too. Click to read.</p>\n"
        )
    out += [_mistake(n, w, j["length_unit"]) for n, w in enumerate(worst, 1)]
    return "".join(out)


# ---- figures


def _figures(prefix: str, j: dict[str, Any], items: Sequence[ScoredComparison]) -> list[str]:
    pairs = pairs_of(items)
    return [
        _scores_figure(prefix, pairs),
        _margins_figure(prefix, pairs.d),
        panels.reliability_figure(prefix, j["calibration"]),
        _reward_length_figure(prefix, pairs, j["length_unit"]),
        _length_figure(prefix, pairs, j, wide=not j["by_margin"]),
        panels.margin_figure(prefix, j),
        panels.sources_figure(prefix, j),
    ]


def _range(values: np.ndarray) -> tuple[float, float]:
    """What a histogram shows: all but the outermost half percent on each side, so that one outlier
    hides nothing."""
    low, high = (float(x) for x in np.quantile(values, [0.005, 0.995]))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _scores_figure(prefix: str, pairs: Any) -> str:
    both = np.concatenate([pairs.chosen_reward, pairs.rejected_reward])
    edges = np.linspace(*_range(both), 41)
    with drawing("Rewards of chosen and rejected", prefix=prefix) as (fig, ax):
        for values, color, style, name in (
            (pairs.chosen_reward, BLUE, "-", "chosen"),
            (pairs.rejected_reward, ORANGE, "--", "rejected"),
        ):
            inside = np.clip(values, edges[0], edges[-1])
            ax.hist(inside, edges, color=color, alpha=0.25)
            ax.hist(inside, edges, color=color, histtype="step", linestyle=style, linewidth=1.6)
            ax.axvline(
                np.clip(values.mean(), edges[0], edges[-1]),
                color=color,
                linestyle=style,
                linewidth=1.6,
                label=f"{name}, mean {values.mean():.3g}",
            )
        ax.set(xlabel="reward", ylabel="responses in pairs")
        fig.legend_below()
    return page.figure(
        fig.svg,
        "The further the two lie apart, the better. Values beyond the axis are counted at its "
        "ends.",
    )


def _margins_figure(prefix: str, d: np.ndarray) -> str:
    limit = max(abs(x) for x in _range(d))
    edges = np.linspace(-limit, limit, 41)  # 0 is one of them
    inside = np.clip(d, -limit, limit)
    wrong, right = float((d < 0).mean()), float((d > 0).mean())
    with drawing("Margin: chosen minus rejected", prefix=prefix) as (fig, ax):
        ax.hist(
            inside[inside < 0],
            edges,
            color=ORANGE,
            hatch="///",
            edgecolor="white",
            linewidth=0,
            label=f"wrong: {percent(wrong)}",
        )
        ax.hist(inside[inside > 0], edges, color=BLUE, label=f"right: {percent(right)}")
        ax.axvline(0, color="#1c2026", linewidth=1)
        ax.axvline(
            np.clip(d.mean(), -limit, limit),
            color=GREY,
            linestyle="--",
            label=f"mean {d.mean():.3g}",
        )
        ax.set(xlabel="margin", ylabel="pairs")
        ax.legend()
    return page.figure(
        fig.svg,
        "Pairs left of 0 are mistakes. Wide margins on the left are the mistakes listed below.",
    )


def _reward_length_figure(prefix: str, pairs: Any, unit: str) -> str:
    lengths = np.concatenate([pairs.chosen_length, pairs.rejected_length])
    rewards = np.concatenate([pairs.chosen_reward, pairs.rejected_reward])
    step = max(1, math.ceil(pairs.d.size / MAX_POINTS))
    with drawing("Reward against length", prefix=prefix) as (fig, ax):
        for x, y, color, marker, name in (
            (pairs.chosen_length, pairs.chosen_reward, BLUE, "o", "chosen"),
            (pairs.rejected_length, pairs.rejected_reward, ORANGE, "x", "rejected"),
        ):
            ax.scatter(
                x[::step],
                y[::step],
                s=11,
                c=color,
                marker=marker,
                alpha=0.45,
                linewidths=0.8,
                label=name,
                rasterized=True,
            )
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 11)))
        index = np.clip(
            np.searchsorted(edges, lengths, side="right") - 1, 0, max(edges.size - 2, 0)
        )
        bins = [index == b for b in range(edges.size - 1) if (index == b).any()]
        ax.plot(
            [np.median(lengths[m]) for m in bins],
            [rewards[m].mean() for m in bins],
            "s-",
            color="#1c2026",
            markersize=4,
            linewidth=1.6,
            label="mean of a tenth",
        )
        short, long = np.quantile(lengths, [0.02, 0.98])
        if long > 20 * max(short, 1):
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        low, high = _range(rewards)
        room = 0.06 * (high - low)
        ax.set_ylim(low - room, high + room)
        ax.set(xlabel=f"length of the response in {unit}", ylabel="reward")
        fig.legend_below()
    shown = "" if step == 1 else f" One point in {step} is drawn."
    return page.figure(
        fig.svg, f"A rising line means that longer responses get higher rewards.{shown}"
    )


def _length_figure(prefix: str, pairs: Any, j: dict[str, Any], *, wide: bool) -> str:
    """Accuracy against the ratio of the lengths: flat for a model that does not care."""
    ratio = np.log2(np.maximum(pairs.chosen_length, 1) / np.maximum(pairs.rejected_length, 1))
    edges = np.array([-np.inf, -1.5, -0.75, -0.25, 0.25, 0.75, 1.5, np.inf])
    names = [
        "under\n1/3",
        "1/3 to\n0.6",
        "0.6 to\n0.84",
        "about\nequal",
        "1.2 to\n1.7",
        "1.7 to\n3",
        "over\n3",
    ]
    index = np.searchsorted(edges, ratio, side="right") - 1
    size = WIDE if wide else SMALL
    with drawing("Accuracy by how long the chosen is", size, prefix=prefix) as (fig, ax):
        for b in range(len(names)):
            row = accuracy(pairs.d[index == b], pairs.comparison[index == b])
            if row["num_pairs"]:
                color = ORANGE if b < 3 else GREEN if b > 3 else GREY
                ax.vlines(b, row["accuracy_low"], row["accuracy_high"], color=color, linewidth=2)
                ax.plot(
                    b,
                    row["accuracy"],
                    "os^"[1 if b < 3 else 2 if b > 3 else 0],
                    color=color,
                    markersize=7,
                )
            ax.text(b, 1.07, f"{row['num_pairs']:,}", ha="center", fontsize=8, color=GREY)
        ax.axhline(j["accuracy"], color=BLUE, linestyle="--", linewidth=1.2)
        ax.text(len(names) - 0.4, j["accuracy"], "all", color=BLUE, va="center", fontsize=9)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(-0.04, 1.14))
        ax.set(xlabel="length of chosen / length of rejected", ylabel="accuracy")
    return page.figure(
        fig.svg,
        "Flat: length plays no part. Rising to the right: longer wins, right or wrong. Grey "
        "numbers are pairs, bars 95 % intervals.",
        wide=wide,
    )


# ---- tables, text


def _mistake(n: int, w: dict[str, Any], unit: str) -> str:
    gist = " ".join(str(w["prompt"][-1].get("content", "")).split())[:110] if w["prompt"] else ""
    head = (
        f"<summary><b>{n}.</b> rejected {w['rejected_reward']:.3f} over chosen"
        f" {w['chosen_reward']:.3f} "
        f"(lengths {w['rejected_length']:,} and {w['chosen_length']:,} {unit}) "
        f'<span class="gist">{page.escape(gist)}</span></summary>'
    )
    place = w["where"] + (f"; source {w['source']}" if w["source"] else "")
    sides = "".join(
        f'<div class="{side}"><b>{title}</b>, reward'
        f" {w[f'{side}_reward']:.3f}{_messages(w[side])}</div>"
        for side, title in (
            ("chosen", "Chosen in the data"),
            ("rejected", "Preferred by the model"),
        )
    )
    return (
        f'<details{" open" if n == 1 else ""}>{head}<p class="sub">{page.escape(place)}</p>'
        f'{_messages(w["prompt"])}<div class="two">{sides}</div></details>\n'
    )


def _messages(messages: Sequence[dict[str, Any]]) -> str:
    out = []
    for m in messages:
        text = str(m.get("content", ""))
        cut = (
            f'<div class="cut">… {len(text) - MAX_TEXT:,} more characters</div>'
            if len(text) > MAX_TEXT
            else ""
        )
        out.append(
            f'<div class="message"><div class="role">{page.escape(m.get("role", ""))}</div>'
            f'<div class="text">{page.escape(text[:MAX_TEXT])}</div>{cut}</div>'
        )
    return "".join(out)
