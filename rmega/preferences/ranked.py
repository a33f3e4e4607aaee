"""Schemas with K responses in any order: scores, ranks, labels, the winner of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rmega.preferences.comparison import Message, Parsed, Rejected, assistant
from rmega.preferences.messages import (
    Row,
    as_messages,
    as_number,
    as_text,
    field_of,
    first_of,
    refuse_media,
    reply,
)
from rmega.preferences.prompts import prompt_of, split_prompt
from rmega.preferences.written import as_list

RESPONSE_LISTS = ("responses", "answers", "completions", "candidates", "generations")
RESPONSE_TEXTS = (
    "content",
    "response",
    "answer",
    "text",
    "completion",
    "message",
    "generation",
    "output",
)
SCORES = (
    ("score", "overall_score", "rating", "reward"),
    ("scores", "ratings", "rating", "score", "rewards", "reward"),
)
RANKS = (("rank",), ("ranks", "rank"))
"""Names of a response's own score or rank, and of the columns that list them for all."""
_MISSING = frozenset({"", "-", "n/a", "na", "nan", "none", "null"})


def response_list(row: Row) -> list[Any] | None:
    """The list of responses of a row, also one that is written as text."""
    for name in RESPONSE_LISTS:
        value = as_list(row.get(name))
        if value:
            return value
    return None


def is_ranked(row: Row) -> bool:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return False  # made of the list: the pair is what is meant
    values = response_list(row)
    if values is None:
        return False
    if isinstance(values[0], dict) and any(k in values[0] for k in (*SCORES[0], *RANKS[0])):
        return True
    return any(as_list(row.get(k)) for k in (*SCORES[1], *RANKS[1]))


def ranked(row: Row) -> Parsed:
    """A list of responses with a score or a rank each, in the responses or in a list beside."""
    values = response_list(row)
    if values is None:
        raise Rejected("missing_field", "responses")
    objects = [v for v in values if isinstance(v, dict)]
    inside = bool(objects) and all(v is None or isinstance(v, dict) for v in values)
    for value in objects if inside else ():
        refuse_media(value, "responses: ")
    texts = [first_of(v or {}, *RESPONSE_TEXTS) for v in values] if inside else values
    scores = _numbers(row, values if inside else [], len(values), *SCORES)
    ranks = _numbers(row, values if inside else [], len(values), *RANKS)
    # Whichever is given for more of the responses.
    by_rank = scores.count(None) > ranks.count(None)
    if by_rank:  # rank 1 is the best
        scores = [None if rank is None else len(ranks) - rank for rank in ranks]
    elif scores.count(None) == len(scores):
        raise Rejected("missing_field", " or ".join(SCORES[0] if inside else SCORES[1]))
    return Parsed(
        prompt=prompt_of(row),
        responses=[
            None if text is None else reply(text, f"responses[{i}]") for i, text in enumerate(texts)
        ],
        scores=scores,
        graded=not by_rank,
        ordered=False,
    )


def _numbers(
    row: Row, objects: Sequence[Row | None], num: int, own: Sequence[str], columns: Sequence[str]
) -> list[float | None]:
    """A number per response: its own, or that of a column which lists them for all."""
    given = [first_of(value or {}, *own) for value in objects]
    if given.count(None) == len(given):
        lists = (as_list(row.get(name)) for name in columns)
        given = next((values for values in lists if values is not None), [None] * num)
    if len(given) != num:
        raise Rejected("wrong_type", f"{num} responses, but not as many scores")
    return [_score(value, i) for i, value in enumerate(given)]


def _score(value: Any, index: int) -> float | None:
    """A number; None where it is missing, NaN where it is not finite."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _MISSING):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return math.nan
    number = as_number(value)
    if number is None:
        raise Rejected("wrong_type", f"the score of response {index + 1} is not a number")
    return number


def _replies(row: Row, *columns: tuple[str, ...]) -> list[list[Message]]:
    """The responses in columns of their own, of which several names are known."""
    return [[assistant(as_text(field_of(row, *names), names[0]))] for names in columns]


def two_rated(row: Row) -> Parsed:
    """HelpSteer 2 and 3 preferences: a strength from -3 (the first is much better) to 3 (the second
    is)."""
    responses = _replies(row, ("response_1", "response1"), ("response_2", "response2"))
    strength = as_number(field_of(row, "preference_strength", "overall_preference"))
    if strength is None:
        raise Rejected("wrong_type", "the strength of the preference is not a number")
    return Parsed(
        prompt=prompt_of(row),
        responses=responses,
        scores=[max(-strength, 0.0), max(strength, 0.0)],
        graded=True,
        ordered=False,
    )


def labeled(row: Row) -> Parsed:
    """PKU-SafeRLHF: the number of the better response."""
    given = field_of(row, "better_response_id")
    label = as_number(given)
    if label not in (0, 1):
        raise Rejected("wrong_type", f"better_response_id is {given!r:.40}, not 0 or 1")
    return Parsed(
        prompt=prompt_of(row),
        responses=_replies(row, ("response_0",), ("response_1",)),
        scores=[float(label == i) for i in (0, 1)],
        ordered=False,
    )


def arena(row: Row) -> Parsed:
    """Chatbot Arena: two conversations and the winner, model_a, model_b or a tie of some kind."""
    names = ("conversation_a", "conversation_b")
    conversations = [as_messages(field_of(row, name), name) for name in names]
    winner = str(field_of(row, "winner")).strip().lower()
    if winner not in ("model_a", "model_b") and not winner.startswith(("tie", "both", "neither")):
        raise Rejected("wrong_type", f"winner is {winner[:40]!r}, not model_a, model_b or a tie")
    prompt, responses = split_prompt(conversations)
    scores = [float(winner == name) for name in ("model_a", "model_b")]
    return Parsed(prompt=prompt, responses=responses, scores=scores, ordered=False)


JUDGEBENCH_LABELS = {"A>B": [1.0, 0.0], "B>A": [0.0, 1.0], "A=B": [0.0, 0.0]}


def judgebench(row: Row) -> Parsed:
    """JudgeBench: two responses and which is the better one, "A>B" or "B>A"."""
    label = field_of(row, "label")
    scores = JUDGEBENCH_LABELS.get(label.replace(" ", "") if isinstance(label, str) else "")
    if scores is None:
        raise Rejected("wrong_type", f"label is {label!r:.40}, not one of A>B, B>A, A=B")
    return Parsed(
        prompt=prompt_of(row),
        responses=_replies(row, ("response_A",), ("response_B",)),
        scores=list(scores),
        ordered=False,
    )


def rated_rows(row: Row) -> Parsed:
    """HelpSteer: a row per response; ``{"rows": [...]}`` holds those of one prompt."""
    rows = row["rows"]
    return Parsed(
        prompt=prompt_of(rows[0]),
        responses=[[assistant(as_text(field_of(r, "response"), "response"))] for r in rows],
        scores=[_score(r.get("helpfulness"), i) for i, r in enumerate(rows)],
        graded=True,
        ordered=False,
    )
