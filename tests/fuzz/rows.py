"""Random mutations of rows of every schema and kind of file, through preprocessing.

    python -m tests.fuzz.rows --count 10000 --seed 0

Holds: no traceback (a row is kept or rejected with a reason; a file is refused in one line that
names it), no silent loss (rows in = kept + rejected, responses in = kept + noted). Prints what was
done and ends with 1 at the first breach, naming the seed and the file, which is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gzip
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rmega.data.indexed import open_preferences
from rmega.data.integrity import verify
from rmega.preferences import preprocess
from rmega.preferences.comparison import NO_TEXT, UNRATED, Rejected
from rmega.preferences.reader import plan_input
from rmega.preferences.resolve import resolve
from rmega.preferences.tokenizer import PairTokenizer

Row = dict[str, Any]
ROWS_OF_A_FILE = 25
KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "json.zst")

_TURN, _GOOD, _BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Where is it?"), ("assistant", "Here."), ("assistant", "There."))
)
TEMPLATES: tuple[Row, ...] = (
    {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "margin": 1},
    {"prompt": [_TURN], "chosen": [_GOOD], "rejected": [_BAD]},
    {"chosen": [_TURN, _GOOD], "rejected": [_TURN, _BAD], "chosen-rating": 2, "rejected-rating": 1},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"messages": [_TURN, _GOOD], "rejected_response": "b"},
    {"messages": [_TURN, _GOOD], "rejected_messages": [_TURN, _BAD]},
    {"input": {"messages": [_TURN]}, "preferred_output": [_GOOD], "non_preferred_output": [_BAD]},
    {"instruction": "q", "input": "", "output": ["a", "b"], "history": [["c", "d"]]},
    {"prompt": "q", "responses": [{"content": c, "score": i} for i, c in enumerate("abc")]},
    {"instruction": "q", "generations": ["a", "b", "c"], "ratings": [1, 2, 3]},
    {
        "context": [_TURN],
        "completions": [
            {"rank": i, "completion": [m], "reward": None} for i, m in enumerate((_GOOD, _BAD))
        ],
    },
    {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1},
    {"prompt": "q", "chosen": ["a", "c"], "rejected": ["b"]},
    {"prompt": "q", "response": "a", "helpfulness": 1},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"conversation_a": [_TURN, _GOOD], "conversation_b": [_TURN, _BAD], "winner": "model_a"},
    {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
    {"chosen": "Where? Here it is.", "rejected": "Where? There it is."},
    {
        "prompt": [_TURN],
        "chosen": [{**_GOOD, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}],
        "rejected": [{**_BAD, "thinking": "t", "name": None}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
)
TEXTS = (
    "", " ", "text", "a\ud800", "\x00", "<|im_end|>", "</s>", "\n\nHuman: a\n\nAssistant: b",
    "x" * 3000, "[{", "1e999", "🙂👍🏽" * 30, "\u2028\u0085\x0b\x0c", "[]", "{}", "null", "NaN",
    "N/A",
    '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
    "[{'role': 'assistant', 'content': 'a'}\n {'role': 'assistant'", "['a' 'b']", "[1. 2.]",
    '{"from": "Oslo"}', '"[1]"', "مرحبا 你好", "\ufeff", "\r\n", "Human: q", "<extra_id_1>User\n",
)  # fmt: skip
NUMBERS = (None, True, False, float("nan"), float("inf"), -1, 0, 10**30, 1e39, 1.5, 2**63)
KEYS = (
    "role", "content", "from", "value", "score", "rank", "tool_calls", "function", "arguments",
    "thinking", "images", "bytes", "x", "type", "text", "completion", "1",
)  # fmt: skip
COLUMNS = (
    "prompt", "chosen", "rejected", "responses", "scores", "ratings", "tools", "system", "margin",
    "source", "messages", "history", "images", "input", "rows", "id", "1",
)  # fmt: skip


def value(rng: np.random.Generator, depth: int = 0) -> Any:
    """A random value of any type."""
    kind = int(rng.integers(0, 12))
    if kind < 5 or depth > 3:
        return TEXTS[int(rng.integers(len(TEXTS)))]
    if kind < 8:
        return NUMBERS[int(rng.integers(len(NUMBERS)))]
    if kind < 10:
        return [value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    if kind == 10 or depth:
        num = int(rng.integers(0, 4))
        return {KEYS[int(rng.integers(len(KEYS)))]: value(rng, depth + 1) for _ in range(num)}
    deep: Any = "x"
    for _ in range(int(rng.integers(1, 200))):
        deep = [deep] if rng.integers(2) else {"content": deep}
    return deep


def mutate(row: Row, rng: np.random.Generator) -> Row:
    """The row with one to three things changed, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(int(rng.integers(1, 4))):
        where: Any = row
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if isinstance(where, dict) and (not keys or rng.integers(5) == 0):
                keys = list(COLUMNS if where is row else KEYS)
            if not keys:
                break
            key = keys[int(rng.integers(len(keys)))]
            inside = where.get(key) if isinstance(where, dict) else where[key]
            if isinstance(inside, (dict, list)) and rng.integers(3):
                where = inside
                continue
            action = int(rng.integers(6))
            if action == 0 and isinstance(where, list):
                where.append(copy.deepcopy(inside))
            elif action == 1 and key in keys and inside is not None:
                del where[key]
            elif action == 2 and isinstance(inside, (dict, list)):
                where[key] = json.dumps(inside) if rng.integers(2) else repr(inside)
            elif action == 3:
                where[key] = None
            else:
                where[key] = value(rng)
            break
    return row


