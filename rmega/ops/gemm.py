"""The three matmuls of a linear layer in half precision on a CPU, where torch's are slow.

Natively in bfloat16 on CPUs with AMX (csrc/cpu/linear.cpp); in fp32, rounded once at the end, on
CPUs without instructions for the dtype; torch's elsewhere. They have no gradient of their own:
Megatron-Core's linear layers call them in their forward and backward (rmega/megatron/fusion.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rmega.ops.implementation import _C, native_operator, requested_implementation

_HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_native_linear() -> bool:
    """Whether this CPU has the tiles that the native matmuls need."""
    return _C is not None and _C.linear_has_tiles()


def best_matmul(device: str | torch.device, dtype: torch.dtype) -> str:
    """``"native"``, ``"fp32"`` or ``"torch"``: what suits the matmuls of linear layers of this
    device and dtype."""
    if torch.device(device).type != "cpu" or dtype not in _HALF:
        return "torch"
    if dtype is torch.bfloat16 and has_native_linear():
        return "native"
    return "torch" if _has_instructions(dtype) else "fp32"


def active_matmul(device: str | torch.device, dtype: torch.dtype) -> str:
    """What they run now: torch's where the implementation is "reference"."""
    return "torch" if requested_implementation() == "reference" else best_matmul(device, dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in ``dtype`` itself. Without such instructions ATen's matmuls are
    loops (0.5 to 10 GFLOP/s per core on AVX2, where fp32 reaches 80), or oneDNN emulates bf16 with
    AVX-512 at a fifth of the rate of fp32.
    """
    supported = getattr(torch.ops.mkldnn, _HALF[dtype], None)  # absent in a build without oneDNN
    if supported is None or not supported():
        return False
    emulated = dtype is torch.bfloat16 and torch.cpu._is_avx512_supported()
    return (
        not emulated or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., k] times ``weight`` [n, k] transposed -> [..., n], without a gradient."""
    run = active_matmul(x.device, x.dtype)
    if run == "native":
        return _linear(x, weight)
    if run == "fp32":
        return torch.matmul(x.float(), weight.float().t()).to(x.dtype)
    return torch.matmul(x, weight.t())


def linear_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` [..., n] times ``weight`` [n, k] -> [..., k]."""
    run = active_matmul(grad.device, grad.dtype)
    if run == "native":
        return _linear_grad_input(grad, weight)
    if run == "fp32":
        return torch.matmul(grad.float(), weight.float()).to(grad.dtype)
    return torch.matmul(grad, weight)


def linear_grad_weight(grad: Tensor, x: Tensor, total: Tensor) -> None:
    """``total`` [n, k] += ``grad`` [t, n] transposed times ``x`` [t, k]. An fp32 total of
    half-precision matmuls is summed without rounding in between where those are native or in
    fp32."""
    run = active_matmul(grad.device, grad.dtype)
    if run == "native":
        _linear_grad_weight(grad, x, total)
    elif run == "fp32" and total.dtype is torch.float32:
        total.addmm_(grad.float().t(), x.float())
    elif total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
    else:
        total.add_(grad.t() @ x)


_linear = native_operator("linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
_linear_grad_input = native_operator(
    "linear_grad_input", lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1])
)
_linear_grad_weight = native_operator("linear_grad_weight", lambda grad, x, total: None)
