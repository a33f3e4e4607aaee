"""Strict reading of ``config.json``: what cannot be honored is refused with file and field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rmega.io import read_json, refuse_pointer
from rmega.models.geometry import Geometry, RopeScaling

MAX_NUMBER = 1e30
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def refuse(config: dict[str, Any], field: str, why: str) -> ValueError:
    """The error for a field of config.json that rmega cannot honor. ``_path`` is set by
    ``read_config``; ``_missing`` names fields whose value is the default of their class."""
    value = config.get(field)
    if field in config.get("_missing", ()):
        why += f" (a missing field means {value!r})"
    return ValueError(f"{config.get('_path', 'config.json')}: {field}={value!r}: {why}")


def read_config(folder: Path | str) -> dict[str, Any]:
    """``config.json`` of a model folder as a dict, plus ``_path`` for error messages."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a Hugging Face model folder (no config.json)")
    refuse_pointer(path)
    config = read_json(path)
    return {**config, "_path": str(path)}


def positive_int(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or not is_positive(value) or value >= 2**31:
        raise refuse(config, field, "a positive whole number is needed")
    return value


def is_positive(value: Any) -> bool:
    """Whether a value from JSON, which may be NaN, is a positive number to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


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
    if not is_positive(theta):
        raise refuse(config, "rope_theta", "a positive number is needed")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise refuse(
            config,
            field,
            f"rotary scaling of type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})",
        )
    rotated = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise refuse(
            config, "partial_rotary_factor", "rotation of a part of each head is not supported"
        )
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    known = fields | {"rope_theta", "type", "partial_rotary_factor"}
    if unknown := sorted(key for key in given if key not in known and given[key] is not None):
        raise refuse(config, field, f"unknown rotary parameter {', '.join(unknown)}")
    if kind == "default":
        return float(theta), RopeScaling()
    needs = ["factor"]
    if kind == "llama3":
        needs += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in needs:
        if not is_positive(given.get(key)):
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


def rope_fields(geometry: Geometry, *, type_field: str = "rope_type") -> dict[str, Any]:
    """The rotary fields of an export's ``config.json``, in both forms that ``read_rope`` reads.

    ``type_field`` names the type in the older form, which has no more fields than its readers
    accept.
    """
    scaling = geometry.rope_scaling
    stretch: dict[str, Any] = {}
    if scaling.rope_type != "default":
        stretch["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        stretch |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    old = {type_field: scaling.rope_type, **stretch} if stretch else None
    return {
        "rope_theta": geometry.rope_theta,
        **({"rope_scaling": old} if old else {}),
        "rope_parameters": {
            "rope_theta": geometry.rope_theta,
            "rope_type": scaling.rope_type,
            **stretch,
        },
    }
