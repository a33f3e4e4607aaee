"""Score conversations: one JSON line per row, in input order.

    python tools/score.py --model MODEL --input rows.jsonl --output rewards.jsonl
    python tools/score.py --model RUN < rows.jsonl > rewards.jsonl
    python tools/score.py --model MODEL --input prompts_with_replies.jsonl --best-of
    torchrun --nproc-per-node 4 tools/score.py --model MODEL --input big.jsonl.gz --output out.jsonl

A row is {"messages": [...]}, {"prompt": ..., "response": ...}, {"prompt": ..., "responses": [...]},
{"text": ...} (already templated), or a row of any preference schema. Its line is {"index", "id",
"reward"}, or "rewards" in the order in which the row writes its responses (chosen before rejected),
which tools/evaluate.py --scores reads.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rmega.cli import parse_args, run_tool

NUM_NAMED = 10
"""Rows over the training's limit that are named on stderr one by one (in the output all are)."""


@dataclass(kw_only=True)
class ScoreArgs:
    """Score conversations with a reward model, one line of JSON per row."""

    model: str
    """A reward model: Hugging Face folder or hub name, a run folder, or one of its checkpoints."""
    input: tuple[str, ...] = ("-",)
    """Files (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), globs, folders; - is standard
    input (JSONL)."""
    output: str | None = None
    """File to write (default: standard output). Until it is complete it is called
    OUTPUT.partial."""
    best_of: bool = False
    """Add "order" to each row: response numbers, best first. Without --output, print a readable
    ranking instead of JSON."""
    skip_bad: bool = False
    """For a row that cannot be scored, write a line with "error" and continue. Default: stop."""
    resume: bool = False
    """Continue an interrupted --output; rows already in it are not scored again."""
    force: bool = False
    """Replace --output if it exists."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """Compute dtype. Default: auto on a GPU (bf16 from compute capability 8.0), fp32 on a CPU. auto
    on a CPU: bf16 where it measures faster."""
    reward_token: str | None = None
    """Token (text or id) to append and read the reward at, for models that record none. Default:
    the recorded token; without one, the last token of the text."""
    max_tokens: int = 8192
    """Maximum tokens per pack; a longer conversation gets a pack of its own."""
    format: str = "auto"
    """Schema of preference rows, if auto-detection picks the wrong one (an unknown name prints all
    names)."""
    limit: int | None = None
    """Score only the first N rows of each input."""


def main(args: ScoreArgs) -> int:
    for flag, value in (("--max-tokens", args.max_tokens), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "-" in args.input:
        raise ValueError(
            "--input: standard input can be read by one process only; name files under torchrun"
        )
    if args.resume and args.force:
        raise ValueError("give one of --resume and --force")
    if args.force and args.output is None:
        raise ValueError("--force needs --output, the file to replace")
    try:
        return score(args, rank)
    except (ValueError, OSError):
        if rank:  # every rank has the same error, one reports it
            return 2
        raise


def inputs_of(args: ScoreArgs) -> list[Any]:
    """The inputs in the order of the flag."""
    from rmega.preferences.resolve import Input, resolve

    found = []
    for spec in args.input:
        if spec == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise ValueError("--input: name a file, or pipe rows of JSON into standard input")
            found.append(Input(name="/dev/stdin", label="stdin", kind="lines"))
        else:
            found += resolve([spec])
    return found


def score(args: ScoreArgs, rank: int) -> int:
    """Read, score, write."""
    from tqdm import tqdm

    from rmega.preferences.schemas import schema_named
    from rmega.preferences.scorable import read_rows
    from rmega.scoring.batch import Output, line_of, score_rows, windows
    from rmega.scoring.scorer import scorer

    if args.format != "auto":
        schema_named(args.format)
    inputs = inputs_of(args)  # a wrong path is reported before the model is read

    def say(line: str) -> None:
        if rank == 0:
            print(line, file=sys.stderr, flush=True)

    output = (
        Output(args.output, resume=args.resume, force=args.force) if rank == 0 else None
    )  # all score, one writes
    counts = dict.fromkeys(("rows", "responses", "tokens", "bad", "overlong", "cut"), 0)
    notes: Counter[str] = Counter()
    try:
        with scorer(
            args.model, dtype=args.dtype, max_tokens=args.max_tokens, reward_token=args.reward_token
        ) as model:
            info = model.describe()
            limit = info.get("max_length")
            say(
                f"{args.model}: {info['family']}, {info['dtype']} on {info['device']},"
                f" {model.tokenizer.reading if model.tokenizer else 'no tokenizer'},"
                f" {f'at most {limit} tokens' if limit else 'no limit of length'}"
            )
            for message in model.tokenizer.messages if model.tokenizer else []:
                say(message)
            rows = read_rows(inputs, args.format, args.limit)
            skip_written(args, model, rows, output)
            if output and output.num_rows:
                say(f"resuming after {output.num_rows:,} rows of {output.partial}")
            start = time.monotonic()
            progress = tqdm(
                desc="scoring",
                unit=" rows",
                initial=output.num_rows if output else 0,
                leave=False,
                disable=None if rank == 0 else True,  # None: where stderr is no terminal
            )
            for window in windows(rows, args.max_tokens):
                results, text = score_rows(model, window.rows), []
                for row, result in zip(window.rows, results, strict=True):
                    if args.best_of and result.error is None and len(result.rewards) < 2:
                        result.error = (
                            "one response; --best-of ranks several (prompt and responses)"
                        )
                    counts["rows"] += 1
                    counts["bad"] += result.error is not None and not result.overlong
                    counts["overlong"] += result.overlong
                    notes.update(result.notes)
                    counts["responses"] += len(result.rewards)
                    counts["tokens"] += result.num_tokens
                    counts["cut"] += result.num_cut
                    if result.overlong and counts["overlong"] <= NUM_NAMED:
                        say(f"no reward: {row.where}: {result.error}")
                    elif result.error is not None and not args.skip_bad and not result.overlong:
                        if output:
                            output.write("".join(text))
                        progress.close()
                        raise ValueError(f"{row.where}: {result.error} (--skip-bad continues)")
                    line = line_of(row, result, best_of=args.best_of)
                    as_text = args.best_of and args.output is None
                    text.append(
                        ranking_text(row, line)
                        if as_text
                        else json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
                    )
                if output:
                    output.write("".join(text))
                progress.update(len(window.rows))
                if window.done:  # the number of rows is unknown, but not where the file ends
                    progress.total = max(progress.n, round(progress.n / window.done))
            progress.close()
            if not counts["rows"] and not (output and output.num_rows):
                raise ValueError(f"--input {' '.join(args.input)}: no rows")
            if output:
                output.finish()
            say(summary(counts, time.monotonic() - start, info.get("max_length")))
            for note, count in sorted(notes.items()):
                say(f"note: {count:,} responses: {note}")
    finally:
        if output:
            output.close()
    return 0


def skip_written(args: ScoreArgs, model: Any, rows: Iterator[Any], output: Any) -> None:
    """Skip the rows that an interrupted --output holds, on every rank; the last one with rewards is
    scored again and must agree. ``output``: the first rank's, else None."""
    from rmega.distributed import from_rank_0
    from rmega.scoring.batch import score_rows

    tolerance = 1e-3 if model.describe()["dtype"] == "fp32" else 0.1
    skip, check = from_rank_0(lambda: (output.num_rows, output.last and output.last[0]))
    for row, _ in itertools.islice(rows, skip):
        if row.index == check:
            [result] = score_rows(model, [row])
            if output:
                output.check(row, result, best_of=args.best_of, tolerance=tolerance)
        skip -= 1
    if skip:
        raise ValueError(
            f"--resume: {args.output} holds {skip:,} rows more than the input: another --input"
        )


