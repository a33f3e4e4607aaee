"""The schemas of preference sets: how each is recognised by its columns, and how its row becomes a
comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rmega.preferences.comparison import (
    Comparison,
    Message,
    Rejected,
    as_message,
    as_messages,
    as_text,
    assistant,
    field_of,
    is_messages,
    make_comparison,
    parse_hh,
    ratings_of,
    split_prompt,
    user,
    with_system,
)
from rmega.preferences.ranked import (
    Row,
    any_prompt,
    arena,
    is_ranked,
    labelled,
    ranked,
    rated_rows,
    two_rated,
)


@dataclass(frozen=True)
class Schema:
    """One way to lay out a preference row."""

    name: str
    columns: str
    """The columns, for messages to the user."""
    fits: Callable[[Row], bool]
    """True if the row looks like this schema; never raises."""
    convert: Callable[[Row], Comparison]
    """The row as a comparison; raises `Rejected`."""
    groups_by: str | None = None
    """Adjacent rows with the same value in this column are one comparison (``convert`` gets
    ``{"rows": [...]}``)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return schema_named, (self.name,)


# ---- prompt, chosen, rejected

PROMPTS = ("prompt", "question", "instruction", "query", "input")


def _pair(
    row: Row, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> Comparison:
    scores, graded, notes = ratings_of(row)
    tools, tool_notes = tools_of(row)
    return make_comparison(
        with_system(row, prompt),
        [chosen, rejected],
        scores,
        graded=graded,
        tools=tools,
        notes=notes + tool_notes,
    )


def tools_of(row: Row) -> tuple[list[Any] | None, list[str]]:
    """The row's tool descriptions for the chat template, and notes."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            return None, ["a tools column that is not JSON: left out"]
    return (tools, []) if isinstance(tools, list) and tools else (None, [])


def _messages(row: Row) -> Comparison:
    sides = [as_messages(field_of(row, name), name) for name in ("chosen", "rejected")]
    given = row.get("prompt")
    if isinstance(given, list) and given:
        prompt = as_messages(given, "prompt")
        sides = [s[len(prompt) :] if s[: len(prompt)] == prompt else s for s in sides]
        return _pair(row, prompt, *sides)
    if all(s[0]["role"] == "assistant" for s in sides):
        return _pair(
            row,
            [user(as_text(field_of(row, "prompt", "question", "instruction"), "prompt"))],
            *sides,
        )
    return _pair(row, *_unpack(split_prompt(sides)))


def _strings(row: Row) -> Comparison:
    given = field_of(row, *PROMPTS)
    prompt = (
        as_messages(given, "prompt")
        if isinstance(given, list)
        else [user(as_text(given, "prompt"))]
    )
    chosen, rejected = (as_text(field_of(row, name), name) for name in ("chosen", "rejected"))
    return _pair(row, prompt, [assistant(chosen)], [assistant(rejected)])


def _strings_with_prompt(row: Row) -> Comparison:
    chosen, rejected = (as_text(field_of(row, name), name) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if (
        isinstance(prompt, str)
        and prompt
        and chosen.startswith(prompt)
        and rejected.startswith(prompt)
    ):
        cut = len(prompt)
    else:
        cut = _shared_length(chosen, rejected)
    return _pair(row, [user(chosen[:cut])], [assistant(chosen[cut:])], [assistant(rejected[cut:])])


def _shared_length(a: str, b: str) -> int:
    """Length of the longest common beginning that ends where a word ends."""
    end = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        end += 1
    while (
        0 < end
        and not a[end - 1 : end].isspace()
        and not (a[end : end + 1].isspace() and b[end : end + 1].isspace())
    ):
        end -= 1
    return end


def _hh(row: Row) -> Comparison:
    sides = [as_text(field_of(row, name), name) for name in ("chosen", "rejected")]
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt and not all(s.startswith(prompt) for s in sides):
        sides = [prompt + s for s in sides]
    return _pair(
        row,
        *_unpack(
            split_prompt(
                [parse_hh(s, n) for s, n in zip(sides, ("chosen", "rejected"), strict=True)]
            )
        ),
    )


_CHATML_TURN = re.compile(r"\s*<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


def _chatml(row: Row) -> Comparison:
    """Strings that a ChatML template made. Never recognised by itself: such text in user data is
    text, not turns."""
    conversations = []
    for name in ("chosen", "rejected"):
        side = as_text(field_of(row, name), name)
        prompt = row.get("prompt")
        text = side if not isinstance(prompt, str) or side.startswith(prompt) else prompt + side
        turns, end = [], 0
        while match := _CHATML_TURN.match(text, end):
            turns.append(as_message({"role": match[1], "content": match[2]}, name))
            end = match.end()
        if text[end:].strip() or not turns:
            raise Rejected("wrong_type", f"{name} is not a sequence of <|im_start|> turns")
        conversations.append(turns)
    return _pair(row, *_unpack(split_prompt(conversations)))


def _unpack(
    parts: tuple[list[Message], list[list[Message]]],
) -> tuple[list[Message], list[Message], list[Message]]:
    return parts[0], parts[1][0], parts[1][1]


def _many_against_many(row: Row) -> Comparison:
    """RM-Bench and RewardBench 2: lists of chosen and of rejected responses; any chosen beats any
    rejected."""
    groups = []
    for name in ("chosen", "rejected"):
        values = field_of(row, name)
        values = values if isinstance(values, list) else [values]
        groups.append([[assistant(as_text(v, f"{name}[{i}]"))] for i, v in enumerate(values)])
    if not groups[0] or not groups[1]:
        raise Rejected("too_few_responses", "an empty list of chosen or rejected")
    given = field_of(row, "prompt", "question")
    prompt = (
        as_messages(given, "prompt")
        if isinstance(given, list)
        else [user(as_text(given, "prompt"))]
    )
    return make_comparison(
        with_system(row, prompt),
        groups[0] + groups[1],
        [1.0] * len(groups[0]) + [0.0] * len(groups[1]),
        graded=False,
    )


# ---- sharegpt, Alpaca


def _sharegpt(row: Row) -> Comparison:
    prompt = as_messages(field_of(row, "conversations", "messages"), "conversations")
    sides = []
    for name in ("chosen", "rejected"):
        value = field_of(row, name)
        sides.append([assistant(value)] if isinstance(value, str) else as_messages(value, name))
    return _pair(row, prompt, *sides)


def _alpaca(row: Row) -> Comparison:
    output = row.get("output")
    pair = (
        output if isinstance(output, list) else [field_of(row, "chosen"), field_of(row, "rejected")]
    )
    if len(pair) < 2:
        raise Rejected("too_few_responses", "output")
    prompt: list[Message] = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Rejected("wrong_type", "history is not a list of [question, answer]")
        prompt += [user(as_text(turn[0], "history")), assistant(as_text(turn[1], "history"))]
    question = as_text(field_of(row, "instruction"), "instruction")
    extra = row.get("input")
    if extra is not None and as_text(extra, "input"):
        question = f"{question}\n{extra}" if question else extra
    prompt.append(user(question))
    answers = [[assistant(as_text(p, f"response {i}"))] for i, p in enumerate(pair, 1)]
    if len(answers) == 2:
        return _pair(row, prompt, *answers)
    return make_comparison(
        with_system(row, prompt), answers, [float(-i) for i in range(len(answers))], graded=False
    )


# ---- recognition


def _texts(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(n), str) for n in names)


def _is_hh(row: Row) -> bool:
    return (
        _texts(row, "chosen", "rejected")
        and any(
            row[n].lstrip().startswith("Human:") or "\n\nHuman:" in row[n]
            for n in ("chosen", "rejected")
        )
        or (_texts(row, "prompt", "chosen", "rejected") and row["prompt"].startswith("\n\nHuman:"))
    )


def _has_prompt_inside(row: Row) -> bool:
    if not _texts(row, "chosen", "rejected"):
        return False
    prompt = row.get("prompt")
    if prompt is None:
        return not any(row.get(n) is not None for n in PROMPTS)
    return (
        isinstance(prompt, str)
        and len(prompt) > 1
        and all(
            row[n].startswith(prompt) and len(row[n]) > len(prompt) for n in ("chosen", "rejected")
        )
    )


def _is_pair_of_messages(row: Row) -> bool:
    return is_messages(row.get("chosen")) and is_messages(row.get("rejected"))


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "sharegpt",
        "conversations, chosen, rejected",
        lambda r: is_messages(r.get("conversations")) and "chosen" in r and "rejected" in r,
        _sharegpt,
    ),
    Schema(
        "argilla",
        "prompt, chosen, rejected (messages), chosen-rating, rejected-rating",
        lambda r: _is_pair_of_messages(r) and "chosen-rating" in r,
        _messages,
    ),
    Schema(
        "orpo-dpo-mix",
        "source, prompt, question, chosen, rejected (messages)",
        lambda r: _is_pair_of_messages(r) and {"question", "source"} <= r.keys(),
        _messages,
    ),
    Schema(
        "messages",
        "prompt, chosen, rejected (messages), or the prompt inside chosen and rejected",
        _is_pair_of_messages,
        _messages,
    ),
    Schema("hh", "chosen, rejected (strings with Human: and Assistant:)", _is_hh, _hh),
    Schema(
        "alpaca",
        "instruction, input, chosen, rejected, or output = [better, worse]",
        lambda r: (
            _texts(r, "instruction")
            and (
                _texts(r, "chosen", "rejected")
                or isinstance(r.get("output"), list)
                and "prompt" not in r
            )
        ),
        _alpaca,
    ),
    Schema(
        "many-against-many",
        "prompt, chosen, rejected (lists of strings): RM-Bench, RewardBench 2",
        lambda r: all(
            isinstance(r.get(n), list) and r[n] and isinstance(r[n][0], str)
            for n in ("chosen", "rejected")
        ),
        _many_against_many,
    ),
    Schema(
        "helpsteer-preference",
        "prompt or context, response_1, response_2, preference_strength",
        lambda r: (
            ("response_1" in r or "response1" in r)
            and ("preference_strength" in r or "overall_preference" in r)
        ),
        two_rated,
    ),
    Schema(
        "pku-saferlhf",
        "prompt, response_0, response_1, better_response_id",
        lambda r: "response_0" in r and "better_response_id" in r,
        labelled,
    ),
    Schema(
        "arena",
        "conversation_a, conversation_b, winner",
        lambda r: is_messages(r.get("conversation_a")) and "winner" in r,
        arena,
    ),
    Schema(
        "helpsteer",
        "prompt, response, helpfulness (a row per response)",
        lambda r: _texts(r, "prompt", "response") and "helpfulness" in r,
        rated_rows,
        groups_by="prompt",
    ),
    Schema(
        "ranked",
        "prompt, responses with score or rank: also Nectar and UltraFeedback's completions",
        is_ranked,
        ranked,
    ),
    Schema(
        "strings-with-prompt",
        "chosen, rejected (strings that begin with the prompt)",
        _has_prompt_inside,
        _strings_with_prompt,
    ),
    Schema(
        "strings",
        "prompt, chosen, rejected (strings): also RewardBench",
        lambda r: _texts(r, "chosen", "rejected") and not r.keys().isdisjoint(PROMPTS),
        _strings,
    ),
    Schema(
        "chatml",
        "prompt, chosen, rejected (strings that hold <|im_start|> turns); only by name",
        lambda r: False,
        _chatml,
    ),
)
SCHEMA_NAMES = tuple(s.name for s in SCHEMAS)


def schema_named(name: str) -> Schema:
    """The schema ``--format`` names; ValueError lists the names."""
    for schema in SCHEMAS:
        if schema.name == name:
            return schema
    raise ValueError(f"--format {name}: unknown; known are {', '.join(SCHEMA_NAMES)}")


def recognise(rows: Sequence[Row]) -> Schema | None:
    """The schema that the rows look like, or None. Where several fit almost as many of them, the
    most particular."""
    counts = [sum(schema.fits(row) for row in rows) for schema in SCHEMAS]
    most = max(counts)
    return (
        next(s for s, n in zip(SCHEMAS, counts, strict=True) if n >= 0.8 * most) if most else None
    )


def prompt_of(row: Row, schema: Schema) -> list[Message]:
    """The prompt of a row, also of one whose responses make no comparison; raises `Rejected`."""
    try:
        return schema.convert(
            {"rows": [row, row]} if schema.groups_by and "rows" not in row else row
        ).prompt
    except Rejected:
        return any_prompt(row["rows"][0] if schema.groups_by and "rows" in row else row)


def source_of(row: Row, default: str) -> str:
    """The name of the part of the set that a row comes from: its ``source`` or ``subset``, else
    ``default``."""
    for name in ("source", "subset", "domain"):
        value = row.get(name)
        if isinstance(value, str) and 0 < len(value) <= 100:
            return value.encode("utf-8", "replace").decode()
    return default
