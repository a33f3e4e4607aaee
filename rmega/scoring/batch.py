"""Files of any size -> a line of rewards per row: windows of rows, worker processes, output that
can be taken up again.

The input streams through in windows of bounded size. Within a window, conversations with the same
beginning are scored together wherever they stand; rows leave in the order in which they came.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from rmega.preferences.scorable import ScorableRow

WINDOW_ROWS = 512
CHARS_PER_TOKEN = 4  # roughly; decides only how much text is read ahead
PACKS_PER_WINDOW = 8


@dataclasses.dataclass(slots=True)
class RowResult:
    """What became of a row."""

    rewards: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_cut: int = 0
    error: str | None = None


@dataclasses.dataclass(slots=True)
class Window:
    """Neighbouring rows; ``done`` is the share of the input that has been read at its end, None if
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
    """Score the rows of a window with a ``rmega.scoring.scorer.Scorer``. What is wrong with a row
    stands in its result."""
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
        except ValueError as error:
            result.error, result.num_cut = str(error), 0
            continue
        result.num_tokens = sum(map(len, own))
        sequences += own
        owners += [result] * len(own)
    for result, reward in zip(owners, scorer.score_sequences(sequences, progress), strict=True):
        result.rewards.append(reward)
        if not math.isfinite(reward):
            result.error = f"the model gives {reward}, no finite number"
    return results


# ---- worker processes


def _work(
    pipe: Any, number: int, threads: int, max_tokens: int, model: str, options: dict[str, Any]
) -> None:
    """One worker: loads the model, then answers windows until the pipe is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    import torch

    os.environ["LOCAL_RANK"] = str(number % max(1, torch.cuda.device_count()))
    torch.set_num_threads(threads)
    from rmega.scoring.scorer import load_scorer

    try:
        scorer = load_scorer(model, max_tokens=max_tokens, **options)
        pipe.send(
            ("ready", scorer.describe(), scorer.tokenizer.messages if scorer.tokenizer else [])
        )
        while True:
            pipe.send(("done", score_rows(scorer, pipe.recv())))
    except EOFError:
        return
    except (ValueError, OSError) as error:
        pipe.send(("error", str(error)))


class Workers:
    """Processes with a model each, to which windows are dealt out. A worker that dies ends the job
    with an error."""

    def __init__(self, count: int, model: str, *, max_tokens: int, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        threads = (
            max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
        )
        threads = min(threads, int(os.environ.get("OMP_NUM_THREADS") or threads))
        self._pipes, self._processes = [], []
        for number in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, number, threads, max_tokens, model, options),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        first = [self._receive(pipe) for pipe in self._pipes][0]
        self.info, self.messages = first[1], first[2]

    def _died(self, pipe: Any) -> ValueError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(5)
        return ValueError(
            f"--workers: worker {self._pipes.index(pipe) + 1} of {len(self._pipes)} ended with exit"
            f" code {process.exitcode} (out of memory?)"
        )

    def _send(self, pipe: Any, rows: list[ScorableRow]) -> None:
        try:
            pipe.send(rows)
        except OSError:
            raise self._died(pipe) from None

    def _receive(self, pipe: Any) -> tuple[Any, ...]:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._died(pipe) from None
        if answer[0] == "error":
            raise ValueError(answer[1])
        return answer

    def map(self, stream: Iterable[Window]) -> Iterator[tuple[Window, list[RowResult]]]:
        """Every window with its results, in order. A few windows are held at a time."""
        stream = iter(stream)
        held: deque[tuple[Window, list[list[RowResult]]]] = deque()
        boxes: dict[Any, list[list[RowResult]]] = {}
        ahead = next(stream, None)
        while ahead is not None or held:
            for pipe in self._pipes:
                if ahead is not None and pipe not in boxes and len(held) < 4 * len(self._pipes):
                    box: list[list[RowResult]] = []
                    boxes[pipe] = box
                    held.append((ahead, box))
                    self._send(pipe, ahead.rows)
                    ahead = next(stream, None)
            for pipe in wait(list(boxes)):
                boxes.pop(pipe).append(self._receive(pipe)[1])
            while held and held[0][1]:
                window, box = held.popleft()
                yield window, box[0]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.terminate()


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
                raise ValueError("--resume needs --output, the file to go on with")
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
                f"--output {path}: exists already; --resume goes on where it ends, --force"
                " replaces it"
            )
        elif partial.exists():
            raise ValueError(
                f"--output {path}: {partial} holds an interrupted run; --resume goes on with it,"
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
        self._file.write(text)
        self._file.flush()

    def finish(self) -> None:
        """Everything is written: give the file its name."""
        if self.path is not None:
            self._file.close()
            os.replace(self.partial, self.path)

    def close(self) -> None:
        """Leave a partial file for --resume; one without a line goes away."""
        if self.path is not None and not self._file.closed:
            self._file.close()
            if self.partial.stat().st_size == 0:
                self.partial.unlink()


class ScoringProgress:
    """A line that is rewritten on a terminal: rows, rate, share and ETA where the size of the input
    is known."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown and sys.stderr.isatty()
        self.start, self.first = time.monotonic(), None

    def show(self, rows: int, responses: int, done: float | None) -> None:
        """``rows`` and ``responses`` scored by this run; ``done`` the share of the input that is
        behind."""
        if not self.shown:
            return
        elapsed = max(time.monotonic() - self.start, 1e-9)
        text = f"scored {rows:,} rows, {responses / elapsed:,.1f} responses/s"
        if done is not None:
            from rmega.training.logs import duration

            if self.first is None:  # what --resume skipped took no time
                self.first = done if rows == 0 else 0.0
            share = (done - self.first) / max(1 - self.first, 1e-9)
            text += f", {done:.0%}" + (
                f", eta {duration(elapsed / share * (1 - share))}" if share > 0 else ""
            )
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
