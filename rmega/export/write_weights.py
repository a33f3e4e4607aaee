"""Weights -> safetensors files in Hugging Face names, one tensor at a time.

The file of every output tensor and its place in it are known from the geometry before anything is
read, so each piece of a checkpoint goes straight to where it belongs, whatever layout wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rmega.export.checkpoint_tensors import GlobalTensors
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.weights import Part, WeightRule, hf_shapes

DTYPES = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
}
CAST_BYTES = 32 * 2**20  # rows are cast to the output's dtype in blocks of at most this size


def parse_size(text: str, *, flag: str = "--max-shard-size") -> int:
    """``5GB`` (10^9), ``500MB``, ``2GiB`` or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        base, exponent = 1024 if match[3] else 1000, " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * base**exponent)
    if size <= 0:
        raise ValueError(f"{flag} {text}: a size such as 5GB or 500MB was expected")
    return size


class SafetensorsWriter:
    """Safetensors files of known content, filled in any order by rows.

    ``shapes``: name -> shape, in the order of the files. A file is closed by size: no file exceeds
    ``max_shard_bytes`` unless a single tensor does. The space is taken at once, so a disk that is
    too small is found before any work.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: str,
        max_shard_bytes: int,
        stem: str = "model",
    ) -> None:
        self.folder, self.dtype = folder, DTYPES[dtype][0]
        self._place: dict[str, tuple[int, int]] = {}  # name -> (file's descriptor, byte offset)
        self._missing = {name: shape[0] for name, shape in shapes.items()}
        item = self.dtype.itemsize
        size = {name: torch.Size(shape).numel() * item for name, shape in shapes.items()}
        self._row_bytes = {name: size[name] // shape[0] for name, shape in shapes.items()}
        shards: list[list[str]] = [[]]
        filled = 0
        for name in shapes:
            if shards[-1] and filled + size[name] > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size[name]
        count = len(shards)
        self.files = [
            f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"
            for i in range(count)
        ]
        self._handles: list[int] = []
        weight_map = {}
        for file, names in zip(self.files, shards, strict=True):
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # for transformers 4
            at = 0
            for name in names:
                header[name] = {
                    "dtype": DTYPES[dtype][1],
                    "shape": list(shapes[name]),
                    "data_offsets": [at, at + size[name]],
                }
                at += size[name]
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            handle = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._handles.append(handle)
            os.posix_fallocate(handle, 0, 8 + len(text) + at)
            os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
            for name in names:
                self._place[name] = (handle, 8 + len(text) + header[name]["data_offsets"][0])
                weight_map[name] = file
        self.total_size = sum(size.values())
        if count > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def write(self, name: str, row: int, rows: torch.Tensor) -> None:
        """Put ``rows`` at ``row`` of a tensor, cast to the dtype of the files."""
        handle, start = self._place[name]
        step = max(1, CAST_BYTES // max(1, self._row_bytes[name]))
        for i in range(0, len(rows), step):
            block = rows[i : i + step]
            cast = block.to(self.dtype).contiguous()
            if self.dtype == torch.float16 and cast.isinf().any() and block.isfinite().all():
                raise ValueError(
                    f"--dtype float16: {name} has values beyond its range; use bfloat16"
                )
            data = memoryview(cast.view(-1).view(torch.uint8).numpy())
            at = start + (row + i) * self._row_bytes[name]
            while data:
                written = os.pwrite(handle, data, at)
                data, at = data[written:], at + written
        self._missing[name] -= len(rows)

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles:
            os.close(handle)
        self._handles = []

    def check_complete(self) -> None:
        """Every row of every tensor must have been written, once."""
        short = {name: rows for name, rows in self._missing.items() if rows}
        assert not short, f"rows missing or written twice: {short}"


def hf_rows(
    source: GlobalTensors, table: Iterable[WeightRule]
) -> Iterator[tuple[Part, torch.Tensor]]:
    """(part, its rows) of all Hugging Face tensors of the table, in pieces as ``source`` has them.
    Whoever lets go of the rows before asking for the next holds one stored piece at a time."""
    for rule in table:
        for first, rows in source.rows(rule):
            for offset, part in rule.overlaps(first, first + len(rows)):
                yield part, rows[offset : offset + part.stop - part.start]
            del rows


def write_tensors(
    source: GlobalTensors,
    table: Sequence[WeightRule],
    folder: Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    prefix: str = "",
    stem: str = "model",
) -> SafetensorsWriter:
    """Write all tensors of a table into ``folder``, with ``prefix`` before their Hugging Face
    names.

    Holds at most one stored piece, the tensor that it belongs to where columns were cut over ranks,
    and a block of ``CAST_BYTES``.
    """
    shapes = {prefix + name: shape for name, shape in hf_shapes(table).items()}
    writer = SafetensorsWriter(folder, shapes, dtype, max_shard_bytes, stem)
    shown = tqdm(table, desc="writing", unit="tensor", leave=False, disable=None)
    with contextlib.closing(writer):
        for part, rows in hf_rows(source, shown):
            writer.write(prefix + part.name, part.start, rows)
            del rows
    writer.check_complete()
    return writer


def export_weights(
    source: GlobalTensors, geometry: Geometry, folder: Path, *, dtype: str, max_shard_bytes: int
) -> SafetensorsWriter:
    """``write_tensors`` of all weights of a model, under the names of ``geometry.family``."""
    table = BACKBONES[geometry.family].weight_table(geometry)
    return write_tensors(source, table, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
