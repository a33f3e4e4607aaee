"""The known schemas: how each is recognized by its columns, and which reader parses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rmega.preferences import pairs, ranked
from rmega.preferences.comparison import Comparison, Message, Parsed, Rejected, validate
from rmega.preferences.messages import Row, first_of, is_messages, notes_of, refuse_media, tools_of
from rmega.preferences.pairs import texts
from rmega.preferences.prompts import PROMPTS, prompt_of, with_system
from rmega.preferences.written import as_list


@dataclass(frozen=True)
class Schema:
    """One way to lay out a preference row."""

    name: str
    columns: str
    """The columns, for messages to the user."""
    needs: tuple[tuple[str, ...], ...]
    """Columns without which a row is none of the schema; of several in one place any."""
    fits: Callable[[Row], bool]
    """True if the row looks like this schema; never raises."""
    read: Callable[[Row], Parsed]
    """The reader of its rows; raises `Rejected`."""
    groups_by: str | None = None
    """Adjacent rows with the same value in this column are one comparison: ``{"rows": [...]}``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return schema_named, (self.name,)

    def parse(self, row: Row) -> Parsed:
        """Prompt and responses of a row, whatever they are; raises `Rejected` where there are none
        to be read."""
        if self.groups_by and not isinstance(row.get("rows"), list):
            row = {"rows": [row]}
        rows = row["rows"] if self.groups_by else [row]
        try:
            for each in rows:
                refuse_media(each)
            parsed = self.read(row)
            parsed.prompt = with_system(rows[0], parsed.prompt)
            tools, notes = tools_of(rows[0])
        except RecursionError:
            raise Rejected("too_deep") from None
        parsed.tools = parsed.tools or tools
        messages = [m for messages in (parsed.prompt, *parsed.responses) for m in messages or ()]
        parsed.notes += notes + notes_of(messages)
        return parsed

    def convert(self, row: Row, *, keep_ties: bool = False) -> Comparison:
        """The row as a comparison; raises `Rejected`. ``keep_ties``: also one that ties all."""
        return validate(self.parse(row), keep_ties=keep_ties)

    def prompt(self, row: Row) -> list[Message]:
        """The prompt of a row, also of one whose responses cannot be read; raises `Rejected`."""
        try:
            return self.parse(row).prompt
        except Rejected:
            first = row["rows"][0] if self.groups_by and "rows" in row else row
            return with_system(first, prompt_of(first))


_PAIR: tuple[tuple[str, ...], ...] = (("chosen",), ("rejected",))


def _pair_of_messages(row: Row) -> bool:
    return is_messages(row.get("chosen")) and is_messages(row.get("rejected"))


def _given(row: Row, *names: str) -> bool:
    """Whether any of the columns has a value: null is absent."""
    return first_of(row, *names) is not None


def _is_alpaca(row: Row) -> bool:
    if not texts(row, "instruction"):
        return False
    pair = as_list(row.get("output"))
    listed = pair is not None and len(pair) > 1 and not _given(row, "prompt")
    return texts(row, "chosen", "rejected") or listed