def write(path: Path, rows: list[Row], kind: str, rng: np.random.Generator) -> int | None:
    """Write a file; the number of rows in it, None where damage makes that unknown."""
    lines = [json.dumps(row).encode("utf-8", "surrogatepass") for row in rows]
    whole: int | None = len(rows)
    if kind.startswith("jsonl"):
        data = b"\n".join(lines) + b"\n"
    elif kind.startswith("json"):
        data = b"[" + b",\n".join(lines) + b"]"
    elif kind in ("csv", "tsv"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows({k: as_cell(v) for k, v in row.items()} for row in rows)
        data = text.getvalue().encode("utf-8", "surrogatepass")
    else:
        table = as_table(rows)
        sink = io.BytesIO()
        if kind == "parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
        data = sink.getvalue()
    if rng.integers(6) == 0:  # damage: cut short, bytes that are no text, another encoding
        at, how = int(rng.integers(len(data))), int(rng.integers(4))
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + rng.bytes(3) + data[at:]
        elif how == 2:
            data = data.replace(b'"', b"", 1)
        else:
            data = data.decode("utf-8", "replace").encode("utf-16")
        whole = None
    if kind.endswith(".gz"):
        data = gzip.compress(data, 1)
    elif kind.endswith(".zst"):
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return whole


def as_cell(cell: Any) -> Any:
    return cell if isinstance(cell, str) or cell is None else json.dumps(cell)


def as_table(rows: list[Row]) -> pa.Table:
    """An arrow table; a column that neither parquet nor arrow can hold is text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        cells = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(cells)
            alone = pa.table({name: columns[name]})
            pq.write_table(alone, io.BytesIO())  # no empty structs
            with pa.ipc.new_stream(io.BytesIO(), alone.schema) as out:
                out.write_table(alone)  # at most 64 levels
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
            texts = [c and as_cell(c).encode("utf-8", "replace").decode() for c in cells]
            columns[name] = pa.array([t if t else None for t in texts], pa.string())
    return pa.table(columns)


class Breach(Exception):
    """What the head of this file promises does not hold."""


def run_file(path: Path, num_rows: int | None, tokenizer: str, totals: Counter[str]) -> None:
    """Preprocess one file and count. Raises `Breach`."""
    prefix = path.parent / "out"
    args = preprocess.PreprocessArgs(
        input=[str(path)],
        tokenizer=tokenizer,
        output_prefix=str(prefix),
        max_length=512,
        max_rejected=1.0,
        keep=["duplicates"],
        workers=1,
        force=True,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            manifest = preprocess.preprocess(args)
    except ValueError as error:
        if "\n" in str(error) or not (
            "no comparison is left" in str(error) or path.name in str(error)
        ):
            raise Breach(f"not one line that names the file: {error!r}") from error
        totals["files refused"] += 1
        totals["rows of refused files"] += num_rows or 0
        return
    made, listed = manifest["input"], Path(f"{prefix}.rejected.jsonl")
    kept, rejected = manifest["num_comparisons"], sum(made["rejected"].values())
    lines = listed.read_text().count("\n") if listed.exists() else 0
    if made["rows"] != kept + rejected or lines != rejected:
        raise Breach(f"{made['rows']} rows, {kept} kept, {rejected} rejected, {lines} listed")
    grouped = made["files"][0]["schema"] == "helpsteer"
    if num_rows is not None and not grouped and made["rows"] != num_rows:
        raise Breach(f"{num_rows} rows were written, {made['rows']} read")
    wrong = verify(open_preferences(prefix))
    if wrong:
        raise Breach(wrong[0])
    responses = count_responses(path, tokenizer)
    noted = sum(made["notes"].get(note, 0) for note in (UNRATED, NO_TEXT))
    if responses["in"] != manifest["num_responses"] + noted:
        raise Breach(
            f"{responses['in']} responses, {manifest['num_responses']} kept, {noted} noted"
        )
    totals.update(
        {
            "files read": 1,
            "rows": made["rows"],
            "rows kept": kept,
            "rows rejected": rejected,
            "responses of kept rows": responses["in"],
            "responses kept": manifest["num_responses"],
            "responses noted": noted,
        }
    )
    totals.update({f"rejected: {reason}": n for reason, n in made["rejected"].items()})


def count_responses(path: Path, tokenizer: str) -> Counter[str]:
    """Responses that the schema reads in the rows that become comparisons."""
    plan, found = plan_input(resolve([str(path)])[0]), Counter[str]()
    encoder = PairTokenizer.load(tokenizer, max_length=512)
    assert plan.schema is not None
    for _, row, _ in plan.rows():
        with contextlib.suppress(Rejected, UnicodeEncodeError):
            if isinstance(row, dict):
                encoder.encode_comparison(plan.schema.convert(row))
                found["in"] += len(plan.schema.parse(row).responses)
    return found


def fuzz(count: int, seed: int, folder: Path, tokenizer: str) -> Counter[str]:
    """``count`` mutated rows in files of all kinds under ``folder``. Raises `Breach`."""
    loaded: dict[str, PairTokenizer] = {}
    load, totals = PairTokenizer.load, Counter[str]()

    def load_once(name: Any, **settings: Any) -> PairTokenizer:
        key = f"{name} {settings.get('max_length')}"
        if key not in loaded:
            loaded[key] = load(name, **settings)
        return loaded[key]

    with mock.patch.object(PairTokenizer, "load", load_once):
        for number in range(-(-count // ROWS_OF_A_FILE)):
            rng = np.random.default_rng([seed, number])
            template = TEMPLATES[number % len(TEMPLATES)]
            kind = KINDS[number // len(TEMPLATES) % len(KINDS)]
            rows = [copy.deepcopy(template) for _ in range(5)]  # so that the schema is recognized
            rows += [mutate(template, rng) for _ in range(ROWS_OF_A_FILE)]
            for i, row in enumerate(rows[:5]):
                if isinstance(row.get("prompt"), str):
                    row["prompt"] += f" {i // 2}"
            path = folder / f"file{number}.{kind}"
            where = f"seed {seed}, file {path}"
            try:
                run_file(path, write(path, rows, kind, rng), tokenizer, totals)
            except Breach as breach:
                raise Breach(f"{where}: {breach}") from breach
            except Exception as error:
                raise Breach(f"{where}: {type(error).__name__}: {error}") from error
            totals["mutated rows"] += ROWS_OF_A_FILE
            totals["files"] += 1
            path.unlink()
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutated rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from tests.made_models import make_llama

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder, start = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic()
    tokenizer = str(make_llama(folder / "model"))
    try:
        totals = fuzz(args.count, args.seed, folder, tokenizer)
    except Breach as breach:
        print(f"breach: {breach}", file=sys.stderr)
        if breach.__cause__ is not None:
            raise breach.__cause__ from None
        return 1
    for name, number in totals.items():
        print(f"{name:<32} {number:>8,}")
    print(f"{'seconds':<32} {time.monotonic() - start:>8,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
