"""The shape of a backbone, read from a Hugging Face ``config.json`` and nothing else.

Shape letters used here and in the weight tables: V vocabulary, h hidden size, f MLP width, L
layers, a query heads, g key/value groups, d head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; the field names are those of ``rope_parameters`` in
    transformers."""

    rope_type: str = "default"  # default | linear | dynamic | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything about a backbone that decides shapes or arithmetic.

    ``family`` is the key into ``rmega.models.BACKBONES``. ``qkv_bias``: the query, key and value
    projections have biases. ``qk_norm``: queries and keys are normalized over the head dimension,
    before rotation. ``has_reward_head`` says whether the folder that it was read from already is a
    reward model, so that its head is loaded instead of a new one made.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    has_reward_head: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Geometry:
        """The inverse of ``dataclasses.asdict``, as checkpoints keep it."""
        return cls(**{**fields, "rope_scaling": RopeScaling(**fields["rope_scaling"])})
