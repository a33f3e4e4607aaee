"""Where rows come from: local files of any common kind, folders, globs, the hubs; read in chunks, never whole.

A chunk is what one worker takes at a time. Its borders depend on the input alone, so the output does not depend on the
number of workers. Decoding a chunk into rows is the worker's work (`decode`); cutting it is the reader's.
"""

from __future__ import annotations

import ast
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rmega.data.indexed import checksum
from rmega.data.records import Rejected

CHUNK_BYTES = 1 << 19
CHUNK_ROWS = 256
MAX_ROW_BYTES = 1 << 26
MAX_DEPTH = 100

_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
          ".arrow": "arrow", ".feather": "arrow"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SPLITS = {"train": "train", "test": "test", "valid": "validation", "validation": "validation", "val": "validation",
           "dev": "validation", "eval": "validation"}

Item = tuple[int, "dict[str, Any] | Rejected", str]
"""(line or row number from 1, the row or why it is none, its raw text where it is none)."""


@dataclass(frozen=True)
class Input:
    """One file, or one data set of a hub."""

    name: str
    """For messages: the path or the hub's name."""
    label: str
    """The default name of its rows' source."""
    kind: str
    """lines, json, csv, parquet, arrow, hub or modelscope."""
    compression: str | None = None
    num_bytes: int = 0
    """Size on disk, 0 if unknown."""
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None

    @property
    def unit(self) -> str:
        return "line" if self.kind in ("lines", "csv") else "row"

    def identity(self) -> list[Any]:
        """Changes when the file does (for --resume)."""
        if not os.path.exists(self.name):
            return [self.name, self.split, self.revision]
        stat = os.stat(self.name)
        return [self.name, stat.st_size, stat.st_mtime_ns]


@dataclass
class Chunk:
    """A piece of an input: ``payload`` is bytes of whole lines, a pyarrow batch, or a list of items."""

    input_index: int
    first: int
    """Number of the first line or row, from 1."""
    payload: Any
    num_bytes: int = 0
    """Bytes of text, roughly, for the rate."""
    position: int = 0
    """Bytes of the file read so far, for the progress."""
    csv_header: list[str] | None = field(default=None)


def resolve(specs: list[str], *, split: str | None = None, revision: str | None = None,
            weights: list[float] | None = None, flag: str = "--input") -> list[Input]:
    """Paths, globs, folders, hub names (``org/name[:config]``, ``modelscope:org/name``) -> inputs, in order."""
    if weights is not None and len(weights) != len(specs):
        raise ValueError(f"--weights: {len(weights)} given for {len(specs)} values of {flag}")
    inputs: list[Input] = []
    for spec, weight in zip(specs, weights or [1.0] * len(specs), strict=True):
        if not 0 < weight < 1000:
            raise ValueError(f"--weights {weight:g}: must lie above 0 and below 1000")
        inputs += _resolve_one(spec, weight, split, revision, flag)
    return inputs


def _resolve_one(spec: str, weight: float, split: str | None, revision: str | None, flag: str) -> list[Input]:
    if spec.startswith("modelscope:"):
        name = spec.removeprefix("modelscope:")
        return [Input(name=name, label=name, kind="modelscope", weight=weight, split=split, revision=revision)]
    if os.path.isdir(spec):
        paths = _files_of_folder(spec, split, flag)
    elif os.path.exists(spec):
        paths = [spec]
    elif glob.has_magic(spec):
        paths = sorted(p for p in glob.glob(spec, recursive=True) if os.path.isfile(p))
        if not paths:
            raise ValueError(f"{flag} {spec}: no file matches")
    elif _HUB_NAME.fullmatch(spec) and not any(spec.endswith(s) for s in (*_KINDS, *_COMPRESSIONS)):
        return [Input(name=spec, label=spec, kind="hub", weight=weight, split=split, revision=revision)]
    else:
        raise ValueError(f"{flag} {spec}: no such file or folder")
    return [_file_input(p, weight, flag) for p in paths]


def _file_input(path: str, weight: float, flag: str) -> Input:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if compression:
        stem, suffix = os.path.splitext(stem)
    kind = _KINDS.get(suffix.lower())
    if kind is None:
        raise ValueError(f"{flag} {path}: unknown kind of file; known are {', '.join(_KINDS)}, also with .gz or .zst")
    if compression and kind in ("parquet", "arrow"):
        raise ValueError(f"{flag} {path}: a compressed {kind} file; unpack it first")
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        raise ValueError(f"{flag} {path}: the file is empty")
    return Input(name=path, label=os.path.basename(stem), kind=kind, compression=compression, num_bytes=num_bytes,
                 weight=weight)


