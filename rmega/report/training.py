"""Report on a training run."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmega.evaluation.files import read_evaluations
from rmega.evaluation.results import finding, percent
from rmega.evaluation.table import number
from rmega.report import held_out, page
from rmega.report.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    WIDE,
    drawing,
    require_matplotlib,
)

Row = dict[str, Any]


def read_metrics(run: str | Path) -> tuple[list[Row], list[Row]]:
    """Rows of RUN/metrics.jsonl: (training, evaluation), each in the order of steps.

    A step that was written again after a resume counts once, as it was written last. A line cut
    short at the very end (the run was stopped while writing, or still writes) is left out; anything
    else broken is a ValueError.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a run writes it into its --save folder")
    train: dict[int, Row] = {}
    evals: dict[tuple[int, str], Row] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            if n == len(lines):
                continue
            raise ValueError(f"{path}:{n}: not a row of metrics") from None
        if row.get("type") == "train":
            train[step] = row
        elif row.get("type") == "eval":
            evals[step, str(row.get("name", "valid"))] = {"name": "valid", **row}
    if not train and not evals:
        raise ValueError(f"{path}: no rows of training or evaluation yet")
    return [train[s] for s in sorted(train)], [evals[k] for k in sorted(evals)]


def column(rows: Sequence[Row], *names: str) -> np.ndarray:
    """A column [rows] as floats, NaN where a row has none of the names."""
    values = [
        next((row[n] for n in names if isinstance(row.get(n), (int, float))), math.nan)
        for row in rows
    ]
    return np.array(values, dtype=np.float64)


