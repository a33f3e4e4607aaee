"""Sharded checkpoints of everything that a run needs to go on, in any layout.

RUN/iter_0000010/            written under a temporary name and renamed when every rank is done
    *.distcp, .metadata, ... megatron-core's dist_checkpointing: one key per tensor, global shapes
    hf/                      tokenizer and config.json of the base model
    rmega.json               format version, iteration, consumed comparisons, configuration, geometry, manifest, verification,
                             and "files": size and crc32 of every other file; written last
RUN/latest_checkpointed_iteration.txt   the tracker, written after the folder has its name
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch.distributed.checkpoint.api import CheckpointException

from rmega.checkpointing.run_folder import (
    FORMAT_VERSION,
    INFO,
    TRACKER,
    clean,
    damage,
    find,
    iteration_dir,
    latest_iteration,
    list_iterations,
    prune,
    read_info,
)
from rmega.checkpointing.snapshot import Gatherer, Snapshot
from rmega.distributed import device, rank
from rmega.io import fingerprint, publish, write_durably

__all__ = [
    "FORMAT_VERSION",
    "INFO",
    "TRACKER",
    "RunState",
    "Saver",
    "check_same_optimizer",
    "clean",
    "copy_of_weights",
    "damage",
    "find",
    "iteration_dir",
    "latest_iteration",
    "list_iterations",
    "load",
    "prune",
    "read_info",
    "save",
]


@dataclasses.dataclass
class RunState:
    """Where a run is: optimizer steps done and comparisons consumed."""

    iteration: int = 0
    consumed: int = 0


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


COPIES = (  # megatron-core's name for the fp32 copies of half-precision weights
    "fp32_from_fp16_params"
)


def _model_state(wrapped) -> dict[str, Any]:
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in wrapped]
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=_metadata())}
    return {
        f"model{i}": chunk.sharded_state_dict(metadata=_metadata())
        for i, chunk in enumerate(chunks)
    }


def _optimizer_state(optimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    sharded = model_state["model"] if "model" in model_state else model_state
    with _every_parameter_known(optimizer):
        state = optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=_metadata())
    if (
        COPIES in state
    ):  # a list that is empty, such as that of the head's group, gets lost on the way
        state[COPIES] = [group for group in state[COPIES] if group]
    return state


def _load_optimizer(optimizer, state: dict[str, Any]) -> None:
    if COPIES in state:
        kept = iter(state[COPIES])
        (part,) = optimizer.chained_optimizers
        state = {
            **state,
            COPIES: [next(kept) if group else [] for group in part.fp32_from_float16_groups],
        }
    for part in optimizer.chained_optimizers:
        # The engine tells groups apart by their multipliers, in which the head's equals another
        # one. Their order is that of the parameters, which is the same in every run of a model.
        part._filter_and_reorder_param_groups = lambda current, loaded: loaded
    optimizer.load_state_dict(state)


@contextlib.contextmanager
def _every_parameter_known(optimizer) -> Iterator[None]:
    """megatron-core's undistributed optimizer for half precision numbers half-precision parameters
    only, and then finds no tensor of the model for the state of the fp32 head. Here it sees all,
    in the order of their numbers.
    """
    parts = [
        part
        for part in optimizer.chained_optimizers
        if isinstance(part, Float16OptimizerWithFloat16Params)
    ]
    kept = [part.float16_groups for part in parts]
    for part in parts:
        mains, halves = (
            itertools.chain.from_iterable(x)
            for x in (part.fp32_from_float16_groups, part.float16_groups)
        )
        models = {id(main): half for main, half in zip(mains, halves, strict=True)}
        part.float16_groups = [
            [models.get(id(p), p) for p in group["params"]] for group in part.optimizer.param_groups
        ]
    try:
        yield
    finally:
        for part, groups in zip(parts, kept, strict=True):
            part.float16_groups = groups


def _allocate_state(optimizer) -> None:
    """Give Adam the state that it creates itself only in its first step: zeros, as it would.

    torch's also wants a step counter; FusedAdam of Transformer Engine and apex counts in its
    groups, and Megatron-Core knows how to fill it.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                for p in group["params"]:
                    if not inner.state[p]:
                        inner.state[p].update(
                            step=torch.zeros((), device=p.device if group["fused"] else "cpu"),
                            exp_avg=torch.zeros_like(p),
                            exp_avg_sq=torch.zeros_like(p),
                        )
        elif inner is not None:
            part.init_state_fn(inner, part.config)  # leaves state alone that is there


def _prepare_loading(optimizer) -> None:
    """Make the distributed optimizer read torch's Adam as it reads those of apex and Transformer
    Engine.

    It allocates no state for torch's, and then copies every entry of that state from the
    checkpoint, though it has taken the entry "step" out before (megatron-core 0.16).
    """
    _allocate_state(optimizer)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam) and hasattr(
            part, "_set_main_param_and_optimizer_states"
        ):
            part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)


