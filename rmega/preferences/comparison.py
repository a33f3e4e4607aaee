"""What a comparison is, and the pieces every schema is made of: messages, ratings, splitting off
the prompt.

The schemas themselves are in schemas.py. A row that cannot become a comparison raises `Rejected`,
with a reason from `REASONS` and a detail for the person who mends the data; it is counted and
written out, never dropped silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""``role`` and ``content`` (text); further keys such as ``tool_calls`` go to the chat template as
they are."""

REASONS = {
    "not_utf8": "bytes or text that is not UTF-8",
    "broken_row": "not a JSON object, or a CSV row that cannot be read",
    "missing_field": "a column the schema needs is missing or null",
    "wrong_type": "a column holds another type than the schema's",
    "unknown_role": "a message whose role is not known",
    "too_deep": "nested too deeply to be read",
    "prompts_differ": "the responses do not answer the same prompt",
    "no_reply": "a response does not end with a turn of the assistant",
    "empty_prompt": "no text before the responses",
    "empty_response": "a response without text",
    "too_few_responses": "fewer than two responses",
    "identical_responses": "all responses are the same",
    "contradictory_scores": "the same response with two different scores",
    "tie": "all responses have the same score",
    "duplicate": "the same comparison again",
    "contradiction": "the same two responses, preferred the other way round elsewhere",
    "template": "the chat template refuses the conversation",
    "overlong": "longer than --max-length",
    "identical_after_cut": "the responses are the same after cutting to --max-length",
    "map_failed": "the --map function raised an error",
    "skipped_by_map": "the --map function returned None",
    "holdout": "its prompt is in a --holdout file",
}
NOT_FAULTS = frozenset(
    {"tie", "duplicate", "overlong", "identical_after_cut", "skipped_by_map", "holdout"}
)
"""Reasons that are a property or a wish, not a defect of the file: they do not count towards
--max-rejected."""

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


class Rejected(Exception):
    """A row that is left out. ``reason`` is a key of `REASONS`, ``detail`` says what and where in
    the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{REASONS[reason]}{f' ({detail})' if detail else ''}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejected, (self.reason, self.detail)


@dataclass(kw_only=True, slots=True)
class Comparison:
    """K >= 2 responses to one prompt, best first."""

    prompt: list[Message]
    responses: list[list[Message]]
    """Each one or more messages that follow the prompt, the last one the assistant's."""
    scores: list[float]
    """One per response, falling; equal scores are ties."""
    graded: bool = False
    """Scores are real ratings, so that their differences are margins; else only their order
    counts."""
    source: str = ""
    tools: list[Any] | None = None
    """Tool descriptions for the chat template."""
    positions: list[int] | None = None
    """Where each response stood in the row, if the row's order says nothing of the preference; else
    None."""
    notes: list[str] = field(default_factory=list)
    """What was changed or noticed on the way; counted and reported."""


