"""Comparison -> token ids: chat template, reward token, special-token text in user data,
over-length policy.

The ids of a conversation are what transformers' ``apply_chat_template`` gives, then the reward
token, whose hidden state the reward is read from. A comparison is stored as the longest common
prefix of its conversations and a suffix per response; the suffix always holds at least the reward
token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rmega.data.fingerprint import PROBES, own_template, tokenizer_fingerprint
from rmega.hub import check_folder_or_hub_name, one_line_for_retries
from rmega.preferences.comparison import Comparison, Message, Rejected
from rmega.preferences.fast_bpe import make_word_encoder
from rmega.preferences.messages import FIELDS

OVERLONG_POLICIES = ("left-prompt", "right", "drop", "error")

DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
)
"""For tokenizers that have no chat template."""

_REWARD_TOKENS = ("[UNUSED_TOKEN_130]", "<|reserved_special_token_0|>", "<|endoftext|>", "</s>")
_PAD_TOKENS = ("<|finetune_right_pad_id|>",)
_CHECK_EVERY = 1000
"""Every so many conversations the fast path is held against the tokenizer itself."""
BROKEN_UP = "special-token text in the data, broken up"
LEFT_OUT = "left out: the chat template has no place for it"
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What templates call the same field."""
_CONTROL_TEXT = re.compile(r"<\|[^|<>\s]+\|>|\[UNUSED_TOKEN_\d+\]|<(?:s|/s|unk|pad|bos|eos)>")


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
    ) -> None:
        """``tokenizer`` is transformers'; ``chat_template`` the text of a template, in place of the
        tokenizer's own.

        ``max_length`` counts the reward token; None: no limit.
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
        }
        self._trust_remote_code = False
        self.messages: list[str] = []
        """Things the user should be told, a line each."""
        template = chat_template or own_template(tokenizer)
        if template is None:
            template = DEFAULT_TEMPLATE
            self.messages.append(
                "the tokenizer has no chat template: a turn is written as a line 'role: content'"
            )
        self.template: str = template
        self.vocab_size = len(tokenizer)
        vocab = tokenizer.get_vocab()
        self.reward_token_id = _find_reward_token(tokenizer, vocab, reward_token, template)
        self.pad_token_id = _find_pad_token(tokenizer, vocab, self.reward_token_id)
        self._reward = np.array([self.reward_token_id], np.int32).tobytes()
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()[:16]
        self._control = _control_pattern(tokenizer, template, self.reward_token_id)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._words = make_word_encoder(tokenizer, PROBES)
        if self._words is None:
            self.messages.append("this tokenizer has no fast path here: texts are encoded whole")
        self._chat = _Chat(tokenizer, template)
        self._num_encoded = 0
        self._template_takes = {
            key for key in (*FIELDS, "tools") if re.search(rf"\b{key}\b", template)
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        reward_token: str = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        overlong: str = "left-prompt",
        trust_remote_code: bool = False,
    ) -> PairTokenizer:
        """From a tokenizer's folder or hub name; ``chat_template`` may also name a file."""
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # one process per core is the parallelism
        check_folder_or_hub_name(str(folder), "--tokenizer")
        from transformers import AutoTokenizer

        if chat_template is not None and os.path.exists(chat_template):
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        try:
            with one_line_for_retries():
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), trust_remote_code=trust_remote_code
                )
        except Exception as error:  # the hub, json and the Rust layer all raise their own kinds
            raise ValueError(
                f"--tokenizer {folder}: cannot be loaded ({_first_line(error)})"
            ) from None
        made = cls(
            tokenizer,
            name=str(folder),
            reward_token=reward_token,
            chat_template=chat_template,
            max_length=max_length,
            overlong=overlong,
        )
        made._trust_remote_code = trust_remote_code
        return made

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # a process that was spawned, not forked, loads it again
        if not self.name:
            raise TypeError("a PairTokenizer without a name cannot be sent to another process")
        return _load_again, (
            self.name,
            {**self._settings, "trust_remote_code": self._trust_remote_code},
        )

    # ---- conversations

    def escape(self, text: str) -> tuple[str, int]:
        """Break control-token text in user data: ``<|im_end|>`` becomes ``< |im_end|>``. Also the
        number of breaks."""
        count = 0
        while True:
            text, num = self._control.subn(
                lambda m: f"{m[0][0]} {m[0][1:]}" if len(m[0]) > 1 else " ", text
            )
            if not num:
                return text, count
            count += num

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
            ids, found = self._encode(comparison, limit)
        except Rejected as error:
            raise ValueError(str(error)) from None
        if notes is not None:
            notes += found
        return ids[0].tolist()

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
        comparison = self._clean(comparison, notes)
        known: dict[str, bytes] = {}
        ids = self._render(comparison, known)
        if limit is None or max(map(len, ids)) <= limit:
            return ids, notes
        return self._shorten(comparison, ids, limit, notes, known), notes

    def _clean(self, comparison: Comparison, notes: list[str]) -> Comparison:
        """Escape special-token text everywhere, and write tool calls as text where the template
        would lose them."""
        breaks = 0

        def walk(value: Any) -> Any:
            nonlocal breaks
            if isinstance(value, str):
                if self._control.search(value):
                    value, num = self.escape(value)
                    breaks += num
                return value
            if isinstance(value, dict):
                return {k: walk(v) for k, v in value.items()}
            return [walk(v) for v in value] if isinstance(value, (list, tuple)) else value

        def clean(messages: list[Message]) -> list[Message]:
            cleaned = []
            for message in messages:
                if len(message) > 2:
                    message = {k: v if k == "role" else walk(v) for k, v in message.items()}
                    self._fit(message, notes)
                elif self._control.search(message["content"]):
                    message = {"role": message["role"], "content": walk(message["content"])}
                cleaned.append(message)
            return cleaned

        tools = comparison.tools
        if tools is not None and "tools" not in self._template_takes:
            tools = None
            notes.append("tool descriptions left out: the chat template has no place for them")
        cleaned = Comparison(
            prompt=clean(comparison.prompt),
            responses=[clean(r) for r in comparison.responses],
            scores=comparison.scores,
            tools=walk(tools),
        )
        if breaks:
            notes.append(BROKEN_UP)
        return cleaned

    def _fit(self, message: Message, notes: list[str]) -> None:
        """Change a message with further fields to what the chat template writes."""
        for key in [k for k in message if k in FIELDS and k not in self._template_takes]:
            value = message.pop(key)
            alike = [k for k in _REASONING if k in self._template_takes and k not in message]
            if key in _REASONING and alike:
                message[alike[0]] = value
            elif key == "tool_calls":
                calls = json.dumps(value, ensure_ascii=False, default=str)
                content = message["content"]
                message["content"] = f"{content}\n{calls}" if content else calls
                notes.append("tool calls written as text: the chat template has no place for them")
            else:
                notes.append(f"message field {key} {LEFT_OUT}")

    def _render(self, comparison: Comparison, known: dict[str, bytes]) -> list[np.ndarray]:
        """int32 ids of each conversation, with the reward token. ``known``: see `_to_ids`."""
        try:
            texts = self._chat.render(
                [comparison.prompt + r for r in comparison.responses], comparison.tools
            )
        except Exception as error:  # templates raise what they like
            raise Rejected("template", _first_line(error)) from None
        try:
            return [np.frombuffer(self._to_ids(t, known) + self._reward, np.int32) for t in texts]
        except UnicodeEncodeError:
            raise Rejected("not_utf8", "half of a surrogate pair") from None

    def _to_ids(self, text: str, known: dict[str, bytes]) -> bytes:
        """int32 ids as bytes; ``known`` holds the segments of this comparison that were encoded
        already."""
        if self._words is None:
            backend = self._backend or self.tokenizer
            ids = backend.encode(text, add_special_tokens=False)
            return np.array(getattr(ids, "ids", ids), np.int32).tobytes()
        ids = self._words.encode(text, known)
        self._num_encoded += 1
        if self._num_encoded % _CHECK_EVERY == 0:
            assert ids == self._words.encode_whole(text), (
                f"the fast path gives other ids than the tokenizer: {text!r}"
            )
        return ids

    # ---- over length

    def _shorten(
        self,
        comparison: Comparison,
        ids: list[np.ndarray],
        limit: int,
        notes: list[str],
        known: dict[str, bytes],
    ) -> list[np.ndarray]:
        longest = max(map(len, ids))
        if self.overlong == "error":
            raise ValueError(
                f"a conversation of {longest} tokens, --max-length is {limit} (--overlong error)"
            )
        if self.overlong == "drop":
            raise Rejected("overlong", f"{longest} tokens")
        if self.overlong == "left-prompt":
            comparison, ids = self._drop_turns(comparison, ids, limit, notes, known)
            if max(map(len, ids)) > limit:
                ids = self._shorten_question(comparison, ids, limit, notes, known)
        if max(map(len, ids)) > limit:
            notes.append("cut: end of the response left out")
            ids = [
                i if len(i) <= limit else np.append(i[: limit - 1], np.int32(self.reward_token_id))
                for i in ids
            ]
        return ids

    def _drop_turns(
        self,
        comparison: Comparison,
        ids: list[np.ndarray],
        limit: int,
        notes: list[str],
        known: dict[str, bytes],
    ) -> tuple[Comparison, list[np.ndarray]]:
        """Leave out as few as possible of the oldest turns; the system prompt and the last question
        stay."""
        prompt = comparison.prompt
        keep = _first_turn(prompt)
        starts = [i for i, m in enumerate(prompt) if i > keep and m["role"] == "user"]
        if not starts:
            return comparison, ids

        def without(start: int) -> tuple[Comparison, list[np.ndarray]]:
            shorter = replace(comparison, prompt=prompt[:keep] + prompt[start:])
            return shorter, self._render(shorter, known)

        low, high, best = 0, len(starts) - 1, without(starts[-1])
        while low < high:  # later starts are shorter: the first that fits
            middle = (low + high) // 2
            tried = without(starts[middle])
            if max(map(len, tried[1])) <= limit:
                high, best = middle, tried
            else:
                low = middle + 1
        notes.append("cut: oldest turns of the prompt left out")
        return best

    def _shorten_question(
        self,
        comparison: Comparison,
        ids: list[np.ndarray],
        limit: int,
        notes: list[str],
        known: dict[str, bytes],
    ) -> list[np.ndarray]:
        """Cut the last question from its left until everything fits, to within a few tokens.

        A response that would not fit without any question leaves the prompt half of the room: then
        only the prompt is brought to that, and the caller cuts the response.
        """
        prompt, index = comparison.prompt, _first_turn(comparison.prompt)
        text = prompt[index]["content"] if index < len(prompt) else ""

        def rendered(keep: int) -> list[np.ndarray]:
            message = {**prompt[index], "content": text[len(text) - keep :]}
            return self._render(
                replace(comparison, prompt=[*prompt[:index], message, *prompt[index + 1 :]]), known
            )

        if not text:
            return ids
        measure, target = (lambda found: max(map(len, found))), limit
        without = rendered(0)
        if measure(without) > limit:
            measure, target = common_prefix_length, limit // 2
            if measure(ids) <= target or measure(without) > target:
                return ids
        low, high, best = 0, len(text), without  # characters kept: low fits, high does not
        low_size, high_size = measure(without), measure(ids)
        while high - low > 1 and target - low_size > 4:
            share = (target - 1 - low_size) / max(1, high_size - low_size)
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
            tried = rendered(middle)
            if measure(tried) <= target:
                low, low_size, best = middle, measure(tried), tried
            else:
                high, high_size = middle, measure(tried)
        notes.append("cut: beginning of the last question left out")
        return best

    def manifest(self) -> dict[str, Any]:
        """What a trainer or scorer must know to meet the same tokens again."""
        return {
            "tokenizer": self.name,
            "tokenizer_fingerprint": self.fingerprint,
            "template_hash": self.template_hash,
            "chat_template": self.template,
            "reward_token_id": self.reward_token_id,
            "pad_token_id": self.pad_token_id,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "overlong": self.overlong,
        }


