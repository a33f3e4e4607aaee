"""Folders of peft: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rmega.config import LoraArgs
from rmega.hub import ADAPTER_CONFIG
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf_folder import HfFolder
from rmega.models.weights import Names

PREFIX = "base_model.model."
HARMLESS = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("peft_type", "peft_version", "r", "lora_alpha", "use_rslora", "target_modules"),
    *("exclude_modules", "megatron_config", "megatron_core", "modules_to_save", "lora_dropout"),
    *("init_lora_weights", "fan_in_fan_out", "qalora_group_size", "ensure_weight_tying"),
    *("layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "runtime_config"),
}
"""Fields that are read here, that describe how an adapter was made, or that its tensors say."""
UNCHANGED = (None, False, "none", {}, [], "")
"""Values by which every other field says that it is not in use."""


class PeftFolder:
    """An adapter as peft saves it, for a backbone of ``geometry``. Tensors have the names of
    ``rmega.models.lora_weights.adapter_table``. Raises ValueError, naming the file, on what rmega's
    adapters are not."""

    def __init__(self, folder: Path | str, geometry: Geometry) -> None:
        self.folder = Path(folder)
        path = self.folder / ADAPTER_CONFIG
        config = read_adapter_config(self.folder)
        family = BACKBONES[geometry.family]
        if len(family.names.qkv) != 3:
            raise ValueError(
                f"{path}: adapters for {family.architecture}, whose query, key and value are one"
                " layer, are not supported; merge them into their base model"
            )
        self.head = family.names.head
        self._source = HfFolder(self.folder, ("adapter_model", "adapter_model"))
        self._names = {name.removeprefix(PREFIX): name for name in self._source.files}
        modules = modules_of(family.names)
        layers = [family.names.layer.format(i=i) for i in range(geometry.num_layers)]
        found = {}  # target -> names that its modules can have
        for target, names in modules.items():
            stems = [layer + name.removesuffix(".weight") for layer in layers for name in names]
            found[target] = {f"{stem}.lora_{x}.weight" for stem in stems for x in "AB"}
        known = set().union({self.head}, *found.values())
        if unknown := sorted(self._names.keys() - known):
            raise ValueError(
                f"{self.folder}: tensor {self._names[unknown[0]]} cannot be honored: adapters of"
                f" the linear layers and {self.head} are supported"
            )
        targets = [target for target, names in found.items() if names & self._names.keys()]
        if not targets:
            raise ValueError(f"{self.folder}: no adapters in it")
        wanted = set().union(*(found[target] for target in targets))
        self.missing = sorted({name.partition(".lora_")[0] for name in wanted - self._names.keys()})
        """Linear layers without an adapter beside others that have one."""
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ValueError(f"{path}: r={rank!r}, lora_alpha={alpha!r}: numbers were expected")
        self.args = LoraArgs(
            lora_rank=rank,
            lora_alpha=float(alpha),
            lora_target="all-linear" if len(targets) == len(modules) else ",".join(targets),
            lora_rslora=bool(config.get("use_rslora")),
        )
        """The flags that describe it."""

    @property
    def has_head(self) -> bool:
        """Whether it holds a reward head."""
        return self.head in self._names

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole tensor of this shape."""
        theirs = self._names[name]
        if self._source.shape(theirs) != tuple(shape):
            raise ValueError(
                f"{self.folder / self._source.files[theirs]}: {theirs} has shape"
                f" {self._source.shape(theirs)}, {tuple(shape)} was expected"
            )
        return self._source.read(theirs, 0, shape[0])

    def describe(self) -> str:
        """Where the adapters begin, for the log."""
        count = len(self.missing)
        new = f"; {count} linear layer{'s' * (count > 1)} without one there begin with new ones"
        return f"from {self.folder}{new if count else ''}"

    def check_flags(self, args: LoraArgs) -> None:
        """ValueError where a training's flags ask for other adapters than these."""
        own = self.args
        flags = f"--lora-rank {own.lora_rank} --lora-alpha {own.alpha:g}" + (
            f" --lora-target {own.lora_target}" if own.lora_target != "all-linear" else ""
        )
        flags += " --lora-rslora" if own.lora_rslora else ""
        same = args.lora_rank == own.lora_rank and args.targets == own.targets
        if not same or args.scale != own.scale:
            raise ValueError(
                f"--hf-model {self.folder}: an adapter of peft, which is trained further with"
                f" {flags}; to train all weights, merge it into its base model"
            )


def modules_of(names: Names) -> dict[str, tuple[str, ...]]:
    """Target of ``--lora-target`` -> the family's modules, some ending with ``.weight``."""
    return {
        "qkv": names.qkv,
        "proj": (names.projection,),
        "fc1": (names.gate, names.up),
        "fc2": (names.down,),
    }


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``; ValueError on any setting that rmega's adapters do not have."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: no adapter of type LORA")
    for field, value in config.items():
        if field not in HARMLESS and value not in UNCHANGED:
            raise ValueError(f"{path}: {field}={value!r} is not supported")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
        raise ValueError(  # PiSSA, OLoRA, CorDA and LoftQ change the weights of the base model
            f"{path}: init_lora_weights={config['init_lora_weights']!r} is not supported"
        )
    return config


def write_adapter_config(folder: Path, args: LoraArgs, geometry: Geometry, base: str) -> None:
    """``adapter_config.json`` of an adapter and a reward head for the base model ``base``."""
    names = BACKBONES[geometry.family].names
    modules = modules_of(names)
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": args.lora_rank,
        "lora_alpha": args.alpha,
        "use_rslora": args.lora_rslora,
        "lora_dropout": args.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [
            name.removesuffix(".weight").rpartition(".")[2]
            for target in args.targets
            for name in modules[target]
        ],
        "modules_to_save": [names.head.removesuffix(".weight")],
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
