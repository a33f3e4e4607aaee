"""Schemas with one chosen and one rejected side."""

from __future__ import annotations

import re
from typing import Any

from rmega.preferences.comparison import Message, Parsed, Rejected, assistant, user
from rmega.preferences.messages import (
    Row,
    as_message,
    as_messages,
    as_number,
    as_text,
    field_of,
    is_messages,
    reply,
    tools_of,
)
from rmega.preferences.prompts import PROMPTS, instruction_of, parse_hh, prompt_of, split_prompt
from rmega.preferences.written import as_list, value_of

SIDES = ("chosen", "rejected")
IMPLICIT_PROMPT = "no prompt column: the prompt is what both responses begin with"

_RATING_COLUMNS = (
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
)


def pair(
    row: Row,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    notes: tuple[str, ...] = (),
) -> Parsed:
    """The two sides, with the row's ratings where they agree with the label."""
    scores, graded, against = _ratings_of(row)
    return Parsed(
        prompt=prompt,
        responses=[chosen, rejected],
        scores=scores,
        graded=graded,
        notes=[*against, *notes],
    )


def _ratings_of(row: Row) -> tuple[list[float], bool, list[str]]:
    """Scores of (chosen, rejected), whether they are ratings, and notes.

    Ratings that do not put chosen above rejected leave the label as it is: ranks instead of
    ratings, and a note.
    """
    for names in _RATING_COLUMNS:
        better, worse = (as_number(row.get(name)) for name in names)
        if better is not None and worse is not None:
            if better > worse:
                return [better, worse], True, []
            note = "ratings that do not agree with the label: the label counts, without margin"
            return [1.0, 0.0], False, [note]
    margin = as_number(row.get("margin"))
    if margin is None:
        return [1.0, 0.0], False, []
    if margin > 0:
        return [margin, 0.0], True, []
    return [1.0, 0.0], False, ["a margin that is not positive: the label counts, without margin"]


def messages(row: Row) -> Parsed:
    """``chosen`` and ``rejected`` are messages: of the response alone, or with the prompt."""
    sides = [as_messages(field_of(row, name), name) for name in SIDES]
    given = row.get("prompt")
    if given and is_messages(given):
        prompt = as_messages(given, "prompt")
        sides = [s[len(prompt) :] if s[: len(prompt)] == prompt else s for s in sides]
        return pair(row, prompt, *sides)
    if all(side[0]["role"] == "assistant" for side in sides):
        return pair(row, prompt_of(row), *sides)
    return _with_shared_prompt(row, sides)


def _with_shared_prompt(row: Row, sides: list[list[Message]]) -> Parsed:
    prompt, replies = split_prompt(sides)
    return pair(row, prompt, *replies)


def _both_are_messages(row: Row) -> bool:
    return all(is_messages(row.get(name)) for name in SIDES)


def strings(row: Row) -> Parsed:
    """Texts, with a prompt in a column of its own."""
    if _both_are_messages(row):  # lists written as text, in some of the rows
        return messages(row)
    chosen, rejected = (as_text(field_of(row, name), name) for name in SIDES)
    return pair(row, prompt_of(row), [assistant(chosen)], [assistant(rejected)])


def strings_with_prompt(row: Row) -> Parsed:
    """Texts that both begin with the prompt, whether or not it has a column too."""
    if _both_are_messages(row):
        return messages(row)
    chosen, rejected = (as_text(field_of(row, name), name) for name in SIDES)
    prompt, notes = row.get("prompt"), ()
    if (
        isinstance(prompt, str)
        and prompt
        and chosen.startswith(prompt)
        and rejected.startswith(prompt)
    ):
        cut = len(prompt)
    else:
        cut, notes = _shared_length(chosen, rejected), (IMPLICIT_PROMPT,)
    answers = ([assistant(text[cut:])] for text in (chosen, rejected))
    return pair(row, [user(chosen[:cut])], *answers, notes)


def _shared_length(a: str, b: str) -> int:
    """Length of the longest common beginning that ends where a word ends and leaves a word to
    each."""
    end, limit = 0, min(len(a.rstrip()), len(b.rstrip())) - 1
    while end < limit and a[end] == b[end]:
        end += 1
    while 0 < end and not a[end - 1].isspace() and not (a[end].isspace() and b[end].isspace()):
        end -= 1
    return end


def hh(row: Row) -> Parsed:
    """Dialogues with Human: and Assistant:, or the last reply alone beside such a prompt."""
    sides = [as_text(field_of(row, name), name) for name in SIDES]
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt and not all(s.startswith(prompt) for s in sides):
        sides = [prompt + s for s in sides]
    return _with_shared_prompt(row, [parse_hh(*side) for side in zip(sides, SIDES, strict=True)])


