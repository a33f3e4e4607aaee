"""Comparisons on disk: megatron-core reads what we write and we read what it writes; damage is
found."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmega.data import indexed
from rmega.data.batching import Mixture
from rmega.data.indexed import (
    DATA_SUFFIXES,
    StoredComparison,
    exists,
    open_preferences,
    split_label,
)
from rmega.data.integrity import damage, verify
from rmega.data.pairs import count_pairs
from rmega.data.writer import PreferenceWriter, write_index

REWARD = 99
MANIFEST = {
    "tokenizer_fingerprint": "f",
    "template_hash": "t",
    "reward_token_id": REWARD,
    "pad_token_id": 0,
    "vocab_size": 100,
    "max_length": 64,
    "overlong": "right",
    "scripts": {"Latin": 3},
    "position_heuristic": {"first_wins": 1, "pairs": 2},
}


def some(num: int, seed: int = 0) -> list[StoredComparison]:
    """Random comparisons with 2 to 4 responses; every third has an empty prefix."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(num):
        k = int(rng.integers(2, 5))
        scores = -np.sort(-rng.integers(0, 4, k)).astype(np.float32)
        scores[0] += 1
        suffixes = [
            np.append(rng.integers(0, 90, rng.integers(0, 9)), REWARD).astype(np.int32)
            for _ in range(k)
        ]
        items.append(
            StoredComparison(
                rng.integers(0, 90, 0 if i % 3 == 0 else rng.integers(1, 20)).astype(np.int32),
                suffixes,
                scores,
                bool(i % 2),
                "ab"[i % 2],
            )
        )
    return items


def write(prefix: Path, items: list[StoredComparison], **manifest: Any) -> str:
    with PreferenceWriter(prefix) as writer:
        for item in items:
            writer.add(item, "ab".index(item.source))
        writer.close({**MANIFEST, "sources": ["a", "b"], **manifest})
    return str(prefix)


def same(a: StoredComparison, b: StoredComparison) -> bool:
    return (
        np.array_equal(a.prefix, b.prefix)
        and len(a.suffixes) == len(b.suffixes)
        and all(map(np.array_equal, a.suffixes, b.suffixes))
        and np.array_equal(a.scores, b.scores)
        and (a.graded, a.source) == (b.graded, b.source)
    )


def test_round_trip(tmp_path: Path) -> None:
    items = some(50)
    dataset = open_preferences(write(tmp_path / "deep" / "er" / "d", items))
    assert len(dataset) == 50 and all(same(dataset.get(i), item) for i, item in enumerate(items))
    assert (np.diff(dataset.document_indices) - 1).tolist() == [len(i.suffixes) for i in items]
    assert dataset.sequence_lengths[dataset.document_indices[:-1]].tolist() == [
        len(i.prefix) for i in items
    ]
    assert dataset.document_indices[-1] == len(dataset.sequence_lengths) == len(dataset.scores)
    again = pickle.loads(pickle.dumps(dataset))
    assert same(again[49], items[49]) and again.sources == ["a", "b"]
    assert count_pairs(dataset.document_indices, dataset.scores).tolist() == [
        sum(a > b for n, a in enumerate(i.scores) for b in i.scores[n:]) for i in items
    ]
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            dataset.get(wrong)
    assert verify(dataset) == []


