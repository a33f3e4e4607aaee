"""Layout parity: every layout gives the single rank's losses, gradients, parameters and rewards
(fp32, 1e-5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dist import run_distributed
from tests.hf_fixtures import FAMILIES, hf_config, is_norm, tiny, write_folder
from tests.tiny import VOCAB, InMemory, random_comparisons, tiny_llama, with_ties

TOLERANCE = 1e-5
LAYOUTS = [
    "tp2",
    "tp2,sp",
    "pp2",
    "pp2,vpp2",
    "dp2",
    "dp2,plainopt",
    "tp2,pp2",
    "tp2,recompute",
    "tp2,sp,selective",
    "pp2,first1,last3",
    "dp2,overlap",
    "dp2,gather",
]


def run(rank: int, world_size: int, text: str, folder: str, switches: dict) -> object:
    from rmega.training.parity import Layout, layout_config, run_layout

    comparisons, layout = random_comparisons(24, seed=1), Layout.parse(text)
    # Stages and replicas take turns with the packs of a step: four of them there, elsewhere two.
    turns = layout.world_size > layout.parallel.tensor_model_parallel_size
    options = {"steps": 3, "global_batch_size": 10, "max_tokens": 260 if turns else 400, "lr": 1e-3}
    config = layout_config(layout, hf_model=folder, **{**options, **switches})
    if config.loss.loss == "rao_kupper":
        with_ties(comparisons)
    return run_layout(config, InMemory(comparisons))


def result_of(text: str, folder, **switches):
    from rmega.training.parity import Layout

    return run_distributed(run, Layout.parse(text).world_size, text, str(folder), switches)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def single(folder):
    return result_of("1", folder)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """(folder, single rank's result) of a tiny model of a family, made once."""
    made = {}

    def of(family: str):
        if family not in made:
            folder = tiny_llama(tmp_path_factory.mktemp(family), family=family)
            made[family] = (folder, result_of("1", folder))
        return made[family]

    return of


LOSSES = {
    "scaled": {"loss": "ranking", "penalty": "center", "scale_by_rating": True},
    "plackett_luce": {"loss": "plackett_luce", "use_margin": True},
    "centered": {"loss": "focal", "penalty": "none", "batch_centering": 0.7},
    "centered_choices": {"loss": "plackett_luce", "penalty": "l2", "batch_centering": 0.7},
    "length": {"loss": "focal", "penalty": "none", "length_penalty": 0.02, "use_margin": True},
}


@pytest.mark.parametrize("name", LOSSES)
def test_parity_of_losses(name, folder):
    """Weights, lengths and counts are those of the global batch however it is cut into ranks and
    packs."""
    from rmega.config import LossArgs
    from rmega.training.parity import compare

    loss = LossArgs(**LOSSES[name])
    alone = result_of("1", folder, loss=loss)
    for text, switches in [
        ("tp2,sp", {}),
        ("pp2", {}),
        ("dp2", {}),
        ("1", {"share_prefix": False, "max_tokens": 100}),
    ]:
        differences = compare(result_of(text, folder, loss=loss, **switches), alone)
        assert max(differences.values()) <= TOLERANCE, (text, differences)


def centered(rank: int, world_size: int, text: str, folder: str, max_tokens: int) -> object:
    """Gradients of one step with ``--batch-centering`` by the training (reduced over ranks), and
    those of the same loss in plain torch on the whole batch."""
    from rmega.config import LossArgs
    from rmega.data.packing import pack
    from rmega.training import components, parity, train

    loss = LossArgs(loss="ranking", penalty="none", batch_centering=0.7)
    layout = parity.Layout.parse(text)
    options = {"steps": 1, "global_batch_size": 10, "max_tokens": max_tokens, "lr": 1e-3}
    config = parity.layout_config(layout, hf_model=folder, loss=loss, **options)
    wrapped, _, _, geometry, device = parity.build(config)
    comparisons = random_comparisons(10, seed=1)
    batcher = components.make_batcher(config, InMemory(comparisons), geometry)
    packs = batcher.packs(np.arange(10))
    grads = parity._first_gradients(wrapped, packs, config, geometry)
    schedule, passes = train.run_schedule, []
    train.run_schedule = lambda *args, **o: passes.append(o["forward_only"]) or schedule(*args, **o)
    try:
        sums = train.forward_backward(wrapped, packs, loss)
    finally:
        train.run_schedule = schedule
    assert passes == ([False] if max_tokens == 10_000 else [True, False])
    plain = {}
    if world_size == 1:
        (model,) = wrapped
        batch = pack(comparisons)
        rewards = model.module(batch)
        x = rewards[batch.chosen] - rewards[batch.rejected]
        total = -torch.nn.functional.logsigmoid(x).mean() + 0.7 * rewards.mean() ** 2
        model.zero_grad_buffer()
        (len(x) * total).backward()
        plain = parity.gather_global(wrapped, geometry, lambda p: p.main_grad)
        plain["loss"] = total.detach()
    return len(packs), (sums["base_loss"] + sums["penalty"]) / sums["num_terms"], grads, plain


def test_batch_centering_against_plain_torch(folder):
    """With the mean from one pack, and from a sweep over packs, ranks and stages."""
    from rmega.training.parity import Layout

    num, loss, grads, plain = run_distributed(centered, 1, "1", str(folder), 10_000)[0]
    assert num == 1
    results = [(loss, grads)]
    for text in ("1", "dp2", "pp2", "pp2,vpp2", "tp2,sp"):
        ranks = run_distributed(centered, Layout.parse(text).world_size, text, str(folder), 200)
        assert ranks[0][0] > 1
        results.append(ranks[0][1:3])
    for loss, grads in results:
        assert loss == pytest.approx(plain["loss"].item(), rel=1e-5)
        for name, value in grads.items():
            want = plain[name]
            assert (value - want).abs().max() <= TOLERANCE * want.abs().max(), name


@pytest.fixture(scope="module")
def with_threshold(folder):
    from rmega.config import LossArgs

    loss = LossArgs(loss="rao_kupper", penalty="center")
    return loss, result_of("1", folder, loss=loss)


@pytest.mark.parametrize(
    "text,switches",
    [
        *((text, {}) for text in ("tp2", "tp2,sp", "pp2", "pp2,vpp2", "dp2")),
        *((text, {}) for text in ("dp2,plainopt", "dp2,overlap", "tp2,recompute")),
        ("1", {"share_prefix": False, "max_tokens": 100}),
    ],
)
def test_parity_with_ties(text, switches, folder, with_threshold):
    """The threshold is on the last stage, the same on every tensor rank, reduced over replicas."""
    from rmega.training.parity import compare

    loss, alone = with_threshold
    # far from its optimum, where the sum over pairs cancels to rounding noise
    assert abs(alone.grads["tie_threshold"]) > 1 and abs(alone.params["tie_threshold"]) > 1e-4
    result = result_of(text, folder, loss=loss, **switches)
    differences = compare(result, alone)
    assert max(differences.values()) <= TOLERANCE, (text, differences)


def test_the_single_rank_learns(single):
    assert len(set(single.losses)) == 3 and all(norm > 1e-3 for norm in single.grad_norms)


@pytest.mark.parametrize("text", LAYOUTS)
def test_parity(text, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder), single)
    assert max(differences.values()) <= TOLERANCE, differences


