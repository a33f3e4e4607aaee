"""Asynchronous saves: copies taken between two steps, written by a thread.

The format, the plan and the metadata are Megatron-Core's (``torch_dist``) and torch's; two things
are not. Megatron-Core's writers are forked processes and a managing process beside each rank, which
a scheduler's SIGTERM also reaches, and which leave a rank waiting forever when one dies: here a
thread writes. And its gathering of a distributed optimizer's state copies everything about six
times before training continues: here each rank copies its own part once, and the thread gathers it
over a process group of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    SerializationFormat,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from rmega.distributed import gather, new_gloo_group
from rmega.io import fingerprint

KEYS = ("param", "exp_avg", "exp_avg_sq")
ALIGN = 64
"""Bytes of which a buffer's address is a multiple."""


def host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """uint8 [nbytes] on the CPU; ``pinned``: GPUs copy into it while training continues.

    CUDA pins memory that torch has allocated, because torch's own pinned allocator rounds up to
    powers of two: up to twice the host memory of a checkpoint.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        if code:
            raise RuntimeError(f"cudaHostRegister of {nbytes:,} bytes: CUDA error {code}")
    return memory


class _Pieces(dict):
    """A tensor per parameter, addressed as Megatron-Core addresses its one flat tensor:
    ``pieces[start:end]``."""

    def __getitem__(self, place: slice) -> torch.Tensor:
        return super().__getitem__(place.start)


class Gatherer:
    """Gives Megatron-Core a distributed optimizer's state without its copies; ``gather`` fills it
    in, from any thread.

    Made once per run by every rank (it makes process groups). With one data-parallel rank there is
    nothing to gather.
    """

    def __init__(self, optimizer) -> None:
        self.parts = [
            part
            for part in optimizer.chained_optimizers
            if hasattr(part, "get_parameter_state_dp_zero")
        ]
        for part in self.parts:
            part.get_parameter_state_dp_zero = partial(
                self._state, part, part.get_parameter_state_dp_zero
            )
        own_groups = {
            tuple(dist.get_process_group_ranks(part.data_parallel_group)) for part in self.parts
        }
        self.groups = {
            ranks: new_gloo_group(list(ranks))
            for ranks in sorted(set().union(*gather(own_groups)))
            if len(ranks) > 1
        }
        # Buffers are kept from one checkpoint to the next. Shapes: n elements of a parameter, s of
        # this rank's shard of a bucket; a row for each of KEYS.
        self._whole: dict[tuple, torch.Tensor] = {}  # (part, buffer, bucket, start) -> [3, n]
        self._own: dict[tuple, torch.Tensor] = {}  # (part, buffer, bucket) -> [3, s], pinned
        self._jobs: list[tuple] = []  # (ranks, own, [(whole, its place in the bucket)])
        self.pending: set[int] = set()  # storages that ``gather`` fills: not to be copied before

    def start(self) -> None:
        """Forget the jobs of an earlier checkpoint."""
        self._jobs.clear()
        self.pending.clear()

    def _state(self, part, original, *, empty_data: bool = False, **options) -> dict[Any, Any]:
        """In place of ``DistributedOptimizer.get_parameter_state_dp_zero``: {buffer: {dtype: {key:
        pieces}}}."""
        if empty_data:
            return original(empty_data=True, **options)
        ranks = tuple(dist.get_process_group_ranks(part.data_parallel_group))
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, buffer in enumerate(part.buffers):
            ((dtype, buckets),) = part.gbuf_ranges[number].items()
            pieces = {key: _Pieces() for key in KEYS}
            if len(ranks) == 1:
                for parameter, (start, *_) in buffer.param_index_map.items():
                    tensors = part._get_main_param_and_optimizer_states(parameter)
                    for key in KEYS:
                        pieces[key][start] = tensors[key].detach().view(-1)
            else:
                for at, ranges in enumerate(buckets):
                    self._copy_shard(
                        part,
                        ranks,
                        (id(part), number, at),
                        buffer,
                        buffer.buckets[at],
                        ranges,
                        pieces,
                    )
            state[number] = {dtype: {**pieces, "numel_unpadded": buffer.numel_unpadded}}
        return state

    def _copy_shard(self, part, ranks: tuple, name: tuple, buffer, bucket, ranges, pieces) -> None:
        """Copy this rank's shard of one bucket, and note how all shards make whole parameters on
        the first rank."""
        length = bucket.grad_data.numel() // len(ranks)
        if name not in self._own:
            memory = host_memory(4 * len(KEYS) * length, pinned=bucket.grad_data.is_cuda)
            self._own[name] = memory.view(torch.float32).view(len(KEYS), length).zero_()
        own = self._own[name]
        # A shard begins and ends anywhere inside parameters: ``place`` is this rank's range of one.
        for parameter, place in ranges["param_map"].items():
            tensors = part._get_main_param_and_optimizer_states(parameter)
            local = place["gbuf_local"]
            for row, key in enumerate(KEYS):
                # Waited for at the end of ``SnapshotWriter.take``.
                own[row, local.start : local.end].copy_(
                    tensors[key].detach().view(-1), non_blocking=True
                )
        targets = []
        for parameter in bucket.params_list:
            start, end, _ = buffer.param_index_map[parameter]
            if (*name, start) not in self._whole:
                self._whole[(*name, start)] = torch.empty(len(KEYS), end - start)
            whole = self._whole[(*name, start)]
            for row, key in enumerate(KEYS):
                pieces[key][start] = whole[row]  # [n], filled later by the thread
            self.pending.add(whole.untyped_storage().data_ptr())
            targets.append((whole, start - bucket.offset))
        self._jobs.append((ranks, own, targets))

    def gather(self) -> None:
        """Send this rank's shards; the first data-parallel rank puts whole parameters together."""
        for ranks, own, targets in self._jobs:
            first = dist.get_rank() == ranks[0]
            shards = [torch.empty_like(own) for _ in ranks] if first else None
            dist.gather(own, shards, dst=ranks[0], group=self.groups[ranks])
            if first:
                length = own.shape[1]  # s: every rank's shard of a bucket is equally long
                for whole, offset in targets:
                    for r, shard in enumerate(shards):
                        low, high = (
                            max(offset, r * length),
                            min(offset + whole.shape[1], (r + 1) * length),
                        )
                        if low < high:
                            whole[:, low - offset : high - offset] = shard[
                                :, low - r * length : high - r * length
                            ]


