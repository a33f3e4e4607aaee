"""Two steps of quickstart.sh: ``check`` reads its flags before anything is downloaded, ``table``
prints its results.

    python examples/quickstart.py check MODEL DATA VALID_DATA NPROC TP [flags of pretrain_reward.py]
    python examples/quickstart.py table OUTPUT SECONDS
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from rmega.cli import parse_args, run_tool  # noqa: E402
from rmega.config import TrainingConfig  # noqa: E402
from rmega.evaluation.table import interval  # noqa: E402

OWN = "--model --data --valid-data --output --steps --epochs --max-length --nproc --tp".split()


def check(model: str, data: str, valid_data: str, nproc: str, tp: str, *flags: str) -> None:
    """ValueError for paths that do not exist and flags that training does not have."""
    from rmega.hub import check_folder_or_hub_name
    from rmega.preferences.resolve import resolve

    tp = tp or ("1" if nproc and int(nproc) % 2 else "2")  # as quickstart.sh chooses without GPUs
    fixed = "--data-path demo --valid-data-path demo --save demo --global-batch-size 16".split()
    given = [*fixed, "--hf-model", model or "demo", "--tp", tp, *flags]
    config = parse_args(TrainingConfig, given, prog="examples/quickstart.sh", also=OWN)
    layout = config.parallel
    shards = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    config.check(int(nproc) if nproc else shards * (layout.data_parallel_size or 1))
    if model:
        check_folder_or_hub_name(model, "--model")
    for flag, value in (("--data", data), ("--valid-data", valid_data)):
        if value:
            resolve([value], flag=flag)


def table(output: str, seconds: str) -> None:
    """What was reached, how fast, where it is and what to try next."""
    from rmega.report.run_metrics import read_metrics

    training, evaluations = read_metrics(f"{output}/run")
    if not training or not evaluations:
        raise ValueError(f"{output}/run/metrics.jsonl: no training or no evaluation in it")
    print(summary(training, evaluations, output, float(seconds)))
    python = shlex.quote(sys.executable)
    print(f"""
Next:
  score your own conversations, lines of {{"messages": [...]}} or of any preference schema:
    {python} tools/score.py --model {output}/export --input FILE.jsonl
  the same on your own preferences, from another model:
    bash examples/quickstart.sh --data FILE_OR_HUB_NAME --model FOLDER_OR_HUB_NAME
  all that can be set in a training:
    {python} examples/pretrain_reward.py --help""")


def summary(training: list[dict], evaluations: list[dict], output: str, seconds: float) -> str:
    """The table of a run, from the rows of its metrics.jsonl."""
    cells, notes = [("held-out accuracy", "before", "after", "pairs")], []
    for name in dict.fromkeys(row["name"] for row in evaluations):
        first, *_, last = [row for row in evaluations if row["name"] == name] * 2
        cells.append((name, interval(first), interval(last), f"{last['num_pairs']:,}"))
        if last["accuracy_low"] <= 0.5:
            notes.append(
                f"The interval of {name} reaches down to 0.5: what was learned may be chance."
                " Train longer (--epochs), on more data, or hold out more."
            )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    rule = "-" * max(map(len, lines))
    pairs = sum(row["num_pairs"] for row in training)
    spent = sum(row["num_pairs"] / row["pairs_per_second"] for row in training)
    tokens, steps = sum(row["num_tokens"] for row in training), training[-1]["step"]
    train_time, time = (f"{int(s) // 60}:{int(s) % 60:02d} min" for s in (spent, seconds))
    return "\n".join(
        [rule, lines[0], rule, *lines[1:], rule]
        + ["in parentheses: 95 % interval (Wilson); a new head starts at zero: every pair is a tie"]
        + [f"speed      {pairs / spent:.2f} pairs/s, {tokens / spent:,.0f} tokens/s, {steps} steps"]
        + [f"time       {train_time} of training, {time} in all after the set-up"]
        + [f"log        {output}/run/metrics.jsonl"]
        + [f"checkpoint {output}/run/iter_{steps:07d}"]
        + [f"model      {output}/export (Hugging Face folder)", *notes]
    )


if __name__ == "__main__":
    command = {"check": check, "table": table}[sys.argv[1]]
    sys.exit(run_tool(lambda: command(*sys.argv[2:])))