def run_padded(rank: int, world_size: int, text: str, folder: str, switches: dict) -> object:
    """``run`` as GPUs do it: packs of one length, and no stage tells another a shape."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from rmega.training import components

    def never(*_):
        raise AssertionError("a shape was exchanged")

    before = components.pads_packs, P2PCommunicator._communicate_shapes
    components.pads_packs, P2PCommunicator._communicate_shapes = (lambda *a, **k: True), never
    try:
        return run(rank, world_size, text, folder, switches)
    finally:
        components.pads_packs, P2PCommunicator._communicate_shapes = before


@pytest.mark.parametrize("text", ["pp2", "tp2,sp,pp2", "pp2,vpp2"])
def test_parity_with_packs_of_one_length(text, folder, single):
    from rmega.training.parity import Layout, compare

    result = run_distributed(run_padded, Layout.parse(text).world_size, text, str(folder), {})[0]
    differences = compare(result, single)
    assert max(differences.values()) <= TOLERANCE, differences


# How ranks take turns does not depend on the family: "pp2,first1,last3" and what replicas overlap.
OF_FAMILIES = ("tp2", "tp2,sp", "pp2,vpp2", "dp2", "tp2,pp2", "tp2,recompute", "tp2,sp,selective")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "text", [pytest.param(x, marks=() if x in OF_FAMILIES else pytest.mark.slow) for x in LAYOUTS]
)
def test_parity_of_families(text, family, families):
    """Biases of the projection are cut with its rows, and the norms of queries and keys sum their
    gradients over tensor ranks."""
    from rmega.training.parity import compare

    folder, alone = families(family)
    differences = compare(result_of(text, folder), alone)
    assert max(differences.values()) <= TOLERANCE, differences
    whole = alone.grads.keys()
    assert any("linear_qkv.bias" in name for name in whole) == (family == "qwen2")
    assert any("q_layernorm" in name for name in whole) == (family == "qwen3")


LONG = [
    "dp3",
    "dp4,overlap",
    "tp4",
    "tp4,sp,recompute",
    "tp2,dp2",
    "tp2,sp,dp2,overlap",
    "tp2,sp,dp2,plainopt",
    "pp4",
    "pp2,dp2",
    "pp2,last3",
    "pp4,first1,last3",
    "pp2,vpp4",
    "pp4,vpp2",
    "pp2,vpp2,dp2",
    "tp2,pp2,vpp2",
    "tp2,sp,pp2,recompute",
    "tp2,sp,pp2,selective",
    "tp2,sp,pp2,dp2",
    "tp2,pp2,vpp2,dp2,overlap",
    "tp2,pp2,vpp2,dp2,gather",
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight layers and four key/value groups, a reward model of each backbone, and its single
    rank's result."""
    from rmega.models import BACKBONES
    from rmega.models.weights import hf_shapes

    made = {}

    def of(family: str):
        if family not in made:
            geometry = tiny(
                family,
                num_layers=8,
                hidden_size=64,
                ffn_hidden_size=96,
                num_attention_heads=8,
                num_query_groups=4,
                head_dim=8,
                vocab_size=VOCAB,
                max_position_embeddings=512,
            )
            rng = np.random.default_rng(4)
            tensors = {}
            for name, shape in hf_shapes(BACKBONES[family].weight_table(geometry)).items():
                values = rng.standard_normal(shape, dtype=np.float32)
                scale = 0.5 if "embed" in name else 0.8 / shape[-1] ** 0.5
                tensors[name] = torch.from_numpy(
                    1 + 0.2 * values if is_norm(name) else np.float32(scale) * values
                )
            config = hf_config(geometry, BACKBONES[family].architecture, num_labels=1)
            folder = write_folder(tmp_path_factory.mktemp(family), config, tensors)
            made[family] = (folder, result_of("1", folder))
        return made[family]

    return of


