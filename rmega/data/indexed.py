"""The dataset on disk: write and open.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmega.io import checksum, refuse_pointer

FORMAT_VERSION = 2
_READABLE = (1, 2)
DATA_SUFFIXES = (".bin", ".idx", ".scores.npy", ".sources.npy")
MANIFEST_SUFFIX = ".json"

_MAGIC = b"MMIDIDX\x00\x00"
_INT32_CODE = 4
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1


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


class PreferenceDataset:
    """A dataset of comparisons, memory-mapped: opening it costs the same for any size. See
    `open_preferences`."""

    def __init__(
        self,
        prefix: str,
        manifest: dict[str, Any],
        tokens: np.ndarray,
        sequence_lengths: np.ndarray,
        sequence_pointers: np.ndarray,
        document_indices: np.ndarray,
        scores: np.ndarray,
        source_ids: np.ndarray,
    ) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.sequence_lengths = sequence_lengths
        """int32 [S], tokens of each sequence."""
        self.document_indices = document_indices
        """int64 [N + 1], first sequence of each document; the last entry is S."""
        self.scores = scores
        """float64 [S], see the head of this file."""
        self.source_ids = source_ids
        """uint16 [N], index into ``sources``."""
        self.sources: list[str] = list(manifest["sources"])
        self.tokens = tokens
        """int32, all ids behind one another."""
        self.sequence_pointers = sequence_pointers
        """int64 [S], byte at which each sequence begins."""

    def __len__(self) -> int:
        return len(self.document_indices) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return open_preferences, (self.prefix,)

    def num_responses(self, index: int) -> int:
        return int(self.document_indices[index + 1] - self.document_indices[index]) - 1

    @property
    def prefix_lengths(self) -> np.ndarray:
        """int32 [N], tokens of each comparison's shared prefix (computed at each call)."""
        return self.sequence_lengths[self.document_indices[:-1]]

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
    """True if a finished dataset or any of its files lies at ``prefix``."""
    return any(os.path.exists(f"{prefix}{suffix}") for suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX))


def split_label(text: str) -> tuple[str | None, str]:
    """``LABEL=PREFIX`` or ``PREFIX`` of a flag -> (label or None, prefix); both may hold ``=``.

    A dataset at the whole text comes first, then the longest one behind a ``=``. Where there is
    none, the text is split at its first ``=``, unless that stands in the name of a folder.
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
    tokens = _memmap(f"{prefix}.bin", np.int32, 0, None)
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


def _memmap(path: str, dtype: Any, offset: int, count: int | None) -> np.ndarray:
    if os.path.getsize(path) == 0:
        return np.zeros(0, dtype)
    shape = None if count is None else (count,)
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: cut short") from None


def _open_index(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths int32 [S], byte pointers int64 [S], document indices int64 [N + 1] of a Megatron
    index file."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{path}: not a Megatron index file")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code != _INT32_CODE or documents < 1:
        raise ValueError(
            f"{path}: a Megatron index of version {version}, type {code}; expected 1, {_INT32_CODE}"
        )
    need = _HEADER.size + 12 * sequences + 8 * documents
    if size < need:
        raise ValueError(f"{path}: {size} bytes, its header needs {need}: cut short")
    buffer = _memmap(path, np.uint8, 0, None)
    lengths = np.frombuffer(buffer, np.int32, sequences, _HEADER.size)
    pointers = np.frombuffer(buffer, np.int64, sequences, _HEADER.size + 4 * sequences)
    indices = np.frombuffer(buffer, np.int64, documents, _HEADER.size + 12 * sequences)
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


class PreferenceWriter:
    """Writes a dataset under temporary names and puts it in place at `close`, the manifest last.

    An error, an interrupt or a kill leaves no dataset at ``prefix``, or the earlier one untouched.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = open(f"{self.prefix}.bin.tmp", "wb")
        self._lengths: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._num_sequences: list[np.ndarray] = []
        self._source_ids: list[np.ndarray] = []

    def add(self, comparison: StoredComparison, source_id: int) -> None:
        """Append one comparison."""
        parts = [comparison.prefix, *comparison.suffixes]
        assert len(comparison.scores) == len(comparison.suffixes) and all(
            len(s) for s in comparison.suffixes
        )
        self.add_tokens(np.concatenate(parts))
        self.add_documents(
            np.array([len(p) for p in parts]),
            np.array([float(comparison.graded), *comparison.scores]),
            np.array([len(parts)]),
            np.array([source_id]),
        )

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append ids of whole comparisons, which `add_documents` then describes."""
        self._bin.write(np.ascontiguousarray(tokens, np.int32).data)

    def add_documents(
        self,
        lengths: np.ndarray,
        scores: np.ndarray,
        num_sequences: np.ndarray,
        source_ids: np.ndarray,
    ) -> None:
        """Describe comparisons: per sequence its length and score, per document its sequences and
        source."""
        assert len(lengths) == len(scores) == num_sequences.sum() and len(num_sequences) == len(
            source_ids
        )
        self._lengths.append(np.asarray(lengths, np.int32))
        self._scores.append(np.asarray(scores, np.float64))
        self._num_sequences.append(np.asarray(num_sequences, np.int64))
        self._source_ids.append(np.asarray(source_ids, np.uint16))

    def seal(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write everything under temporary names; returns the manifest, with counts and checksums
        added."""
        self._bin.close()
        prefix = self.prefix
        lengths = _concatenate(self._lengths, np.int32)
        assert os.path.getsize(f"{prefix}.bin.tmp") == 4 * int(lengths.sum(dtype=np.int64)), (
            "tokens without document"
        )
        num_sequences, scores = (
            _concatenate(self._num_sequences, np.int64),
            _concatenate(self._scores, np.float64),
        )
        write_index(f"{prefix}.idx.tmp", lengths, num_sequences)
        _save_npy(f"{prefix}.scores.npy.tmp", scores)
        _save_npy(f"{prefix}.sources.npy.tmp", _concatenate(self._source_ids, np.uint16))
        indices = np.concatenate([[0], np.cumsum(num_sequences)])
        counts = {
            "num_comparisons": len(num_sequences),
            "num_responses": len(lengths) - len(num_sequences),
            "num_pairs": int(count_pairs(indices, scores).sum()),
            "num_tokens": int(lengths.sum(dtype=np.int64)),
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            **counts,
            **manifest,
            "checksums": {suffix: checksum(f"{prefix}{suffix}.tmp") for suffix in DATA_SUFFIXES},
        }
        with open(f"{prefix}{MANIFEST_SUFFIX}.tmp", "w", encoding="utf-8") as stream:
            json.dump(manifest, stream, ensure_ascii=False, indent=1)
            stream.write("\n")
        return manifest

    def publish(self) -> None:
        """Put the sealed files in place, the manifest last."""
        manifest = self.prefix + MANIFEST_SUFFIX
        if os.path.exists(manifest):
            os.remove(manifest)  # from here on the earlier dataset is gone, never a mixture of both
        for suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX):
            os.replace(f"{self.prefix}{suffix}.tmp", self.prefix + suffix)

    def close(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """`seal` and `publish`."""
        manifest = self.seal(manifest)
        self.publish()
        return manifest

    def abort(self) -> None:
        """Remove the temporary files."""
        self._bin.close()
        for suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX):
            Path(f"{self.prefix}{suffix}.tmp").unlink(missing_ok=True)

    def __enter__(self) -> PreferenceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()


