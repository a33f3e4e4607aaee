"""The dataset on disk: its files, and opening them.

``PREFIX.bin`` and ``PREFIX.idx`` are megatron-core's ``IndexedDataset`` (int32): a document is a
comparison, its sequences are ``[prefix, suffix_1 .. suffix_K]``, best response first. Beside them:
``PREFIX.scores.npy`` (float64 per sequence; the prefix's entry is 1 if the scores are ratings, so
that their differences are margins, else 0; float32 in sets of format version 1),
``PREFIX.sources.npy`` (uint16 per document) and ``PREFIX.json``, the manifest, which is written
last: without it there is no dataset.

The files are read with numpy alone, through memory maps, and written with vectorized numpy:
``IndexedDataset`` reads the same files (a test holds both to it), but its builder keeps a Python
integer per sequence, and importing it costs three seconds and torch in every worker and small tool.

Shapes: N comparisons (documents), S sequences (S = N + all responses), K responses of one
comparison.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmega.io import refuse_pointer

FORMAT_VERSION = 2
_READABLE = (1, 2)
DATA_SUFFIXES = (".bin", ".idx", ".scores.npy", ".sources.npy")
MANIFEST_SUFFIX = ".json"

MAGIC = b"MMIDIDX\x00\x00"
INT32_CODE = 4
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1


@dataclass(frozen=True)
class StoredComparison:
    """One comparison as token ids. ``prefix + suffix`` of each response ends with the reward
    token."""

    prefix: np.ndarray
    """int32 [P], the longest common prefix of the responses' conversations; may be empty."""
    suffixes: list[np.ndarray]
    """K arrays, int32 [>= 1]; the last id is the reward token."""
    scores: np.ndarray
    """float64 [K], falling."""
    graded: bool
    """Scores are ratings (differences are margins); else only their order counts."""
    source: str


