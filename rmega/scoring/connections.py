"""Limits of the server on connections, headers and request bodies.

uvicorn limits neither the number of open connections nor the time that the headers of a request
take, so a few thousand silent sockets would keep every other client out. Here a connection without
a request has a deadline, and the one that has been silent for longest makes room for a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

DEFAULT_CONNECTIONS = 4096
SPARE_FILES = 128  # open files of the process besides its connections
MAX_HEADER_BYTES = 16 * 1024
VALUES_PER_CONVERSATION = 256
"""JSON values in a body for each conversation that a request may have: messages of two values each,
their names, tools."""
MIN_VALUES = 2**17  # so many are parsed in any case: it takes a tenth of a second


def allowed_connections(wanted: int | None) -> int:
    """How many connections the limit on open files allows, raised as far as the system lets it.

    ``wanted`` None: at most ``DEFAULT_CONNECTIONS``. ValueError where a named number is too large.
    """
    number = DEFAULT_CONNECTIONS if wanted is None else wanted
    try:
        import resource
    except ImportError:  # not on Windows
        return number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number + SPARE_FILES:
        most = number + SPARE_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = max(1, soft - SPARE_FILES)
        if wanted is not None and room < wanted:
            raise ValueError(
                f"--max-connections {wanted}: the limit on open files (ulimit -n {soft}) allows"
                f" {room:,}"
            )
        number = min(number, room)
    return number


class ConnectionPool:
    """The open connections of a server and the limits that they share."""

    def __init__(self, max_connections: int, header_seconds: float) -> None:
        self.max_connections, self.header_seconds = max_connections, header_seconds
        self.open: set[LimitedConnection] = set()
        self.waiting: dict[LimitedConnection, None] = {}
        """Connections without a request, the longest waiting first."""
        self.num_closed = 0
        """Connections closed for being silent, too many or too slow."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, connection: LimitedConnection) -> bool:
        """Take a new connection, closing another where there are too many; False if it is the one
        to be refused because all others have a request in progress."""
        self._loop = connection.loop
        if len(self.open) >= self.max_connections:
            # then those whose body is still arriving, in no order: it is a rare case
            receiving = (c for c in self.open if c.cycle is not None and c.cycle.more_body)
            oldest = next(iter(self.waiting), None) or next(receiving, None)
            self.num_closed += 1
            if oldest is None:
                return False
            self.remove(oldest)
            oldest.transport.abort()
        self.open.add(connection)
        return True

    def remove(self, connection: LimitedConnection) -> None:
        """Forget a connection that is closed."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)

    def close_all(self) -> None:
        """Drop every connection, from any thread."""

        def abort() -> None:
            for connection in list(self.open):
                connection.transport.abort()

        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: so are they
                self._loop.call_soon_threadsafe(abort)


class LimitedConnection(H11Protocol):
    """uvicorn's connection with a deadline for the headers of each request."""

    def __init__(self, *args: Any, pool: ConnectionPool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool = pool
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.pool.add(self):
            self._wait_for_request()
        else:
            self._end(b"503 Service Unavailable", b"Retry-After: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.remove(self)
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        if not self.transport.is_closing():
            self._wait_for_request()
        super().on_response_complete()  # may find the next request in what was received already

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._end()

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self.pool.waiting[self] = None
        self._deadline = self.loop.call_later(self.pool.header_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        self.pool.waiting.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self.pool.num_closed += 1
        if self.cycle is None and self.conn.trailing_data[0]:
            self._end(b"408 Request Timeout")
        else:
            self._end()

    def _end(self, status: bytes | None = None, header: bytes = b"") -> None:
        """Close; a client that does not read what was sent is dropped after a grace period."""
        if self.transport.is_closing():
            return
        if status is not None:
            self.transport.write(
                b"HTTP/1.1 %b\r\n%bConnection: close\r\nContent-Length: 0\r\n\r\n"
                % (status, header)
            )
        self.transport.close()
        self.loop.call_later(self.pool.header_seconds, self.transport.abort)


class ValueCounter:
    """Counts the JSON values of a body while it arrives, so that a body of millions of tiny values
    is refused before it is parsed (31 MiB of them become 0.9 GB of Python objects).

    Counts what separates values outside strings (``[``, ``{``, ``,`` and ``:``): no fewer than
    there are values but for the first. Text that is not JSON gets some number.
    """

    def __init__(self) -> None:
        self.num_values = 0
        self._inside = False  # a string
        self._carry = b""  # a backslash whose partner is in the next part

    def add(self, part: bytes) -> int:
        """Count the values that begin in the next part; returns the number so far."""
        data = self._carry + part
        backslashes = len(data) - len(data.rstrip(b"\\"))
        self._carry = b"\\" if backslashes % 2 else b""
        if self._carry:
            data = data[:-1]
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = data.split(b'"')
        outside = b"".join(pieces[self._inside :: 2])
        self.num_values += sum(map(outside.count, (b"[", b"{", b",", b":")))
        self._inside ^= len(pieces) % 2 == 0
        return self.num_values