def _files_of_folder(folder: str, split: str | None, flag: str) -> list[str]:
    paths = sorted(str(p) for p in Path(folder).rglob("*") if p.is_file() and _is_data(p))
    by_split: dict[str, list[str]] = {}
    for path in paths:
        words = re.split(r"[^a-z]+", os.path.relpath(path, folder).lower())
        by_split.setdefault(next((_SPLITS[w] for w in words if w in _SPLITS), ""), []).append(path)
    if split is not None and any(by_split):
        paths = by_split.get(_SPLITS.get(split, split), [])
    elif len(by_split.keys() - {""}) > 1:
        raise ValueError(f"{flag} {folder}: holds several splits ({', '.join(sorted(by_split.keys() - {''}))}); "
                         "choose one with --split, or name the files")
    if not paths:
        raise ValueError(f"{flag} {folder}: no data file in this folder{f' for --split {split}' if split else ''}")
    return paths


def _is_data(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if path.name in _NOT_DATA or path.name.startswith(".") or not suffixes:
        return False
    return suffixes[-1] in _KINDS or (len(suffixes) == 2 and suffixes[1] in _COMPRESSIONS and suffixes[0] in _KINDS)


# ---- reading

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
    """The chunks of one input. ``hashes`` gets the sha256 of the file once it was read to its end."""
    if source.kind == "hub":
        yield from _hub_chunks(source, index)
    elif source.kind == "modelscope":
        yield from _modelscope_chunks(source, index)
    elif source.kind in ("parquet", "arrow"):
        yield from _arrow_chunks(source, index)
        if hashes is not None:
            hashes[source.name] = checksum(source.name)
    else:
        raw = HashingFile(source.name)
        buffered = io.BufferedReader(raw, 1 << 18)
        try:
            yield from _stream_chunks(source, index, raw, buffered)
            while buffered.read(1 << 20):
                pass
            if hashes is not None:
                hashes[source.name] = raw.digest.hexdigest()
        finally:
            buffered.close()


def _stream_chunks(source: Input, index: int, raw: HashingFile, stream: Any) -> Iterator[Chunk]:
    if source.compression == "gzip":
        stream = gzip.GzipFile(fileobj=stream)
    elif source.compression == "zstd":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
    cut = {"lines": _line_chunks, "json": _json_chunks, "csv": _csv_chunks}[source.kind]
    last = 0
    try:
        for chunk in cut(source, index, stream):
            last = chunk.first
            chunk.position = raw.position
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{source.name}: {source.compression or 'the file'} cannot be read on after {source.unit} "
                         f"{last} ({_one_line(error)}): cut short or damaged") from None


def _line_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    line, rest, first = 1, b"", True
    while True:
        block = stream.read(CHUNK_BYTES)
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False
        end = block.rfind(b"\n") + 1
        if end == 0 and block:
            if len(rest) <= MAX_ROW_BYTES:
                rest += block  # else the row is rejected as too large; its end is enough of it
            continue
        data = rest + (block[:end] if block else b"")
        rest = block[end:]
        if data:
            yield Chunk(index, line, data, len(data))
            line += data.count(b"\n")
        if not block:
            return


def _json_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name}: byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source.name}: nested too deeply to be read") from None
    except ValueError as error:
        if _is_json_object(text.lstrip().split("\n", 1)[0]):  # JSON lines under the name of JSON
            yield from _line_chunks(source, index, io.BytesIO(data))
            return
        line = getattr(error, "lineno", 0)
        raise ValueError(f"{source.name}:{line}: broken JSON ({_one_line(error)})") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
        known = {"chosen", "rejected", "responses", "conversations", "answers", "prompt"}
        value = lists[0] if len(lists) == 1 and known.isdisjoint(value) else [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{source.name}: no rows: expected a list of objects")
    yield from _item_chunks(index, value, len(data) // len(value))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _item_chunks(index: int, rows: list[Any], row_bytes: int) -> Iterator[Chunk]:
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))
    for start in range(0, len(rows), step):
        part = rows[start:start + step]
        yield Chunk(index, start + 1, [_as_item(start + 1 + i, r) for i, r in enumerate(part)], row_bytes * len(part))


def _as_item(number: int, row: Any) -> Item:
    if isinstance(row, dict):
        if _deeper_than(row, MAX_DEPTH):  # it could not be sent to a worker
            return number, Rejected("too_deep"), ""
        return number, row, ""
    return number, Rejected("broken_row", f"{type(row).__name__}, not an object"), str(row)[:2000]


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return False
    return True


