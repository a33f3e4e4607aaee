"""Resume: the same layout bit for bit, any other layout to 1e-5, no comparison skipped or repeated;
broken folders."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch

from tests.dist import run_distributed
from tests.runs import edit_info
from tests.tiny import InMemory, random_comparisons, tiny_llama

TOTAL, STOP = 6, 3


@contextlib.contextmanager
def small_buckets():
    from rmega.training import components

    original = components.DistributedDataParallelConfig
    components.DistributedDataParallelConfig = lambda **options: original(
        **options, bucket_size=20_000
    )
    try:
        yield
    finally:
        components.DistributedDataParallelConfig = original


def steps(
    rank: int,
    world_size: int,
    text: str,
    folder: str,
    load: str | None,
    save: str | None,
    count: int,
    dtype: str = "fp32",
    loss_scale: float = 1.0,
) -> dict:
    """Run up to step ``count`` of TOTAL, from ``load`` if given; what is left behind on rank 0."""
    from rmega.checkpointing import checkpoint
    from rmega.checkpointing.find import find
    from rmega.precision import DTYPES
    from rmega.training import components, train
    from rmega.training.parity import Layout, build, gather_global, layout_config

    config = layout_config(
        Layout.parse(text),
        hf_model=folder,
        steps=TOTAL,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
    )
    config.optimizer.lr_decay_style, config.train.precision = "cosine", dtype
    if dtype == "fp16":
        config.optimizer.initial_loss_scale = loss_scale
    dataset = InMemory(random_comparisons(24, seed=1))
    # Several gradient buckets, as in a large model, where shards of the state begin and end inside
    # parameters.
    with small_buckets():
        wrapped, optimizer, scheduler, geometry, device = build(config, DTYPES[dtype])
    state = checkpoint.RunState()
    if load:
        state = checkpoint.load(
            find(load), wrapped=wrapped, optimizer=optimizer, scheduler=scheduler
        )
    batcher = components.make_batcher(config, dataset, geometry)
    seen, losses, scales = [], [], []
    while state.iteration < count:
        documents = batcher.documents(state.consumed)
        seen += documents.tolist()
        report = train.train_step(
            wrapped, optimizer, batcher.packs(documents), config.loss, len(documents)
        )
        losses.append(report.loss)
        scheduler.step(1)
        scales.append((report.updated, float(optimizer.get_loss_scale())))
        state = checkpoint.RunState(state.iteration + 1, state.consumed + len(documents))
    if save:
        checkpoint.save(
            save,
            state=state,
            wrapped=wrapped,
            optimizer=optimizer,
            scheduler=scheduler,
            info={"config": config.as_dict(), "num_comparisons": len(dataset), "manifest": {}},
        )
    return {
        "params": gather_global(wrapped, geometry, lambda p: p.data),
        "seen": seen,
        "losses": losses,
        "scales": scales,
    }


def go(text: str, *args) -> dict:
    from rmega.training.parity import Layout

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


@pytest.mark.parametrize("text", ["1", "tp2,pp2", "dp2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_goes_on_bit_for_bit(dtype, text, folder, tmp_path):
    """fp32 main parameters, and with fp16 the loss scale: updates are skipped and the scale falls
    before the stop."""
    more = (dtype, 2.0**36 if dtype == "fp16" else 1.0)
    first = go(text, folder, None, str(tmp_path), STOP, *more)
    second = go(text, folder, str(tmp_path), None, TOTAL, *more)
    whole = go(text, folder, None, None, TOTAL, *more)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["scales"] + second["scales"] == whole["scales"]
    if dtype == "fp16":
        assert not first["scales"][0][0] and first["scales"][-1][1] < 2.0**36
    for name, value in whole["params"].items():
        assert torch.equal(second["params"][name], value), name


@pytest.mark.parametrize(
    "wrote,reads",
    [
        ("1", "tp2,pp2"),
        ("tp2,pp2", "1"),
        ("1", "dp2"),
        ("tp2,pp2", "tp2,sp,dp2"),
        ("1", "pp2,vpp2"),
        ("tp2,pp2", "pp2,first1,last3"),
    ],
)
def test_other_layout(wrote, reads, folder, unbroken, halves):
    run, first = halves[wrote]
    second = go(reads, folder, run, None, TOTAL)
    assert first["seen"] + second["seen"] == unbroken["1"]["seen"]
    for name, value in unbroken["1"]["params"].items():
        difference = (second["params"][name] - value).abs().max() / value.abs().max()
        assert difference <= 1e-5, (name, difference)


@pytest.mark.parametrize("text", ["dp2", "tp2,dp2", "dp2,overlap", "pp2,vpp2,dp2"])
def test_state_that_is_cut_over_replicas(text, folder, unbroken, tmp_path):
    """Each replica holds a share of the optimizer state; the file holds it whole. Several buckets,
    with padding."""
    go(text, folder, None, str(tmp_path), STOP)
    same = go(text, folder, str(tmp_path), None, TOTAL)
    whole = go(text, folder, None, None, TOTAL)
    for name, value in whole["params"].items():
        assert torch.equal(same["params"][name], value), name
    other = go("1", folder, str(tmp_path), None, TOTAL)
    for name, value in unbroken["1"]["params"].items():
        difference = (other["params"][name] - value).abs().max() / value.abs().max()
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


def spoil(shard, how: str) -> None:
    data = bytearray(shard.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    "how,says",
    [
        ("truncated", "bytes instead of"),
        ("one bit", "its content has changed"),
        ("gone", "No such file"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    how, says, halves, tmp_path, capsys
):
    from rmega.checkpointing import run_folder
    from rmega.checkpointing.find import damage, find

    run = tmp_path / "run"
    shutil.copytree(halves["1"][0], run)
    shutil.copytree(run / "iter_0000003", run / "iter_0000005")
    (run / run_folder.TRACKER).write_text("5\n")
    shard = next((run / "iter_0000005").glob("*.distcp"))
    shard.unlink() if how == "gone" else spoil(shard, how)
    assert says in damage(run / "iter_0000005")
    if how != "one bit":  # outside a process group only sizes are looked at
        assert find(run) == run / "iter_0000003"
        out = capsys.readouterr().out
        assert "warning: damaged checkpoint left out: " in out and says in out
        with pytest.raises(
            ValueError,
            match="iter_0000005: damaged .*the newest healthy checkpoint is .*iter_0000003",
        ):
            find(run / "iter_0000005")


def test_no_good_checkpoint(halves, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(halves["1"][0], run)
    spoil(next((run / "iter_0000003").glob("*.distcp")), "one bit")
    with pytest.raises(
        RuntimeError, match="ValueError: --load .*no healthy checkpoint in it .*content has changed"
    ):
        go("1", folder, str(run), None, TOTAL)
    info = run / "iter_0000003" / "rmega.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "format_version": 99}))
    with pytest.raises(
        RuntimeError, match="rmega.json: checkpoint format version 99; this rmega reads version 1"
    ):
        go("1", folder, str(run), None, TOTAL)


def test_foreign_and_unfinished_folders(tmp_path):
    from rmega.checkpointing import run_folder
    from rmega.checkpointing.find import find

    (tmp_path / "a" / "iter_0000007.partial").mkdir(parents=True)
    assert find(tmp_path / "a") is None
    (tmp_path / "b" / "iter_0000007").mkdir(parents=True)
    (tmp_path / "b" / "iter_0000007" / ".metadata").write_text("x")
    (tmp_path / "b" / run_folder.TRACKER).write_text("7")
    with pytest.raises(ValueError, match="--load .*b: holds checkpoints of another program"):
        find(tmp_path / "b")


def test_a_tracker_that_was_cut_short(halves, tmp_path):
    from rmega.checkpointing import run_folder
    from rmega.checkpointing.find import find

    run = tmp_path / "run"
    shutil.copytree(halves["1"][0], run)
    (run / run_folder.TRACKER).write_text("")
    assert find(run) == run / "iter_0000003"


def test_checkpoints_of_an_earlier_rmega_without_checksums(halves, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(halves["1"][0], run)
    edit_info(run / "iter_0000003", drop="files")
    assert len(go("1", folder, str(run), None, TOTAL)["losses"]) == TOTAL - STOP
