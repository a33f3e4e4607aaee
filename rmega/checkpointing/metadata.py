"""Read a checkpoint's ``.metadata`` (a pickle) with an allowlist of classes.

The file is a pickle, which can name any function to be called while it is read. Here only the
classes that a checkpoint consists of are allowed, whoever wrote it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from rmega.io import one_line

NAME = ".metadata"
EXTRA_STATE = "_extra_state"
"""In the keys of what linear layers store beside their weights. rmega neither writes nor reads it:
it is None without Transformer Engine, and there a pickle in bytes, which only delayed scaling
(no recipe of rmega's) needs."""

# What torch's and Megatron-Core's writers put into a .metadata. All are plain records and enums;
# torch.Size and _get_layout do nothing but convert their argument.
ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A name with a dot would reach into an allowed module's own imports.
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")


def read_metadata(folder: Path | str) -> Metadata:
    """The metadata of a checkpoint folder. Raises ValueError on a file that is missing, damaged, or
    not a checkpoint's."""
    path = Path(folder) / NAME
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        _check(metadata)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a readable checkpoint: {one_line(error)}") from None
    return metadata


def _check(metadata: Any) -> None:
    if type(metadata) is not Metadata:
        raise ValueError("it does not describe a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        # What is stored as bytes is a pickle too, which torch's loader would read unrestricted.
        if type(entry) is TensorStorageMetadata:
            continue
        if type(entry) is not BytesStorageMetadata or EXTRA_STATE not in name:
            raise ValueError(f"{name} is not a tensor")
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{place.relative_path!r} is not a file of this folder")