class SnapshotWriter(FileSystemWriter):
    """This rank's shard file: items are copied when the plan is made and written by ``write``, from
    any thread."""

    def __init__(
        self, folder: Path, buffers: dict[tuple, torch.Tensor], gatherer: Gatherer
    ) -> None:
        super().__init__(str(folder))
        self.buffers, self.gatherer = buffers, gatherer
        self.folder = folder
        self.items: list[tuple] = []
        self.results: list = []
        self.files: dict[str, list[int]] = {}
        self.name = f"__{dist.get_rank()}_0.distcp"

    @property
    def checkpoint_id(self) -> str:
        """In the metadata, as text: a path would be one more class that readers have to allow."""
        return str(self.folder)

    def take(
        self, state_dict: dict[str, Any], planner: MCoreSavePlanner, *, copies: bool
    ) -> Metadata | None:
        """Plan the checkpoint with the other ranks and copy what this one writes; the metadata on
        the first rank, None elsewhere. Training waits for it. Without ``copies`` only their memory
        is taken.

        Every rank writes what it has, because ``state_dict`` holds replicated tensors on one of
        them alone: only the metadata takes all plans.
        """
        first = dist.get_rank() == 0
        planner.set_up_planner(state_dict, is_coordinator=first)
        self.set_up_storage_writer(first)
        plan = planner.create_local_plan()
        plans: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(plan, plans)
        metadata = planner.create_global_plan(plans)[1] if first else None
        self._copy(planner.finish_plan(plan), planner, copies)
        return metadata

    def _copy(self, plan: SavePlan, planner: MCoreSavePlanner, copies: bool) -> None:
        keys: dict[tuple, tuple] = {}  # of what is copied -> of its buffer
        tensors: dict[tuple, torch.Tensor] = {}
        resolved = [(item, planner.resolve_data(item)) for item in plan.items]
        sources: list[tuple | None] = []
        for item, data in resolved:
            source = None
            if (
                isinstance(data, torch.Tensor)
                and data.untyped_storage().data_ptr() not in self.gatherer.pending
            ):
                # In fp32 the optimizer's main parameters are the model's own: one copy serves both.
                source = (data.data_ptr(), data.dtype, tuple(data.shape), data.stride())
                if source not in keys:
                    offset = tuple(item.index.offset or ())
                    keys[source] = (item.index.fqn, offset, tuple(data.shape), data.dtype)
                    tensors[keys[source]] = data.detach()
            sources.append(source)
        self._allocate({key: x for key, x in tensors.items() if key not in self.buffers})
        if not copies:
            return
        for key, data in tensors.items():
            self.buffers[key].copy_(data, non_blocking=True)
        for (item, data), source in zip(resolved, sources, strict=True):
            self.items.append((item, data if source is None else self.buffers[keys[source]]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _allocate(self, tensors: dict[tuple, torch.Tensor]) -> None:
        """Buffers for copies of these tensors: views of one allocation, which is pinned if they are
        on a GPU. In a run all of them are made by ``Saver.reserve``."""
        ends = list(
            accumulate((-(-x.nbytes // ALIGN) * ALIGN for x in tensors.values()), initial=0)
        )
        slab = host_memory(ends[-1], pinned=any(x.is_cuda for x in tensors.values())).numpy()
        for (key, x), start in zip(tensors.items(), ends, strict=False):
            # Through numpy, so that each has a storage of its own: torch.save writes a view's whole
            # storage.
            part = torch.from_numpy(slab[start : start + x.nbytes])
            self.buffers[key] = part.view(x.dtype).view(x.shape)

    def write(self) -> None:
        """Write and flush this rank's file, and take its checksum. Raises OSError or torch's
        RuntimeError."""
        self.gatherer.gather()
        if not self.items:
            return
        path = self.folder / self.name
        with open(path, "wb") as stream:
            for item, data in self.items:
                if (
                    isinstance(data, torch.Tensor)
                    and data.untyped_storage().nbytes() != data.nbytes
                ):
                    data = data.clone()  # a view would be saved with all of its storage
                self.results.append(
                    _write_item(
                        self.transforms,
                        stream,
                        data,
                        item,
                        self.name,
                        serialization_format=SerializationFormat.TORCH_SAVE,
                    )
                )
            stream.flush()
            os.fsync(stream.fileno())
        self.files[self.name] = fingerprint(path)


class Snapshot:
    """One checkpoint on its way to disk. Making it is collective and takes the copies; ``thread``
    then writes."""

    def __init__(
        self,
        content: ShardedStateDict,
        folder: Path,
        buffers: dict[tuple, torch.Tensor],
        gatherer: Gatherer,
        *,
        validate: bool,
        copies: bool = True,
        afterwards: Callable[[], Any] = lambda: None,
    ) -> None:
        sharded, self.common = save_preprocess(content, validate)
        sharded, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self.writer = SnapshotWriter(folder, buffers, gatherer)
        self.metadata = self.writer.take(
            mcore_to_pyt_state_dict(sharded, False),
            MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            copies=copies,
        )
        self.error: str | None = None
        self.found: Any = None
        """What ``afterwards`` returned, which the thread calls when this rank's file is written."""
        self._afterwards = afterwards
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    def _write(self) -> None:
        try:
            self.writer.write()
            self.found = self._afterwards()
        except Exception as error:  # whatever it is, all ranks must hear of it
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note why this rank's file is not written."""
        # torch.save fails again when it closes a file on a full disk: the disk is the reason.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        self.error = f"{type(first).__name__}: {first}"
