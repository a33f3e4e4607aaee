"""Rows of every schema -> comparisons; what is no comparison is rejected with its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rmega.preferences.comparison import (
    NOT_FAULTS,
    REASONS,
    Comparison,
    Parsed,
    Rejected,
    assistant,
    user,
    validate,
)
from rmega.preferences.messages import as_message, as_number
from rmega.preferences.prompts import parse_hh, split_prompt
from rmega.preferences.schemas import SCHEMAS, recognize, schema_named, source_of
from tests.made_rows import FILES

A, B = "Paris is the capital.", "I do not know."
Q = "What is the capital of France?"


def convert(row: dict[str, Any], name: str | None = None) -> Comparison:
    schema = recognize([row])
    assert schema is not None, row
    if name is not None:
        assert schema.name == name
    return schema.convert(row)


def simple(comparison: Comparison) -> tuple[Any, ...]:
    """(prompt as role: content, responses as lists of the same, scores)"""

    def text(messages: list[dict[str, Any]]) -> list[str]:
        return [f"{m['role']}: {m['content']}" for m in messages]

    return text(comparison.prompt), [text(r) for r in comparison.responses], comparison.scores


PAIR = ([f"user: {Q}"], [[f"assistant: {A}"], [f"assistant: {B}"]], [1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B)]}),
        ("messages", {"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant(B)]}),
        ("messages", {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]}),
        (
            "messages",
            {
                "prompt": [user(Q)],
                "chosen": [user(Q), assistant(A)],
                "rejected": [user(Q), assistant(B)],
            },
        ),
        (
            "messages",
            {
                "chosen": [{**user(Q), "name": None}, assistant(A)],
                "rejected": [user(Q), assistant(B)],
            },
        ),
        ("messages", {"prompt": [user(Q)], "chosen": assistant(A), "rejected": assistant(B)}),
        (
            "argilla",
            {
                "source": None,
                "prompt": Q,
                "chosen": [user(Q), assistant(A)],
                "chosen-rating": None,
                "chosen-model": None,
                "rejected": [user(Q), assistant(B)],
                "rejected-rating": None,
            },
        ),
        (
            "orpo-dpo-mix",
            {
                "source": "x",
                "prompt": Q,
                "question": Q,
                "chosen": [user(Q), assistant(A)],
                "rejected": [user(Q), assistant(B)],
            },
        ),
        ("strings", {"prompt": Q, "chosen": A, "rejected": B}),
        (
            "strings",
            {
                "prompt": Q,
                "chosen": A,
                "rejected": B,
                "subset": "hard",
                "chosen_model": "m",
                "id": 3,
            },
        ),
        ("strings", {"question": Q, "chosen": A, "rejected": B, "system": ""}),
        ("strings", {"prompt": [user(Q)], "chosen": A, "rejected": B}),
        ("strings-with-prompt", {"prompt": Q, "chosen": Q + A, "rejected": Q + B}),
        (
            "hh",
            {
                "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
                "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}",
            },
        ),
        ("hh", {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {A}", "rejected": f" {B}"}),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": Q}],
                "chosen": {"from": "gpt", "value": A},
                "rejected": {"from": "gpt", "value": B},
            },
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": Q}], "chosen": A, "rejected": B},
        ),
        ("alpaca", {"instruction": Q, "input": "", "chosen": A, "rejected": B}),
        ("alpaca", {"instruction": "What is the capital", "input": "of France?", "output": [A, B]}),
        ("many-against-many", {"prompt": Q, "chosen": [A], "rejected": [B], "domain": "chat"}),
        ("ranked", {"prompt": Q, "responses": [B, A], "scores": [0, 1]}),
        (
            "ranked",
            {
                "prompt": [user(Q)],
                "responses": [{"content": B, "score": 0}, {"content": A, "score": 1}],
            },
        ),
        (
            "ranked",
            {
                "instruction": Q,
                "completions": [
                    {"response": A, "overall_score": 1.0},
                    {"response": B, "overall_score": "0"},
                ],
            },
        ),
        (
            "ranked",
            {
                "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
                "answers": [{"answer": B, "rank": 2.0}, {"answer": A, "rank": 1.0}],
            },
        ),
        (
            "helpsteer-preference",
            {"prompt": Q, "response_1": B, "response_2": A, "preference_strength": 1},
        ),
        (
            "helpsteer-preference",
            {"context": [user(Q)], "response1": A, "response2": B, "overall_preference": -1},
        ),
        ("judgebench", {"question": Q, "response_A": B, "response_B": A, "label": "B>A"}),
        ("judgebench", {"question": Q, "response_A": A, "response_B": B, "label": "A>B"}),
        ("pku-saferlhf", {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1}),
        (
            "arena",
            {
                "conversation_a": [user(Q), assistant(B)],
                "conversation_b": [user(Q), assistant(A)],
                "winner": "model_b",
            },
        ),
    ],
)
def test_each_schema_gives_the_same_comparison(name: str, row: dict[str, Any]) -> None:
    prompt, responses, scores = simple(convert(row, name))
    if name == "alpaca":
        prompt = [p.replace("\n", " ") for p in prompt]
    assert (prompt, responses, scores) == PAIR


def test_only_by_name() -> None:
    row = {
        "prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        "chosen": f"{A}<|im_end|>",
        "rejected": B,
    }
    assert recognize([row]).name == "strings"
    assert simple(schema_named("chatml").convert(row)) == PAIR
    with pytest.raises(ValueError, match="--format nonsense: unknown; known are sharegpt"):
        schema_named("nonsense")


def test_multi_turn_system_and_tools() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {
        "system": "Be brief.",
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
    }
    assert convert(row).prompt == [system, user("a"), assistant("b"), user("c")]
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "w"}'},
            {"from": "observation", "value": "rain"},
        ],
        "chosen": {"from": "gpt", "value": "It rains."},
        "rejected": {"from": "gpt", "value": "Sun."},
        "tools": '[{"name": "w"}]',
    }
    comparison = convert(row, "sharegpt")
    assert [m["role"] for m in comparison.prompt] == ["system", "user", "assistant", "tool"]
    assert comparison.tools == [{"name": "w"}]
    # diverging before the last turn: each response is several messages
    row = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("x"), user("c"), assistant("d")],
    }
    assert [len(r) for r in convert(row).responses] == [3, 3]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "w"}], "name": None}
    assert as_message(call, "m") == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "w"}],
    }
    history = {
        "instruction": "c",
        "input": None,
        "history": [["a", "b"]],
        "chosen": "d",
        "rejected": "e",
    }
    assert convert(history).prompt == [user("a"), assistant("b"), user("c")]
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert as_message(parts, "m")["content"] == "ab"


def test_ratings_and_margins() -> None:
    row = {
        "prompt": Q,
        "chosen": [user(Q), assistant(A)],
        "rejected": [user(Q), assistant(B)],
        "chosen-rating": 4.5,
        "rejected-rating": "3",
    }
    comparison = convert(row)
    assert (comparison.scores, comparison.graded) == ([4.5, 3.0], True)
    against = convert({**row, "chosen-rating": 2})
    assert (against.scores, against.graded) == (
        [1.0, 0.0],
        False,
    ) and "do not agree" in against.notes[0]
    assert convert({"prompt": Q, "chosen": A, "rejected": B, "margin": 2}).scores == [2.0, 0.0]
    strong = convert({"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -3})
    assert (strong.scores, strong.graded, strong.positions) == ([3.0, 0.0], True, [0, 1])


def test_many_responses() -> None:
    row = {
        "prompt": Q,
        "responses": [
            {"content": c, "score": s} for c, s in zip("abcd", (1, 3, 1, 2), strict=True)
        ],
    }
    comparison = convert(row)
    assert [r[0]["content"] for r in comparison.responses] == [
        "b",
        "d",
        "a",
        "c",
    ]  # stable among ties
    assert (comparison.scores, comparison.positions, comparison.graded) == (
        [3, 2, 1, 1],
        [1, 3, 0, 2],
        True,
    )
    bench = convert(
        {"prompt": Q, "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "math"}
    )
    assert bench.scores == [1, 1, 1, 0, 0, 0] and not bench.graded
    ranks = convert(
        {
            "prompt": Q,
            "answers": [{"answer": c, "rank": r} for c, r in zip("abc", (3, 1, 2), strict=True)],
        }
    )
    assert [r[0]["content"] for r in ranks.responses] == ["b", "c", "a"] and not ranks.graded
    steer = schema_named("helpsteer")
    rows = [
        {
            "prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc",
            "response": r,
            "helpfulness": h,
        }
        for r, h in (("x", 1), ("y", 4))
    ]
    assert recognize(rows) is steer and steer.groups_by == "prompt"
    comparison = steer.convert({"rows": rows})
    assert comparison.scores == [4, 1] and comparison.prompt == [
        user("a"),
        assistant("b"),
        user("c"),
    ]


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("missing_field", {"prompt": Q, "chosen": A}),
        ("missing_field", {"prompt": Q, "chosen": A, "rejected": None}),
        ("missing_field", {"prompt": None, "chosen": A, "rejected": B}),
        ("wrong_type", {"prompt": Q, "chosen": 5, "rejected": B}),
        ("wrong_type", {"prompt": {"a": 1}, "chosen": A, "rejected": B}),
        ("not_text", {"prompt": Q, "chosen": [{"type": "image"}], "rejected": B}),
        ("empty_response", {"prompt": Q, "chosen": A, "rejected": " \n"}),
        ("empty_prompt", {"prompt": "", "chosen": A, "rejected": B}),
        ("identical_responses", {"prompt": Q, "chosen": A, "rejected": A}),
    ],
)
def test_rejected_strings(reason: str, row: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as caught:
        schema_named("strings").convert(row)
    assert caught.value.reason == reason and REASONS[reason] in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        (
            "unknown_role",
            {"prompt": Q, "chosen": [{"role": "wizard", "content": A}], "rejected": [assistant(B)]},
        ),
        (
            "missing_field",
            {
                "prompt": Q,
                "chosen": [{"role": "assistant", "content": None}],
                "rejected": [assistant(B)],
            },
        ),
        ("missing_field", {"prompt": Q, "chosen": [{"content": A}], "rejected": [assistant(B)]}),
        ("wrong_type", {"prompt": Q, "chosen": ["x"], "rejected": [assistant(B)]}),
        ("empty_response", {"prompt": Q, "chosen": [], "rejected": [assistant(B)]}),
        (
            "no_reply",
            {"chosen": [user(Q), assistant(A), user("x")], "rejected": [user(Q), assistant(B)]},
        ),
        (
            "prompts_differ",
            {"chosen": [user(Q), assistant(A)], "rejected": [user("x"), assistant(B)]},
        ),
    ],
)
def test_rejected_messages(reason: str, row: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as caught:
        schema_named("messages").convert(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("reason", "responses"),
    [
        ("tie", [("a", 1), ("b", 1), ("c", 1)]),
        ("contradictory_scores", [("a", 1), ("b", 0), ("a", 0)]),
        ("too_few_responses", [("a", 1)]),
        ("wrong_type", [("a", 1), ("b", float("nan"))]),
        ("wrong_type", [("a", 1), ("b", "good")]),
        ("identical_responses", [("a", 1), ("a", 0)]),
    ],
)
def test_rejected_ranked(reason: str, responses: list[tuple[str, Any]]) -> None:
    with pytest.raises(Rejected) as caught:
        schema_named("ranked").convert(
            {"prompt": Q, "responses": [{"content": c, "score": s} for c, s in responses]}
        )
    assert caught.value.reason == reason


def test_pieces() -> None:
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nc\n\nHuman: d"
    assert parse_hh(dialogue, "x") == [user("a"), assistant("b\n\nc"), user("d")]
    same = [user("a"), assistant("b")]
    assert split_prompt([same, same]) == ([user("a")], [[assistant("b")], [assistant("b")]])
    sky = {"chosen": "The sky is blue.", "rejected": "The sky is bluish."}
    shared = schema_named("strings-with-prompt").convert(sky)
    assert shared.prompt == [user("The sky is ")] and shared.responses[0] == [assistant("blue.")]
    assert as_number("1e400") is None and as_number(10**400) is None and as_number("2.5") == 2.5
    assert (
        source_of({"source": "s"}, "f") == "s"
        and source_of({"source": ["x"], "subset": "b"}, "f") == "b"
    )
    assert source_of({"source": "x" * 200}, "f") == "f"
    assert schema_named("strings").prompt({"prompt": Q}) == [user(Q)]
    assert set(NOT_FAULTS) < set(REASONS)
    with pytest.raises(Rejected):
        responses = [[assistant("b")], [assistant("c")]]
        validate(Parsed(prompt=[user("a")], responses=responses, scores=[0.0, 0.0]))


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    text = (
        gzip.open(path, "rt", encoding="utf-8").read()
        if path.suffix == ".gz"
        else path.read_text(encoding="utf-8")
    )
    return (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )


SHARED = {
    "en-dpo-multiturn/dpo_en_demo.json": ("sharegpt", 300),
    "en-dpo-multiturn/en.pairs.jsonl": ("messages", 300),
    "gsm8k-solutions/all.ranked.jsonl": ("ranked", 1319),
    "hh-rlhf/harmless-base.test.jsonl.gz": ("hh", 2312),
    "hh-rlhf/mix.eval.pairs.jsonl.gz": ("messages", 874),
    "llmbar/eval.pairs.jsonl": ("messages", 419),
    "qa-feedback/dev.ranked.jsonl": ("ranked", 500),
    "zh-dpo/dpo_zh_500.jsonl": ("sharegpt", 500),
    "ultrafeedback-cleaned-1k/train.argilla-schema.jsonl.gz": ("argilla", 1000),
    "ultrafeedback-cleaned-1k/train.parquet": ("strings", 1000),
    "zh-dpo/dpo_zh_demo.json": ("sharegpt", 300),
    "zh-dpo/zh.pairs.jsonl": ("messages", 766),
}


def test_real_files(shared_dir: Path) -> None:
    for name, expected in SHARED.items():
        check_file(shared_dir / "data" / name, *expected)


@pytest.mark.parametrize("name", FILES)
def test_files(preference_files: Path, name: str) -> None:
    check_file(preference_files / name, *FILES[name])


def check_file(path: Path, name: str, count: int) -> None:
    """Every row of a file becomes a comparison or is left out for a good reason."""
    rows = rows_of(path)
    schema = recognize(rows[:50])
    assert (schema.name, len(rows)) == (name, count), path
    reasons = []
    for row in rows:
        try:
            comparison = schema.convert(row)
        except Rejected as why:
            reasons.append(why.reason)
            continue
        assert comparison.prompt and all(r[-1]["role"] == "assistant" for r in comparison.responses)
        assert comparison.scores == sorted(comparison.scores, reverse=True)
    assert set(reasons) <= {"tie", "empty_response"}
    assert reasons.count("empty_response") <= 4


def test_the_schemas_have_distinct_names() -> None:
    assert len({s.name for s in SCHEMAS}) == len(SCHEMAS)
    assert recognize([{"a": 1}, {}]) is None and recognize([]) is None


@pytest.mark.parametrize("label", ["A", "", None, 1, "A>C", ["A>B"]])
def test_judgebench_labels(label: Any) -> None:
    row = {"question": Q, "response_A": A, "response_B": B, "label": label}
    with pytest.raises(Rejected) as error:
        convert(row, "judgebench")
    assert error.value.reason in ("wrong_type", "missing_field")
    assert recognize([{**row, "label": "A>B"}]).name == "judgebench"
