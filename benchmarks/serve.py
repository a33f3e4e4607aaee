"""Rate of serving: tools/serve.py against vLLM, on the same conversations in the same run.

    python benchmarks/serve.py --model SMOLLM2 --data HH.jsonl.gz --vllm /envs/vllm/bin/vllm

Both servers are started on the same folder in the same dtype and get the same requests: /classify
with the messages of one conversation each, --concurrent of them open at a time. Template and
tokenizer are the server's work. The two responses of a row share their prompt and follow each
other. Servers take turns within each repeat, the idle one stays up; the rewards are compared. Every
repeat has conversations of its own, so that vLLM's cache of prefixes, which stays on, helps where
it would in use. A folder that is no reward model gets a random head.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rmega.cli import parse_args, run_tool  # noqa: E402

START_SECONDS = 900.0  # of a machine that is busy
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure conversations per second of two servers."""

    model: str
    """Folder of a Llama, with or without a reward head (64 dimensions per head on CPUs)."""
    data: str
    """Preference file."""
    vllm: str = "vllm"
    """Program of vLLM, from an environment of its own."""
    vllm_flags: str = "--enforce-eager"
    """More flags of vLLM."""
    rows: int = 64
    """Rows of the file in a repeat, drawn at random."""
    repeats: int = 3
    """Turns of both servers."""
    concurrent: int = 32
    """Open requests."""
    max_length: int = 2048
    """Most tokens of a conversation; rows with longer ones are left out."""
    dtype: str = "float32"
    """Of both servers: float32 or bfloat16."""
    threads: int = 2
    """Threads of each server."""
    name: str = "serve"
    """Results go to benchmarks/results/NAME.json."""


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[int]:
    """The port of a server that ``command`` and ``--port`` start, as soon as it is ready. A server
    that ends or is not ready in time raises RuntimeError with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the server's own environment: neither our modules nor our interpreter
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    folder = str(Path(command[0]).parent)
    inherited["PATH"] = f"{folder}{os.pathsep}{inherited.get('PATH', '')}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **env},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} is not ready:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as one:
        one.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        return one.recv(64).split()[1:2] == [b"200"]
    return False


def ask(port: int, path: str, bodies: Sequence[dict], *, concurrent: int = 1024) -> list[dict]:
    """The answers to requests, of which so many are open at a time. RuntimeError for one that is
    refused."""

    async def post(body: dict, slots: asyncio.Semaphore) -> dict:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
        async with slots:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            status, _, rest = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        if status.split()[1] != b"200":
            raise RuntimeError(f"{path} {data[:200]!r}: {rest[:500]!r}")
        return json.loads(rest)

    async def all_of_them() -> list[dict]:
        slots = asyncio.Semaphore(concurrent)
        return await asyncio.gather(*(post(body, slots) for body in bodies))

    return asyncio.run(all_of_them())


def conversations(args: Args, folder: str) -> list[list[list[dict]]]:
    """The conversations of each repeat, and of one before them that warms up; those of a row follow
    each other."""
    from rmega.preferences.load_tokenizer import load_tokenizer
    from rmega.preferences.resolve import resolve
    from rmega.preferences.scorable import read_rows

    tokenizer = load_tokenizer(folder, flag="--model")
    rows = [row for row, _ in read_rows(resolve([args.data], flag="--data")) if row.error is None]
    random.Random(0).shuffle(rows)
    turns: list[list[list[dict]]] = [[]]
    for row in rows:
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in row.conversations]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if max(map(len, ids)) >= args.max_length:
            continue
        if len(turns[-1]) >= args.rows * len(texts):
            if len(turns) > args.repeats:
                return turns
            turns.append([])
        turns[-1] += row.conversations
    raise ValueError(f"--data {args.data}: not enough rows for {args.repeats} repeats")


def main(args: Args) -> int:
    from benchmarks.common import ROOT, environment, save, table
    from benchmarks.score import with_head

    precision = {"float32": "fp32", "bfloat16": "bf16"}[args.dtype]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = with_head(args.model, str(temporary / "model"))
        turns = conversations(args, folder)
        ours = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", folder]
        ours += ["--dtype", precision, "--max-length", str(args.max_length)]
        theirs = [args.vllm, "serve", folder, "--served-model-name", "model"]
        theirs += ["--runner", "pooling", "--dtype", args.dtype]
        theirs += ["--max-model-len", str(args.max_length), *shlex.split(args.vllm_flags)]
        theirs += ["--pooler-config", '{"use_activation": false}']
        ports = {
            "vLLM": stack.enter_context(
                started(theirs, temporary / "vllm.log", {**ON_CPU, **threads})
            ),
            "tools/serve.py": stack.enter_context(
                started(ours, temporary / "rmega.log", {"PYTHONPATH": str(ROOT), **threads})
            ),
        }
        times: dict[str, list[float]] = {side: [] for side in ports}
        rewards: dict[str, list[float]] = {side: [] for side in ports}
        for repeat, chats in enumerate(turns):
            bodies = [{"model": "model", "messages": chat} for chat in chats]
            for side, port in ports.items():
                start = time.perf_counter()
                answers = ask(port, "/classify", bodies, concurrent=args.concurrent)
                if repeat:  # the first turn warms up
                    times[side].append(time.perf_counter() - start)
                rewards[side] += [a["data"][0]["probs"][0] for a in answers]
    first = "vLLM"
    lines: list[dict[str, Any]] = []
    for side in ports:
        ratios = [a / b for a, b in zip(times[first], times[side], strict=True)]
        pairs = zip(rewards[first], rewards[side], strict=True)
        lines.append(
            {
                "server": side,
                "conversations/s": len(turns[0]) / statistics.median(times[side]),
                "ratio": statistics.median(ratios),
                "ratio min": min(ratios),
                "ratio max": max(ratios),
                "max difference": max(abs(a - b) for a, b in pairs),
            }
        )
    print(
        f"\n{len(turns[0])} conversations a turn, {args.concurrent} open requests\n{table(lines)}"
    )
    result = {"environment": environment(), "arguments": dataclasses.asdict(args)}
    save(args.name, {**result, "servers": lines, "seconds": times})
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args, prog="benchmarks/serve.py")))
