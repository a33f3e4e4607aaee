"""Evaluate a reward model, or scores from a file.

    python tools/evaluate.py --model MODEL --data eval.jsonl --report report/
    python tools/evaluate.py --scores scores.jsonl --data eval.jsonl --json result.json
    torchrun --nproc-per-node 8 tools/evaluate.py --model MODEL --data eval.jsonl
    python tools/evaluate.py --join seed1.json seed2.json seed3.json

With --scores neither torch nor a model is needed. Formats of scores files:
rmega/evaluation/scores.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from rmega.cli import parse_args, run_tool
from rmega.config import NONE
from rmega.evaluation.probes import NUM_PROBED
from rmega.io import check_writable, refuse_repeated, write_durably

NUM_NAMED = 10
"""Rows without a reward that are named one by one."""


@dataclass(kw_only=True)
class EvaluateArgs:
    """Evaluate a reward model (--model) or scores from files (--scores) on preference data."""

    data: Annotated[list[str], NONE] = field(default_factory=list)
    """Files of any known schema (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), globs,
    folders or hub datasets."""
    model: str | None = None
    """A reward model: Hugging Face folder or hub name, a run folder, or one of its checkpoints."""
    scores: list[str] | None = None
    """Files of scores instead of a model, one per --data file, in the same order."""
    format: str = "auto"
    """Name of the schema, if auto-detection picks the wrong one (an unknown name prints all
    names)."""
    split: str | None = None
    """Split to read, of hub datasets and of folders with several splits."""
    limit: int | None = None
    """Evaluate only the first N rows of each file."""
    tokenizer: str | None = None
    """Folder of a tokenizer: response lengths in its tokens instead of characters."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """Compute dtype of --model. Default: auto on a GPU (bf16 from compute capability 8.0), fp32 on
    a CPU. auto on a CPU: bf16 where it measures faster."""
    reward_token: str | None = None
    """Token (text or id) to append and read the reward at, for models that record none. Default:
    the recorded token; without one, the last token of the text."""
    probes: int = NUM_PROBED
    """With --model: score this many comparisons again with responses reversed, blanked, and under a
    wrong prompt. 0: none."""
    json: str | None = None
    """Write all numbers to this file."""
    report: str | None = None
    """Write report.html, one self-contained page, into this folder (needs the extra plots)."""
    join: Annotated[list[str], NONE] = field(default_factory=list)
    """Instead of evaluating: two or more files that --json wrote of the same data (seeds of a
    recipe, an average and its parts), as one table with mean and standard deviation."""
    save_scores: str | None = None
    """Write rewards into this folder, one file per --data file, in the format that --scores
    reads."""


def main(args: EvaluateArgs) -> None:
    from rmega.evaluation.probes import pick, probe_texts
    from rmega.evaluation.results import evaluate
    from rmega.evaluation.rows import read_eval_set, scored
    from rmega.evaluation.table import table_of
    from rmega.preferences.resolve import resolve

    check(args)
    if args.join:
        from rmega.evaluation.joined import join

        print(join(args.join))
        return
    speaks = os.environ.get("RANK", "0") == "0"  # under torchrun every rank scores, one prints
    say: Callable[[str], None] = print if speaks else lambda line: None
    sources = resolve(args.data, split=args.split, flag="--data")
    refuse_repeated("--data", [source.name for source in sources])
    sets = [read_eval_set(source, args.format, args.limit) for source in sources]
    labels = [d.label if [s.label for s in sets].count(d.label) == 1 else d.name for d in sets]
    for data in sets:
        say(data.summary())
    length, unit = length_counter(args.tokenizer)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        scorer = None
        if args.model:
            from rmega.scoring.scorer import scorer as open_scorer

            scorer = stack.enter_context(
                open_scorer(args.model, dtype=args.dtype, reward_token=args.reward_token)
            )
            if scorer.tokenizer is not None:
                say(f"{args.model}: {scorer.tokenizer.reading}")
                for message in scorer.tokenizer.messages:
                    say(f"note: {message}")
            rewards = model_rewards(scorer, sets, say)
        else:
            rewards = file_rewards(args.scores or [], sets)
        items = {
            label: [
                scored(row, values, length) for row, values in zip(data.usable, own, strict=True)
            ]
            for label, data, own in zip(labels, sets, rewards, strict=True)
        }
        if len(items) > 1:
            items["all files"] = [item for own in items.values() for item in own]
        for label, own in items.items():
            probes: dict[str, Any] = {}
            if scorer is not None and args.probes > 0:
                probes = probe_texts(pick(own, args.probes), scorer.score_uncut)
            results[label] = evaluate(own, length_unit=unit, probes=probes)
            say(f"\n{table_of(label, results[label])}")
    for label, data in zip(labels, sets, strict=True):
        results[label] |= {
            "data": data.name,
            "schema": data.schema,
            "left_out": data.left_out,
            "notes": dict(data.notes),
        }
    if speaks:
        write(args, sets, rewards, items, results)


def check(args: EvaluateArgs) -> None:
    """ValueError for flags that do not go together, before an hour of scoring, not after it."""
    from rmega.preferences.resolve import check_split

    if args.join:
        others = [option.name for option in fields(args) if option.name != "join"]
        refuse_others(args, others, "--join", "reads evaluations")
        return
    if not args.data:
        raise ValueError("--data: files to evaluate on were expected")
    if (args.model is None) == (args.scores is None):
        raise ValueError("give either --model or --scores")
    if args.scores is not None:
        names = ["dtype", "reward_token", *(["probes"] if args.probes else [])]
        refuse_others(args, names, "--scores", "computes no rewards")
    check_split(args.split, args.data)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    for flag, folder in (
        ("--json", Path(args.json).parent if args.json else None),
        ("--save-scores", args.save_scores),
        ("--report", args.report),
    ):
        if folder is not None:
            check_writable(flag, folder)
    if args.report:
        from rmega.report.figures import require_matplotlib

        require_matplotlib("--report")


def write(
    args: EvaluateArgs,
    sets: list[Any],
    rewards: list[list[np.ndarray]],
    items: dict[str, list[Any]],
    results: dict[str, Any],
) -> None:
    """The files of --save-scores, --json and --report."""
    from rmega.evaluation.files import FORMAT_VERSION
    from rmega.evaluation.results import to_json, worst_mistakes

    subject = args.model or ", ".join(args.scores or [])
    if args.save_scores:
        save_scores(Path(args.save_scores), sets, rewards)
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = to_json({"format_version": FORMAT_VERSION, "subject": subject, "sets": results})
        write_durably(path, json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        print(f"\nnumbers: {path}")
    if args.report:
        from rmega.report.evaluation import write_evaluation_report

        page = write_evaluation_report(
            Path(args.report),
            subject,
            results,
            items,
            {label: worst_mistakes(own) for label, own in items.items()},
        )
        print(f"\nreport: {page}")


def refuse_others(args: EvaluateArgs, names: Iterable[str], chosen: str, does: str) -> None:
    """ValueError where one of the flags ``names`` is given, which has no effect with the flag
    ``chosen``."""
    default = EvaluateArgs()
    for name in names:
        if getattr(args, name) != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {chosen}, which {does}")


def length_counter(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    """How long a text is, and the word for the unit."""
    if tokenizer is None:
        return len, "characters"
    from rmega.preferences.load_tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"]), "tokens"


def model_rewards(
    scorer: Any, sets: list[Any], say: Callable[[str], None]
) -> list[list[np.ndarray]]:
    """Rewards of every usable row of every set, best response first.

    A row that cannot be scored, such as one over the training's limit, is left out from here on.
    """
    from tqdm import tqdm

    out = []
    for data in sets:
        with tqdm(
            desc=f"scoring {data.label}",
            total=len(data.usable),
            leave=False,
            disable=None if os.environ.get("RANK", "0") == "0" else True,
        ) as bar:
            rows, errors = data.usable, {}
            rewards = scorer.score_comparisons(
                [row.comparison for row in rows], bar.update, notes=data.notes, errors=errors
            )
        out.append([np.array(r) for i, r in enumerate(rewards) if i not in errors])
        for number, error in errors.items():
            rows[number].comparison, rows[number].reason = None, error.reason
            if number in list(errors)[:NUM_NAMED]:
                say(f"left out: {rows[number].where}: {error}")
        if len(errors) > NUM_NAMED:
            say(f"left out: {len(errors) - NUM_NAMED:,} more rows")
        if len(errors) == len(rows):
            raise ValueError(
                f"--data {data.name}: no row can be scored ({next(iter(errors.values()))})"
            )
        for note, count in sorted(data.notes.items()):
            say(f"note: {data.label}: {count:,} responses: {note}")
    return out


def file_rewards(paths: list[str], sets: list[Any]) -> list[list[np.ndarray]]:
    """Rewards of every usable row of every set, best response first, from scores files."""
    from rmega.evaluation.rows import rewards_in_order
    from rmega.evaluation.scores import match_scores, read_scores

    if len(paths) != len(sets):
        raise ValueError(
            f"--scores: {len(paths)} files for {len(sets)} data files: "
            f"{', '.join(data.name for data in sets)}"
        )
    out = []
    for path, data in zip(paths, sets, strict=True):
        matched = match_scores(read_scores(path), [row.id for row in data.rows], data.name)
        out.append(
            [
                rewards_in_order(row, given)
                for row, given in zip(data.rows, matched, strict=True)
                if row.comparison is not None
            ]
        )
    return out


def save_scores(folder: Path, sets: list[Any], rewards: list[list[np.ndarray]]) -> None:
    """One line per data row, in the order the row writes its responses; an empty list for rows that
    were left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (data, own) in enumerate(zip(sets, rewards, strict=True)):
        same = [d.label for d in sets].count(data.label) > 1
        path, left = folder / f"{data.label}{f'.{number}' if same else ''}.scores.jsonl", iter(own)
        lines = []
        for row in data.rows:
            values = [] if row.comparison is None else next(left)
            if row.comparison is not None and row.comparison.positions is not None:
                values = values[np.argsort(row.comparison.positions)]
            line = {} if row.id is None else {"id": row.id}
            lines.append(json.dumps({**line, "scores": list(map(float, values))}, allow_nan=False))
        write_durably(path, "".join(f"{line}\n" for line in lines))
        print(f"rewards: {path}")


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main, parse_args(EvaluateArgs))
