"""Rate of preprocessing and cost of opening.

    python benchmarks/data.py --data FILE... --tokenizer DIR
        MB of JSON lines per second, against two plain ways
    python benchmarks/data.py --num-comparisons 60000 10000000
        opening a synthetic dataset: time and memory
    python benchmarks/data.py --data FILE... --tokenizer DIR --check
        every stored id against apply_chat_template

The rate counts the bytes of the rows as JSON lines. "tokenize" is the time in which all rows are
read, converted, tokenized and written; "all" also holds imports, the tokenizer's load, the checks
over the whole set and the checksums. "per CPU s" divides by seconds of CPU of all processes instead
of the clock, to judge a measurement on a machine with other work. The plain ways encode the same
conversations in the same number of processes: the tokenizer of transformers on the whole text
(apply_chat_template), and sentencepiece on the messages where the folder has its model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rmega.cli import parse_args, run_tool  # noqa: E402
from rmega.config import NONE  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure preprocessing and opening."""

    data: Annotated[list[str], NONE] = dataclasses.field(default_factory=list)
    """Preference files, a row of the table each."""
    tokenizer: str | None = None
    """Folder of the tokenizer."""
    workers: int = 0
    """Processes; 0: one per core."""
    max_length: int = 2048
    """As for preprocess_pref.py."""
    repeats: int = 3
    """Runs of each; the best counts."""
    plain: bool = True
    """Also measure the plain ways."""
    check: bool = False
    """Compare the ids of every conversation with apply_chat_template instead of measuring."""
    num_comparisons: Annotated[list[int], NONE] = dataclasses.field(default_factory=list)
    """Sizes of synthetic datasets to be opened."""
    name: str = "data"
    """Results go to benchmarks/results/NAME.json."""


def comparisons_of(path: str, tokenizer: Any) -> tuple[list[Any], int]:
    """All comparisons of a file, and the bytes of its rows as JSON lines."""
    from rmega.preferences import sources
    from rmega.preferences.comparison import Rejected
    from rmega.preferences.reader import plan_input
    from rmega.preferences.resolve import resolve
    from rmega.preferences.worker import Converter

    source = resolve([path], flag="--data")[0]
    plan = plan_input(source, flag="--data")
    converter, found, size = Converter(tokenizer, [plan], None), [], 0
    for chunk in sources.read_chunks(source, 0):
        for _, row, _ in sources.decode(chunk):
            size += len(json.dumps(row, ensure_ascii=False, default=str).encode()) + 1
            with contextlib.suppress(Rejected):
                found.append(converter.comparison(row, plan))
    return found, size


