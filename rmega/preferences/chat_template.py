"""The chat template of a tokenizer: messages -> text, and what it writes around the turns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rmega.data.fingerprint import freeze_date, frozen_dates
from rmega.preferences.comparison import Message, assistant, user

DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
)
"""For tokenizers that have no chat template."""

CHECK_EVERY = 1000
"""Every so many renderings (and encodings) the fast path is compared with transformers itself."""
_EMPTY_THOUGHTS = re.compile(r"<([^<>/\s]+)>\s*</\1>")
_SYSTEM, _Q1, _A1, _Q2, _A2 = "Sys0probe", "Que1probe", "Ans1probe", "Que2probe", "Ans2probe"


@dataclass(frozen=True)
class Frame:
    """The text that a template writes around the contents of its turns; empty where unknown."""

    start: str = ""
    """Before the first question, where there is no system turn."""
    system_start: str = ""
    system_end: str = ""
    """Between a system turn and the first question."""
    to_answer: str = ""
    to_question: str = ""
    end: str = ""
    """After the last answer: ``<|im_end|>`` and a newline, for example."""
    generation_prompt: str = ""
    """What ``add_generation_prompt`` appends to a question."""


class ChatTemplate:
    """A template, rendered as ``apply_chat_template`` renders it, on the same day every day.

    Most of what ``apply_chat_template`` does besides is checking the messages, which were checked.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.text, self.dates = freeze_date(source), frozen_dates(source)
        self._tokenizer, self._calls = tokenizer, 0
        self._names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._words: frozenset[str] | None = None
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            self._compiled = _compile_jinja_template(self.text)
            self._words = _words_of(self._compiled.environment.parse(self.text))
        except Exception:  # another release; or what apply_chat_template will complain of
            self._compiled = None

    def takes(self, key: str) -> bool:
        """Whether the template reads this key of a message, or this argument."""
        return key in self.text if self._words is None else key in self._words

    def writes(self, token: str) -> bool:
        """Whether the template itself writes this special token, by its text or by its role."""
        roles = [role for role, value in self._names.items() if value == token]
        return token in self.text or any(re.search(rf"\b{role}\b", self.text) for role in roles)

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
            if self._calls % CHECK_EVERY != 1:
                return fast
        texts = self._apply(conversations, tools=tools)
        if plain and texts != fast:
            assert self._calls == 1, (
                "the compiled chat template and apply_chat_template give different texts"
            )
            self._compiled = None
        return texts

    def _apply(self, conversations: list[list[Message]], **options: Any) -> list[str]:
        return self._tokenizer.apply_chat_template(
            conversations, chat_template=self.text, tokenize=False, **options
        )

    @cached_property
    def frame(self) -> Frame:
        """Learned from conversations whose contents are known words."""
        question = [user(_Q1)]
        turns = [user(_Q1), assistant(_A1), user(_Q2), assistant(_A2)]
        try:
            [text] = self._apply([turns])
            [asked] = self._apply([question])
            [prompted] = self._apply([question], add_generation_prompt=True)
        except Exception:  # a template that refuses the probe: nothing is known of its frame
            return Frame()
        start, to_answer, to_question, to_last_answer, end = _between(text, _Q1, _A1, _Q2, _A2)
        if not to_last_answer.startswith(to_answer):  # may hold more, such as empty thoughts
            to_answer = ""
        return Frame(
            start,
            *self._around_system(),
            to_answer,
            to_question,
            end,
            prompted.removeprefix(asked) if prompted.startswith(asked) else "",
        )

    @cached_property
    def around_turns(self) -> str:
        """What the template writes around its turns, without the empty thoughts that some write
        before an answer; the whole template where that is unknown."""
        f = self.frame
        if not (f.to_answer and f.to_question and f.end):
            return self.text
        to_answer = _EMPTY_THOUGHTS.sub("", f.to_answer)
        return "\n".join((f.start, f.system_start, f.system_end, to_answer, f.to_question, f.end))

    def _around_system(self) -> tuple[str, str]:
        system = {"role": "system", "content": _SYSTEM}
        try:
            [text] = self._apply([[system, user(_Q1), assistant(_A1)]])
        except Exception:  # many templates take no system turn
            return "", ""
        start, end, *_ = _between(text, _SYSTEM, _Q1)
        return start, end


def _between(text: str, *marks: str) -> list[str]:
    """The parts before, between and after the marks; empty ones where a mark is missing."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return [""] * (len(marks) + 1)
        parts.append(part)
    return [*parts, text]


def _words_of(tree: Any) -> frozenset[str]:
    """Names, attributes and string constants of a parsed template."""
    from jinja2 import nodes

    return frozenset(
        [n.attr for n in tree.find_all(nodes.Getattr)]
        + [n.name for n in tree.find_all(nodes.Name)]
        + [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    )
