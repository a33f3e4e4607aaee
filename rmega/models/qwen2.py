"""Qwen2 and Qwen2.5: a Llama block with biases on queries, keys and values."""

from rmega.models.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForSequenceClassification",
    base_architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    qkv_bias=True,
    sliding_window="switched",
)
