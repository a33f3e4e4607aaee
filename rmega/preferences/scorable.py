"""Rows to be scored: conversations, a prompt with its response or responses, or any preference
schema.

Unlike training, scoring asks nothing of the responses: ties, equal responses and empty ones have
rewards too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rmega.preferences import sources
from rmega.preferences.closest_schema import columns_of, what_is_missing
from rmega.preferences.comparison import (
    Message,
    Rejected,
    as_messages,
    as_text,
    assistant,
    field_of,
    is_messages,
    with_system,
)
from rmega.preferences.ranked import RESPONSE_LISTS, RESPONSE_TEXTS, any_prompt, response_list
from rmega.preferences.schemas import PROMPTS, Schema, recognise, schema_named, tools_of

Conversation = list[Message] | str
"""Messages, or text that a chat template made already."""

SAMPLE_ROWS, SAMPLE_CHUNKS = 50, 4
_CONVERSATIONS = ("messages", "conversation", "conversations")
_ONE_RESPONSE = ("response", "completion", "answer", "reply", "output")
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
    row: dict[str, Any], schema: Schema | None = None, *, forced: bool = False
) -> tuple[list[Conversation], bool, list[Any] | None]:
    """(conversations, several, tools) of a row of any form.

    ``schema`` is for rows that have none of the plain forms, where it fits, or in any case if it is
    ``forced``. Raises `Rejected`.
    """
    preference = "chosen" in row or "rejected" in row
    tools = tools_of(row)[0]
    found: list[Conversation] | None = None
    several = True
    if not preference:
        given = next((row[name] for name in _CONVERSATIONS if row.get(name) is not None), None)
        values = response_list(row)
        one = next((row[name] for name in _ONE_RESPONSE if row.get(name) is not None), None)
        two = next(
            (
                [row[n] for n in names]
                for names in _TWO_RESPONSES
                if all(row.get(n) is not None for n in names)
            ),
            None,
        )
        if isinstance(given, list) and given and values is None and one is None:
            several = not is_messages(given)
            lists = given if several else [given]
            found = [
                with_system(row, as_messages(v, f"conversation {i}"))
                for i, v in enumerate(lists, 1)
            ]
        elif values is not None:
            found = _after(row, any_prompt(row), values)
        elif two is not None:
            found = _after(row, any_prompt(row), two)
        elif all(is_messages(row.get(name)) for name in _TWO_CONVERSATIONS):
            found = [as_messages(row[name], name) for name in _TWO_CONVERSATIONS]
        elif (
            isinstance(one, str) and isinstance(row.get("instruction"), str) and "prompt" not in row
        ):
            found, several = _instruction(row, one), False
        elif one is not None and not (isinstance(one, list) and not is_messages(one)):
            found, several = (
                _after(row, any_prompt({"prompt": row.get("query"), **row}), [one]),
                False,
            )
        elif isinstance(row.get("text"), str):
            if not row["text"]:
                raise Rejected("empty_response", "text")
            return [row["text"]], False, None
    if found is None:
        found = _preference(row, schema, forced)
    for number, conversation in enumerate(found, 1):
        if conversation[-1]["role"] != "assistant":
            raise Rejected("no_reply", f"conversation {number}" if len(found) > 1 else "")
    return found, several, tools


def _after(
    row: dict[str, Any], prompt: list[Message], responses: Sequence[Any]
) -> list[Conversation]:
    prompt = with_system(row, prompt)
    found: list[Conversation] = []
    for number, value in enumerate(responses, 1):
        if isinstance(value, dict) and not is_messages(value):
            value = field_of(value, *RESPONSE_TEXTS)
        if isinstance(value, str):
            found.append([*prompt, assistant(value)])
        else:
            found.append([*prompt, *as_messages(value, f"response {number}")])
    return found


def _instruction(row: dict[str, Any], output: str) -> list[Conversation]:
    """Alpaca's row for supervised training is half of its preference row."""
    schema = schema_named("alpaca")
    comparison = schema.convert({**row, "output": [output + ".", output]})
    return [[*comparison.prompt, assistant(output)]]


def _preference(row: dict[str, Any], schema: Schema | None, forced: bool) -> list[Conversation]:
    if schema is None or not (schema.fits(row) or forced):
        schema = recognise([row])
    if schema is None:
        raise _of_no_form(row)
    try:
        comparison = schema.convert({"rows": [row, row]} if schema.groups_by else row)
        responses = comparison.responses
    except Rejected as error:
        # Two equal responses are no comparison, but they have a reward.
        if error.reason != "identical_responses" or schema.name in (
            "strings-with-prompt",
            "alpaca",
        ):
            raise
        comparison = schema.convert({**row, "rejected": _altered(row["rejected"])})
        responses = [comparison.responses[0]] * 2
    if comparison.positions is not None:
        order = sorted(range(len(responses)), key=lambda i: comparison.positions[i])
        responses = [responses[i] for i in order]
    return [[*comparison.prompt, *response] for response in responses]


def _of_no_form(row: dict[str, Any]) -> Rejected:
    """Why a row holds nothing to score."""
    if "chosen" in row or "rejected" in row:
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


def _altered(value: Any) -> Any:
    if isinstance(value, str):
        return value + "."
    if isinstance(value, dict):
        name = "content" if "content" in value else "value"
        return {**value, name: as_text(value[name], name) + "."}
    return [*value[:-1], _altered(value[-1])]


def read_rows(
    inputs: Sequence[sources.Input], format_name: str = "auto", limit: int | None = None
) -> Iterator[tuple[ScorableRow, float | None]]:
    """Every row of the inputs in order (the first ``limit`` of each), with the share of all bytes
    read so far.

    The schema of preference rows is recognised by each input's first rows, as everywhere in rmega.
    The share is None where the sizes are not known.
    """
    named = None if format_name == "auto" else schema_named(format_name)
    total = sum(s.num_bytes for s in inputs) if all(s.num_bytes for s in inputs) else 0
    index, before = 0, 0
    for source in inputs:
        schema, count = named, 0
        chunks: Iterator[sources.Chunk] = sources.read_chunks(source, 0)
        if schema is None:
            kept, sample = [], []
            for chunk in chunks:
                kept.append(chunk)
                sample += [
                    r for _, r, _ in sources.decode(chunk) if isinstance(r, dict) and "chosen" in r
                ]
                if len(sample) >= SAMPLE_ROWS or len(kept) == SAMPLE_CHUNKS:
                    break
            schema = recognise(sample[:SAMPLE_ROWS])
            chunks = chain(kept, chunks)
        start, name = 0, source.label if source.name == "/dev/stdin" else source.name
        for chunk in chunks:
            position = min(chunk.position, source.num_bytes)
            items = list(sources.decode(chunk))
            for i, (number, row, _) in enumerate(items, 1):
                done = start + (position - start) * i / len(items)
                share = (before + done) / total if total else None
                yield _row(row, schema, named is not None, index, f"{name}:{number}"), share
                index, count = index + 1, count + 1
                if count == limit:
                    break
            start = position
            if count == limit:
                break
        before += source.num_bytes


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
