"""The weights of adapters: their names and shapes in peft's folders, and their start.

A starts uniform in +-1 / sqrt(in), B at zero, as in peft. Shape letters: r rank, n parts of a
linear layer (3 for qkv, 2 for fc1, else 1).
"""

from __future__ import annotations

import dataclasses
import zlib

import torch
from megatron.core import parallel_state

from rmega.config import LoraArgs
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf import REWARD_HEAD, global_parameters
from rmega.models.lora import COLUMN, PLACES
from rmega.models.peft_folder import PeftFolder, modules_of
from rmega.models.weights import Part, WeightRule, whole


def adapter_table(geometry: Geometry, args: LoraArgs) -> list[WeightRule]:
    """Every global tensor of the adapters, made of the tensors that peft has for the family's
    modules (without peft's ``base_model.model.`` in front)."""
    h, f, d = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    a, g = geometry.num_attention_heads, geometry.num_query_groups
    names, rank = BACKBONES[geometry.family].names, args.lora_rank
    modules = modules_of(names)
    if len(names.qkv) == 1:  # one layer of the family's, which peft has no name for parts of
        modules["qkv"] = tuple(f"{names.qkv[0]}.{part}" for part in "qkv")
    rows = {"qkv": (a * d, g * d, g * d), "proj": (h,), "fc1": (f, f), "fc2": (h,)}
    columns = {"qkv": h, "proj": a * d, "fc1": h, "fc2": f}
    rules = []
    for i in range(geometry.num_layers):
        for target in args.targets:
            ours = f"decoder.layers.{i}.{PLACES[target]}.lora_{target}."
            layer = names.layer.format(i=i)
            theirs = [layer + module.removesuffix(".weight") for module in modules[target]]
            of_a = tuple(Part(f"{name}.lora_A.weight", 0, rank) for name in theirs)
            shape = (len(theirs) * rank, columns[target])
            rules.append(WeightRule(ours + "a", shape, of_a, None if target in COLUMN else 1))
            for part, (name, size) in enumerate(zip(theirs, rows[target], strict=True)):
                of_b = whole(f"{name}.lora_B.weight", size)
                cut = 0 if target in COLUMN else None
                rules.append(WeightRule(f"{ours}b{part}", (size, rank), of_b, cut))
    return rules


def above_dimensions(geometry: Geometry, args: LoraArgs) -> str:
    """The targets with a matrix whose smaller dimension the rank exceeds, as "qkv (16), fc1 (32)";
    "" for none. Accepted, as peft does, for it is exact: the update of such a matrix has no higher
    rank than its smaller dimension, and the rest of the adapter costs memory only."""
    smallest: dict[str, int] = {}
    for rule in adapter_table(dataclasses.replace(geometry, num_layers=1), args):
        target, _, factor = rule.name.rpartition("lora_")[2].partition(".")
        size = rule.shape[1] if factor == "a" else rule.shape[0]
        smallest[target] = min(size, smallest.get(target, size))
    return ", ".join(f"{name} ({n})" for name, n in smallest.items() if args.lora_rank > n)


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    geometry: Geometry,
    args: LoraArgs,
    *,
    seed: int = 0,
    start: PeftFolder | None = None,
) -> None:
    """Initialize this stage's adapters: A from ``seed`` and B zero, or from ``start``, and the
    reward head from ``start`` if it has one."""
    rules = {rule.name: rule for rule in adapter_table(geometry, args)}
    for name, parameter in global_parameters(model):
        if name == REWARD_HEAD and start is not None and start.has_head:
            parameter.copy_(start.read(start.head, parameter.shape))
        if name not in rules:
            continue
        rule, at = rules[name], 0
        values = new_a(rule, seed) if name.endswith(".a") else torch.zeros(rule.shape)
        for part in rule.parts if start is not None else ():
            size = part.stop - part.start
            if part.name in start:
                values[at : at + size] = start.read(part.name, (size, rule.shape[1]))
            at += size
        copy_shard(parameter, rule, values)


def copy_shard(parameter: torch.Tensor, rule: WeightRule, values: torch.Tensor) -> None:
    """Copy this rank's part of a global tensor; what belongs to padded heads becomes zero."""
    parameter.zero_()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    ((top, bottom),) = rule.local_rows(tp_rank, parameter.shape[0])
    left, right = rule.local_columns(tp_rank, parameter.shape[1]) or (0, parameter.shape[1])
    own = values[top:bottom, left:right]
    parameter[: own.shape[0], : own.shape[1]].copy_(own)


def new_a(rule: WeightRule, seed: int) -> torch.Tensor:
    """Initial values of one global A [n r, in], fp32: the same in every layout, because they
    depend on the tensor's name and ``seed`` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {rule.name}".encode()))
    bound = rule.shape[1] ** -0.5
    return torch.empty(rule.shape).uniform_(-bound, bound, generator=generator)