def _csv_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    tab = ".tsv" in os.path.basename(source.name).lower()
    reader = csv.reader(text, delimiter="\t" if tab else ",", strict=True)
    items: list[Item] = []
    size, header, start = 0, None, 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            items.append((number, _csv_row(header, cells), ""))
            size += sum(map(len, cells))
            if size >= CHUNK_BYTES:
                yield Chunk(index, items[0][0], items, size)
                items, size = [], 0
    except csv.Error as error:
        raise ValueError(f"{source.name}:{start}: broken CSV from here on ({error})") from None
    if items:
        yield Chunk(index, items[0][0], items, size)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | Rejected:
    if len(cells) != len(header):
        return Rejected("broken_row", f"{len(cells)} cells, the header has {len(header)}")
    if any("\udc80" <= c <= "\udcff" for cell in cells for c in (cell if not cell.isascii() else "")):
        return Rejected("not_utf8")
    return {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def _csv_cell(name: str, cell: str) -> Any:
    """Text, null for nothing, or the list that a JSON (or Python) text of messages, responses or scores stands for."""
    if not cell:
        return None
    if cell[0] not in "[{":
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        listed = isinstance(value, list) and value
        if listed and (isinstance(value[0], dict) or name not in ("prompt", "chosen", "rejected", "instruction")):
            return value
        return value if isinstance(value, dict) and ("role" in value or "from" in value) else cell
    return cell


def _arrow_chunks(source: Input, index: int) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        row = 1
        for batch in _arrow_batches(source, pa):
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                yield Chunk(index, row, part, part.nbytes, int(source.num_bytes * 0.5))
                row += part.num_rows
        if row == 1:
            raise ValueError(f"{source.name}: no rows")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source.name}: cannot be read as {source.kind} ({_one_line(error)})") from None


def _arrow_batches(source: Input, pa: Any) -> Iterator[Any]:
    if source.kind == "parquet":
        with pa.parquet.ParquetFile(source.name) as file:
            yield from file.iter_batches(batch_size=CHUNK_ROWS)
        return
    with pa.memory_map(source.name) as stream:
        try:
            reader = pa.ipc.open_file(stream)
        except pa.ArrowInvalid:  # what the datasets library saves are streams
            stream.seek(0)
            yield from pa.ipc.open_stream(stream)
            return
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _hub_chunks(source: Input, index: int) -> Iterator[Chunk]:
    from datasets import load_dataset

    name, _, config = source.name.partition(":")
    split = source.split or "train"
    try:
        rows = load_dataset(name, config or None, split=split, revision=source.revision, streaming=True)
        yield from _dict_chunks(index, iter(rows))
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"{source.name}: no such file here, and as the name of a hub data set (split {split}) it "
                         f"cannot be read ({_one_line(error)})") from None


def _modelscope_chunks(source: Input, index: int) -> Iterator[Chunk]:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise ValueError(f"modelscope:{source.name}: needs the package modelscope (pip install modelscope)") from None
    name, _, config = source.name.partition(":")
    try:
        rows = MsDataset.load(name, subset_name=config or None, split=source.split or "train",
                              version=source.revision or "master", use_streaming=True)
        yield from _dict_chunks(index, iter(rows))
    except Exception as error:
        raise ValueError(f"modelscope:{source.name}: cannot be read ({_one_line(error)})") from None


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
        yield from _decode_batch(chunk)


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
        return number, Rejected("broken_row", _one_line(error)), _raw(line)
    if not isinstance(row, dict):
        return number, Rejected("broken_row", f"{type(row).__name__}, not an object"), _raw(line)
    return number, row, ""


def _decode_batch(chunk: Chunk) -> Iterator[Item]:
    try:
        rows = chunk.payload.to_pylist()
    except (UnicodeDecodeError, ValueError):
        for i in range(chunk.payload.num_rows):
            try:
                yield chunk.first + i, chunk.payload.slice(i, 1).to_pylist()[0], ""
            except (UnicodeDecodeError, ValueError) as error:
                yield chunk.first + i, Rejected("not_utf8", _one_line(error)), ""
        return
    for i, row in enumerate(rows):
        yield chunk.first + i, row, ""


def group_rows(chunks: Iterator[Chunk], column: str) -> Iterator[Chunk]:
    """Chunks whose items are ``{"rows": [...]}``: adjacent rows with the same value in ``column``."""
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


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