def preprocess_once(path: str, args: Args) -> dict[str, float]:
    """One run of the tool in a process of its own; seconds of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import sys, time; start = time.time()\nfrom rmega.preferences import preprocess as"
            " p\ninner = p._convert_all\ndef timed(*a):\n    begin = time.time(); inner(*a);"
            " print('tokenize', time.time() - begin)\np._convert_all ="
            " timed\np.preprocess(p.PreprocessArgs(input=[sys.argv[1]], tokenizer=sys.argv[2],"
            " output_prefix=sys.argv[3], workers=int(sys.argv[4]), max_length=int(sys.argv[5])))\n"
        )
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                path,
                str(args.tokenizer),
                f"{folder}/out",
                str(args.workers),
                str(args.max_length),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise ValueError(f"--data {path}: {done.stderr.strip().splitlines()[-1]}")
        tokenize = next(
            float(line.split()[1])
            for line in done.stdout.splitlines()
            if line.startswith("tokenize ")
        )
        return {
            "tokenize": tokenize,
            "all": time.monotonic() - start,
            "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        }


_WORK: list[Any] = []


def _plain_transformers(part: tuple[int, int]) -> None:
    tokenizer, conversations, _ = _WORK
    for messages in conversations[part[0] : part[1]]:
        tokenizer.tokenizer.apply_chat_template(
            messages, chat_template=tokenizer.template, tokenize=True
        )


def _plain_sentencepiece(part: tuple[int, int]) -> None:
    _, conversations, model = _WORK
    for messages in conversations[part[0] : part[1]]:
        for message in messages:
            model.encode(message["content"])


def plain_seconds(function: Any, workers: int, num: int) -> float:
    """Seconds to run ``function`` over all conversations in ``workers`` processes (started before
    the clock)."""
    step = max(1, num // (workers * 8))
    parts = [(i, min(i + step, num)) for i in range(0, num, step)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(len, [()] * workers)
        start = time.monotonic()
        pool.map(function, parts, chunksize=1)
        return time.monotonic() - start


def measure_speed(args: Args) -> list[dict[str, Any]]:
    from rmega.preferences.tokenizer import PairTokenizer

    if args.tokenizer is None:
        raise ValueError("--tokenizer: name the folder of one")
    tokenizer = PairTokenizer.load(args.tokenizer)
    workers = args.workers or len(os.sched_getaffinity(0))
    model = None
    if (Path(args.tokenizer) / "tokenizer.model").is_file():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(
            model_file=str(Path(args.tokenizer) / "tokenizer.model")
        )
    rows = []
    for path in args.data:
        comparisons, size = comparisons_of(path, tokenizer)
        conversations = [c.prompt + r for c in comparisons for r in c.responses]
        _WORK[:] = [tokenizer, conversations, model]
        runs = [preprocess_once(path, args) for _ in range(args.repeats)]
        megabytes = size / 1e6
        row = {
            "file": Path(path).name,
            "rows": len(comparisons),
            "MB": megabytes,
            "tokenize MB/s": megabytes / min(r["tokenize"] for r in runs),
            "all MB/s": megabytes / min(r["all"] for r in runs),
            "all MB per CPU s": megabytes / min(r["cpu"] for r in runs),
        }
        plain = {
            "transformers MB/s": _plain_transformers,
            "sentencepiece MB/s": _plain_sentencepiece,
        }
        for name, function in plain.items():
            if args.plain and (function is _plain_transformers or model is not None):
                row[name] = megabytes / min(
                    plain_seconds(function, workers, len(conversations))
                    for _ in range(args.repeats)
                )
        rows.append(row)
    return rows


def check_ids(args: Args) -> list[dict[str, Any]]:
    """Every conversation's stored ids against apply_chat_template; ValueError at the first that
    differs."""
    from rmega.preferences.comparison import Rejected
    from rmega.preferences.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.load(str(args.tokenizer))
    rows = []
    for path in args.data:
        num = 0
        for comparison in comparisons_of(path, tokenizer)[0]:
            try:
                encoded = tokenizer.encode_comparison(comparison)
            except Rejected:
                continue
            for response, suffix in zip(comparison.responses, encoded.suffixes, strict=True):
                messages = [
                    {**m, "content": tokenizer.escape(m["content"])[0]}
                    for m in comparison.prompt + response
                ]
                want = tokenizer.tokenizer.apply_chat_template(
                    messages, chat_template=tokenizer.template, tokenize=True, return_dict=False
                )
                if [*encoded.prefix.tolist(), *suffix.tolist()] != [
                    *want,
                    tokenizer.reward_token_id,
                ]:
                    raise ValueError(f"{path}: other ids than apply_chat_template's: {messages}")
                num += 1
        rows.append({"file": Path(path).name, "conversations": num, "equal": "all"})
    return rows


_OPEN = """
import json, resource, sys, time
import numpy
from rmega.data.indexed import open_preferences
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()
open_preferences(sys.argv[2])  # the code itself is loaded and warm
before = resident()
start = time.perf_counter()
dataset = open_preferences(sys.argv[1])
seconds = time.perf_counter() - start
after_open = resident()
dataset.get(len(dataset) // 2)
print(json.dumps([seconds, after_open - before, len(dataset)]))
"""


def measure_opening(args: Args) -> list[dict[str, Any]]:
    """Open synthetic datasets in fresh processes; also the order of an epoch."""
    import numpy as np

    from rmega.data.batching import epoch_order
    from rmega.data.writer import PreferenceWriter

    def synthetic(prefix: str, num: int) -> None:
        with PreferenceWriter(prefix) as writer:
            for start in range(0, num, 1 << 18):
                n = min(1 << 18, num - start)
                lengths = np.tile(np.array([5, 3, 2], np.int32), n)
                writer.add_tokens(np.full(10 * n, 7, np.int32))
                writer.add_documents(
                    lengths, np.tile(np.array([0, 1, 0], np.float32), n), np.full(n, 3), np.zeros(n)
                )
            writer.close({"sources": ["synthetic"], "vocab_size": 8, "reward_token_id": 7})

    rows = []
    for num in args.num_comparisons:
        with tempfile.TemporaryDirectory() as folder:
            synthetic(f"{folder}/warm", 1)
            synthetic(f"{folder}/set", num)
            results = [
                json.loads(
                    subprocess.run(
                        [sys.executable, "-c", _OPEN, f"{folder}/set", f"{folder}/warm"],
                        capture_output=True,
                        text=True,
                        check=True,
                        env={**os.environ, "PYTHONPATH": str(ROOT)},
                    ).stdout.splitlines()[0]
                )
                for _ in range(args.repeats)
            ]
        start = time.monotonic()
        epoch_order(num, seed=0, epoch=0)
        rows.append(
            {
                "comparisons": num,
                "open ms": 1000 * min(r[0] for r in results),
                "memory KiB": max(r[1] for r in results) / 1024,
                "order of an epoch s": time.monotonic() - start,
            }
        )
    return rows


def main(args: Args) -> None:
    if not args.data and not args.num_comparisons:
        raise ValueError("--data or --num-comparisons: name what to measure")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts: dict[str, list[dict[str, Any]]] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        if args.data:
            parts["ids" if args.check else "speed"] = (
                check_ids(args) if args.check else measure_speed(args)
            )
        if args.num_comparisons:
            parts["opening"] = measure_opening(args)
    from benchmarks.common import environment, save, table

    for name, rows in parts.items():
        print(f"\n{name}\n{table(rows)}")
    save(
        args.name,
        {
            **environment(),
            "cores": len(os.sched_getaffinity(0)),
            "tokenizer": args.tokenizer,
            "max_length": args.max_length,
            "load": os.getloadavg()[0],
            **parts,
        },
    )


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args, description=__doc__)))
