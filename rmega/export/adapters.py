"""Checkpoints of adapters: merged into their base model, or as a folder of peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rmega.config import LoraArgs
from rmega.export.checkpoint_tensors import CheckpointTensors
from rmega.export.write_weights import SafetensorsWriter, write_tensors
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf import REWARD_HEAD, fill, source_names
from rmega.models.hf_folder import HfFolder
from rmega.models.lora import delta
from rmega.models.lora_weights import adapter_table
from rmega.models.peft_folder import PREFIX, PeftFolder, write_adapter_config
from rmega.models.weights import WeightRule, hf_shapes, whole


class HfTensors:
    """The global tensors of a model folder, in fp32, with ``rows`` as ``CheckpointTensors`` has
    it: one tensor at a time."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        self.source = HfFolder(folder)
        self._names = source_names(self.source.files, geometry, folder)
        table = BACKBONES[geometry.family].weight_table(geometry)
        self._rules = {rule.name: rule for rule in table}
        self._shapes = hf_shapes(table)

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, the whole tensor of ``rule``)."""
        values = torch.empty(rule.shape)
        fill(values, self._rules[rule.name], self.source, self._names, self._shapes, 0, 1)
        yield 0, values


class MergedTensors:
    """The global tensors of the model in ``base`` plus a checkpoint's adapters, in fp32, with
    ``rows`` as ``CheckpointTensors`` has it: one tensor at a time."""

    def __init__(self, folder: Path, geometry: Geometry, args: LoraArgs, base: Path) -> None:
        self.adapters, self.args, self.geometry = CheckpointTensors(folder), args, geometry
        self._base = HfTensors(base, geometry)
        self._own = {rule.name: rule for rule in adapter_table(geometry, args)}

    def rows(self, rule: WeightRule) -> Iterator[tuple[int, torch.Tensor]]:
        """(0, the whole tensor of ``rule``); the reward head is the checkpoint's."""
        if rule.name == REWARD_HEAD:
            yield from self.adapters.rows(rule)
            return
        ((_, values),) = self._base.rows(rule)
        place, _, kind = rule.name.rpartition(".linear_")
        target = kind.partition(".")[0]
        own = f"{place}.lora_{target}."
        if kind.endswith(".weight") and own + "a" in self._own:
            names = [name for name in self._own if name.startswith(own)]  # a, b0, b1, ...
            a, *parts = (tensor(self.adapters, self._own[name]) for name in names)
            groups = self.geometry.num_query_groups if target == "qkv" else 1
            values += delta(a, parts, groups=groups, scale=self.args.scale)
        yield 0, values


def tensor(source: CheckpointTensors, rule: WeightRule) -> torch.Tensor:
    """A whole tensor of a checkpoint, fp32."""
    values = torch.empty(rule.shape)
    for first, rows in source.rows(rule):
        values[first : first + len(rows)] = rows
    return values


def peft_table(geometry: Geometry, args: LoraArgs) -> list[WeightRule]:
    """The rules of a folder of peft: adapters and reward head."""
    head = whole(BACKBONES[geometry.family].names.head, 1)
    return [
        *adapter_table(geometry, args),
        WeightRule(REWARD_HEAD, (1, geometry.hidden_size), head),
    ]


def check_peft(info: dict[str, Any], geometry: Geometry) -> LoraArgs:
    """The adapters of a checkpoint; ValueError where peft cannot have them."""
    args = LoraArgs.recorded(info.get("config"))
    if not args.lora_rank:
        raise ValueError("--format adapter: the run trained all weights (no --lora-rank)")
    family, theirs = BACKBONES[geometry.family], (info.get("hf_config") or {}).get("model_type")
    if family.code or theirs != geometry.family:
        raise ValueError(
            f"--format adapter: peft puts adapters on a class of transformers, which has none for"
            f" {theirs}; export the merged model (without --format)"
        )
    return args


def write_peft(
    folder: Path, info: dict[str, Any], geometry: Geometry, partial: Path
) -> SafetensorsWriter:
    """``adapter_config.json`` and ``adapter_model.safetensors`` (fp32) of a checkpoint."""
    args = check_peft(info, geometry)
    writer = write_tensors(
        CheckpointTensors(folder),
        peft_table(geometry, args),
        partial,
        dtype="float32",
        max_shard_bytes=2**62,
        prefix=PREFIX,
        stem="adapter_model",
    )
    write_adapter_config(partial, args, geometry, base_name(info))
    return writer


def base_name(info: dict[str, Any]) -> str:
    """What an adapter calls its base model: the hub name, or the folder that it was read from."""
    name = str(info["base_model"])
    return str(Path(name).resolve()) if Path(name).expanduser().is_dir() else name


def compare_peft(folder: Path, info: dict[str, Any], output: Path, geometry: Geometry) -> tuple:
    """As ``rmega.export.verify.compare_weights``, of a folder of peft."""
    args = check_peft(info, geometry)
    source, written, compared = CheckpointTensors(folder), PeftFolder(output, geometry), 0
    if written.args.scale != args.scale or written.args.targets != args.targets:
        return "adapter_config.json is not what the checkpoint holds.", False
    for rule in peft_table(geometry, args):
        values = tensor(source, rule)
        for offset, part in rule.overlaps(0, len(values)):
            ours = values[offset : offset + part.stop - part.start]
            theirs = written.read(part.name, tuple(ours.shape))
            if theirs.dtype != ours.dtype or not torch.equal(ours, theirs):
                return f"{part.name} is not what the checkpoint holds.", False
            compared += ours.numel()
    return f"All {compared:,} written values are the checkpoint's.", True


def load_with_peft(
    output: Path, *, base: Path, pad_token_id: int, dtype: torch.dtype
) -> torch.nn.Module:
    """The adapter on its base model, by plain transformers and peft."""
    import transformers

    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            "--format adapter: verified with peft, which is not installed (pip install peft;"
            " --no-verify writes without)"
        ) from None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(base), num_labels=1, dtype=dtype
    )
    model.config.pad_token_id = pad_token_id
    return PeftModel.from_pretrained(model, str(output))
