"""The workers' results on disk: plain files that grow by a chunk at a time.

``PREFIX.partial`` holds everything converted so far, because a large set does not fit into memory.
It is removed at the end, also after an error.
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

from rmega.preferences import dedup
from rmega.preferences.comparison import NOT_FAULTS, REASONS

if TYPE_CHECKING:
    from rmega.preferences.chunks import Chunk
    from rmega.preferences.resolve import Input
    from rmega.preferences.worker import ChunkResult

_TYPES = {
    "tokens": np.dtype(np.int32),
    "lengths": np.dtype(np.int32),
    "scores": np.dtype(np.float64),
    "documents": dedup.DOCUMENT,
}


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
        self._rejected_late: list[list[Any]] = []
        """[input, line, reason, detail, raw text], as in the file of rejected rows."""
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
            with contextlib.suppress(OSError):  # of a full disk: it is removed anyway
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
        for line, reason, detail, _ in result.rejected:
            self._count(chunk.input_index, line, reason, detail)
        self.notes += result.notes
        self.num_rows += result.num_rows
        for name in ("tokens", "lengths", "scores"):
            self._streams[name].write(getattr(result, name))
        self._streams["documents"].write(documents.tobytes())
        self._streams["rejected"].writelines(
            json.dumps([chunk.input_index, *entry]).encode() + b"\n" for entry in result.rejected
        )

    def reject(self, index: int, line: int, reason: str) -> None:
        """Count a row of input ``index`` that was converted and is left out after all."""
        self._count(index, line, reason, "")
        self._rejected_late.append([index, line, reason, "", ""])

    def _count(self, index: int, line: int, reason: str, detail: str) -> None:
        self.rejected[reason] += 1
        if reason == "missing_field":
            self.missing[re.sub(r"\[\d+\]", "[...]", detail)] += 1
        if not self.first_fault and reason not in NOT_FAULTS:
            self.first_fault = (
                f"{self.inputs[index].name}:{line}: {REASONS[reason]}"
                f"{f' ({detail})' if detail else ''}"
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
        path = self.write_rejected()
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

    def write_rejected(self) -> str | None:
        """Write PREFIX.rejected.jsonl in the order of the input.

        Returns its path; None, and no such file any more, if nothing was rejected.
        """
        path = f"{self.prefix}.rejected.jsonl"
        if not self.rejected:
            Path(path).unlink(missing_ok=True)
            return None
        self._flush()
        with (
            open(self.folder / "rejected", encoding="utf-8") as stream,
            open(f"{path}.tmp", "w", encoding="utf-8") as out,
        ):
            rows = heapq.merge(
                map(json.loads, stream),
                sorted(self._rejected_late),
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
