"""Training on a GPU agrees with the CPU, in fp32 and, to what it loses, in half precision. Skipped
without one."""

from __future__ import annotations

import pytest
import torch

from tests.dist import run_distributed
from tests.gpu import ON_CPU, ON_GPU
from tests.tiny import InMemory, random_comparisons, tiny_llama


def steps(
    rank: int, world_size: int, folder: str, dtype: torch.dtype, switches: dict, text: str = "1"
):
    from rmega.training.parity import Layout, layout_config, run_layout

    torch.set_float32_matmul_precision("highest")
    config = layout_config(
        Layout.parse(text),
        hf_model=folder,
        steps=3,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
        **switches,
    )
    if dtype == torch.float16:
        # The default of 65,536 times this model's activation gradients of up to 2.3 does not fit.
        config.train.precision, config.optimizer.initial_loss_scale = "fp16", 256.0
    return run_layout(config, InMemory(random_comparisons(24, seed=1)), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(
        tiny_llama(tmp_path_factory.mktemp("tiny"), heads=4, groups=2, hidden=128, head_dim=32)
    )


@pytest.fixture(scope="module")
def cpu(folder):
    return run_distributed(steps, 1, folder, torch.float32, {})[0]


@pytest.mark.parametrize("switches", [{}, {"share_prefix": False}, {"prune_last_layer": False}])
@pytest.mark.parametrize("text", ["1", "recompute"])
@pytest.mark.parametrize("device", [ON_GPU])
def test_fp32(folder, cpu, switches, text, device):
    from rmega.training.parity import compare

    result = run_distributed(
        steps, 1, folder, torch.float32, switches, text, gpus=device == "cuda"
    )[0]
    differences = compare(result, cpu)
    assert max(differences.values()) <= 1e-4, differences


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", [ON_GPU, ON_CPU])
def test_half(folder, cpu, dtype, device):
    """No step may be skipped for a loss scale that the model's gradients do not fit."""
    result = run_distributed(steps, 1, folder, dtype, {}, gpus=device == "cuda")[0]
    assert result.losses == pytest.approx(cpu.losses, rel=0.05)
    assert result.grad_norms == pytest.approx(cpu.grad_norms, rel=0.1)
