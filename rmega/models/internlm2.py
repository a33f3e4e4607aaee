"""InternLM2: geometry and weight table, to and from ``InternLM2ForRewardModel``.

Shape letters: V vocabulary, h hidden size, f MLP width, a query heads, g key/value groups, d head
dimension.
"""

from __future__ import annotations

from typing import Any

from rmega.models.geometry import Geometry
from rmega.models.hf_config import read_shape, refuse, write_shape
from rmega.models.weights import Part, WeightRule, whole

ARCHITECTURE = "InternLM2ForRewardModel"
HEAD = "v_head.weight"
PREFIX = "model."
EMBEDDING_ALIAS = (  # holds the embedding where a tied folder kept only one of the two names
    "output.weight"
)
IGNORED = ("output.weight",)  # what a language model has and a reward model does not need


def read_geometry(hf_config: dict[str, Any]) -> Geometry:
    """Geometry of an InternLM2 folder. Raises ValueError with file and field on anything it cannot
    honour."""
    # The published configuration class reads a missing "bias" as true.
    if hf_config.get("bias", True):
        raise refuse(
            hf_config,
            "bias",
            "attention biases are not supported (a missing field means true in InternLM2)",
        )
    geometry = read_shape(
        hf_config,
        family="internlm2",
        max_position_embeddings=2048,
        norm_eps=1e-6,
        reward_architectures=(ARCHITECTURE,),
        base_architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    )
    if geometry.head_dim * geometry.num_attention_heads != geometry.hidden_size:
        raise refuse(
            hf_config, "head_dim", "InternLM2 needs num_attention_heads x head_dim = hidden_size"
        )
    return geometry


def export_config(geometry: Geometry, source: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """``config.json`` of an export; ``fields`` are those of ``write_shape``. ValueError on a shape
    InternLM2 lacks."""
    if geometry.head_dim * geometry.num_attention_heads != geometry.hidden_size:
        raise ValueError(
            f"--format internlm2: {geometry.num_attention_heads} heads of {geometry.head_dim} do"
            f" not make the hidden size {geometry.hidden_size}, as InternLM2 needs"
        )
    config = write_shape(geometry, source, architecture=ARCHITECTURE, **fields)
    if "rope_scaling" in config:
        config["rope_scaling"] = {
            "type": config["rope_scaling"]["rope_type"],
            **config["rope_scaling"],
        }
    model = "modeling_internlm2.InternLM2ForRewardModel"
    # No entry for a causal model: a reward model loaded as one would get a random output matrix
    # without a word.
    return {
        **config,
        "bias": False,
        "attn_implementation": "eager",  # read by the published class
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": model,
            "AutoModelForSequenceClassification": model,
        },
    }


def weight_table(geometry: Geometry) -> list[WeightRule]:
    """Every global rmega tensor and the InternLM2 tensors that it is stacked from, in the order of
    the layers.

    ``attention.wqkv`` has, per group, its query heads, its key and its value: megatron-core's own
    layout.
    """
    h, f, d = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    a, g, vocab = geometry.num_attention_heads, geometry.num_query_groups, geometry.vocab_size
    qkv = (a + 2 * g) * d
    rules = [
        WeightRule(
            "embedding.word_embeddings.weight",
            (vocab, h),
            whole("model.tok_embeddings.weight", vocab),
            0,
        )
    ]
    for i in range(geometry.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        gate_up = (
            Part(theirs + "feed_forward.w1.weight", 0, f),
            Part(theirs + "feed_forward.w3.weight", 0, f),
        )
        rules += [
            WeightRule(
                ours + "input_layernorm.weight", (h,), whole(theirs + "attention_norm.weight", h)
            ),
            WeightRule(
                ours + "self_attention.linear_qkv.weight",
                (qkv, h),
                whole(theirs + "attention.wqkv.weight", qkv),
                0,
            ),
            WeightRule(
                ours + "self_attention.linear_proj.weight",
                (h, a * d),
                whole(theirs + "attention.wo.weight", h),
                1,
            ),
            WeightRule(
                ours + "pre_mlp_layernorm.weight", (h,), whole(theirs + "ffn_norm.weight", h)
            ),
            WeightRule(ours + "mlp.linear_fc1.weight", (2 * f, h), gate_up, 0, shard_blocks=2),
            WeightRule(
                ours + "mlp.linear_fc2.weight",
                (h, f),
                whole(theirs + "feed_forward.w2.weight", h),
                1,
            ),
        ]
    return rules + [
        WeightRule("decoder.final_layernorm.weight", (h,), whole("model.norm.weight", h)),
        WeightRule("reward_head.weight", (1, h), whole(HEAD, 1)),
    ]