def mean_of(y: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    return float(np.nanmean(y)) if not np.isnan(y).all() else math.nan


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the last ``window`` values, NaN left out. [n] -> [n]"""
    known = ~np.isnan(y)
    total, count = np.cumsum(np.where(known, y, 0.0)), np.cumsum(known)
    total[window:], count[window:] = (
        total[window:] - total[:-window],
        count[window:] - count[:-window],
    )
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def running_median(y: np.ndarray, window: int) -> np.ndarray:
    """Median of the last ``window`` values, NaN left out. [n] -> [n]"""
    out = np.full(y.shape, math.nan)
    for i in range(y.size):
        part = y[max(0, i - window + 1) : i + 1]
        part = part[~np.isnan(part)]
        out[i] = np.median(part) if part.size else math.nan
    return out


def write_run_report(run: str | Path, out: str | Path | None = None) -> Path:
    """RUN/report.html (or ``out``) from RUN/metrics.jsonl, config.json and evaluations. Returns the
    path."""
    require_matplotlib("report_run.py")
    run = Path(run)
    train, evals = read_metrics(run)
    config = _config(run)
    name = str(run)
    body = [
        f"<h1>Training run {page.escape(name)}</h1>\n",
        *(f'<p class="sub">{page.escape(line)}</p>\n' for line in head(train, config)),
        page.findings(run_findings(train, evals, config)),
        _tiles(train, evals),
        page.figures(_figures(train, evals)),
        _eval_table(evals),
        held_out.sections(read_evaluations(run), dict.fromkeys(row["name"] for row in evals)),
        _settings(config),
    ]
    return page.write_page(
        Path(out) if out else run / "report.html", f"Training run {name}", "".join(body)
    )


def _config(run: Path) -> Row:
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{run / 'config.json'}: not JSON") from None
    return config if isinstance(config, dict) else {}


def flat(config: Row, prefix: str = "") -> Row:
    """Nested settings as one level, "train.lr": groups are joined by a dot."""
    out: Row = {}
    for key, value in config.items():
        out |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return out


def _setting(config: Row, name: str) -> Any:
    return next((v for k, v in flat(config).items() if k.split(".")[-1] == name), None)


FEW_POINTS = 30  # so many are marked one by one


def _window(rows: Sequence[Row]) -> int:
    return max(1, min(50, len(rows) // 10))


# ---- findings


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


def _tiles(train: list[Row], evals: list[Row]) -> str:
    rows: list[tuple[str, str, str]] = []
    latest = {row["name"]: row for row in evals}
    for name, last in list(latest.items())[:3]:
        rows.append(
            (
                f"Accuracy, {name}",
                percent(last["accuracy"]),
                (
                    f"95 %: {100 * last.get('accuracy_low', math.nan):.1f} to"
                    f" {percent(last.get('accuracy_high'))}"
                ),
            )
        )
    if train:
        part = max(1, len(train) // 10)
        rate, seconds = column(train, "pairs_per_second"), column(train, "time")
        tokens, norm = column(train, "num_tokens"), column(train, "grad_norm")
        loss = number(mean_of(column(train, "loss")[-part:]), 4)
        rows += [
            (f"Loss, last {'tenth' if part > 1 else 'row'}", loss, "training"),
            ("Pairs per second", _median(rate), f"median; {_median(seconds)} s per step"),
            ("Gradient norm", _median(norm), "median"),
        ]
        if not np.isnan(tokens).all():
            rows.append(("Tokens", f"{np.nansum(tokens):,.0f}", "computed in all rows"))
    return page.tiles(rows)


def _median(x: np.ndarray) -> str:
    return "-" if np.isnan(x).all() else f"{np.nanmedian(x):.3g}"


# ---- figures


def _figures(train: list[Row], evals: list[Row]) -> list[str]:
    out = []
    if evals:
        out.append(_eval_figure(evals))
    if not train:
        return out
    out += [
        _curve(
            "Loss",
            train,
            [("loss", ("loss",), BLUE)],
            "Each logged interval; the bold line is a running mean.",
        ),
        _curve(
            "Training accuracy",
            train,
            [("accuracy", ("acc", "accuracy"), GREEN)],
            "Share of training pairs ranked right when they were seen; 0.5 is chance.",
            line=0.5,
        ),
        _curve(
            "Mean rewards",
            train,
            [
                ("chosen", ("chosen_score_mean",), BLUE),
                ("rejected", ("rejected_score_mean",), ORANGE),
            ],
            "They should part and stay near 0.",
        ),
        _curve(
            "Learning rate",
            train,
            [("learning rate", ("lr",), PURPLE)],
            "As the schedule gave it.",
            raw=True,
        ),
        _curve(
            "Gradient norm",
            train,
            [("gradient norm", ("grad_norm",), BLUE)],
            "Before clipping; spikes point at odd batches or a learning rate that is too high.",
            log=True,
        ),
        _curve(
            "Throughput",
            train,
            [("pairs per second", ("pairs_per_second",), GREEN)],
            "Pairs per second; a step down means a slow node, a full disk or another job.",
            zero=True,
        ),
    ]
    return [svg for svg in out if svg]


def _curve(
    title: str,
    train: list[Row],
    series: Sequence[tuple[str, tuple[str, ...], str]],
    caption: str,
    *,
    line: float | None = None,
    log: bool = False,
    raw: bool = False,
    zero: bool = False,
) -> str:
    steps = column(train, "step")
    columns = [(label, column(train, *names), color) for label, names, color in series]
    if all(np.isnan(y).all() for _, y, _ in columns):
        return ""
    with drawing(f"run {title}") as fig:
        ax = fig.axes
        ax.set_title(title)
        for (label, y, color), style in zip(columns, ("-", "--"), strict=False):
            window = 1 if raw else _window(train)
            if window > 1:
                ax.plot(steps, y, color=color, alpha=0.25, linewidth=0.8)
            # one spike would lift a running mean for a whole window
            mean = running_median(y, window) if log else smoothed(y, window)
            ax.plot(
                steps,
                mean,
                color=color,
                linestyle=style,
                linewidth=1.8,
                label=label,
                marker="o" if len(train) <= FEW_POINTS else None,
                markersize=4,
            )
        if line is not None:
            ax.axhline(line, color=GREY, linestyle=":")
        every = np.concatenate([y[~np.isnan(y)] for _, y, _ in columns])
        if log and every.min() > 0 and every.max() > 8 * every.min():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        if raw:  # 2.5e-05 beside the tick, not a power of ten in the corner for all of them
            ax.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
        if zero:
            ax.set_ylim(0, 1.1 * max(float(np.quantile(every, 0.99)), 1e-9))
        if len(columns) > 1:
            ax.legend()
        ax.set_xlabel("step")
    return page.figure(fig.svg, caption)


def _eval_figure(evals: list[Row]) -> str:
    names = list(dict.fromkeys(row["name"] for row in evals))
    with drawing("run Evaluation", WIDE) as fig:
        ax = fig.axes
        ax.set_title("Accuracy on held-out pairs")
        for i, name in enumerate(names[:8]):
            rows = [row for row in evals if row["name"] == name]
            color = (BLUE, ORANGE, GREEN, PURPLE, "#56b4e9", "#8a6d00", GREY, "#1c2026")[i]
            steps, y = column(rows, "step"), column(rows, "accuracy")
            low, high = column(rows, "accuracy_low"), column(rows, "accuracy_high")
            ax.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
            ax.vlines(steps, low, high, color=color, linewidth=1)
            ax.plot(
                steps,
                y,
                color=color,
                marker="os^Dv<>P"[i],
                markersize=5,
                linewidth=1.8,
                label=f"{name}: {percent(y[-1])}",
            )
        ax.axhline(0.5, color=GREY, linestyle=":")
        ax.set_xlabel("step")
        ax.set_ylabel("accuracy, 95 % interval")
        ax.legend(loc="best")
    more = f" The first 8 of {len(names)} sets; all are in the table." if len(names) > 8 else ""
    return page.figure(
        fig.svg,
        f"Dotted: chance level. Where intervals overlap, two steps may not differ.{more}",
        wide=True,
    )


def _eval_table(evals: list[Row]) -> str:
    if not evals:
        return ""
    keys = [
        k
        for k in (
            "num_pairs",
            "ties",
            "num_ties",
            "mean_margin",
            "ece",
            "temperature",
            "length_gap",
            "length_controlled_accuracy",
            "reward_mean",
            "reward_std",
        )
        if any(k in row for row in evals)
    ]
    names = {
        "num_pairs": "pairs",
        "num_ties": "ties",
        "mean_margin": "mean margin",
        "ece": "ECE",
        "length_gap": "length gap",
        "length_controlled_accuracy": "at equal length",
        "reward_mean": "mean reward",
        "reward_std": "spread of rewards",
    }
    rows = [
        [
            row["name"],
            f"{row['step']:,}",
            percent(row["accuracy"]),
            f"{100 * row.get('accuracy_low', math.nan):.1f} to {percent(row.get('accuracy_high'))}",
            *(f"{row[k]:,}" if isinstance(row.get(k), int) else number(row.get(k)) for k in keys),
        ]
        for row in evals
    ]
    return "<h2>Evaluations</h2>\n" + page.table(
        ["set", "step", "accuracy", "95 % interval", *(names.get(k, k) for k in keys)], rows
    )


def _settings(config: Row) -> str:
    if not config:
        return ""
    rows = [
        [k, "" if v is None else json.dumps(v) if isinstance(v, (list, bool)) else v]
        for k, v in flat(config).items()
    ]
    return (
        f"<h2>Settings</h2>\n<details><summary>{len(rows)} settings of config.json</summary>"
        f"{page.table(['setting', 'value'], rows)}</details>\n"
    )


def head(train: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """[progress, make], from the training rows in the order of steps and config.json; a line that
    has nothing to say is left out. A run of an earlier version says less in its files."""
    run, settings = config.get("run", {}), config.get("train", {})
    done: list[str] = []
    if train:
        step, planned = train[-1]["step"], run.get("steps") or settings.get("train_steps")
        if planned is None:
            done.append(f"step {step:,}")
        else:
            state = "finished" if step >= planned else "unfinished, or still running"
            done.append(f"{state}: {step:,} of {planned:,} steps")
        if seconds := time_taken(train):
            done.append(str(datetime.timedelta(seconds=round(seconds))))
        pairs = sum(row.get("num_pairs") or row.get("num_samples") or 0 for row in train)
        if pairs:
            done.append(f"{pairs:,} pairs seen")
    made = [
        str(config.get("model", {}).get("hf_model") or ""),
        run.get("layout", ""),
        run.get("precision", ""),
    ]
    return [line for line in ("; ".join(filter(None, done)), "; ".join(filter(None, made))) if line]


def time_taken(train: Sequence[dict[str, Any]]) -> float:
    """Seconds of the run up to its last row: as the row says, or the sum of its steps (a row has
    their mean since the row before it)."""
    if said := train[-1].get("train_seconds"):
        return said
    steps = [0, *(row["step"] for row in train)]
    return sum(
        (row.get("time") or 0.0) * (end - start)
        for row, start, end in zip(train, steps, steps[1:], strict=False)
    )
