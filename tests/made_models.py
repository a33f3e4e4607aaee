"""Small models and tokenizers with the files that real ones have, made in about a second: a Llama
and an InternLM2, whose vocabularies sentencepiece trains on the demonstration set."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch

from rmega.models.geometry import RopeScaling
from tests.hf_fixtures import hf_config, hf_tensors, tiny, write_folder
from tests.made_rows import demo_rows
from tests.tiny import scatter_weights

ROOT = Path(__file__).resolve().parents[1]
LLAMA_VOCAB = 512
INTERNLM2_PIECES = 2000
"""What sentencepiece learns for the InternLM2 layout; the special tokens follow."""
INTERNLM2_ADDED = [
    *(f"[UNUSED_TOKEN_{n}]" for n in range(141)),
    *("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *("<|im_end|>", "<|im_start|>"),
]
"""The last tokens of every InternLM2 vocabulary; the reward token is [UNUSED_TOKEN_130], the 17th
from the end."""
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}


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


def make_internlm2_tokenizer(folder: Path) -> Path:
    """InternLM2's tokenizer in small: tokenizer.model, tokenizer.json and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = internlm2_pieces()
    (folder / "tokenizer.model").write_bytes(proto)
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    write_tokenizer_json(folder, proto, internlm2_special(), normalizer, strip=0)
    write_json(folder / "tokenizer_config.json", tokenizer_config(32768))
    (folder / "chat_template.jinja").write_text(CHATML)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE.txt")
    return folder


def make_smollm2_tokenizer(folder: Path) -> Path:
    """SmolLM2's tokenizer in small: byte-level BPE after a split at digits, its special tokens
    first, a template that adds a system prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_lines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template="{% for message in messages %}{% if loop.first and messages[0]['role'] !="
        " 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}",
    ).save_pretrained(folder)
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


# ---- tokenizers


def demo_lines() -> Iterator[str]:
    """The lines of the texts of the demonstration set."""
    for row in demo_rows():
        for message in (*row["prompt"], *row["chosen"], *row["rejected"]):
            yield from filter(None, message["content"].splitlines())


def train_pieces(size: int, *, add_dummy_prefix: bool) -> bytes:
    """A sentencepiece BPE model of ``size`` pieces with byte fallback, trained on the texts of the
    demonstration set; a small one on those in ASCII."""
    lines = (line for line in demo_lines() if size > LLAMA_VOCAB or line.isascii())
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=proto,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        num_threads=1,
        minloglevel=2,
    )
    return proto.getvalue()


def internlm2_pieces() -> bytes:
    """tokenizer.model of the InternLM2 layout: the file of a protocol buffer grows by appending, so
    that the special tokens come last, as user-defined pieces."""
    user_defined = b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"  # score 0, type 4
    appended = b""
    for number in range(len(INTERNLM2_ADDED)):  # the last six get their names elsewhere
        name = f"[UNUSED_TOKEN_{number}]".encode()
        piece = b"\x0a" + bytes([len(name)]) + name + user_defined
        appended += b"\x0a" + bytes([len(piece)]) + piece
    return train_pieces(INTERNLM2_PIECES, add_dummy_prefix=False) + appended


def internlm2_special() -> dict[int, str]:
    return {**SPECIAL, **dict(enumerate(INTERNLM2_ADDED, INTERNLM2_PIECES))}


def write_tokenizer_json(
    folder: Path, proto: bytes, special: dict[int, str], normalizer: dict, *, strip: int
) -> None:
    """The same tokenizer for the ``tokenizers`` library; ``strip`` leading spaces are left out in
    decoding."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    for index, text in special.items():
        names[index] = text
    vocab = {name: index for index, name in enumerate(names)}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        decoders.append({"type": "Strip", "content": " ", "start": strip, "stop": 0})
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges(vocab, [i for i in range(259, len(vocab)) if i not in special]),
    }
    post_processor = {
        "type": "TemplateProcessing",
        "single": [bos, texts[0]],
        "pair": [bos, *texts],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **added_token(text)} for index, text in special.items()],
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    write_json(folder / "tokenizer.json", content)


def merges(vocab: dict[str, int], learned: Iterable[int]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE vocabulary, which lists its pieces in the order in which it
    learned them."""
    names, out = list(vocab), []
    for index in learned:
        name = names[index]
        halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        out += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return out


def added_token(text: str) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True}


def tokenizer_config(longest: int) -> dict:
    return {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": longest,
        "pad_token": "</s>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
