"""Order, packing and balance: every comparison exactly once, however a batch is cut."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rmega.data.balance import CostModel, balanced_bins
from rmega.data.batching import Batcher, Mixture, epoch_order
from rmega.data.packing import pack
from rmega.data.pairs import response_pairs
from rmega.models.geometry import Geometry
from tests.tiny import InMemory, random_comparisons

INTERNLM2_1_8B = Geometry(
    family="internlm2",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    vocab_size=92544,
    max_position_embeddings=32768,
    norm_eps=1e-5,
    rope_theta=1e6,
)


def stored(count: int, **kwargs) -> InMemory:
    return InMemory(random_comparisons(count, **kwargs))


# Order


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): epoch_order(100, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(orders.values(), 2))
    assert np.array_equal(epoch_order(100, seed=1, epoch=1), orders[1, 1])
    # Held fast: a run that is resumed with another release must go on in the same order.
    assert epoch_order(10, seed=42, epoch=0).tolist() == [2, 4, 5, 0, 9, 8, 1, 7, 3, 6]


@pytest.mark.parametrize(
    ("size", "batch", "ranks"),
    [
        (24, 10, 1),
        (24, 10, 3),
        (7, 3, 4),
        (5, 8, 2),
        (64, 64, 8),
        (3, 10, 2),
        (1, 4, 4),
        (23, 5, 5),
    ],
)
@pytest.mark.parametrize("multiple", [1, 2])
def test_every_comparison_once_per_epoch(size: int, batch: int, ranks: int, multiple: int) -> None:
    """For any layout, the last partial batch of a run and batches that span epochs included."""
    dataset, epochs = stored(size, seed=size), 3
    batcher = Batcher(
        dataset,
        global_batch_size=batch,
        max_tokens=150,
        seed=3,
        num_ranks=ranks,
        microbatch_multiple=multiple,
        max_consumed=epochs * size,
    )
    seen: list[int] = []
    while len(seen) < epochs * size:
        documents = batcher.documents(len(seen))
        plan = batcher.plan(documents)
        dealt = sorted(d for rank in plan for b in rank for d in b)
        assert dealt == sorted(documents.tolist())
        assert (
            len(plan) == ranks
            and len({len(rank) for rank in plan}) == 1
            and len(plan[0]) % multiple == 0
        )
        seen += documents.tolist()
    assert len(seen) == epochs * size
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    again = Batcher(
        dataset, global_batch_size=batch, max_tokens=10**6, seed=3
    )  # another layout: the same steps
    assert again.documents(batch).tolist() == seen[batch : 2 * batch] or 2 * batch > epochs * size


def test_a_position_is_enough_to_go_on() -> None:
    """No state but the count of consumed comparisons, in any order of asking."""
    batcher = Batcher(stored(10), global_batch_size=4, max_tokens=200, seed=0)
    forwards = [batcher.documents(c).tolist() for c in range(0, 40, 4)]
    backwards = [batcher.documents(c).tolist() for c in reversed(range(0, 40, 4))]
    assert forwards == backwards[::-1]


def test_evaluation_sees_everything_once_in_stored_order() -> None:
    dataset = stored(23)
    found: list[list[int]] = []
    for rank in range(4):
        batcher = Batcher(
            dataset, global_batch_size=5, max_tokens=120, seed=0, num_ranks=4, rank=rank
        )
        packs = [p for step in batcher.sweep() for p in step]
        found.append([n for p in packs for n in p.responses.tolist() if n >= 0])
    assert sorted(itertools.chain(*found)) == list(range(batcher.num_responses))


# Mixtures


class Named(InMemory):
    manifest: dict = {}
    prefix = "x"


def mixture(*parts: tuple[int, float], seed: int = 5) -> Mixture:
    return Mixture(
        [Named(random_comparisons(n, seed=i)) for i, (n, _) in enumerate(parts)],
        [w for _, w in parts],
        seed=seed,
    )


def test_one_set_of_weight_one_is_the_plain_order() -> None:
    assert np.array_equal(mixture((20, 1.0)).order(2), epoch_order(20, seed=5, epoch=2))


def test_weights_are_visits_per_epoch() -> None:
    mixed = mixture((10, 1.0), (20, 0.5), (5, 2.0), (9, 1.5))
    assert len(mixed) == 10 + 10 + 10 + 14
    counts = np.zeros(44, dtype=int)
    for epoch in range(4):
        order = mixed.order(epoch)
        assert len(order) == len(mixed) and np.array_equal(order, mixed.order(epoch))
        now = np.bincount(order, minlength=44)
        counts += now
        assert (now[:10] == 1).all() and (now[10:30] <= 1).all() and now[10:30].sum() == 10
        assert (now[30:35] == 2).all() and now[35:].sum() == 14 and set(now[35:]) <= {1, 2}
        if epoch % 2:  # the other half in the next epoch
            assert (counts[10:30] == (epoch + 1) // 2).all()
    assert counts[35:].max() - counts[35:].min() <= 1  # 14 of 13.5 visits
    assert not np.array_equal(mixed.order(0), mixed.order(1))


def test_a_mixture_answers_like_a_dataset() -> None:
    mixed = mixture((10, 1.0), (7, 1.0))
    batcher = Batcher(mixed, global_batch_size=6, max_tokens=300, seed=5)
    for number in range(17):
        own = mixed.get(number)
        prefix, suffixes = batcher.lengths(number)
        assert prefix == len(own.prefix) and suffixes == [len(s) for s in own.suffixes]
    assert sorted(mixed.order(0).tolist()) == list(range(17))


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    for text, said in (
        ("x=d", "x is not a number"),
        ("0=d", "greater than 0"),
        ("-1=d", "greater than 0"),
        ("nan=d", "greater than 0"),
    ):
        with pytest.raises(ValueError, match=f"--data-path {text}: .*{said}"):
            Mixture.open((text,), seed=0)
    with pytest.raises(ValueError, match="nowhere"):
        Mixture.open((str(tmp_path / "nowhere"),), seed=0)


# Bins


@pytest.mark.parametrize("seed", range(6))
def test_bins_hold_to_every_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        count, ranks, multiple = (
            int(rng.integers(low, high)) for low, high in ((0, 40), (1, 9), (1, 4))
        )
        tokens = rng.integers(1, 90, count).tolist()
        costs = [t * (1 + rng.random()) for t in tokens]
        bins = balanced_bins(tokens, costs, num_ranks=ranks, capacity=64, multiple=multiple)
        assert sorted(i for rank in bins for b in rank for i in b) == list(range(count))
        assert len(bins) == ranks and len({len(rank) for rank in bins}) == 1
        assert len(bins[0]) >= multiple and len(bins[0]) % multiple == 0
        for b in itertools.chain(*bins):
            assert (
                sum(tokens[i] for i in b) <= 64 or len(b) == 1
            )  # longer than a bin: a bin to itself
        assert bins == balanced_bins(tokens, costs, num_ranks=ranks, capacity=64, multiple=multiple)


def test_no_more_bins_than_needed() -> None:
    assert balanced_bins([8] * 8, [1.0] * 8, num_ranks=1, capacity=64) == [[list(range(8))]]
    assert [len(rank) for rank in balanced_bins([64] * 8, [1.0] * 8, num_ranks=2, capacity=64)] == [
        4,
        4,
    ]
    assert balanced_bins([], [], num_ranks=2, capacity=5, multiple=2) == [[[], []], [[], []]]


def test_cost_is_work_not_tokens() -> None:
    """One token more attends to all before it: the formula against counting each query's keys one
    by one."""
    cost = CostModel(linear=3.0, quadratic=0.5)
    prefix, suffixes = 7, [2, 5, 1]
    keys = sum(i + 1 for i in range(prefix)) + sum(
        prefix + j + 1 for s in suffixes for j in range(s)
    )
    assert cost(prefix, suffixes) == 3.0 * 15 + 0.5 * keys
    model = CostModel.of(INTERNLM2_1_8B)
    assert model.linear == 2048 * (16 + 16) * 128 + 2048 * 16 * 128 + 3 * 2048 * 8192
    assert model.quadratic == 2 * 16 * 128


# Packs


def test_a_pack_by_hand() -> None:
    one, two = random_comparisons(6, seed=3)[1:3]
    batch = pack([one, two], documents=[8, 9], responses=[16, 18], multiple=4, pad_id=2)
    p, (a, b) = len(one.prefix), (len(s) for s in one.suffixes)
    row = batch.tokens[0].numpy()
    assert (
        row[:p].tolist() == one.prefix.tolist()
        and row[p : p + a].tolist() == one.suffixes[0].tolist()
    )
    positions = batch.position_ids[0].tolist()
    assert positions[: p + a] == list(range(p + a)) and positions[p + a : p + a + b] == list(
        range(p, p + b)
    )
    assert batch.pooled.tolist()[:2] == [p + a - 1, p + a + b - 1] and set(row[batch.pooled]) == {3}
    assert batch.chosen.tolist() == [0, 2] and batch.rejected.tolist() == [1, 3]
    for gap, comparison in zip(batch.rating_gap.tolist(), (one, two), strict=True):
        assert gap == 1.0 if comparison.graded else math.isnan(gap)
    assert batch.length_gap.tolist() == [
        len(c.suffixes[0]) - len(c.suffixes[1]) for c in (one, two)
    ]
    assert batch.documents.tolist() == [8, 9] and batch.responses.tolist() == [16, 17, 18, 19]
    assert batch.num_tokens % 4 == 0 and 0 <= batch.padding < 4
    if batch.padding:
        assert (row[-batch.padding :] == 2).all()
    length = sum(len(c.prefix) * len(c.suffixes) + sum(map(len, c.suffixes)) for c in (one, two))
    assert batch.real_tokens == length
    alone = pack([one, two], share_prefix=False)
    assert alone.num_tokens == length and alone.padding == 0


@pytest.mark.parametrize("share", [True, False])
def test_segments_cover_every_token_once(share: bool) -> None:
    batch = pack(random_comparisons(20, seed=2), share_prefix=share, multiple=8)
    s = batch.segments
    covered = np.zeros(batch.num_tokens, dtype=int)
    for start, length in zip(s.q_start.tolist(), s.q_len.tolist(), strict=True):
        covered[start : start + length] += 1
    assert (
        (covered == 1).all() and torch.equal(s.q_start, s.k_start) and torch.equal(s.q_len, s.k_len)
    )
    assert (s.q_len > 0).all()  # empty ones are left out
    own = batch.pooled_segments
    assert own.q_len.tolist() == [1] * len(batch.pooled) and own.q_start.tolist() == list(
        range(len(batch.pooled))
    )
    assert torch.equal(own.k_start.long() + own.k_len - 1, batch.pooled)
    # A query's position is the number of keys before it.
    for segments, rows in ((s, s.q_start.long() + s.q_len - 1), (own, batch.pooled)):
        assert torch.equal(
            batch.position_ids[0][rows], (segments.prefix_len + segments.k_len - 1).long()
        )


def test_pairs_of_many_responses() -> None:
    assert response_pairs([2, 1]) == [(0, 1)]
    assert response_pairs([3, 2, 2, 1]) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert response_pairs([1, 1]) == []


def test_a_rank_without_work_still_has_a_pack() -> None:
    batch = pack([], multiple=4, pad_id=1)
    assert (
        batch.num_tokens == batch.padding == 4
        and len(batch.pooled) == 1
        and batch.responses.tolist() == [-1]
    )
    assert len(batch.chosen) == 0 and batch.real_tokens == 0
    batcher = Batcher(stored(2), global_batch_size=2, max_tokens=500, seed=0, num_ranks=4, rank=3)
    assert [len(p.chosen) for p in batcher.packs(batcher.documents(0))] == [0]


@pytest.fixture(scope="module")
def prefixes(preference_files: Path, internlm2_tokenizer: Path, tmp_path_factory) -> dict[str, str]:
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    folder = tmp_path_factory.mktemp("data")
    files = {"turns": "messages.jsonl.gz", "long": "argilla.jsonl.gz"}
    for name, file in files.items():
        preprocess(
            PreprocessArgs(
                input=[str(preference_files / file)],
                tokenizer=str(internlm2_tokenizer),
                output_prefix=str(folder / name),
                workers=1,
            )
        )
    return {name: str(folder / name) for name in files}


@pytest.mark.parametrize("name", ["turns", "long"])
def test_balance_and_fill_on_lengths_of_texts(name: str, prefixes: dict[str, str]) -> None:
    """64 comparisons over 8 ranks at 1.8B: largest over mean cost at most 1.015, 99 % of computed
    tokens real."""
    dataset = Mixture.open((prefixes[name],), seed=11)
    batcher = Batcher(
        dataset,
        global_batch_size=64,
        max_tokens=8192,
        seed=11,
        cost=CostModel.of(INTERNLM2_1_8B),
        num_ranks=8,
        token_multiple=8,
    )
    ratios, seconds, computed, padding = [], [], 0, 0
    for step in range(30):
        documents = batcher.documents(64 * step)
        begun = time.process_time()
        plan = batcher.plan(documents)
        seconds.append(time.process_time() - begun)
        loads = [sum(batcher.cost(*batcher.lengths(d)) for b in rank for d in b) for rank in plan]
        ratios.append(max(loads) / np.mean(loads))
        if step < 3:
            packs = [batcher.pack(b) for rank in plan for b in rank]
            computed += sum(p.num_tokens for p in packs)
            padding += sum(p.padding for p in packs)
    print(
        f"{name}: largest over mean cost {np.mean(ratios):.4f} mean, {max(ratios):.4f} worst; fill "
        f"{1 - padding / computed:.4f}; planning {1000 * np.median(seconds):.2f} ms"
    )
    assert max(ratios) <= 1.015 and np.mean(ratios) <= 1.005
    assert 1 - padding / computed >= 0.99
    assert (
        np.median(seconds) < 0.02
    )  # measured 1 to 2 ms; room for a machine that does other things


def test_a_batcher_of_a_configuration(tmp_path: Path) -> None:
    """The plan, the run and the comparison of layouts take every setting of the configuration."""
    from rmega.config import DataArgs, ModelArgs, ParallelArgs, TrainArgs, TrainingConfig

    config = TrainingConfig(
        model=ModelArgs(hf_model="x"),
        data=DataArgs(data_path=("x",), max_tokens_per_microbatch=300),
        train=TrainArgs(train_steps=1, global_batch_size=4),
        parallel=ParallelArgs(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
    )
    batcher = Batcher.of(config, stored(10), INTERNLM2_1_8B, num_ranks=3, rank=1, max_consumed=7)
    assert (batcher.global_batch_size, batcher.max_tokens) == (4, 300)
    assert (batcher.token_multiple, batcher.microbatch_multiple) == (2, 2)
    assert (batcher.num_ranks, batcher.rank, batcher.max_consumed) == (3, 1, 7)
    assert batcher.cost == CostModel.of(INTERNLM2_1_8B)
    for share in (True, False):
        batcher.share_prefix = share
        pack = batcher.pack([3])
        assert pack.num_tokens - pack.padding == batcher.size(3)[0]


@pytest.mark.parametrize("multiple", [1, 8])
def test_packs_of_one_length(multiple: int) -> None:
    """Packs of a step are padded to the longest; what is in them stays, and padding is counted."""
    options = dict(global_batch_size=9, max_tokens=150, seed=0, token_multiple=multiple)
    dataset = stored(24)
    plain, same = Batcher(dataset, **options), Batcher(dataset, **options, same_length=True)
    lengths = set()
    for consumed in (0, 9):
        documents = plain.documents(consumed)
        packs, others = plain.packs(documents), same.packs(documents)
        (length,) = {p.num_tokens for p in others}
        lengths.add(length)
        assert length == max(p.num_tokens for p in packs) and len(packs) > 1
        for one, other in zip(packs, others, strict=True):
            own = one.num_tokens - one.padding
            assert other.padding == length - own and one.real_tokens == other.real_tokens
            assert torch.equal(one.tokens[:, :own], other.tokens[:, :own])
            for name in ("pooled", "chosen", "rejected", "documents", "responses"):
                assert torch.equal(getattr(one, name), getattr(other, name))
            starts = other.segments.k_start[other.segments.k_start < own].tolist()
            assert starts == one.segments.k_start[one.segments.k_start < own].tolist()
            if other.padding:  # sees itself only
                assert other.segments.prefix_len[-1] == 0 and other.segments.k_start[-1] == own
    assert len(lengths) == 2  # each step has its own
    assert all(len({p.num_tokens for p in packs}) == 1 for packs in same.sweep())
    assert same.over(dataset).same_length
    assert pack([], length=24, multiple=multiple).num_tokens == 24
