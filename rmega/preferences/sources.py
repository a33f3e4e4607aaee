"""Read inputs in chunks, never whole: local files, hub datasets.

A chunk is what one worker takes at a time. Its borders depend on the input alone, so the output
does not depend on the number of workers. Decoding a chunk into rows is the worker's work
(`decode`); cutting it is the reader's.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from rmega.hub import one_line_for_retries
from rmega.io import checksum, one_line
from rmega.preferences.chunks import CHUNK_ROWS, Chunk, Item
from rmega.preferences.json_files import as_item, decode_line, json_chunks, line_chunks
from rmega.preferences.resolve import Input
from rmega.preferences.tables import arrow_chunks, csv_chunks, decode_batch


class HashingFile(io.RawIOBase):
    """A file that is read once from its beginning, with the sha256 of what was read."""

    def __init__(self, path: str) -> None:
        self._stream: BinaryIO = open(path, "rb")
        self.position = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num = self._stream.readinto(buffer)
        self.digest.update(memoryview(buffer)[:num])
        self.position += num
        return num

    def close(self) -> None:
        self._stream.close()
        super().close()


def read_chunks(source: Input, index: int, hashes: dict[str, str] | None = None) -> Iterator[Chunk]:
    """The chunks of one input. ``hashes`` gets the sha256 of the file once it was read to its
    end."""
    if source.kind == "hub":
        yield from _hub_chunks(source, index)
    elif source.kind == "modelscope":
        yield from _modelscope_chunks(source, index)
    elif source.kind in ("parquet", "arrow"):
        yield from arrow_chunks(source, index)
        if hashes is not None:
            hashes[source.name] = checksum(source.name)
    else:
        raw = HashingFile(source.name)
        buffered = io.BufferedReader(raw, 1 << 18)
        try:
            yield from _stream_chunks(source, index, raw, buffered)
            if hashes is not None:
                hashes[source.name] = raw.digest.hexdigest()
        finally:
            buffered.close()


def _stream_chunks(source: Input, index: int, raw: HashingFile, buffered: Any) -> Iterator[Chunk]:
    stream = buffered
    if source.compression == "gzip":
        stream = gzip.GzipFile(fileobj=stream)
    elif source.compression == "zstd":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
    cut = {"csv": csv_chunks, "json": json_chunks}.get(source.kind, line_chunks)
    last = 0
    try:
        for chunk in cut(source, index, stream):
            last = chunk.first
            chunk.position = raw.position
            yield chunk
        while buffered.read(1 << 20):  # what a reader leaves unread is part of the hash
            pass
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ValueError(
            f"{source.name}: {source.compression or 'the file'} cannot be read on after"
            f" {source.unit} {last} ({one_line(error)}): cut short or damaged"
        ) from None


def _hub_chunks(source: Input, index: int) -> Iterator[Chunk]:
    from datasets import load_dataset

    name, _, config = source.name.partition(":")
    split = source.split or "train"
    try:
        with one_line_for_retries():
            rows = load_dataset(
                name, config or None, split=split, revision=source.revision, streaming=True
            )
        yield from _dict_chunks(index, iter(rows))
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f"{source.name}: no such file here, and as the name of a hub data set (split {split})"
            f" it cannot be read ({one_line(error)})"
        ) from None


def _modelscope_chunks(source: Input, index: int) -> Iterator[Chunk]:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise ValueError(
            f"modelscope:{source.name}: needs the package modelscope (pip install modelscope)"
        ) from None
    name, _, config = source.name.partition(":")
    try:
        rows = MsDataset.load(
            name,
            subset_name=config or None,
            split=source.split or "train",
            version=source.revision or "master",
            use_streaming=True,
        )
        yield from _dict_chunks(index, iter(rows))
    except Exception as error:
        raise ValueError(f"modelscope:{source.name}: cannot be read ({one_line(error)})") from None


def _dict_chunks(index: int, rows: Iterator[dict[str, Any]]) -> Iterator[Chunk]:
    items: list[Item] = []
    for number, row in enumerate(rows, 1):
        items.append(as_item(number, dict(row)))
        if len(items) == CHUNK_ROWS:
            yield Chunk(index, items[0][0], items)
            items = []
    if items:
        yield Chunk(index, items[0][0], items)


# ---- decoding


def decode(chunk: Chunk) -> Iterator[Item]:
    """The rows of a chunk. Blank lines are no rows."""
    if isinstance(chunk.payload, bytes):
        for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first):
            if line and not line.isspace():
                yield decode_line(number, line)
    elif isinstance(chunk.payload, list):
        yield from chunk.payload
    else:
        yield from decode_batch(chunk)


def group_rows(chunks: Iterator[Chunk], column: str) -> Iterator[Chunk]:
    """Chunks whose items are ``{"rows": [...]}``: adjacent rows with the same value in
    ``column``."""
    group: list[dict[str, Any]] = []
    first = 0
    last: Chunk | None = None
    for chunk in chunks:
        items: list[Item] = []
        for number, row, raw in decode(chunk):
            same = group and isinstance(row, dict) and row.get(column) == group[0].get(column)
            if group and not same:
                items.append((first, {"rows": group}, ""))
                group = []
            if isinstance(row, dict):
                if not group:
                    first = number
                group.append(row)
            else:
                items.append((number, row, raw))
        yield Chunk(chunk.input_index, chunk.first, items, chunk.num_bytes, chunk.position)
        last = chunk
    if group and last is not None:
        yield Chunk(last.input_index, first, [(first, {"rows": group}, "")], 0, last.position)