def _concatenate(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _save_npy(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as stream:  # np.save would append .npy to the name
        np.save(stream, array)


def write_index(path: str, lengths: np.ndarray, num_sequences: np.ndarray) -> None:
    """Write a Megatron index of int32 sequences of ``lengths`` [S], ``num_sequences`` [N] of them
    per document."""
    lengths = np.ascontiguousarray(lengths, np.int32)
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= 4
    documents = np.zeros(len(num_sequences) + 1, np.int64)
    np.cumsum(num_sequences, out=documents[1:])
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, _INT32_CODE, len(lengths), len(documents)))
        for array in (lengths, pointers, documents):
            array.tofile(stream)


def response_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) index pairs of one comparison's responses; ties give none."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def tied_responses(comparison: StoredComparison) -> list[tuple[int, int]]:
    """All index pairs (i < j) of responses with equal scores; equal responses are no pair."""
    scores, suffixes = comparison.scores, comparison.suffixes
    return [
        (i, j)
        for j in range(len(scores))
        for i in range(j)
        if scores[i] == scores[j] and not np.array_equal(suffixes[i], suffixes[j])
    ]


def pairs(
    document_indices: np.ndarray, scores: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(comparison, better sequence, worse sequence), int64 [m] each, block by block: all pairs of a
    dataset, from its ``document_indices`` [N + 1] and ``scores`` [S] as stored."""
    document_indices, scores = np.asarray(document_indices), np.asarray(scores)
    num_responses = np.diff(document_indices) - 1
    for k in np.unique(num_responses).tolist():
        which = np.flatnonzero(num_responses == k)  # comparisons of k responses
        first = document_indices[which] + 1
        for i in range(k):
            for j in range(i + 1, k):  # scores fall within a comparison
                differs = scores[first + i] != scores[first + j]
                yield which[differs], first[differs] + i, first[differs] + j


def count_pairs(document_indices: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """int64 [N]: pairs of responses with different scores of each comparison; see `pairs`."""
    counts = np.zeros(len(document_indices) - 1, np.int64)
    for which, _, _ in pairs(document_indices, scores):
        counts[which] += 1
    return counts
