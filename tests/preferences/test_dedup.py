"""What is decided over the whole set: duplicates, contradictions, the split, weights, scripts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rmega.preferences import dedup
from rmega.preferences.comparison import Comparison, assistant, user


def comparison(
    prompt: str, *responses: str, scores: list[float] | None = None, **fields: Any
) -> Comparison:
    return Comparison(
        prompt=[user(prompt)],
        responses=[[assistant(r)] for r in responses],
        scores=scores or [float(-i) for i in range(len(responses))],
        **fields,
    )


def table(*items: Comparison) -> np.ndarray:
    return np.array(
        [dedup.document_row(c, 0, i + 1, 10, 0) for i, c in enumerate(items)], dedup.DOCUMENT
    )


def test_duplicates_and_contradictions() -> None:
    rows = table(
        comparison("p", "a", "b"),
        comparison("p", "a", "b"),
        comparison(" p\n", "a ", "b"),  # duplicates
        comparison("q", "a", "b"),
        comparison("q", "b", "a"),
        comparison("q", "a", "b"),  # contradiction
        comparison("r", "a", "b"),
        comparison("p", "a", "c"),  # neither
        comparison("k", "a", "b", "c", scores=[2, 1, 0]),
        comparison("k", "b", "a", "c", scores=[2, 1, 0]),
        comparison("t", "a", "b", "c", scores=[1, 0, 0]),
        comparison("t", "a", "c", "b", scores=[5, 3, 3]),
    )
    duplicate, contradiction = dedup.find_duplicates(rows)
    assert np.flatnonzero(duplicate).tolist() == [1, 2, 11]
    assert np.flatnonzero(contradiction).tolist() == [3, 4, 5, 8, 9]
    assert [a.tolist() for a in dedup.find_duplicates(table()[:0])] == [[], []]


def test_duplicates_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    items = [
        comparison(f"p{rng.integers(40)}", *rng.permutation(["a", "b"]).tolist())
        for _ in range(300)
    ]
    seen: dict[str, set[str]] = {}
    for item in items:
        seen.setdefault(item.prompt[0]["content"], set()).add(item.responses[0][0]["content"])
    duplicate, contradiction = dedup.find_duplicates(table(*items))
    assert contradiction.tolist() == [len(seen[i.prompt[0]["content"]]) == 2 for i in items]
    assert (~duplicate & ~contradiction).sum() == sum(len(v) == 1 for v in seen.values())


def test_split_keeps_openings_together() -> None:
    items = []
    for i in range(200):
        opening = user(f"opening {i % 60}")
        prompt = [
            {"role": "system", "content": f"s{i % 2}"},
            opening,
            assistant("x"),
            user(f"follow-up {i}"),
        ]
        items.append(
            Comparison(
                prompt=prompt if i % 3 else [opening],
                responses=[[assistant("a")], [assistant("b")]],
                scores=[1, 0],
            )
        )
    rows, keep = table(*items), np.arange(200) % 7 != 0
    valid = dedup.split_by_prompt(rows, keep, 0.1)
    openings = np.array([i % 60 for i in range(200)])
    assert not set(openings[valid]) & set(openings[keep & ~valid]) and not (valid & ~keep).any()
    assert 0.1 <= valid.sum() / keep.sum() < 0.13
    assert np.array_equal(valid, dedup.split_by_prompt(rows, keep, 0.1))
    assert dedup.split_by_prompt(rows[:3], np.ones(3, bool), 0.01).sum() == 1
    assert not dedup.split_by_prompt(rows[:3], np.ones(3, bool), 0.99).all()
    with pytest.raises(ValueError, match="--valid-fraction"):
        dedup.split_by_prompt(rows[[0, 60]], np.ones(2, bool), 0.5)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain words", "Latin"),
        ("naïve “quotes” – fine", "Latin"),
        ("你好，世界", "Han"),
        ("これは日本語です", "Kana"),
        ("안녕하세요 세계", "Hangul"),
        ("Привет, мир", "Cyrillic"),
        ("مرحبا بالعالم", "Arabic"),
        ("नमस्ते दुनिया", "Devanagari"),
        ("γειά σου κόσμε", "Greek"),
        ("שלום עולם", "Hebrew"),
        ("สวัสดีชาวโลก", "Thai"),
        ("🙂🙂🙂", "other"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert dedup.SCRIPTS[dedup.script_of(comparison(text, text, "x"))] == script


def test_position_counts() -> None:
    assert dedup.position_counts(comparison("p", "a", "b")) == (0, 0)
    assert dedup.position_counts(
        comparison("p", "a", "b", "c", scores=[2, 1, 1], positions=[1, 0, 2])
    ) == (1, 2)
