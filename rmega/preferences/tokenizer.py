"""Comparison or conversation -> token ids: template, reward token, escaping, length limit.

The ids of a conversation are what transformers' ``apply_chat_template`` gives, then the reward
token unless they end with it already; its hidden state gives the reward. Without a reward token
(reward models of other programs) the reward is read at the last token of the templated text.
Messages and rendered text go the same way. A comparison is stored as the longest common prefix of
its conversations and a suffix per response; a suffix holds at least one token.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmega.data.fingerprint import PROBES, TEMPLATE_DATE, given_template, tokenizer_fingerprint
from rmega.hub import recorded_pad_token, recorded_reward_token, recorded_vocab_size, resolve_model
from rmega.io import one_line
from rmega.preferences.chat_template import CHECK_EVERY, DEFAULT_TEMPLATE, ChatTemplate
from rmega.preferences.comparison import Comparison, Message, Rejected
from rmega.preferences.fast_bpe import make_word_encoder
from rmega.preferences.fitting import BROKEN_UP, LEFT_OUT, fit
from rmega.preferences.load_tokenizer import load_tokenizer
from rmega.preferences.overlong import (
    OVERLONG_POLICIES,
    Overlong,
    common_prefix_length,
    cut_end,
    shorten,
)
from rmega.preferences.rendered_text import RenderedText
from rmega.preferences.special_tokens import (
    NO_REWARD_TOKEN,
    break_up,
    control_pattern,
    find_pad_token,
    find_reward_token,
    without_end,
)


class NotEncoded(ValueError):
    """A conversation without ids; ``reason`` is a key of `comparison.REASONS`."""

    def __init__(self, error: Rejected) -> None:
        super().__init__(str(error))
        self.reason = error.reason


@dataclass(frozen=True)
class Encoded:
    """A comparison as ids (int32 arrays); ``notes`` are the things done to it, for the counts."""

    prefix: np.ndarray
    suffixes: list[np.ndarray]
    notes: list[str]


class PairTokenizer:
    """Turns conversations and comparisons into ids, with one tokenizer, template, reward token and
    length limit."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str = "",
        reward_token: str = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        overlong: str = "left-prompt",
        vocab_size: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        """``tokenizer`` is transformers'; ``chat_template`` the text of a template, in place of the
        tokenizer's own.

        ``reward_token``: auto, none (nothing is appended), a token's text or its id. ``max_length``
        counts the reward token; None: no limit. ``vocab_size``: rows of the model's embedding,
        where known; reward and pad token have one. ``pad_token_id``: the one in the model's
        config.json, which counts where there is no reward token.
        """
        if overlong not in OVERLONG_POLICIES:
            raise ValueError(
                f"--overlong {overlong}: unknown; known are {', '.join(OVERLONG_POLICIES)}"
            )
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"--max-length {max_length}: must be at least 2 (one token and the reward token)"
            )
        self.tokenizer, self.name = tokenizer, name
        self.max_length, self.overlong = max_length, overlong
        self._settings = {
            "reward_token": reward_token,
            "chat_template": chat_template,
            "max_length": max_length,
            "overlong": overlong,
            "pad_token_id": pad_token_id,
        }
        self.messages: list[str] = []
        """What the user should know, a line each."""
        source = chat_template or given_template(tokenizer)
        if source is None:
            source = DEFAULT_TEMPLATE
            self.messages.append(
                "the tokenizer has no chat template: a turn is written as a line 'role: content'"
            )
        self._chat = ChatTemplate(tokenizer, source)
        self.template: str = self._chat.text
        if self._chat.dates or self.template != source:
            self.messages.append(
                f"the chat template prints the date: {TEMPLATE_DATE:%d %b %Y} on every day"
            )
        self.vocab_size, self._num_encoded = len(tokenizer), 0
        vocab, limit = tokenizer.get_vocab(), min(self.vocab_size, vocab_size or self.vocab_size)
        self.reward_token_id = find_reward_token(
            tokenizer, vocab, reward_token, self.template, limit
        )
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._words = make_word_encoder(tokenizer, PROBES)
        last_id = None
        if self.reward_token_id is None and (end := self._to_ids(self._chat.frame.end, {})):
            last_id = int(np.frombuffer(end, np.int32)[-1])
        self.pad_token_id = find_pad_token(
            tokenizer, vocab, self.reward_token_id, limit, recorded=pad_token_id, last_id=last_id
        )
        self.ends_with_pad = self.reward_token_id is None and self.pad_token_id == last_id
        """Whether the template ends with the pad token: then the reward is read before it."""
        self._reward = np.array(
            [] if self.reward_token_id is None else [self.reward_token_id], np.int32
        ).tobytes()
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest()[:16]
        self._control = control_pattern(tokenizer, self._chat.around_turns, self.reward_token_id)
        self._rendered = RenderedText(
            tokenizer, self._chat, self._control, self.reward_token_id, self.pad_token_id
        )
        if self._words is None:
            self.messages.append("this tokenizer has no fast path here: texts are encoded whole")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        reward_token: str = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        overlong: str = "left-prompt",
        pad_token_id: int | None = None,
    ) -> PairTokenizer:
        """From a tokenizer's folder or hub name; ``chat_template`` may also name a file.

        ``reward_token`` auto is the one that the folder's model was trained with, where it is a
        reward model; ``pad_token_id`` None the one that its config.json records.
        """
        if chat_template is not None and os.path.exists(chat_template):
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        messages: list[str] = []
        path = resolve_model(str(folder), flag="--tokenizer", weights=False)
        tokenizer = load_tokenizer(path, messages=messages)
        recorded = recorded_reward_token(path) if reward_token == "auto" else None
        made = cls(
            tokenizer,
            name=str(folder),
            reward_token=recorded or reward_token,
            chat_template=chat_template,
            max_length=max_length,
            overlong=overlong,
            vocab_size=recorded_vocab_size(path),
            pad_token_id=recorded_pad_token(path) if pad_token_id is None else pad_token_id,
        )
        if recorded == NO_REWARD_TOKEN:
            messages.append(
                f"{folder} is a reward model without a reward token: nothing is appended, rewards"
                f" are read at {made.last_token} (--reward-token names one)"
            )
        made.messages = messages + made.messages
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that was spawned, not forked, loads it again."""
        if not self.name:
            raise TypeError("a PairTokenizer without a name cannot be sent to another process")
        return _load_again, (self.name, self._settings)

    @property
    def reading(self) -> str:
        """Where the reward is read: ``reward token </s> (2)``, for example."""
        if self.reward_token_id is None:
            return f"no reward token (read at {self.last_token})"
        token = self.tokenizer.convert_ids_to_tokens(self.reward_token_id)
        return f"reward token {token} ({self.reward_token_id})"

    @property
    def last_token(self) -> str:
        """Where the reward is read without a reward token, in words."""
        if not self.ends_with_pad:
            return "the last token of the text"
        pad = self.tokenizer.convert_ids_to_tokens(self.pad_token_id)
        return f"the last token of the text before {pad}, which is the model's pad token, too"

    # ---- conversations

    def escape(self, text: str) -> tuple[str, int]:
        """Break control-token text in user data: ``<|im_end|>`` becomes ``< |im_end|>``. Also the
        number of breaks."""
        return break_up(text, self._control)

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        max_length: int | None = None,
        notes: list[str] | None = None,
    ) -> list[int]:
        """Ids of one conversation and the reward token, for scoring.

        Over ``max_length`` (default: the tokenizer's own limit) the ``--overlong`` policy applies;
        ValueError where it gives nothing. The ids equal those of the same conversation inside a
        stored comparison, unless it was too long: the responses of a comparison are cut together, a
        conversation by itself. ``notes`` is extended by what was changed on the way.
        """
        limit = max_length if max_length is not None else self.max_length
        comparison = Comparison(
            prompt=list(messages[:-1]), responses=[list(messages[-1:])], scores=[0.0], tools=tools
        )
        try:
            ids, changes = self._encode(comparison, limit)
        except Rejected as error:
            raise NotEncoded(error) from None
        except Overlong as error:  # the policy for training's data: here one conversation is left
            raise NotEncoded(Rejected("overlong", str(error))) from None
        if notes is not None:
            notes += changes
        return ids[0].tolist()

    def encode_text(
        self, text: str, *, max_length: int | None = None, notes: list[str] | None = None
    ) -> list[int]:
        """As `encode_conversation`, of a conversation that a chat template has rendered already.

        Where the turns can be told apart the ids are those of the messages. Other text is encoded
        as it is; over the limit its beginning or its end is left out. ValueError where there is
        nothing to score.
        """
        notes = [] if notes is None else notes
        limit = max_length if max_length is not None else self.max_length
        text = self._rendered.clean(text, notes)
        if not text.strip():
            raise ValueError("no text")
        if messages := self._rendered.messages(text, notes):
            return self.encode_conversation(messages, max_length=limit, notes=notes)
        if self.template != DEFAULT_TEMPLATE:  # which is a stand-in: the text has its own format
            text, breaks = break_up(text, self._control, self._rendered.written)
            notes += [BROKEN_UP] if breaks else []
        try:
            [ids] = self._with_reward_token([text], {})
            if limit is None or len(ids) <= limit:
                return ids.tolist()
            if self.overlong in ("drop", "error"):
                raise Rejected("overlong", f"{len(ids)} tokens, the limit is {limit}")
        except Rejected as error:
            raise NotEncoded(error) from None
        notes.append("cut: beginning or end of the text left out")
        if self.overlong == "left-prompt":
            return ids[-limit:].tolist()
        return self._end(cut_end(ids, limit, self.reward_token_id)).tolist()

    def encode_comparison(self, comparison: Comparison) -> Encoded:
        """Prefix and suffixes; raises `Rejected`."""
        ids, notes = self._encode(comparison, self.max_length)
        shared = common_prefix_length(ids)
        suffixes = [i[shared:] for i in ids]
        first = suffixes[0]
        if all(np.array_equal(first, s) for s in suffixes[1:]):
            left_out = sorted({n for n in notes if n.endswith(LEFT_OUT)})
            if left_out:
                raise Rejected("identical_in_template", "; ".join(left_out))
            raise Rejected(
                "identical_after_cut" if any("cut" in n for n in notes) else "identical_responses"
            )
        return Encoded(ids[0][:shared], suffixes, notes)

    def _encode(
        self, comparison: Comparison, limit: int | None
    ) -> tuple[list[np.ndarray], list[str]]:
        notes = list(comparison.notes)
        known: dict[str, bytes] = {}
        try:
            comparison = fit(comparison, self._chat, self._control, notes)
            ids = self._render(comparison, known)
        except RecursionError:
            raise Rejected("too_deep") from None
        if limit is not None and max(map(len, ids)) > limit:
            ids = shorten(
                comparison,
                ids,
                limit,
                self.overlong,
                lambda shorter: self._render(shorter, known),
                self.reward_token_id,
                notes,
            )
            ids = [self._end(i) for i in ids]
        return ids, notes

    def _render(self, comparison: Comparison, known: dict[str, bytes]) -> list[np.ndarray]:
        """int32 ids [tokens] of each conversation, with the reward token. ``known``: see
        `_to_ids`."""
        try:
            texts = self._chat.render(
                [comparison.prompt + r for r in comparison.responses], comparison.tools
            )
        except RecursionError:
            raise
        except Exception as error:  # templates raise what they like
            raise Rejected("template", one_line(error)) from None
        return self._with_reward_token(texts, known)

    def _with_reward_token(self, texts: list[str], known: dict[str, bytes]) -> list[np.ndarray]:
        """int32 ids [tokens] of each text. The one place that decides where they end: with the
        reward token, which is appended unless it ends them already; without one, before pad tokens,
        where transformers reads the reward."""
        try:
            ids = [self._to_ids(text, known) for text in texts]
        except UnicodeEncodeError:
            raise Rejected("not_utf8", "half of a surrogate pair") from None
        return [
            self._end(np.frombuffer(i if i.endswith(self._reward) else i + self._reward, np.int32))
            for i in ids
        ]

    def complete(self, ids: Sequence[int]) -> list[int]:
        """Ids that another program made, up to the token at which the reward is read."""
        reward = [] if self.reward_token_id in (None, ids[-1]) else [self.reward_token_id]
        return self._end(np.array([*ids, *reward], np.int32)).tolist()

    def _end(self, ids: np.ndarray) -> np.ndarray:
        """``ids`` [t] up to the token at which transformers reads the reward."""
        return ids if self.reward_token_id is not None else without_end(ids, self.pad_token_id)

    def _to_ids(self, text: str, known: dict[str, bytes]) -> bytes:
        """int32 ids as bytes; ``known`` holds the segments of this comparison that were encoded
        already."""
        if self._words is None:
            backend = self._backend or self.tokenizer
            ids = backend.encode(text, add_special_tokens=False)
            return np.array(getattr(ids, "ids", ids), np.int32).tobytes()
        ids = self._words.encode(text, known)
        self._num_encoded += 1
        if self._num_encoded % CHECK_EVERY == 0:
            assert ids == self._words.encode_whole(text), (
                f"the fast path gives other ids than the tokenizer: {text!r}"
            )
        return ids

    def manifest(self) -> dict[str, Any]:
        """What a trainer or scorer must know to meet the same tokens again."""
        return {
            "tokenizer": self.name,
            "tokenizer_fingerprint": self.fingerprint,
            "template_hash": self.template_hash,
            "chat_template": self.template,
            "reward_token_id": self.reward_token_id,
            "template_writes_reward_token": self._rendered.writes_reward,
            "pad_token_id": self.pad_token_id,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "overlong": self.overlong,
        }


def _load_again(name: str, settings: dict[str, Any]) -> PairTokenizer:
    return PairTokenizer.load(name, **settings)
