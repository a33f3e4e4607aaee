"""Rows as people have them: nulls inside, lists as text, other spellings, folders with more than
data. Each gives the comparisons that are meant, or is refused or noted by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmega.preferences import sources
from rmega.preferences.comparison import Comparison, Rejected, assistant, user
from rmega.preferences.messages import as_message
from rmega.preferences.pairs import IMPLICIT_PROMPT
from rmega.preferences.resolve import resolve
from rmega.preferences.schemas import recognize
from rmega.preferences.scorable import scorable
from rmega.preferences.tokenizer import PairTokenizer
from rmega.preferences.written import value_of

Row = dict[str, Any]
Q, A, B = "Translate 'good morning' [into] {French}: now", 'Bon\njour "x"', "Gute Nacht."
PROMPT, GOOD, BAD = [user(Q)], [assistant(A)], [assistant(B)]


def convert(row: Row) -> Comparison:
    schema = recognize([row])
    assert schema is not None, row
    return schema.convert(row)


def same(row: Row) -> None:
    """The row is the one comparison of this file."""
    found = convert(row)
    assert (found.prompt, found.responses) == (PROMPT, [GOOD, BAD]), found


def call(arguments: Any, **more: Any) -> Row:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments, **more}}


WANTED = [call({"city": "Oslo"})]


@pytest.mark.parametrize(
    "calls",
    [
        [call({"city": "Oslo", "a": None, "b": None})],
        [{"id": None, **call({"city": "Oslo"}, strict=None)}],
        [call('{"city": "Oslo"}')],
        [call('{"city": "Oslo", "a": null}')],
        [call(json.dumps('{"city": "Oslo"}'))],
        [call("{'city': 'Oslo', 'a': None}")],
        json.dumps([call({"city": "Oslo"})]),
        json.dumps([call('{"city": "Oslo"}')]),
        str(np.array([call({"city": "Oslo", "a": None})], dtype=object)),
        call({"city": "Oslo"}),
        [
            {
                "type": "function",
                "function": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}}),
            }
        ],
    ],
)
def test_tool_calls_are_one_conversation_in_every_spelling(calls: Any) -> None:
    message = as_message({"role": "assistant", "content": None, "tool_calls": calls}, "m")
    assert message == {"role": "assistant", "content": "", "tool_calls": WANTED}


def test_other_places_of_tool_calls() -> None:
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert as_message(legacy, "m")["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    flat = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}],
    }
    assert as_message(flat, "m")["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    text = {"role": "assistant", "content": "", "tool_calls": [call("not JSON")]}
    assert as_message(text, "m")["tool_calls"] == [call("not JSON")]
    plain = {"role": "assistant", "content": "x", "tool_calls": [], "name": None, "from": None}
    assert as_message(plain, "m") == assistant("x")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {}, "b": None}}}]
    for given in (tools, json.dumps(tools), [json.dumps(tools[0])], str(tools)):
        row = {"prompt": Q, "chosen": A, "rejected": B, "tools": given}
        assert convert(row).tools == [
            {"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}
        ]


def test_parquet_and_json_give_the_same_conversation(tmp_path: Path) -> None:
    """Parquet gives every tool call the keys of all others."""
    rows = [
        {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call(arguments)]}],
            "rejected": BAD,
        }
        for arguments in ({"city": "Oslo"}, {"a": 1, "b": 2})
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = [
        [convert(row) for _, row, _ in read(tmp_path / name)] for name in ("a.parquet", "a.jsonl")
    ]
    assert found[0] == found[1]
    assert found[0][0].responses[0][0]["tool_calls"] == WANTED


def read(path: Path, **options: Any) -> list[Any]:
    return [
        item
        for source in resolve([str(path)], **options)
        for chunk in sources.read_chunks(source, 0)
        for item in sources.decode(chunk)
    ]


def texts_of(value: list[Row]) -> list[str]:
    """A list as text, in every way that a file has it."""
    array = np.array(value, dtype=object)
    return [json.dumps(value), repr(value), str(array), repr(array), json.dumps(value, indent=1)]


def test_lists_of_messages_written_as_text() -> None:
    for good, bad in zip(texts_of(GOOD), texts_of(BAD), strict=True):
        same({"prompt": Q, "chosen": good, "rejected": bad})
    for good, bad in zip(texts_of(PROMPT + GOOD), texts_of(PROMPT + BAD), strict=True):
        same({"prompt": Q, "chosen": good, "rejected": bad})
        same({"chosen": good, "rejected": bad})
        same({"conversation_a": good, "conversation_b": bad, "winner": "model_a"})
    for prompt in texts_of(PROMPT):
        same({"prompt": prompt, "chosen": A, "rejected": B})
        same({"prompt": prompt, "chosen": GOOD, "rejected": BAD})
        same({"conversations": prompt, "chosen": A, "rejected": B})
    for responses in ([A, B], np.array([A, B], dtype=object)):
        for scores in ([2, 1], np.array([2.0, -1.0])):
            same({"prompt": Q, "responses": str(responses), "scores": str(scores)})
    scored = [{"content": A, "score": 2}, {"content": B, "score": 1}]
    for text in texts_of(scored):
        same({"prompt": Q, "responses": text})


def test_a_list_cut_short_is_refused() -> None:
    row = {"prompt": Q, "chosen": repr(GOOD)[:-9], "rejected": repr(BAD)[:-9]}
    with pytest.raises(Rejected, match="a list written as text that cannot be read"):
        convert(row)
    assert (
        value_of("[1 2 ... 9]") is None
        and value_of("]") is None
        and value_of("['a' 'b']") == ["a", "b"]
    )


@pytest.mark.parametrize(
    "texts",
    [
        ('{"from": "Oslo", "to": "Bergen"}', '{"from": "Rome", "to": "Paris"}'),
        ('[{"from": "Oslo", "value": 3}]', '[{"from": "Rome", "value": 4}]'),
        ('{"role": "admin", "name": "a"}', '{"role": "admin", "name": "b"}'),
        ("[1, 2, 3]", "['a', 'b']"),
        ("[]", "{}"),
        ('{"content": "x"}', '{"content": "y"}'),
    ],
)
def test_answers_that_are_json_are_texts(tmp_path: Path, texts: tuple[str, str]) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "chosen", "rejected"], ["q", *texts]])
    found = convert(read(tmp_path / "a.csv")[0][1])
    assert [r[0]["content"] for r in found.responses] == list(texts)
    labeled = {
        "prompt": "q",
        "response_0": texts[0],
        "response_1": texts[1],
        "better_response_id": "0",
    }
    assert [r[0]["content"] for r in convert(labeled).responses] == list(texts)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PROMPT + GOOD, "rejected_response": B},
        {"messages": PROMPT + GOOD, "rejected_messages": PROMPT + BAD},
        {"messages": PROMPT + GOOD, "rejected_response": BAD},
        {"query": Q, "response": A, "rejected_response": B},
        {"query": Q, "response": A, "rejected_response": B, "history": []},
        {"messages": PROMPT, "chosen": GOOD[0], "rejected": BAD[0]},
        {"input": {"messages": PROMPT}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {
            "input": json.dumps({"messages": PROMPT}),
            "preferred_output": json.dumps(GOOD),
            "non_preferred_output": json.dumps(BAD),
        },
        {"instruction": Q, "generations": [B, A], "ratings": [2, 5], "rationales": ["x", "y"]},
        {"input": Q, "generations": [B, A], "rating": [2, 5]},
        {"prompt": Q, "responses": [B, A], "rewards": [0.1, 0.2]},
        {
            "context": PROMPT,
            "completions": [
                {"rank": 1, "completion": BAD, "reward": None},
                {"rank": 0, "completion": GOOD, "reward": None},
            ],
        },
        {"prompt": Q, "completions": [B, A], "scores": [None, None], "ranks": [2, 1]},
        {"prompt": Q, "responses": [{"content": B}, {"content": A}], "scores": [1, 2]},
        {"prompt": None, "question": Q, "chosen": A, "rejected": B},
        {
            "chosen": [{"role": None, "from": "human", "content": None, "value": Q}, *GOOD],
            "rejected": [*PROMPT, *BAD],
        },
        {
            "prompt": Q,
            "chosen": A,
            "rejected": B,
            "images": [],
            "video": None,
            "audio": {"bytes": None},
        },
    ],
)
def test_other_spellings(row: Row) -> None:
    same(row)


def test_a_system_prompt_tools_and_history_count_in_every_schema() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "system": "s", "tools": "[{}]"}
    assert convert(row).prompt[0] == {"role": "system", "content": "s"}
    assert convert(row).tools == [{}]
    row = {"query": "c", "response": "d", "rejected_response": "e", "history": '[["a", "b"]]'}
    assert convert(row).prompt == [user("a"), assistant("b"), user("c")]
    row = {"instruction": "a", "input": "b", "responses": ["c", "d"], "scores": [1, 0]}
    assert convert(row).prompt == [user("a\nb")]


@pytest.mark.parametrize("missing", [None, "", "N/A", "nan", float("nan")])
def test_one_rating_of_several_is_missing(missing: Any) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [2, 5, missing]}
    inside = {
        "prompt": "p",
        "responses": [
            {"content": t, "score": s} for t, s in zip("abc", row["ratings"], strict=True)
        ],
    }
    for each in (row, inside):
        found = convert(each)
        assert found.scores == [5, 2] and found.left_out == [2] and found.positions == [1, 0]
        assert found.notes == ["a response without a score, left out"]
    with pytest.raises(Rejected, match="score of response 2"):
        convert({"prompt": "p", "responses": ["a", "b"], "ratings": [2, missing]})


def test_one_response_of_several_is_missing() -> None:
    for missing in (None, "", "  "):
        found = convert({"prompt": "p", "responses": [missing, "b", "c"], "ratings": [2, 5, 1]})
        assert [r[0]["content"] for r in found.responses] == ["b", "c"] and found.left_out == [0]
        assert found.notes == ["a response without text, left out"]
        with pytest.raises(Rejected, match="without text"):
            convert({"prompt": "p", "responses": [missing, "b"], "ratings": [2, 5]})


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["a.png"]},
        {"image": {"bytes": b"x", "path": None}},
        {"videos": "a.mp4"},
        {"audio_path": "a.wav"},
        {"chosen_image": "a.png"},
        {"rejected_images": ["a.png"]},
        {"picture_of_it": [{"bytes": b"x"}]},
    ],
)
def test_pictures_are_refused_by_name(more: Row) -> None:
    row = {"prompt": Q, "chosen": A, "rejected": B, **more}
    with pytest.raises(Rejected, match=next(iter(more))) as caught:
        convert(row)
    assert caught.value.reason == "not_text"
    with pytest.raises(Rejected, match=next(iter(more))):
        scorable({"prompt": Q, "response": A, **more})
    with pytest.raises(Rejected, match="images"):
        as_message({"role": "user", "content": "x", "images": ["a.png"]}, "m")


def test_the_border_of_an_implicit_prompt_is_noted() -> None:
    row = {"chosen": "What is 1 + 1? Sure! It is 2.", "rejected": "What is 1 + 1? Sure! It is 3."}
    assert convert(row).notes == [IMPLICIT_PROMPT]
    row = {"prompt": "What?", "chosen": "What? a", "rejected": "What? b"}
    assert convert(row).notes == []
    found = convert({"chosen": "The sky is blue. ", "rejected": "The sky is blue. Really."})
    assert all(r[0]["content"].strip() for r in found.responses)


def templated(small_llama: Path, template: str) -> PairTokenizer:
    return PairTokenizer.load(small_llama, chat_template=template)


CONTENT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
THINKING = "{% for m in messages %}{{ m['content'] }}{{ m.thinking or '' }}{% endfor %}"


def test_fields_without_a_place_in_the_template_are_counted(small_llama: Path) -> None:
    def row(field: str, good: str = A, bad: str = B) -> Row:
        return {
            "prompt": PROMPT,
            "chosen": [{**assistant(good), field: "careful"}],
            "rejected": [{**assistant(bad), field: "a guess"}],
        }

    plain = templated(small_llama, CONTENT)
    for field in ("reasoning_content", "thinking", "reasoning", "name", "tool_call_id"):
        notes = plain.encode_comparison(convert(row(field))).notes
        note = f"message field {field} left out: the chat template has no place for it"
        assert notes == [note, note]
        with pytest.raises(Rejected, match=field) as caught:
            plain.encode_comparison(convert(row(field, "same", "same")))
        assert caught.value.reason == "identical_in_template"
    taking = templated(small_llama, THINKING)
    for field in ("thinking", "reasoning_content", "reasoning"):
        encoded = taking.encode_comparison(convert(row(field, "same", "same")))
        assert encoded.notes == [] and "careful" in taking.tokenizer.decode(encoded.suffixes[0])
    metadata = convert(row("timestamp"))
    assert metadata.notes == ["message field timestamp left out"]
    with pytest.raises(Rejected, match="all responses are the same"):
        convert(row("timestamp", "same", "same"))


def test_what_is_no_preference_has_rewards() -> None:
    """Empty and equal answers, in every spelling."""
    spellings = [
        {"prompt": "Where?", "responses": ["Oslo.", ""]},
        {"prompt": "Where?", "chosen": "Oslo.", "rejected": ""},
        {"prompt": [user("Where?")], "chosen": [assistant("Oslo.")], "rejected": [assistant("")]},
        {"messages": [user("Where?"), assistant("Oslo.")], "rejected_response": ""},
        {"instruction": "Where?", "input": "", "chosen": "Oslo.", "rejected": ""},
        {"conversations": [user("Where?")], "chosen": assistant("Oslo."), "rejected": ""},
        {"prompt": "Where?", "response_0": "Oslo.", "response_1": "", "better_response_id": 0},
    ]
    found = [scorable(row)[0] for row in spellings]
    assert all(f == found[0] for f in found) and found[0][1][-1] == assistant("")
    for row in (
        {"prompt": "Where?", "chosen": "Oslo.", "rejected": "Oslo."},
        {"instruction": "Where?", "input": "", "chosen": "Oslo.", "rejected": "Oslo."},
        {"chosen": "Where? Oslo.", "rejected": "Where? Oslo."},
        {"prompt": "Where?", "responses": [{"content": "Oslo.", "score": 3}] * 2},
        {"prompt": "Where?", "chosen": ["Oslo."], "rejected": ["Oslo."]},
    ):
        first, second = scorable(row)[0]
        assert first == second and first[-1] == assistant("Oslo."), row


# ---- files and folders


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


ROWS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(3)]


def names(folder: Path, **options: Any) -> list[str]:
    found = resolve([str(folder)], **options)
    return [str(Path(s.name).relative_to(folder)) for s in found]


def test_caches_beside_a_saved_set_are_no_data(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name in ("data-00000-of-00001", "cache-1a2b", "other"):
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    notes: list[str] = []
    assert names(tmp_path, note=notes.append) == ["data-00000-of-00001.arrow"]
    assert len(notes) == 1 and "2 hidden, backup or cache files left out" in notes[0]
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="no data file"):
        names(tmp_path)
    (tmp_path / "state.json").unlink()
    assert names(tmp_path) == ["other.arrow"]


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/pairs-checkpoint.jsonl",
        ".git/x.json",
        "__MACOSX/._pairs.jsonl",
        "_delta_log/0000.json",
        "sub/.cache/x.jsonl",
        "backup/pairs.jsonl",
        "old.bak/pairs.jsonl",
        "lost+found/x.jsonl",
        "@eaDir/x.jsonl",
        "~pairs.jsonl",
    ],
)
def test_hidden_and_backup_folders_are_no_data(tmp_path: Path, hidden: str) -> None:
    write(tmp_path / "pairs.jsonl", ROWS)
    write(tmp_path / hidden, ROWS)
    notes: list[str] = []
    assert names(tmp_path, note=notes.append) == ["pairs.jsonl"]
    assert len(notes) == 1 and hidden in notes[0]


def test_splits_by_their_names(tmp_path: Path) -> None:
    files = [f"{n}-00000-of-00001.jsonl" for n in ("train_prefs", "train_sft", "test_prefs")]
    for file in files:
        write(tmp_path / "uf" / file, ROWS)
    assert names(tmp_path / "uf", split="train_prefs") == [files[0]]
    assert names(tmp_path / "uf", split="test") == [files[2]]
    with pytest.raises(ValueError, match="--split train fits several .train_prefs, train_sft."):
        names(tmp_path / "uf", split="train")
    with pytest.raises(
        ValueError, match="holds several splits .test_prefs, train_prefs, train_sft"
    ):
        names(tmp_path / "uf")
    with pytest.raises(ValueError, match="--split dev; its splits are test_prefs, train_prefs"):
        names(tmp_path / "uf", split="dev")
    for file in ("a/train_prefs/0.jsonl", "a/eval/0.jsonl", "a/latest.jsonl"):
        write(tmp_path / file, ROWS)
    assert names(tmp_path / "a", split="validation") == ["eval/0.jsonl"]
    assert names(tmp_path / "a", split="train_prefs") == ["train_prefs/0.jsonl"]
    for file in ("b/x_train.jsonl", "b/y_train-1.jsonl", "b/x_test.jsonl", "b/train_2.jsonl"):
        write(tmp_path / file, ROWS)
    assert names(tmp_path / "b", split="train") == [
        "train_2.jsonl",
        "x_train.jsonl",
        "y_train-1.jsonl",
    ]
    write(tmp_path / "c/pairs.jsonl", ROWS)
    with pytest.raises(ValueError, match="--split train; its files name no split"):
        names(tmp_path / "c", split="train")


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.json.zst"],
)
def test_pointers_are_named(tmp_path: Path, name: str) -> None:
    oid = f"oid sha256:{'a' * 64}\nsize 123\n"
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\n{oid}")
    with pytest.raises(ValueError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        read(tmp_path / name)
    (tmp_path / name).write_text("/annex/objects/SHA256E-s1--0\n")
    with pytest.raises(ValueError, match=f"{name}: a git-annex pointer"):
        read(tmp_path / name)


def outlines() -> dict[str, Any]:
    columns = {k: [r[k] for r in ROWS] for k in ROWS[0]}
    numbered = {k: {str(i): v for i, v in enumerate(c)} for k, c in columns.items()}
    split = {"columns": list(columns), "index": [0, 1, 2], "data": [list(r.values()) for r in ROWS]}
    index = {str(i): row for i, row in enumerate(ROWS)}
    return {
        "list": ROWS,
        "columns": columns,
        "numbered": numbered,
        "split": split,
        "index": index,
        "inside": {"version": 1, "data": ROWS},
    }


@pytest.mark.parametrize("outline", outlines())
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_every_outline_of_json(tmp_path: Path, name: str, indent: int | None, outline: str) -> None:
    (tmp_path / name).write_text(json.dumps(outlines()[outline], indent=indent) + "\n")
    assert [row for _, row, _ in read(tmp_path / name)] == ROWS


def test_one_row_is_not_a_table(tmp_path: Path) -> None:
    for row in (
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": Q, "chosen": [A], "rejected": [B]},
        {"prompt": Q, "responses": [A, B], "scores": [1, 0]},
        {"input": {"messages": PROMPT}, "preferred_output": GOOD, "non_preferred_output": BAD},
    ):
        for name in ("a.jsonl", "a.json"):
            (tmp_path / name).write_text(json.dumps(row))
            assert [r for _, r, _ in read(tmp_path / name)] == [row]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_line_separators_inside_a_value(tmp_path: Path, separator: str) -> None:
    row = {"prompt": f"p{separator}q", "chosen": f"a{separator}", "rejected": "b"}
    escaped = not separator.isprintable() and ord(separator) < 32
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row, ensure_ascii=escaped) + "\n", encoding="utf-8", newline=""
    )
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(row), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerow(row)
    for name in ("a.jsonl", "a.csv"):
        assert [r for _, r, _ in read(tmp_path / name)] == [row], name


def test_columns_of_other_rows_are_absent() -> None:
    """In parquet a row has the columns of every other row, with null."""
    columns = ("prompt", "chosen", "rejected", "responses", "response_0", "better_response_id")
    columns += ("response_1", "preference_strength", "rejected_response", "preferred_output")
    nulls = dict.fromkeys((*columns, "conversations", "messages", "winner", "tools", "images"))
    same({**nulls, "instruction": Q, "output": [A, B]})
    same({**nulls, "prompt": Q, "chosen": A, "rejected": B})
    same({**nulls, "prompt": Q, "responses": [B, A], "scores": [0, 1]})
    same({**nulls, "messages": PROMPT + GOOD, "rejected_response": B})
    same({**nulls, "prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0})
    same({**nulls, "context": PROMPT, "response1": A, "response2": B, "overall_preference": -1})
    assert scorable({**nulls, "prompt": Q, "response": A})[0] == [PROMPT + GOOD]
    assert scorable({**nulls, "messages": PROMPT + GOOD})[0] == [PROMPT + GOOD]


def test_the_winner_is_one_of_two_or_a_tie() -> None:
    row = {"conversation_a": PROMPT + GOOD, "conversation_b": PROMPT + BAD}
    same({**row, "winner": "Model_A"})
    for winner, reason in (("tie (bothbad)", "tie"), ("both_bad", "tie"), ("a", "wrong_type")):
        with pytest.raises(Rejected) as caught:
            convert({**row, "winner": winner})
        assert caught.value.reason == reason