@dataclass(eq=False, repr=False)
class PreferenceDataset:
    """A dataset of comparisons, memory-mapped: opening it costs the same for any size. See
    `open_preferences`."""

    prefix: str
    manifest: dict[str, Any]
    tokens: np.ndarray
    """int32, all ids one after another."""
    sequence_lengths: np.ndarray
    """int32 [S], tokens of each sequence."""
    sequence_pointers: np.ndarray
    """int64 [S], byte at which each sequence begins."""
    document_indices: np.ndarray
    """int64 [N + 1], first sequence of each document; the last entry is S."""
    scores: np.ndarray
    """float64 [S], see the head of this file."""
    source_ids: np.ndarray
    """uint16 [N], index into ``sources``."""

    @property
    def sources(self) -> list[str]:
        """Names of the sources."""
        return self.manifest["sources"]

    def __len__(self) -> int:
        return len(self.document_indices) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return open_preferences, (self.prefix,)

    @property
    def num_tied_pairs(self) -> int:
        """Pairs of responses with equal scores (computed at each call)."""
        responses = np.diff(self.document_indices) - 1  # [N]
        return int((responses * (responses - 1) // 2).sum()) - self.manifest["num_pairs"]

    def get(self, index: int) -> StoredComparison:
        """The comparison at ``index``; its arrays are read-only views of the file."""
        if not 0 <= index < len(self):
            raise IndexError(
                f"{self.prefix}: comparison {index} is out of range: the set has {len(self)}"
                f" comparisons, 0 to {len(self) - 1}"
            )
        first, end = int(self.document_indices[index]), int(self.document_indices[index + 1])
        starts = self.sequence_pointers[first:end] // 4
        lengths = self.sequence_lengths[first:end]
        parts = [
            self.tokens[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        scores = np.asarray(self.scores[first:end])
        return StoredComparison(
            prefix=parts[0],
            suffixes=parts[1:],
            scores=scores[1:],
            graded=bool(scores[0]),
            source=self.sources[int(self.source_ids[index])],
        )

    __getitem__ = get


def exists(prefix: str | Path) -> bool:
    """Whether a finished dataset or any of its files exists at ``prefix``."""
    return any(os.path.exists(f"{prefix}{suffix}") for suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX))


def split_label(text: str) -> tuple[str | None, str]:
    """``LABEL=PREFIX`` or ``PREFIX`` of a flag -> (label or None, prefix); both may hold ``=``.

    A dataset at the whole text comes first, then the longest one after a ``=``. Where there is
    none, the text is split at its first ``=``, unless that is in the name of a folder.
    """
    if exists(text):
        return None, text
    splits = [(text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == "="]
    for head, prefix in splits:
        if exists(prefix):
            return head, prefix
    if splits and "/" not in splits[0][0]:
        return splits[0]
    return None, text


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """The manifest of the dataset at ``prefix``; ValueError if there is none or it is of another
    format."""
    path = f"{prefix}{MANIFEST_SUFFIX}"
    try:
        refuse_pointer(path)
        with open(path, encoding="utf-8") as stream:
            manifest = json.load(stream)
    except FileNotFoundError:
        raise ValueError(
            f"{prefix}: no preference dataset here ({path} is missing); "
            "make one with tools/preprocess_pref.py"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest of a preference dataset ({error})") from None
    if (
        not isinstance(manifest, dict)
        or "format_version" not in manifest
        or "sources" not in manifest
    ):
        raise ValueError(f"{path}: not a manifest of a preference dataset")
    if manifest["format_version"] not in _READABLE:
        raise ValueError(
            f"{path}: format version {manifest['format_version']}, this program reads"
            f" {' and '.join(map(str, _READABLE))}; run tools/preprocess_pref.py again"
        )
    return manifest


def open_preferences(prefix: str | Path) -> PreferenceDataset:
    """Open the dataset at ``prefix`` (a path without suffix). Reads the manifest and headers only.

    ValueError if a file is missing, shorter than its header says, or does not fit the others.
    """
    prefix = str(prefix)
    manifest = read_manifest(prefix)
    for suffix in DATA_SUFFIXES:
        if not os.path.exists(prefix + suffix):
            raise ValueError(
                f"{prefix}{suffix}: missing, though {prefix}{MANIFEST_SUFFIX} is there"
            )
        refuse_pointer(prefix + suffix)
    lengths, pointers, documents = _open_index(f"{prefix}.idx")
    tokens = _memmap(f"{prefix}.bin", np.int32)
    dtype = np.float32 if manifest["format_version"] == 1 else np.float64
    scores = _open_npy(f"{prefix}.scores.npy", dtype, len(lengths))
    source_ids = _open_npy(f"{prefix}.sources.npy", np.uint16, len(documents) - 1)
    end = int(pointers[-1]) // 4 + int(lengths[-1]) if len(lengths) else 0
    if end > len(tokens):
        raise ValueError(
            f"{prefix}.bin: holds {len(tokens)} tokens, its index needs {end}: cut short"
        )
    return PreferenceDataset(
        prefix, manifest, tokens, lengths, pointers, documents, scores, source_ids
    )


def _memmap(path: str, dtype: Any) -> np.ndarray:
    if os.path.getsize(path) == 0:
        return np.zeros(0, dtype)
    try:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: cut short") from None


def _open_index(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths int32 [S], byte pointers int64 [S], document indices int64 [N + 1] of a Megatron
    index file."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path}: not a Megatron index file")
    _, version, code, sequences, documents = HEADER.unpack(head)
    if version != 1 or code != INT32_CODE or documents < 1:
        raise ValueError(
            f"{path}: a Megatron index of version {version}, type {code}; expected 1, {INT32_CODE}"
        )
    need = HEADER.size + 12 * sequences + 8 * documents
    if size < need:
        raise ValueError(f"{path}: {size} bytes, its header needs {need}: cut short")
    buffer = _memmap(path, np.uint8)
    lengths = np.frombuffer(buffer, np.int32, sequences, HEADER.size)
    pointers = np.frombuffer(buffer, np.int64, sequences, HEADER.size + 4 * sequences)
    indices = np.frombuffer(buffer, np.int64, documents, HEADER.size + 12 * sequences)
    if int(indices[-1]) != sequences:
        raise ValueError(
            f"{path}: documents end at sequence {int(indices[-1])} of {sequences}: damaged"
        )
    return lengths, pointers, indices


def _open_npy(path: str, dtype: Any, count: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r").view(np.ndarray) if count else np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    if array.dtype != dtype or array.shape != (count,):
        raise ValueError(
            f"{path}: {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{count}]"
        )
    return array