EVERY = [
    *("tp2", "tp2,sp", "pp2", "pp2,vpp2", "dp2", "tp2,pp2"),
    *("tp2,recompute", "tp2,sp,selective", "tp8,sp,pad"),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text,prune", [*((text, True) for text in EVERY), ("tp2,sp", False), ("pp2", False)]
)
def test_parity_of_every_family(text, family, prune, deep):
    """Four key/value groups on eight ranks are padded to eight."""
    from rmega.training.parity import compare

    folder, alone = deep(family)
    differences = compare(result_of(text, folder, prune_last_layer=prune), alone)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", LONG)
def test_parity_of_the_longer_matrix(text, family, deep):
    """Up to eight ranks, whatever the machine has; every family."""
    from rmega.training.parity import compare

    folder, alone = deep(family)
    differences = compare(result_of(text, folder), alone)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize(
    "switches",
    [
        {"share_prefix": False},
        {"prune_last_layer": False},
        {"share_prefix": False, "prune_last_layer": False},
    ],
)
@pytest.mark.parametrize("text", ["1", "tp2,sp", "pp2"])
def test_savings_are_exact(text, switches, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder, **switches), single)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_odd_vocabulary_is_exact(tmp_path, family):
    """As published reward models have that were given a pad token: the embedding is padded."""
    from rmega.training.parity import compare

    folder = tiny_llama(tmp_path, family=family, vocab=VOCAB + 1, layers=2)
    differences = compare(result_of("tp2,sp", folder), result_of("1", folder))
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_padded_heads_are_exact(tmp_path, family):
    """Three key/value groups on two ranks: the fourth is zero and stays zero, biases, too."""
    from rmega.training.parity import compare

    folder = tiny_llama(tmp_path, family=family, heads=9, groups=3, hidden=72, head_dim=8)
    differences = compare(result_of("tp2,pad", folder), result_of("1", folder))
    assert max(differences.values()) <= TOLERANCE, differences


def test_heads_that_do_not_divide_are_refused(tmp_path):
    folder = tiny_llama(tmp_path, heads=9, groups=3, hidden=72, head_dim=8)
    with pytest.raises(
        RuntimeError, match="--tp 2 does not divide the model's 3 key/value heads.*--pad-attention"
    ):
        result_of("tp2", folder)


