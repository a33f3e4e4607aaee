"""Verify a dataset: checksums, index, token ids, scores, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rmega.data.fingerprint import is_tokenizer_of, tokenizer_fingerprint
from rmega.data.indexed import DATA_SUFFIXES, PreferenceDataset
from rmega.data.pairs import count_pairs
from rmega.io import checksum

_BLOCK = 1 << 22


def damage(dataset: PreferenceDataset, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a dataset, or None: a file that is not the one that was
    written, an id outside the vocabulary. What a training checks before it starts.

    ``share`` (i, n) does each n-th part of the work, for n ranks.
    """
    recorded = dataset.manifest.get("checksums", {})
    jobs = [*(s for s in DATA_SUFFIXES if s in recorded), ".bin's ids"]
    for job in jobs[share[0] :: share[1]]:
        if job in recorded:
            if checksum(dataset.prefix + job) != recorded[job]:
                return f"{dataset.prefix}{job}: its content has changed (checksum)"
        elif problem := _outside(dataset):
            return problem
    return None


def _outside(dataset: PreferenceDataset) -> str | None:
    """The first id that is outside the vocabulary."""
    size = dataset.manifest["vocab_size"]
    for start in range(0, len(dataset.tokens), _BLOCK):
        block = dataset.tokens[start : start + _BLOCK]
        outside = (block < 0) | (block >= size)
        if outside.any():
            at = start + int(outside.argmax())
            return (
                f"{dataset.prefix}.bin: token {at} is {int(dataset.tokens[at])}, outside the"
                f" vocabulary of {size}"
            )
    return None


def verify(dataset: PreferenceDataset, tokenizer: Any = None) -> list[str]:
    """Everything that is wrong with a dataset, a line each; empty if it is sound.

    Checks checksums, the index, the bounds of ids, the place of the reward token, scores and
    sources, the counts of the manifest, and the fingerprint of ``tokenizer`` (transformers') if one
    is given.
    """
    return list(_problems(dataset, tokenizer))


def _problems(dataset: PreferenceDataset, tokenizer: Any) -> Iterator[str]:
    manifest, prefix = dataset.manifest, dataset.prefix
    for suffix in DATA_SUFFIXES:
        if manifest.get("checksums", {}).get(suffix) != checksum(prefix + suffix):
            yield f"{prefix}{suffix}: its checksum is not the manifest's"
    # An index that is wrong ends the checks: all others read by it.
    lengths, indices = dataset.sequence_lengths, dataset.document_indices
    sizes = np.diff(indices)
    if len(sizes) and (int(sizes.min()) < 3 or int(indices[0]) != 0):
        yield f"{prefix}.idx: comparison {int(sizes.argmin())} has fewer than two responses"
        return
    if len(lengths) and int(lengths.min()) < 0:
        yield f"{prefix}.idx: sequence {int(lengths.argmin())} has a negative length"
        return
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(dataset.sequence_pointers, (ends - lengths) * 4):
        yield f"{prefix}.idx: its pointers do not follow its lengths"
        return
    total = int(ends[-1]) if len(ends) else 0
    if len(dataset.tokens) != total:
        yield f"{prefix}.bin: {len(dataset.tokens)} tokens, the index has {total}"
    is_prefix = np.zeros(len(lengths), bool)
    is_prefix[indices[:-1]] = True
    if (lengths[~is_prefix] < 1).any():
        yield f"{prefix}.idx: a response without tokens"
        return
    yield from _problems_of_tokens(dataset, ends[~is_prefix])
    yield from _problems_of_scores(dataset, is_prefix)
    longest = int((np.repeat(lengths[is_prefix], sizes - 1) + lengths[~is_prefix]).max(initial=0))
    if manifest.get("max_length") is not None and longest > manifest["max_length"]:
        yield (
            f"{prefix}: a conversation of {longest} tokens, --max-length was"
            f" {manifest['max_length']}"
        )
    counts = {
        "num_comparisons": len(dataset),
        "num_responses": len(lengths) - len(dataset),
        "num_tokens": total,
        "num_pairs": int(count_pairs(indices, dataset.scores).sum()),
    }
    for name, value in counts.items():
        if name in manifest and manifest[name] != value:
            yield f"{prefix}.json: {name} is {manifest[name]}, the data have {value}"
    if tokenizer is not None and not is_tokenizer_of(tokenizer, manifest):
        yield (
            f"--tokenizer: its fingerprint is {tokenizer_fingerprint(tokenizer)}, the dataset was"
            f" written with {manifest.get('tokenizer_fingerprint')} ({manifest.get('tokenizer')})"
        )


def _problems_of_tokens(dataset: PreferenceDataset, ends: np.ndarray) -> Iterator[str]:
    """``ends`` [responses]: where the tokens of each response end."""
    path, reward_token = f"{dataset.prefix}.bin", dataset.manifest["reward_token_id"]
    if outside := _outside(dataset):
        yield outside
    # Without a reward token a reward is read at whatever token a text ends with.
    if reward_token is None or ends.max(initial=0) > len(dataset.tokens):
        return
    others = int((dataset.tokens[ends - 1] != reward_token).sum())
    if others:
        yield f"{path}: {others} responses do not end with the reward token"
    elif not outside and not dataset.manifest.get("template_writes_reward_token"):
        blocks = range(0, len(dataset.tokens), _BLOCK)
        count = sum(int((dataset.tokens[b : b + _BLOCK] == reward_token).sum()) for b in blocks)
        if count != len(ends):
            yield f"{path}: the reward token occurs {count} times, in {len(ends)} responses"


def _problems_of_scores(dataset: PreferenceDataset, is_prefix: np.ndarray) -> Iterator[str]:
    """``is_prefix`` [S]: the sequences that are prefixes."""
    path, scores = f"{dataset.prefix}.scores.npy", np.asarray(dataset.scores)
    if not np.isfinite(scores).all():
        yield f"{path}: a score that is no number"
    if not np.isin(scores[is_prefix], (0.0, 1.0)).all():
        yield f"{path}: a prefix whose entry is neither 0 nor 1"
    rises = (scores[1:] > scores[:-1]) & ~is_prefix[1:] & ~is_prefix[:-1]
    if rises.any():
        yield f"{path}: scores rise at sequence {int(rises.argmax()) + 1}"
    if len(dataset.source_ids) and int(dataset.source_ids.max()) >= len(dataset.sources):
        yield (
            f"{dataset.prefix}.sources.npy: source {int(dataset.source_ids.max())} of"
            f" {len(dataset.sources)}"
        )
