"""The last page of the quick start: what was reached, how fast, where it lies and what to try
next."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # also from a checkout that is not installed

from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    output: Path
    """The quick start's output folder."""
    seconds: float
    """What the whole line took after the set-up."""
    python: str = "python"
    """Interpreter to name in the commands to try."""


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their longest cell; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def accuracy(row: dict) -> str:
    return f"{row['accuracy']:.3f}  [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def summary(rows: list[dict], output: Path, seconds: float) -> str:
    """The table of a run, from the rows of its metrics.jsonl."""
    evaluations: dict[str, list[dict]] = {}
    for row in rows:
        if row["type"] == "eval":
            evaluations.setdefault(row["name"], []).append(row)
    training = [row for row in rows if row["type"] == "train"]
    if not training or not evaluations:
        raise ValueError(f"{output}/run/metrics.jsonl: no training or no evaluation in it")
    cells = [("held-out accuracy", "before", "after", "pairs")]
    for name, found in evaluations.items():
        cells.append((name, accuracy(found[0]), accuracy(found[-1]), f"{found[-1]['num_pairs']:,}"))
    pairs = sum(row["num_pairs"] for row in training)
    spent = sum(row["num_pairs"] / row["pairs_per_second"] for row in training)
    tokens = sum(row["num_tokens"] for row in training)
    last = training[-1]
    lines = [
        table(cells),
        "in brackets: 95 % interval (Wilson); a new head starts at zero, where every pair is a tie",
    ]
    lines += [
        f"{label:<10} {text}"
        for label, text in (
            (
                "speed",
                (
                    f"{pairs / spent:.2f} pairs/s, {tokens / spent:,.0f} tokens/s over "
                    f"{last['step']} step{'s' * (last['step'] != 1)}"
                ),
            ),
            ("time", f"{clock(spent)} of training, {clock(seconds)} in all after the set-up"),
            ("log", f"{output}/run/metrics.jsonl"),
            ("checkpoint", f"{output}/run/iter_{last['step']:07d}"),
            ("model", f"{output}/export (Hugging Face folder)"),
        )
    ]
    for name, found in evaluations.items():
        if found[-1]["accuracy_low"] <= 0.5:
            lines.append(
                f"The interval of {name} reaches down to 0.5: what was learned may be chance. Train"
                " longer (--epochs), on more data, or hold out more."
            )
    return "\n".join(lines)


def next_commands(output: Path, python: str) -> str:
    python = shlex.quote(python)
    return "\n".join(
        [
            "Next:",
            (
                '  score your own conversations, lines of {"messages": [...]} or of any preference'
                " schema:"
            ),
            f"    {python} tools/score.py --model {output}/export --input FILE.jsonl",
            "  the same line on your own preferences, from another model:",
            "    bash examples/quickstart.sh --data FILE_OR_HUB_NAME --model FOLDER_OR_HUB_NAME",
            "  all that can be set in a training:",
            f"    {python} examples/pretrain_reward.py --help",
        ]
    )


def main(args: Args) -> int:
    path = args.output / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print(summary(rows, args.output, args.seconds))
    print()
    print(next_commands(args.output, args.python))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(parse_args(Args, description=__doc__))))
