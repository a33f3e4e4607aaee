"""``train(config)``: a whole run in one function.

``examples/pretrain_reward.py`` has the same function, to be copied and changed.
"""

from __future__ import annotations

from rmega.checkpointing.lock import hold
from rmega.config import TrainingConfig
from rmega.distributed import log
from rmega.training import start
from rmega.training import train as compute
from rmega.training.checkpointer import Checkpointer
from rmega.training.evaluator import Evaluator
from rmega.training.logger import Logger
from rmega.training.logs import MetricsLog, TimeSpent
from rmega.training.packs_ahead import PacksAhead
from rmega.training.stopping import EXIT_REQUEUE, StopRequest


def train(config: TrainingConfig) -> int:
    """Train, or resume; the exit code: 0, or 75 when the run stopped early to be started again.
    Called by every rank."""
    base = start.join(config)
    with hold(config.checkpoint.save):
        run = start.prepare(config, base)
        if run.is_complete():
            log(f"nothing to do: the run is complete at step {run.resumed_at}")
            return 0
        model = start.build(run)
        start.write_config(run)
        spent = TimeSpent(run.info, run.resumed_at)
        checkpoints = Checkpointer(run, model, spent)
        metrics = MetricsLog.of(config, resumed_at=run.resumed_at)
        stop = StopRequest(config.checkpoint.exit_duration_min)
        evaluator = Evaluator(run, model, metrics, checkpoints, stop)
        state, reason = model.state, None

        if evaluator.is_due(state.iteration) and state.iteration < run.steps:
            reason = evaluator.evaluate()  # also what a signal kept the process before from
            checkpoints.save_best_of_another_run()
        logger = Logger(run, metrics, spent)
        ahead = PacksAhead(run.batcher, run.device)

        def requests() -> list[float]:
            return [*stop.requests(), float(checkpoints.is_writing)]

        while state.iteration < run.steps and not reason:
            documents, packs = ahead.take(state.consumed)
            data_time, lr = logger.clock.lap(), model.lr
            report = compute.train_step(
                model.wrapped, model.optimizer, packs, config.loss, len(documents), requests
            )
            *stops, writing = report.requests
            model.advance(len(documents))
            if not logger.step(state.iteration, report, documents, data_time):
                checkpoints.give_up(report, documents)
            if state.iteration < run.steps:
                reason = stop.reason(stops)
            if reason or logger.is_due(state.iteration):
                logger.flush(state.iteration, lr)
            if state.iteration == run.steps or reason:
                break
            if evaluator.is_due(state.iteration):
                reason = evaluator.evaluate()
            if not reason and checkpoints.is_due(state.iteration):
                checkpoints.save()
            else:
                checkpoints.poll(some_rank_writes=bool(writing))
            logger.clock.lap()
        ahead.close()
        logger.close()

        if not reason:
            reason = evaluator.evaluate()  # the last one
        if reason:
            kept = "" if checkpoints.saves else " (without --save nothing is kept)"
            log(f"stopping after step {state.iteration}: {reason}{kept}")
        checkpoints.finish()
        metrics.close()
        if reason:
            return EXIT_REQUEUE if checkpoints.saves else 1
        log(
            f"done: {state.iteration} steps, {state.consumed:,} comparisons, {spent}"
            f"{logger.skipped}"
        )
        return 0