def test_megatron_reads_it_and_writes_it(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    items = some(20)
    ours = open_preferences(write(tmp_path / "ours", items))
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert np.array_equal(theirs.document_indices, ours.document_indices)
    assert np.array_equal(theirs.sequence_lengths, ours.sequence_lengths)
    sequences = [s for item in items for s in (item.prefix, *item.suffixes)]
    assert all(np.array_equal(theirs[i], s) for i, s in enumerate(sequences))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for item in items:
        for sequence in (item.prefix, *item.suffixes):
            builder.add_item(torch.from_numpy(np.array(sequence)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()


def test_nothing_half_written(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", some(5))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), PreferenceWriter(prefix) as writer:
        writer.add(some(1)[0], 0)
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with PreferenceWriter(tmp_path / "new") as writer:
        writer.add(some(1)[0], 0)
        assert not exists(tmp_path / "new")
        writer.seal({"sources": ["a"]})
        assert not exists(tmp_path / "new")
        writer.publish()
    assert exists(tmp_path / "new") and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_damage_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "d", some(30))
    path = Path(prefix + suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=f"d{suffix}"):
        open_preferences(prefix)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"d{suffix}"):
        open_preferences(prefix)
    path.unlink()
    with pytest.raises(ValueError, match=f"d{suffix}: missing"):
        open_preferences(prefix)
    at = len(whole) - 20
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert any(f"d{suffix}: its checksum" in line for line in verify(open_preferences(prefix)))


def test_manifests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preference dataset here"):
        open_preferences(tmp_path / "none")
    prefix = write(tmp_path / "d", some(3))
    path = Path(f"{prefix}.json")
    good = json.loads(path.read_text())
    for text in ("{", "[]", "{}", "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a manifest"):
            open_preferences(prefix)
    path.write_text(json.dumps({**good, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        open_preferences(prefix)


def test_verify_sees_what_is_wrong_inside(tmp_path: Path) -> None:
    items = some(10)

    def odd(prefix: list[int], first: list[int], scores: tuple[int, int] = (1, 0)) -> Any:
        suffixes = [np.array(first), np.array([3, REWARD])]
        return StoredComparison(np.array(prefix), suffixes, np.array(scores), False, "a")

    for item, message in (
        (odd([1, 100], [REWARD]), "is 100, outside the vocabulary"),
        (odd([REWARD], [REWARD]), "the reward token occurs"),
        (odd([1], [2]), "1 responses do not end with the reward token"),
        (odd([1], [REWARD], (0, 1)), "scores rise"),
        (odd([*range(70)], [REWARD]), "a conversation of 72 tokens, --max-length was 64"),
    ):
        wrong = verify(open_preferences(write(tmp_path / "d", [*items, item])))
        assert len(wrong) == 1 and message in wrong[0], wrong
    wrong = verify(open_preferences(write(tmp_path / "d", items, num_comparisons=7)))
    assert wrong == [f"{tmp_path}/d.json: num_comparisons is 7, the data have 10"]


def test_opening_is_independent_of_size(tmp_path: Path) -> None:
    """A million comparisons (of few tokens) open like a hundred: nothing is read but headers."""

    def synthetic(prefix: Path, num: int) -> str:
        lengths = np.tile(np.array([2, 1, 1], np.int32), num)
        writer = PreferenceWriter(prefix)
        writer.add_tokens(np.full(4 * num, REWARD, np.int32))
        writer.add_documents(
            lengths, np.tile(np.array([0, 1, 0], np.float32), num), np.full(num, 3), np.zeros(num)
        )
        writer.close({**MANIFEST, "sources": ["a"]})
        return str(prefix)

    def seconds(prefix: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            dataset = open_preferences(prefix)
            dataset.get(len(dataset) - 1)
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = synthetic(tmp_path / "s", 100), synthetic(tmp_path / "l", 1_000_000)
    assert len(open_preferences(large)) == 1_000_000
    assert seconds(large) < 0.02 + seconds(small)


def test_index_layout(tmp_path: Path) -> None:
    write_index(str(tmp_path / "x.idx"), np.array([2, 1, 1]), np.array([3]))
    raw = (tmp_path / "x.idx").read_bytes()
    assert raw.startswith(b"MMIDIDX\x00\x00") and len(raw) == indexed.HEADER.size + 3 * 12 + 2 * 8


def test_scores_keep_their_order_in_fp64(tmp_path: Path) -> None:
    """Scores that are one number in fp32, and such as fp32 has no number for."""
    suffixes = [np.array([i, REWARD], np.int32) for i in range(3)]
    scores = np.array([1e39, 100000001.0, 100000000.0])
    item = StoredComparison(np.array([1], np.int32), suffixes, scores, False, "a")
    dataset = open_preferences(write(tmp_path / "d", [item]))
    assert dataset.manifest["num_pairs"] == 3 and verify(dataset) == []
    assert dataset.get(0).scores.tolist() == scores.tolist()


def test_sets_of_format_version_1_are_read(tmp_path: Path) -> None:
    items = some(5)
    prefix = write(tmp_path / "d", items)
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    with pytest.raises(ValueError, match="scores.npy: float64 .*expected float32"):
        open_preferences(prefix)
    np.save(f"{prefix}.scores.npy", np.load(f"{prefix}.scores.npy").astype(np.float32))
    dataset = open_preferences(prefix)
    assert all(same(dataset.get(i), item) for i, item in enumerate(items))


def test_damage_before_a_training(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", some(5))
    assert damage(open_preferences(prefix)) is None
    whole = Path(f"{prefix}.bin").read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 4):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        Path(f"{prefix}.bin").write_bytes(flipped)
        assert "d.bin: its content has changed" in damage(open_preferences(prefix))
    write(tmp_path / "d", some(5), vocab_size=90)  # the reward token is 99
    assert "is 99, outside the vocabulary of 90" in damage(open_preferences(prefix))


@pytest.mark.parametrize("suffix", [*DATA_SUFFIXES, ".json"])
def test_pointers_in_place_of_a_dataset(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "d", some(5))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1\n"
    Path(prefix + suffix).write_text(pointer)
    with pytest.raises(ValueError, match=f"d{suffix}: a Git LFS pointer"):
        open_preferences(prefix)


def test_prefixes_with_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=1e-5", "x", "2=x", "a=b"):
        write(Path(folder) / "set", some(3))
    for text, wanted in (
        ("lr=1e-5/set", (None, "lr=1e-5/set")),
        ("0.5=lr=1e-5/set", ("0.5", "lr=1e-5/set")),
        ("name=lr=1e-5/set", ("name", "lr=1e-5/set")),
        ("2=x/set", (None, "2=x/set")),
        ("3=x/set", ("3", "x/set")),
        ("lr=1=x/set", ("lr=1", "x/set")),
        (f"{tmp_path}/a=b/set", (None, f"{tmp_path}/a=b/set")),
        (f"n={tmp_path}/a=b/set", ("n", f"{tmp_path}/a=b/set")),
        ("0.5=nothing", ("0.5", "nothing")),
        ("runs/a=1/nothing", (None, "runs/a=1/nothing")),
        ("x/set", (None, "x/set")),
    ):
        assert split_label(text) == wanted
    mixed = Mixture.open(["lr=1e-5/set", "2=x/set", "0.5=a=b/set"], seed=0)
    assert mixed.weights == [1.0, 1.0, 0.5]
    assert [d.prefix for d in mixed.datasets] == ["lr=1e-5/set", "2=x/set", "a=b/set"]
    for text, message in (
        ("runs/lr=1/none", "runs/lr=1/none: no preference dataset here"),
        ("nan=x/set", "the weight must be greater than 0"),
        ("inf=x/set", "the weight must be greater than 0"),
        ("y=x/set", "y is not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture.open([text], seed=0)


def test_a_weight_is_no_number_of_tokens(tmp_path: Path) -> None:
    """The order of 1e9 visits of each comparison would fill the memory."""
    writer = PreferenceWriter(tmp_path / "set")
    ids = np.array([1], np.int32)
    pair = StoredComparison(ids, [ids, ids], np.array([1.0, 0.0]), False, "a")
    for _ in range(3):
        writer.add(pair, 0)
    writer.seal({"sources": ["a"]})
    writer.publish()
    with pytest.raises(ValueError, match="3e[+]09 comparisons per epoch"):
        Mixture.open([f"1e9={tmp_path}/set"], seed=0)
