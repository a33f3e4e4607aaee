"""Sections on the validation sets, for the report on a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rmega.evaluation.findings import percent
from rmega.report import page, panels, tables
from rmega.report.figures import BLUE, GREY, ORANGE, drawing

Result = dict[str, Any]


def sections(evaluations: Mapping[str, Mapping[int, Result]], order: Iterable[str] = ()) -> str:
    """A section for each set of ``rmega.evaluation.files.read_evaluations``, those of ``order``
    first; "" for none."""
    names = [n for n in order if n in evaluations]
    names += [n for n in evaluations if n not in names]
    if not names:
        return ""
    out = []
    if len(names) > 1:
        out.append(page.nav("held-out", names))
    out += [_section(i, name, evaluations[name]) for i, name in enumerate(names)]
    last = evaluations[names[0]]
    return "".join([*out, tables.explanations(last[max(last)]["length_unit"])])


def _section(i: int, name: str, steps: Mapping[int, Result]) -> str:
    j, prefix = steps[max(steps)], f"held-out {i} "
    sub = (
        f"{j['num_comparisons']:,} comparisons, {j['num_pairs']:,} pairs of {j['data']}; evaluated"
        f" after step {max(steps):,}"
    )
    out = [
        (
            f'<h2 id="held-out-{i}">Held out: {page.escape(name)}</h2>\n<p'
            f' class="sub">{page.escape(sub)}</p>\n'
        ),
        page.findings(j["findings"]),
    ]
    if j["num_pairs"]:
        out += [panels.tiles(j), page.figures(_figures(prefix, j, steps)), tables.tables(j)]
    return "".join(out)


def _figures(prefix: str, j: Result, steps: Mapping[int, Result]) -> list[str]:
    return [
        panels.reliability_figure(prefix, j["calibration"]),
        _length_figure(prefix, j),
        panels.margin_figure(prefix, j),
        *_curves(prefix, steps),
        panels.sources_figure(prefix, j),
    ]


def _length_figure(prefix: str, j: Result) -> str:
    length = j["length"]
    rule = max(length["always_longer"], 1 - length["always_longer"])
    return panels.bars_figure(
        prefix,
        "Accuracy by which is the longer",
        {
            "chosen is the shorter": length["chosen_shorter"],
            "all": j,
            "chosen is the longer": length["chosen_longer"],
        },
        f"length in {j['length_unit']}",
        "Level: length plays no part. Rising to the right: longer wins, right or wrong. The best"
        f" rule that reads length alone gets {percent(rule)}. Grey numbers are pairs, bars 95 %"
        " intervals.",
    )


def _curves(prefix: str, steps: Mapping[int, Result]) -> list[str]:
    """Length gap and calibration error over the steps, where there is more than one evaluation."""
    known = [s for s in sorted(steps) if steps[s]["num_pairs"]]
    if len(known) < 2:
        return []

    def column(*path: str) -> list[float]:
        return [_value(steps[s], path) for s in known]

    out = []
    gap = column("length", "gap")
    if not all(map(math.isnan, gap)):
        with drawing("Length gap over the steps", prefix=prefix) as (fig, ax):
            low, high = column("length", "gap_low"), column("length", "gap_high")
            ax.fill_between(known, low, high, color=BLUE, alpha=0.13, linewidth=0)
            ax.plot(known, gap, "o-", color=BLUE, markersize=5)
            ax.axhline(0, color=GREY, linestyle=":")
            ax.set(xlabel="step", ylabel="difference of accuracies")
        out.append(
            page.figure(
                fig.svg,
                "Accuracy where the chosen response is the longer one minus accuracy where it "
                "is the shorter one, with its 95 % interval; dotted: no length bias.",
            )
        )
    with drawing("Calibration error over the steps", prefix=prefix) as (fig, ax):
        ece = column("calibration", "ece")
        ax.plot(known, ece, "o-", color=BLUE, markersize=5, label="as it is")
        scaled = column("calibration", "ece_scaled")
        if not all(map(math.isnan, scaled)):
            ax.plot(
                known, scaled, "s--", color=ORANGE, markersize=5, label="with the best temperature"
            )
        ax.set_ylim(bottom=0)
        ax.set(xlabel="step", ylabel="ECE")
        ax.legend()
    out.append(
        page.figure(
            fig.svg, "Expected calibration error: how far being sure and being right lie apart."
        )
    )
    return out


def _value(j: Any, path: Iterable[str]) -> float:
    for key in path:
        j = j[key]
    return math.nan if j is None else float(j)