class _Chat:
    """The chat template. Most of what ``apply_chat_template`` does besides is checking the
    messages, which were."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._calls = 0
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            self._compiled = _compile_jinja_template(template)
            self._names = dict(tokenizer.special_tokens_map)
        except (
            Exception
        ):  # another release; or a template that apply_chat_template will complain of
            self._compiled = None

    def render(self, conversations: list[list[Message]], tools: list[Any] | None) -> list[str]:
        """The text of each conversation. Raises what the template raises."""
        plain = (
            self._compiled is not None
            and tools is None
            and all(len(m) == 2 for c in conversations for m in c)
        )
        self._calls += 1
        if plain:
            fast = [
                self._compiled.render(
                    messages=c,
                    tools=None,
                    documents=None,
                    add_generation_prompt=False,
                    **self._names,
                )
                for c in conversations
            ]
            if self._calls % _CHECK_EVERY != 1:
                return fast
        texts = self._tokenizer.apply_chat_template(
            conversations, chat_template=self._template, tokenize=False, tools=tools
        )
        if plain and texts != fast:
            assert self._calls == 1, (
                "the compiled chat template and apply_chat_template give different texts"
            )
            self._compiled = None
        return texts


def common_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix, at least one less than the shortest sequence's
    length."""
    first = sequences[0]
    length = min(map(len, sequences)) - 1
    for other in sequences[1:]:
        differ = first[:length] != other[:length]
        if differ.any():
            length = int(differ.argmax())
    return length


