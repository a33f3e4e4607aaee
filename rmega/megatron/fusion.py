"""Fused weight gradients, and no collectives for a single replica."""

from __future__ import annotations

import types

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers

from rmega import ops
from rmega.megatron import cpu


def wgrad_gemm_accum_fp32(
    inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
) -> None:
    """main_grad [n, k] fp32 += grad_output [t, n]^T inputs [t, k], without a gradient tensor in
    between if it can be.

    What apex's ``fused_weight_gradient_mlp_cuda`` does, in the signature under which Megatron-Core
    calls it.
    """
    if inputs.is_cuda and inputs.dtype != main_grad.dtype:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        ops.linear_grad_weight(grad_output, inputs, main_grad)


def fuse_weight_gradients(device: torch.device, dtype: torch.dtype) -> bool:
    """Let Megatron-Core add weight gradients to its fp32 buffers inside the matmul; True where that
    works.

    apex's kernel is used where it is installed. On CUDA torch's own needs matmuls with an output
    dtype of their own, which is tried on small tensors first.
    """
    if layers._grad_accum_fusion_available and not isinstance(
        layers.fused_weight_gradient_mlp_cuda, types.SimpleNamespace
    ):
        return device.type == "cuda"
    if device.type == "cpu" and dtype is not torch.float32:
        if ops.best_matmul(device, dtype) == "torch":
            # the matmul has to run in half precision, which Megatron-Core does by itself
            return False
        cpu.replace_matmuls(layers, ops.linear, ops.linear_grad_input)
    if device.type == "cuda":
        x, g = (torch.ones(16, 16, device=device, dtype=dtype) for _ in range(2))
        total = torch.ones(16, 16, device=device)
        try:
            wgrad_gemm_accum_fp32(x, g, total)
        except (RuntimeError, TypeError):
            return False
        if not torch.equal(total, torch.full_like(total, 17.0)):
            return False
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32
    )
    layers._grad_accum_fusion_available = True
    return True


def skip_single_rank_collectives(wrapped) -> None:
    """With one data-parallel rank, reducing gradients and gathering parameters copies each buffer
    onto itself: leave it out."""
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        return
    for chunk in wrapped:
        for group in chunk.bucket_groups:
            assert all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets)
            group.start_grad_sync = lambda *args, **kwargs: None
            group.start_param_sync = lambda *args, **kwargs: None
