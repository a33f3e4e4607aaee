"""Evaluations during a run and at its end."""

from __future__ import annotations

from tqdm import tqdm

from rmega import distributed
from rmega.distributed import log
from rmega.evaluation.in_training import Evaluations
from rmega.evaluation.results import flat_summary
from rmega.training.checkpointer import Checkpointer
from rmega.training.logs import MetricsLog
from rmega.training.rewards import evaluate
from rmega.training.start import Model, Start
from rmega.training.stopping import StopRequest


class Interrupted(Exception):
    """An evaluation that all ranks leave together, and why."""


class Evaluator:
    """Evaluates a run on each ``--valid-data-path``. The best result of the first one is noted with
    the checkpoints."""

    def __init__(
        self,
        start: Start,
        model: Model,
        metrics: MetricsLog,
        checkpoints: Checkpointer,
        stop: StopRequest,
    ) -> None:
        self.start, self.model, self.metrics = start, model, metrics
        self.checkpoints, self.stop = checkpoints, stop
        c = start.config
        self._files = Evaluations(
            c.checkpoint.save, start.valid, probes=c.train.eval_probes, resumed_at=start.resumed_at
        )

    def is_due(self, step: int) -> bool:
        """Whether ``--eval-interval`` wants an evaluation after a step, or before the first."""
        interval = self.start.config.train.eval_interval
        return step == 0 or (bool(interval) and step % interval == 0)

    def evaluate(self) -> str | None:
        """Evaluate every set; why it was interrupted, if it was. It may take longer than the minute
        that a queue gives a run to end. Sets that were evaluated before the run was resumed at this
        step are left out."""
        for name in self.start.valid:
            if self.model.state.iteration == self.start.resumed_at and name in self.start.evaluated:
                continue
            try:
                self._evaluate_set(name)
            except Interrupted as interrupted:
                return str(interrupted)
        return None

    def _evaluate_set(self, name: str) -> None:
        step, steps = self.model.state.iteration, self.start.steps
        dataset, device = self.start.valid[name], self.start.device
        probed = self._files.num_probed(name, last=step == steps)
        with tqdm(
            desc=f"evaluating {name}",
            total=len(dataset) + 3 * probed,
            leave=False,
            disable=None if distributed.rank() == 0 else True,
        ) as bar:

            def advance(count: int) -> None:
                bar.update(count)
                if reason := self.stop.agreed(device):
                    raise Interrupted(reason)

            batcher = self.start.batcher.over(dataset)
            rewards, evaluation = evaluate(self.model.wrapped, batcher, device, advance, probed)
        if bad := evaluation.get("not_finite"):
            log(
                f"warning: step {step}: {name}: {bad} of {evaluation['num_rewards']} rewards are"
                " not finite: no result of this evaluation"
            )
            self.metrics.row("eval_failed", step, {"name": name, **evaluation})
            return
        self.checkpoints.note_rewards(dataset, rewards, step)
        result = flat_summary(evaluation)
        log(
            f"Iter(val) [{step}/{steps}]  {name}: accuracy {result['accuracy']:.4f} (95 % interval"
            f" {result['accuracy_low']:.4f} to {result['accuracy_high']:.4f},"
            f" {result['num_pairs']} pairs)  margin {result['mean_margin']:.4f}  reward"
            f" {result['reward_mean']:.4f} +- {result['reward_std']:.4f}"
        )
        self.metrics.row("eval", step, {"name": name, **result})
        self._files.note(name, step, evaluation, last=step == steps)
        if step and name == next(iter(self.start.valid)):
            self.checkpoints.note_best(result["accuracy"], step)
