"""One scoring thread behind a queue; concurrent requests share a batch.

The model is loaded, and every forward pass is run, in that one thread. Sequences wait in the order
of their arrival, so a small request waits for one pack at most, also behind a large one.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


class Abandoned(Exception):
    """The server stopped before this request was scored."""


class Job:
    """The sequences of one request and the future that gets their rewards (a list of floats, in
    order)."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.rewards: list[float | None] = [None] * len(sequences)
        self.missing = len(sequences)
        self.future: Future[list[float]] = Future()
        # A client that left cancels it, and a server that stops fails it, in other threads.
        self._unless_done = contextlib.suppress(InvalidStateError)

    def put(self, index: int, reward: float) -> None:
        self.rewards[index] = reward
        self.missing -= 1
        if self.missing == 0:
            with self._unless_done:
                self.future.set_result(self.rewards)

    def fail(self, error: Exception) -> None:
        with self._unless_done:
            self.future.set_exception(error)


class ScoringQueue:
    """``load`` makes the scorer (``rmega.scoring.scorer.Scorer``) in the scoring thread; ``submit``
    may be called by any thread.

    A batch is what came within ``wait`` seconds after the first sequence, up to ``max_tokens``
    tokens.
    """

    def __init__(self, load: Callable[[], Any], *, max_tokens: int, wait: float) -> None:
        self._load, self._max_tokens, self._wait = load, max_tokens, wait
        self._on_failure: Callable[[], None] | None = None
        self.on_batch: Callable[[int, int, float], None] | None = None
        """Called in the scoring thread with (sequences, tokens, seconds) of each batch."""
        self._waiting: deque[tuple[Job, int, Sequence[int]]] = deque()
        self._change = threading.Condition()
        self._batch: list[tuple[Job, int, Sequence[int]]] = []
        self._closing = False
        self.abandoned = False
        """Whether requests were given up because the server had to stop."""
        self.scorer: Any = None
        """None while it is loading."""
        self.failure: Exception | None = None
        """Why the model could not be loaded."""
        self.waiting_tokens = 0
        self.num_batches = self.num_scored = self.num_tokens = 0
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    def start(self, on_failure: Callable[[], None] | None = None) -> None:
        """Begin to load the model; ``on_failure`` is called (in the scoring thread) if it cannot be
        loaded."""
        self._on_failure = on_failure
        self._thread.start()

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """Queue the token sequences of one request."""
        job = Job(sequences)
        if not sequences:
            job.future.set_result([])
            return job.future
        with self._change:
            if self._closing:
                raise Abandoned
            self._waiting.extend((job, i, s) for i, s in enumerate(sequences))
            self.waiting_tokens += sum(map(len, sequences))
            self._change.notify()
        return job.future

    def seconds_to_wait(self) -> int:
        """Whole seconds until what waits now should be scored, by the rate so far; at least 1."""
        if not self.num_tokens:
            return 1
        return max(
            1, min(600, math.ceil(self.waiting_tokens * self.busy_seconds / self.num_tokens))
        )

    def abandon(self) -> None:
        """Fail every request that has not been scored with ``Abandoned``; from any thread."""
        with self._change:
            self._closing = True
            jobs = {id(job): job for job, _, _ in [*self._batch, *self._waiting]}
            self._waiting.clear()
            self.waiting_tokens = 0
            self.abandoned = True
            self._change.notify()
        for job in jobs.values():
            job.fail(Abandoned())

    def close(self) -> None:
        """Score what waits, then end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the scoring thread

    def _run(self) -> None:
        try:
            self.scorer = self._load()
        except Exception as error:  # the program ends with it
            self.failure = error
            if self._on_failure:
                self._on_failure()
            return
        while batch := self._next():
            self._score(batch)

    def _next(self) -> list[tuple[Job, int, Sequence[int]]]:
        with self._change:
            while not self._waiting and not self._closing:
                self._change.wait()
            end = time.monotonic() + self._wait
            while not self._closing and self._waiting and self.waiting_tokens < self._max_tokens:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._change.wait(left)
            batch, tokens = [], 0
            while self._waiting and (
                not batch or tokens + len(self._waiting[0][2]) <= self._max_tokens
            ):
                batch.append(self._waiting.popleft())
                tokens += len(batch[-1][2])
            self.waiting_tokens -= tokens
            self._batch = batch
            return batch

    def _score(self, batch: list[tuple[Job, int, Sequence[int]]]) -> None:
        start = time.monotonic()
        try:
            rewards = self.scorer.score_sequences([s for _, _, s in batch])
        except Exception as error:  # such as out of memory: these requests fail, no others
            for job in {id(job): job for job, _, _ in batch}.values():
                job.fail(error)
            return
        seconds, tokens = time.monotonic() - start, sum(len(s) for _, _, s in batch)
        self.busy_seconds += seconds
        self.num_batches += 1
        self.num_scored += len(batch)
        self.num_tokens += tokens
        if self.on_batch:
            self.on_batch(len(batch), tokens, seconds)
        for (job, index, _), reward in zip(batch, rewards, strict=True):
            if math.isfinite(reward):
                job.put(index, reward)
            else:
                job.fail(ArithmeticError(f"the model gives {reward}, no finite number"))
