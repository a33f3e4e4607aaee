"""The exported tokenizer, in files that transformers 4.44, 4.57 and 5 read alike.

``tokenizer.json`` holds what the training's tokenizer does, ``tokenizer_config.json`` the tokens
with a role and the chat template. Code of the base model's tokenizer is not carried along.

Clients of a sequence classifier render the template and tokenize the text with the defaults, so the
template ends with the reward token, and tokenizing adds nothing: most templates write the
beginning-of-text token, which the defaults would double. ``InternLM2ForRewardModel`` keeps the
published convention: its methods append the reward token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rmega.data.fingerprint import PROBES, with_reward_token
from rmega.export.folder import write_json
from rmega.hub import has_tokenizer
from rmega.preferences.load_tokenizer import load_tokenizer

EXAMPLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
COPIED = ("tokenizer.model", "vocab.json", "merges.txt")  # for converters to other formats
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Fields of a base model's tokenizer_config.json that must not reach an export: code of its own,
# what only one generation of transformers reads, or reads in another form, and what tokenizer.json
# says already.
DROPPED = (
    "auto_map",
    "extra_special_tokens",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "sp_model_kwargs",
    "use_default_system_prompt",
    "spaces_between_special_tokens",
    "backend",
    "is_local",
    "local_files_only",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
)


def write_tokenizer(
    source: Path, folder: Path, info: dict[str, Any], *, render_only: bool = True
) -> dict[str, Any] | None:
    """Write the tokenizer of the checkpoint's ``source`` folder; returns an example for the recipe.

    The example is a conversation with its ids as the training makes them and as a client makes them
    from the written folder. ``info`` is the checkpoint's rmega.json; ``render_only`` prepares for
    clients that render and tokenize with the defaults. None if the checkpoint holds no tokenizer.
    Raises ValueError where the written files give other ids than the training.
    """
    if not has_tokenizer(source):
        return None
    from rmega.preferences.special_tokens import NO_REWARD_TOKEN, without_end
    from rmega.preferences.tokenizer import PairTokenizer

    template = (info.get("manifest") or {}).get("chat_template")
    reward_id = info["reward_token_id"]
    reward_token = NO_REWARD_TOKEN if reward_id is None else str(reward_id)
    ours = PairTokenizer.load(
        source, chat_template=template, reward_token=reward_token, pad_token_id=info["pad_token_id"]
    )
    expected = ours.encode_conversation(EXAMPLE)
    pad_id = info["pad_token_id"]
    if not ours.ends_with_pad:
        pad_id = choose_pad_token(ours.tokenizer, ours.template, info, expected)
    pad = ours.tokenizer.convert_ids_to_tokens(pad_id)

    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    backend = getattr(ours.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{source}: a tokenizer written in Python, which has no tokenizer.json, cannot be"
            " exported"
        )
    write_backend(backend, folder / "tokenizer.json", adds_nothing=render_only)
    written_template = ours.template
    if render_only and reward_id is not None:
        written_template = _ending_with(ours, expected)
    given = source / "tokenizer_config.json"
    base = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else {}
    config = config_of(ours.tokenizer, base, written_template, pad)
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(written_template, encoding="utf-8")

    written = load_tokenizer(folder, flag="--output")
    text = written.apply_chat_template(EXAMPLE, tokenize=False)
    ids = written.encode(text, add_special_tokens=render_only)  # as a client makes them
    rendered = reward_id in (None, ids[-1])
    if not rendered:
        ids.append(reward_id)
    if ours.ends_with_pad:
        ids = without_end(np.array(ids, np.int32), pad_id).tolist()
    pairs = [(ids, expected)]
    pairs += [
        [t.encode(probe, add_special_tokens=False) for t in (written, ours.tokenizer)]
        for probe in PROBES
    ]
    for theirs, wanted in pairs:
        if theirs != wanted:
            raise ValueError(
                f"{folder}: the written tokenizer gives other ids than the training: {theirs}, not"
                f" {wanted}"
            )
    return {
        "messages": EXAMPLE,
        "text": text,
        "token_ids": ids,
        "reward_token": None if reward_id is None else written.convert_ids_to_tokens(reward_id),
        "template_writes_reward_token": rendered and reward_id is not None,
        "template_ends_with_pad_token": ours.ends_with_pad,
        "pad_token": pad,
        "pad_token_id": pad_id,
    }


def _ending_with(ours: Any, expected: list[int]) -> str:
    """The template with the reward token behind it, where a client's text then has the ``expected``
    ids; else the template itself."""
    token = ours.tokenizer.convert_ids_to_tokens(ours.reward_token_id)
    template = with_reward_token(ours.template, token)
    texts = [
        ours.tokenizer.apply_chat_template(EXAMPLE, chat_template=t, tokenize=False)
        for t in (ours.template, template)
    ]
    plain, appended = (ours.tokenizer.encode(t, add_special_tokens=False) for t in texts)
    return template if appended == expected != plain else ours.template


def config_of(
    tokenizer: Any, base: dict[str, Any], template: str, pad: str | None
) -> dict[str, Any]:
    """``tokenizer_config.json``. ``base`` is the base model's, whose other fields are kept.

    Special tokens are plain text: their white space rules are in ``tokenizer.json``. Those without
    a role are ``additional_special_tokens``, which all generations read; transformers 5 writes them
    as a list ``extra_special_tokens``, which 4.57 refuses.
    """
    config = {key: value for key, value in base.items() if key not in DROPPED}
    for role in ROLES:
        config.pop(role, None)
        if (token := getattr(tokenizer, role, None)) is not None:
            config[role] = str(token)
    named = {config.get(role) for role in ROLES}
    more = list(getattr(tokenizer, "extra_special_tokens", None) or ())
    # a model's own roles, such as image_token, but not padding: an export may choose another token
    more += [t for t in tokenizer.all_special_tokens if t != tokenizer.pad_token]
    more = [text for text in dict.fromkeys(map(str, more)) if text not in named]
    config.pop("additional_special_tokens", None)
    return {
        **config,
        **({"additional_special_tokens": more} if more else {}),
        **({} if pad is None else {"pad_token": pad}),
        # The class of the base model may be code of its own, or one that reads other files.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Decoders take no token_type_ids, which this class would make.
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template,
    }


def write_backend(backend: Any, path: Path, *, adds_nothing: bool) -> None:
    """``tokenizer.json``, with BPE merges as "a b", which every version of tokenizers reads; pairs
    are read by 0.20 and later only. ``adds_nothing``: tokenizing adds no special tokens."""
    content = json.loads(backend.to_str())
    if adds_nothing:
        content["post_processor"] = None
    content["truncation"] = content["padding"] = None  # what an earlier call has set
    merges = content.get("model", {}).get("merges") or ()
    pairs = [pair for pair in merges if not isinstance(pair, str)]
    if pairs and not any(" " in part for pair in pairs for part in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def choose_pad_token(
    tokenizer: Any, template: str, info: dict[str, Any], example: list[int]
) -> int:
    """A pad token that no text contains: the training's own, else a special token that the template
    does not write.

    transformers 4 reads a Llama's reward before the *first* pad token of a row. Many tokenizers pad
    with the token that ends every turn (SmolLM2: ``<|im_end|>``), so the reward would be read in
    the middle of the text, silently. The training pads nothing, so an export is free to
    choose. The training's own where no token is free.
    """
    used = {*example, info["reward_token_id"]}
    for kept in info.get("verification") or ():
        used.update(kept["prefix"], *kept["suffixes"])
    special = {
        int(index): str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if index in tokenizer.all_special_ids or token.special
    }
    free = sorted(
        (index for index, text in special.items() if text not in template),
        key=lambda index: (
            "pad" not in special[index].lower(),
            special[index] != tokenizer.unk_token,
            index,
        ),
    )
    own = info["pad_token_id"]
    candidates = [own] if tokenizer.convert_ids_to_tokens(own) not in template else []
    for index in (*candidates, *free):
        if index not in used and index < info["geometry"]["vocab_size"]:
            return index
    return own
