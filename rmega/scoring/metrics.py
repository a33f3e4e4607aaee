"""Prometheus metrics of the server: requests, queue, batches, latency."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from rmega.scoring.queue import ScoringQueue

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = tuple(2**n for n in range(11))  # conversations
TOKENS = tuple(2**n for n in range(6, 18))


class Metrics:
    """The metrics of one server; ``text`` is what GET /metrics answers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queue: ScoringQueue) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rmega_requests", "Answered requests", ["endpoint", "status"], registry=registry
        )
        self._latency = Histogram(
            "rmega_request_seconds",
            "Time from the headers of a request to its answer",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        waiting = Gauge(
            "rmega_queue_conversations", "Conversations that wait for a batch", registry=registry
        )
        waiting.set_function(lambda: len(queue))
        tokens = Gauge("rmega_queue_tokens", "Tokens that wait for a batch", registry=registry)
        tokens.set_function(lambda: queue.waiting_tokens)
        self._batch = {
            what: Histogram(f"rmega_batch_{what}", text, buckets=buckets, registry=registry)
            for what, text, buckets in (
                ("conversations", "Conversations of a batch", SIZES),
                ("tokens", "Tokens of a batch, shared beginnings counted each time", TOKENS),
                ("seconds", "Time to score a batch", SECONDS),
            )
        }
        queue.on_batch = self._note_batch

    def _note_batch(self, conversations: int, tokens: int, seconds: float) -> None:
        self._batch["conversations"].observe(conversations)
        self._batch["tokens"].observe(tokens)
        self._batch["seconds"].observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def wrap(self, app: Any, endpoints: set[str]) -> Any:
        """An ASGI application that counts and times the requests of another. Paths that are not
        among ``endpoints`` count as "other", so that a client cannot make up labels."""

        async def measured(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            endpoint = scope["path"] if scope["path"] in endpoints else "other"
            start, status = time.monotonic(), 0

            async def noted(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:  # 499, as nginx: the client left before the answer
                self._requests.labels(endpoint, str(status or 499)).inc()
                self._latency.labels(endpoint).observe(time.monotonic() - start)

        return measured
