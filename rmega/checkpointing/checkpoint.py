"""Save and load sharded checkpoints, in any layout.

RUN/iter_0000010/            written under a temporary name and renamed when every rank is done
    *.distcp, .metadata, ... Megatron-Core's dist_checkpointing: one key per tensor, global shapes
    hf/                      tokenizer and config.json of the base model
    rmega.json               format version, iteration, consumed comparisons, configuration,
                             geometry, manifest, comparisons for verifying an export, and "files":
                             size and crc32 of every other file; written last
RUN/latest_checkpointed_iteration.txt   the tracker, written after the folder has its name
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException

from rmega import __version__
from rmega.checkpointing import optimizer_state, run_folder
from rmega.checkpointing.find import damage
from rmega.checkpointing.metadata import EXTRA_STATE, read_metadata
from rmega.checkpointing.snapshot import Gatherer, Snapshot
from rmega.distributed import from_rank_0, own_share, rank
from rmega.io import fingerprint, one_line, sync_tree
from rmega.megatron import param_gather


@dataclasses.dataclass
class RunState:
    """Where a run is: optimizer steps done and comparisons consumed."""

    iteration: int = 0
    consumed: int = 0


def _chunks(wrapped) -> dict[str, torch.nn.Module]:
    """The model chunks of this rank without their data-parallel wrapper, by their key in a
    checkpoint."""
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in wrapped]
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _model_state(wrapped) -> dict[str, Any]:
    """Key of a chunk -> its sharded tensors by name, without extra state (``EXTRA_STATE``) and
    frozen weights, which are those of the base model."""
    metadata = optimizer_state.sharding_metadata()
    state = {}
    for key, chunk in _chunks(wrapped).items():
        frozen = _frozen(chunk)
        state[key] = {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.endswith(EXTRA_STATE) and name not in frozen
        }
    return state


def _frozen(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in chunk.named_parameters() if not p.requires_grad}


class Saver:
    """Writes the checkpoints of a run, one at a time: ``start`` copies, a thread writes, ``wait``
    finishes.

    Every method is called by every rank. A folder appears whole or not at all, then the tracker
    moves; a checkpoint that cannot be written (a full disk) raises OSError on every rank in
    ``wait``, and earlier ones are untouched. With ``keep_last`` older ones are removed
    after that (``run_folder.prune``); the threads check the health of those that it counts.
    """

    def __init__(self, run: Path | str, optimizer, *, keep_last: int = 0) -> None:
        self.run, self.keep_last = Path(run), keep_last
        self.gatherer = Gatherer(optimizer)
        self.warnings: list[str] = []
        """Lines about older checkpoints, from the last ``wait`` (on rank 0)."""
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._snapshot: Snapshot | None = None
        self._finish_with: tuple = ()
        self._validated = False
        self._damaged: dict[int, str] = {}

    def reserve(self, *, wrapped, optimizer, scheduler) -> None:
        """Plan a checkpoint, check it and take the memory for its copies now (on a GPU pinning it
        takes long), so that the first save stalls little longer than the others."""
        parts = (wrapped, optimizer, scheduler)
        self._take(self.run / "unwritten", RunState(), [], *parts, copies=False)

    def _content(self, state: RunState, wrapped, optimizer, scheduler) -> dict[str, Any]:
        """What a checkpoint holds: sharded tensors, and plain values that are the same on all
        ranks."""
        param_gather.finish(wrapped)
        optimizer_state.allocate_state(optimizer)
        content = _model_state(wrapped)
        content["optimizer"] = optimizer_state.sharded_state(optimizer, content, is_loading=False)
        content["scheduler"] = scheduler.state_dict()
        content["run"] = dataclasses.asdict(state)
        return content

    def _take(
        self, folder: Path, state: RunState, to_verify: list[int], *parts, copies: bool = True
    ) -> Snapshot:
        self.gatherer.start()
        snapshot = Snapshot(
            self._content(state, *parts),
            folder,
            self._buffers,
            self.gatherer,
            validate=not self._validated,
            copies=copies,
            afterwards=partial(self._verify, to_verify),
        )
        self._validated = True
        return snapshot

    def _verify(self, iterations: list[int]) -> dict[int, str | None]:
        """Iteration -> what is wrong with this rank's share of its files; run by the thread."""
        return {
            i: damage(run_folder.iteration_dir(self.run, i), share=own_share()) for i in iterations
        }

    def start(
        self,
        *,
        state: RunState,
        wrapped,
        optimizer,
        scheduler,
        info: dict[str, Any],
        hf_files: Sequence[Path] = (),
        best: int | None = None,
    ) -> None:
        """Copy everything and return; the thread writes. Waits first for a checkpoint that is still
        being written. ``best`` is an iteration that is not removed."""
        self.wait()
        final = run_folder.iteration_dir(self.run, state.iteration)
        partial_folder = final.with_name(final.name + ".partial")

        def prepare() -> list[int] | str:
            try:
                shutil.rmtree(partial_folder, ignore_errors=True)
                partial_folder.mkdir(parents=True)
                return run_folder.to_verify(
                    self.run, self.keep_last, best=best, damaged=self._damaged
                )
            except OSError as error:
                return str(error)

        if isinstance(to_verify := from_rank_0(prepare), str):
            raise OSError(f"{final}: checkpoint not written: {to_verify}")
        self._snapshot = self._take(partial_folder, state, to_verify, wrapped, optimizer, scheduler)
        self._finish_with = (
            dataclasses.asdict(state),
            info,
            tuple(hf_files),
            final,
            partial_folder,
            best,
        )
        # Small, and it holds references into the optimizer: written before training continues.
        if rank() == 0:
            try:
                with open(partial_folder / COMMON_STATE_FNAME, "wb") as file:
                    torch.save(self._snapshot.common, file)
            except (OSError, RuntimeError) as error:
                self._snapshot.fail(error)
        self._snapshot.thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._snapshot is not None and self._snapshot.thread.is_alive()

    def wait(self) -> Path | None:
        """Wait until all ranks have finished writing: the folder, or None if there is nothing to
        write. Called by every rank."""
        if self._snapshot is None:
            return None
        self._snapshot.thread.join()
        return self._finish()

    def _finish(self) -> Path:
        snapshot, self._snapshot = self._snapshot, None
        state, info, hf_files, final, partial_folder, best = self._finish_with
        own = (snapshot.error, snapshot.writer.results, snapshot.writer.files, snapshot.found)
        ranks: list[Any] | None = [None] * dist.get_world_size() if rank() == 0 else None
        dist.gather_object(own, ranks, dst=0)
        self.warnings = []

        def publish() -> str | None:
            """Run by rank 0; why the checkpoint is not written."""
            try:
                for number, (error, *_) in enumerate(ranks):
                    if error:
                        raise OSError(f"rank {number}: {error.splitlines()[0]}")
                snapshot.writer.finish(snapshot.metadata, [results for _, results, *_ in ranks])
                written = {name: value for _, _, files, _ in ranks for name, value in files.items()}
                self._complete(partial_folder, hf_files, {**state, **info}, written)
                run_folder.announce(self.run, state["iteration"])
                run_folder.publish_checkpoint(partial_folder, final)
            except Exception as error:  # whatever it is: the other ranks wait for the outcome
                if not final.exists():
                    run_folder.withdraw(self.run)
                shutil.rmtree(partial_folder, ignore_errors=True)
                return one_line(error)
            self._prune(state["iteration"], [found for *_, found in ranks], best)
            return None

        if failure := from_rank_0(publish):
            raise OSError(
                f"{final}: checkpoint not written; earlier ones are untouched ({failure})"
            )
        return final

    @staticmethod
    def _complete(
        folder: Path, hf_files: Sequence[Path], info: dict[str, Any], written: dict[str, list[int]]
    ) -> None:
        """Write what one rank writes, ``rmega.json`` last, and make the whole folder durable.
        ``written`` has the checksums of the ranks' own files."""
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        (folder / "hf").mkdir()
        for file in hf_files:
            shutil.copy2(file, folder / "hf" / file.name)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        files = {name: written.get(name) or fingerprint(folder / name) for name in sorted(names)}
        version = {"format_version": run_folder.FORMAT_VERSION, "rmega": __version__}
        content = {**version, **info, "files": files}
        with open(folder / run_folder.INFO, "w", encoding="utf-8") as file:
            file.write(run_folder.info_text(content))
        # Nothing older may be removed before all of this would survive a power cut.
        sync_tree(folder)

    def _prune(self, iteration: int, found: list[dict[int, str | None]], best: int | None) -> None:
        """Remove what ``keep_last`` allows. A failure is only a warning, because the checkpoint is
        written."""
        verified = {iteration, *(found[0] or ())}
        for problems in found:
            for i, problem in (problems or {}).items():
                if problem:
                    self._damaged.setdefault(i, problem)
                    self.warnings.append(f"warning: damaged checkpoint: {problem}")
        self._damaged.pop(iteration, None)
        try:
            run_folder.prune(
                self.run, self.keep_last, verified=verified, damaged=self._damaged, best=best
            )
        except OSError as error:
            self.warnings.append(f"warning: an old checkpoint is not removed: {one_line(error)}")


