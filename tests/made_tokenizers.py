"""Small tokenizers with the files, special tokens and chat templates that real ones have, trained
on the demonstration set in about a second."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from tests.made_rows import demo_rows

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
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|vision_pad|>"),
)
QWEN_ADDED = ("<|fim_pad|>", "<think>", "</think>")
"""Added tokens that are not special."""
THINKING = (
    "{%- for message in messages %}"
    "{%- if message.role in ('user', 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- else %}"
    "{%- set content, thought = message.content, '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Of Qwen3: earlier thoughts are left out, the last turn has a thought, an empty one if need be."""
QWEN2_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL_CONTROL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]", "[control_9]")
MISTRAL_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}"
    "{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
)


# ---- byte-level BPE


def make_byte_level(
    folder: Path,
    *,
    size: int,
    special: Sequence[str],
    template: str,
    added: Sequence[str] = (),
    special_first: bool = False,
    digits: bool = False,
    normalizer: Any = None,
    **roles: str,
) -> int:
    """A byte-level BPE of ``size`` tokens and the special ones, as a fast tokenizer's folder; its
    number of tokens. ``added`` tokens are not special; ``roles`` are transformers' (eos_token)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special) if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_lines(), trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[t for t in special if t not in roles.values()],
        chat_template=template,
        **roles,
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def make_smollm2_tokenizer(folder: Path) -> Path:
    """SmolLM2's tokenizer in small: byte-level BPE after a split at digits, its special tokens
    first, a template that adds a system prompt."""
    make_byte_level(
        folder,
        size=1200,
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        special_first=True,
        digits=True,
        template="{% for message in messages %}{% if loop.first and messages[0]['role'] !="
        " 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    return folder


def make_qwen_tokenizer(folder: Path, *, thinking: bool = True) -> int:
    """Qwen3's tokenizer in small, or Qwen2.5's, whose template has no thoughts: special tokens
    last, none that begins a text; its size."""
    from tokenizers import normalizers

    return make_byte_level(
        folder,
        size=600,
        special=QWEN_SPECIAL,
        added=QWEN_ADDED if thinking else (),
        normalizer=normalizers.NFC(),
        template=THINKING if thinking else QWEN2_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def make_llama3_tokenizer(folder: Path) -> int:
    """Llama 3.1's tokenizer in small: special tokens last, none for padding, a template that prints
    the date; its size."""
    return make_byte_level(
        folder,
        size=600,
        special=LLAMA3_SPECIAL,
        template=LLAMA3_TEMPLATE,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


# ---- sentencepiece


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


def make_mistral_tokenizer(folder: Path) -> int:
    """Mistral 7B v0.3's tokenizer in small: tokenizer.model with control tokens in front of the
    bytes, none for padding, a template that refuses turns out of order; its size."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = train_pieces(LLAMA_VOCAB, add_dummy_prefix=True, control=MISTRAL_CONTROL)
    (folder / "tokenizer.model").write_bytes(proto)
    special = {**SPECIAL, **dict(enumerate(MISTRAL_CONTROL, len(SPECIAL)))}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    write_tokenizer_json(folder, proto, special, None, strip=1, pre_tokenizer=metaspace)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": {str(i): added_token(text) for i, text in special.items()},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": MISTRAL_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    return LLAMA_VOCAB


def demo_lines() -> Iterator[str]:
    """The lines of the texts of the demonstration set."""
    for row in demo_rows():
        for message in (*row["prompt"], *row["chosen"], *row["rejected"]):
            yield from filter(None, message["content"].splitlines())


def train_pieces(size: int, *, add_dummy_prefix: bool, control: Sequence[str] = ()) -> bytes:
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
        control_symbols=list(control),
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
    folder: Path,
    proto: bytes,
    special: dict[int, str],
    normalizer: dict | None,
    *,
    strip: int,
    pre_tokenizer: dict | None = None,
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
        "pre_tokenizer": pre_tokenizer,
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
