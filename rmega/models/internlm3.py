"""InternLM3: a Llama under another name. transformers loads it with its Llama classes, and it is
trained and exported as one."""

from rmega.models.family import NO_BIAS, Family

FAMILY = Family(
    model_type="internlm3",
    architecture="InternLM3ForSequenceClassification",
    base_architectures=(
        "InternLM3ForCausalLM",
        "InternLM3Model",
        "LlamaForCausalLM",  # as transformers 5 saves it
        "LlamaModel",
    ),
    trained_as="llama",
    defaults={"head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 32768},
    only={
        "qkv_bias": NO_BIAS,  # the published names, and those of transformers 5
        "bias": NO_BIAS,
        "attention_bias": NO_BIAS,
        "mlp_bias": NO_BIAS,
    },
)
