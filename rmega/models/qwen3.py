"""Qwen3 (dense): a Llama block with RMSNorm over the head dimension of queries and keys, and a head
dimension of its own."""

from rmega.models.family import NO_BIAS, Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForSequenceClassification",
    base_architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    only={"attention_bias": NO_BIAS},
    qk_norm=True,
    sliding_window="switched",
)
