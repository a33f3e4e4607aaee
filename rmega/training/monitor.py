"""Warnings about skipped updates and spikes of gradient norm or scores."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from rmega.training.train import StepReport

HISTORY = 50
SPIKE = 10.0
"""Warn of a gradient norm above this many times the median of the last ``HISTORY`` steps."""
SCORE = 4.0
"""Mean scores beyond this are close to the barrier at 5; and so is a jump by as much within
``HISTORY`` steps."""
FEWEST = 10


class Watch:
    """Checks every step's report. The same on every rank, because reports are."""

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self.skipped = 0
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._scores: deque[float] = deque(maxlen=HISTORY)
        self._near = False

    def look(self, step: int, report: StepReport, documents: Sequence[int]) -> list[str]:
        """Warnings about a step, a line each; none for a normal one."""
        warnings = []
        if report.updated:
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            norm = "overflow" if report.grad_norm is None else report.grad_norm
            warnings.append(
                f"warning: step {step}: loss {report.loss}, gradient norm {norm}: update skipped"
                f" ({self.skipped_in_a_row} in a row, {self.skipped} in all); comparisons"
                f" {list(documents)}"
            )
        if report.grad_norm is not None and math.isfinite(report.grad_norm):
            usual = statistics.median(self._norms) if len(self._norms) >= FEWEST else math.inf
            if report.grad_norm > SPIKE * usual:
                warnings.append(
                    f"warning: step {step}: gradient norm {report.grad_norm:.4g}, "
                    f"{report.grad_norm / usual:.0f} times the usual {usual:.4g}; comparisons "
                    f"{list(documents)}"
                )
            self._norms.append(report.grad_norm)
        scores = (report.chosen_score_mean, report.rejected_score_mean)
        if all(math.isfinite(s) for s in scores):
            warnings += self._look_at_scores(step, scores)
        return warnings

    def _look_at_scores(self, step: int, scores: tuple[float, float]) -> list[str]:
        warnings = []
        level = sum(scores) / 2
        near = max(abs(s) for s in scores) > SCORE
        if near and not self._near:
            warnings.append(
                f"warning: step {step}: mean scores {scores[0]:.2f} (chosen) and {scores[1]:.2f}"
                f" (rejected) have left +-{SCORE:g}"
            )
        elif len(self._scores) >= FEWEST and abs(level - statistics.median(self._scores)) > SCORE:
            warnings.append(
                f"warning: step {step}: scores jumped to a mean of {level:.2f} from "
                f"{statistics.median(self._scores):.2f}"
            )
        if warnings:
            self._scores.clear()  # a jump is reported once, the new level is the usual one
        self._near = near
        self._scores.append(level)
        return warnings
