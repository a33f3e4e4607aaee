"""Policies for conversations longer than ``--max-length``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rmega.preferences.comparison import Comparison, Message, Rejected

OVERLONG_POLICIES = ("left-prompt", "right", "drop", "error")

Render = Callable[[Comparison], list[np.ndarray]]
"""Ids of each conversation of a comparison: int32 [tokens] each, with the reward token."""


class Overlong(ValueError):
    """A conversation over the limit, under ``--overlong error``."""


def shorten(
    comparison: Comparison,
    ids: list[np.ndarray],
    limit: int,
    policy: str,
    render: Render,
    reward_token_id: int | None,
    notes: list[str],
) -> list[np.ndarray]:
    """Ids of at most ``limit`` tokens per conversation, by ``policy``; ``notes`` is extended by
    what was left out. Raises `Rejected` (drop) or `Overlong` (error)."""
    longest = max(map(len, ids))
    if policy == "error":
        raise Overlong(
            f"a conversation of {longest} tokens, --max-length is {limit} (--overlong error)"
        )
    if policy == "drop":
        raise Rejected("overlong", f"{longest} tokens, the limit is {limit}")
    if policy == "left-prompt":
        comparison, ids = _drop_turns(comparison, ids, limit, render, notes)
        if max(map(len, ids)) > limit:
            ids = _shorten_question(comparison, ids, limit, render, notes)
    if max(map(len, ids)) > limit:
        notes.append("cut: end of the response left out")
        ids = [cut_end(i, limit, reward_token_id) for i in ids]
    return ids


def cut_end(ids: np.ndarray, limit: int, reward_token_id: int | None) -> np.ndarray:
    """The first ``limit`` ids; the reward token takes the last place where there is one."""
    if len(ids) <= limit:
        return ids
    if reward_token_id is None:
        return ids[:limit]
    return np.append(ids[: limit - 1], np.int32(reward_token_id))


def common_length(sequences: Sequence[np.ndarray]) -> int:
    """How many ids all sequences begin with."""
    length = min(map(len, sequences))
    for other in sequences[1:]:
        differ = sequences[0][:length] != other[:length]
        if differ.any():
            length = int(differ.argmax())
    return length


def common_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix that leaves at least one id to each sequence."""
    return min(common_length(sequences), min(map(len, sequences)) - 1)


def _first_turn(prompt: Sequence[Message]) -> int:
    """Index of the first message that is not the system's."""
    return next(
        (i for i, m in enumerate(prompt) if m["role"] not in ("system", "developer")), len(prompt)
    )


def _drop_turns(
    comparison: Comparison, ids: list[np.ndarray], limit: int, render: Render, notes: list[str]
) -> tuple[Comparison, list[np.ndarray]]:
    """Leave out as few of the oldest turns as possible; the system prompt and the last question
    stay."""
    prompt = comparison.prompt
    keep = _first_turn(prompt)
    starts = [i for i, m in enumerate(prompt) if i > keep and m["role"] == "user"]
    if not starts:
        return comparison, ids

    def without(start: int) -> tuple[Comparison, list[np.ndarray]]:
        shorter = replace(comparison, prompt=prompt[:keep] + prompt[start:])
        return shorter, render(shorter)

    low, high, best = 0, len(starts) - 1, without(starts[-1])
    while low < high:  # later starts are shorter: the first that fits
        middle = (low + high) // 2
        tried = without(starts[middle])
        if max(map(len, tried[1])) <= limit:
            high, best = middle, tried
        else:
            low = middle + 1
    notes.append("cut: oldest turns of the prompt left out")
    return best


def _shorten_question(
    comparison: Comparison, ids: list[np.ndarray], limit: int, render: Render, notes: list[str]
) -> list[np.ndarray]:
    """Cut the last question from its left until everything fits, to within a few tokens.

    A response that would not fit without any question leaves the prompt half of the room: then
    only the prompt is brought to that, and the caller cuts the response.
    """
    prompt, index = comparison.prompt, _first_turn(comparison.prompt)
    text = prompt[index]["content"] if index < len(prompt) else ""

    def rendered(keep: int) -> list[np.ndarray]:
        message = {**prompt[index], "content": text[len(text) - keep :]}
        return render(replace(comparison, prompt=[*prompt[:index], message, *prompt[index + 1 :]]))

    if not text:
        return ids
    measure, target = (lambda found: max(map(len, found))), limit
    without = rendered(0)
    if measure(without) > limit:
        measure, target = common_prefix_length, limit // 2
        if measure(ids) <= target or measure(without) > target:
            return ids
    low, high, best = 0, len(text), without  # characters kept: low fits, high does not
    low_size, high_size = measure(without), measure(ids)
    while high - low > 1 and target - low_size > 4:
        share = (target - 1 - low_size) / max(1, high_size - low_size)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        tried = rendered(middle)
        if measure(tried) <= target:
            low, low_size, best = middle, measure(tried), tried
        else:
            high, high_size = middle, measure(tried)
    notes.append("cut: beginning of the last question left out")
    return best
