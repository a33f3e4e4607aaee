"""A lock per run folder, which names the process that holds it.

The kernel's lock on that file (flock) ends with its process, however that ends. NFS passes it on to
other machines, some file systems keep it to one machine and a few have none. So the file also says
who holds it (host, process, start), and its holder renews its time stamp every ``BEAT`` seconds: a
file that another machine wrote counts as held until that stamp has stood still for ``STALE``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rmega.distributed import from_rank_0, log

NAME = "run.lock"
BEAT = 10.0
STALE = 3.5 * BEAT
PATIENCE = 60.0
"""How long a run waits for another to end, as one that a queue has started again has to."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


@contextlib.contextmanager
def hold(run: Path | str | None, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if need be, inside ``with``; called by every
    rank, rank 0 acts. No folder: nothing to hold. ValueError on every rank names the process that
    kept it for ``patience`` seconds."""
    if run is None:
        yield
        return
    lock = RunLock(run, patience)

    def acquire() -> bool | str:
        try:
            return lock.acquire(1.0)
        except (OSError, ValueError) as error:
            return str(error)

    while (outcome := from_rank_0(acquire)) is False:
        pass  # a second at a time, so that no rank waits long in a collective
    if outcome is not True:
        raise ValueError(outcome)
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """The lock of one run folder. ``acquire`` takes it, ``release`` gives it back."""

    def __init__(self, run: Path | str, patience: float = PATIENCE) -> None:
        self.run, self.path, self.patience = Path(run), Path(run, NAME), patience
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._released = threading.Event()
        self._watch = _Watch()
        self._waiting_since: float | None = None

    def acquire(self, seconds: float | None = None) -> bool:
        """Take the lock; False where another run has kept it for these ``seconds`` (None: until
        patience ends). Raises ValueError, naming the holder, at the end of patience."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
            if not self._try():
                holder = _describe(self._watch.holder)
                log(f"waiting for another run in {self.run} to end ({holder})")
        begun = time.monotonic()
        while self._descriptor is None and not self._try():
            now = time.monotonic()
            if now - self._waiting_since >= self.patience:
                self._remove_folder()
                raise ValueError(
                    f"--save {self.run}: in use by another run ({_describe(self._watch.holder)});"
                    f" waited {self.patience:.0f} s for it to end"
                )
            if seconds is not None and now - begun >= seconds:
                return False
            time.sleep(0.2)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._descriptor is None:
            return
        self._released.set()
        # The name goes before the kernel's lock: who waits for that sees that the file is gone.
        with contextlib.suppress(OSError):
            if _same_file(self._descriptor, self.path):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        self._remove_folder()

    def _try(self) -> bool:
        self._make_folder()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that never used the folder has just removed it
            return False
        try:
            supported = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._watch.look(descriptor)
                return False
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                supported = False
            if not _same_file(descriptor, self.path):  # released and removed in between
                return False
            self._watch.look(descriptor)
            if not self._watch.is_free(kernel_lock=supported):
                return False
            own = _own_entry()
            _write(descriptor, own)
            if not supported:  # two may have found it free: the later entry stays
                time.sleep(1.0)
                if _read(self.path) != own:
                    return False
            self._descriptor, descriptor = descriptor, -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _make_folder(self) -> None:
        folder = self.run
        while not folder.exists():
            self._made.append(folder)
            folder = folder.parent
        self.run.mkdir(parents=True, exist_ok=True)

    def _remove_folder(self) -> None:
        """Folders that ``acquire`` made and that nobody used."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


class _Watch:
    """What is known of the current holder, and since when its time stamp has stood still."""

    def __init__(self) -> None:
        self.holder: dict[str, Any] = {}
        self._stamp: tuple | None = None
        self._since = time.monotonic()

    def look(self, descriptor: int) -> None:
        """Read the lock file again (opened anew each time, or NFS would answer from its cache)."""
        self.holder, status = _read(descriptor), os.fstat(descriptor)
        stamp = (status.st_ino, status.st_mtime_ns)
        if stamp != self._stamp:
            self._stamp, self._since = stamp, time.monotonic()

    def is_free(self, *, kernel_lock: bool) -> bool:
        """Whether the holder is gone. ``kernel_lock``: this process has just been given the
        kernel's lock."""
        if not self.holder:
            return True
        if self.holder.get("host") == socket.gethostname():
            return kernel_lock or self.holder.get("start") != _start_of(self.holder.get("pid"))
        return time.monotonic() - self._since >= STALE


def _own_entry() -> dict[str, Any]:
    entry = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if "SLURM_JOB_ID" in os.environ:
        entry["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return entry


def _start_of(pid: Any) -> str | None:
    """When a process of this machine was started (clock ticks since boot), which tells it from a
    later one of the same number; None where there is none."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError, ValueError):
        return None
    return text.rpartition(")")[2].split()[19]


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "which has only begun"
    job = f", Slurm job {holder['slurm_job']}" if "slurm_job" in holder else ""
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}{job}"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write(descriptor: int, entry: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(entry).encode(), 0)
    os.fsync(descriptor)


def _read(source: Path | int) -> dict[str, Any]:
    """The entry of a lock file; {} where there is none, or half of one."""
    try:
        if isinstance(source, int):
            entry = json.loads(os.pread(source, 4096, 0))
        else:
            entry = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}
