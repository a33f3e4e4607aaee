"""Log line, metrics row and progress bar of the steps."""

from __future__ import annotations

import math
import time

from tqdm import tqdm

from rmega import distributed
from rmega.distributed import log
from rmega.training.logs import MetricsLog, TimeSpent, duration, memory_mb, train_line
from rmega.training.monitor import Watch
from rmega.training.start import Start
from rmega.training.train import StepReport


class Clock:
    """Time since it was made or last read, in seconds."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._at, elapsed = now, now - self._at
        return elapsed


class Logger:
    """Takes the report of each step; ``flush`` writes the line of those since the last one."""

    def __init__(self, start: Start, metrics: MetricsLog, spent: TimeSpent) -> None:
        self.start, self.metrics, self.spent = start, metrics, spent
        self.first = start.resumed_at or 0
        self.clock = Clock()
        """``clock.lap()`` excludes time that was not spent in steps."""
        self.watch = Watch()
        # A short run, too, leaves enough rows for a curve.
        default = max(1, min(10, start.steps // 50))
        self.interval = start.config.train.log_interval or default
        self._window: list[tuple[StepReport, float, float]] = []
        self._bar = tqdm(
            desc="training",
            total=start.steps,
            initial=self.first,
            leave=False,
            disable=None if distributed.rank() == 0 else True,  # None: if stderr is not a terminal
        )

    def step(self, step: int, report: StepReport, documents, data_time: float) -> bool:
        """Note a step, and warn of what is wrong with it; False after too many skipped updates."""
        for line in self.watch.look(step, report, documents.tolist()):
            log(line)
        self._window.append((report, data_time, self.clock.lap()))
        self._bar.update()
        limit = self.start.config.optimizer.max_skipped_steps
        return self.watch.skipped_in_a_row < limit

    def is_due(self, step: int) -> bool:
        """Whether a line is to be written after a step."""
        return step % self.interval == 0 or step == self.start.steps

    def flush(self, step: int, lr: float) -> None:
        """Write the line and the row of the steps since the last ones. ``lr``: the last step's."""
        window, self._window = self._window, []
        reports = [report for report, _, _ in window]
        seconds = sum(data + compute for _, data, compute in window)
        pairs = sum(r.num_pairs for r in reports)
        mean = {  # with --loss rao_kupper all pairs of a line may be tied
            name: sum(getattr(r, name) * r.num_pairs for r in reports) / pairs if pairs else None
            for name in ("acc", "chosen_score_mean", "rejected_score_mean")
        }
        loss = sum(r.loss * r.num_terms for r in reports) / max(
            sum(r.num_terms for r in reports), 1
        )
        norms = [
            r.grad_norm for r in reports if r.grad_norm is not None and math.isfinite(r.grad_norm)
        ]
        tokens, real = sum(r.num_tokens for r in reports), sum(r.real_tokens for r in reports)
        padding = sum(r.padding for r in reports)
        eta = self.spent.here / (step - self.first) * (self.start.steps - step)
        row = {
            "lr": lr,
            "eta": duration(eta),
            "time": seconds / len(window),
            "data_time": sum(data for _, data, _ in window) / len(window),
            "memory": memory_mb(),
            "loss": loss,
            **mean,
            "grad_norm": sum(norms) / len(norms) if norms else None,
            "num_samples": sum(r.num_samples for r in reports),
            "num_tokens": tokens,
            "shared": 1 - (tokens - padding) / max(real, 1),
            "fill": 1 - padding / max(tokens, 1),
            "pairs/s": pairs / seconds,
        }
        if reports[-1].tie_threshold is not None:
            row["tie_threshold"] = reports[-1].tie_threshold
        log(train_line(step, self.start.steps, row))
        self.metrics.row(
            "train",
            step,
            {
                **{("pairs_per_second" if k == "pairs/s" else k): v for k, v in row.items()},
                "eta_seconds": eta,
                "train_seconds": self.spent.whole,
                "real_tokens": real,
                "num_pairs": pairs,
                "skipped": sum(not r.updated for r in reports),
            },
        )

    @property
    def skipped(self) -> str:
        """The end of the run's last line."""
        return f"; {self.watch.skipped} updates skipped" if self.watch.skipped else ""

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()
