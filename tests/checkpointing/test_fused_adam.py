"""Checkpoints with FusedAdam of Transformer Engine or apex, which have no state before their first
step and count steps in their groups. A stand-in with these two habits takes their place."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.checkpointing.test_checkpoint import STOP, TOTAL, steps
from tests.dist import run_distributed
from tests.tiny import tiny_llama


class LazyAdam(torch.optim.Optimizer):
    """AdamW as FusedAdam computes it: state from the first step on, the count in the group."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable  # the second is for CUDA graphs, from 0.17 on
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = count = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**count))


@contextlib.contextmanager
def fused_adam():
    """Megatron-Core as it is where Transformer Engine or apex can be imported."""
    from megatron.core import optimizer as core
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "Adam", LazyAdam)
        patch.setattr(core, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "Adam", LazyAdam)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        yield


def lazy_steps(rank: int, world_size: int, *args) -> dict:
    with fused_adam():
        return steps(rank, world_size, *args)


def reserve_first(rank: int, world_size: int, text: str, folder: str, run: str, dtype: str) -> dict:
    """What a run with --save does before its first step: state is allocated, and is zero."""
    from rmega.checkpointing import checkpoint
    from rmega.precision import DTYPES
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse(text), hf_model=folder, steps=2, global_batch_size=4, max_tokens=260, lr=1e-3
    )
    with fused_adam():
        wrapped, optimizer, scheduler, *_ = build(config, DTYPES[dtype])
        saver = checkpoint.Saver(run, optimizer)
        saver.reserve(wrapped=wrapped, optimizer=optimizer, scheduler=scheduler)
    parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
    assert all(type(part.optimizer) is LazyAdam for part in parts)
    entries = [
        state[key].abs().max().item()
        for part in parts
        for state in part.optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return {"entries": len(entries), "largest": max(entries)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


LAYOUTS = [("1", "fp32"), ("plainopt", "fp32"), ("plainopt", "bf16"), ("dp2", "bf16")]


@pytest.mark.parametrize("text,dtype", LAYOUTS)
def test_memory_for_checkpoints_is_reserved_before_the_first_step(text, dtype, folder, tmp_path):
    world_size = 2 if text == "dp2" else 1
    result = run_distributed(reserve_first, world_size, text, folder, str(tmp_path), dtype)[0]
    assert result["entries"] and result["largest"] == 0.0


@pytest.mark.parametrize("text,dtype", LAYOUTS)
def test_resumes_bit_for_bit(text, dtype, folder, tmp_path):
    world_size = 2 if text == "dp2" else 1

    def go(load, save, count):
        return run_distributed(lazy_steps, world_size, text, folder, load, save, count, dtype)[0]

    first, second = go(None, str(tmp_path), STOP), go(str(tmp_path), None, TOTAL)
    whole = go(None, None, TOTAL)
    assert first["losses"] + second["losses"] == whole["losses"]
    for name, value in whole["params"].items():
        assert torch.equal(second["params"][name], value), name
