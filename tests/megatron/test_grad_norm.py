"""The norm of all gradients: exact on a CPU, and no synchronization for any number of tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmega import distributed
from rmega.megatron.grad_norm import grad_norm, norms
from tests.dist import run_distributed


class Reads(TorchDispatchMode):
    """Counts what waits for a device: values read by the host."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **kwargs or {})


OLDER, NEWER = "get_main_grads_for_grad_norm", "get_grads_for_grad_norm"  # Megatron-Core 0.19


def optimizer_of(parts: list[list[torch.Tensor]], name: str = OLDER):
    group = torch.distributed.group.WORLD
    return SimpleNamespace(
        chained_optimizers=[
            SimpleNamespace(**{name: lambda grads=grads: grads}) for grads in parts
        ],
        get_grad_stats_parallel_group=lambda: group,
        get_loss_scale=lambda: torch.ones(1),
    )


def norm_of_parts(rank: int, world_size: int, large: int) -> tuple[float, float, int]:
    distributed.initialize()
    generator = torch.Generator().manual_seed(rank)
    grads = [torch.randn(size, generator=generator) * 1e-3 for size in (large, 5, 4096, 4097)]
    grads.append(grads[0][:7].view(7, 1))
    exact = sum(grad.double().square().sum() for grad in grads).reshape(1)
    torch.distributed.all_reduce(exact)
    with Reads() as reads:
        found = grad_norm(optimizer_of([grads[:2], grads[2:]]))
    return found.item(), exact.sqrt().item(), reads.count


@pytest.mark.parametrize("ranks,large", [(1, 20_000_001), (2, 100_003)])
def test_the_norm_over_ranks(ranks, large):
    """As many values as an embedding has, of which ``torch.norm`` alone is off by 1e-3."""
    for found, exact, reads in run_distributed(norm_of_parts, ranks, large):
        assert found == pytest.approx(exact, rel=1e-6)
        assert reads == 0


def one_without_gradients(rank: int, world_size: int, name: str) -> float:
    distributed.initialize()
    return grad_norm(optimizer_of([[]] if rank else [[torch.full((4,), 3.0)]], name)).item()


@pytest.mark.parametrize("name", [OLDER, NEWER])
def test_a_rank_without_gradients(name):
    assert run_distributed(one_without_gradients, 2, name) == [6.0, 6.0]


def test_not_finite_stays_so():
    assert all(not x.isfinite() for x in norms([torch.tensor([1.0, float("inf")])]))
    values = torch.ones(10_000)
    values[9_999] = float("nan")
    assert norms([values])[0].isnan()
