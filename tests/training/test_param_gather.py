"""Weights that are gathered during the next forward pass: the same bits as gathered at once, and
nobody reads one that has not arrived."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmega.config import LoraArgs
from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama

STEPS = 4


@contextlib.contextmanager
def a_bucket_per_weight():
    """So that no weight arrives because another one in its bucket was waited for."""
    from rmega.training import components

    original = components.DistributedDataParallelConfig
    components.DistributedDataParallelConfig = lambda **options: original(**options, bucket_size=1)
    try:
        yield
    finally:
        components.DistributedDataParallelConfig = original


@contextlib.contextmanager
def weights_that_come_late(optimizer, wrapped):
    """After an update what other replicas have updated is NaN here until somebody waits for it."""
    group_class = type(wrapped[0].bucket_groups[0])
    start, step = group_class.start_param_sync, optimizer.step_with_ready_grads

    def start_late(group, force_sync: bool = False) -> None:
        if force_sync:
            return start(group, force_sync=True)

        def wait() -> None:
            group.param_gather_handle = None
            start(group, force_sync=True)

        group.param_gather_handle = SimpleNamespace(wait=wait)
        group.param_gather_dispatched = True

    def step_and_spoil() -> bool:
        updated = step()
        for group in (group for chunk in wrapped for group in chunk.bucket_groups):
            for bucket in group.buckets:
                size = bucket.param_data.numel() // group.intra_distributed_optimizer_instance_size
                own = group.intra_distributed_optimizer_instance_rank * size
                bucket.param_data[:own] = math.nan
                bucket.param_data[own + size :] = math.nan
        return updated

    group_class.start_param_sync, optimizer.step_with_ready_grads = start_late, step_and_spoil
    try:
        yield
    finally:
        group_class.start_param_sync = start
        del optimizer.step_with_ready_grads


def steps(
    rank: int,
    world_size: int,
    layout: str,
    folder: str,
    dtype: str,
    options: dict[str, Any],
    save: str,
    missing: str = "",
) -> dict[str, Any]:
    """Losses and norms of a few steps, rewards and a checkpoint between them, and what is left."""
    from rmega.checkpointing import checkpoint
    from rmega.megatron import param_gather
    from rmega.precision import DTYPES
    from rmega.training import train
    from rmega.training.components import make_batcher
    from rmega.training.parity import Layout, build, gather_global, layout_config
    from rmega.training.rewards import compute_rewards

    parsed = Layout.parse(layout)
    config = layout_config(
        parsed,
        hf_model=folder,
        steps=STEPS,
        global_batch_size=4,
        max_tokens=120,
        lr=1e-2,
        **options,
    )
    originals = {name: getattr(param_gather, name) for name in ("hold_readers", "finish")}
    if missing:
        setattr(param_gather, missing, lambda wrapped: None)
    late = contextlib.nullcontext()
    try:
        with a_bucket_per_weight():
            wrapped, optimizer, scheduler, geometry, device = build(config, DTYPES[dtype])
        p = config.parallel
        # Later stages have one bucket.
        assert p.pipeline_model_parallel_size > 1 or len(wrapped[0].bucket_groups) > 1
        assert wrapped[0].ddp_config.overlap_param_gather is p.overlap_param_gather
        if p.overlap_param_gather:
            late = weights_that_come_late(optimizer, wrapped)
        batcher = make_batcher(config, InMemory(random_comparisons(4 * STEPS, seed=3)), geometry)
        reports, rewards = [], []
        with late:
            for step in range(STEPS):
                packs = batcher.packs(batcher.documents(4 * step))
                report = train.train_step(wrapped, optimizer, packs, config.loss, 4)
                scheduler.step(1)
                reports.append((report.loss, report.grad_norm))
                if step == 1:
                    rewards = compute_rewards(wrapped, batcher, device).tolist()
                if step == 2:
                    checkpoint.save(
                        save,
                        state=checkpoint.RunState(step + 1, 4 * (step + 1)),
                        wrapped=wrapped,
                        optimizer=optimizer,
                        scheduler=scheduler,
                        info={"config": config.as_dict(), "num_comparisons": 16, "manifest": {}},
                    )
            params = gather_global(wrapped, geometry, lambda p: p.data, config.lora)
    finally:
        for name, original in originals.items():
            setattr(param_gather, name, original)
    return {"reports": reports, "rewards": rewards, "params": params}


def weights_saved(folder: str) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    from rmega.checkpointing.find import find

    path = find(folder)
    sizes = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes.items()
        if hasattr(entry, "size") and not name.startswith("optimizer")
    }
    load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[name], other[name]) for name in one)


CASES = {
    "pruned": ("dp2", "fp32", {}, {}),
    "whole": ("dp2", "bf16", {"prune_last_layer": False}, {}),
    "tied": ("dp2", "bf16", {}, {"reward_head": False, "tie_word_embeddings": True}),
    "lora": ("dp2", "bf16", {"lora": LoraArgs(lora_rank=8)}, {}),
    "qk_norm": ("dp2", "fp32", {}, {"family": "qwen3"}),
    "recompute": ("dp2,recompute", "fp32", {}, {}),
    "stages": ("pp2,dp2", "fp32", {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_gathered_at_once(tmp_path, case):
    layout, dtype, options, model = CASES[case]
    folder = str(tiny_llama(tmp_path / "model", **model))
    ranks = 4 if "pp2" in layout else 2
    found = [
        run_distributed(
            steps, ranks, f"{layout},{kind}", folder, dtype, options, str(tmp_path / kind)
        )
        for kind in ("overlap", "gather")
    ]
    for at_once, late in zip(*found, strict=True):
        assert late["reports"] == at_once["reports"]
        assert late["rewards"] == at_once["rewards"]
    assert same(found[0][0]["params"], found[1][0]["params"])
    assert same(*(weights_saved(str(tmp_path / kind)) for kind in ("overlap", "gather")))


@pytest.mark.parametrize("missing", ["hold_readers", "finish"])
def test_who_does_not_wait_is_found(tmp_path, missing):
    """Without one of the two waits NaN is read: the test above does see it."""
    folder = str(tiny_llama(tmp_path / "model"))
    result = run_distributed(
        steps, 2, "dp2,gather", folder, "fp32", {}, str(tmp_path / "run"), missing
    )[0]
    if missing == "hold_readers":
        assert math.isnan(result["reports"][1][0])
    else:
        assert any(w.isnan().any() for w in weights_saved(str(tmp_path / "run")).values())
