"""Sharded checkpoints of everything that a run needs to go on, in any layout.

RUN/iter_0000010/            written under a temporary name and renamed when every rank is done
    *.distcp, .metadata, ... megatron-core's dist_checkpointing: one key per tensor, global shapes
    rmega.json               format version, iteration, consumed comparisons, configuration, geometry, manifest, proof
    hf/                      tokenizer and config.json of the base model
RUN/latest_checkpointed_iteration.txt   the tracker, written last
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from rmega.distributed import log, rank

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
INFO = "rmega.json"


@dataclasses.dataclass
class RunState:
    """Where a run is: optimizer steps done and comparisons consumed."""

    iteration: int = 0
    consumed: int = 0


def iteration_dir(run: Path | str, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return Path(run) / f"iter_{iteration:07d}"


def list_iterations(run: Path | str) -> list[int]:
    """Iterations with a complete checkpoint folder, oldest first."""
    found = []
    for folder in Path(run).glob("iter_*"):
        digits = folder.name.removeprefix("iter_")
        if digits.isdigit() and (folder / INFO).is_file():
            found.append(int(digits))
    return sorted(found)


def latest_iteration(run: Path | str) -> int | None:
    """The newest checkpoint that was finished: the tracker's, or the newest complete folder where the tracker is gone."""
    tracker = Path(run) / TRACKER
    if tracker.is_file() and (text := tracker.read_text().strip()).isdigit():
        if (iteration_dir(run, int(text)) / INFO).is_file():
            return int(text)
    iterations = list_iterations(run)
    return iterations[-1] if iterations else None


def read_info(folder: Path | str) -> dict[str, Any]:
    """``rmega.json`` of a checkpoint. ValueError names what is wrong with a folder that is not one of ours."""
    path = Path(folder) / INFO
    if not path.is_file():
        raise ValueError(f"{folder}: not an rmega checkpoint ({INFO} is missing)")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken ({error})") from None
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format version {version}; this rmega reads version {FORMAT_VERSION}")
    return info


def _metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _model_state(wrapped) -> dict[str, Any]:
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in wrapped]
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=_metadata())}
    return {f"model{i}": chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(chunks)}


def _optimizer_state(optimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    sharded = model_state["model"] if "model" in model_state else model_state
    return optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=_metadata())


def _prepare_loading(optimizer) -> None:
    """Make the distributed optimizer read torch's Adam as it reads those of apex and Transformer Engine.

    It allocates no state for torch's, and then copies every entry of that state from the checkpoint, though it has
    taken the entry "step" out before (megatron-core 0.16).
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(inner, torch.optim.Adam):
            if hasattr(part, "_set_main_param_and_optimizer_states"):
                part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)
            for group in inner.param_groups:
                for p in group["params"]:
                    if not inner.state[p]:
                        inner.state[p].update(step=torch.zeros((), device=p.device if group["fused"] else "cpu"),
                                              exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def _set_state_but_step(part, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, place = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    type(part)._set_main_param_and_optimizer_states(part, model_param, {"step": state["step"].clone(), **tensors})


def save(run: Path | str, *, state: RunState, wrapped, optimizer, scheduler, info: dict[str, Any],
         hf_files: list[Path] = ()) -> Path:
    """Write one checkpoint; called by every rank. The folder appears whole or not at all, then the tracker moves.

    Raises OSError, on every rank, where a rank could not write (a full disk); earlier checkpoints are untouched.
    """
    final = iteration_dir(run, state.iteration)
    partial = final.with_name(final.name + ".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = _model_state(wrapped)
    content["optimizer"] = _optimizer_state(optimizer, content, is_loading=False)
    content["scheduler"] = scheduler.state_dict()
    content["run"] = dataclasses.asdict(state)
    failure = None
    try:
        dist_checkpointing.save(content, str(partial))
        if rank() == 0:
            (partial / "hf").mkdir()
            for file in hf_files:
                shutil.copy2(file, partial / "hf" / file.name)
            _write(partial / INFO, json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(state), **info},
                                              ensure_ascii=False, indent=1))
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        failure = f"rank {rank()}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if said := [f for f in failures if f]:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final}: checkpoint not written; the previous one is untouched ({said[0].splitlines()[0]})")
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        tracker = Path(run) / TRACKER
        _write(tracker.with_suffix(".partial"), f"{state.iteration}\n")
        os.replace(tracker.with_suffix(".partial"), tracker)
    dist.barrier()
    return final


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path | str, *, wrapped, optimizer=None, scheduler=None) -> RunState:
    """Read a checkpoint into this layout, whatever layout wrote it; called by every rank.

    Without ``optimizer`` only the weights are read. Raises ValueError on a checkpoint that is broken or does not fit.
    """
    info = read_info(folder)
    content = _model_state(wrapped)
    if optimizer is not None:
        _prepare_loading(optimizer)
        content["optimizer"] = _optimizer_state(optimizer, content, is_loading=True)
        content["scheduler"] = scheduler.state_dict()
    try:
        loaded = dist_checkpointing.load(content, str(folder), validate_access_integrity=False)
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError, OSError, EOFError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder}: broken, or of another model: {why[0]} ... {why[-1]}") from error
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in wrapped]
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        for part in optimizer.chained_optimizers:
            # The engine gives all parameters one tensor as their step, which torch's Adam then counts up once for each.
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
        scheduler.num_steps = 0  # it adds the loaded count to its own
        scheduler.load_state_dict(loaded["scheduler"])
    return RunState(iteration=info["iteration"], consumed=info["consumed"])


def prune(run: Path | str, keep_last: int, best: int | None = None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints; ``best`` stays. Called by every rank; rank 0 acts."""
    if rank() == 0 and keep_last > 0:
        for iteration in list_iterations(run)[:-keep_last]:
            if iteration != best:
                shutil.rmtree(iteration_dir(run, iteration), ignore_errors=True)
    dist.barrier()


def find(load_dir: Path | str) -> Path | None:
    """The newest checkpoint of a run folder, or the checkpoint folder itself; None where a run has none yet."""
    path = Path(load_dir)
    if (path / INFO).is_file():
        return path
    iteration = latest_iteration(path)
    if iteration is None:
        return None
    log(f"going on from {iteration_dir(path, iteration)}")
    return iteration_dir(path, iteration)


def check_same_optimizer(info: dict[str, Any], use_distributed_optimizer: bool) -> None:
    """Raise ValueError where optimizer state was written by the other kind of optimizer."""
    wrote = info["config"]["parallel"]["use_distributed_optimizer"]
    if wrote != use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if wrote else "--no-use-distributed-optimizer"
        raise ValueError(f"--load: this checkpoint's optimizer state was written with {flag}; go on with {flag}")


def copy_of_weights(wrapped) -> dict[str, torch.Tensor]:
    """Detached copies of this rank's parameters by name (for tests and comparisons)."""
    return {f"{i}.{name}": p.detach().clone() for i, chunk in enumerate(wrapped) for name, p in chunk.named_parameters()}
