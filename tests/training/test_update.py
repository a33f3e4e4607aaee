"""The update that is decided on the device: the same bits as one decided on the host, and a skipped
one changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.dist import run_distributed
from tests.megatron.test_grad_norm import Reads
from tests.tiny import InMemory, random_comparisons, tiny_llama

STEPS = 5
BAD_NORM, BAD_LOSS = 1, 3
"""The steps in which a gradient on one rank, or the loss, is not finite."""


def on_the_host(optimizer, loss: torch.Tensor, count: torch.Tensor):
    """``update_parameters`` with every decision in Python's floats."""
    from rmega.megatron.grad_norm import grad_norm

    def answer(norm: float, updated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(norm, dtype=torch.float64), torch.tensor(updated, dtype=torch.float64)

    if not math.isfinite(loss.item()):
        return answer(math.nan, False)
    assert not optimizer.prepare_grads()
    terms = count.item()
    norm = grad_norm(optimizer).item() / terms
    if not math.isfinite(norm):
        return answer(norm, False)
    clip = optimizer.config.clip_grad
    factor = terms * max(1.0, (norm + 1e-6) / clip) if clip > 0 else terms
    for part in optimizer.chained_optimizers:
        if all(group.get("fused") for group in part.optimizer.param_groups):
            part.optimizer.grad_scale = torch.tensor(factor, dtype=torch.float32)
        else:
            for parameter in part.get_parameters():
                parameter.grad.mul_(1.0 / factor)
    optimizer.step_with_ready_grads()
    return answer(norm, True)


def state_of(wrapped, optimizer) -> dict[str, torch.Tensor]:
    """Parameters, main parameters and Adam's state, copied."""
    state = {n: p.detach().clone() for n, p in wrapped[0].named_parameters()}
    parameters = [p for part in optimizer.chained_optimizers for p in part.get_parameters()]
    for i, parameter in enumerate(parameters):
        inner = next(
            part.optimizer.state
            for part in optimizer.chained_optimizers
            if parameter in part.optimizer.state
        )
        state[f"main {i}"] = parameter.detach().clone()
        state |= {f"{name} {i}": value.clone() for name, value in inner[parameter].items()}
    return state


def steps(rank, world_size, layout, folder, dtype, clip, fused, device) -> dict[str, Any]:
    """Reports and states of a few steps, two of which are skipped."""
    from rmega.precision import DTYPES
    from rmega.training import train
    from rmega.training.components import make_batcher
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse(layout),
        hf_model=folder,
        steps=STEPS,
        global_batch_size=4,
        max_tokens=200,
        lr=1e-3,
    )
    config.optimizer.clip_grad = clip
    wrapped, optimizer, scheduler, geometry, _ = build(config, DTYPES[dtype])
    for group in optimizer.param_groups:
        group["fused"] = fused
    batcher = make_batcher(config, InMemory(random_comparisons(4 * STEPS, seed=2)), geometry)
    update, reads = train.update_parameters, Reads()

    def counted(optimizer, loss, count):
        # Without the distributed optimizer replicas have the same gradients here.
        if step == BAD_NORM and (rank == world_size - 1 or "plainopt" in layout):
            list(wrapped[0].parameters())[3].main_grad.view(-1)[-1] = math.inf
        if step == BAD_LOSS:
            loss = loss + math.inf
        if not device:
            return on_the_host(optimizer, loss, count)
        with reads:
            return update(optimizer, loss, count)

    reports, states = [], []
    train.update_parameters = counted
    try:
        for step in range(STEPS):
            documents = batcher.documents(4 * step)
            report = train.train_step(wrapped, optimizer, batcher.packs(documents), config.loss, 4)
            scheduler.step(1)
            reports.append((report.loss, report.grad_norm, report.updated))
            states.append(state_of(wrapped, optimizer))
    finally:
        train.update_parameters = update
    return {"reports": reports, "states": states, "reads": reads.count}


@pytest.mark.parametrize(
    "layout,dtype,clip,fused",
    [
        ("1", "fp32", 1e-2, True),
        ("1", "bf16", 0.0, True),
        ("1", "fp32", 1e-2, False),
        ("dp2", "bf16", 1e-2, True),
        ("dp2", "fp32", 1e3, False),
        ("dp2,plainopt", "bf16", 1e-2, True),
        ("tp2", "fp32", 1e-2, True),
        ("pp2", "bf16", 1e-2, True),
    ],
)
def test_the_same_bits_as_decided_on_the_host(tmp_path, layout, dtype, clip, fused):
    folder = str(tiny_llama(tmp_path / "model"))
    ranks = 1 if layout == "1" else 2
    arguments = (layout, folder, dtype, clip, fused)
    device, host = (run_distributed(steps, ranks, *arguments, device) for device in (True, False))
    for a, b in zip(device, host, strict=True):
        assert [updated for _, _, updated in a["reports"]] == [
            step not in (BAD_NORM, BAD_LOSS) for step in range(STEPS)
        ]
        for mine, theirs in zip(a["reports"], b["reports"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-15, nan_ok=True)
        assert math.isnan(a["reports"][BAD_LOSS][1])
        for step, (mine, theirs) in enumerate(zip(a["states"], b["states"], strict=True)):
            assert mine.keys() == theirs.keys()
            different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
            assert not different, (step, different)
        for step in (BAD_NORM, BAD_LOSS):
            before, after = a["states"][step - 1], a["states"][step]
            assert all(torch.equal(before[name], after[name]) for name in before)
        counts = [v.item() for name, v in a["states"][-1].items() if name.startswith("step ")]
        assert set(counts) == {STEPS - 2.0}
        assert not fused or a["reads"] == 0
