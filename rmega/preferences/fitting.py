"""Fit a comparison to a chat template: escape control-token text, rewrite or leave out the message
fields that the template has no place for."""

from __future__ import annotations

import json
import re
from typing import Any

from rmega.preferences.chat_template import ChatTemplate
from rmega.preferences.comparison import Comparison, Message
from rmega.preferences.messages import FIELDS
from rmega.preferences.special_tokens import break_up

BROKEN_UP = "special-token text in the data, broken up"
LEFT_OUT = "left out: the chat template has no place for it"
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What templates call the same field."""


def fit(
    comparison: Comparison, template: ChatTemplate, control: re.Pattern[str], notes: list[str]
) -> Comparison:
    """The comparison with control-token text (``control``) escaped everywhere, tool calls written
    as text where the template would lose them, and without what else it has no place for;
    ``notes`` is extended by what was changed."""
    breaks = 0

    def escape(value: Any) -> Any:
        nonlocal breaks
        if isinstance(value, str):
            if control.search(value):
                value, num = break_up(value, control)
                breaks += num
            return value
        if isinstance(value, dict):
            return {k: escape(v) for k, v in value.items()}
        return [escape(v) for v in value] if isinstance(value, (list, tuple)) else value

    def escape_messages(messages: list[Message]) -> list[Message]:
        escaped = []
        for message in messages:
            if len(message) > 2:
                message = {k: v if k == "role" else escape(v) for k, v in message.items()}
                _fit_fields(message, template, notes)
            elif control.search(message["content"]):
                message = {"role": message["role"], "content": escape(message["content"])}
            escaped.append(message)
        return escaped

    tools = comparison.tools
    if tools is not None and not template.takes("tools"):
        tools = None
        notes.append("tool descriptions left out: the chat template has no place for them")
    fitted = Comparison(
        prompt=escape_messages(comparison.prompt),
        responses=[escape_messages(r) for r in comparison.responses],
        scores=comparison.scores,
        tools=escape(tools),
    )
    if breaks:
        notes.append(BROKEN_UP)
    return fitted


def _fit_fields(message: Message, template: ChatTemplate, notes: list[str]) -> None:
    """Change a message with further fields to what the chat template writes."""
    for key in [k for k in message if k in FIELDS and not template.takes(k)]:
        value = message.pop(key)
        alike = [k for k in _REASONING if template.takes(k) and k not in message]
        if key in _REASONING and alike:
            message[alike[0]] = value
        elif key == "tool_calls":
            calls = json.dumps(value, ensure_ascii=False, default=str)
            content = message["content"]
            message["content"] = f"{content}\n{calls}" if content else calls
            notes.append("tool calls written as text: the chat template has no place for them")
        else:
            notes.append(f"message field {key} {LEFT_OUT}")
