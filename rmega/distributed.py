"""Process setup: device, backend, Megatron-Core's groups, seeds, and logging from rank 0."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import logging
import os
import socket
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from rmega.config import ParallelArgs
from rmega.megatron import versions

T = TypeVar("T")

_timeout = datetime.timedelta(minutes=10)  # of every group; ``initialize`` sets it


def world_size() -> int:
    """Processes of this run: torchrun's count, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def prepare_cuda(tp: int, *, deterministic: bool = False) -> None:
    """Settings that CUDA, its allocator, cuBLAS and NCCL read once, when they start.

    Call it before anything asks for a GPU's properties: that starts CUDA. What the user has set
    stays. ``deterministic`` makes torch choose algorithms whose results are the same bits in every
    run, on any device, and raise where there is none.
    """
    if deterministic:
        # cuBLAS: no workspace shared by streams, so no choice that depends on timing (its manual,
        # "Results reproducibility"). NCCL: no sums in the switches, whose order is not fixed.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "^NVLS")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over each new tensor
    if tp > 1:
        # Collectives of tensor parallelism are to start before the matmul that runs beside them
        # (Megatron-Core's linear_with_grad_accumulation_and_async_allreduce).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Every pack has another number of tokens: segments of fixed size would be cut to pieces.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def spans_machines() -> bool:
    """Whether some of the processes were started by another launcher, as a rule on another
    machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()


def device() -> torch.device:
    """This process's device: its GPU under CUDA, else the CPU. ValueError where this machine runs
    more processes than it has GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ValueError(
            f"--nproc-per-node {processes}: {processes} processes on this machine, {count}"
            f" GPU{'s' * (count != 1)}"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
            + '; every process needs its own (CUDA_VISIBLE_DEVICES="" runs them on the CPU)'
        )
    return torch.device("cuda", local)


def log(message: str = "") -> None:
    """Print on rank 0 only, without tearing a progress bar that is on the terminal."""
    if rank() == 0:
        with tqdm.external_write_mode():
            print(message, flush=True)


@functools.cache
def log_once(message: str) -> None:
    """``log``, the first time that a message comes."""
    log(message)


def quiet_megatron() -> None:
    """Silence Megatron-Core's warnings about packages that are not installed; a run prints what is
    active itself."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings(
        "ignore", message=r".*(ffn_hidden_size|barrier\(\)|no_c10d|tensor_parallel.*deprecated).*"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def initialize(parallel: ParallelArgs | None = None, *, seed: int = 42) -> torch.device:
    """Join the process group and build Megatron-Core's groups; data parallel takes the ranks that
    tp x pp leave (``parallel`` None: all).

    Uses torchrun's environment, or makes a group of one process without it. gloo on a CPU (through
    ``rmega.megatron.cpu``), NCCL on CUDA. Raises ValueError when tp x pp does not divide the number
    of processes.
    """
    p = parallel or ParallelArgs()
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    if world_size() % (tp * pp):
        raise ValueError(
            f"--tp {tp} x --pp {pp} = {tp * pp} does not divide the {world_size()} processes that"
            " were started (torchrun --nproc-per-node)"
        )
    quiet_megatron()
    prepare_cuda(tp)
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        from rmega.megatron import cpu

        cpu.keep_memory()
        cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    global _timeout
    if not dist.is_initialized():
        if (
            spans_machines()
            and "GLOO_SOCKET_IFNAME" not in os.environ
            and (name := interface_towards(os.environ["MASTER_ADDR"]))
        ):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            log(f"network: gloo goes over {name} (GLOO_SOCKET_IFNAME names another)")
        timeout = _timeout = datetime.timedelta(minutes=p.distributed_timeout_minutes)
        backend = "nccl" if where.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=p.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=where.type == "cuda",
            distributed_timeout_minutes=p.distributed_timeout_minutes,
        )
        if rank() == 0:
            for note in versions.notes():
                print(note, file=sys.stderr)  # stdout may be a program's results
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return where


def interface_towards(host: str) -> str | None:
    """The network interface from which this machine reaches ``host``; where that is itself, under a
    loopback address, the one of its default route, or its only one; None where none of them can
    be known.

    Left alone, gloo listens where the machine's own name leads, which is the loopback address on
    many systems: ranks on other machines then cannot connect.
    """
    names: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(
                    probe.fileno(), 0x8915, struct.pack("256s", name.encode())
                )  # SIOCGIFADDR
                names[socket.inet_ntoa(answer[20:24])] = name
    names = {address: name for address, name in names.items() if not address.startswith("127.")}
    for target in (host, "192.0.2.1"):  # an address of no machine (RFC 5737); nothing is sent
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((target, 9))
            if name := names.get(probe.getsockname()[0]):
                return name
    return next(iter(names.values())) if len(names) == 1 else None


def new_gloo_group(ranks: list[int]) -> dist.ProcessGroup:
    """A group for tensors on the CPU with the timeout of all others; called by every rank. torch's
    own default is half an hour, whatever the other groups have."""
    return dist.new_group(ranks, backend="gloo", timeout=_timeout)


def is_reporting_rank() -> bool:
    """True on the one rank of each model replica that holds the rewards: last stage, tensor rank
    0."""
    from megatron.core import parallel_state

    return (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def from_rank_0(compute: Callable[[], T]) -> T:
    """``compute()`` as rank 0 gets it (it may see files that others do not), on every rank. Just
    ``compute()`` without a process group."""
    if not dist.is_initialized():
        return compute()
    box: list[Any] = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """The ``value`` of every rank, in order, on every rank; [value] without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_share() -> tuple[int, int]:
    """(i, n): this rank's share of work that the n ranks of the process group divide; (0, 1)
    without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_problem(problem: str | None) -> str | None:
    """The ``problem`` of the first rank that has one, on every rank."""
    return next(filter(None, gather(problem)), None)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor in place over all ranks (those with nothing to add pass zeros) and return it."""
    dist.all_reduce(values)
    return values


def finish() -> None:
    """Leave the process group."""
    sys.stdout.flush()
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


# Programs import this module before those that import Megatron-Core.
quiet_megatron()
versions.import_megatron()
