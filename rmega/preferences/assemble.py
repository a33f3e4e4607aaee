"""Collect the workers' results, drop what is rejected, write the dataset.

``PREFIX.partial`` holds everything converted so far in plain growing files, because a large set
does not fit into memory. It is removed at the end, also after an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import rmega
from rmega.data.indexed import exists
from rmega.data.writer import PreferenceWriter
from rmega.preferences import dedup
from rmega.preferences.comparison import NOT_FAULTS, REASONS

if TYPE_CHECKING:
    from rmega.preferences.sources import Chunk, Input
    from rmega.preferences.worker import ChunkResult

_TYPES = {
    "tokens": np.dtype(np.int32),
    "lengths": np.dtype(np.int32),
    "scores": np.dtype(np.float64),
    "documents": dedup.DOCUMENT,
}
MAX_SOURCES = 4096


class WorkFolder:
    """Grows by a chunk at a time; see the head of this file. A context manager."""

    def __init__(self, prefix: str, inputs: Sequence[Input]) -> None:
        self.prefix, self.inputs = prefix, inputs
        self.folder = Path(f"{prefix}.partial")
        self.hashes: dict[str, str] = {}
        self.num_rows = 0
        self.rejected: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        """Column -> rows that were rejected because it is missing."""
        self.notes: Counter[str] = Counter()
        self.source_names: list[str] = []
        self.first_fault = ""
        self._names: dict[str, int] = {}
        names = (*_TYPES, "rejected")
        self._lock = self._locked()
        if foreign := sorted(set(os.listdir(self.folder)) - set(names)):
            os.close(self._lock)
            raise ValueError(
                f"--output-prefix {prefix}: {self.folder} is needed for the work, but holds"
                f" {foreign[0]}, which preprocessing did not write; choose another prefix"
            )
        self._streams = {name: open(self.folder / name, "wb") for name in names}

    def _locked(self) -> int:
        """Make the folder, which a run that was killed may have left, and lock it; a descriptor."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.folder, os.O_RDONLY)
            except FileNotFoundError:  # the process that held it has just removed it
                continue
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    raise ValueError(
                        f"--output-prefix {self.prefix}: another process is writing it"
                        f" ({self.folder})"
                    ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.folder)):
                    return lock
            os.close(lock)  # of a folder that was removed before it was locked

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def append(self, chunk: Chunk, result: ChunkResult) -> None:
        """Add a chunk's result."""
        documents = np.frombuffer(result.documents, dedup.DOCUMENT).copy()
        for name in result.source_names:
            if name not in self._names:
                self._names[name] = len(self.source_names)
                self.source_names.append(name)
        if len(documents):
            documents["source"] = np.array([self._names[n] for n in result.source_names])[
                documents["source"]
            ]
        source = self.inputs[chunk.input_index]
        for line, reason, detail, _ in result.rejected:
            self.rejected[reason] += 1
            if reason == "missing_field":
                self.missing[re.sub(r"\[\d+\]", "[...]", detail)] += 1
            if not self.first_fault and reason not in NOT_FAULTS:
                self.first_fault = (
                    f"{source.name}:{line}: {REASONS[reason]}{f' ({detail})' if detail else ''}"
                )
        self.notes += result.notes
        self.num_rows += result.num_rows
        for name in ("tokens", "lengths", "scores"):
            self._streams[name].write(getattr(result, name))
        self._streams["documents"].write(documents.tobytes())
        self._streams["rejected"].writelines(
            json.dumps([chunk.input_index, *entry]).encode() + b"\n" for entry in result.rejected
        )

    def _flush(self) -> None:
        for stream in self._streams.values():
            stream.flush()

    def check_faults(self, max_rejected: float, at_least: int = 0) -> None:
        """ValueError, with the rejected file written, if too many of the rows are faulty."""
        faults = {r: n for r, n in self.rejected.items() if r not in NOT_FAULTS}
        num = sum(faults.values())
        if self.num_rows < at_least or num <= max_rejected * self.num_rows:
            return
        path = self.write_rejected([])
        counts = ", ".join(
            f"{n} {r}" for r, n in sorted(faults.items(), key=lambda item: (-item[1], item[0]))
        )
        raise ValueError(
            f"{self.first_fault}; {num} of {self.num_rows} rows are faulty ({counts}), more than "
            f"--max-rejected {max_rejected:g}; all of them are listed in {path}"
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """tokens int32, lengths int32 [S], scores float64 [S], documents `dedup.DOCUMENT` [N],
        from the files."""
        self._flush()
        return {
            name: (
                np.memmap(self.folder / name, dtype, "r").view(np.ndarray)
                if (self.folder / name).stat().st_size
                else np.zeros(0, dtype)
            )
            for name, dtype in _TYPES.items()
        }

    def write_rejected(self, further: list[tuple[int, int, str, str]]) -> str | None:
        """Write PREFIX.rejected.jsonl in the order of the input; ``further`` is (input, line,
        reason, detail).

        Returns its path; None, and no such file any more, if nothing was rejected.
        """
        path = f"{self.prefix}.rejected.jsonl"
        if not self.rejected and not further:
            Path(path).unlink(missing_ok=True)
            return None
        self._flush()
        with (
            open(self.folder / "rejected", encoding="utf-8") as stream,
            open(f"{path}.tmp", "w", encoding="utf-8") as out,
        ):
            rows = heapq.merge(
                map(json.loads, stream),
                ([*entry, ""] for entry in sorted(further)),
                key=lambda row: row[:2],  # input, line
            )
            for index, line, reason, detail, text in rows:
                source = self.inputs[index]
                out.write(
                    json.dumps(
                        {
                            "file": source.name,
                            source.unit: line,
                            "reason": reason,
                            "detail": detail,
                            "text": text,
                        }
                    )
                    + "\n"
                )
        os.replace(f"{path}.tmp", path)
        return path


def check_outputs(outputs: Sequence[str], *, force: bool) -> None:
    """ValueError where one of the ``outputs`` exists and is not to be replaced."""
    for output in outputs:
        if exists(output) and not force:
            raise ValueError(
                f"--output-prefix {outputs[0]}: a dataset is there already ({output}.*); --force"
                " replaces it"
            )


def select(
    work: WorkFolder, documents: np.ndarray, *, keep_duplicates: bool, held_out: np.ndarray | None
) -> tuple[np.ndarray, list[tuple[int, int, str, str]], dict[str, int]]:
    """(kept [N] bool, further rejected rows, overlap with the held-out set). Counts into
    ``work.rejected``."""
    keep = np.ones(len(documents), bool)
    further: list[tuple[int, int, str, str]] = []
    overlap: dict[str, int] = {}

    def leave_out(mask: np.ndarray, reason: str) -> None:
        mask = mask & keep
        keep[mask] = False
        if mask.any():
            work.rejected[reason] += int(mask.sum())
            rows = documents[mask]
            further.extend(
                (int(f), int(n), reason, "")
                for f, n in zip(rows["file"], rows["line"], strict=True)
            )
            if not work.first_fault and reason not in NOT_FAULTS:
                work.first_fault = (
                    f"{work.inputs[further[-1][0]].name}:{further[-1][1]}: {REASONS[reason]}"
                )

    if not keep_duplicates:
        repeated, contradictory = dedup.find_duplicates(documents)
        leave_out(repeated, "duplicate")
        leave_out(contradictory, "contradiction")
    if held_out is not None:
        inside = np.isin(documents["prompt"], held_out)
        overlap = {
            "prompts": len(np.unique(documents["prompt"][inside & keep])),
            "comparisons": int((inside & keep).sum()),
            "held_out_prompts": len(held_out),
        }
        leave_out(inside, "holdout")
    return keep, further, overlap


def finish(
    work: WorkFolder,
    *,
    outputs: Sequence[str],
    force: bool,
    settings: dict[str, Any],
    schemas: Sequence[str],
    keep_duplicates: bool,
    held_out: np.ndarray | None,
    valid_fraction: float,
    max_rejected: float,
) -> list[dict[str, Any]]:
    """Check the set and write the dataset(s) at ``outputs`` (training, then validation).

    ``settings`` is the tokenizer's part of the manifest. Returns the manifests.
    """
    arrays = work.arrays()
    documents = arrays["documents"]
    keep, further, overlap = select(
        work, documents, keep_duplicates=keep_duplicates, held_out=held_out
    )
    work.check_faults(max_rejected)
    assert int(keep.sum()) + sum(work.rejected.values()) == work.num_rows, (
        "a row is neither kept nor rejected"
    )
    if not keep.any():
        path = work.write_rejected(further)
        raise ValueError(
            f"--input: no comparison is left of {work.num_rows} rows; why is in {path}"
        )
    valid = np.zeros(len(documents), bool)
    if valid_fraction:
        valid = dedup.split_by_prompt(documents, keep, valid_fraction)
    names, source_ids = _source_table(work, documents)
    work.write_rejected(further)
    run = {
        "rows": work.num_rows,
        "rejected": dict(sorted(work.rejected.items())),
        "missing": dict(sorted(work.missing.items())),
        "notes": dict(sorted(work.notes.items())),
        "files": [
            {
                "name": s.name,
                "schema": schema,
                "sha256": work.hashes.get(s.name),
                "split": s.split,
                "revision": s.revision,
            }
            for s, schema in zip(work.inputs, schemas, strict=True)
        ],
    }
    manifests, writers = [], []
    with contextlib.ExitStack() as stack:
        for part, output, mask in zip(
            ("train", "valid"), outputs, (keep & ~valid, keep & valid), strict=False
        ):
            chosen = np.flatnonzero(mask)
            writer = stack.enter_context(PreferenceWriter(output))
            writers.append(writer)
            _copy(arrays, chosen, source_ids, writer)
            manifests.append(
                writer.seal(
                    {
                        "rmega": rmega.__version__,
                        **settings,
                        **_heuristics(documents[chosen]),
                        "sources": names,
                        "input": run,
                        "split": (
                            {"part": part, "valid_fraction": valid_fraction}
                            if valid_fraction
                            else None
                        ),
                        "holdout": overlap or None,
                    }
                )
            )
        check_outputs(outputs, force=force)  # at the start nobody had written them
        for writer in reversed(writers):
            writer.publish()
    return manifests


def _source_table(work: WorkFolder, documents: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of sources, and uint16 [N]. A source column with a value per row gives way to the
    files' names."""
    if len(work.source_names) <= MAX_SOURCES:
        return work.source_names, documents["source"].astype(np.uint16)
    labels = sorted({s.label for s in work.inputs})
    of_input = np.array([labels.index(s.label) for s in work.inputs], np.uint16)
    work.notes[
        f"more than {MAX_SOURCES} names in the source column: the files' names are used instead"
    ] += 1
    return labels, of_input[documents["file"]]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: the ranges ``start .. start + count`` behind one another."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(int(counts.sum()))


def _copy(
    arrays: dict[str, np.ndarray],
    chosen: np.ndarray,
    source_ids: np.ndarray,
    writer: PreferenceWriter,
) -> None:
    """Write the documents with these numbers [n]; runs of neighbors are copied in one piece."""
    documents = arrays["documents"]
    num_sequences = documents["num_sequences"].astype(np.int64)
    sequence_ends, token_ends = (
        np.cumsum(num_sequences),
        np.cumsum(documents["num_tokens"].astype(np.int64)),
    )
    borders = np.concatenate([[0], np.flatnonzero(np.diff(chosen) != 1) + 1, [len(chosen)]])
    first, last = chosen[borders[:-1]], chosen[borders[1:] - 1]
    starts = token_ends[first] - documents["num_tokens"][first].astype(np.int64)
    for start, end in zip(starts.tolist(), token_ends[last].tolist(), strict=True):
        writer.add_tokens(arrays["tokens"][start:end])
    rows = _ranges((sequence_ends - num_sequences)[chosen], num_sequences[chosen])
    writer.add_documents(
        arrays["lengths"][rows], arrays["scores"][rows], num_sequences[chosen], source_ids[chosen]
    )


def _heuristics(chosen: np.ndarray) -> dict[str, Any]:
    """What only the rows knew: how often the first response of a row is the better one, and the
    scripts."""
    scripts = np.bincount(chosen["script"], minlength=len(dedup.SCRIPTS))
    return {
        "position_heuristic": {
            "first_wins": int(chosen["first_wins"].sum()),
            "pairs": int(chosen["first_pairs"].sum()),
        },
        "scripts": {name: int(n) for name, n in zip(dedup.SCRIPTS, scripts, strict=True) if n},
    }
