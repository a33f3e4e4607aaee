"""A training run from configuration to the last checkpoint: what ``examples/pretrain_reward.py``
composes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rmega import distributed, ops, precision
from rmega.checkpointing import checkpoint, run_folder
from rmega.checkpointing.lock import hold
from rmega.checkpointing.run_folder import check_shared
from rmega.config import MIN_COMPARISONS, TrainingConfig
from rmega.data.batching import Batcher, Mixture
from rmega.data.indexed import open_preferences, split_label
from rmega.distributed import log
from rmega.evaluation.in_training import Evaluations
from rmega.evaluation.results import flat_summary
from rmega.hub import resolve_model
from rmega.io import write_durably
from rmega.models.hf import load_hf, read_geometry
from rmega.training import disk, plan, preflight, resume, train
from rmega.training.logs import MetricsLog, TimeSpent, duration, memory_mb, train_line
from rmega.training.monitor import Watch
from rmega.training.stopping import EXIT_REQUEUE, StopRequest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
)


def named_prefix(text: str) -> tuple[str, str]:
    """``NAME=PREFIX`` or ``PREFIX`` -> (name, prefix); the name defaults to the prefix's last
    part."""
    name, prefix = split_label(text)
    return (Path(prefix).name if name is None else name), prefix


class EvaluationLeft(Exception):
    """An evaluation that all ranks leave together, and why."""


class Run:
    """Holds what the steps of a run share. The methods are called in the order in which they stand
    here."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        p = config.parallel
        distributed.prepare_cuda(
            p.tensor_model_parallel_size, deterministic=config.train.deterministic
        )
        distributed.quiet_engine()
        preflight.check_save(config)
        self.folder = resolve_model(config.model.hf_model)
        self.geometry, self.hf_config = read_geometry(self.folder)
        train.transformer_layout(config, self.geometry, on_cpu=not torch.cuda.is_available())
        plan.check_memory(config, self.geometry)
        self.device = distributed.initialize(
            tp=p.tensor_model_parallel_size,
            pp=p.pipeline_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size,
            seed=config.train.seed,
            timeout_minutes=p.distributed_timeout_minutes,
        )
        self._held = contextlib.ExitStack()
        self._held.enter_context(hold(config.checkpoint.save))
        try:
            self._begin(config)
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        """Give the run folder's lock back."""
        self._held.close()

    def _begin(self, config: TrainingConfig) -> None:
        if config.checkpoint.save:
            check_shared(config.checkpoint.save)
            preflight.check_save(config)  # another run may have ended since
            if distributed.rank() == 0:
                run_folder.clean(config.checkpoint.save)
        else:
            log(
                "note: no --save: weights and metrics of this run will not be kept (--save FOLDER"
                " keeps them)"
            )
        self.found = preflight.find_start(config)
        self.info = run_folder.read_info(self.found) if self.found else {}
        self.changes: list[dict[str, Any]] = list(self.info.get("changes", []))
        """What differed at each resume: {"iteration": ..., flag: [before, from there on]}."""
        if self.found:
            preflight.check_same_model(self.info, self.found, self.geometry, self.folder)
            if changes := resume.changes(self.info, config):
                log(resume.describe(changes))
                self.changes.append({"iteration": self.info["iteration"], **changes})
        self.precision = precision.choose_together(
            resume.precision_to_use(self.info, config.train.precision),
            config.train.matmul_precision,
            self.device,
        )
        self.state = checkpoint.RunState()
        self.best: tuple[float, int] | None = None
        self.evaluated: set[str] = set()
        """Validation sets whose evaluation at the step that the run resumes at is in its
        metrics.jsonl."""
        self.saver: checkpoint.Saver | None = None

    def load_data(self) -> None:
        """Open the datasets and check that they belong to this model."""
        c = self.config
        self.dataset = Mixture.open(c.data.data_path, seed=c.train.seed)
        self.valid = {}
        for text in c.data.valid_data_path:
            name, prefix = named_prefix(text)
            if name in self.valid:
                raise ValueError(
                    f"--valid-data-path {text}: the name {name} is taken (write NAME=PREFIX)"
                )
            self.valid[name] = open_preferences(prefix)
        self.manifest = self.dataset.manifest
        for flag, dataset in [
            *(("--data-path", d) for d in self.dataset.datasets),
            *(("--valid-data-path", d) for d in self.valid.values()),
        ]:
            preflight.check_dataset(flag, dataset, self.dataset, self.geometry, self.folder)
            preflight.check_content(flag, dataset)
        if c.loss.use_margin:
            preflight.check_margins(self.dataset)
        preflight.check_tokenizer(self.dataset, self.folder)
        preflight.check_reward_token(self.dataset, self.folder)
        if self.found:
            preflight.check_same_data(self.info, self.found, self.dataset)
            self.evaluated = preflight.evaluated_before(c, self.info["iteration"])
        self.steps, self.comparisons = c.train.total_steps(len(self.dataset))
        # a short run, too, leaves enough rows for a curve
        self.log_interval = c.train.log_interval or max(1, min(10, self.steps // 50))
        shards = c.parallel.tensor_model_parallel_size * c.parallel.pipeline_model_parallel_size
        from megatron.core import parallel_state

        self.batcher = Batcher.of(
            c,
            self.dataset,
            self.geometry,
            num_ranks=distributed.world_size() // shards,
            rank=parallel_state.get_data_parallel_rank(),
            max_consumed=self.comparisons,
        )
        log(
            f"data: {len(self.dataset):,} comparisons per epoch from {', '.join(c.data.data_path)};"
            f" {self.steps:,} steps of {c.train.global_batch_size}"
        )

    def is_complete(self) -> bool:
        """True, and said, where ``--load`` has the run's last step and its evaluation of every set:
        then nothing needs to be built."""
        last = bool(self.found) and self.info["iteration"] >= self.steps
        complete = last and self.evaluated >= self.valid.keys()
        if complete:
            log(f"nothing to do: the run is complete at step {self.info['iteration']}")
        return complete

    def build(self) -> None:
        """Model, gradient buffers, optimizer and schedule; weights from the Hugging Face folder."""
        c = self.config
        self.wrapped = train.build_model(
            c, self.geometry, dtype=self.precision.dtype, device=self.device
        )
        self.head = "; ".join(
            dict.fromkeys(
                load_hf(
                    chunk,
                    self.folder,
                    self.geometry,
                    head_init=c.model.head_init,
                    head_seed=c.train.seed,
                )
                for chunk in self.wrapped
            )
        )
        self.wrapped = train.wrap_model(self.wrapped, c)
        self.optimizer, self.scheduler = train.build_optimizer(self.wrapped, c, self.steps)
        if self.found:
            self.head = self.info.get(
                "head", self.head
            )  # where the run's head began, for its next checkpoints
        log(
            f"model: {self.folder} ({self.geometry.family}, {self.geometry.num_layers} layers of"
            f" {self.geometry.hidden_size}),"
            f" {'head from the checkpoint' if self.found else self.head}"
        )
        p, vpp = c.parallel, c.parallel.virtual_pipeline_model_parallel_size
        self.layout = (
            f"tp {p.tensor_model_parallel_size}{' + sequence parallel' if p.sequence_parallel else ''}, pp "
            f"{p.pipeline_model_parallel_size}{f' x {vpp} chunks' if vpp else ''}, dp"
            f" {self.batcher.num_ranks}"
            f"{' (distributed optimizer)' if p.use_distributed_optimizer else ''}"
        )
        log(f"layout: {self.layout}")
        log(
            f"compute: {self.precision.description}; "
            f"{train.implementations(c, self.wrapped, self.optimizer, self.device)}"
        )

    def restore_or_start(self) -> None:
        """Go on from ``--load`` where it has a checkpoint; open the logs."""
        c = self.config
        if self.found:
            self.state = checkpoint.load(
                self.found, wrapped=self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler
            )
            if self.info.get("best"):
                self.best = tuple(self.info["best"])
        if c.checkpoint.save and distributed.rank() == 0:
            Path(c.checkpoint.save).mkdir(parents=True, exist_ok=True)
            known = {
                "steps": self.steps,
                "layout": self.layout,
                "precision": precision.dtype_name(self.precision.dtype),
                "changes": self.changes,
            }
            write_durably(
                Path(c.checkpoint.save, "config.json"),
                json.dumps({**c.as_dict(), "run": known}, indent=1),
            )
        if c.checkpoint.save:
            if self.found and distributed.rank() == 0 and preflight.resumes_in_place(c):
                aside = run_folder.set_aside_newer(c.checkpoint.save, self.state.iteration)
                log(aside) if aside else None
            self.saver = checkpoint.Saver(
                c.checkpoint.save, self.optimizer, keep_last=c.checkpoint.keep_last
            )
            self.saver.reserve(
                wrapped=self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler
            )
            self._announce_checkpoints()
        resumed_at = self.state.iteration if self.found else None
        self.metrics = MetricsLog(
            c.checkpoint.save,
            resumed_at=resumed_at,
            tensorboard=c.train.tensorboard,
            wandb_project=c.train.wandb_project,
            config=c.as_dict(),
        )
        self.evaluations = Evaluations(
            c.checkpoint.save, self.valid, probes=c.train.eval_probes, resumed_at=resumed_at
        )

    def train(self) -> int:
        """All steps that are left. Returns the exit code: 0, or 75 when it stopped early to be
        started again."""
        c, self.spent = (
            self.config,
            TimeSpent(self.info, self.state.iteration if self.found else None),
        )
        self._check_verification()
        stop = StopRequest(c.checkpoint.exit_duration_min)
        first = self.state.iteration
        # Also what a signal kept the run before from: sets that it has evaluated are left out.
        interval = c.train.eval_interval
        if first == 0 or (interval and first < self.steps and first % interval == 0):
            if reason := self._evaluate(stop):
                return self._leave(f"before step {first + 1}: {reason}")
            if first and self.best and self.best[1] == first and not preflight.resumes_in_place(c):
                self._save()  # the best checkpoint so far, in this run's own folder
        progress = tqdm(
            desc="training",
            total=self.steps,
            initial=self.state.iteration,
            leave=False,
            disable=None if distributed.rank() == 0 else True,  # None: where stderr is no terminal
        )
        watch = Watch()
        clock = train.Clock()
        window: list[tuple[train.StepReport, float, float]] = []
        evaluated = saved = self.state.iteration
        while self.state.iteration < self.steps:
            documents = self.batcher.documents(self.state.consumed)
            packs = [pack.to(self.device) for pack in self.batcher.packs(documents)]
            data_time = clock.lap()
            lr = self.optimizer.param_groups[0]["lr"]
            report = train.train_step(self.wrapped, self.optimizer, packs, c.loss, len(documents))
            self.state.iteration += 1
            self.state.consumed += len(documents)
            self.scheduler.step(1)
            for line in watch.look(self.state.iteration, report, documents.tolist()):
                log(line)
            if watch.skipped_in_a_row >= c.optimizer.max_skipped_steps:
                self._give_up(report, documents)
            window.append((report, data_time, clock.lap()))
            progress.update()
            step = self.state.iteration
            reason = stop.agreed(self.device) if step < self.steps else None
            if step % self.log_interval == 0 or step == self.steps or reason:
                self._log(step, lr, window, first)
                window = []
            due = bool(c.checkpoint.save_interval) and step % c.checkpoint.save_interval == 0
            if (
                c.train.eval_interval
                and step % c.train.eval_interval == 0
                and step < self.steps
                and not reason
            ):
                reason = self._evaluate(stop)
                evaluated = step
                due |= self.best is not None and self.best[1] == step and c.checkpoint.save_best
                clock.lap()
            if reason:
                progress.close()
                return self._leave(f"after step {step}: {reason}", save=True)
            if due and step < self.steps:
                self._save()
                saved = step
                clock.lap()
            elif self.saver:
                self._note_saved(self.saver.poll)
        progress.close()
        reason = (
            self._evaluate(stop)
            if evaluated != self.steps or self.state.iteration == first
            else None
        )
        if reason:
            return self._leave(
                f"after step {self.steps}, before its evaluation was done: {reason}",
                save=saved != self.steps,
            )
        if saved != self.steps:
            self._save(last=True)
        self.metrics.close()
        log(
            f"done: {self.state.iteration} steps, {self.state.consumed:,} comparisons, {self.spent}"
            + (f"; {watch.skipped} updates skipped" if watch.skipped else "")
        )
        return 0

    def _leave(self, when_and_why: str, *, save: bool = False) -> int:
        """Save if there is something new, and the exit code of a run that is to be started
        again."""
        log(
            f"stopping {when_and_why}" + ("" if self.saver else " (without --save nothing is kept)")
        )
        if save:
            self._save(last=True)
        self.metrics.close()
        return EXIT_REQUEUE if self.saver else 1

    def _give_up(self, report: train.StepReport, documents) -> None:
        """Stop for too many skipped updates, and leave a file with which tools/replay.py repeats
        the last batch."""
        step, limit = self.state.iteration, self.config.optimizer.max_skipped_steps
        where = "without --save there is no file to replay the batch from"
        if self.saver:
            self._note_saved(self.saver.wait)
            # No update was made since the weights went wrong, if they did: these are the ones that
            # the batch met.
            run = Path(self.config.checkpoint.save)
            folder = checkpoint.save(
                run / "skipped",
                state=self.state,
                wrapped=self.wrapped,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                info=self._info(),
            )
            path = run / f"skipped_{step}.json"
            if distributed.rank() == 0:
                write_durably(
                    path,
                    json.dumps(
                        {
                            "step": step,
                            "documents": documents.tolist(),
                            "loss": str(report.loss),
                            "grad_norm": str(report.grad_norm),
                            "checkpoint": folder.relative_to(run).as_posix(),
                            "config": self.config.as_dict(),
                        },
                        indent=1,
                    ),
                )
            where = f"python tools/replay.py {path} repeats the last one"
        raise ValueError(
            f"--max-skipped-steps {limit}: so many updates in a row had no finite gradient; {where}"
        )

    def _check_verification(self) -> None:
        """Report now, not at the export after a week of training, that too few comparisons are
        there to verify it."""
        c = self.config
        kept = min(
            c.checkpoint.num_verification_comparisons,
            sum(map(len, self.valid.values())) + len(self.dataset),
        )
        if c.checkpoint.save and kept < MIN_COMPARISONS:
            log(
                f"note: verifying an export takes {MIN_COMPARISONS} comparisons, checkpoints of"
                f" this run will hold {kept} (--num-verification-comparisons)"
            )

    def _log(self, step: int, lr: float, window: list, first: int) -> None:
        reports = [r for r, _, _ in window]
        seconds = sum(d + s for _, d, s in window)
        pairs = sum(r.num_pairs for r in reports)
        mean = {
            name: sum(getattr(r, name) * r.num_pairs for r in reports) / max(pairs, 1)
            for name in ("loss", "acc", "chosen_score_mean", "rejected_score_mean")
        }
        norms = [
            r.grad_norm for r in reports if r.grad_norm is not None and math.isfinite(r.grad_norm)
        ]
        tokens, real = sum(r.num_tokens for r in reports), sum(r.real_tokens for r in reports)
        padding = sum(r.padding for r in reports)
        eta = self.spent.here / (step - first) * (self.steps - step)
        row = {
            "lr": lr,
            "eta": duration(eta),
            "time": seconds / len(window),
            "data_time": sum(d for _, d, _ in window) / len(window),
            "memory": memory_mb(),
            **mean,
            "grad_norm": sum(norms) / len(norms) if norms else None,
            "num_samples": sum(r.num_samples for r in reports),
            "num_tokens": tokens,
            "shared": 1 - (tokens - padding) / max(real, 1),
            "fill": 1 - padding / max(tokens, 1),
            "pairs/s": pairs / seconds,
        }
        log(train_line(step, self.steps, row))
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

    def _evaluate(self, stop: StopRequest) -> str | None:
        """Evaluate on every --valid-data-path; why it was left early, if it was. It may take longer
        than the minute that a queue gives a run to end."""
        resumed_at = self.info.get("iteration")
        for name, dataset in self.valid.items():
            if self.state.iteration == resumed_at and name in self.evaluated:
                continue  # done before the stop: its row and its file are there
            batcher = self.batcher.over(dataset)
            last = self.state.iteration == self.steps
            probed = self.evaluations.num_probed(name, last=last)
            bar = tqdm(
                desc=f"evaluating {name}",
                total=len(dataset) + 3 * probed,
                leave=False,
                disable=None if distributed.rank() == 0 else True,
            )

            def advance(count: int, bar: tqdm = bar) -> None:
                bar.update(count)
                if reason := stop.agreed(self.device):
                    raise EvaluationLeft(reason)

            try:
                evaluation = train.evaluate(self.wrapped, batcher, self.device, advance, probed)
            except EvaluationLeft as left:
                return str(left)
            finally:
                bar.close()
            step = self.state.iteration
            if bad := evaluation.get("not_finite"):
                log(
                    f"warning: step {step}: {name}: {bad} of {evaluation['num_rewards']} rewards are"
                    " not finite: no result of this evaluation"
                )
                self.metrics.row("eval_failed", step, {"name": name, **evaluation})
                continue
            result = flat_summary(evaluation)
            log(
                f"Iter(val) [{step}/{self.steps}]  {name}: accuracy {result['accuracy']:.4f} (95 %"
                f" interval {result['accuracy_low']:.4f} to {result['accuracy_high']:.4f},"
                f" {result['num_pairs']} pairs)  margin {result['mean_margin']:.4f}  reward"
                f" {result['reward_mean']:.4f} +- {result['reward_std']:.4f}"
            )
            self.metrics.row("eval", step, {"name": name, **result})
            self.evaluations.note(name, step, evaluation, last=last)
            if (
                name == next(iter(self.valid))
                and step
                and (self.best is None or result["accuracy"] > self.best[0])
            ):
                self.best = (result["accuracy"], step)
        return None

    def _save(self, *, last: bool = False) -> None:
        """Begin a checkpoint; wait for it if it is the process's ``last``. A failure is said, or
        raised if last."""
        if self.saver is None:
            return
        stalled = time.monotonic()  # also for one that is still being written
        self._note_saved(self.saver.wait)
        begun = time.monotonic()
        try:
            self.saver.start(
                state=self.state,
                wrapped=self.wrapped,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                info=self._info(),
                hf_files=self._hf_files(),
                best=self.best[1] if self.best else None,
            )
        except OSError as error:
            if last:
                raise
            log(f"warning: {error}; training continues")
            return
        self._save_begun, self._save_stall = begun, time.monotonic() - stalled
        if last or not self.config.checkpoint.async_save:
            self._note_saved(self.saver.wait, raises=last)

    def _note_saved(self, finish: Callable[[], Path | None], raises: bool = False) -> None:
        """``finish`` (the saver's poll or wait); say and prune when a checkpoint is done."""
        try:
            folder = finish()
        except OSError as error:
            if raises:
                raise
            log(f"warning: {error}; training continues")
            return
        if folder is not None:
            for line in self.saver.warnings:
                log(line)
            log(
                f"saved {folder} in {time.monotonic() - self._save_begun:.1f} s (training waited "
                f"{self._save_stall:.1f} s)"
            )

    def _hf_files(self) -> list[Path]:
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]

    def _announce_checkpoints(self) -> None:
        if distributed.rank() == 0:
            size = disk.checkpoint_bytes(
                self.config,
                self.geometry,
                files=self._hf_files(),
                bytes_per_element=self.precision.dtype.itemsize,
            )
            for line in disk.announce(
                self.config,
                size,
                first=self.state.iteration,
                steps=self.steps,
                best_of_evaluations=bool(self.valid),
            ):
                log(line)

    def _info(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside the tensors."""
        # Held-out comparisons first; where they are too few, the training set's do for comparing
        # two computations.
        verification = []
        for source in (*self.valid.values(), self.dataset):
            for i in range(
                min(
                    self.config.checkpoint.num_verification_comparisons - len(verification),
                    len(source),
                )
            ):
                stored = source.get(i)
                verification.append(
                    {
                        "prefix": stored.prefix.tolist(),
                        "suffixes": [s.tolist() for s in stored.suffixes],
                        "held_out": source is not self.dataset,
                    }
                )
        return {
            "config": self.config.as_dict(),
            "geometry": dataclasses.asdict(self.geometry),
            "hf_config": self.hf_config,
            "base_model": self.config.model.hf_model,
            "head": self.head,
            "manifest": self.manifest,
            "num_comparisons": len(self.dataset),
            "data": self.dataset.identity,
            "reward_token_id": self.manifest["reward_token_id"],
            "pad_token_id": self.manifest["pad_token_id"],
            "dtype": str(self.precision.dtype).removeprefix("torch."),
            "changes": self.changes,
            "best": self.best,
            "train_seconds": self.spent.whole,
            "ops": ops.active_implementation(self.device),
            "verification": verification,
        }
