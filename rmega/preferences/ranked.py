"""Schemas in which the order of the responses is free: scores, ranks, labels, the winner of two."""

from __future__ import annotations

import re
from typing import Any

from rmega.preferences.comparison import (
    Comparison,
    Message,
    Rejected,
    as_messages,
    as_number,
    as_text,
    assistant,
    field_of,
    make_comparison,
    parse_hh,
    split_prompt,
    user,
    with_system,
)

Row = dict[str, Any]

RESPONSE_LISTS = ("responses", "answers", "completions", "candidates")
RESPONSE_TEXTS = ("content", "response", "answer", "text", "completion", "message")
_SCORES = ("score", "overall_score", "rating", "reward")


def response_list(row: Row) -> list[Any] | None:
    for name in RESPONSE_LISTS:
        value = row.get(name)
        if isinstance(value, list) and value:
            return value
    return None


def is_ranked(row: Row) -> bool:
    values = response_list(row)
    if values is None:
        return False
    if isinstance(values[0], dict):
        return any(k in values[0] for k in (*_SCORES, "rank"))
    return any(isinstance(row.get(k), list) for k in ("scores", "ratings", "ranks", "rank"))


def ranked(row: Row) -> Comparison:
    values = response_list(row)
    if values is None:
        raise Rejected("missing_field", "responses")
    by_rank = False
    responses: list[list[Message]] = []
    scores: list[float] = []
    if all(isinstance(v, dict) for v in values):
        by_rank = not any(k in v for v in values for k in _SCORES)
        for i, value in enumerate(values):
            text = field_of(value, *RESPONSE_TEXTS)
            responses.append(
                [assistant(text)] if isinstance(text, str) else as_messages(text, f"responses[{i}]")
            )
            scores.append(_score(field_of(value, *(("rank",) if by_rank else _SCORES)), i))
    else:
        by_rank = not any(isinstance(row.get(k), list) for k in ("scores", "ratings"))
        given = field_of(row, *(("ranks", "rank") if by_rank else ("scores", "ratings")))
        if not isinstance(given, list) or len(given) != len(values):
            raise Rejected("wrong_type", f"{len(values)} responses, but not as many scores")
        for i, value in enumerate(values):
            responses.append(
                [assistant(value)]
                if isinstance(value, str)
                else as_messages(value, f"responses[{i}]")
            )
            scores.append(_score(given[i], i))
    if by_rank:  # rank 1 is the best
        scores = [len(scores) - s for s in scores]
    return make_comparison(
        with_system(row, any_prompt(row)), responses, scores, graded=not by_rank, ordered=False
    )


def _score(value: Any, index: int) -> float:
    number = as_number(value)
    if number is None:
        raise Rejected("wrong_type", f"the score of response {index + 1} is not a number")
    return number


def any_prompt(row: Row) -> list[Message]:
    given = field_of(row, "prompt", "instruction", "question", "context", "conversations")
    if isinstance(given, str) and given.lstrip().startswith("Human:"):
        messages = parse_hh(
            given if given.startswith("\n\n") else "\n\n" + given.lstrip(), "prompt"
        )
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return messages
    if isinstance(given, str) and "<extra_id_1>" in given:  # HelpSteer's turns
        first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", given)
        return [user(first)] + [
            {"role": role.lower(), "content": content}
            for role, content in zip(turns[::2], turns[1::2], strict=True)
        ]
    return [user(given)] if isinstance(given, str) else as_messages(given, "prompt")


def two_rated(row: Row) -> Comparison:
    """HelpSteer 2 and 3 preferences: a strength from -3 (the first is much better) to 3 (the second
    is)."""
    responses = [
        field_of(row, *names)
        for names in (("response_1", "response1"), ("response_2", "response2"))
    ]
    strength = as_number(field_of(row, "preference_strength", "overall_preference"))
    if strength is None:
        raise Rejected("wrong_type", "the strength of the preference is not a number")
    prompt = any_prompt({k: row.get(k) for k in ("prompt", "context")})
    return make_comparison(
        with_system(row, prompt),
        [[assistant(as_text(r, "response"))] for r in responses],
        [max(-strength, 0.0), max(strength, 0.0)],
        graded=True,
        ordered=False,
    )


def labelled(row: Row) -> Comparison:
    """PKU-SafeRLHF: the number of the better response."""
    label = field_of(row, "better_response_id")
    if label not in (0, 1):
        raise Rejected("wrong_type", f"better_response_id is {label!r:.40}, not 0 or 1")
    responses = [
        [assistant(as_text(field_of(row, f"response_{i}"), f"response_{i}"))] for i in (0, 1)
    ]
    return make_comparison(
        with_system(row, any_prompt(row)),
        responses,
        [float(label == i) for i in (0, 1)],
        graded=False,
        ordered=False,
    )


def arena(row: Row) -> Comparison:
    """Chatbot Arena: two conversations and the winner; whatever else stands there is a tie."""
    conversations = [
        as_messages(field_of(row, f"conversation_{x}"), f"conversation_{x}") for x in "ab"
    ]
    winner = field_of(row, "winner")
    prompt, responses = split_prompt(conversations)
    scores = [float(winner == f"model_{x}") for x in "ab"]
    return make_comparison(prompt, responses, scores, graded=False, ordered=False)


def rated_rows(row: Row) -> Comparison:
    """HelpSteer: a row per response; the rows of one prompt follow each other."""
    rows = row["rows"]
    responses, scores = [], []
    for i, r in enumerate(rows):
        responses.append([assistant(as_text(field_of(r, "response"), "response"))])
        scores.append(_score(field_of(r, "helpfulness"), i))
    return make_comparison(any_prompt(rows[0]), responses, scores, graded=True, ordered=False)
