"""Training runs for tests: data from generated comparisons, runs in worker processes or under a
launcher."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.made_rows import messages, write_lines

ROOT = Path(__file__).resolve().parents[1]
FAULTS: dict[str, list] = {}
"""What was done to runs -> [what holds afterwards, how often it was done, how often it held];
printed at the end."""


@contextlib.contextmanager
def fault(what: str, holds: str) -> Iterator[None]:
    """Counts one trial of a fault, and that it was survived if the block ends well."""
    row = FAULTS.setdefault(what, [holds, 0, 0])
    row[1] += 1
    yield
    row[2] += 1


def fault_table() -> str:
    """The counts as a Markdown table."""
    rows = [
        f"| {what} | {tried} | {held} | {holds} |" for what, (holds, tried, held) in FAULTS.items()
    ]
    return "\n".join(
        ["| fault | times | survived | what holds afterwards |", "|---|---|---|---|", *rows]
    )


def make_data(model: Path, folder: Path, count: int = 60, **more) -> str:
    """The prefix of ``count`` comparisons, tokenized for ``model``; ``more``: PreprocessArgs."""
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    write_lines(folder / "rows.jsonl", messages(count))
    preprocess(
        PreprocessArgs(
            input=(str(folder / "rows.jsonl"),),
            tokenizer=str(model),
            output_prefix=str(folder / "rows"),
            **{"max_length": 128, **more},
        )
    )
    return str(folder / "rows")


def flags(
    model: Path, data: str, run: Path | None = None, *, steps: int = 8, batch: int = 6, **more
) -> list[str]:
    """Flags of a tiny fp32 run; ``more`` with underscores, True for a switch."""
    options = {
        "hf_model": model,
        "data_path": data,
        "train_steps": steps,
        "global_batch_size": batch,
        "lr": 1e-3,
        "precision": "fp32",
        "matmul_precision": "highest",
        "max_tokens_per_microbatch": 512,
        "log_interval": 1,
        "head_init": "normal",
        **({"save": run, "load": run} if run else {}),
        **more,
    }
    out = []
    for name, value in options.items():
        if value is not None:
            out.append("--" + name.replace("_", "-"))
            out += [] if value is True else [str(value)]
    return out


def train(
    rank: int, world_size: int, argv: list[str], events: dict[int, tuple[str, int]] | None = None
) -> int:
    """Run examples/pretrain_reward.py in this process; its exit code.

    ``events[step] = (what, on_rank)`` happens on that rank in the step, if it is a signal's name,
    or after it: "die".
    """
    import rmega.training.train as engine
    from examples import pretrain_reward
    from rmega.training.stopping import StopRequest

    original, done = engine.train_step, itertools.count(1)

    def train_step(*args, **kwargs):
        what, on_rank = (events or {}).get(next(done), ("", -1))
        here = on_rank == rank
        if here and what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        report = original(*args, **kwargs)
        if here and what == "die":
            os._exit(9)
        return report

    engine.train_step = train_step
    try:
        return pretrain_reward.main(argv)
    finally:
        engine.train_step = original
        StopRequest.noted = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train_and_say(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    """``train``, with what this rank printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = train(rank, world_size, argv)
    return code, printed.getvalue()


def start(
    ranks: int,
    argv: list[str],
    *,
    launcher: str = "launch",
    env: dict[str, str] | None = None,
    program: Path = ROOT / "examples" / "pretrain_reward.py",
    **options,
) -> subprocess.Popen:
    """A run under tools/launch.py, torchrun, or alone ("python"), with stdout and stderr in one
    pipe."""
    starter = {
        "launch": [
            sys.executable,
            str(ROOT / "tools" / "launch.py"),
            "--nproc-per-node",
            str(ranks),
        ],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)],
        "python": [sys.executable],
    }[launcher]
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    environment.update(
        {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
            **(env or {}),
        }
    )
    return subprocess.Popen(
        [*starter, str(program), *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every full tensor of a checkpoint, weights and optimizer state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(folder))
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def edit_info(folder: Path, *, drop: str = "", **fields) -> None:
    """Change fields of a checkpoint's rmega.json, or drop one, as if it had been written so."""
    from rmega.checkpointing.run_folder import INFO, info_text

    info = {**json.loads((folder / INFO).read_text()), **fields}
    info.pop(drop, None)
    (folder / INFO).write_text(info_text(info))


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and len(first) > 10
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
