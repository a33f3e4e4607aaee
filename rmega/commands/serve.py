"""Serve a reward model over HTTP.

    python tools/serve.py --model MODEL --port 5000
    curl -s localhost:5000/score -d '{"conversations": [[
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]]}'

In OpenRLHF: --reward.remote_url http://127.0.0.1:5000/get_reward. Needs pip install 'rmega[serve]'.
After SIGTERM or Ctrl-C the accepted requests have --stop-seconds to finish; the exit code is 0.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rmega.cli import parse_args, run_tool


@dataclass(kw_only=True)
class ServeArgs:
    """Serve a reward model over HTTP: POST /get_reward, POST /score, GET /health, GET /info."""

    model: str
    """Hugging Face folder or hub name of a reward model, folder of a run, or one of its
    checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach the server only if you name another one, such as
    0.0.0.0."""
    port: int = 5000
    """Port; 0: any free one (it is printed)."""
    api_key_file: str | None = None
    """File with a key that requests must carry (Authorization: Bearer KEY). The environment
    variable RMEGA_API_KEY does the same."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """Arithmetic. Default: bf16 on a GPU, fp32 on a CPU. auto: bf16 where it is faster here."""
    reward_token: str | None = None
    """Token (or id) that rewards are read at, appended to each text, for a model that records none.
    Default: as the model records, else none (read at the last token of the text)."""
    max_tokens: int = 8192
    """Most tokens of a batch; a longer conversation has one to itself."""
    wait_ms: float = 5.0
    """How long the first request of a batch waits for others."""
    max_length: int | None = None
    """Most tokens of a conversation. Default: as in training, else the model's positions."""
    overlong: Literal["refuse", "cut"] = "refuse"
    """What happens to longer ones: 422, or cut as in training and reported."""
    max_conversations: int = 1024
    """Most conversations in a request (422)."""
    max_body_mb: float = 32.0
    """Largest body of a request (413)."""
    max_queue: int = 8192
    """Most conversations waiting; more are refused with 429 and Retry-After."""
    max_connections: int | None = None
    """Most open connections; one without a request makes room for a new one. Default: 4096, or
    fewer where the limit on open files (ulimit -n) asks for it."""
    header_seconds: float = 10.0
    """Longest time that a connection may take to send the headers of a request."""
    stop_seconds: float = 8.0
    """Longest time after SIGTERM for the requests that were accepted; then they get 503."""
    access_log: bool = False
    """A line per request."""


def main(args: ServeArgs) -> None:
    for flag, value in (
        ("--max-tokens", args.max_tokens),
        ("--max-conversations", args.max_conversations),
        ("--max-body-mb", args.max_body_mb),
        ("--max-queue", args.max_queue),
        ("--max-length", args.max_length),
        ("--max-connections", args.max_connections),
        ("--header-seconds", args.header_seconds),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{flag} {value}: must be greater than 0")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: must lie between 0 and 65535")
    for flag, value in (("--wait-ms", args.wait_ms), ("--stop-seconds", args.stop_seconds)):
        if value < 0:
            raise ValueError(f"{flag} {value}: must not be negative")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "tools/serve.py is one process; start one per port instead of using torchrun"
        )
    key = api_key(args.api_key_file)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed (pip install 'rmega[serve]')") from None
    from rmega.scoring.connections import (
        MAX_HEADER_BYTES,
        ConnectionPool,
        LimitedConnection,
        allowed_connections,
    )
    from rmega.scoring.queue import ScoringQueue
    from rmega.scoring.server import Limits, RewardService, listen, make_app, run

    pool = ConnectionPool(allowed_connections(args.max_connections), args.header_seconds)
    sockets = [listen(args.host, args.port)]  # a port in use is said before the model is read
    where = f"http://{args.host}:{sockets[0].getsockname()[1]}"
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"--host {args.host}: whoever reaches this machine can use the server; --api-key-file"
            " asks for a key",
            file=sys.stderr,
            flush=True,
        )

    def load() -> Any:
        from rmega.scoring.scorer import load_scorer

        scorer = load_scorer(
            args.model, dtype=args.dtype, max_tokens=args.max_tokens, reward_token=args.reward_token
        )
        if scorer.tokenizer is None:
            raise ValueError(f"--model {args.model}: has no tokenizer")
        for message in scorer.tokenizer.messages:
            print(message, file=sys.stderr)
        print(scorer.tokenizer.reading, file=sys.stderr)
        info = scorer.describe()
        print(
            f"serving {args.model} ({info['family']}, {info['dtype']} on {info['device']}) at"
            f" {where}",
            flush=True,
        )
        return scorer

    limits = Limits(
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_conversations=args.max_conversations,
        max_length=args.max_length,
        cut=args.overlong == "cut",
        max_queue=args.max_queue,
    )
    queue = ScoringQueue(load, max_tokens=args.max_tokens, wait=args.wait_ms / 1000)
    service = RewardService(queue, limits, model=args.model, api_key=key)
    config = uvicorn.Config(
        make_app(service),
        http=functools.partial(LimitedConnection, pool=pool),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_level="info" if args.access_log else "error",
        access_log=args.access_log,
        timeout_graceful_shutdown=math.ceil(args.stop_seconds) + 2,  # ``run`` is done before
        lifespan="off",
    )
    finished = run(uvicorn.Server(config), service, sockets, pool, stop_seconds=args.stop_seconds)
    print(
        f"stopped after {queue.num_scored:,} conversations in {service.num_requests:,} requests"
        + ("" if finished or queue.scorer is None else "; those in progress were given up"),
        flush=True,
    )
    if not finished:  # threads that read the model or score are not waited for
        os._exit(0)


def api_key(path: str | None) -> str | None:
    """The key of --api-key-file, else of the environment, else None."""
    if path is not None:
        key = Path(path).read_text(encoding="utf-8").strip()
        if not key:
            raise ValueError(f"--api-key-file {path}: empty")
        return key
    return os.environ.get("RMEGA_API_KEY") or None


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main, parse_args(ServeArgs))
