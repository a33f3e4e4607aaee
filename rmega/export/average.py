"""The mean of several checkpoints' weights, read as if it were one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rmega.checkpointing.run_folder import read_info
from rmega.export.adapters import MergedTensors, tensors_of
from rmega.export.write_weights import CheckpointTensors
from rmega.models.weights import WeightRule

SAME = ("base_model", "geometry", "reward_token_id", "pad_token_id")
SAME_IN_MANIFEST = ("tokenizer_fingerprint", "template_hash")


def check_alike(folders: Sequence[Path], infos: Sequence[dict[str, Any]]) -> None:
    """ValueError, naming folder and field, where the weights of checkpoints must not be averaged:
    another base model, architecture, reward or pad token, tokenizer or chat template. ``infos``:
    their rmega.json."""

    def identity(info: dict[str, Any]) -> dict[str, Any]:
        manifest = info.get("manifest") or {}
        return {
            **{key: info.get(key) for key in SAME},
            **{key: manifest.get(key) for key in SAME_IN_MANIFEST},
        }

    first = identity(infos[0])
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        for key, value in identity(info).items():
            if value == first[key]:
                continue
            if key == "geometry":
                differs = [k for k in value if value[k] != first[key].get(k)]
                value, other = ({k: g.get(k) for k in differs} for g in (value, first[key]))
            else:
                other = first[key]
            raise ValueError(
                f"{folder}: its {key} is {value}, that of {folders[0]} is {other}: only weights of"
                " runs from one base model, with one tokenizer, can be averaged"
            )
    for i, folder in enumerate(folders):
        if folder.resolve() in [f.resolve() for f in folders[:i]]:
            raise ValueError(f"{folder}: is named twice")


class MeanTensors:
    """The mean of checkpoints (adapters merged), with ``rows`` as :class:`CheckpointTensors` has
    it. Sums are computed in fp32 in the order of ``folders``, one tensor at a time."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._sources = [tensors_of(folder, read_info(folder)) for folder in folders]

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, fp32 mean of the whole tensor). Errors as of ``CheckpointTensors.rows``."""
        total = torch.zeros(rule.shape)
        for source in self._sources:
            for first, rows in source.rows(rule):
                total[first : first + len(rows)] += rows
        yield 0, total.div_(len(self._sources))


def weights_of(folders: Sequence[Path]) -> CheckpointTensors | MergedTensors | MeanTensors:
    """The weights of one checkpoint, or the mean of several."""
    if len(folders) > 1:
        return MeanTensors(folders)
    return tensors_of(folders[0], read_info(folders[0]))
