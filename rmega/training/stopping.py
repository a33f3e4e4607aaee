"""Stop requests from signals, a time limit or a failed rank; exit codes.

Imports no torch before it is needed: a program can wrap itself in ``run_ranks`` and still answer
--help at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_REQUEUE = 75
"""EX_TEMPFAIL: stopped early with everything saved; start again to resume."""

GRACE_SECONDS = 5.0
"""How long a rank that only lost its peers waits to be killed, before it reports that itself."""

# Errors of gloo, NCCL and the store on a rank whose peer is gone. Such a rank has no error of its
# own to report.
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "NCCL",
    "TCPStore",
    "Socket Timeout",
    "wait timeout",
    "failed to recv",
    "Connection refused",
    "DistStoreError",
)
_TIMEOUTS = ("Timed out waiting", "timeout", "Timeout")


class StopRequest:
    """Requests to stop early: a signal (SIGTERM, SIGUSR1, SIGINT) or the end of the allotted time.

    Signals are noted when they come and acted on between steps, by all ranks together: each rank's
    requests travel with the sums of a step. One that comes after a step's backward pass is acted on
    after the next step. A second SIGINT ends at once; two within ``SAME_KEY`` seconds are one,
    because torchrun passes on what the terminal has already sent to all.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    SAME_KEY = 1.5
    noted = 0
    """The signal that this process has been sent, if any."""

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._minutes = minutes
        self._interrupted = 0.0
        StopRequest.noted = 0
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted and now - self._interrupted > self.SAME_KEY:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        StopRequest.noted = number

    def requests(self) -> list[float]:
        """This rank's requests: 1 for the one of SIGNALS that was noted, and for the deadline."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return [*(float(StopRequest.noted == number) for number in self.SIGNALS), float(late)]

    def reason(self, requests: list[float]) -> str | None:
        """Why all ranks stop now, or None, by the sums of their requests: one rank's is enough."""
        *signals, late = requests
        for number, count in zip(self.SIGNALS, signals, strict=True):
            if count:
                return f"signal {number.name}"
        return f"--exit-duration-min {self._minutes} is over" if late else None

    def agreed(self, device) -> str | None:
        """Why all ranks stop now, or None; asks all ranks."""
        import torch

        requests = torch.tensor(self.requests(), device=device)
        torch.distributed.all_reduce(requests)
        return self.reason(requests.tolist())


def run_ranks(main: Callable[..., Any], *args: Any) -> int:
    """Call ``main`` on this rank and return its exit code; an error becomes one line, printed once.

    - A user's error (``ValueError``, ``OSError``) that every rank finds is printed by rank 0 alone:
      ``error: ...``, exit code 2. One that only some other rank finds is printed by that rank, with
      its number and machine.
    - Any other error keeps its traceback, with one line after it; exit code 1.
    - A rank that only lost its peers gives its launcher a moment to kill it, and otherwise reports
      that in one line.

    The line also goes to torchrun's error file, so that torchrun's own report shows it as the root
    cause.
    """
    try:
        return int(main(*args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        code = _report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # without the ranks that are gone, an orderly end would wait for them
    return code


def _report(error: Exception) -> int:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    user = isinstance(error, (ValueError, OSError)) and not isinstance(error, ConnectionError)
    text = str(error).strip() or type(error).__name__
    echo = not user and ranks > 1 and any(mark in text for mark in (*_ECHOES, *_TIMEOUTS))
    if echo:
        slow = any(mark in text for mark in _TIMEOUTS) and "Connection" not in text
        what = (
            "no answer from another rank within --distributed-timeout-minutes"
            if slow
            else "lost the connection to another rank, whose own reason stands above if it had one"
        )
        text = f"{what} ({text.splitlines()[0][:200]})"
    if ranks > 1 and (echo or (user and rank > 0)):
        if StopRequest.noted:
            return 1  # the launcher is ending this rank because of another
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
    if not user and not echo:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}"
    line = (
        f"error: {text}"
        if rank == 0 and user or ranks == 1
        else f"error: rank {rank} on {socket.gethostname()}: {text}"
    )
    print(line, file=sys.stderr, flush=True)
    _write_error_file(line)
    return 2 if user else 1


def _write_error_file(line: str) -> None:
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        content = {"message": {"message": line, "extraInfo": extra}}
        with contextlib.suppress(OSError):  # the line has been printed
            Path(path).write_text(json.dumps(content), encoding="utf-8")
