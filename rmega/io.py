"""Whole-file writes, fsync, checksums, and how an error of another library is quoted."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name; an older one of that name goes only after the new one is in
    place."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name itself must survive a power cut
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(path: Path) -> list[int]:
    """[bytes, crc32] of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def checksum(path: str) -> str:
    """sha256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """What an error of another library says, short and without its line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def refuse_lfs_pointer(path: Path) -> None:
    """ValueError where a file is only Git LFS's pointer to it, as a clone without git-lfs leaves
    it. No file at all is fine."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return
    if pointer:
        raise ValueError(
            f"{path}: a Git LFS pointer, not the file itself; in its folder: git lfs pull"
        )
