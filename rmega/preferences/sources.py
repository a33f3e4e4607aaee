"""Read inputs in chunks, never whole: local files, hub datasets.

A chunk is what one worker takes at a time. Its borders depend on the input alone, so the output
does not depend on the number of workers. Decoding a chunk into rows is the worker's work
(`decode`); cutting it is the reader's.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from rmega.hub import one_line_for_retries
from rmega.io import checksum, one_line
from rmega.preferences.chunks import CHUNK_BYTES, CHUNK_ROWS, MAX_ROW_BYTES, Chunk, Item
from rmega.preferences.comparison import Rejected
from rmega.preferences.resolve import Input, resolve
from rmega.preferences.tables import arrow_chunks, csv_chunks, decode_batch

__all__ = ["Chunk", "Input", "Item", "decode", "group_rows", "read_chunks", "resolve"]

MAX_DEPTH = 100


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
    cut = {"csv": csv_chunks, "json": _json_chunks}.get(source.kind, _line_chunks)
    last = 0
    try:
        for chunk in cut(source, index, stream):
            last = chunk.first
            chunk.position = raw.position
            yield chunk
        while buffered.read(1 << 20):  # what a reader leaves behind counts for the hash
            pass
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ValueError(
            f"{source.name}: {source.compression or 'the file'} cannot be read on after"
            f" {source.unit} {last} ({one_line(error)}): cut short or damaged"
        ) from None


def _line_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    line, rest = 1, b""
    block = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
    if source.kind == "lines" and _is_one_value(block):
        yield from _json_chunks(source, index, io.BytesIO(block + stream.read()))
        return
    while True:
        end = block.rfind(b"\n") + 1
        if end == 0 and block:
            if len(rest) <= MAX_ROW_BYTES:
                rest += block  # else the row is rejected as too large; its end is enough of it
        else:
            data = rest + block[:end]
            rest = block[end:]
            if data:
                yield Chunk(index, line, data, len(data))
                line += data.count(b"\n")
            if not block:
                return
        block = stream.read(CHUNK_BYTES)


def _is_one_value(block: bytes) -> bool:
    """Whether a file under the name of JSON lines begins like one list, or one object over several
    lines; or is an object of columns."""
    first, _, rest = block.lstrip().partition(b"\n")
    if first.startswith(b"[") or first.strip() == b"{":
        return True
    if not first.startswith(b"{") or rest.strip() or len(block) >= CHUNK_BYTES:
        return False
    try:
        return isinstance(rows_of(json.loads(first)), list)
    except (ValueError, RecursionError):
        return False


def _json_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    data = stream.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # JSON lines under the name of JSON; as that kind, whose lines are not taken for one value
        if source.kind == "lines" or (
            isinstance(error, json.JSONDecodeError)
            and _is_json_object(error.doc.lstrip().split("\n", 1)[0])
        ):
            yield from _line_chunks(replace(source, kind="json"), index, io.BytesIO(data))
            return
        if isinstance(error, UnicodeDecodeError):
            problem = f": byte {error.start} is not UTF-8"
        elif isinstance(error, RecursionError):
            problem = ": nested too deeply to be read"
        else:
            problem = f":{getattr(error, 'lineno', 0)}: broken JSON ({one_line(error)})"
        raise ValueError(source.name + problem) from None
    rows = value if isinstance(value, list) else rows_of(value)
    if rows is None and isinstance(value, dict):
        rows = [value]
    if not rows:
        raise ValueError(f"{source.name}: no rows: expected a list of objects")
    yield from _item_chunks(index, rows, len(data) // len(rows))


def rows_of(value: Any) -> list[Any] | None:
    """The rows of an object that holds them: as its one list of objects, by column (also as pandas
    writes them, and its index and split forms); None of an object that is a row itself."""
    if not isinstance(value, dict) or not value:
        return None
    columns = list(value.values())
    lists = [v for v in columns if isinstance(v, list) and v and all(map(_is_object, v))]
    if len(lists) == 1 and _ROW_COLUMNS.isdisjoint(value):
        return lists[0]
    if value.keys() >= {"columns", "data"} and isinstance(value["data"], list):
        if all(isinstance(row, list) for row in value["data"]):
            return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    if all(map(_is_object, columns)) and columns[0]:
        if all(str(key).isdecimal() for key in value):
            return columns
        numbers = columns[0].keys()
        if all(str(n).isdecimal() for n in numbers) and all(c.keys() == numbers for c in columns):
            columns = [list(column.values()) for column in columns]
    sizes = {len(column) if isinstance(column, list) else -1 for column in columns}
    objects = any(isinstance(c, list) and c and _is_object(c[0]) for c in columns)
    if len(columns) > 1 and len(sizes) == 1 and min(sizes) > 0 and not objects:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


_ROW_COLUMNS = frozenset({"chosen", "rejected", "responses", "conversations", "answers", "prompt"})


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _item_chunks(index: int, rows: list[Any], row_bytes: int) -> Iterator[Chunk]:
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        yield Chunk(
            index,
            start + 1,
            [_as_item(number, row) for number, row in enumerate(part, start + 1)],
            row_bytes * len(part),
        )


def _as_item(number: int, row: Any) -> Item:
    if isinstance(row, dict):
        if _deeper_than(row, MAX_DEPTH):  # it could not be sent to a worker
            return number, Rejected("too_deep"), ""
        return number, row, ""
    return number, Rejected("broken_row", f"{type(row).__name__}, not an object"), str(row)[:2000]


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            v
            for x in level
            if isinstance(x, (dict, list))
            for v in (x.values() if isinstance(x, dict) else x)
        ]
        if not level:
            return False
    return True


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
        items.append(_as_item(number, dict(row)))
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
                yield _decode_line(number, line)
    elif isinstance(chunk.payload, list):
        yield from chunk.payload
    else:
        yield from decode_batch(chunk)


def _decode_line(number: int, line: bytes) -> Item:
    if len(line) > MAX_ROW_BYTES:
        return number, Rejected("broken_row", f"longer than {MAX_ROW_BYTES >> 20} MiB"), ""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return number, Rejected("not_utf8", f"byte {error.start + 1} of the line"), _raw(line)
    except RecursionError:
        return number, Rejected("too_deep"), _raw(line)
    except ValueError as error:
        return number, Rejected("broken_row", one_line(error)), _raw(line)
    if not isinstance(row, dict):
        return number, Rejected("broken_row", f"{type(row).__name__}, not an object"), _raw(line)
    return number, row, ""


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


def _raw(line: bytes) -> str:
    return line[:2000].decode("utf-8", "backslashreplace")
