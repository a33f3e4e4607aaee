"""What a CUDA machine offers of what rmega needs, a line each; nothing of rmega is imported.

    python benchmarks/gpu_probe.py

Each look is caught by itself. Exit code 0: all there; 1: something is missing; 77: no CUDA device.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as rmega sets it

import torch  # noqa: E402

SKIPPED = 77


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return (done.stdout.strip() or done.stderr.strip() or f"exit {done.returncode}").splitlines()[0]


def toolkit() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise FileNotFoundError("no CUDA toolkit (CUDA_HOME names it)")
    header = Path(CUDA_HOME, "include/cuda_runtime.h")
    if not header.is_file():
        raise FileNotFoundError(f"{header} (CUDA_HOME names the toolkit)")
    return f"{CUDA_HOME}: {first_line(str(Path(CUDA_HOME, 'bin/nvcc')), '-V')}"


def python_header() -> str:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        raise FileNotFoundError(header)
    return str(header)


def git() -> str:
    return shutil.which("git") or "not installed (RMEGA_COMMIT names the commit in results)"


def capability() -> str:
    properties = torch.cuda.get_device_properties(0)
    major, minor = properties.major, properties.minor
    if (major, minor) < (8, 0):
        raise RuntimeError(f"compute capability {major}.{minor}, rmega's kernels need 8.0")
    return f"{properties.name}, {major}.{minor}, {properties.total_memory / 2**30:.0f} GiB"


def collectives() -> str:
    """As rmega does with one process: NCCL over a store in memory, and gloo beside it."""
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(4, device="cuda")
    dist.all_reduce(ones)
    beside = dist.new_group([0], backend="gloo")
    dist.all_reduce(torch.ones(4), group=beside)
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return "NCCL all_reduce and a gloo group"


def expandable_segments() -> str:
    kept = torch.ones(2**24, device="cuda")
    segments = torch.cuda.memory_snapshot()
    del kept
    if not any(segment.get("is_expandable") for segment in segments):
        raise RuntimeError("PYTORCH_ALLOC_CONF=expandable_segments:True has no effect")
    return "in force"


def accumulating_gemm() -> str:
    """Weight gradients are added to fp32 inside the GEMM only where torch has this."""
    x, g = (torch.ones(16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(16, 16, device="cuda")
    torch.addmm(total, g.t(), x, out_dtype=torch.float32, out=total)
    if not torch.equal(total, torch.full_like(total, 17.0)):
        raise RuntimeError("wrong result")
    return "addmm(out_dtype=float32)"


def varlen() -> str:
    from torch.nn.attention.varlen import varlen_attn

    q = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 3, 8], device="cuda", dtype=torch.int32)
    varlen_attn(q, q, q, ends, ends, 5, 5)
    torch.cuda.synchronize()
    return "torch.nn.attention.varlen"


def packages() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found, absent = [], []
    for name in ("megatron-core", "transformers", "tyro", "safetensors", "sentencepiece", "pytest"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        raise ImportError(f"not installed: {', '.join(absent)} (RMEGA_WHEELS)")
    return ", ".join(found)


def main() -> int:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    print(f"python {platform.python_version()}, torch {torch.__version__}, {built}", flush=True)
    looks: list[Callable[[], str]] = [packages, toolkit, python_header, git]
    gpu = torch.cuda.is_available()
    if gpu:
        looks += [capability, expandable_segments, accumulating_gemm, varlen, collectives]
    missing = 0
    for look in looks:
        name = look.__name__.replace("_", " ")
        try:
            print(f"ok       {name}: {look()}", flush=True)
        except Exception as error:  # whatever it is, the next look is made
            missing += 1
            print(f"MISSING  {name}: {type(error).__name__}: {error}", flush=True)
    if not gpu:
        print("no CUDA device")
        return SKIPPED
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
