"""The tensors of a Hugging Face folder, read slice by slice straight from the files, so that a load
needs no memory beside the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from rmega.io import one_line, read_json, refuse_pointer

# Mapped pages count as memory of the process until the file is closed: reopen after this many
# bytes.
REOPEN_BYTES = 128 * 2**20


class HfFolder:
    """The tensors of a model folder, read by slice: safetensors, else ``.bin`` (weights only),
    single or sharded. ``stems``: names of the one kind and of the other."""

    def __init__(
        self, folder: Path | str, stems: tuple[str, str] = ("model", "pytorch_model")
    ) -> None:
        self.folder, self.stems = Path(folder), stems
        self.files = self._index()
        self._open: tuple[str, Any, frozenset[str]] | None = None
        self._bytes_read = 0

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        for stem, suffix in zip(self.stems, ("safetensors", "bin"), strict=True):
            single = self.folder / f"{stem}.{suffix}"
            index = self.folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                refuse_pointer(index)
                files = read_json(index).get("weight_map")
                if not isinstance(files, dict) or not files:
                    raise ValueError(f"{index}: no weight_map in it")
                for name, file in files.items():
                    if not isinstance(file, str) or not file or Path(file).name != file:
                        raise ValueError(f"{index}: {file!r} for {name} is no name of a file")
                if missing := sorted(
                    {f for f in files.values() if not (self.folder / f).is_file()}
                ):
                    raise ValueError(f"{index}: names {missing[0]}, which is not in the folder")
                return files
            if single.is_file():
                return dict.fromkeys(self._load(single).keys(), single.name)
        raise ValueError(
            f"{self.folder}: no weights ({self.stems[0]}.safetensors, {self.stems[1]}.bin, or one"
            " of their indices)"
        )

    def _load(self, path: Path) -> Any:
        refuse_pointer(path)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                return safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a safetensors file: {one_line(error)}") from None
        try:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written by a torch before 1.6: such a file cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: not readable as weights only: {one_line(error)}") from None
        if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
            raise ValueError(f"{path}: names and tensors were expected")
        return content

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        path = self.folder / file
        if self._open is None or self._open[0] != file or self._bytes_read > REOPEN_BYTES:
            self._open = None  # unmap first, so that two files are never mapped at once
            handle = self._load(path)
            self._open, self._bytes_read = (file, handle, frozenset(handle.keys())), 0
        _, handle, names = self._open
        if name not in names:
            raise ValueError(f"{path}: {name}, which the index names there, is not in it")
        return handle

    def shape(self, name: str) -> tuple[int, ...]:
        handle = self._handle(name)
        return tuple(
            handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape()
        )

    def read(
        self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (and only these columns) of a tensor, in the dtype of the
        file."""
        handle = self._handle(name)
        source = handle[name] if isinstance(handle, dict) else handle.get_slice(name)
        rows = (
            source[start:stop] if columns is None else source[start:stop, columns[0] : columns[1]]
        )
        if not rows.dtype.is_floating_point or rows.dtype.itemsize < 2:
            raise ValueError(
                f"{self.folder / self.files[name]}: {name} is {rows.dtype}: quantized weights"
                " cannot be trained"
            )
        if rows.numel() and not all(map(math.isfinite, torch.stack(rows.aminmax()).tolist())):
            raise ValueError(
                f"{self.folder / self.files[name]}: {name} holds values that are not finite"
            )
        self._bytes_read += rows.numel() * rows.element_size()
        return rows
