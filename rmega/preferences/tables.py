"""Chunks of CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from typing import Any

from rmega.io import one_line
from rmega.preferences.chunks import CHUNK_BYTES, CHUNK_ROWS, MAX_ROW_BYTES, Chunk, Item
from rmega.preferences.comparison import Rejected
from rmega.preferences.resolve import Input


def csv_chunks(source: Input, index: int, stream: Any) -> Iterator[Chunk]:
    """Rows of a CSV (or TSV) file, numbered by the line they begin on. Cells are texts (see
    written.py), an empty one is null."""
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
    finally:
        text.detach()  # else it would close the file with itself
    if items:
        yield Chunk(index, items[0][0], items, size)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | Rejected:
    if len(cells) != len(header):
        return Rejected("broken_row", f"{len(cells)} cells, the header has {len(header)}")
    if any(
        "\udc80" <= c <= "\udcff" for cell in cells for c in (cell if not cell.isascii() else "")
    ):
        return Rejected("not_utf8")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def arrow_chunks(source: Input, index: int) -> Iterator[Chunk]:
    """Batches of a parquet or arrow file."""
    import pyarrow as pa

    row = 1
    try:
        for batch, total in _arrow_batches(source):
            batch.validate(full=True)  # damaged offsets would be followed out of the buffer
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                done = (row - 1 + part.num_rows) / total if total else 0.0
                yield Chunk(index, row, part, part.nbytes, int(source.num_bytes * done))
                row += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{source.name}: cannot be read as {source.kind} after row {row - 1} "
            f"({one_line(error)})"
        ) from None
    if row == 1:
        raise ValueError(f"{source.name}: no rows")


def _arrow_batches(source: Input) -> Iterator[tuple[Any, int]]:
    """(batch, rows of the file or 0 if that is unknown)."""
    import pyarrow as pa
    import pyarrow.parquet

    if source.kind == "parquet":
        with pa.parquet.ParquetFile(source.name) as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS):
                yield batch, file.metadata.num_rows
        return
    with pa.OSFile(source.name) as stream:
        try:
            reader = pa.ipc.open_file(stream)
        except pa.ArrowInvalid:  # what the datasets library saves are streams
            stream.seek(0)
            for batch in pa.ipc.open_stream(stream):
                yield batch, 0
            return
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i), 0


def decode_batch(chunk: Chunk) -> Iterator[Item]:
    """The rows of a batch; one whose text is not UTF-8 is rejected alone."""
    try:
        rows = chunk.payload.to_pylist()
    except (UnicodeDecodeError, ValueError):
        for i in range(chunk.payload.num_rows):
            try:
                yield chunk.first + i, chunk.payload.slice(i, 1).to_pylist()[0], ""
            except (UnicodeDecodeError, ValueError) as error:
                yield chunk.first + i, Rejected("not_utf8", one_line(error)), ""
        return
    for i, row in enumerate(rows):
        yield chunk.first + i, row, ""
