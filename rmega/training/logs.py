"""Log lines, ``metrics.jsonl``, TensorBoard and Weights & Biases."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rmega.config import TrainingConfig
from rmega.distributed import log, rank
from rmega.io import write_durably

# The columns of a training line, in order, and how each is printed.
COLUMNS = {
    "lr": ".4e",
    "eta": "",
    "time": ".4f",
    "data_time": ".4f",
    "memory": "d",
    "loss": ".4f",
    "acc": ".4f",
    "chosen_score_mean": ".4f",
    "rejected_score_mean": ".4f",
    "grad_norm": ".4f",
    "tie_threshold": ".4f",
    "num_samples": "d",
    "num_tokens": "d",
    "shared": ".3f",
    "fill": ".4f",
    "pairs/s": ".2f",
}


def duration(seconds: float) -> str:
    """``2:59:41``; days in front where there are any."""
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


class TimeSpent:
    """Training time of this process, and of the whole run, by what the checkpoint that it resumed
    from (``info``) recorded. Steps that are repeated after a resume count once."""

    def __init__(self, info: Mapping[str, Any], resumed_at: int | None) -> None:
        self._begun, self._resumed_at = time.monotonic(), resumed_at
        self._before: float | None = 0.0 if resumed_at is None else info.get("train_seconds")

    @property
    def here(self) -> float:
        """Seconds of this process."""
        return time.monotonic() - self._begun

    @property
    def whole(self) -> float | None:
        """Seconds of the whole run; None where its checkpoint is of a version that did not note
        them."""
        return None if self._before is None else self._before + self.here

    def __str__(self) -> str:
        if self._resumed_at is None:
            return duration(self.here)
        whole = "" if self.whole is None else f", {duration(self.whole)} in all"
        return f"{duration(self.here)} since the resume at step {self._resumed_at}{whole}"


def memory_mb() -> int:
    """Peak memory of this process in MB: of its GPU under CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def train_line(step: int, total: int, row: Mapping[str, Any]) -> str:
    """``Iter(train) [   10/15230]  lr: 3.9580e-07  eta: 2:59:41  time: 0.7083 ...``"""
    parts = [f"{k}: {row[k]:{form}}" for k, form in COLUMNS.items() if row.get(k) is not None]
    return f"Iter(train) [{step:>{len(str(total))}}/{total}]  " + "  ".join(parts)


class Tracker(NamedTuple):
    """A program that draws curves: takes the numbers of a step, and is closed."""

    note: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


class MetricsLog:
    """Rows of ``metrics.jsonl`` in the run folder, and the same to TensorBoard and Weights &
    Biases.

    Only rank 0 writes. Without a folder only the lines on the terminal remain. tensorboard: "auto"
    uses it where it is installed, "on" raises ValueError where it is not. A resumed run
    (``resumed_at``: its last good step) continues the same Weights & Biases run.
    """

    def __init__(
        self,
        run: str | None,
        *,
        resumed_at: int | None = None,
        tensorboard: str = "off",
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = None
        self._trackers: dict[str, Tracker] = {}
        if rank() != 0:
            return
        if run is not None:
            path = Path(run) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_rows_after(path, resumed_at)
            self._file = open(path, "a", encoding="utf-8")
        if tensorboard == "on" and run is None:
            raise ValueError("--tensorboard needs --save, where its files go")
        if tensorboard != "off" and run is not None:
            board = _board(Path(run) / "tensorboard", resumed_at, named=tensorboard == "on")
            if board is not None:
                self._trackers["tensorboard"] = board
        if wandb_project:
            self._trackers["wandb"] = _wandb_run(wandb_project, run, resumed_at, config)

    @classmethod
    def of(cls, config: TrainingConfig, *, resumed_at: int | None) -> MetricsLog:
        """That of a run with these flags."""
        return cls(
            config.checkpoint.save,
            resumed_at=resumed_at,
            tensorboard=config.train.tensorboard,
            wandb_project=config.train.wandb_project,
            config=config.as_dict(),
        )

    def row(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row {"type": kind, "step": step, ...}."""
        if rank() != 0:
            return
        if self._file:
            try:
                self._file.write(json.dumps(_no_nan({"type": kind, "step": step, **values})) + "\n")
                self._file.flush()
            # a full disk, say: the row stays in the buffer and is retried with the next one
            except OSError as error:
                log(f"warning: metrics.jsonl: {error}; training continues")
        name = f"{kind}/{values['name']}" if "name" in values else kind
        numbers = {f"{name}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        for name, tracker in list(self._trackers.items()):
            self._use(name, tracker.note, numbers, step)

    def _use(self, name: str, action: Callable[..., object], *args: Any) -> None:
        """``action(*args)`` of a tracker, which is dropped if it fails. Curves are no reason to end
        a training."""
        try:
            action(*args)
        except Exception as error:
            del self._trackers[name]
            log(
                f"warning: {name}:"
                f" {str(error).splitlines()[0] if str(error) else type(error).__name__}; off from"
                " here on, training continues"
            )

    def close(self) -> None:
        """Flush and close everything."""
        if self._file:
            try:
                self._file.close()
            except OSError as error:
                log(f"warning: metrics.jsonl: {error}; its last rows are lost")
        for name, tracker in list(self._trackers.items()):
            self._use(name, tracker.close)
        self._file, self._trackers = None, {}


def _no_nan(value: Any) -> Any:
    """nan and infinity as null, because JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, resumed_at: int | None, *, named: bool) -> Tracker | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # also an installation that is broken: nobody asked for it by name
        if named:
            raise ValueError(f"--tensorboard on: {error} (pip install 'rmega[track]')") from None
        log(f"tensorboard: off, {error}; tools/report_run.py draws metrics.jsonl")
        return None
    # What a resumed run repeats is hidden from this step on; the checkpoint's own step stays.
    board = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)

    def note(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            board.add_scalar(key, value, step)

    return Tracker(note, board.close)


def _wandb_run(
    project: str, run: str | None, resumed_at: int | None, config: Mapping[str, Any] | None
) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "--wandb-project: wandb is not installed (pip install 'rmega[track]')"
        ) from None
    noted = Path(run) / "wandb_run_id" if run is not None else None
    known = None
    if noted and resumed_at is not None and noted.is_file():
        known = noted.read_text().strip()
    started = wandb.init(
        project=project,
        dir=run,
        config=dict(config or {}),
        id=known,
        resume="allow" if known else None,
    )
    if noted:
        noted.write_text(f"{started.id}\n")
    return Tracker(lambda numbers, step: started.log(numbers, step=step), started.finish)


def _drop_rows_after(path: Path, step: int | None) -> None:
    """A resumed run writes the steps after its checkpoint again; a run from scratch starts an empty
    file.

    A row that a crash left half written is dropped, too.
    """

    def stays(line: str) -> bool:
        try:
            return json.loads(line).get("step", 0) <= step
        except ValueError:
            return False

    rows = (
        []
        if step is None
        else [line for line in path.read_text(encoding="utf-8").splitlines() if stays(line)]
    )
    write_durably(path, "".join(f"{line}\n" for line in rows))
