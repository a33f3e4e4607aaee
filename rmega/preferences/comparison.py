"""The ``Comparison`` type, and validation of a parsed row.

A schema (schemas.py) parses a row into `Parsed`, without any check of the responses; `validate`
makes a `Comparison` of it. A row that cannot be parsed or is no preference raises `Rejected`, with
a reason from `REASONS` and a detail for the person who repairs the data; it is counted and written
out, never dropped silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""``role`` and ``content`` (text); further keys such as ``tool_calls`` go to the chat template."""

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
    "contradiction": "the same responses, preferred otherwise elsewhere",
    "not_text": "pictures, sound or video, which a text model does not see",
    "template": "the chat template refuses the conversation",
    "identical_in_template": "the responses differ only in what the chat template leaves out",
    "overlong": "longer than --max-length",
    "outside_vocabulary": "a token that the model has no embedding for",
    "identical_after_cut": "the responses are the same after cutting to --max-length",
    "map_failed": "the --map function raised an error",
    "skipped_by_map": "the --map function returned None",
    "holdout": "its prompt is in a --holdout file",
}
NOT_FAULTS = frozenset(
    {"tie", "duplicate", "overlong", "identical_after_cut", "skipped_by_map", "holdout"}
)
"""Reasons that are a property or a request, not a defect of the file: they do not count towards
--max-rejected."""


class Rejected(Exception):
    """A row that is left out. ``reason`` is a key of `REASONS`, ``detail`` names what and where in
    the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{REASONS[reason]}{f' ({detail})' if detail else ''}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejected, (self.reason, self.detail)


@dataclass(kw_only=True, slots=True)
class Parsed:
    """A row as its schema reads it; see `validate` for what makes it a comparison."""

    prompt: list[Message]
    responses: list[list[Message] | None]
    """In the order of the row, each one or more messages that follow the prompt; None for null."""
    scores: Sequence[float | None]
    """One per response; None where it is missing, NaN where it is no finite number."""
    graded: bool = False
    """Scores are ratings, so that their differences are margins; else only their order counts."""
    ordered: bool = True
    """The order of the row is the label; else it is unrelated to the preference."""
    tools: list[Any] | None = None
    """Tool descriptions for the chat template."""
    notes: list[str] = field(default_factory=list)
    """What was changed or noticed on the way; counted and reported."""


@dataclass(kw_only=True, slots=True)
class Comparison:
    """K >= 2 responses to one prompt, best first."""

    prompt: list[Message]
    responses: list[list[Message]]
    """Each one or more messages that follow the prompt, the last one the assistant's."""
    scores: list[float]
    """One per response, falling; equal scores are ties."""
    graded: bool = False
    """As `Parsed.graded`."""
    source: str = ""
    tools: list[Any] | None = None
    positions: list[int] | None = None
    """Where each response stood among the row's (without those left out), if the order of the row
    is unrelated to the preference; else None."""
    left_out: list[int] = field(default_factory=list)
    """Places in the row of responses that were left out, with a note each."""
    notes: list[str] = field(default_factory=list)
    """As `Parsed.notes`."""


UNRATED = "a response without a score, left out"
NO_TEXT = "a response without text, left out"
WIDE_RATINGS = "ratings too far apart for a margin: their order counts"
_MAX_FLOAT32 = 3.4e38


def validate(parsed: Parsed, *, keep_ties: bool = False) -> Comparison:
    """The comparison, best response first, ties in the order of the row; raises `Rejected`, also
    where all scores are equal, unless ``keep_ties``.

    Of three or more responses one without score or text is left out, with a note.
    """
    responses, scores, notes = parsed.responses, parsed.scores, list(parsed.notes)
    unrated = [i for i, score in enumerate(scores) if score is None or math.isnan(score)]
    empty = [i for i, r in enumerate(responses) if i not in unrated and _is_empty(r)]
    kept = [i for i in range(len(responses)) if i not in unrated and i not in empty]
    if len(kept) < 2 or len(responses) == 2:
        if len(responses) < 2:
            raise Rejected("too_few_responses", f"{len(responses)} response")
        if unrated:
            reason = "missing_field" if scores[unrated[0]] is None else "wrong_type"
            raise Rejected(reason, f"the score of response {unrated[0] + 1}")
        if empty:
            raise Rejected("empty_response", f"response {empty[0] + 1}")
    notes += [UNRATED] * len(unrated) + [NO_TEXT] * len(empty)
    for i in kept:
        _check_turns(responses[i], i + 1)
    if not any(map(_has_text, parsed.prompt)):
        raise Rejected("empty_prompt")
    order = sorted(kept, key=lambda i: -scores[i])  # stable
    best, worst = order[0], order[-1]
    if all(responses[i] == responses[best] for i in order[1:]):
        raise Rejected("identical_responses")
    if len(order) > 2:
        _check_repeated([responses[i] for i in order], [scores[i] for i in order])
    if scores[best] == scores[worst] and not keep_ties:
        raise Rejected("tie")
    if not all(map(_has_text, parsed.prompt)):
        notes.append("an empty turn in the prompt")
    graded = parsed.graded and scores[best] - scores[worst] < _MAX_FLOAT32
    if parsed.graded and not graded:
        notes.append(WIDE_RATINGS)
    return Comparison(
        prompt=parsed.prompt,
        responses=[responses[i] for i in order],
        scores=[float(scores[i]) for i in order],
        graded=graded,
        tools=parsed.tools,
        positions=None if parsed.ordered else [kept.index(i) for i in order],
        left_out=sorted(unrated + empty),
        notes=notes,
    )


def _check_turns(response: list[Message], number: int) -> None:
    if response[-1]["role"] != "assistant":
        raise Rejected("no_reply", f"response {number}")
    if response[0]["role"] not in ("assistant", "tool", "function", "ipython"):
        begin = f"response {number} begins with a turn of the {response[0]['role']}"
        raise Rejected("prompts_differ", begin)


def _check_repeated(responses: Sequence[list[Message]], scores: Sequence[float]) -> None:
    seen: dict[str, float] = {}
    for response, score in zip(responses, scores, strict=True):
        text = json.dumps(response, sort_keys=True, default=str)
        if seen.setdefault(text, score) != score:
            raise Rejected("contradictory_scores", f"scores {seen[text]:g} and {score:g}")


def _is_empty(response: list[Message] | None) -> bool:
    """Null, or a reply without text. One that ends with another turn is another fault."""
    return not response or (response[-1]["role"] == "assistant" and not _has_text(response[-1]))


def _has_text(message: Message) -> bool:
    return bool(message["content"].strip()) or bool(message.get("tool_calls"))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
