"""Resume: the same layout bit for bit, any other layout to 1e-5, no comparison skipped or repeated; broken folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama

TOTAL, STOP = 6, 3


def steps(rank: int, world_size: int, text: str, folder: str, load: str | None, save: str | None, count: int) -> dict:
    """Run up to step ``count`` of TOTAL, from ``load`` if given; what is left behind on rank 0."""
    from rmega import checkpoint, train
    from rmega.layouts import Layout, build, gather_global, layout_config, make_batcher

    config = layout_config(Layout.parse(text), hf_model=folder, steps=TOTAL, global_batch_size=10, max_tokens=260,
                           lr=1e-3)
    config.optimizer.lr_decay_style = "cosine"
    dataset = InMemory(random_comparisons(24, seed=1))
    wrapped, optimizer, scheduler, geometry, device = build(config)
    state = checkpoint.RunState()
    if load:
        state = checkpoint.load(checkpoint.find(load), wrapped=wrapped, optimizer=optimizer, scheduler=scheduler)
    batcher = make_batcher(config, dataset, geometry)
    seen, losses = [], []
    while state.iteration < count:
        documents = batcher.documents(state.consumed)
        seen += documents.tolist()
        report = train.train_step(wrapped, optimizer, batcher.packs(documents), config.loss, len(documents))
        losses.append(report.loss)
        scheduler.step(1)
        state = checkpoint.RunState(state.iteration + 1, state.consumed + len(documents))
    if save:
        checkpoint.save(save, state=state, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler,
                        info={"config": config.as_dict(), "num_comparisons": len(dataset), "manifest": {}})
    return {"params": gather_global(wrapped, geometry, lambda p: p.data), "seen": seen, "losses": losses}


def go(text: str, *args) -> dict:
    from rmega.layouts import Layout

    return run_distributed(steps, Layout.parse(text).world_size, text, *args)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def unbroken(folder):
    return {text: go(text, folder, None, None, TOTAL) for text in ("1", "tp2,pp2")}


@pytest.fixture(scope="module")
def halves(folder, tmp_path_factory):
    """A run that stopped half way, in two layouts."""
    out = {}
    for text in ("1", "tp2,pp2"):
        run = str(tmp_path_factory.mktemp("run"))
        out[text] = (run, go(text, folder, None, run, STOP))
    return out


@pytest.mark.parametrize("text", ["1", "tp2,pp2"])
def test_same_layout_is_bit_identical(text, folder, unbroken, halves):
    run, first = halves[text]
    second = go(text, folder, run, None, TOTAL)
    assert first["seen"] + second["seen"] == unbroken[text]["seen"]
    assert first["losses"] + second["losses"] == unbroken[text]["losses"]
    for name, value in unbroken[text]["params"].items():
        assert torch.equal(second["params"][name], value), name


@pytest.mark.parametrize("wrote,reads", [("1", "tp2,pp2"), ("tp2,pp2", "1"), ("1", "dp2"), ("tp2,pp2", "tp2,sp,dp2"),
                                         ("1", "pp2,vpp2"), ("tp2,pp2", "pp2,first1,last3")])
def test_other_layout(wrote, reads, folder, unbroken, halves):
    run, first = halves[wrote]
    second = go(reads, folder, run, None, TOTAL)
    assert first["seen"] + second["seen"] == unbroken["1"]["seen"]
    for name, value in unbroken["1"]["params"].items():
        difference = (second["params"][name] - value).abs().max() / value.abs().max()
        assert difference <= 1e-5, (name, difference)


def test_padded_heads_change_layout(tmp_path):
    """From a layout with a padded group of heads to one without, and back."""
    folder = str(tiny_llama(tmp_path / "m", heads=9, groups=3, hidden=72, head_dim=8))
    whole = go("1", folder, None, None, TOTAL)
    for wrote, reads in (("tp2,pad", "1"), ("1", "tp2,pad")):
        run = str(tmp_path / f"run_{reads[:3]}")
        go(wrote, folder, None, run, STOP)
        second = go(reads, folder, run, None, TOTAL)
        for name, value in whole["params"].items():
            difference = (second["params"][name] - value).abs().max() / value.abs().max()
            assert difference <= 1e-5, (name, difference)


def test_broken_checkpoints_are_said(folder, halves, tmp_path):
    run, _ = halves["1"]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shard = next((copy / "iter_0000003").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(RuntimeError, match="ValueError: .*iter_0000003.*bytes instead of"):
        go("1", folder, str(copy), None, TOTAL)
    info = json.loads((copy / "iter_0000003" / "rmega.json").read_text())
    (copy / "iter_0000003" / "rmega.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(RuntimeError, match="ValueError: .*rmega.json: checkpoint format version 99"):
        go("1", folder, str(copy), None, TOTAL)
