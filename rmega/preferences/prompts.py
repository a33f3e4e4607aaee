"""The prompt of a row: a column of its own, or what whole conversations begin with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rmega.preferences.comparison import Message, Rejected, user
from rmega.preferences.messages import Row, as_messages, as_text, field_of, is_messages, is_parts

PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "query",
    "context",
    "input",
    "conversations",
    "conversation",
    "messages",
)
"""Columns that may hold the prompt, the first that is not null."""


def prompt_of_value(value: Any, name: str = "prompt") -> list[Message]:
    """Messages of a prompt: a list, text that encodes one, a dialogue of HH-RLHF or HelpSteer, or
    one question."""
    if is_parts(value) or isinstance(value, dict) and not is_messages(value):
        return [user(as_text(value, name))]
    if not isinstance(value, str) or is_messages(value):
        return as_messages(value, name)
    if value.lstrip().startswith("Human:"):
        messages = parse_hh(value if value.startswith("\n\n") else "\n\n" + value.lstrip(), name)
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return messages
    if "<extra_id_1>" in value:  # HelpSteer's turns
        first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", value)
        return [user(first)] + [
            {"role": role.lower(), "content": content}
            for role, content in zip(turns[::2], turns[1::2], strict=True)
        ]
    return [user(value)]


def prompt_of(row: Row) -> list[Message]:
    """The prompt in whichever of `PROMPTS` is not null; raises `Rejected`."""
    name = next((name for name in PROMPTS if row.get(name) is not None), None)
    if name == "instruction" and isinstance(row["instruction"], str):
        return prompt_of_value(instruction_of(row))
    return prompt_of_value(field_of(row, *PROMPTS))


def instruction_of(row: Row) -> str:
    """Alpaca's instruction with its input."""
    question, extra = as_text(field_of(row, "instruction"), "instruction"), row.get("input")
    if extra is None or not as_text(extra, "input"):
        return question
    return f"{question}\n{extra}" if question else extra


def split_prompt(
    conversations: Sequence[list[Message]],
) -> tuple[list[Message], list[list[Message]]]:
    """Whole conversations -> (the messages they share, the rest of each). At least one message is
    left to each."""
    shortest = min(len(c) for c in conversations)
    shared, first = 0, conversations[0]
    while shared < shortest - 1 and all(c[shared] == first[shared] for c in conversations):
        shared += 1
    return list(first[:shared]), [list(c[shared:]) for c in conversations]


def with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Put the row's ``system`` (or ``system_prompt``) column first, unless the prompt has a system
    turn."""
    system = row.get("system") or row.get("system_prompt")
    if (
        isinstance(system, str)
        and system.strip()
        and not (prompt and prompt[0]["role"] == "system")
    ):
        return [{"role": "system", "content": system}, *prompt]
    return prompt


_HH_TURN = re.compile(r"(?:\A|\n\n) ?(Human|Assistant|System):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


def parse_hh(text: str, name: str) -> list[Message]:
    """Messages of a dialogue written with ``\\n\\nHuman:`` and ``\\n\\nAssistant:``."""
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Rejected("wrong_type", f"{name} does not begin with Human: or Assistant:")
    return [
        {"role": _HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
