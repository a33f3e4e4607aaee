"""Makes Megatron-Core run without CUDA; the only file that replaces parts of torch or
Megatron-Core for longer than an import.

Megatron-Core names the device "cuda" and asks ``torch.cuda`` for the current device, streams and
random states. ``install`` gives the modules under ``megatron.core`` (and no others) a ``torch``
whose ``cuda`` is the CPU. Nothing outside Megatron-Core sees a difference: the methods of
``Tensor`` that cannot be replaced per module look at their caller first, and process groups of
gloo answer as before (``_GlooGroup``). ``installed`` lists what was replaced, and a test compares
it with a list per release, so that a new release of Megatron-Core fails loudly instead of half
working.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable

import torch
import torch.distributed
from torch.distributed import distributed_c10d

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h of glibc

# Functions of torch that take a device; Megatron-Core passes "cuda" to them.
FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

# Every module of Megatron-Core that a run reaches, also those that are imported only inside
# functions, so that they exist before the replacement.
MEGATRON_MODULES = (
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.common.embeddings.language_model_embedding",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
)

_replaced: dict[str, types.ModuleType] = {}


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _namespace(module: types.ModuleType, **overrides) -> types.ModuleType:
    """A module that answers like ``module`` except for the overrides, at the speed of an ordinary
    attribute."""
    namespace = types.ModuleType(module.__name__)
    namespace.__dict__.update(module.__dict__)
    namespace.__dict__.update(overrides)
    namespace.__getattr__ = lambda name: getattr(module, name)  # what torch loads lazily
    return namespace


class _Stream:
    """There is one order of events on a CPU, so a stream has nothing to wait for."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _cpu_torch() -> types.ModuleType:
    cuda = _namespace(
        torch.cuda,
        current_device=lambda: CPU,
        current_stream=lambda *a: _Stream(),
        default_stream=lambda *a: _Stream(),
        Stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
        device_count=lambda: 1,
        empty_cache=lambda: None,
        get_rng_state=lambda *a, **k: torch.get_rng_state(),
        set_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        set_device=lambda *a: None,
        synchronize=lambda *a: None,
    )
    return _namespace(
        torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
    )


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _patch_tensor() -> None:
    tensor_type, tensor_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self, *args, **kwargs):
        # The optimizer sorts parameters by names such as 'torch.cuda.FloatTensor'.
        name = tensor_type(self, *args, **kwargs)
        if not args and not kwargs and _called_by_megatron():
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    def cuda(self, *args, **kwargs):
        return self if _called_by_megatron() else tensor_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = type_, cuda


class _GlooGroup(torch.distributed.ProcessGroupGloo):
    """A group of gloo whose sockets are served by one thread for all groups of this process.

    Of its own accord each group has a thread, which wakes every 10 ms whether or not it has
    anything to do. Megatron-Core makes about twenty groups per rank, whose threads take time from
    the arithmetic and hold up sums over ranks.
    """

    def __init__(self, store, rank: int, size: int, timeout: datetime.timedelta, **more) -> None:
        options = torch.distributed.ProcessGroupGloo._Options()
        devices = _gloo_devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        given = {"_timeout": timeout, "_devices": devices, "_threads": 2 * len(devices), **more}
        if not all(hasattr(options, name) for name in given):  # of a torch that has other options
            super().__init__(store, rank, size, timeout, **more)
            return
        for name, value in given.items():
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


@functools.cache
def _gloo_devices(interfaces: str) -> list:
    """As torch makes them: one for each interface that is named, or the default one."""
    gloo = torch.distributed.ProcessGroupGloo
    names = [name for name in interfaces.split(",") if name]
    return [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]


def install() -> None:
    """Make Megatron-Core use the CPU. Call before models, wrappers or optimizers are built;
    harmless when repeated."""
    for name in MEGATRON_MODULES:
        importlib.import_module(name)
    if not _replaced:
        _patch_tensor()
        distributed_c10d.ProcessGroupGloo = _GlooGroup
        random = sys.modules["megatron.core.tensor_parallel.random"]
        random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
        random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
        _replaced["torch"] = _cpu_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _replaced["torch"]
            _replaced[name] = module


def replace_matmuls(
    layers: types.ModuleType, matmul_of_input: Callable, matmul_of_gradient: Callable
) -> None:
    """Let the half-precision matmuls in Megatron-Core's ``layers`` be computed by
    ``matmul_of_input(x, weight)`` = x weight^T and ``matmul_of_gradient(grad, weight)`` = grad
    weight; harmless when repeated.

    Their forward calls ``torch.matmul`` of the substitute. Their backward calls the tensor's own
    method, which can only be replaced for all tensors; it asks who calls.
    """
    substitute = _replaced["torch"]
    if substitute.matmul is not torch.matmul:
        return
    tensor_matmul = torch.Tensor.matmul

    def matmul(x, other, **kwargs):
        if (
            not kwargs and other.dim() == 2 and other.stride(0) == 1 and x.dtype in HALF
        ):  # weight.t()
            return matmul_of_input(x, other.t())
        return torch.matmul(x, other, **kwargs)

    def method(self, other):
        if self.dtype in HALF and sys._getframe(1).f_globals is layers.__dict__:
            return matmul_of_gradient(self, other)
        return tensor_matmul(self, other)

    substitute.matmul, torch.Tensor.matmul = matmul, method


def keep_memory() -> None:
    """Let the allocator keep what was freed, in large pages.

    By default glibc returns every large block to the kernel and asks for it again, so each
    activation of each step is paid for in page faults and zeroed pages; that can cost as much as
    the arithmetic. A run's memory then stays at its peak. Does nothing on other C libraries. (torch
    reads THP_MEM_ALLOC_ENABLE at its first large allocation.)
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in (
        (M_MMAP_MAX, 0),
        (M_TRIM_THRESHOLD, 2**31 - 1),
        (M_TOP_PAD, 64 * 2**20),
        (M_ARENA_MAX, 1),
    ):
        mallopt(option, value)


def installed() -> list[str]:
    """Names of Megatron-Core's modules that were given the substitute, sorted."""
    return sorted(name for name in _replaced if name != "torch")
