"""Rotation speeds and tables against transformers' own, for every kind of scaling that is
accepted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rmega.models.geometry import RopeScaling
from rmega.models.rotary import check_length, inverse_frequencies, rotary_tables
from tests.hf_fixtures import hf_config, tiny

SCALINGS = [
    RopeScaling(),
    RopeScaling(rope_type="linear", factor=2.5),
    RopeScaling(rope_type="dynamic", factor=2.0),
    RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    RopeScaling(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.rope_type}{s.factor:g}")
def test_against_transformers(scaling: RopeScaling, head_dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    geometry = tiny(
        "llama", rope_scaling=scaling, head_dim=head_dim, rope_theta=theta, hidden_size=4 * head_dim
    )
    config = LlamaConfig(
        **{k: v for k, v in hf_config(geometry).items() if k not in ("architectures", "model_type")}
    )
    theirs = LlamaRotaryEmbedding(config)
    speeds = inverse_frequencies(geometry)
    assert speeds.dtype == torch.float32 and torch.equal(speeds, theirs.inv_freq.float())
    assert theirs.attention_scaling == 1.0
    positions = torch.arange(geometry.max_position_embeddings)[None]
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = rotary_tables(positions, speeds, dtype)
        their_cos, their_sin = theirs(torch.zeros(1, dtype=dtype), positions)
        assert torch.equal(cos, their_cos[0, :, : head_dim // 2]) and torch.equal(
            sin, their_sin[0, :, : head_dim // 2]
        )
        assert torch.equal(
            cos, their_cos[0, :, head_dim // 2 :]
        )  # half rotation: both halves turn alike


def test_every_accepted_kind_is_tested_here() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from rmega.models.hf_config import ROPE_TYPES

    assert {s.rope_type for s in SCALINGS} == set(ROPE_TYPES)
    assert set(ROPE_TYPES) <= set(ROPE_INIT_FUNCTIONS) | {"default"}


def test_positions_are_what_is_asked_for() -> None:
    """Not a count from zero: a suffix goes on where its prefix ended."""
    speeds = inverse_frequencies(tiny("llama"))
    positions = torch.tensor([[0, 1, 2, 1, 2, 40]])
    cos, sin = rotary_tables(positions, speeds, torch.float32)
    assert torch.equal(cos[1], cos[3]) and torch.equal(sin[2], sin[4])
    exact = positions[0].double()[:, None] * speeds.double()
    assert (cos.double() - exact.cos()).abs().max() < 1e-5 and (
        sin.double() - exact.sin()
    ).abs().max() < 1e-5


def test_dynamic_scaling_is_exact_up_to_the_models_positions_and_refused_beyond() -> None:
    geometry = tiny("llama", rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))
    check_length(geometry, geometry.max_position_embeddings, "--data-path x")
    with pytest.raises(
        ValueError, match="--data-path x: has texts of 65 tokens.*dynamic.*--max-length 64"
    ):
        check_length(geometry, geometry.max_position_embeddings + 1, "--data-path x")
    check_length(dataclasses.replace(geometry, rope_scaling=RopeScaling()), 10**6, "--data-path x")
