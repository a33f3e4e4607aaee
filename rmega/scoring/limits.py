"""Limits of the server on requests, and reading a request's body within them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request

from rmega.scoring.bodies import Problem
from rmega.scoring.connections import MIN_VALUES, VALUES_PER_CONVERSATION, ValueCounter

MAX_BODIES = 8  # bodies of the largest size that may be arriving at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes."""

    max_body_bytes: int = 32 * 2**20
    max_conversations: int = 1024
    """Per request."""
    max_length: int | None = None
    """Tokens of a conversation; None: as in training, else the model's positions."""
    cut: bool = True
    """Cut what is longer, as in training, instead of refusing it; token ids are refused."""
    max_queue: int = 8192
    """Conversations that are waiting or being scored."""
    body_seconds: float = 60.0
    """Longest time that a body may take to arrive."""


class BodyReader:
    """Reads bodies no further than the limits on bytes, JSON values and time. ``retry_after``:
    seconds until there may be room for another."""

    def __init__(self, limits: Limits, retry_after: Callable[[], int]) -> None:
        self.limits, self.retry_after = limits, retry_after
        self.buffered = 0
        """Bytes of all bodies that are arriving."""

    async def read(self, request: Request) -> bytes:
        """The body of a request. Raises `Problem` where it goes beyond a limit."""
        limit = self.limits.max_body_bytes
        too_large = Problem(413, f"the body is larger than {limit:,} bytes")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        data, values = bytearray(), ValueCounter()
        most_values = max(MIN_VALUES, VALUES_PER_CONVERSATION * self.limits.max_conversations)

        async def read() -> None:
            async for part in request.stream():
                data.extend(part)
                self.buffered += len(part)
                if len(data) > limit:
                    raise too_large
                if values.add(part) > most_values:
                    raise Problem(
                        413,
                        f"the body has more than {most_values:,} JSON values; a request may have"
                        f" {self.limits.max_conversations:,} conversations",
                    )
                if self.buffered > MAX_BODIES * limit:
                    raise Problem(503, "too many large requests at once", self.retry_after())

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise Problem(
                408, f"the body took longer than {self.limits.body_seconds:g} s"
            ) from None
        except ClientDisconnect:
            raise Problem(400, "the client left") from None
        finally:
            self.buffered -= len(data)
        return bytes(data)
