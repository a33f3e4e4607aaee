"""Care of datasets on disk: verify one, merge several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmega.data.indexed import (
    DATA_SUFFIXES,
    PreferenceDataset,
    PreferenceWriter,
    count_pairs,
    exists,
    open_preferences,
)
from rmega.io import checksum
from rmega.preferences.dedup import RANK_FACTORS

_BLOCK = 1 << 22
_RANK_FACTORS = np.array(RANK_FACTORS, np.uint64)
_SAME = ("tokenizer_fingerprint", "template_hash", "reward_token_id", "pad_token_id", "vocab_size")


def verify(dataset: PreferenceDataset, tokenizer: Any = None) -> list[str]:
    """Everything that is wrong with a dataset, a line each; empty if it is sound.

    Checks checksums, the index, the bounds of ids, the place of the reward token, scores and
    sources, the counts of the manifest, and the fingerprint of ``tokenizer`` (transformers') if one
    is given.
    """
    manifest, prefix = dataset.manifest, dataset.prefix
    wrong: list[str] = []
    for suffix in DATA_SUFFIXES:
        if manifest.get("checksums", {}).get(suffix) != checksum(prefix + suffix):
            wrong.append(f"{prefix}{suffix}: its checksum is not the manifest's")
    lengths, indices = dataset.sequence_lengths, dataset.document_indices
    sizes = np.diff(indices)
    if len(sizes) and (int(sizes.min()) < 3 or int(indices[0]) != 0):
        wrong.append(f"{prefix}.idx: comparison {int(sizes.argmin())} has fewer than two responses")
        return wrong
    if len(lengths) and int(lengths.min()) < 0:
        wrong.append(f"{prefix}.idx: sequence {int(lengths.argmin())} has a negative length")
        return wrong
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(dataset.sequence_pointers, (ends - lengths) * 4):
        wrong.append(f"{prefix}.idx: its pointers do not follow its lengths")
        return wrong
    total = int(ends[-1]) if len(ends) else 0
    if len(dataset.tokens) != total:
        wrong.append(f"{prefix}.bin: {len(dataset.tokens)} tokens, the index has {total}")
    is_prefix = np.zeros(len(lengths), bool)
    is_prefix[indices[:-1]] = True
    if (lengths[~is_prefix] < 1).any():
        wrong.append(f"{prefix}.idx: a response without tokens")
        return wrong
    wrong += _verify_tokens(dataset, ends, ~is_prefix)
    wrong += _verify_scores(dataset, is_prefix)
    longest = int((np.repeat(lengths[is_prefix], sizes - 1) + lengths[~is_prefix]).max(initial=0))
    if manifest.get("max_length") is not None and longest > manifest["max_length"]:
        wrong.append(
            f"{prefix}: a conversation of {longest} tokens, --max-length was"
            f" {manifest['max_length']}"
        )
    counts = {
        "num_comparisons": len(dataset),
        "num_responses": len(lengths) - len(dataset),
        "num_tokens": total,
        "num_pairs": int(count_pairs(indices, dataset.scores).sum()),
    }
    wrong += [
        f"{prefix}.json: {name} is {manifest[name]}, the data have {value}"
        for name, value in counts.items()
        if name in manifest and manifest[name] != value
    ]
    if tokenizer is not None:
        from rmega.data.fingerprint import is_tokenizer_of, tokenizer_fingerprint

        if not is_tokenizer_of(tokenizer, manifest):
            found = tokenizer_fingerprint(tokenizer)
            wrong.append(
                f"--tokenizer: its fingerprint is {found}, the dataset was written with "
                f"{manifest.get('tokenizer_fingerprint')} ({manifest.get('tokenizer')})"
            )
    return wrong


def _verify_tokens(
    dataset: PreferenceDataset, ends: np.ndarray, is_suffix: np.ndarray
) -> list[str]:
    manifest, wrong, num_reward = dataset.manifest, [], 0
    for start in range(0, len(dataset.tokens), _BLOCK):
        block = dataset.tokens[start : start + _BLOCK]
        outside = (block < 0) | (block >= manifest["vocab_size"])
        if outside.any():
            at = start + int(outside.argmax())
            wrong.append(
                f"{dataset.prefix}.bin: token {at} is {int(dataset.tokens[at])}, outside the"
                f" vocabulary of {manifest['vocab_size']}"
            )
            break
        num_reward += int((block == manifest["reward_token_id"]).sum())
    last = (
        dataset.tokens[ends[is_suffix] - 1]
        if int(ends[-1]) <= len(dataset.tokens)
        else np.zeros(0, np.int32)
    )
    if (last != manifest["reward_token_id"]).any():
        wrong.append(
            f"{dataset.prefix}.bin: {int((last != manifest['reward_token_id']).sum())} responses do"
            " not end with the reward token"
        )
    elif not wrong and num_reward != len(last):
        wrong.append(
            f"{dataset.prefix}.bin: the reward token occurs {num_reward} times, in {len(last)}"
            " responses"
        )
    return wrong


def _verify_scores(dataset: PreferenceDataset, is_prefix: np.ndarray) -> list[str]:
    scores, wrong = np.asarray(dataset.scores), []
    if not np.isfinite(scores).all():
        wrong.append(f"{dataset.prefix}.scores.npy: a score that is no number")
    if not np.isin(scores[is_prefix], (0.0, 1.0)).all():
        wrong.append(f"{dataset.prefix}.scores.npy: a prefix whose entry is neither 0 nor 1")
    rises = (scores[1:] > scores[:-1]) & ~is_prefix[1:] & ~is_prefix[:-1]
    if rises.any():
        wrong.append(
            f"{dataset.prefix}.scores.npy: scores rise at sequence {int(rises.argmax()) + 1}"
        )
    if len(dataset.source_ids) and int(dataset.source_ids.max()) >= len(dataset.sources):
        wrong.append(
            f"{dataset.prefix}.sources.npy: source {int(dataset.source_ids.max())} of"
            f" {len(dataset.sources)}"
        )
    return wrong


def merge(
    prefixes: Sequence[str], output: str, *, force: bool = False, duplicates: str = "keep"
) -> dict[str, Any]:
    """Write the comparisons of all datasets, in order, to ``output``; its manifest. ValueError if
    they do not fit.

    Comparisons that also lie in another of the datasets (see `find_between`) are counted in the
    manifest, under input.between. duplicates "drop" leaves out the later of two equal ones and both
    of two that contradict each other, and lists them in OUTPUT.rejected.jsonl. What a dataset holds
    twice by itself (its weights) stays.
    """
    if duplicates not in ("keep", "drop"):
        raise ValueError(f"--duplicates {duplicates}: unknown; known are keep, drop")
    if exists(output) and not force:
        raise ValueError(f"--output {output}: a dataset is there already; --force replaces it")
    if output in prefixes:
        raise ValueError(f"--output {output}: is one of those to merge")
    sets = [open_preferences(p) for p in prefixes]
    first = sets[0].manifest
    for other in sets[1:]:
        for key in _SAME:
            if other.manifest.get(key) != first.get(key):
                raise ValueError(
                    f"merge: {other.prefix} and {sets[0].prefix} differ in {key} "
                    f"({other.manifest.get(key)}, {first.get(key)})"
                )
    sources = list(dict.fromkeys(name for s in sets for name in s.sources))
    if len(sources) > 1 << 16:
        raise ValueError(f"merge: {len(sources)} names of sources; at most 65536 can be told apart")
    repeated, contradictory = find_between(sets)
    between = {
        "duplicates": sum(int(m.sum()) for m in repeated),
        "contradictions": sum(int(m.sum()) for m in contradictory),
        "dropped": duplicates == "drop",
    }
    keep = [
        ~(a | b) if duplicates == "drop" else np.ones(len(a), bool)
        for a, b in zip(repeated, contradictory, strict=True)
    ]
    dropped = sum(int((~k).sum()) for k in keep)
    if not any(k.any() for k in keep):
        raise ValueError(
            "merge: every comparison contradicts one of another dataset: nothing is left"
        )
    with PreferenceWriter(output) as writer:
        for dataset, kept in zip(sets, keep, strict=True):
            _copy(dataset, kept, sources, writer)
        manifests = [s.manifest for s in sets]
        merged = {
            k: v
            for k, v in first.items()
            if k not in ("format_version", "checksums", "split", "holdout")
            and not k.startswith("num_")
        }
        merged["left_out_by_weight"] = sum(m.get("left_out_by_weight", 0) for m in manifests)
        limits = [m.get("max_length") for m in manifests]
        merged["max_length"] = None if None in limits else max(limits)
        merged["overlong"] = ", ".join(dict.fromkeys(str(m.get("overlong")) for m in manifests))
        for key in (
            "position_heuristic",
            "scripts",
        ):  # counts over rows: unknown for a part of them
            merged[key] = (
                {}
                if dropped
                else dict(sum((Counter(m.get(key, {})) for m in manifests), Counter()))
            )
        merged["sources"] = sources
        merged["input"] = {
            "merged": [{"prefix": s.prefix, **s.manifest.get("input", {})} for s in sets],
            "between": between,
        }
        _write_dropped(output, sets, keep, contradictory)
        return writer.close(merged)


def _copy(
    dataset: PreferenceDataset, keep: np.ndarray, sources: Sequence[str], writer: PreferenceWriter
) -> None:
    """Append the comparisons where ``keep`` [N], runs of neighbours in one piece."""
    indices, sizes = dataset.document_indices, np.diff(dataset.document_indices)
    starts = np.append(dataset.sequence_pointers // 4, len(dataset.tokens))[
        indices
    ]  # [N + 1], in tokens
    for first, end in np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]))).reshape(
        -1, 2
    ):
        for start in range(int(starts[first]), int(starts[end]), _BLOCK):
            writer.add_tokens(dataset.tokens[start : min(start + _BLOCK, int(starts[end]))])
    numbers = np.array([sources.index(name) for name in dataset.sources] or [0], np.uint16)
    sequences = np.repeat(keep, sizes)
    writer.add_documents(
        dataset.sequence_lengths[sequences],
        np.asarray(dataset.scores)[sequences],
        sizes[keep],
        numbers[np.asarray(dataset.source_ids)[keep]],
    )


def _write_dropped(
    output: str,
    sets: Sequence[PreferenceDataset],
    keep: Sequence[np.ndarray],
    contradictory: Sequence[np.ndarray],
) -> None:
    path = Path(f"{output}.rejected.jsonl")
    rows = [
        {
            "file": dataset.prefix,
            "comparison": int(i),
            "reason": "contradiction" if against[i] else "duplicate",
        }
        for dataset, kept, against in zip(sets, keep, contradictory, strict=True)
        for i in np.flatnonzero(~kept)
    ]
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


# ---- what two datasets have in common


def find_between(sets: Sequence[PreferenceDataset]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per dataset: (equal to one of an earlier dataset [N] bool, contradicts one of another dataset
    [N] bool).

    Equal: the same ids of the prompt and of all responses, in the same order of preference. A
    contradiction: the same ids, preferred otherwise. Both are told by 64-bit hashes of the stored
    ids; the texts are not needed.
    """
    hashes = [_hashes(dataset) for dataset in sets]
    keys, orders = (np.concatenate([h[i] for h in hashes]) for i in (0, 1))
    owner = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    repeated, contradictory = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1], [True]]))
    # Owners rise within a group, because the sort is stable.
    shared = np.flatnonzero(owner[order[borders[:-1]]] != owner[order[borders[1:] - 1]])
    for first, end in zip(borders[shared], borders[shared + 1], strict=True):
        group = order[first:end]
        elsewhere = owner[group][:, None] != owner[group]
        alike = orders[group][:, None] == orders[group]
        contradictory[group] = (elsewhere & ~alike).any(1)
        repeated[group] = (alike & (owner[group][:, None] > owner[group])).any(1) & ~contradictory[
            group
        ]
    ends = np.cumsum([len(s) for s in sets])[:-1]
    return np.split(repeated, ends), np.split(contradictory, ends)


