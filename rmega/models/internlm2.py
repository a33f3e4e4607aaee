"""InternLM2 and InternLM2.5: a Llama block whose query, key and value projection is one tensor,
grouped as Megatron-Core groups it."""

from pathlib import Path

from rmega.models.family import NO_BIAS, Family
from rmega.models.weights import Names

CODE = Path(__file__).parent / "hf_internlm2"
MODEL = "modeling_internlm2.InternLM2ForRewardModel"

FAMILY = Family(
    model_type="internlm2",
    architecture="InternLM2ForRewardModel",
    base_architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    names=Names(
        embedding="model.tok_embeddings.weight",
        attention_norm="attention_norm.weight",
        qkv=("attention.wqkv",),
        projection="attention.wo.weight",
        mlp_norm="ffn_norm.weight",
        gate="feed_forward.w1.weight",
        up="feed_forward.w3.weight",
        down="feed_forward.w2.weight",
        head="v_head.weight",
        output="output.weight",
    ),
    defaults={"bias": True, "max_position_embeddings": 2048},
    only={"bias": NO_BIAS},
    own_head_dim=False,
    rope_type_field="type",
    code=(CODE / "configuration_internlm2.py", CODE / "modeling_internlm2.py"),
    export_fields={
        "attn_implementation": "eager",  # read by the published class
        # No entry for a causal model: a reward model loaded as one would get a random output matrix
        # silently.
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": MODEL,
            "AutoModelForSequenceClassification": MODEL,
        },
    },
)
