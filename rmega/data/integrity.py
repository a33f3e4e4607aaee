"""Verify a dataset: checksums, index, token ids, scores, tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    if problem := _outside(dataset):
        wrong.append(problem)
    for start in range(0, len(dataset.tokens), _BLOCK):
        block = dataset.tokens[start : start + _BLOCK]
        num_reward += int((block == manifest["reward_token_id"]).sum())
    last = (
        dataset.tokens[ends[is_suffix] - 1]
        if int(ends[-1]) <= len(dataset.tokens)
        else np.zeros(0, np.int32)
    )
    if manifest["reward_token_id"] is None:  # read at whatever token a text ends with
        return wrong
    if (last != manifest["reward_token_id"]).any():
        wrong.append(
            f"{dataset.prefix}.bin: {int((last != manifest['reward_token_id']).sum())} responses do"
            " not end with the reward token"
        )
    elif not wrong and num_reward != len(last) and not manifest.get("template_writes_reward_token"):
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
