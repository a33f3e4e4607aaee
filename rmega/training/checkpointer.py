"""When a run saves, what its checkpoints hold beside tensors, pruning."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from rmega import distributed, ops
from rmega.checkpointing import checkpoint, run_folder
from rmega.data.batching import Mixture
from rmega.data.indexed import PreferenceDataset, StoredComparison
from rmega.distributed import log
from rmega.evaluation.token_probes import View
from rmega.io import write_durably
from rmega.training import disk, preflight
from rmega.training.logs import TimeSpent
from rmega.training.rewards import compute_rewards
from rmega.training.start import Model, Start
from rmega.training.train import StepReport

HF_FILES = (
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


class Checkpointer:
    """Saves a run under ``--save``; without it, nothing. Every method is called by every rank."""

    def __init__(self, start: Start, model: Model, spent: TimeSpent) -> None:
        self.start, self.model, self.spent = start, model, spent
        self.run = start.config.checkpoint.save
        self.hf_files = [start.folder / n for n in HF_FILES if (start.folder / n).is_file()]
        self.best: tuple[float, int] | None = None
        """Accuracy and step of the best evaluation of the first validation set."""
        if start.info.get("best"):
            self.best = tuple(start.info["best"])
        self.saved_at = model.state.iteration
        self._saver: checkpoint.Saver | None = None
        self._begun = self._stall = 0.0
        if self.run is None:
            return
        if start.found and preflight.resumes_in_place(start.config) and distributed.rank() == 0:
            if line := run_folder.set_aside_newer(self.run, model.state.iteration):
                log(line)
        self._kept = _verification_comparisons(start)
        keep_last = start.config.checkpoint.keep_last
        self._saver = checkpoint.Saver(self.run, model.optimizer, keep_last=keep_last)
        self._saver.reserve(**model.parts)
        self._announce()

    @property
    def saves(self) -> bool:
        """Whether the run has a --save."""
        return self._saver is not None

    def note_best(self, accuracy: float, step: int) -> None:
        """Record an evaluation of the first validation set."""
        if self.best is None or accuracy > self.best[0]:
            self.best = (accuracy, step)

    def note_rewards(self, dataset: PreferenceDataset, rewards: np.ndarray, step: int) -> None:
        """Record an evaluation's ``rewards`` [responses] of a whole validation set: a checkpoint of
        the same step reuses those of its verification comparisons."""
        if self._saver is None:
            return
        at = 0
        for kept in self._kept:  # the first comparisons of a set, in its order
            if kept.dataset is dataset:
                end = at + len(kept.stored.suffixes)
                kept.rewards, kept.step, at = rewards[at:end].tolist(), step, end

    def is_best(self, step: int) -> bool:
        """Whether a step's evaluation is the best so far, and such steps are to be saved."""
        wanted = self.start.config.checkpoint.save_best
        return wanted and self.best is not None and self.best[1] == step

    def is_due(self, step: int) -> bool:
        """Whether to save after a step that is not the last one."""
        interval = self.start.config.checkpoint.save_interval
        return (bool(interval) and step % interval == 0) or self.is_best(step)

    def save_best_of_another_run(self) -> None:
        """Save where the checkpoint that a run resumed from, which another folder holds, turns out
        to be the best so far."""
        at = self.start.resumed_at
        if at and self.is_best(at) and not preflight.resumes_in_place(self.start.config):
            self.save()

    def finish(self) -> None:
        """Save the last step, if it is not yet, and wait."""
        if self.saved_at != self.model.state.iteration:
            self.save(last=True)
        elif self._saver:
            self._wait()

    def save(self, *, last: bool = False) -> None:
        """Begin a checkpoint; wait for it if it is the process's ``last``. A failure is a warning,
        or raised if last."""
        if self._saver is None:
            return
        stalled = time.monotonic()  # also for one that is still being written
        self._wait()
        self._begun = time.monotonic()
        try:
            self._saver.start(
                state=self.model.state,
                **self.model.parts,
                info=self._info(),
                hf_files=self.hf_files,
                best=self.best[1] if self.best else None,
            )
        except OSError as error:
            if last:
                raise
            log(f"warning: {error}; training continues")
            return
        self.saved_at = self.model.state.iteration
        self._stall = time.monotonic() - stalled
        if last or not self.start.config.checkpoint.async_save:
            self._wait(raises=last)

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._saver is not None and self._saver.is_writing

    def poll(self, *, some_rank_writes: bool) -> None:
        """Report a checkpoint that is done. Called by every rank, with the sum of ``is_writing``
        over them, which travels with the sums of a step."""
        if self._saver and not some_rank_writes:
            self._wait()

    def _wait(self, *, raises: bool = False) -> None:
        """Wait for a checkpoint that is being written, and report it."""
        try:
            folder = self._saver.wait()
        except OSError as error:
            if raises:
                raise
            log(f"warning: {error}; training continues")
            return
        if folder is not None:
            for line in self._saver.warnings:
                log(line)
            log(
                f"saved {folder} in {time.monotonic() - self._begun:.1f} s (training waited"
                f" {self._stall:.1f} s)"
            )

    def give_up(self, report: StepReport, documents) -> None:
        """Raise ValueError for too many skipped updates, and leave a file with which
        tools/replay.py repeats the last batch."""
        step, limit = self.model.state.iteration, self.start.config.optimizer.max_skipped_steps
        where = "without --save there is no file to replay the batch from"
        if self._saver:
            self._wait()
            # Skipped updates changed nothing, so these are the weights that met the batch.
            run = Path(self.run)
            folder = checkpoint.save(
                run / "skipped",
                state=self.model.state,
                **self.model.parts,
                info=self._info(with_rewards=False),  # nothing exports this one
            )
            content = {
                "step": step,
                "documents": documents.tolist(),
                "consumed": self.model.state.consumed - len(documents),
                "loss": str(report.loss),
                "grad_norm": str(report.grad_norm),
                "checkpoint": folder.relative_to(run).as_posix(),
                "config": self.start.config.as_dict(),
            }
            path = run / f"skipped_{step}.json"
            if distributed.rank() == 0:
                write_durably(path, json.dumps(content, indent=1))
            where = f"python tools/replay.py {path} repeats the last one"
        raise ValueError(
            f"--max-skipped-steps {limit}: so many updates in a row had no finite gradient; {where}"
        )

    def _announce(self) -> None:
        if distributed.rank() != 0:
            return
        s = self.start
        size = disk.checkpoint_bytes(
            s.config, s.geometry, files=self.hf_files, bytes_per_element=s.precision.dtype.itemsize
        )
        for line in disk.announce(
            s.config,
            size,
            first=self.model.state.iteration,
            steps=s.steps,
            best_of_evaluations=bool(s.valid),
        ):
            log(line)

    def _info(self, *, with_rewards: bool = True) -> dict[str, Any]:
        """What a checkpoint records besides its tensors. Called by every rank."""
        s = self.start
        manifest = s.dataset.manifest
        return {
            "config": s.config.as_dict(),
            "geometry": dataclasses.asdict(s.geometry),
            "hf_config": s.hf_config,
            "base_model": s.name,
            **({"base": s.base_record} if s.base_record else {}),
            "head": self.model.head,
            "manifest": manifest,
            "num_comparisons": len(s.dataset),
            "data": s.dataset.identity,
            "reward_token_id": manifest["reward_token_id"],
            "pad_token_id": manifest["pad_token_id"],
            "dtype": str(s.precision.dtype).removeprefix("torch."),
            "changes": s.changes,
            "best": self.best,
            "train_seconds": self.spent.whole,
            "ops": ops.active_implementation(s.device),
            "verification": self._verification(with_rewards),
        }

    def _verification(self, with_rewards: bool) -> list[dict[str, Any]]:
        """The comparisons for verifying an export, with the rewards that this layout computes for
        them now, or computed in an evaluation at this step. Called by every rank."""
        # In fp8 a forward pass would update the scaling factors of the next step.
        with_rewards &= self.start.config.model.fp8_format == "none"
        step = self.model.state.iteration
        missing = [kept for kept in self._kept if kept.step != step]
        if with_rewards and missing:
            batcher = self.start.batcher.over(View([kept.stored for kept in missing]))
            rewards = compute_rewards(self.model.wrapped, batcher, self.start.device).tolist()
            for kept in missing:
                count = len(kept.stored.suffixes)
                kept.rewards, kept.step, rewards = rewards[:count], step, rewards[count:]
        return [
            {
                "prefix": kept.stored.prefix.tolist(),
                "suffixes": [s.tolist() for s in kept.stored.suffixes],
                "held_out": kept.held_out,
                **({"rewards": kept.rewards} if with_rewards else {}),
            }
            for kept in self._kept
        ]


@dataclasses.dataclass
class _Kept:
    """A comparison for verifying an export, and the rewards of its responses at ``step``."""

    dataset: PreferenceDataset | Mixture
    stored: StoredComparison
    held_out: bool
    rewards: list[float] = dataclasses.field(default_factory=list)
    step: int = -1


def _verification_comparisons(start: Start) -> list[_Kept]:
    """The first comparisons of the held-out sets; where they are too few, the training set's do for
    comparing two computations."""
    wanted = start.config.checkpoint.num_verification_comparisons
    kept: list[_Kept] = []
    for dataset in (*start.valid.values(), start.dataset):
        count = min(wanted - len(kept), len(dataset))
        kept += [_Kept(dataset, dataset.get(i), dataset is not start.dataset) for i in range(count)]
    return kept
