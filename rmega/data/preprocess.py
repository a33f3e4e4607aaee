"""From raw preference data to a dataset on disk: read, convert, tokenize in all cores, check, write.

Chunks go to worker processes and come back in order; what comes back is appended to a work folder, ``PREFIX.partial``,
with a journal line per chunk, so that an interrupted run can go on. When all chunks are there, the checks over the
whole set run and the dataset is put in place. Nothing of the output depends on the number of workers.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from rmega.data import checks, sources
from rmega.data.indexed import exists
from rmega.data.records import REASONS, Comparison, Rejected
from rmega.data.schemas import SCHEMAS, Schema, prompt_of, recognise, schema_named, source_of
from rmega.data.tokenize import PairTokenizer
from rmega.data.work import WorkFolder, finish

SAMPLE_ROWS = 50


@dataclass(kw_only=True)
class PreprocessArgs:
    """Turn preference data of any common schema into a dataset that rmega trains on."""

    input: list[str]
    """Files (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), globs, folders, or hub data sets
    (org/name[:config], modelscope:org/name)."""
    tokenizer: str
    """Folder or hub name of the tokenizer (usually the model's folder)."""
    output_prefix: str
    """Where to write: PREFIX.bin, .idx, .scores.npy, .sources.npy, .json."""
    max_length: int = 2048
    """Longest conversation in tokens, with the reward token."""
    reward_token: str = "auto"
    """The token whose hidden state gives the reward: auto, its text, or its id."""
    chat_template: str | None = None
    """File or text of a chat template, in place of the tokenizer's own."""
    overlong: str = "left-prompt"
    """For conversations over --max-length. left-prompt: leave out the oldest turns of the prompt (the system prompt
    stays), then the beginning of the last question, then the end of the response; right: cut the end; drop; error."""
    format: str = "auto"
    """Name of the schema, if it is not recognised rightly (an unknown name prints all names)."""
    map: str | None = None
    """FILE.py:FUNCTION, called with each row: gives a row of a known schema, a Comparison, or None to leave it out."""
    split: str | None = None
    """Split of hub data sets and of folders with several (default of hubs: train)."""
    revision: str | None = None
    """Revision of hub data sets."""
    weights: list[float] = field(default_factory=list)
    """One per --input: how often its comparisons are written; 0.5 writes half of them, drawn by a hash."""
    duplicates: str = "drop"
    """drop leaves out repeated and contradictory comparisons, keep keeps them."""
    holdout: list[str] = field(default_factory=list)
    """Held-out data (as --input): the prompts that also occur there are reported."""
    holdout_action: str = "report"
    """report, or drop to leave those comparisons out."""
    valid_fraction: float = 0.0
    """Share of the comparisons for PREFIX.valid, split by prompt."""
    split_seed: int = 0
    """Chooses the prompts of the validation side."""
    max_rejected: float = 0.05
    """Stop if more than this share of the rows is faulty."""
    workers: int = 0
    """Processes; 0: one per core."""
    force: bool = False
    """Replace an existing output."""
    resume: bool = False
    """Go on with an interrupted run."""
    trust_remote_code: bool = False
    """Let the tokenizer run code of its own repository."""


@dataclass
class Plan:
    """An input with the schema of its rows."""

    source: sources.Input
    schema: Schema | None
    example: Comparison | None = None
    reopen: Callable[[], Iterator[sources.Chunk]] | None = None


@dataclass
class ChunkResult:
    """What a worker hands back for a chunk."""

    tokens: bytes = b""
    lengths: bytes = b""
    scores: bytes = b""
    documents: bytes = b""
    source_names: list[str] = field(default_factory=list)
    rejected: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(line, reason, detail, raw text)."""
    notes: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0


class Converter:
    """Rows -> tokens. One per worker process."""

    def __init__(self, tokenizer: PairTokenizer, plans: list[Plan], map_spec: str | None) -> None:
        self.tokenizer = tokenizer
        self.plans = plans
        self.map = load_map(map_spec) if map_spec else None

    def comparison(self, row: dict[str, Any], plan: Plan) -> Comparison:
        """The row as a comparison; raises `Rejected`."""
        try:
            schema, source = plan.schema, source_of(row, plan.source.label)
            if self.map is not None:
                mapped = self._mapped(row)
                if isinstance(mapped, Comparison):
                    mapped.source = mapped.source or source
                    return mapped
                row, schema = mapped, recognise([mapped])
                source = source_of(row, source)
                if schema is None:
                    columns = ", ".join(map(str, row))[:200]
                    raise Rejected("map_failed", f"returned columns of no known schema: {columns}")
            assert schema is not None
            comparison = schema.convert(row)
            comparison.source = source
            return comparison
        except RecursionError:
            raise Rejected("too_deep") from None

    def _mapped(self, row: dict[str, Any]) -> Any:
        assert self.map is not None
        try:
            mapped = self.map(row)
        except Exception as error:  # a user's function raises what it likes
            raise Rejected("map_failed", f"{type(error).__name__}: {error}"[:300]) from None
        if mapped is None:
            raise Rejected("skipped_by_map")
        if not isinstance(mapped, (dict, Comparison)):
            raise Rejected("map_failed", f"returned {type(mapped).__name__}, not a dict or a Comparison")
        return mapped

    def convert(self, chunk: sources.Chunk) -> ChunkResult:
        """All rows of a chunk; ValueError with file and line under --overlong error."""
        plan, result = self.plans[chunk.input_index], ChunkResult()
        names: dict[str, int] = {}
        tokens: list[bytes] = []
        lengths: list[int] = []
        scores: list[float] = []
        documents: list[tuple[Any, ...]] = []
        for line, row, raw in sources.decode(chunk):
            result.num_rows += 1
            try:
                if isinstance(row, Rejected):
                    raise row
                comparison = self.comparison(row, plan)
                encoded = self.tokenizer.encode_comparison(comparison)
                parts = [encoded.prefix, *encoded.suffixes]
                part_lengths = [len(p) for p in parts]
                documents.append(checks.document_row(comparison, chunk.input_index, line, sum(part_lengths),
                                                     names.setdefault(comparison.source, len(names))))
            except Rejected as why:
                if not raw and not isinstance(row, Rejected):
                    raw = _as_raw(row)
                result.rejected.append((line, why.reason, why.detail, raw))
                continue
            except UnicodeEncodeError:
                result.rejected.append((line, "not_utf8", "half of a surrogate pair", _as_raw(row)))
                continue
            except ValueError as error:
                raise ValueError(f"{plan.source.name}:{line}: {error}") from None
            tokens += [p.tobytes() for p in parts]
            lengths += part_lengths
            scores += [float(comparison.graded), *comparison.scores]
            result.notes.update(encoded.notes)
        result.tokens = b"".join(tokens)
        result.lengths = np.array(lengths, np.int32).tobytes()
        result.scores = np.array(scores, np.float32).tobytes()
        result.documents = np.array(documents, checks.DOCUMENT).tobytes()
        result.source_names = list(names)
        return result


def _as_raw(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=True, default=str)[:2000]
    except (RecursionError, ValueError, TypeError):
        return ""


def load_map(spec: str) -> Callable[[dict[str, Any]], Any]:
    """The function FILE.py:FUNCTION of ``--map``."""
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise ValueError(f"--map {spec}: expected FILE.py:FUNCTION, and {path or spec} is no file")
    module_spec = importlib.util.spec_from_file_location("rmega_user_map", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--map {path}: cannot be loaded ({type(error).__name__}: {error})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--map {spec}: {path} has no function {name}")
    return function


# ---- the run

def preprocess(args: PreprocessArgs) -> dict[str, Any]:
    """Run it all; the manifest of what was written (the training side's). ValueError for what the user can mend."""
    _check(args)
    prefix = args.output_prefix
    outputs = [prefix] + ([f"{prefix}.valid"] if args.valid_fraction else [])
    for output in outputs:
        if exists(output) and not args.force:
            raise ValueError(f"--output-prefix {prefix}: a dataset is there already ({output}.*); --force replaces it")
    inputs = sources.resolve(args.input, split=args.split, revision=args.revision, weights=args.weights or None)
    holdout = sources.resolve(args.holdout, split=args.split, flag="--holdout") if args.holdout else []
    tokenizer = PairTokenizer.load(args.tokenizer, reward_token=args.reward_token, chat_template=args.chat_template,
                                   max_length=args.max_length, overlong=args.overlong,
                                   trust_remote_code=args.trust_remote_code)
    for message in tokenizer.messages:
        say(f"note: {message}")
    plans = [plan_input(source, args.format, args.map, "--input") for source in inputs]
    converter = Converter(tokenizer, plans, args.map)
    _announce(plans, tokenizer, converter)
    work = WorkFolder(prefix, _identity(args, inputs, tokenizer), inputs, resume=args.resume, force=args.force)
    try:
        _convert_all(converter, plans, work, args)
        held_out = _prompts_of(holdout) if holdout else None
        manifests = finish(work, outputs=outputs, settings=tokenizer.manifest(), duplicates=args.duplicates,
                           schemas=[p.schema.name if p.schema else str(args.map) for p in plans], held_out=held_out,
                           holdout_action=args.holdout_action, valid_fraction=args.valid_fraction,
                           split_seed=args.split_seed, max_rejected=args.max_rejected)
    except ValueError:
        work.remove()
        raise
    except BaseException:
        work.close()
        raise
    _report(manifests, outputs)
    return manifests[0]


def _report(manifests: list[dict[str, Any]], outputs: list[str]) -> None:
    run = manifests[0]["input"]
    for reason, num in sorted(run["rejected"].items(), key=lambda item: (-item[1], item[0])):
        say(f"left out: {num:,} x {REASONS[reason]}")
    if run["rejected"]:
        say(f"    listed with file and line in {outputs[0]}.rejected.jsonl")
    for note, num in sorted(run["notes"].items(), key=lambda item: (-item[1], item[0])):
        say(f"note: {num:,} x {note}")
    overlap = manifests[0]["holdout"]
    if overlap:
        say(f"held-out data: {overlap['prompts']:,} of its {overlap['held_out_prompts']:,} prompts also occur here, in "
            f"{overlap['comparisons']:,} comparisons")
    for manifest, output in zip(manifests, outputs, strict=True):
        say(f"{output}: {manifest['num_comparisons']:,} comparisons, {manifest['num_pairs']:,} pairs, "
            f"{manifest['num_tokens']:,} tokens")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(args: PreprocessArgs) -> None:
    if not args.input:
        raise ValueError("--input: name at least one file")
    if not 0 <= args.valid_fraction < 1:
        raise ValueError(f"--valid-fraction {args.valid_fraction}: must lie from 0 to below 1")
    if not 0 <= args.max_rejected <= 1:
        raise ValueError(f"--max-rejected {args.max_rejected}: must lie from 0 to 1")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: must not be negative")
    for flag, value, known in (("--duplicates", args.duplicates, ("drop", "keep")),
                               ("--holdout-action", args.holdout_action, ("report", "drop"))):
        if value not in known:
            raise ValueError(f"{flag} {value}: unknown; known are {', '.join(known)}")
    if args.format != "auto":
        schema_named(args.format)


def _identity(args: PreprocessArgs, inputs: list[sources.Input], tokenizer: PairTokenizer) -> dict[str, Any]:
    """What must be the same for --resume to make sense."""
    return {"--input": [s.identity() for s in inputs], "--tokenizer": tokenizer.fingerprint,
            "--chat-template": tokenizer.template_hash, "--reward-token": tokenizer.reward_token_id,
            "--max-length": args.max_length, "--overlong": args.overlong, "--format": args.format, "--map": args.map}


def plan_input(source: sources.Input, format_name: str, map_spec: str | None, flag: str) -> Plan:
    """Look at the first rows of an input and recognise their schema; ValueError if there is none."""
    chunks = sources.read_chunks(source, 0)
    head: list[sources.Chunk] = []
    rows: list[dict[str, Any]] = []
    for chunk in islice(chunks, 8):
        head.append(chunk)
        rows += [row for _, row, _ in sources.decode(chunk) if isinstance(row, dict)]
        if len(rows) >= SAMPLE_ROWS:
            break
    rows = rows[:SAMPLE_ROWS]
    reopen = None
    if source.kind in ("hub", "modelscope"):  # a stream is opened once
        reopen = lambda: chain(head, chunks)  # noqa: E731
    if not head:
        raise ValueError(f"{flag} {source.name}: no rows")
    if not rows:
        number, why, _ = next(sources.decode(head[0]), (1, "no rows", ""))
        raise ValueError(f"{flag} {source.name}:{number}: {why}; no row of its beginning can be read")
    if map_spec is not None:
        return Plan(source, None, reopen=reopen)
    schema = recognise(rows) if format_name == "auto" else schema_named(format_name)
    if schema is None:
        raise ValueError(f"{flag} {source.name}: no known schema has the columns {', '.join(map(str, rows[0]))[:300]}. "
                         f"Known: {'; '.join(s.columns for s in SCHEMAS)}. Name one with --format, or use --map")
    return Plan(source, schema, reopen=reopen)


def _announce(plans: list[Plan], tokenizer: PairTokenizer, converter: Converter) -> None:
    """Say what was recognised, with an example, before the work starts."""
    token = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.reward_token_id)
    say(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids; reward token {token} "
        f"({tokenizer.reward_token_id}), pad id {tokenizer.pad_token_id}")
    shown: set[str] = set()
    for plan in plans:
        name = plan.schema.name if plan.schema else "--map"
        say(f"{plan.source.name}: {name}")
        if name in shown:
            continue
        shown.add(name)
        for chunk in islice(sources.read_chunks(plan.source, 0) if plan.reopen is None else plan.reopen(), 1):
            for _, row, _ in sources.decode(chunk):
                if isinstance(row, dict):
                    try:
                        grouped = plan.schema is not None and plan.schema.groups_by
                        example = converter.comparison({"rows": [row, row]} if grouped else row, plan)
                    except (Rejected, UnicodeEncodeError):
                        continue
                    _show_example(example)
                    break


def _show_example(example: Comparison) -> None:
    def short(text: str) -> str:
        text = " ".join(text.split())
        return text if len(text) <= 100 else f"{text[:97]}..."

    for message in example.prompt[-2:]:
        say(f"    {message['role']}: {short(message['content'])}")
    for score, response in zip(example.scores, example.responses, strict=True):
        say(f"    [{score:g}] {response[-1]['role']}: {short(response[-1]['content'])}")


_CONVERTER: Converter | None = None


def _start_worker(converter: Converter) -> None:
    global _CONVERTER
    _CONVERTER = converter


def _work(chunk: sources.Chunk) -> ChunkResult:
    assert _CONVERTER is not None
    return _CONVERTER.convert(chunk)


def _all_chunks(plans: list[Plan], hashes: dict[str, str]) -> Iterator[sources.Chunk]:
    for index, plan in enumerate(plans):
        if plan.reopen is not None:
            chunks = plan.reopen()
        else:
            chunks = sources.read_chunks(plan.source, index, hashes)
        if plan.schema is not None and plan.schema.groups_by:
            chunks = sources.group_rows(chunks, plan.schema.groups_by)
        for chunk in chunks:
            chunk.input_index = index
            yield chunk


def _convert_all(converter: Converter, plans: list[Plan], work: WorkFolder, args: PreprocessArgs) -> None:
    workers = args.workers or _num_cores()
    done = work.num_chunks
    if done:
        say(f"--resume: {done} chunks ({work.num_rows:,} rows) are there already")
    chunks = islice(enumerate(_all_chunks(plans, work.hashes)), done, None)
    total = sum(p.source.num_bytes for p in plans)
    start, size, rows_before = time.monotonic(), 0, work.num_rows
    with _progress(total) as bar:
        before = [0]
        for plan in plans:
            before.append(before[-1] + plan.source.num_bytes)
        for chunk, result in _results(converter, (c for _, c in chunks), workers):
            work.append(chunk, result)
            bar.update(min(before[chunk.input_index] + chunk.position, total) - bar.n if total else chunk.num_bytes)
            size += chunk.num_bytes
            elapsed = max(time.monotonic() - start, 1e-3)
            bar.set_postfix_str(f"{work.num_rows:,} rows, {(work.num_rows - rows_before) / elapsed:,.0f} rows/s, "
                                f"{size / elapsed / 1e6:.1f} MB/s of text", refresh=False)
            work.check_faults(args.max_rejected, at_least=2000)
    if work.num_rows == 0:
        raise ValueError(f"--input {plans[0].source.name}: no rows")
    work.check_faults(args.max_rejected)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(converter: Converter, chunks: Iterator[sources.Chunk],
             workers: int) -> Iterator[tuple[sources.Chunk, ChunkResult]]:
    """Results in the order of the chunks."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, converter.convert(chunk)
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (converter,)) as pool:
        waiting: deque[tuple[sources.Chunk, Future[ChunkResult]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_work, chunk)))
                if len(waiting) >= 2 * workers + 2:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise OSError("a worker process died (out of memory?); go on with --resume, or fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _progress(total: int) -> Any:
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(total=total or None, unit="B", unit_scale=True, mininterval=10 if quiet else 0.2, desc="tokenize",
                file=sys.stderr, dynamic_ncols=True)


def _prompts_of(holdout: list[sources.Input]) -> np.ndarray:
    """Sorted uint64 hashes of the prompts of the held-out data."""
    prompts: set[int] = set()
    for source in holdout:
        plan = plan_input(source, "auto", None, "--holdout")
        for chunk in _all_chunks([plan], {}):
            for _, row, _ in sources.decode(chunk):
                if isinstance(row, dict):
                    assert plan.schema is not None
                    try:
                        prompts.add(checks.hash_messages(prompt_of(row, plan.schema)))
                    except (Rejected, RecursionError, UnicodeEncodeError):
                        continue
    return np.array(sorted(prompts), np.uint64)
