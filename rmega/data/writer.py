"""Write a dataset: under temporary names, the manifest last."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmega.data.indexed import (
    DATA_SUFFIXES,
    FORMAT_VERSION,
    HEADER,
    INT32_CODE,
    MAGIC,
    MANIFEST_SUFFIX,
    StoredComparison,
)
from rmega.data.pairs import count_pairs
from rmega.io import checksum


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
        stream.write(HEADER.pack(MAGIC, 1, INT32_CODE, len(lengths), len(documents)))
        for array in (lengths, pointers, documents):
            array.tofile(stream)