def save(
    run: Path | str,
    *,
    state: RunState,
    wrapped,
    optimizer,
    scheduler,
    info: dict[str, Any],
    hf_files: Sequence[Path] = (),
) -> Path:
    """Write one checkpoint and wait for it; called by every rank. Raises OSError, on every rank, if
    it cannot."""
    saver = Saver(run, optimizer)
    saver.start(
        state=state,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        info=info,
        hf_files=hf_files,
    )
    return saver.wait()


def load(folder: Path | str, *, wrapped, optimizer=None, scheduler=None) -> RunState:
    """Read a checkpoint into this layout, whatever layout wrote it; called by every rank.

    Without ``optimizer`` only the weights are read. Raises ValueError on a checkpoint that is
    damaged or does not fit.
    """
    info = run_folder.read_info(folder)
    read_metadata(folder)  # refuses what Megatron-Core's loader would run
    content = _model_state(wrapped)
    if optimizer is not None:
        optimizer_state.prepare_loading(optimizer)
        content["optimizer"] = optimizer_state.sharded_state(optimizer, content, is_loading=True)
        content["scheduler"] = scheduler.state_dict()
    try:
        loaded = dist_checkpointing.load(content, str(folder), validate_access_integrity=False)
    except (
        CheckpointingException,
        CheckpointException,
        RuntimeError,
        KeyError,
        OSError,
        EOFError,
    ) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{folder}: damaged, or of another model: {lines[0]} ... {lines[-1]}"
        ) from error
    for key, chunk in _chunks(wrapped).items():
        extra = [name for name in chunk.state_dict() if name.endswith(EXTRA_STATE)]
        chunk.load_state_dict({**_frozen(chunk), **loaded[key], **dict.fromkeys(extra)})
    if optimizer is not None:
        optimizer_state.load_state(optimizer, loaded["optimizer"])
        scheduler.num_steps = 0  # it adds the loaded count to its own
        scheduler.load_state_dict(loaded["scheduler"])
    return RunState(iteration=info["iteration"], consumed=info["consumed"])
