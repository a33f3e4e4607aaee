"""Durable whole-file writes, checksums, and one-line error messages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def sync_folder(folder: Path | str) -> None:
    """Make the names in a folder durable: a new or renamed file survives a power cut only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path | str) -> None:
    """Make every file in a folder, and every name in it, durable."""
    for parent, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(parent)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Give an error that names no file, such as that of a full disk, the name of ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_text(flag: str, value: str) -> None:
    """ValueError where a name has bytes that are no UTF-8 text, which no JSON file can record."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} {value!r}: bytes that are no UTF-8 text in the name") from None


def check_writable(flag: str, folder: Path | str) -> None:
    """ValueError where ``folder`` cannot be made, or nothing can be written in it."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{flag}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: no permission to write in {nearest}")


def write_durably(path: Path | str, text: str) -> None:
    """Write a whole file: after a crash or a power cut it holds the old text or the new one.

    The text goes to ``PATH.partial`` first, which then takes the name of ``path``.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder, whose files are durable, its name. An older folder of that name is
    removed only after the new one is in place."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    replaces = final.exists()
    if replaces:
        os.replace(final, old)
    try:
        os.replace(partial, final)
    except OSError:
        if replaces:
            os.replace(old, final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def free_name(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3``, ...: the first name that is not taken."""
    free, number = path, 2
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever found under its own name: it is
    ``NAME.removing`` first."""
    doomed = folder.with_name(folder.name + ".removing")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def fingerprint(path: Path | str) -> list[int]:
    """[bytes, crc32] of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def json_checksum(content: Mapping[str, Any]) -> int:
    """crc32 of a JSON object without its field ``checksum``, in which a file can keep it."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    # Of the values as a reader of the file gets them: tuples are lists there, keys are text.
    return zlib.crc32(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode())


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from a file. ValueError names the file where it cannot be read, holds something
    else, or gives a key twice, of which every reader takes another one."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
        return found

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or one_line(error)}") from None
    except ValueError as error:  # no UTF-8, a key twice, a number of thousands of digits
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return content


def checksum(path: Path | str) -> str:
    """sha256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """What an error of another library says, short and without its line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def refuse_repeated(flag: str, names: Iterable[str]) -> None:
    """ValueError where a file is named twice, also by two paths."""
    seen: set[str] = set()
    for name in names:
        if (real := os.path.realpath(name)) in seen:
            raise ValueError(f"{flag} {name}: is named twice")
        seen.add(real)


def refuse_pointer(path: str | os.PathLike[str], flag: str = "") -> None:
    """ValueError where a file is only a pointer, as a clone without Git LFS (or git-annex) leaves
    it. No file at all is fine."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(200)
    except OSError:
        return
    where = f"{flag} {path}".strip()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(
            f"{where}: a Git LFS pointer, not the file itself; in its folder: git lfs pull"
        )
    if b"/annex/objects/" in head and len(head) < 200 and b"\n" not in head.rstrip(b"\n"):
        raise ValueError(f"{where}: a git-annex pointer, not the file itself; run: git annex get")
