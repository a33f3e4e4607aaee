"""The demonstration set keeps what its README promises, so that the quick start's accuracy means
something."""

from __future__ import annotations

import collections
import itertools
import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
SIDES = ("train", "valid")


def read(side: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (DATA / f"demo.{side}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


ROWS = {side: read(side) for side in SIDES}
EVERY = ROWS["train"] + ROWS["valid"]


def answer(row: dict, which: str) -> str:
    return row[which][-1]["content"]


def chosen_is_longer(row: dict) -> bool:
    return len(answer(row, "chosen")) > len(answer(row, "rejected"))


def ngrams(text: str) -> set[str]:
    """Runs of eight words, or of twelve characters where the script has no spaces."""
    words, length = re.findall(r"[^\W_]+", text.lower()), 8
    if re.search("[\u3040-\u30ff\u4e00-\u9fff]", text):
        words, length = list("".join(words)), 12
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_counts():
    assert len(EVERY) >= 400
    assert len(ROWS["valid"]) >= 100
    assert len({row["id"] for row in EVERY}) == len(EVERY)


def test_form():
    for row in EVERY:
        assert set(row) == {"id", "topic", "flaw", "lang", "prompt", "chosen", "rejected"}, row[
            "id"
        ]
        assert row["prompt"][-1]["role"] == "user", row["id"]
        turns = row["prompt"][1:] if row["prompt"][0]["role"] == "system" else row["prompt"]
        assert [message["role"] for message in turns] == (["user", "assistant"] * len(turns))[
            : len(turns)
        ], row["id"]
        for which in ("chosen", "rejected"):
            assert [message["role"] for message in row[which]] == ["assistant"], row["id"]
        for message in row["prompt"] + row["chosen"] + row["rejected"]:
            assert message["content"] and message["content"] == message["content"].strip(), row[
                "id"
            ]
        is_chinese = bool(re.search("[\u4e00-\u9fff]", row["prompt"][-1]["content"]))
        assert row["lang"] == ("zh" if is_chinese else "en"), row["id"]


@pytest.mark.parametrize("side", SIDES)
def test_length_says_nothing(side):
    rows = ROWS[side]
    assert 0.4 <= sum(map(chosen_is_longer, rows)) / len(rows) <= 0.6
    tokens = [
        (len(answer(row, "chosen").split()), len(answer(row, "rejected").split())) for row in rows
    ]
    assert 0.4 <= sum((c > r) + 0.5 * (c == r) for c, r in tokens) / len(rows) <= 0.6


@pytest.mark.parametrize("side", SIDES)
def test_variety(side):
    rows = ROWS[side]
    assert {row["lang"] for row in rows} == {"en", "zh"}
    assert sum(row["lang"] == "zh" for row in rows) >= 10
    assert (
        sum(any(message["role"] == "assistant" for message in row["prompt"]) for row in rows) >= 20
    )  # several turns
    assert any(row["prompt"][0]["role"] == "system" for row in rows)
    flaws = collections.Counter(row["flaw"] for row in rows)
    assert len(flaws) == 17
    assert max(flaws.values()) <= 0.14 * len(rows)


def test_no_prompt_on_both_sides():
    def key(row):
        return " ".join(re.findall(r"\w+", row["prompt"][-1]["content"].lower()))

    assert not {key(row) for row in ROWS["train"]} & {key(row) for row in ROWS["valid"]}
    openings = [
        {message["content"] for message in row["prompt"] if len(message["content"]) > 40}
        for row in EVERY
    ]
    shared = [
        (EVERY[i]["id"], EVERY[j]["id"])
        for i, j in itertools.combinations(range(len(EVERY)), 2)
        if openings[i] & openings[j]
    ]
    assert not shared


def test_every_answer_was_written_by_itself():
    seen: dict[str, str] = {}
    for row in EVERY:
        here = {gram for which in ("chosen", "rejected") for gram in ngrams(answer(row, which))}
        for gram in here:
            assert gram not in seen, f"{row['id']} and {seen[gram]} share {gram!r}"
            seen[gram] = row["id"]
    answers = collections.Counter(
        answer(row, which) for row in EVERY for which in ("chosen", "rejected")
    )
    assert answers.most_common(1)[0][1] == 1


def test_readme_counts():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    flaws = {side: collections.Counter(row["flaw"] for row in rows) for side, rows in ROWS.items()}
    for flaw in flaws["train"]:
        assert re.search(
            rf"^\| `{flaw}`: .* \| {flaws['train'][flaw]} \| {flaws['valid'][flaw]} \|$",
            readme,
            re.M,
        )
    for side, rows in ROWS.items():
        lang = collections.Counter(row["lang"] for row in rows)
        longer = sum(map(chosen_is_longer, rows)) / len(rows)
        several = sum(len(row["prompt"]) > 1 for row in rows)
        counts = f"{len(rows)} | {lang['en']} / {lang['zh']} | {several} | {longer:.3f}"
        assert f"| `demo.{side}.jsonl` | {counts} |" in readme
