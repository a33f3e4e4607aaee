"""The norm of all gradients, on the device.

Megatron-Core's own, without Transformer Engine or apex, reads the norm of every parameter back from
the device: one synchronization for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

ROW = 4096
"""Values whose squares are summed at once on a CPU."""


def grad_norm(optimizer) -> torch.Tensor:
    """Euclidean norm of the gradients that the steps of ``optimizer`` (a ``ChainedOptimizer``) use,
    over all ranks: [] fp64 on the device, without waiting for it. Called by every rank.
    Megatron-Core decides which tensors count: shards of this rank, copies of tensor parallelism
    once."""
    grads = [grad for part in optimizer.chained_optimizers for grad in _grads(part)]
    if grads:
        total = torch.norm(torch.stack(norms(grads)))[None] ** 2  # [1] fp32
    else:  # of a small model some ranks have no share
        total = torch.zeros_like(optimizer.get_loss_scale())
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return total[0].double().sqrt()


def _grads(part) -> list[torch.Tensor]:
    get = getattr(part, "get_grads_for_grad_norm", None)  # its name from Megatron-Core 0.19 on
    return (get or part.get_main_grads_for_grad_norm)()


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The norm of each fp32 tensor, [] on its device, without waiting for it."""
    if tensors[0].is_cuda:
        return list(torch._foreach_norm(list(tensors)))
    return [_norm_by_rows(tensor) for tensor in tensors]


def _norm_by_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``torch.norm`` on a CPU adds up fp32 values so that the norm of 28 million of them (the
    gradient of an embedding) is off by 1e-3: more than layouts may differ by, and clipping scales
    with it. Row by row it is not."""
    if tensor.numel() <= ROW:
        return torch.norm(tensor)
    flat = tensor.reshape(-1)
    end = flat.numel() // ROW * ROW
    rows = torch.norm(flat[:end].view(-1, ROW), dim=1)
    return torch.norm(torch.cat([rows, torch.norm(flat[end:])[None]]))