def _first_turn(prompt: Sequence[Message]) -> int:
    """Index of the first message that is not the system's."""
    return next(
        (i for i, m in enumerate(prompt) if m["role"] not in ("system", "developer")), len(prompt)
    )


def _load_again(name: str, settings: dict[str, Any]) -> PairTokenizer:
    return PairTokenizer.load(name, **settings)


def _find_reward_token(tokenizer: Any, vocab: dict[str, int], wanted: str, template: str) -> int:
    if wanted != "auto":
        if wanted.isdecimal() and int(wanted) < len(
            tokenizer
        ):  # a number is an id, never the token of that text
            return int(wanted)
        if wanted in vocab:
            return vocab[wanted]
        raise ValueError(
            f"--reward-token {wanted}: neither a token of the tokenizer nor an id below"
            f" {len(tokenizer)}"
        )
    for text in (*_REWARD_TOKENS, tokenizer.eos_token):
        if text in vocab and not (text == "<|endoftext|>" and text in template):
            return vocab[text]
    raise ValueError(
        "--reward-token auto: the tokenizer has none of the known ones "
        f"({', '.join(_REWARD_TOKENS)}) and no end-of-text token; name one"
    )


def _find_pad_token(tokenizer: Any, vocab: dict[str, int], reward_token_id: int) -> int:
    candidates = [vocab.get(t) for t in _PAD_TOKENS]
    candidates += [
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        0,
        1,
    ]
    return next(int(c) for c in candidates if c is not None and c != reward_token_id)


def _control_pattern(tokenizer: Any, template: str, reward_token_id: int) -> re.Pattern[str]:
    """Matches every added token that steers the model: special ones, the template's, and those with
    such a name."""
    texts = set(tokenizer.all_special_tokens)
    for index, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        steers = len(text) > 2 and not text.isalnum() and text in template
        if token.special or index == reward_token_id or steers or _CONTROL_TEXT.fullmatch(text):
            texts.add(text)
    texts = {t for t in texts if t.strip()}
    if not texts:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=lambda t: (-len(t), t))))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
