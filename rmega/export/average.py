"""What an export is made of: one checkpoint, or the mean of several checkpoints or exports."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rmega.checkpointing import base_model
from rmega.checkpointing.find import find_checkpoint
from rmega.checkpointing.run_folder import read_info
from rmega.config import LoraArgs
from rmega.export.adapters import HfTensors, MergedTensors
from rmega.export.checkpoint_tensors import CheckpointTensors, GlobalTensors
from rmega.export.destination import is_marked, read_recipe
from rmega.hub import RECIPE, export_damage
from rmega.models.geometry import Geometry
from rmega.models.hf import read_geometry
from rmega.models.weights import WeightRule

SAME = ("base_model", "geometry", "reward_token_id", "pad_token_id")
SAME_IN_MANIFEST = ("tokenizer_fingerprint", "template_hash")


@dataclasses.dataclass
class Part:
    """A checkpoint or an export that is read. ``info``: its rmega.json, or what an export's recipe
    and configuration state under the same names."""

    folder: Path
    info: dict[str, Any]
    is_export: bool = False
    flag: str = ""
    """Begins messages on it, with a space."""

    @property
    def files(self) -> Path:
        """The folder of its tokenizer, license and card."""
        return self.folder if self.is_export else self.folder / "hf"

    @functools.cached_property
    def base_model(self) -> Path | None:
        """The base model of a checkpoint of adapters, None for other parts. Its checksums are
        compared once: that reads the whole model."""
        if self.is_export or not LoraArgs.recorded(self.info.get("config")).lora_rank:
            return None
        return base_model.find(self.info, self.folder, self.flag)

    def tensors(self) -> GlobalTensors:
        """Its weights; adapters are merged into their base model."""
        geometry = Geometry.from_dict(self.info["geometry"])
        if self.is_export:
            return HfTensors(self.folder, geometry)
        if self.base_model is None:
            return CheckpointTensors(self.folder)
        args = LoraArgs.recorded(self.info.get("config"))
        return MergedTensors(self.folder, geometry, args, self.base_model)


def read_part(path: Path, iteration: str = "latest", flag: str = "") -> Part:
    """The checkpoint that a run or a checkpoint folder names. ``flag`` begins messages, with a
    space."""
    folder = find_checkpoint(path, iteration, flag)
    return Part(folder, read_info(folder), flag=flag)


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """The checkpoints, or the exports, of an average. ValueError where both kinds are among them,
    and on what cannot be averaged."""
    exports = [path for path in paths if any(path.glob("*.safetensors"))]
    if exports and len(exports) < len(paths):
        other = next(path for path in paths if path not in exports)
        raise ValueError(
            f"{exports[0]} is a model folder and {other} is not: export checkpoints first"
            " (tools/convert_to_hf.py), or name checkpoints only"
        )
    parts = [_read_export(path) if exports else read_part(path) for path in paths]
    _check_alike(parts)
    return parts


def _read_export(folder: Path) -> Part:
    """An export, with the content that a checkpoint's rmega.json would have."""
    recipe = read_recipe(folder)
    if recipe is None:
        raise ValueError(
            f"{folder}: no {RECIPE} of an export: rmega's exports and checkpoints can be averaged"
        )
    if problem := export_damage(folder):
        raise ValueError(problem)
    if recipe.get("adapter_of"):
        raise ValueError(
            f"{folder}: an adapter; average exports of merged weights (without --format adapter)"
        )
    if is_marked(folder):
        raise ValueError(
            f"{folder}: marked as UNVERIFIED; tools/convert_to_hf.py --verify-only verifies it"
        )
    geometry, config = read_geometry(folder)
    keys = ("base_model", "dtype", "config", "iteration", "reward_token_id", "pad_token_id")
    info = {
        **{key: recipe.get(key) for key in keys},
        "geometry": dataclasses.asdict(geometry),
        "hf_config": config,
        "manifest": recipe.get("data") or {},
    }
    return Part(folder, info, is_export=True)


def _check_alike(parts: Sequence[Part]) -> None:
    """ValueError, naming folder and field, where weights must not be averaged: another base model,
    architecture, reward or pad token, tokenizer or chat template."""

    def identity(info: dict[str, Any]) -> dict[str, Any]:
        manifest = info.get("manifest") or {}
        return {
            **{key: info.get(key) for key in SAME},
            **{key: manifest.get(key) for key in SAME_IN_MANIFEST},
        }

    first = identity(parts[0].info)
    for part in parts[1:]:
        for key, value in identity(part.info).items():
            if value == first[key]:
                continue
            if key == "geometry":
                differs = [k for k in value if value[k] != first[key].get(k)]
                value, other = ({k: g.get(k) for k in differs} for g in (value, first[key]))
            else:
                other = first[key]
            raise ValueError(
                f"{part.folder}: its {key} is {value}, that of {parts[0].folder} is {other}: only"
                " weights of runs from one base model, with one tokenizer, can be averaged"
            )
    for i, part in enumerate(parts):
        if part.folder.resolve() in [p.folder.resolve() for p in parts[:i]]:
            raise ValueError(f"{part.folder}: is named twice")


class MeanTensors:
    """The mean of parts (adapters merged), with ``rows`` as :class:`CheckpointTensors` has it.
    Sums are computed in fp32 in the order of ``parts``, one tensor at a time."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._sources = [part.tensors() for part in parts]

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, fp32 mean of the whole tensor). Errors as of ``CheckpointTensors.rows``."""
        total = torch.zeros(rule.shape)
        for source in self._sources:
            for first, rows in source.rows(rule):
                total[first : first + len(rows)] += rows
        yield 0, total.div_(len(self._sources))


def weights_of(parts: Sequence[Part]) -> GlobalTensors:
    """The weights of one checkpoint, or the mean of several parts."""
    return MeanTensors(parts) if len(parts) > 1 else parts[0].tensors()
