"""Llama: geometry and weight table, to and from ``LlamaForSequenceClassification`` with one label.

Shape letters: V vocabulary, h hidden size, f MLP width, a query heads, g key/value groups, d head
dimension.
"""

from __future__ import annotations

from typing import Any

from rmega.models.geometry import Geometry
from rmega.models.hf_config import read_shape, refuse, write_shape
from rmega.models.weights import Part, WeightRule, grouped_qkv, whole

ARCHITECTURE = "LlamaForSequenceClassification"
HEAD = "score.weight"
PREFIX = "model."
EMBEDDING_ALIAS = (  # holds the embedding where a tied folder kept only one of the two names
    "lm_head.weight"
)
IGNORED = ("lm_head.weight",)  # what a language model has and a reward model does not need


def read_geometry(hf_config: dict[str, Any]) -> Geometry:
    """Geometry of a Llama folder. Raises ValueError with file and field on anything it cannot
    honour."""
    for field in ("attention_bias", "mlp_bias"):
        if hf_config.get(field):
            raise refuse(hf_config, field, "biases are not supported")
    return read_shape(
        hf_config,
        family="llama",
        max_position_embeddings=2048,
        norm_eps=1e-6,
        reward_architectures=(ARCHITECTURE,),
        base_architectures=("LlamaForCausalLM", "LlamaModel"),
    )


def export_config(geometry: Geometry, source: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """``config.json`` of an export; ``fields`` are those of ``write_shape``."""
    return {
        **write_shape(geometry, source, architecture=ARCHITECTURE, **fields),
        "head_dim": geometry.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def weight_table(geometry: Geometry) -> list[WeightRule]:
    """Every global rmega tensor and the Llama tensors that it is stacked from, in the order of the
    layers."""
    h, f, d = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    a, g, vocab = geometry.num_attention_heads, geometry.num_query_groups, geometry.vocab_size
    rules = [
        WeightRule(
            "embedding.word_embeddings.weight",
            (vocab, h),
            whole("model.embed_tokens.weight", vocab),
            0,
        )
    ]
    for i in range(geometry.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        q, k, v = (f"{theirs}self_attn.{letter}_proj.weight" for letter in "qkv")
        gate_up = (
            Part(theirs + "mlp.gate_proj.weight", 0, f),
            Part(theirs + "mlp.up_proj.weight", 0, f),
        )
        rules += [
            WeightRule(
                ours + "input_layernorm.weight", (h,), whole(theirs + "input_layernorm.weight", h)
            ),
            WeightRule(
                ours + "self_attention.linear_qkv.weight",
                ((a + 2 * g) * d, h),
                grouped_qkv(q, k, v, groups=g, heads_per_group=a // g, head_dim=d),
                0,
            ),
            WeightRule(
                ours + "self_attention.linear_proj.weight",
                (h, a * d),
                whole(theirs + "self_attn.o_proj.weight", h),
                1,
            ),
            WeightRule(
                ours + "pre_mlp_layernorm.weight",
                (h,),
                whole(theirs + "post_attention_layernorm.weight", h),
            ),
            WeightRule(ours + "mlp.linear_fc1.weight", (2 * f, h), gate_up, 0, shard_blocks=2),
            WeightRule(
                ours + "mlp.linear_fc2.weight", (h, f), whole(theirs + "mlp.down_proj.weight", h), 1
            ),
        ]
    return rules + [
        WeightRule("decoder.final_layernorm.weight", (h,), whole("model.norm.weight", h)),
        WeightRule("reward_head.weight", (1, h), whole(HEAD, 1)),
    ]