_CHATML_TURN = re.compile(r"\s*<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


def chatml(row: Row) -> Parsed:
    """Texts that a ChatML template made. Never recognized by itself: such text in user data is
    text, not turns."""
    conversations = []
    for name in SIDES:
        side, prompt = as_text(field_of(row, name), name), row.get("prompt")
        text = side if not isinstance(prompt, str) or side.startswith(prompt) else prompt + side
        turns, end = [], 0
        while match := _CHATML_TURN.match(text, end):
            turns.append(as_message({"role": match[1], "content": match[2]}, name))
            end = match.end()
        if text[end:].strip() or not turns:
            raise Rejected("wrong_type", f"{name} is not a sequence of <|im_start|> turns")
        conversations.append(turns)
    return _with_shared_prompt(row, conversations)


def sharegpt(row: Row) -> Parsed:
    """LLaMA-Factory: the conversation before the responses, and the last turn of each side."""
    prompt = as_messages(field_of(row, "conversations", "messages"), "conversations")
    return pair(row, prompt, *(reply(field_of(row, name), name) for name in SIDES))


def swift(row: Row) -> Parsed:
    """ms-swift: a conversation that ends with the chosen reply, and the reply that would replace
    it (or the other conversation); or query, response, history."""
    rejected = field_of(row, "rejected_response", "rejected_messages")
    if row.get("messages") is None:
        prompt = [*history(row), user(as_text(field_of(row, "query", "instruction"), "query"))]
        chosen = reply(field_of(row, "response"), "response")
        return pair(row, prompt, chosen, reply(rejected, "rejected_response"))
    conversation = as_messages(row["messages"], "messages")
    if is_messages(rejected):
        other = as_messages(rejected, "rejected_messages")
        if other[0]["role"] != "assistant":
            return _with_shared_prompt(row, [conversation, other])
    else:
        other = [assistant(as_text(rejected, "rejected_response"))]
    return pair(row, conversation[:-1], conversation[-1:], other)


def openai(row: Row) -> Parsed:
    """OpenAI's preference fine-tuning: input.messages, preferred_output, non_preferred_output."""
    given, tools = field_of(row, "input"), None
    if isinstance(given, str):
        given = value_of(given) or given
    if isinstance(given, dict) and "messages" in given:
        tools, given = tools_of(given)[0], given["messages"]
    sides = (reply(field_of(row, n), n) for n in ("preferred_output", "non_preferred_output"))
    parsed = pair(row, as_messages(given, "input"), *sides)
    parsed.tools = tools
    return parsed


def alpaca(row: Row) -> Parsed:
    """instruction, input, and chosen and rejected or ``output`` with the better one first."""
    output = as_list(row.get("output"))
    values = [field_of(row, name) for name in SIDES] if output is None else output
    answers = [reply(value, f"response {i}") for i, value in enumerate(values, 1)]
    prompt = [*history(row), user(instruction_of(row))]
    if len(answers) == 2:
        return pair(row, prompt, *answers)
    return Parsed(prompt=prompt, responses=answers, scores=[-float(i) for i in range(len(answers))])


def history(row: Row) -> list[Message]:
    """The turns of a column ``history``: [[question, answer], ...]."""
    given: Any = row.get("history") or []
    turns: list[Message] = []
    for turn in [given] if as_list(given) is None else as_list(given):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Rejected("wrong_type", "history is not a list of [question, answer]")
        turns += [user(as_text(turn[0], "history")), assistant(as_text(turn[1], "history"))]
    return turns


def many_against_many(row: Row) -> Parsed:
    """RM-Bench and RewardBench 2: lists of chosen and of rejected responses; any chosen beats any
    rejected."""
    groups = []
    for name in SIDES:
        values = field_of(row, name)
        values = values if isinstance(values, list) else [values]
        groups.append(
            [
                None if v is None else [assistant(as_text(v, f"{name}[{i}]"))]
                for i, v in enumerate(values)
            ]
        )
    if not groups[0] or not groups[1]:
        raise Rejected("too_few_responses", "an empty list of chosen or rejected")
    scores = [1.0] * len(groups[0]) + [0.0] * len(groups[1])
    return Parsed(prompt=prompt_of(row), responses=groups[0] + groups[1], scores=scores)


# ---- recognition


def texts(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(n), str) for n in names)


def is_hh(row: Row) -> bool:
    if not texts(row, *SIDES):
        return False
    if any(row[n].lstrip().startswith("Human:") or "\n\nHuman:" in row[n] for n in SIDES):
        return True
    return texts(row, "prompt") and row["prompt"].startswith("\n\nHuman:")


def has_prompt_inside(row: Row) -> bool:
    if not texts(row, *SIDES):
        return False
    prompt = row.get("prompt")
    if prompt is None:
        return not any(row.get(n) is not None for n in PROMPTS)
    return (
        isinstance(prompt, str)
        and len(prompt) > 1
        and all(row[n].startswith(prompt) and len(row[n]) > len(prompt) for n in SIDES)
    )


def is_sharegpt(row: Row) -> bool:
    """``messages`` is the prompt only where it does not end with a reply: other sets keep the
    chosen conversation there, too."""
    if not row.keys() >= set(SIDES):
        return False
    if is_messages(row.get("conversations")):
        return True
    turns = row.get("messages")
    if not isinstance(turns, list) or not is_messages(turns) or not isinstance(turns[-1], dict):
        return False
    last = turns[-1].get("role") or turns[-1].get("from")
    return last not in ("assistant", "gpt")
