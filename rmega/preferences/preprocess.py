"""The preprocessing run: read, convert, tokenize on all cores, check, write.

Chunks go to worker processes and come back in order; what comes back is appended to the files of a
work folder, ``PREFIX.partial``. After the last chunk, the checks over the whole set run and the
dataset is put in place. Nothing of the output depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any

import numpy as np

from rmega.cli import num_cores
from rmega.config import NONE
from rmega.io import check_text, naming
from rmega.preferences import dedup
from rmega.preferences.assemble import check_outputs, finish
from rmega.preferences.chunks import CHUNK_BYTES, Chunk
from rmega.preferences.comparison import Rejected
from rmega.preferences.printed import announce, progress_bar, report, say
from rmega.preferences.reader import Plan, plan_input
from rmega.preferences.resolve import Input, check_split, resolve
from rmega.preferences.schemas import schema_named
from rmega.preferences.tokenizer import PairTokenizer
from rmega.preferences.work_folder import WorkFolder
from rmega.preferences.worker import ChunkResult, Converter


@dataclass(kw_only=True)
class PreprocessArgs:
    """Turn preference data of any common schema into a dataset that rmega trains on."""

    input: list[str]
    """Files (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), globs, folders, or hub
    datasets (org/name[:config][@revision], modelscope:org/name)."""
    tokenizer: str
    """Folder or hub name of the tokenizer (usually the model's folder)."""
    output_prefix: str
    """Where to write: PREFIX.bin, .idx, .scores.npy, .sources.npy, .json."""
    max_length: int = 2048
    """Maximum length of a conversation in tokens, including the reward token."""
    reward_token: str = "auto"
    """Token whose hidden state gives the reward: auto, its text, its id, or none (read at the last
    token)."""
    chat_template: str | None = None
    """File or text of a chat template, in place of the tokenizer's own."""
    overlong: str = "left-prompt"
    """What to do with conversations over --max-length. left-prompt: drop the oldest prompt turns
    (never the system prompt), then the start of the last question, then the end of the response,
    leaving the prompt half of the room; right: cut the end; drop: skip the row; error: stop."""
    format: str = "auto"
    """Name of the schema, if auto-detection picks the wrong one (an unknown name prints all
    names)."""
    map: str | None = None
    """FILE.py:FUNCTION, called with each row; returns a row of a known schema, a Comparison, or
    None to skip it."""
    split: str | None = None
    """Split to read, of hub datasets (default: train) and of folders with several splits."""
    keep: Annotated[list[str], NONE] = field(default_factory=list)
    """What is left out otherwise. duplicates: repeated and contradictory comparisons; ties:
    responses with equal scores are tied pairs, which only training with --loss rao_kupper reads
    (without: they give no pair, and comparisons whose scores are all equal are left out)."""
    holdout: Annotated[list[str], NONE] = field(default_factory=list)
    """Held-out data (as --input): comparisons whose prompt also occurs there are left out."""
    valid_fraction: float = 0.0
    """Fraction of the comparisons to write to PREFIX.valid as a held-out set, split by prompt."""
    max_rejected: float = 0.05
    """Stop if more than this fraction of the rows is rejected. Rejected rows are listed in
    PREFIX.rejected.jsonl."""
    workers: int = 0
    """Worker processes; 0: one per core, or none for a small input."""
    force: bool = False
    """Replace an existing output."""


def preprocess(args: PreprocessArgs) -> dict[str, Any]:
    """Run it all; the manifest of what was written (the training side's). ValueError for what the
    user can fix."""
    _check(args)
    prefix = args.output_prefix
    outputs = [prefix] + ([f"{prefix}.valid"] if args.valid_fraction else [])
    check_outputs(outputs, force=args.force)
    inputs = resolve(args.input, split=args.split)
    for source in inputs:
        check_text("--input", source.name)  # of a folder or glob
    holdout = resolve(args.holdout, split=args.split, flag="--holdout")
    tokenizer = PairTokenizer.load(
        args.tokenizer,
        reward_token=args.reward_token,
        chat_template=args.chat_template,
        max_length=args.max_length,
        overlong=args.overlong,
    )
    for message in tokenizer.messages:
        say(f"note: {message}")
    plans = [plan_input(s, args.format, mapped=args.map is not None) for s in inputs]
    converter = Converter(tokenizer, plans, args.map, "ties" in args.keep)
    announce(plans, tokenizer, converter)
    with naming(prefix), contextlib.ExitStack() as stack:
        work, *_ = [stack.enter_context(WorkFolder(output, inputs)) for output in outputs]
        check_outputs(outputs, force=args.force)  # another process may have written it since
        _convert_all(converter, plans, work, args)
        held_out = _prompts_of(holdout) if holdout else None
        manifests = finish(
            work,
            outputs=outputs,
            force=args.force,
            settings={**tokenizer.manifest(), **({"ties": "keep"} if "ties" in args.keep else {})},
            keep_duplicates="duplicates" in args.keep,
            schemas=[p.schema.name if p.schema else str(args.map) for p in plans],
            held_out=held_out,
            valid_fraction=args.valid_fraction,
            max_rejected=args.max_rejected,
        )
    report(manifests, outputs, recognized=args.format == "auto")
    return manifests[0]


def _check(args: PreprocessArgs) -> None:
    if not args.input:
        raise ValueError("--input: name at least one file")
    for flag, names in (
        ("--input", args.input),
        ("--tokenizer", [args.tokenizer]),
        ("--output-prefix", [args.output_prefix]),
        ("--holdout", args.holdout),
    ):
        for name in names:
            check_text(flag, name)
    if os.path.basename(args.output_prefix) in ("", ".", ".."):
        raise ValueError(
            f"--output-prefix {args.output_prefix}: is a folder; add the name that the files begin"
            " with"
        )
    check_split(args.split, [*args.input, *args.holdout])
    if not 0 <= args.valid_fraction < 1:
        raise ValueError(f"--valid-fraction {args.valid_fraction}: must lie from 0 to below 1")
    if not 0 <= args.max_rejected <= 1:
        raise ValueError(f"--max-rejected {args.max_rejected}: must lie from 0 to 1")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: must not be negative")
    for name in args.keep:
        if name not in ("duplicates", "ties"):
            raise ValueError(f"--keep {name}: unknown; known are duplicates, ties")
    if args.format != "auto":
        schema_named(args.format)
        if args.map is not None:
            raise ValueError("--format: the schema of what --map returns is recognized")


_CONVERTER: Converter | None = None


def _start_worker(converter: Converter) -> None:
    global _CONVERTER
    _CONVERTER = converter
    # A forked worker inherits the handlers of its parent. From Python 3.12 on the pool ends the
    # others with SIGTERM when one dies, and would wait forever for one that only takes note of it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers


def _work(chunk: Chunk) -> ChunkResult:
    assert _CONVERTER is not None
    return _CONVERTER.convert(chunk)


def _all_chunks(plans: list[Plan], hashes: dict[str, str]) -> Iterator[Chunk]:
    for index, plan in enumerate(plans):
        yield from plan.chunks(index, hashes)


def _convert_all(
    converter: Converter, plans: list[Plan], work: WorkFolder, args: PreprocessArgs
) -> None:
    chunks = _all_chunks(plans, work.hashes)
    total = sum(p.source.num_bytes for p in plans)
    workers = args.workers or (1 if 0 < total <= CHUNK_BYTES else num_cores())
    start, size = time.monotonic(), 0
    with progress_bar(total) as bar:
        before = list(accumulate((p.source.num_bytes for p in plans), initial=0))
        for chunk, result in _results(converter, chunks, workers):
            work.append(chunk, result)
            bar.update(
                min(before[chunk.input_index] + chunk.position, total) - bar.n
                if total
                else chunk.num_bytes
            )
            size += chunk.num_bytes
            elapsed = max(time.monotonic() - start, 1e-3)
            bar.set_postfix_str(
                f"{work.num_rows:,} rows, {work.num_rows / elapsed:,.0f} rows/s, "
                f"{size / elapsed / 1e6:.1f} MB/s of text",
                refresh=False,
            )
            work.check_faults(args.max_rejected, at_least=2000)
    if work.num_rows == 0:
        raise ValueError(f"--input {plans[0].source.name}: no rows")
    work.check_faults(args.max_rejected)


def _results(
    converter: Converter, chunks: Iterator[Chunk], workers: int
) -> Iterator[tuple[Chunk, ChunkResult]]:
    """Results in the order of the chunks."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, converter.convert(chunk)
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), _start_worker, (converter,)
    ) as pool:
        waiting: deque[tuple[Chunk, Future[ChunkResult]]] = deque()
        # The first chunk starts the workers. What is garbage by then no fork frees: a process group
        # of gloo ends a process that has none of its threads with a segmentation fault.
        gc.freeze()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_work, chunk)))
                gc.unfreeze()
                if len(waiting) >= 2 * workers + 2:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for last, future in waiting:
                yield last, future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process died (out of memory?); try again with fewer --workers"
            ) from None
        finally:
            gc.unfreeze()
            pool.shutdown(wait=False, cancel_futures=True)


def _prompts_of(holdout: list[Input]) -> np.ndarray:
    """Sorted uint64 hashes of the prompts of the held-out data."""
    prompts: set[int] = set()
    for source in holdout:
        plan = plan_input(source, flag="--holdout")
        assert plan.schema is not None
        for _, row, _ in plan.rows():
            if isinstance(row, dict):
                with contextlib.suppress(Rejected, RecursionError, UnicodeEncodeError):
                    prompts.add(dedup.hash_messages(plan.schema.prompt(row)))
    return np.array(sorted(prompts), np.uint64)
