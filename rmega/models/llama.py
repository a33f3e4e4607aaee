"""Llama: Llama 2 and 3, and what is laid out like them (Tulu, DeepSeek distills, SmolLM2)."""

from rmega.models.family import NO_BIAS, Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForSequenceClassification",
    base_architectures=("LlamaForCausalLM", "LlamaModel"),
    defaults={"max_position_embeddings": 2048},
    only={"attention_bias": NO_BIAS, "mlp_bias": NO_BIAS},
)
