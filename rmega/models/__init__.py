"""Backbones: a page for each family, which says what differs between it and the others."""

from rmega.models import internlm2, internlm3, llama, mistral, qwen2, qwen3

BACKBONES = {
    page.FAMILY.model_type: page.FAMILY
    for page in (internlm2, internlm3, llama, mistral, qwen2, qwen3)
}
