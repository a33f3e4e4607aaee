"""What the metrics of a run say: accuracy, loss, stability, rewards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmega.evaluation.findings import finding, percent
from rmega.report.run_metrics import Row, column, flat, mean_of


def _setting(config: Row, name: str) -> Any:
    return next((v for k, v in flat(config).items() if k.split(".")[-1] == name), None)


def run_findings(train: list[Row], evals: list[Row], config: Row) -> list[dict[str, str]]:
    """``finding``s about a run."""
    out = []
    for name in dict.fromkeys(row["name"] for row in evals):
        out.append(_eval_finding(name, [row for row in evals if row["name"] == name]))
    if train:
        out += [_loss_finding(train), *_stability_findings(train), *_score_findings(train, config)]
    if not evals:
        out.append(
            finding(
                "evaluation",
                "warn",
                "No evaluation on held-out data: the training "
                "accuracy says little (--valid-data-path, --eval-interval).",
            )
        )
    return out


def _eval_finding(name: str, rows: list[Row]) -> dict[str, str]:
    last, best = rows[-1], max(rows, key=lambda r: r["accuracy"])
    low, high = last.get("accuracy_low", math.nan), last.get("accuracy_high", math.nan)
    text = (
        f"{name}: accuracy {percent(last['accuracy'])} at step {last['step']:,} "
        f"(95 % interval {100 * low:.1f} to {percent(high)}"
    )
    text += f", {last['num_pairs']:,} pairs)." if last.get("num_pairs") else ")."
    if high < 0.5:
        return finding("evaluation", "bad", f"{text} Worse than chance.")
    if low <= 0.5:
        return finding(
            "evaluation",
            "bad" if len(rows) > 1 else "warn",
            f"{text} That is not distinguishable from chance.",
        )
    if best is not last and best.get("accuracy_low", 0) > high:
        return finding(
            "evaluation",
            "warn",
            f"{text} It was better before: "
            f"{percent(best['accuracy'])} at step {best['step']:,}; use that checkpoint.",
        )
    where = (
        f"the best was {percent(best['accuracy'])} at step {best['step']:,}, within the interval"
    )
    if best["accuracy"] == last["accuracy"]:
        where = "the best of the run" + (
            "" if best is last else f", as it was at step {best['step']:,} already"
        )
    return finding("evaluation", "good", f"{text} Better than chance; {where}.")


def _loss_finding(train: list[Row]) -> dict[str, str]:
    loss, part = column(train, "loss"), max(1, len(train) // 10)
    if np.isnan(loss[-part:]).all():
        return finding("loss", "bad", "The loss is not a number at the end of the run.")
    first, last = mean_of(loss[:part]), mean_of(loss[-part:])
    acc = column(train, "acc")
    tenth = part > 1
    text = (
        f"Training loss went from {first:.4f} to {last:.4f} "
        f"({'means of the first and last tenth' if tenth else 'first and last row'})"
    )
    if not np.isnan(acc[-part:]).all():
        text += (
            f"; training accuracy of the last {'tenth' if tenth else 'row'}"
            f" {percent(mean_of(acc[-part:]))}"
        )
    text += "."
    if len(train) < 20:
        return finding("loss", "note", f"{text} Too few rows to tell.")
    return finding(
        "loss",
        "good" if last < first else "warn",
        text if last < first else f"{text} It did not fall.",
    )


def _stability_findings(train: list[Row]) -> list[dict[str, str]]:
    loss, norm, skipped = (
        column(train, "loss"),
        column(train, "grad_norm"),
        np.nansum(column(train, "skipped")),
    )
    broken = int(np.isnan(loss).sum())
    out = []
    if broken or skipped:
        out.append(
            finding(
                "stability",
                "bad" if broken else "warn",
                f"{broken:,} rows without a finite loss, {int(skipped):,} updates skipped.",
            )
        )
    known = norm[~np.isnan(norm)]
    if known.size >= 20:
        spikes = int((known > 10 * np.median(known)).sum())
        if spikes:
            out.append(
                finding(
                    "stability",
                    "warn" if spikes > 0.01 * known.size else "note",
                    f"The gradient norm exceeded ten times its median ({np.median(known):.3g})"
                    f" in {spikes:,} of {known.size:,} rows; the largest is {known.max():.3g}.",
                )
            )
    return out


def _score_findings(train: list[Row], config: Row) -> list[dict[str, str]]:
    """Whether chosen and rejected have parted by more than two standard errors over the last
    rows."""
    part = max(1, len(train) // 10)
    chosen, rejected = column(train, "chosen_score_mean"), column(train, "rejected_score_mean")
    c, r = mean_of(chosen[-part:]), mean_of(rejected[-part:])
    if math.isnan(c) or math.isnan(r):
        return []
    text = f"Mean reward at the end: chosen {c:.3f}, rejected {r:.3f}, {c - r:.3f} apart."
    if max(abs(c), abs(r)) > 5:
        barrier = _setting(config, "penalty") == "log_barrier"
        more = " The log barrier means to keep rewards within 5." if barrier else ""
        return [finding("rewards", "warn", f"{text} They have drifted far from 0.{more}")]
    apart = (chosen - rejected)[-max(part, 5) :]
    apart = apart[~np.isnan(apart)]
    if apart.size > 2 and abs(apart.mean()) <= 2 * apart.std(ddof=1) / math.sqrt(apart.size):
        return [finding("rewards", "note", f"{text} The batches differ by more than that.")]
    return [finding("rewards", "good" if c > r else "bad", text)]
