"""Small models with the files that real ones have, made in about a second: a Llama, an InternLM2 as
on the hub, and a folder of each family."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rmega.models import BACKBONES
from rmega.models.geometry import RopeScaling
from tests.hf_fixtures import SCALED, hf_config, hf_tensors, tiny, write_folder
from tests.made_tokenizers import (
    CHATML,
    INTERNLM2_ADDED,
    INTERNLM2_PIECES,
    LLAMA_VOCAB,
    SPECIAL,
    added_token,
    internlm2_pieces,
    internlm2_special,
    make_internlm2_tokenizer,
    make_llama3_tokenizer,
    make_mistral_tokenizer,
    make_qwen_tokenizer,
    tokenizer_config,
    train_pieces,
    write_json,
    write_tokenizer_json,
)
from tests.tiny import scatter_weights


def make_llama(folder: Path) -> Path:
    """A Llama of 260 thousand random weights whose rewards differ between conversations: 5 layers,
    hidden size 64, 8 heads, 4 key/value heads, 512 tokens, 512 positions, tied embeddings; a
    tokenizer.json without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LLAMA_VOCAB,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    scatter_weights(model)
    model.save_pretrained(folder)
    proto = train_pieces(LLAMA_VOCAB, add_dummy_prefix=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    write_tokenizer_json(folder, proto, SPECIAL, normalizer, strip=1)
    write_json(folder / "tokenizer_config.json", tokenizer_config(512))
    (folder / "LICENSE.txt").write_text("MIT License\n\nRandom weights, made for a test.\n")
    return folder


def make_internlm2_of_the_hub(folder: Path) -> Path:
    """A random InternLM2 as a repository of the hub has it: tokenizer.model without tokenizer.json,
    an ``auto_map`` to code that is not there, dynamic rotary scaling, two layers."""
    special = internlm2_special()
    geometry = tiny(
        "internlm2",
        num_layers=2,
        vocab_size=INTERNLM2_PIECES + len(INTERNLM2_ADDED),
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0),
    )
    code = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
    write_folder(folder, hf_config(geometry, auto_map=code, pad_token_id=2), hf_tensors(geometry))
    (folder / "tokenizer.model").write_bytes(internlm2_pieces())
    config = {
        "auto_map": {
            "AutoTokenizer": [
                "tokenization_internlm2.InternLM2Tokenizer",
                "tokenization_internlm2_fast.InternLM2TokenizerFast",
            ]
        },
        "tokenizer_class": "InternLM2Tokenizer",
        **{
            f"{name}_token": text
            for name, text in zip(("unk", "bos", "eos"), SPECIAL.values(), strict=True)
        },
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": INTERNLM2_ADDED[:-7:-1],
        "added_tokens_decoder": {
            str(index): added_token(text)
            for index, text in special.items()
            if not text.startswith("[")
        },
        "chat_template": CHATML,
    }
    write_json(folder / "tokenizer_config.json", config)
    return folder


# ---- a folder of each family

FAMILY_FOLDERS = ("llama", "mistral", "qwen2", "qwen3", "internlm2", "internlm2.5", "internlm3")


def make_family(
    name: str, folder: Path, *, reward_model: bool = False, vocab: int | None = None, **fields: Any
) -> Path:
    """A random model of four layers in the layout of one of ``FAMILY_FOLDERS``, its tokenizer and
    chat template with it; ``fields`` go into config.json.

    A ``reward_model`` is one of another program: it records no reward token. ``vocab``: rows of the
    embedding, where they are not the tokenizer's.
    """
    family = {"internlm2.5": "internlm2", "internlm3": "llama"}.get(name, name)
    make_tokenizer = {
        "llama": make_llama3_tokenizer,
        "mistral": make_mistral_tokenizer,
        "qwen2": partial(make_qwen_tokenizer, thinking=False),
        "qwen3": make_qwen_tokenizer,
    }.get(name, make_internlm2_tokenizer)
    make_tokenizer(folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    own: dict[str, Any] = {
        "llama": {"rope_theta": 5e5, "rope_scaling": SCALED[-1]},
        "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
        "internlm2.5": {"rope_scaling": RopeScaling(rope_type="dynamic", factor=2.0)},
        "internlm3": {"head_dim": 16},
    }.get(name, {})
    geometry = tiny(
        family,
        **{"num_layers": 4, "max_position_embeddings": 1024, "vocab_size": vocab or size, **own},
    )
    if reward_model:
        architecture = BACKBONES[family].architecture
        fields = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, **fields}
    else:
        architecture = BACKBONES[family].base_architectures[0]
    if name == "internlm3":
        fields = {"model_type": name, "qkv_bias": False, "bias": False, **fields}
        architecture = architecture.replace("Llama", "InternLM3")
    tensors = hf_tensors(geometry, head=reward_model)
    return write_folder(folder, hf_config(geometry, architecture, **fields), tensors)
