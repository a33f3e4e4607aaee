"""Serve a reward model over HTTP.

    python tools/serve.py --model MODEL --port 5000
    curl -s localhost:5000/score -d '{"conversations": [[
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]]}'

In OpenRLHF: --reward.remote_url http://127.0.0.1:5000/get_reward. Clients of vLLM's /classify and
/pooling can be pointed here, too; /docs is a page of all endpoints. Needs pip install
'rmega[serve]'. Several GPUs: one process each (CUDA_VISIBLE_DEVICES, --port) behind a load balancer
that polls /health. After SIGTERM or Ctrl-C the accepted requests have --stop-seconds to finish; the
exit code is 0.
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
    """Serve a reward model over HTTP: POST /score, /get_reward (OpenRLHF), /classify and /pooling
    (vLLM); GET /health, /info, /metrics (Prometheus), /docs."""

    model: str
    """A reward model: Hugging Face folder or hub name, a run folder, or one of its checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts local connections only; 0.0.0.0 listens on all
    interfaces."""
    port: int = 5000
    """Port to listen on; 0 picks a free one, which is printed."""
    api_key_file: str | None = None
    """File with the key that clients must send (Authorization: Bearer KEY); RMEGA_API_KEY does the
    same."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """Compute dtype. Default: auto on a GPU (bf16 from compute capability 8.0), fp32 on a CPU. auto
    on a CPU: bf16 where it measures faster."""
    reward_token: str | None = None
    """Token (text or id) to append and read the reward at, for models that record none. Default:
    the recorded token; without one, the last token of the text."""
    max_tokens: int = 8192
    """Maximum tokens per batch; a longer conversation gets a batch of its own."""
    wait_ms: float = 5.0
    """How long the first request of a batch waits for others, in milliseconds."""
    max_length: int | None = None
    """Maximum tokens per conversation. Default: the limit of training, else the model's
    positions."""
    overlong: Literal["cut", "refuse"] = "cut"
    """Conversations over --max-length. cut: truncate as in training (left-prompt where training
    dropped them) and report it in the answer; refuse: answer 422."""
    normalize: bool = False
    """Return (r - mean) / std, with mean and std of the rewards on the first held-out set of
    training."""
    max_conversations: int = 1024
    """Maximum conversations per request (else 422)."""
    max_body_mb: float = 32.0
    """Maximum size of a request body in MB (else 413)."""
    max_queue: int = 8192
    """Maximum conversations waiting; beyond that requests get 429 with Retry-After."""
    max_connections: int | None = None
    """Maximum open connections; an idle one is closed to make room for a new one. Default: 4096, or
    fewer where ulimit -n requires it."""
    header_seconds: float = 10.0
    """Maximum time that a client may take to send request headers, in seconds."""
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
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed (pip install 'rmega[serve]')") from None
    from rmega.scoring.connections import (
        MAX_HEADER_BYTES,
        ConnectionPool,
        LimitedConnection,
        allowed_connections,
    )
    from rmega.scoring.limits import Limits
    from rmega.scoring.queue import ScoringQueue
    from rmega.scoring.server import listen, make_app, run
    from rmega.scoring.service import RewardService

    pool = ConnectionPool(allowed_connections(args.max_connections), args.header_seconds)
    sockets = [listen(args.host, args.port)]  # before the model is read
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
        if limits.cut and (policy := scorer.tokenizer.overlong) in ("drop", "error"):
            print(
                f"trained with --overlong {policy}: longer conversations are cut as by left-prompt"
                " (--overlong refuse answers 422)",
                file=sys.stderr,
            )
            scorer.tokenizer.overlong = "left-prompt"
        if args.normalize:
            service.normalize = mean_and_std(args.model, scorer.folder)
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
    sys.stderr.flush()
    os._exit(0)  # as ``run`` wants it


def mean_and_std(model: str, folder: Path) -> tuple[float, float]:
    """Of the rewards of the first held-out set, as the export or run that was read records them.
    ValueError where it does not."""
    from rmega.export.folder import rewards_of_model

    rewards = rewards_of_model(folder)
    if rewards is None or not rewards["std"]:
        raise ValueError(
            f"--normalize: {model} records no spread of held-out rewards (a training with"
            " --valid-data-path does)"
        )
    mean, std, step = (rewards[name] for name in ("mean", "std", "step"))
    print(
        f"rewards are normalized: mean {mean:.6g}, standard deviation {std:.6g} of"
        f" {rewards['set']} at step {step:,}",
        file=sys.stderr,
    )
    return mean, std


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
