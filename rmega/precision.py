"""Which dtype and matmul setting this machine computes in, decided by a short self-test and
printed.

A CPU may run bf16 matmuls several times faster than fp32 (AMX, AVX512-BF16) or several
times slower (all others), and ``torch.set_float32_matmul_precision("medium")`` may keep fp32
accuracy or round to bf16. Only a measurement tells.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import torch

from rmega import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = 768  # one matmul takes milliseconds, and is large enough for the fast kernels


@dataclasses.dataclass(frozen=True)
class Precision:
    """What was chosen and what was measured (GFLOP/s of a square matmul, error relative to
    fp64)."""

    dtype: torch.dtype
    matmul_precision: str
    description: str


def _rate(a: torch.Tensor, b: torch.Tensor, repeats: int = 5) -> float:
    _timed(a, b)
    best = min(_timed(a, b) for _ in range(repeats))
    return 2 * SIZE**3 / best / 1e9


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    ops.linear(a, b)  # as the layers make it
    return time.perf_counter() - start


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))


@functools.cache
def _measured_rate(dtype: torch.dtype, setting: str, threads: int, matmul: str) -> float:
    """GFLOP/s with this setting of fp32 matmuls, measured once per process. ``threads`` and
    ``matmul`` are what it also depends on."""
    torch.set_float32_matmul_precision(setting)
    a, b = _operands()
    return _rate(a.to(dtype), b.to(dtype))


@functools.cache
def _measured_errors() -> tuple[float, float]:
    """Errors of fp32 matmuls set to "highest" and to "medium", relative to fp64."""
    a, b = _operands()
    exact = a.double() @ b.double()
    errors = []
    for setting in ("highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        errors.append(((a @ b).double() - exact).norm().item() / exact.norm().item())
    return tuple(errors)


def choose(
    precision: str = "auto", matmul_precision: str = "auto", device: torch.device | str = "cpu"
) -> Precision:
    """Decide, apply torch's fp32 matmul setting, and say why.

    ``precision`` auto: bf16 on CUDA (fp32 before compute capability 8), and on a CPU where bf16
    matmuls measure at least 1.5 times as fast as in fp32. ``matmul_precision`` auto: the fastest
    setting whose error is at most twice that of "highest".
    """
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = DTYPES.get(precision, torch.bfloat16 if fast else torch.float32)
        setting = "highest" if matmul_precision == "auto" else matmul_precision
        torch.set_float32_matmul_precision(setting)
        return Precision(
            dtype,
            setting,
            f"{dtype_name(dtype)}, fp32 matmul {setting}, {torch.cuda.get_device_name(device)}",
        )
    threads = torch.get_num_threads()
    machine = (threads, ops.active_matmul("cpu", torch.bfloat16))
    setting, why = "highest" if matmul_precision == "auto" else matmul_precision, ""
    rate = _measured_rate(torch.float32, setting, *machine)
    if matmul_precision == "auto":
        medium = _measured_rate(torch.float32, "medium", *machine)
        floor, error = _measured_errors()
        if error <= 2 * floor and medium > 1.1 * rate:
            setting, rate = "medium", medium
        elif error > 2 * floor:
            why = f" (medium rounds to bf16 here: error {error:.0e} against {floor:.0e})"
    half = _measured_rate(torch.bfloat16, setting, *machine)
    torch.set_float32_matmul_precision(setting)
    dtype = DTYPES.get(precision) or (torch.bfloat16 if half >= 1.5 * rate else torch.float32)
    return Precision(
        dtype,
        setting,
        f"{dtype_name(dtype)}, fp32 matmul {setting}{why}; measured fp32 {rate:.0f}, bf16 "
        f"{half:.0f} GFLOP/s on {threads} thread{'s' * (threads != 1)}",
    )


def choose_together(precision: str, matmul_precision: str, device: torch.device) -> Precision:
    """``choose`` on rank 0, applied on every rank, so that no two ranks differ."""
    import torch.distributed as dist

    box = [choose(precision, matmul_precision, device) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    torch.set_float32_matmul_precision(box[0].matmul_precision)
    return box[0]


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"."""
    return next(name for name, value in DTYPES.items() if value is dtype)
