"""The tensors of a checkpoint, read piece by piece, whatever layout wrote it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rmega.checkpointing.metadata import read_metadata
from rmega.io import one_line
from rmega.models.weights import WeightRule


class GlobalTensors(Protocol):
    """The global tensors of a model."""

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [n, ...] with all their columns) of the tensor of ``rule``, until it is
        whole."""


class CheckpointTensors:
    """The global tensors of one checkpoint folder (torch distributed checkpoint), read piece by
    piece."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._reader = FileSystemReader(self.folder)
        metadata = read_metadata(self.folder)
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for index, place in metadata.storage_data.items():
            if index.fqn in self._tensors:
                self._pieces.setdefault(index.fqn, []).append((tuple(index.offset or ()), place))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape; what Megatron-Core padded is part of it."""
        return tuple(self._tensors[name].size)

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(offset of its first element, piece) for each stored piece; together they are the whole
        tensor.

        Raises ValueError if pieces are missing or a file is broken.
        """
        shape, found = self.shape(name), 0
        for offset, place in sorted(self._pieces.get(name, ()), key=lambda piece: piece[0]):
            path = self.folder / place.relative_path
            try:
                with open(path, "rb") as file:
                    piece = self._map(file, place)
            except FileNotFoundError:
                raise ValueError(f"{path}: missing; the checkpoint is not complete") from None
            except Exception as error:  # a cut or damaged file fails in zip, pickle or tensor code
                raise ValueError(f"{path}: broken at {name}: {one_line(error)}") from None
            offset = offset or (0,) * len(shape)
            if piece.dim() != len(shape):
                raise ValueError(
                    f"{path}: {name} has {piece.dim()} dimensions, its metadata says {len(shape)}"
                )
            found += piece.numel()
            yield offset, piece
            del piece
        if found != torch.Size(shape).numel():
            raise ValueError(
                f"{self.folder}: {name} is not complete ({found} of {torch.Size(shape).numel()}"
                " values)"
            )

    def _map(self, file: BinaryIO, place: Any) -> torch.Tensor:
        """A stored piece as a view of the file, so that its bytes are copied once, to where they
        are written."""
        size = os.fstat(file.fileno()).st_size
        if place.offset + place.length > size:
            raise ValueError(f"the file ends after {size:,} bytes")
        with FakeTensorMode():  # reads the shape and says where the values are, but not the values
            shell = torch.load(
                self._reader._slice_file(file, place), map_location="cpu", weights_only=True
            )
        offset = getattr(shell.untyped_storage(), "_checkpoint_offset", None)
        if (
            offset is None
            or not shell.is_contiguous()
            or shell.storage_offset()
            or not shell.numel()
        ):
            file.seek(0)
            return torch.load(
                self._reader._slice_file(file, place), map_location="cpu", weights_only=True
            )
        first = place.offset + offset
        page = first - first % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(
            file.fileno(),
            first - page + shell.numel() * shell.element_size(),
            offset=page,
            flags=mmap.MAP_PRIVATE,
        )
        return torch.frombuffer(
            view, dtype=shell.dtype, count=shell.numel(), offset=first - page
        ).view(shell.shape)

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [n, ...] with all their columns) of the tensor of ``rule``, without
        Megatron-Core's padding.

        Raises ValueError if the tensor is absent, too small, or if its padding is not zero.
        """
        if rule.name not in self:
            raise ValueError(f"{self.folder}: {rule.name} is not in the checkpoint")
        stored = self.shape(rule.name)
        grown = [
            dim
            for dim, (have, want) in enumerate(zip(stored, rule.shape, strict=False))
            if have != want
        ]
        if len(stored) != len(rule.shape) or any(
            stored[dim] < rule.shape[dim] or dim != rule.shard_dim or rule.shard_blocks > 1
            for dim in grown
        ):
            raise ValueError(
                f"{self.folder}: {rule.name} has shape {stored}, the geometry asks for {rule.shape}"
            )
        joined = None
        for offset, piece in self.pieces(rule.name):
            keep = tuple(
                slice(0, max(0, want - start))
                for start, want in zip(offset, rule.shape, strict=True)
            )
            kept = piece[keep]
            if grown and torch.count_nonzero(piece) != torch.count_nonzero(kept):
                raise ValueError(f"{self.folder}: {rule.name} is not zero where it was padded")
            if kept.dim() < 2 or kept.shape[1] == rule.shape[1]:
                if len(kept):
                    yield offset[0], kept
                continue
            if joined is None:
                joined = torch.empty(rule.shape, dtype=piece.dtype)
            if kept.numel():
                joined[
                    offset[0] : offset[0] + kept.shape[0], offset[1] : offset[1] + kept.shape[1]
                ] = kept
        if joined is not None:
            yield 0, joined