def make_comparison(
    prompt: list[Message],
    responses: Sequence[list[Message]],
    scores: Sequence[float],
    *,
    graded: bool,
    ordered: bool = True,
    tools: list[Any] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Check and sort: best response first, stable. ``ordered`` False: the row's order was free of
    the preference."""
    if len(responses) < 2:
        raise Rejected(
            "too_few_responses", f"{len(responses)} response{'s' * (len(responses) != 1)}"
        )
    for number, response in enumerate(responses, 1):
        if not response or response[-1]["role"] != "assistant":
            raise Rejected("no_reply", f"response {number}")
        if response[0]["role"] not in ("assistant", "tool", "function", "ipython"):
            raise Rejected(
                "prompts_differ",
                f"response {number} begins with a turn of the {response[0]['role']}",
            )
        if not _has_text(response[-1]):
            raise Rejected("empty_response", f"response {number}")
    if not any(_has_text(m) for m in prompt):
        raise Rejected("empty_prompt")
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    first = responses[order[0]]
    if all(responses[i] == first for i in order[1:]):
        raise Rejected("identical_responses")
    if len(order) > 2:
        _check_repeated(responses, scores)
    if scores[order[0]] == scores[order[-1]]:
        raise Rejected("tie")
    notes = list(notes)
    if not all(_has_text(m) for m in prompt):
        notes.append("an empty turn in the prompt")
    return Comparison(
        prompt=prompt,
        responses=[responses[i] for i in order],
        scores=[float(scores[i]) for i in order],
        graded=graded,
        tools=tools,
        positions=None if ordered else order,
        notes=notes,
    )


def _check_repeated(responses: Sequence[list[Message]], scores: Sequence[float]) -> None:
    seen: dict[str, float] = {}
    for response, score in zip(responses, scores, strict=True):
        text = json.dumps(response, sort_keys=True, default=str)
        if seen.setdefault(text, score) != score:
            raise Rejected("contradictory_scores", f"scores {seen[text]:g} and {score:g}")


def _has_text(message: Message) -> bool:
    return bool(message["content"].strip()) or bool(message.get("tool_calls"))


# ---- messages


def field_of(row: dict[str, Any], *names: str) -> Any:
    """The first of the columns that is there and not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise Rejected("missing_field", names[0] if len(names) == 1 else " or ".join(names))


def as_text(value: Any, name: str) -> str:
    """A text; the text parts of a list of parts are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(p, dict) for p in value):
        texts = [p.get("text") for p in value if p.get("type", "text") == "text"]
        if len(texts) == len(value) and all(isinstance(t, str) for t in texts):
            return "".join(texts)
        raise Rejected("wrong_type", f"{name}: parts that are not text")
    raise Rejected("wrong_type", f"{name} is {type(value).__name__}, not text")


def as_message(value: Any, name: str) -> Message:
    """A message from ``{role, content}`` or sharegpt's ``{from, value}``; null keys (parquet fills
    them) go away."""
    if not isinstance(value, dict):
        raise Rejected("wrong_type", f"{name} is {type(value).__name__}, not a message")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str):
        raise Rejected("missing_field", f"{name}: role")
    role = _ROLE_NAMES.get(role.lower(), role.lower())
    if role not in ROLES:
        raise Rejected("unknown_role", f"{name}: {role[:60]!r}")
    content = value.get("content", value.get("value"))
    if content is None and value.get("tool_calls"):
        content = ""
    if content is None:
        raise Rejected("missing_field", f"{name}: content")
    message: Message = {"role": role, "content": as_text(content, name)}
    if len(value) > 2:
        extra = {
            k: v
            for k, v in value.items()
            if k in ("tool_calls", "tool_call_id", "name", "reasoning_content") and v is not None
        }
        message.update(extra)
    return message


def as_messages(value: Any, name: str) -> list[Message]:
    """A list of messages; one message alone counts as a list of one."""
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
    """Looks like messages: a dict or a list of dicts with a role."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and ("role" in first or "from" in first)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


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


def with_system(row: dict[str, Any], prompt: list[Message]) -> list[Message]:
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


# ---- ratings

_RATING_COLUMNS = (
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
)


def as_number(value: Any) -> float | None:
    """A finite number (also written as text), else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def ratings_of(row: dict[str, Any]) -> tuple[list[float], bool, list[str]]:
    """Scores of (chosen, rejected), whether they are ratings, and notes.

    Ratings that do not put chosen above rejected leave the label as it is: ranks instead of
    ratings, and a note.
    """
    for chosen, rejected in _RATING_COLUMNS:
        pair = as_number(row.get(chosen)), as_number(row.get(rejected))
        if pair[0] is not None and pair[1] is not None:
            if pair[0] > pair[1]:
                return [pair[0], pair[1]], True, []
            return (
                [1.0, 0.0],
                False,
                ["ratings that do not agree with the label: the label counts, without margin"],
            )
    margin = as_number(row.get("margin"))
    if margin is not None:
        if margin > 0:
            return [margin, 0.0], True, []
        return (
            [1.0, 0.0],
            False,
            ["a margin that is not positive: the label counts, without margin"],
        )
    return [1.0, 0.0], False, []