def test_the_tool_prints_a_table_and_fails_beyond_the_tolerance(
    small_llama, tmp_path, monkeypatch, capsys
):
    """tools/check_layouts.py on real comparisons; a tolerance that nothing meets gives exit code
    1."""
    from rmega.commands import check_layouts
    from tests.runs import make_data

    run, ran = check_layouts.run, {}

    def run_once(text, args, **options):
        key = text, *options.values()
        ran[key] = ran.get(key) or run(text, args, **options)
        return ran[key]

    monkeypatch.setattr(check_layouts, "run", run_once)
    data = make_data(small_llama, tmp_path)
    argv = [
        "check_layouts.py",
        "--hf-model",
        str(small_llama),
        "--data-path",
        data,
        "--layouts",
        "tp2",
        "--steps",
        "2",
    ]
    for more, code, says in (
        ([], 0, "  ok"),
        (["--tolerance", "1e-12"], 1, "  DIFFERS (gradient of "),
    ):
        monkeypatch.setattr("sys.argv", argv + more)
        assert check_layouts.main() == code
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tp2 ")]
        assert says in row


def test_the_tool_measures_rounding_by_other_packs(small_llama, tmp_path, monkeypatch, capsys):
    """Two comparisons fit into a pack of any size that is cut, yet one rank is held against other
    sums."""
    from rmega.commands import check_layouts
    from tests.runs import make_data

    data = make_data(small_llama, tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "check_layouts.py",
            "--hf-model",
            str(small_llama),
            "--data-path",
            data,
            "--layouts",
            "1",
            "--steps",
            "1",
            "--global-batch-size",
            "2",
        ],
    )
    assert check_layouts.main() == 0
    (row,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(check_layouts.OTHER_PACKS)
    ]
    differences = [float(cell) for cell in row.removeprefix(check_layouts.OTHER_PACKS).split()]
    assert len(differences) == 5 and 0 < differences[2] < 1e-4  # gradients


@pytest.mark.parametrize(
    "text,says",
    [("tp2,cp2", "context parallelism is not supported"), ("tp2,x3", "'x3' is not one of")],
)
def test_layouts_that_are_not_understood(text, says):
    from rmega.training.parity import Layout

    with pytest.raises(ValueError, match=says):
        Layout.parse(text)


def half(rank: int, world_size: int, text: str, folder: str, dtype: str, scale: float) -> object:
    """Three steps in half precision: (losses, which updated, loss scales)."""
    from rmega.precision import DTYPES
    from rmega.training import train
    from rmega.training.components import make_batcher
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse(text), hf_model=folder, steps=6, global_batch_size=6, max_tokens=260, lr=1e-3
    )
    config.train.precision = dtype
    if dtype == "fp16":
        config.optimizer.initial_loss_scale = scale
    wrapped, optimizer, scheduler, geometry, _ = build(config, DTYPES[dtype])
    batcher = make_batcher(config, InMemory(random_comparisons(24, seed=1)), geometry)
    out = []
    for step in range(6):
        documents = batcher.documents(6 * step)
        report = train.train_step(
            wrapped, optimizer, batcher.packs(documents), config.loss, len(documents)
        )
        scheduler.step(1)
        out.append(
            (
                report.loss,
                report.updated,
                float(optimizer.get_loss_scale()) if dtype == "fp16" else 1.0,
            )
        )
    return out


@pytest.mark.parametrize("dtype,tolerance", [("bf16", 5e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("text", ["1", "tp2,sp", "dp2"])
def test_half_precision_follows_fp32(text, dtype, tolerance, folder):
    from rmega.training.parity import Layout

    exact = run_distributed(half, 1, "1", str(folder), "fp32", 1.0)[0]
    for seen in run_distributed(
        half, Layout.parse(text).world_size, text, str(folder), dtype, 256.0
    ):
        assert all(updated for _, updated, _ in seen)
        assert [loss for loss, *_ in seen] == pytest.approx(
            [loss for loss, *_ in exact], rel=tolerance
        )


@pytest.mark.parametrize("text", ["1", "pp2"])
def test_fp16_overflow_skips_and_lowers_the_scale(text, folder):
    """A loss scale far too high: updates are skipped on every rank alike until it is low enough,
    then go on."""
    from rmega.training.parity import Layout

    results = run_distributed(
        half, Layout.parse(text).world_size, text, str(folder), "fp16", 2.0**36
    )
    for seen in results:
        assert not seen[0][1] and seen[-1][2] < 2.0**36
        assert [(u, s) for _, u, s in seen] == [(u, s) for _, u, s in results[0]]