def _lists_of_texts(row: Row) -> bool:
    return all(
        isinstance(row.get(n), list) and row[n] and isinstance(row[n][0], str)
        for n in ("chosen", "rejected")
    )


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "sharegpt",
        "conversations, chosen, rejected",
        (("conversations", "messages"), *_PAIR),
        pairs.is_sharegpt,
        pairs.sharegpt,
    ),
    Schema(
        "swift",
        "messages (the last is the chosen reply), rejected_response or rejected_messages;"
        " or query, response, rejected_response",
        (("messages", "query"), ("rejected_response", "rejected_messages")),
        lambda r: (
            _given(r, "rejected_response", "rejected_messages")
            and (is_messages(r.get("messages")) or texts(r, "response"))
        ),
        pairs.swift,
    ),
    Schema(
        "openai",
        "input (with messages), preferred_output, non_preferred_output",
        (("input",), ("preferred_output",), ("non_preferred_output",)),
        lambda r: _given(r, "preferred_output") and "non_preferred_output" in r,
        pairs.openai,
    ),
    Schema(
        "argilla",
        "prompt, chosen, rejected (messages), chosen-rating, rejected-rating",
        (*_PAIR, ("chosen-rating",)),
        lambda r: _pair_of_messages(r) and "chosen-rating" in r,
        pairs.messages,
    ),
    Schema(
        "orpo-dpo-mix",
        "source, prompt, question, chosen, rejected (messages)",
        (("source",), ("question",), *_PAIR),
        lambda r: _pair_of_messages(r) and {"question", "source"} <= r.keys(),
        pairs.messages,
    ),
    Schema(
        "messages",
        "prompt, chosen, rejected (messages), or the prompt inside chosen and rejected",
        _PAIR,
        _pair_of_messages,
        pairs.messages,
    ),
    Schema(
        "hh", "chosen, rejected (strings with Human: and Assistant:)", _PAIR, pairs.is_hh, pairs.hh
    ),
    Schema(
        "alpaca",
        "instruction, input, chosen, rejected, or output = [better, worse]",
        (("instruction",), ("chosen", "output"), ("rejected", "output")),
        _is_alpaca,
        pairs.alpaca,
    ),
    Schema(
        "many-against-many",
        "prompt, chosen, rejected (lists of strings): RM-Bench, RewardBench 2",
        (("prompt", "question"), *_PAIR),
        _lists_of_texts,
        pairs.many_against_many,
    ),
    Schema(
        "helpsteer-preference",
        "prompt or context, response_1, response_2, preference_strength",
        (
            ("prompt", "context"),
            ("response_1", "response1"),
            ("response_2", "response2"),
            ("preference_strength", "overall_preference"),
        ),
        lambda r: (
            _given(r, "response_1", "response1")
            and _given(r, "preference_strength", "overall_preference")
        ),
        ranked.two_rated,
    ),
    Schema(
        "pku-saferlhf",
        "prompt, response_0, response_1, better_response_id",
        (("prompt",), ("response_0",), ("response_1",), ("better_response_id",)),
        lambda r: _given(r, "response_0") and _given(r, "better_response_id"),
        ranked.labeled,
    ),
    Schema(
        "arena",
        "conversation_a, conversation_b, winner",
        (("conversation_a",), ("conversation_b",), ("winner",)),
        lambda r: is_messages(r.get("conversation_a")) and "winner" in r,
        ranked.arena,
    ),
    Schema(
        "judgebench",
        "question, response_A, response_B, label (A>B or B>A)",
        (PROMPTS, ("response_A",), ("response_B",), ("label",)),
        lambda r: all(name in r for name in ("response_A", "response_B", "label")),
        ranked.judgebench,
    ),
    Schema(
        "helpsteer",
        "prompt, response, helpfulness (a row per response)",
        (("prompt",), ("response",), ("helpfulness",)),
        lambda r: texts(r, "prompt", "response") and _given(r, "helpfulness"),
        ranked.rated_rows,
        groups_by="prompt",
    ),
    Schema(
        "ranked",
        "prompt, responses with score or rank: also Nectar, UltraFeedback, distilabel, NeMo-RL",
        (PROMPTS, ranked.RESPONSE_LISTS, ("scores", "ratings", "ranks", "rank")),
        ranked.is_ranked,
        ranked.ranked,
    ),
    Schema(
        "strings-with-prompt",
        "chosen, rejected (strings that begin with the prompt)",
        _PAIR,
        pairs.has_prompt_inside,
        pairs.strings_with_prompt,
    ),
    Schema(
        "strings",
        "prompt, chosen, rejected (strings): also RewardBench",
        (PROMPTS, *_PAIR),
        lambda r: texts(r, "chosen", "rejected") and not r.keys().isdisjoint(PROMPTS),
        pairs.strings,
    ),
    Schema(
        "chatml",
        "prompt, chosen, rejected (strings that hold <|im_start|> turns); only by name",
        (),
        lambda r: False,
        pairs.chatml,
    ),
)
SCHEMA_NAMES = tuple(s.name for s in SCHEMAS)


def schema_named(name: str) -> Schema:
    """The schema ``--format`` names; ValueError lists the names."""
    for schema in SCHEMAS:
        if schema.name == name:
            return schema
    raise ValueError(f"--format {name}: unknown; known are {', '.join(SCHEMA_NAMES)}")


def recognize(rows: Sequence[Row]) -> Schema | None:
    """The schema that the rows look like, or None. Of several that fit almost as many rows, the
    most particular."""
    counts = [sum(schema.fits(row) for row in rows) for schema in SCHEMAS]
    most = max(counts)
    return (
        next(s for s, n in zip(SCHEMAS, counts, strict=True) if n >= 0.8 * most) if most else None
    )


def source_of(row: Row, default: str) -> str:
    """The name of the part of the set that a row comes from: its ``source`` or ``subset``, else
    ``default``."""
    for name in ("source", "subset", "domain"):
        value = row.get(name)
        if isinstance(value, str) and 0 < len(value) <= 100:
            return value.encode("utf-8", "replace").decode()
    return default
