"""Column values -> messages, texts and numbers: the pieces that all schemas share.

Null means absent, also inside: parquet gives every message and every tool call the keys of all
others, with null. A list of messages may be written as text (written.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rmega.preferences.comparison import Message, Rejected, assistant
from rmega.preferences.written import value_of

Row = dict[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""Further keys of a message that a chat template may write."""
_MESSAGE_KEYS = frozenset({"role", "from", "content", "value", "function_call", *FIELDS})
_ARGUMENTS = ("arguments", "parameters", "input")
_MEDIA = re.compile(
    r"(.*_)?(image|img|picture|photo|video|audio|media|pixel_value)s?"
    r"(_(path|url|file|bytes|base64|b64|data)s?)?|jpg_\d+"
)
# Beginnings of a list of objects, or of one, that is written as text; and of messages.
_WRITTEN_OBJECTS = re.compile(r"\s*(array\()?\s*(\[\s*(array\()?\s*)?\{")
_WRITTEN_MESSAGES = re.compile(
    _WRITTEN_OBJECTS.pattern + r"\s*['\"](role|from|content|value)['\"]\s*:"
)


class _MessageWithout(dict):  # type: ignore[type-arg]
    """A message, with the names of the keys that were left out of it."""

    left_out: Sequence[str] = ()


def first_of(row: Row, *names: str) -> Any:
    """The first of the columns that is not null; None if all are."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def field_of(row: Row, *names: str) -> Any:
    """As `first_of`; raises `Rejected` if all are null."""
    value = first_of(row, *names)
    if value is None:
        raise Rejected("missing_field", " or ".join(names))
    return value


def as_text(value: Any, name: str) -> str:
    """A text; the text parts of a list of parts are joined."""
    if isinstance(value, str):
        return value
    if is_parts(value):
        texts = [part.get("text") for part in value if (part.get("type") or "text") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        if len(texts) == len(value):
            wrong = next(text for text in texts if not isinstance(text, str))
            raise Rejected("wrong_type", f"{name}: text of a part is {type(wrong).__name__}")
        raise Rejected("not_text", f"{name}: parts that are not text")
    raise Rejected("wrong_type", f"{name} is {type(value).__name__}, not text")


def is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict) and "role" not in part and "from" not in part for part in value
        )
    )


def as_number(value: Any) -> float | None:
    """A finite number (also written as text), else None."""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# ---- messages


def as_message(value: Any, name: str) -> Message:
    """A message from ``{role, content}`` or sharegpt's ``{from, value}``."""
    if not isinstance(value, dict):
        raise Rejected("wrong_type", f"{name} is {type(value).__name__}, not a message")
    role = _role_of(value)
    if role is None:
        if (given := first_of(value, "role", "from")) is not None:
            raise Rejected("wrong_type", f"{name}: role is {type(given).__name__}, not text")
        raise Rejected("missing_field", f"{name}: role")
    if role not in ROLES:
        raise Rejected("unknown_role", f"{name}: {role[:60]!r}")
    content = first_of(value, "content", "value")
    if len(value) == 2 and content is not None:
        return {"role": role, "content": as_text(content, name)}
    fields = {key: value[key] for key in FIELDS if value.get(key) is not None}
    calls = fields.pop("tool_calls", None) or value.get("function_call")
    if calls:
        fields["tool_calls"] = _tool_calls(calls)
    if content in (None, []) and fields.get("tool_calls"):
        content = ""
    if content is None:
        raise Rejected("missing_field", f"{name}: content")
    refuse_media(value, f"{name}: ")
    message = _MessageWithout(role=role, content=as_text(content, name), **fields)
    message.left_out = [k for k, v in value.items() if k not in _MESSAGE_KEYS and v is not None]
    return message if message.left_out else dict(message)


def _role_of(value: Row) -> str | None:
    """The role by its usual name; None where there is none."""
    role = first_of(value, "role", "from")
    return _ROLE_NAMES.get(role.lower(), role.lower()) if isinstance(role, str) else None


