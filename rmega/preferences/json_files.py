"""Chunks of JSON and JSON-lines files; each is also read under the other's name."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rmega.io import one_line
from rmega.preferences.chunks import CHUNK_BYTES, CHUNK_ROWS, MAX_ROW_BYTES, Chunk, Item
from rmega.preferences.comparison import Rejected
from rmega.preferences.resolve import Input

MAX_DEPTH = 100


def line_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    """Blocks of whole lines, not decoded."""
    line, rest = 1, b""
    block = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
    if source.kind == "lines" and _is_one_value(block):
        yield from json_chunks(source, index, io.BytesIO(block + stream.read()))
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


def json_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    """Rows of a file that is one JSON value; ValueError where there are none."""
    data = stream.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # JSON lines under the name of JSON; as that kind, whose lines are not taken for one value
        if source.kind == "lines" or (
            isinstance(error, json.JSONDecodeError)
            and _is_json_object(error.doc.lstrip().split("\n", 1)[0])
        ):
            yield from line_chunks(replace(source, kind="json"), index, io.BytesIO(data))
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
            [as_item(number, row) for number, row in enumerate(part, start + 1)],
            row_bytes * len(part),
        )


def as_item(number: int, row: Any) -> Item:
    """A decoded value as a row, or rejected."""
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


def decode_line(number: int, line: bytes) -> Item:
    """One line as a row, or rejected."""
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


def _raw(line: bytes) -> str:
    return line[:2000].decode("utf-8", "backslashreplace")
