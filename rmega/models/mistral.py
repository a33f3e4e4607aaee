"""Mistral: 7B from v0.2, Nemo, Small. A Llama block; v0.1 has a sliding window."""

from rmega.models.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForSequenceClassification",
    base_architectures=("MistralForCausalLM", "MistralModel"),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    sliding_window="always",
)
