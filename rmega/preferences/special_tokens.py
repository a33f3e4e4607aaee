"""Reward token, pad token, and escaping of control-token text in user data."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

NO_REWARD_TOKEN = "none"
"""Value of ``--reward-token``: nothing is appended, the reward is read at the last token."""

_REWARD_TOKENS = ("[UNUSED_TOKEN_130]", "<|reserved_special_token_0|>", "<|endoftext|>", "</s>")
_PAD_TOKENS = ("<|finetune_right_pad_id|>",)
_CONTROL_TEXT = re.compile(
    r"<[|｜][^|｜<>\s]+[|｜]>|\[UNUSED_TOKEN_\d+\]|<(?:s|/s|unk|pad|bos|eos)>"
)
"""Names of control tokens; DeepSeek's are written with full-width bars, and some are not marked as
special."""


def find_reward_token(
    tokenizer: Any, vocab: dict[str, int], wanted: str, template: str, limit: int
) -> int | None:
    """The id of the reward token ``wanted`` (auto, none, a token's text or its id); None for none.

    Ids from ``limit`` on have no row in the model's embedding.
    """
    if wanted == NO_REWARD_TOKEN:
        return None
    if wanted != "auto":
        # a number is an id, never the token of that text
        number = int(wanted) if wanted.isdecimal() else vocab.get(wanted)
        if number is not None and number < limit:
            return number
        raise ValueError(
            f"--reward-token {wanted}: neither a token of the tokenizer nor an id below {limit}"
        )
    for text in (*_REWARD_TOKENS, tokenizer.eos_token):
        if vocab.get(text, limit) < limit and not (text == "<|endoftext|>" and text in template):
            return vocab[text]
    raise ValueError(
        "--reward-token auto: the tokenizer has none of the known ones "
        f"({', '.join(_REWARD_TOKENS)}) and no end-of-text token; name one"
    )


def find_pad_token(
    tokenizer: Any,
    vocab: dict[str, int],
    reward_token_id: int | None,
    limit: int,
    *,
    recorded: int | None = None,
    last_id: int | None = None,
) -> int:
    """A padding token that is not the reward token and has a row in the embedding.

    Without a reward token, transformers reads the reward at the last token that is not the model's
    pad token: that is the ``recorded`` one of its config.json, or else one that is not ``last_id``,
    which ends every text.
    """
    if reward_token_id is None:
        if recorded is not None and recorded < limit:
            return recorded
        reward_token_id = last_id
    candidates = [vocab.get(text) for text in _PAD_TOKENS]
    candidates += [
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        0,
        1,
    ]
    return next(
        int(c) for c in candidates if c is not None and c != reward_token_id and int(c) < limit
    )


def without_end(ids: np.ndarray, token: int) -> np.ndarray:
    """``ids`` [t] up to the last that is not ``token``; the first one at least."""
    kept = np.flatnonzero(ids != token)
    return ids[: int(kept[-1]) + 1 if len(kept) else 1]


def control_pattern(
    tokenizer: Any, around_turns: str, reward_token_id: int | None
) -> re.Pattern[str]:
    """Matches every added token that steers the model: special ones, those in ``around_turns`` (the
    text that the chat template writes around its turns), and those with such a name.

    Other added tokens, such as ``<think>``, are text like any other: a reply may contain them.
    """
    texts = set(tokenizer.all_special_tokens)
    for index, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        steers = len(text) > 2 and not text.isalnum() and text in around_turns
        if token.special or index == reward_token_id or steers or _CONTROL_TEXT.fullmatch(text):
            texts.add(text)
    texts = {t for t in texts if t.strip()}
    if not texts:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=lambda t: (-len(t), t))))


def break_up(
    text: str, control: re.Pattern[str], kept: frozenset[str] = frozenset()
) -> tuple[str, int]:
    """Break control-token text: ``<|im_end|>`` becomes ``< |im_end|>``. Also the number of breaks.
    Tokens in ``kept`` stay."""
    count = 0

    def broken(match: re.Match[str]) -> str:
        nonlocal count
        token = match[0]
        if token in kept:
            return token
        count += 1
        return f"{token[0]} {token[1:]}" if len(token) > 1 else " "

    while True:  # until no break has made another token
        before = count
        text = control.sub(broken, text)
        if count == before:
            return text, count
