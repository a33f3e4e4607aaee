"""Rows to score: conversations, a prompt with responses, or any preference schema.

Unlike training, scoring accepts any responses: ties, equal responses and empty ones have rewards
too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rmega.preferences import sources
from rmega.preferences.closest_schema import columns_of, what_is_missing
from rmega.preferences.comparison import Message, Rejected
from rmega.preferences.messages import (
    Row,
    as_messages,
    field_of,
    first_of,
    is_messages,
    refuse_media,
    reply,
    tools_of,
)
from rmega.preferences.pairs import history
from rmega.preferences.prompts import PROMPTS, prompt_of, with_system
from rmega.preferences.ranked import RESPONSE_LISTS, RESPONSE_TEXTS, response_list
from rmega.preferences.reader import Plan, plan_input
from rmega.preferences.resolve import Input
from rmega.preferences.schemas import Schema, recognize
from rmega.preferences.written import as_list

Conversation = list[Message] | str
"""Messages, or text that a chat template made already."""

_CONVERSATIONS = ("messages", "conversation", "conversations")
_ONE_RESPONSE = ("response", "completion", "answer", "reply", "output", "generation")
_SIDES = ("chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output")
_TWO_RESPONSES = (
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
)
_TWO_CONVERSATIONS = ("conversation_a", "conversation_b")
FORMS = (
    "messages (or conversation), conversations (a list of them), prompt and response, prompt and"
    " responses, text (templated), or a preference schema (prompt, chosen, rejected and others)"
)


@dataclass(slots=True)
class ScorableRow:
    """A row and the conversations in it, in the order in which the row writes them; or why it has
    none."""

    index: int
    """Number of the row over all inputs, from 0."""
    where: str
    """``FILE:LINE``."""
    id: str | int | None = None
    conversations: list[Conversation] = field(default_factory=list)
    several: bool = False
    """The row holds a list of responses (perhaps of one), so its answer is a list."""
    tools: list[Any] | None = None
    error: str | None = None


def scorable(
    row: Row, schema: Schema | None = None, *, forced: bool = False
) -> tuple[list[Conversation], bool, list[Any] | None]:
    """(conversations, several, tools) of a row of any form.

    ``schema`` is for rows that have none of the plain forms, where it fits, or in any case if it is
    ``forced``. Raises `Rejected`.
    """
    try:
        refuse_media(row)
        plain = _plain(row) if first_of(row, *_SIDES) is None else None
        if plain is not None:
            (found, several), (tools, unreadable) = plain, tools_of(row)
            if unreadable:
                raise Rejected("wrong_type", "tools, not a list of tools")
        else:
            found, tools = _preference(row, schema, forced)
            several = True
    except RecursionError:
        raise Rejected("too_deep") from None
    for number, conversation in enumerate(found, 1):
        if not isinstance(conversation, str) and conversation[-1]["role"] != "assistant":
            raise Rejected("no_reply", f"conversation {number}" if len(found) > 1 else "")
    return found, several, tools


def _plain(row: Row) -> tuple[list[Conversation], bool] | None:
    """(conversations, several) of a row that is no preference; None for other rows."""
    given = first_of(row, *_CONVERSATIONS)
    responses = response_list(row)
    one = first_of(row, *_ONE_RESPONSE)
    two = next(
        (
            [row[n] for n in names]
            for names in _TWO_RESPONSES
            if all(row.get(n) is not None for n in names)
        ),
        None,
    )
    if given and responses is None and one is None and (is_messages(given) or as_list(given)):
        several = not is_messages(given)
        conversations = as_list(given) if several else [given]
        return [
            with_system(row, as_messages(v, f"conversation {i}"))
            for i, v in enumerate(conversations, 1)
        ], several
    if responses is not None or two is not None:
        return _after(row, two if responses is None else responses), True
    if all(is_messages(row.get(name)) for name in _TWO_CONVERSATIONS):
        return [as_messages(row[name], name) for name in _TWO_CONVERSATIONS], True
    if one is not None and (not isinstance(one, list) or is_messages(one)):
        return _after(row, [one]), False
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise Rejected("empty_response", "text")
        return [row["text"]], False
    return None


def _after(row: Row, responses: Sequence[Any]) -> list[Conversation]:
    """The prompt of the row before each of the responses."""
    prompt = with_system(row, [*history(row), *prompt_of(row)])
    found: list[Conversation] = []
    for number, value in enumerate(responses, 1):
        if isinstance(value, dict):
            refuse_media(value, f"response {number}: ")
            value = value if is_messages(value) else field_of(value, *RESPONSE_TEXTS)
        found.append([*prompt, *reply(value, f"response {number}")])
    return found


def _preference(
    row: Row, schema: Schema | None, forced: bool
) -> tuple[list[Conversation], list[Any] | None]:
    if schema is None or not (schema.fits(row) or forced):
        schema = recognize([row])
    if schema is None:
        raise _of_no_form(row)
    parsed = schema.parse(row)
    for number, response in enumerate(parsed.responses, 1):
        if not response:
            raise Rejected("missing_field", f"response {number}")
    return [[*parsed.prompt, *response] for response in parsed.responses], parsed.tools


def _of_no_form(row: Row) -> Rejected:
    """Why a row holds nothing to score."""
    if any(name in row for name in _SIDES):
        return Rejected("missing_field", f"columns {columns_of(row)}; {what_is_missing(row)}")
    for names, wanted in (
        (_CONVERSATIONS, "a list of messages"),
        (RESPONSE_LISTS, "a list of responses"),
        (_ONE_RESPONSE, "text"),
        (("text",), "text"),
    ):
        for name in names:
            value = row.get(name)
            if value is not None:
                if value in ([], {}, ""):
                    return Rejected("missing_field", f"{name} is empty")
                return Rejected("wrong_type", f"{name} is {type(value).__name__}, not {wanted}")
    if any(isinstance(row.get(name), (str, list)) for name in PROMPTS):
        return Rejected(
            "missing_field", f"columns {columns_of(row)}; missing: response, or a list of responses"
        )
    return Rejected("missing_field", f"columns {columns_of(row)}; known are {FORMS}")


def read_rows(
    inputs: Sequence[Input], format_name: str = "auto", limit: int | None = None
) -> Iterator[tuple[ScorableRow, float | None]]:
    """Every row of the inputs in order (the first ``limit`` of each), with the fraction of all
    bytes read so far; None where the sizes are not known.

    The schema of preference rows is recognized by each input's first rows (reader.py).
    """
    total = sum(s.num_bytes for s in inputs) if all(s.num_bytes for s in inputs) else 0
    index, before = 0, 0
    for source in inputs:
        plan = plan_input(source, format_name, needed=False)
        name = source.label if source.name == "/dev/stdin" else source.name
        for number, row, position in islice(_with_position(plan), limit):
            share = (before + position) / total if total else None
            forced = format_name != "auto"
            yield _row(row, plan.schema, forced, index, f"{name}:{number}"), share
            index += 1
        before += source.num_bytes


def _with_position(plan: Plan) -> Iterator[tuple[int, dict[str, Any] | Rejected, float]]:
    """(line, row, position of its end in the file in bytes, interpolated within a chunk) of every
    row. Rows are not grouped: each response is scored by itself."""
    start = 0
    for chunk in sources.read_chunks(plan.source, 0) if plan.stream is None else plan.stream:
        end = min(chunk.position, plan.source.num_bytes)
        items = list(sources.decode(chunk))
        for i, (number, row, _) in enumerate(items, 1):
            yield number, row, start + (end - start) * i / len(items)
        start = end


def _row(
    row: dict[str, Any] | Rejected, schema: Schema | None, forced: bool, index: int, where: str
) -> ScorableRow:
    out = ScorableRow(index, where)
    try:
        if isinstance(row, Rejected):
            raise row
        given = row.get("id")
        out.id = given if isinstance(given, (str, int)) and not isinstance(given, bool) else None
        out.conversations, out.several, out.tools = scorable(row, schema, forced=forced)
    except Rejected as error:
        out.error = str(error)
    return out