def _hashes(dataset: PreferenceDataset) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [N] each: of a comparison's prompt and set of responses, and of these in their order
    of preference."""
    lengths, indices = dataset.sequence_lengths.astype(np.int64), dataset.document_indices
    if not len(dataset):
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    of_sequence = _sequence_hashes(dataset.tokens, np.concatenate([[0], np.cumsum(lengths)]))
    scores = np.asarray(dataset.scores)
    is_prefix = np.zeros(len(lengths), bool)
    is_prefix[indices[:-1]] = True
    number = np.arange(len(lengths))
    # A response's rank: how many of its comparison score higher. Scores fall: equal ones share the
    # first one's place.
    begins = is_prefix | np.roll(is_prefix, 1) | (scores != np.roll(scores, 1))
    place = np.maximum.accumulate(np.where(begins, number, 0))
    rank = place - np.repeat(indices[:-1] + 1, np.diff(indices))
    responses = np.where(is_prefix, np.uint64(0), of_sequence)
    ordered = responses * _RANK_FACTORS[np.maximum(rank, 0) % len(_RANK_FACTORS)]
    key = of_sequence[indices[:-1]] * np.uint64(0x9E3779B97F4A7C15) ^ np.add.reduceat(
        responses, indices[:-1]
    )
    return key, np.add.reduceat(ordered, indices[:-1])


def _sequence_hashes(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 [S]: sums over each sequence of mixed (id, place); sequence s is
    ``tokens[ends[s]:ends[s + 1]]``."""
    out = np.zeros(len(ends) - 1, np.uint64)
    first = 0
    while first < len(out):  # as many whole sequences as fit a block, at least one
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _BLOCK, side="right")) - 1)
        start, lengths = ends[first], np.diff(ends[first : last + 1])
        place = np.arange(ends[last] - start) - np.repeat(ends[first:last] - start, lengths)
        places = (place.astype(np.uint64) + np.uint64(1)) << np.uint64(32)
        mixed = _mixed(tokens[start : ends[last]].astype(np.uint64) | places)
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed)])
        out[first:last] = _mixed(
            total[ends[first + 1 : last + 1] - start] - total[ends[first:last] - start]
        )
        first = last
    return out


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
