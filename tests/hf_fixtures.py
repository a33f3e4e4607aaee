"""Tiny model folders and a stage without an engine, shared by the tests of reading and writing
Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from rmega.models import BACKBONES
from rmega.models.geometry import Geometry, RopeScaling
from rmega.models.weights import hf_shapes

TINY = Geometry(
    family="llama",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=50,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
)

# Scaled rotary embeddings, one of each type.
SCALED = [
    RopeScaling(rope_type="linear", factor=2.0),
    RopeScaling(rope_type="dynamic", factor=3.0),
    RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
]

# Families that are trained under their own name.
FAMILIES = tuple(name for name, family in BACKBONES.items() if not family.trained_as)


def tiny(family: str, **changes: object) -> Geometry:
    own = {"qkv_bias": BACKBONES[family].qkv_bias, "qk_norm": BACKBONES[family].qk_norm}
    return dataclasses.replace(TINY, family=family, **{**own, **changes})


def hf_config(geometry: Geometry, architecture: str | None = None, **fields: object) -> dict:
    """A ``config.json`` as other people's tools write it, before transformers 5."""
    family = BACKBONES[geometry.family]
    config = {
        "architectures": [architecture or family.base_architectures[0]],
        "model_type": geometry.family,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size,
        "num_hidden_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_query_groups,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.max_position_embeddings,
        "rms_norm_eps": geometry.norm_eps,
        "rope_theta": geometry.rope_theta,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": geometry.tie_word_embeddings,
    }
    config |= {
        "internlm2": {"bias": False},
        "mistral": {"sliding_window": None, "head_dim": geometry.head_dim},
        "qwen2": {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": False, "head_dim": geometry.head_dim},
    }.get(geometry.family, {})
    if geometry.head_dim * geometry.num_attention_heads != geometry.hidden_size:
        config["head_dim"] = geometry.head_dim
    if geometry.rope_scaling != RopeScaling():
        scaling = dataclasses.asdict(geometry.rope_scaling)
        kind = scaling.pop("rope_type")
        keep = scaling if kind == "llama3" else {"factor": scaling["factor"]}
        config["rope_scaling"] = {"type" if kind != "llama3" else "rope_type": kind, **keep}
    return {**config, **fields}


def is_norm(name: str) -> bool:
    """Whether a Hugging Face tensor is the weight of a norm."""
    return name.endswith("norm.weight")


def hf_tensors(
    geometry: Geometry, *, head: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the family; norms near one, so that activations stay in
    range, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    backbone = BACKBONES[geometry.family]
    tensors = {}
    for name, shape in hf_shapes(backbone.weight_table(geometry)).items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * values if is_norm(name) else 0.2 * values).to(dtype)
    if not head:
        del tensors[backbone.names.head]
    return tensors


def write_folder(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(
            {name: tensors[name] for name in names[i::shards]},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


class Stage(torch.nn.Module):
    """The parameters of one rank of one pipeline stage under megatron-core's names, and nothing
    else."""

    def __init__(
        self,
        geometry: Geometry,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        layers: range | None = None,
        vocab: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layers = range(geometry.num_layers) if layers is None else layers
        self.decoder = SimpleNamespace(layers=[SimpleNamespace(layer_number=i + 1) for i in layers])
        self.names = {}
        for rule in BACKBONES[geometry.family].weight_table(geometry):
            shape, name = list(rule.shape), rule.name
            if name.startswith("embedding"):
                if 0 not in layers:
                    continue
                shape[0] = vocab * tp_size if vocab else shape[0]
            if (
                name.startswith(("decoder.final", "reward_head"))
                and geometry.num_layers - 1 not in layers
            ):
                continue
            if name.startswith("decoder.layers."):
                number = int(name.split(".")[2])
                if number not in layers:
                    continue
                name = name.replace(f".{number}.", f".{number - layers.start}.", 1)
            if rule.shard_dim is not None:
                shape[rule.shard_dim] //= tp_size
            kind = torch.float32 if name.startswith("reward_head") else dtype
            self.names[name] = torch.nn.Parameter(torch.full(shape, float("nan"), dtype=kind))

    def named_parameters(self, *args: object, **kwargs: object):
        return iter(self.names.items())
