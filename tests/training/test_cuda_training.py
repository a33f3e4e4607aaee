"""Training on a GPU agrees with the CPU, in fp32 and, to what it loses, in half precision. Skipped
without one."""

from __future__ import annotations

import pytest
import torch

from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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
    return run_layout(config, InMemory(random_comparisons(24, seed=1)), dtype)


def on_cpu(rank: int, world_size: int, *args):
    torch.cuda.is_available = lambda: (
        False
    )  # this worker process is used for nothing else afterwards
    return steps(rank, world_size, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(
        tiny_llama(tmp_path_factory.mktemp("tiny"), heads=4, groups=2, hidden=128, head_dim=32)
    )


@pytest.fixture(scope="module")
def cpu(folder):
    from tests import dist

    result = run_distributed(on_cpu, 1, folder, torch.float32, {})[0]
    dist._stop()
    return result


@pytest.mark.parametrize("switches", [{}, {"share_prefix": False}, {"prune_last_layer": False}])
@pytest.mark.parametrize("text", ["1", "recompute"])
def test_fp32(folder, cpu, switches, text):
    from rmega.training.parity import compare

    differences = compare(run_distributed(steps, 1, folder, torch.float32, switches, text)[0], cpu)
    assert max(differences.values()) <= 1e-4, differences


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(folder, cpu, dtype):
    result = run_distributed(steps, 1, folder, dtype, {})[0]
    assert result.losses == pytest.approx(cpu.losses, rel=0.05)
    assert result.grad_norms == pytest.approx(cpu.grad_norms, rel=0.1)
