"""Load this rank's weights from a Hugging Face folder: its own slices, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf_config import read_config
from rmega.models.hf_folder import HfFolder
from rmega.models.weights import WeightRule, hf_shapes

REWARD_HEAD = "reward_head.weight"
TIE_THRESHOLD = "tie_threshold"  # [1], the threshold of --loss rao_kupper is its softplus


def read_geometry(folder: Path | str) -> tuple[Geometry, dict[str, Any]]:
    """(geometry, ``config.json`` as a dict) of a model folder of any known family; ValueError on
    anything else."""
    config = read_config(folder)
    check_no_separate_head(Path(folder))
    family = config.get("model_type")
    if family not in BACKBONES:
        raise ValueError(
            f"{config['_path']}: model_type={family!r} is not supported (only"
            f" {', '.join(BACKBONES)})"
        )
    geometry = BACKBONES[family].read_geometry(config)
    return geometry, {key: value for key, value in config.items() if key != "_path"}


def check_no_separate_head(folder: Path) -> None:
    """ValueError where a head is in a separate file (LLaMA-Factory: value_head.safetensors)."""
    for file in sorted(folder.glob("*head*")):
        if file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            raise ValueError(
                f"{file}: a head in a file of its own, which rmega does not read; put its weight"
                " into the model's weights as a sequence classifier has it, or remove the file to"
                " start with a new head"
            )


def source_names(files: Iterable[str], geometry: Geometry, folder: Path | str) -> dict[str, str]:
    """Table name -> name in this folder, for every tensor of the weight table that the folder has.

    A bare backbone has no ``model.`` in front of its names, and a tied folder may have kept only
    the output matrix. A tensor that the table does not know, such as a bias, is refused: leaving it
    out would change the model silently.
    """
    backbone, names = BACKBONES[geometry.family], set(files)
    own = backbone.names
    table = hf_shapes(backbone.weight_table(geometry))
    bare = not any(name.startswith(own.prefix) for name in names)
    found = {name: name.removeprefix(own.prefix) if bare else name for name in table}
    if found[own.embedding] not in names and geometry.tie_word_embeddings:
        found[own.embedding] = own.output
    if missing := [
        name for name, theirs in found.items() if theirs not in names and name != own.head
    ]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{folder}: {found[missing[0]]}{more} not found in the weights; config.json does not"
            " describe them"
        )
    if found[own.head] not in names:
        if geometry.has_reward_head:
            raise ValueError(
                f"{folder}: config.json says it is a reward model, but {own.head} is not among"
                " its weights"
            )
        del found[own.head]
    ignored = {own.output, *(name for name in names if name.endswith("rotary_emb.inv_freq"))}
    if unknown := sorted(names - set(found.values()) - ignored):
        what = (
            "biases are not supported"
            if unknown[0].endswith(".bias")
            else "it is not part of this architecture"
        )
        raise ValueError(f"{folder}: tensor {unknown[0]} cannot be honored: {what}")
    return found


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global rmega tensor, parameter) of every parameter of one stage, wrapped or not."""
    core = model
    while not hasattr(core, "decoder"):
        core = core.module
    for name, parameter in core.named_parameters():
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):  # numbered within the stage
            number = core.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}.{name[match.end() :]}"
        yield name, parameter


@torch.no_grad()
def load_hf(
    model: torch.nn.Module,
    folder: Path | str,
    geometry: Geometry,
    *,
    tp_rank: int | None = None,
    tp_size: int | None = None,
    head_init: str = "zero",
    head_std: float | None = None,
    head_seed: int = 0,
) -> str:
    """Fill every parameter of this stage from a model folder; returns where the reward head comes
    from.

    The model's parameters may be of any float dtype and on any device. ``tp_rank`` and ``tp_size``
    default to those of Megatron-Core's process groups. The answer, such as ``"new head (zero)"`` or
    ``"head from model.safetensors"``, is the same on every rank, whether or not its stage holds the
    head. A new head is ``zero`` or ``normal`` with standard deviation ``head_std`` (default 1 /
    sqrt(h + 1)), drawn from ``head_seed`` alone, so that replicas agree.

    Raises ValueError naming folder and tensor if the folder lacks a tensor, has one of another
    shape, or one too many.
    """
    if tp_rank is None or tp_size is None:
        from megatron.core import parallel_state

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
    table = BACKBONES[geometry.family].weight_table(geometry)
    head = BACKBONES[geometry.family].names.head
    rules, shapes = {rule.name: rule for rule in table}, hf_shapes(table)
    source = HfFolder(folder)
    names = source_names(source.files, geometry, source.folder)
    for name, parameter in global_parameters(model):
        if ".lora_" in name or name == TIE_THRESHOLD:
            continue  # rmega.models.lora_weights.initialize; no folder has a threshold
        if name == REWARD_HEAD and head not in names:
            init_head(parameter, head_init, head_std, head_seed)
        else:
            fill(parameter, rules[name], source, names, shapes, tp_rank, tp_size)
    if head in names:
        return f"head from {source.files[names[head]]}"
    return f"new head ({head_init})"


def init_head(weight: torch.Tensor, init: str, std: float | None, seed: int) -> None:
    """A new reward head [1, h]: ``zero``, or ``normal`` with ``std`` (default 1 / sqrt(h + 1)) from
    ``seed``."""
    if init == "zero":
        weight.zero_()
        return
    if init != "normal":
        raise ValueError(f"--head-init {init}: zero or normal was expected")
    generator = torch.Generator().manual_seed(seed)
    std = (weight.shape[-1] + 1) ** -0.5 if std is None else std
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std)


def fill(
    parameter: torch.Tensor,
    rule: WeightRule,
    source: HfFolder,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    tp_rank: int,
    tp_size: int,
) -> None:
    """Copy this rank's part of one global tensor into ``parameter``; what Megatron-Core padded
    becomes zero."""
    expected = rule.local_shape(tp_size)
    assert len(expected) == parameter.dim() and all(
        have == want or (have > want and dim == rule.shard_dim and rule.shard_blocks == 1)
        for dim, (have, want) in enumerate(zip(parameter.shape, expected, strict=True))
    ), f"{rule.name}: {tuple(parameter.shape)} does not hold {expected}"
    dim = rule.shard_dim
    if dim is not None and parameter.shape[dim] * tp_size > rule.shape[dim]:
        parameter.zero_()
    columns = rule.local_columns(tp_rank, parameter.shape[1]) if parameter.dim() == 2 else None
    if columns is not None and columns[0] == columns[1]:
        return
    at = 0
    for start, stop in rule.local_rows(tp_rank, parameter.shape[0]):
        for offset, part in rule.overlaps(start, stop):
            theirs = names[part.name]
            if source.shape(theirs) != shapes[part.name]:
                raise ValueError(
                    f"{source.folder / source.files[theirs]}: {theirs} has shape"
                    f" {source.shape(theirs)}, config.json asks for {shapes[part.name]}"
                )
            rows = source.read(theirs, part.start, part.stop, columns)
            target = parameter[at + offset : at + offset + len(rows)]
            (target if target.dim() == 1 else target[:, : rows.shape[1]]).copy_(rows)
        at += stop - start
