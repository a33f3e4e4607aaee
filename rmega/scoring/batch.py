"""Score files of any size, in windows of rows, with an output that can be resumed.

The input streams through in windows of bounded size. Within a window, conversations with the same
beginning are scored together wherever they stand; rows leave in the order in which they came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rmega.io import naming
from rmega.preferences.scorable import ScorableRow

WINDOW_ROWS = 512
CHARS_PER_TOKEN = 4  # roughly; decides only how much text is read ahead
PACKS_PER_WINDOW = 8


@dataclasses.dataclass(slots=True)
class RowResult:
    """The result of a row."""

    rewards: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_cut: int = 0
    error: str | None = None
    overlong: bool = False
    """The error: longer than what the training took (--overlong drop or error)."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was changed in its conversations, such as cuts."""


@dataclasses.dataclass(slots=True)
class Window:
    """Neighboring rows; ``done`` is the share of the input that has been read at its end, None if
    unknown."""

    rows: list[ScorableRow]
    done: float | None = None


def windows(rows: Iterable[tuple[ScorableRow, float | None]], max_tokens: int) -> Iterator[Window]:
    """Cut a stream of rows by number and by text, so that memory and the time between two writes
    are bounded."""
    limit = max_tokens * CHARS_PER_TOKEN * PACKS_PER_WINDOW
    window, size = Window([]), 0
    for row, done in rows:
        window.rows.append(row)
        window.done = done
        size += sum(
            len(c) if isinstance(c, str) else sum(len(m["content"]) for m in c)
            for c in row.conversations
        )
        if len(window.rows) >= WINDOW_ROWS or size >= limit:
            yield window
            window, size = Window([]), 0
    if window.rows:
        yield window


def score_rows(
    scorer: Any, rows: list[ScorableRow], progress: Callable[[int], None] | None = None
) -> list[RowResult]:
    """Score the rows of a window with a ``rmega.scoring.scorer.Scorer``. The error of a row is
    in its result."""
    results, sequences, owners = [], [], []
    for row in rows:
        result = RowResult(error=row.error)
        results.append(result)
        if row.error is not None:
            continue
        try:
            own = []
            for conversation in row.conversations:
                notes: list[str] = []
                own.append(scorer.encode(conversation, row.tools, notes))
                result.num_cut += any(note.startswith("cut") for note in notes)
                result.notes += notes
        except ValueError as error:
            result.error, result.num_cut, result.notes = str(error), 0, []
            result.overlong = getattr(error, "reason", "") == "overlong"
            continue
        result.num_tokens = sum(map(len, own))
        sequences += own
        owners += [result] * len(own)
    for result, reward in zip(owners, scorer.score_sequences(sequences, progress), strict=True):
        result.rewards.append(reward)
        if not math.isfinite(reward):
            result.error = f"the model gives {reward}, no finite number"
    return results


# ---- output


def line_of(row: ScorableRow, result: RowResult, *, best_of: bool = False) -> dict[str, Any]:
    """The output of a row: index, id if it has one, then reward, or rewards in the row's order, or
    error."""
    line: dict[str, Any] = {"index": row.index}
    if row.id is not None:
        line["id"] = row.id
    if result.error is not None:
        return {**line, "error": f"{row.where}: {result.error}"}
    rewards = [float(f"{r:.9g}") for r in result.rewards]  # nine digits name every fp32 number
    line |= {"rewards": rewards} if row.several else {"reward": rewards[0]}
    if best_of:
        line["order"] = ranking(result.rewards)
    if result.num_cut:
        line["cut"] = result.num_cut
    return line


def ranking(rewards: list[float]) -> list[int]:
    """Numbers of the responses from 0, best first; equal rewards in the row's order."""
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))


class Output:
    """A file of lines that has its name only when it is whole; until then it is
    ``NAME.partial``."""

    def __init__(self, path: str | None, *, resume: bool = False, force: bool = False) -> None:
        self.path = Path(path) if path is not None else None
        self.num_rows = 0
        self.last: tuple[int, dict[str, Any]] | None = None
        """(index, line) of the last row that was scored before the interruption."""
        if self.path is None:
            if resume:
                raise ValueError("--resume needs --output, the file to resume")
            self._file: IO[str] = sys.stdout
            return
        if self.path.is_dir():
            raise ValueError(f"--output {path}: is a folder")
        partial = self.partial = self.path.with_name(self.path.name + ".partial")
        if resume:
            if not partial.exists() and self.path.exists():
                os.replace(self.path, partial)
            if partial.exists():
                self._take_up()
        elif force:
            partial.unlink(missing_ok=True)
        elif self.path.exists():
            raise ValueError(
                f"--output {path}: exists already; --resume continues where it ends, --force"
                " replaces it"
            )
        elif partial.exists():
            raise ValueError(
                f"--output {path}: {partial} holds an interrupted run; --resume continues it,"
                " --force starts afresh"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(partial, "a", encoding="utf-8")

    def _take_up(self) -> None:
        end = 0
        with open(self.partial, "rb") as file:
            for number, raw in enumerate(file):
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = None
                if not raw.endswith(b"\n") or not isinstance(line, dict):
                    if file.read(1):
                        raise ValueError(
                            f"--resume: {self.partial}:{number + 1} is not a line that this program"
                            " wrote"
                        )
                    break  # half-written when the run was interrupted
                if line.get("index") != number:
                    raise ValueError(
                        f"--resume: {self.partial}:{number + 1} has index {line.get('index')}"
                        f" instead of {number}: not the output of this program"
                    )
                if "error" not in line:
                    self.last = number, line
                self.num_rows, end = number + 1, end + len(raw)
        os.truncate(self.partial, end)

    def check(
        self, row: ScorableRow, result: RowResult, *, best_of: bool, tolerance: float
    ) -> None:
        """Raise ValueError if the last line that an interrupted run wrote is not what this run
        would write."""
        index, old = self.last
        new = line_of(row, result, best_of=best_of)
        where = f"--resume: line {index + 1} of {self.partial}"
        if old.get("id") != new.get("id") or set(old) != set(new):
            raise ValueError(
                f"{where} is not of {row.where}: another --input or other options than before"
            )
        before, now = (
            [line["reward"]] if "reward" in line else line["rewards"] for line in (old, new)
        )
        if len(before) != len(now):
            raise ValueError(
                f"{where} has {len(before)} rewards, {row.where} {len(now)} responses: another"
                " --input"
            )
        for a, b in zip(before, now, strict=True):
            if abs(a - b) > tolerance * max(1.0, abs(a)):
                raise ValueError(
                    f"{where} has the reward {a:.6g}, this model gives {b:.6g}: another --model,"
                    " --dtype or --input than before"
                )

    def write(self, text: str) -> None:
        """Append text and hand it to the system."""
        with naming(self.partial) if self.path is not None else contextlib.nullcontext():
            self._file.write(text)
            self._file.flush()

    def finish(self) -> None:
        """Everything is written: give the file its name."""
        if self.path is not None:
            self._file.close()
            os.replace(self.partial, self.path)

    def close(self) -> None:
        """Leave a partial file for --resume; an empty one is removed."""
        if self.path is not None and not self._file.closed:
            with naming(self.partial):
                self._file.close()
            if self.partial.stat().st_size == 0:
                self.partial.unlink()