def _set_state_but_step(part, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, place = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    type(part)._set_main_param_and_optimizer_states(
        part, model_param, {"step": state["step"].clone(), **tensors}
    )


class Saver:
    """Writes the checkpoints of a run, one at a time: ``start`` copies, a thread writes, ``poll``
    or ``wait`` finish.

    Every method is called by every rank. A folder appears whole or not at all, then the tracker
    moves; a checkpoint that cannot be written (a full disk) raises OSError on every rank in
    ``poll`` or ``wait``, and earlier ones are untouched.
    """

    def __init__(self, run: Path | str, optimizer) -> None:
        self.run = Path(run)
        self.gatherer = Gatherer(optimizer)
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._snapshot: Snapshot | None = None
        self._finish_with: tuple = ()
        self._validated = False

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._snapshot is not None

    def reserve(self, *, wrapped, optimizer, scheduler) -> None:
        """Take the memory for the copies now, so that the first save stalls no longer than the
        others."""
        self._take(self.run / "unwritten", RunState(), wrapped, optimizer, scheduler)

    def _take(self, folder: Path, state: RunState, wrapped, optimizer, scheduler) -> Snapshot:
        self.gatherer.start()
        _allocate_state(optimizer)
        content = _model_state(wrapped)
        content["optimizer"] = _optimizer_state(optimizer, content, is_loading=False)
        content["scheduler"] = scheduler.state_dict()
        content["run"] = dataclasses.asdict(state)
        snapshot = Snapshot(
            content, folder, self._buffers, self.gatherer, validate=not self._validated
        )
        self._validated = True
        return snapshot

    def start(
        self,
        *,
        state: RunState,
        wrapped,
        optimizer,
        scheduler,
        info: dict[str, Any],
        hf_files: Sequence[Path] = (),
    ) -> None:
        """Copy everything and return; the thread writes. Waits first for a checkpoint that is still
        being written."""
        self.wait()
        final = iteration_dir(self.run, state.iteration)
        partial = final.with_name(final.name + ".partial")
        failure: list[str | None] = [None]
        if rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise OSError(f"{final}: checkpoint not written: {failure[0]}")
        self._snapshot = self._take(partial, state, wrapped, optimizer, scheduler)
        self._finish_with = (dataclasses.asdict(state), info, tuple(hf_files), final, partial)
        # Small, and it holds references into the optimizer: written before training goes on.
        if rank() == 0:
            try:
                TorchCommonSaveStrategy("torch", 1).save_common(self._snapshot.common, str(partial))
            except (OSError, RuntimeError) as error:
                self._snapshot.error = f"{type(error).__name__}: {error}"
        self._snapshot.thread.start()

    def poll(self) -> Path | None:
        """The folder, when all ranks have just finished writing; None while they write, or have
        nothing to write."""
        if self._snapshot is None:
            return None
        done = torch.tensor([int(not self._snapshot.thread.is_alive())], device=device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._finish() if done.item() else None

    def wait(self) -> Path | None:
        """As ``poll``, but wait for the end of writing."""
        if self._snapshot is None:
            return None
        self._snapshot.thread.join()
        return self._finish()

    def _finish(self) -> Path:
        snapshot, self._snapshot = self._snapshot, None
        state, info, hf_files, final, partial = self._finish_with
        mine = (snapshot.error, snapshot.writer.results, snapshot.writer.files)
        everyone: list[Any] | None = [None] * dist.get_world_size() if rank() == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        said: list[str | None] = [None]
        if rank() == 0:
            try:
                for number, (error, _, _) in enumerate(everyone):
                    if error:
                        raise OSError(f"rank {number}: {error.splitlines()[0]}")
                snapshot.writer.finish(snapshot.metadata, [results for _, results, _ in everyone])
                save_config(CheckpointingConfig("torch_dist", 1), str(partial))
                (partial / "hf").mkdir()
                for file in hf_files:
                    shutil.copy2(file, partial / "hf" / file.name)
                files = {name: value for *_, written in everyone for name, value in written.items()}
                for path in sorted(partial.rglob("*")):
                    if path.is_file():
                        files.setdefault(path.relative_to(partial).as_posix(), None)
                files = {
                    name: value or fingerprint(partial / name) for name, value in files.items()
                }
                whole = {"format_version": FORMAT_VERSION, **state, **info, "files": files}
                write_durably(partial / INFO, json.dumps(whole, ensure_ascii=False, indent=1))
                publish(partial, final)
                tracker = self.run / TRACKER
                write_durably(tracker.with_suffix(".partial"), f"{state['iteration']}\n")
                os.replace(tracker.with_suffix(".partial"), tracker)
            except Exception as error:  # the other ranks wait to hear
                shutil.rmtree(partial, ignore_errors=True)
                said = [str(error).splitlines()[0] or type(error).__name__]
        dist.broadcast_object_list(said, src=0)
        if said[0]:
            raise OSError(
                f"{final}: checkpoint not written; earlier ones are untouched ({said[0]})"
            )
        return final


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
    broken or does not fit.
    """
    info = read_info(folder)
    content = _model_state(wrapped)
    if optimizer is not None:
        _prepare_loading(optimizer)
        content["optimizer"] = _optimizer_state(optimizer, content, is_loading=True)
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
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{folder}: broken, or of another model: {why[0]} ... {why[-1]}"
        ) from error
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in wrapped]
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
        for part in optimizer.chained_optimizers:
            # The engine gives all parameters one tensor as their step, which torch's Adam then
            # counts up once for each.
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
        scheduler.num_steps = 0  # it adds the loaded count to its own
        scheduler.load_state_dict(loaded["scheduler"])
    return RunState(iteration=info["iteration"], consumed=info["consumed"])


def check_same_optimizer(info: dict[str, Any], use_distributed_optimizer: bool) -> None:
    """Raise ValueError where optimizer state was written by the other kind of optimizer."""
    wrote = info["config"]["parallel"]["use_distributed_optimizer"]
    if wrote != use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if wrote else "--no-use-distributed-optimizer"
        raise ValueError(
            f"--load: this checkpoint's optimizer state was written with {flag}; go on with {flag}"
        )


def copy_of_weights(wrapped) -> dict[str, torch.Tensor]:
    """Detached copies of this rank's parameters by name (for tests and comparisons)."""
    return {
        f"{i}.{name}": p.detach().clone()
        for i, chunk in enumerate(wrapped)
        for name, p in chunk.named_parameters()
    }