def summary(counts: dict[str, int], seconds: float, max_length: int | None) -> str:
    """One line: what was done, what was not, how fast."""
    parts = [f"{counts['responses']:,} responses"]
    if counts["bad"]:
        parts.append(f"{counts['bad']:,} bad rows")
    if counts["overlong"]:
        parts.append(
            f"{counts['overlong']:,} rows without a reward: over the training's {max_length} tokens"
        )
    if counts["cut"]:
        parts.append(f"{counts['cut']:,} responses cut to {max_length} tokens as in training")
    rate = (
        f"{counts['responses'] / seconds:,.1f} responses/s, {counts['tokens'] / seconds:,.0f}"
        " tokens/s"
    )
    return f"scored {counts['rows']:,} rows ({', '.join(parts)}) in {seconds:,.1f} s: {rate}"


def ranking_text(row: Any, line: dict[str, Any]) -> str:
    """A row's responses for a reader, best first."""
    if "error" in line:
        return f"row {row.index}: {line['error']}\n\n"
    out = [f"row {row.index}{f' (id {row.id})' if row.id is not None else ''}, best first:"]
    for place, number in enumerate(line["order"], 1):
        conversation = row.conversations[number]
        reply = conversation if isinstance(conversation, str) else conversation[-1]["content"]
        shown = " ".join(reply.split())
        out.append(
            f"{place:3}. {line['rewards'][number]:+9.4f}  response {number + 1}: "
            f"{shown[:90]}{'...' if len(shown) > 90 else ''}"
        )
    return "\n".join(out) + "\n\n"


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main, parse_args(ScoreArgs))
