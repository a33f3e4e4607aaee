"""The update of the parameters: mean gradient, clipping and skipping, decided on the device."""

from __future__ import annotations

import math

import torch

from rmega.megatron.grad_norm import grad_norm


def update_parameters(
    optimizer, loss: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Divide the summed gradients by ``count``, clip and update. Parameters and optimizer state
    keep their values where ``loss`` or the norm is not finite.

    What ``ChainedOptimizer.step`` does, with division and clipping as one factor. torch's fused
    Adam divides by it while it reads the gradients, and skips the update where a tensor on the
    device says so: the host waits for nothing. It does wait with other optimizers (FusedAdam of
    Transformer Engine and apex), and for Megatron-Core's fp16 loss scale.

    ``optimizer`` is a ``ChainedOptimizer``; ``loss`` and ``count`` (at least 1) are [] fp64, the
    same on every rank. Returns the norm of the mean gradient and whether the update was made, both
    [] fp64 on the device; None where fp16 gradients overflowed.
    """
    finite = torch.isfinite(loss)
    if optimizer.config.fp16 and not finite:  # the loss scale follows gradients of finite losses
        return torch.full_like(loss, math.nan), torch.zeros_like(loss)
    if optimizer.prepare_grads():
        return None
    norm = torch.where(finite, grad_norm(optimizer) / count, math.nan)
    update = torch.isfinite(norm)
    clip = optimizer.config.clip_grad
    # 1e-6 as in Megatron-Core's clipping
    factor = count * ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else count
    if not _skips_on_device(optimizer) and not update:
        return norm, update.double()
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        if _skips_on_device(part):
            part.optimizer.grad_scale = factor.float()
            part.optimizer.found_inf = (~update).float()
        else:
            inverse = (1.0 / factor).float()
            for parameter in part.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse)
    optimizer.step_with_ready_grads()
    return norm, update.double()


def _skips_on_device(optimizer) -> bool:
    """Whether torch's fused Adam does the step. The same on the ranks that share its collectives:
    they have the same groups of parameters, some of them empty."""
    return all(group.get("fused") for group in optimizer.param_groups)
