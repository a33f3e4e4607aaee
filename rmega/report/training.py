"""Report on a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmega.evaluation.files import read_evaluations
from rmega.evaluation.findings import percent
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
from rmega.report.run_findings import run_findings
from rmega.report.run_metrics import (
    Row,
    column,
    flat,
    head,
    mean_of,
    read_metrics,
    running_median,
    smoothed,
)
from rmega.report.tables import between


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


FEW_POINTS = 30  # so many are marked one by one


def _window(rows: Sequence[Row]) -> int:
    return max(1, min(50, len(rows) // 10))


def _tiles(train: list[Row], evals: list[Row]) -> str:
    rows: list[tuple[str, str, str]] = []
    latest = {row["name"]: row for row in evals}
    for name, last in list(latest.items())[:3]:
        interval = between(last.get("accuracy_low"), last.get("accuracy_high"))
        rows.append((f"Accuracy, {name}", percent(last["accuracy"]), f"95 %: {interval}"))
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
            "Threshold of ties",
            train,
            [("threshold", ("tie_threshold",), PURPLE)],
            "Of --loss rao_kupper: with equal rewards a tie has probability tanh(threshold / 2).",
            raw=True,
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
    with drawing(title, prefix="run ") as (fig, ax):
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
    with drawing("Accuracy on held-out pairs", WIDE, prefix="run ") as (fig, ax):
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
        ax.set(xlabel="step", ylabel="accuracy, 95 % interval")
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
    names = {
        "num_pairs": "pairs",
        "ties": "ties",
        "num_ties": "ties",
        "mean_margin": "mean margin",
        "ece": "ECE",
        "temperature": "temperature",
        "length_gap": "length gap",
        "length_controlled_accuracy": "at equal length",
        "reward_mean": "mean reward",
        "reward_std": "spread of rewards",
    }
    keys = [k for k in names if any(k in row for row in evals)]
    rows = [
        [
            row["name"],
            f"{row['step']:,}",
            percent(row["accuracy"]),
            between(row.get("accuracy_low"), row.get("accuracy_high")),
            *(f"{row[k]:,}" if isinstance(row.get(k), int) else number(row.get(k)) for k in keys),
        ]
        for row in evals
    ]
    return "<h2>Evaluations</h2>\n" + page.table(
        ["set", "step", "accuracy", "95 % interval", *(names[k] for k in keys)], rows
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
