"""Reading a Hugging Face ``config.json`` strictly: what cannot be honoured is refused with file and
field (law 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmega.models.geometry import Geometry, RopeScaling

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def refuse(config: dict[str, Any], field: str, why: str) -> ValueError:
    """The error for a field of config.json that rmega cannot honour; ``_path`` is put in by
    ``read_config``."""
    return ValueError(f"{config.get('_path', 'config.json')}: {field}={config.get(field)!r}: {why}")


def read_config(folder: Path | str) -> dict[str, Any]:
    """``config.json`` of a model folder as a dict, plus ``_path`` for error messages."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a Hugging Face model folder (no config.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return {**config, "_path": str(path)}


def positive_int(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise refuse(config, field, "a positive whole number is needed")
    return value


def read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5), or ``rope_theta`` and
    ``rope_scaling`` (before).

    Where a folder carries both forms they must say the same.
    """
    if not config.get("rope_parameters"):
        return _read_rope_dict(config, "rope_scaling")
    theta, scaling = _read_rope_dict(config, "rope_parameters")
    old_theta, old_scaling = _read_rope_dict(config, "rope_scaling")
    if (config.get("rope_theta") is not None and theta != old_theta) or (
        config.get("rope_scaling") and scaling != old_scaling
    ):
        raise refuse(
            config,
            "rope_parameters",
            f"does not agree with rope_theta={config.get('rope_theta')!r} and "
            f"rope_scaling={config.get('rope_scaling')!r}",
        )
    return theta, scaling


def _read_rope_dict(config: dict[str, Any], field: str) -> tuple[float, RopeScaling]:
    given = config.get(field) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise refuse(config, field, "one set of rotary parameters for all layers is needed")
    theta = given.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise refuse(config, "rope_theta", "a positive number is needed")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise refuse(
            config,
            field,
            f"rotary scaling of type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})",
        )
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (
        None,
        1.0,
    ):
        raise refuse(
            config, "partial_rotary_factor", "rotation of a part of each head is not supported"
        )
    known = {
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "partial_rotary_factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
    if unknown := sorted(key for key in given if key not in known and given[key] is not None):
        raise refuse(config, field, f"unknown rotary parameter {', '.join(unknown)}")
    if kind == "default":
        return float(theta), RopeScaling()
    needs = ["factor"]
    if kind == "llama3":
        needs += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in needs:
        if not isinstance(given.get(key), (int, float)) or given[key] <= 0:
            raise refuse(config, field, f"rotary scaling of type {kind!r} needs a positive {key}")
    if kind != "llama3":
        return float(theta), RopeScaling(rope_type=kind, factor=float(given["factor"]))
    return float(theta), RopeScaling(
        rope_type=kind,
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_max_position_embeddings=int(given["original_max_position_embeddings"]),
    )


def read_shape(
    config: dict[str, Any],
    *,
    family: str,
    max_position_embeddings: int,
    norm_eps: float,
    reward_architectures: tuple[str, ...],
    base_architectures: tuple[str, ...],
) -> Geometry:
    """The fields that both families share; the two defaults are those of the published
    configuration classes."""
    names = tuple(config.get("architectures") or ())
    allowed = reward_architectures + base_architectures
    if unknown := [name for name in names if name not in allowed]:
        raise refuse(config, "architectures", f"{unknown[0]} is not one of {', '.join(allowed)}")
    if config.get("quantization_config"):
        raise refuse(
            config,
            "quantization_config",
            "quantised weights cannot be trained; use the unquantised folder",
        )
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise refuse(config, "hidden_act", "only the gated silu MLP is supported")
    has_head = any(name in reward_architectures for name in names)
    num_labels = (
        len(config["id2label"])
        if config.get("id2label")
        else config.get("num_labels", 1 if has_head else 2)
    )
    if has_head and num_labels != 1:
        raise ValueError(
            f"{config.get('_path', 'config.json')}: {names[0]} with {num_labels} labels is a"
            " classifier, not a reward model (num_labels must be 1)"
        )
    heads = positive_int(config, "num_attention_heads")
    groups = positive_int(config, "num_key_value_heads", heads)
    hidden = positive_int(config, "hidden_size")
    head_dim = positive_int(config, "head_dim", hidden // heads)
    if heads % groups:
        raise refuse(config, "num_key_value_heads", f"does not divide num_attention_heads={heads}")
    if config.get("head_dim") is None and hidden % heads:
        raise refuse(config, "num_attention_heads", f"does not divide hidden_size={hidden}")
    if head_dim % 2:
        raise refuse(config, "head_dim", "rotary embeddings need an even head dimension")
    theta, scaling = read_rope(config)
    eps = config.get("rms_norm_eps")
    return Geometry(
        family=family,
        num_layers=positive_int(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=positive_int(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=positive_int(config, "vocab_size"),
        max_position_embeddings=positive_int(
            config, "max_position_embeddings", max_position_embeddings
        ),
        norm_eps=float(norm_eps if eps is None else eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        has_reward_head=has_head,
    )


def write_shape(
    geometry: Geometry,
    source: dict[str, Any],
    *,
    architecture: str,
    dtype: str,
    reward_token_id: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """The fields of an export's ``config.json`` that both families share, readable by transformers
    4.44 and by 5.

    ``source`` is the base model's: what does not touch arithmetic (initialiser, begin and end of
    text) comes from it. Rotary parameters and dtype are written in the older and in the newer form,
    because each version reads one of them.
    """
    scaling = geometry.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.rope_type}
    if scaling.rope_type != "default":
        rope["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return {
        "architectures": [architecture],
        "model_type": geometry.family,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size,
        "num_hidden_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_query_groups,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.max_position_embeddings,
        "rms_norm_eps": geometry.norm_eps,
        "hidden_act": "silu",
        "initializer_range": source.get("initializer_range", 0.02),
        "use_cache": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": geometry.tie_word_embeddings,
        "rope_theta": geometry.rope_theta,
        **({} if scaling.rope_type == "default" else {"rope_scaling": rope}),
        "rope_parameters": {"rope_theta": geometry.rope_theta, **rope},
        "bos_token_id": source.get("bos_token_id"),
        "eos_token_id": source.get("eos_token_id"),
        "pad_token_id": pad_token_id,
        "reward_token_id": reward_token_id,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