def as_messages(value: Any, name: str) -> list[Message]:
    """A list of messages, also written as text; one message alone counts as a list of one."""
    if isinstance(value, str) and is_messages(value):
        found = value_of(value)
        if found is None:
            raise Rejected("wrong_type", f"{name}: a list written as text that cannot be read")
        value = found
    if isinstance(value, dict):
        return [as_message(value, name)]
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"{name} is {type(value).__name__}, not a list of messages")
    if not value:
        raise Rejected(
            "empty_response" if name != "prompt" else "empty_prompt", f"{name} is an empty list"
        )
    return [as_message(v, f"{name}[{i}]") for i, v in enumerate(value)]


def is_messages(value: Any) -> bool:
    """Looks like messages: a dict or a list of dicts with a role; or text that encodes such.

    An answer that is JSON is a text: only text with known roles is read as messages.
    """
    if isinstance(value, str):
        if not _WRITTEN_OBJECTS.match(value):
            return False
        written = value_of(value)
        if written is None:  # it may be cut short
            return bool(_WRITTEN_MESSAGES.match(value))
        if isinstance(written, dict):
            return _has_known_role(written)
        return bool(written) and all(
            isinstance(part, dict) and ({"role", "content"} <= part.keys() or _has_known_role(part))
            for part in written
        )
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _has_known_role(part: Row) -> bool:
    has_content = bool({"content", "value", "tool_calls", "function_call"} & part.keys())
    return has_content and _role_of(part) in ROLES


def reply(value: Any, name: str) -> list[Message]:
    """A response: text, or the messages of it."""
    if isinstance(value, str) and not is_messages(value):
        return [assistant(value)]
    return as_messages(value, name)


def notes_of(messages: Iterable[Message]) -> list[str]:
    """A note for each key that was left out of the messages."""
    names = {name for m in messages for name in getattr(m, "left_out", ())}
    return [f"message field {name} left out" for name in sorted(names)]


# ---- media, tool calls and tools


def refuse_media(row: Row, where: str = "") -> None:
    """Raise `Rejected` where a row or a message has pictures, sound or video."""
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        stored = isinstance(first, dict) and isinstance(first.get("bytes"), bytes)
        if stored or (_MEDIA.fullmatch(str(name).lower()) and not _is_absent(value)):
            raise Rejected("not_text", f"{where}{name}")


def _is_absent(value: Any) -> bool:
    """Null, empty, false or NaN, or a container of nothing else."""
    if isinstance(value, (list, dict)):
        return all(map(_is_absent, value.values() if isinstance(value, dict) else value))
    return not value or value != value


def without_nulls(value: Any) -> Any:
    """The value without the null entries of objects, at any depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _decoded(value: Any) -> Any:
    """The list or object that a text encodes (JSON may be encoded twice); else the value."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "[", '"'):
        return value
    found = value_of(value)
    if found is None and value.lstrip().startswith('"'):
        with contextlib.suppress(ValueError, RecursionError):
            found = value_of(json.loads(value))
    return value if found is None else found


def _tool_calls(value: Any) -> Any:
    """Tool calls with their arguments as objects, as chat templates expect them."""
    value = _decoded(value)
    if isinstance(value, dict):
        value = [value]
    return [_call(v) for v in value if v is not None] if isinstance(value, list) else value


def _call(call: Any) -> Any:
    """One tool call, or one description of a tool."""
    call = without_nulls(_decoded(call))
    if not isinstance(call, dict):
        return call
    function = _decoded(call.get("function"))
    if isinstance(function, dict):
        return {**call, "function": _with_arguments(function)}
    return _with_arguments(call)


def _with_arguments(call: Row) -> Row:
    return {k: without_nulls(_decoded(v)) if k in _ARGUMENTS else v for k, v in call.items()}


UNREADABLE_TOOLS = "a tools column that cannot be read: left out"


def tools_of(row: Row) -> tuple[list[Any] | None, list[str]]:
    """The row's tool descriptions for the chat template, and notes."""
    tools = first_of(row, "tools", "functions")
    if isinstance(tools, str):
        if not tools.strip():
            return None, []
        tools = value_of(tools)
        if tools is None:
            return None, [UNREADABLE_TOOLS]
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        return None, [] if _is_absent(tools) else [UNREADABLE_TOOLS]
    return [_call(tool) for tool in tools if tool is not None] or None, []
