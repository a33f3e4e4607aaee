"""Rotary position tables for packed tokens.

Shape letters: t tokens, d head dimension. Formulas are those of transformers'
``modeling_rope_utils`` (default, linear, llama3), so that rewards agree with it to rounding.
"""

from __future__ import annotations

import math

import torch

from rmega.models.geometry import Geometry


def inverse_frequencies(geometry: Geometry) -> torch.Tensor:
    """fp32 [d/2] on the CPU: one rotation speed per pair of channels.

    ``dynamic`` scaling changes nothing up to the model's own number of positions, which is all that
    it is accepted for (``check_length``): beyond, its speeds depend on the longest text of a batch,
    and so would a reward.
    """
    d, scaling = geometry.head_dim, geometry.rope_scaling
    speeds = 1.0 / (geometry.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))
    if scaling.rope_type in ("default", "dynamic"):
        return speeds
    if scaling.rope_type == "linear":
        return speeds / scaling.factor
    assert scaling.rope_type == "llama3", scaling.rope_type
    wavelength = 2 * math.pi / speeds
    old = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (old / wavelength - low) / (high - low)
    blended = (1 - blend) * speeds / scaling.factor + blend * speeds
    slowed = torch.where(wavelength > old / low, speeds / scaling.factor, speeds)
    between = (wavelength <= old / low) & (wavelength >= old / high)
    return torch.where(between, blended, slowed)


def rotary_tables(
    position_ids: torch.Tensor, speeds: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [t, d/2] in ``dtype`` for ``position_ids`` [1, t] and ``speeds`` [d/2] on one
    device; angles in fp32 as transformers computes them."""
    angles = position_ids[0].float()[:, None] * speeds[None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check_length(geometry: Geometry, length: int, where: str) -> None:
    """Raise ValueError, naming ``where``, if texts of ``length`` tokens cannot be given positions
    that mean the same everywhere."""
    if geometry.rope_scaling.rope_type == "dynamic" and length > geometry.max_position_embeddings:
        raise ValueError(
            f"{where}: has texts of {length:,} tokens, and the model's dynamic RoPE scaling is"
            f" exact only up to its {geometry.max_position_embeddings:,} positions (beyond, rewards"
            " would depend on the batch); preprocess with --max-length"
            f" {geometry.max_position_embeddings}"
        )
