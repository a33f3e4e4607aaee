"""tools/score.py: every form of row, order, bad rows, interruption, processes; against plain
transformers."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rmega.commands.score import ScoreArgs, main, ranking_text
from rmega.preferences.comparison import Rejected
from rmega.preferences.resolve import resolve
from rmega.preferences.scorable import read_rows, scorable
from rmega.scoring.batch import Output
from rmega.scoring.prefixes import group_by_prefix, parts_of
from tests.conftest import ROOT
from tests.dist import run_distributed
from tests.reward_fixture import Reference, chat, make_reward_model

Q, A, B = "Tell me a story", "Once upon a time there was a cat.", "No."


@pytest.fixture(scope="module")
def model(small_llama, tmp_path_factory) -> Path:
    return make_reward_model(small_llama, tmp_path_factory.mktemp("score") / "model")


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    return Reference(model)


def write(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def run(
    model: Path, tmp_path: Path, rows: list | str, name: str = "out.jsonl", **flags
) -> list[dict]:
    source = rows if isinstance(rows, str) else write(tmp_path / f"{name}.in.jsonl", rows)
    assert (
        main(ScoreArgs(model=str(model), input=(source,), output=str(tmp_path / name), **flags))
        == 0
    )
    return read(tmp_path / name)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- rows

FORMS = [
    ({"messages": chat(Q, A)}, [chat(Q, A)], False),
    ({"conversation": chat(Q, A)}, [chat(Q, A)], False),
    ({"conversations": [chat(Q, A), chat(Q, B)]}, [chat(Q, A), chat(Q, B)], True),
    (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        [chat(Q, A)],
        False,
    ),
    ({"prompt": Q, "response": A}, [chat(Q, A)], False),
    ({"prompt": chat(Q, A)[:1], "completion": chat(Q, A)[1:]}, [chat(Q, A)], False),
    ({"prompt": Q, "responses": [A, B, A]}, [chat(Q, A), chat(Q, B), chat(Q, A)], True),
    ({"prompt": Q, "responses": [A]}, [chat(Q, A)], True),
    (
        {"prompt": Q, "responses": [{"content": B, "score": 1}, {"content": A, "score": 1}]},
        [chat(Q, B), chat(Q, A)],
        True,
    ),
    ({"prompt": Q, "responses": [B, A], "ranks": [2, 1]}, [chat(Q, B), chat(Q, A)], True),
    ({"prompt": Q, "chosen": A, "rejected": B}, [chat(Q, A), chat(Q, B)], True),
    ({"prompt": Q, "chosen": A, "rejected": A}, [chat(Q, A), chat(Q, A)], True),
    ({"chosen": chat(Q, A), "rejected": chat(Q, A)}, [chat(Q, A), chat(Q, A)], True),
    (
        {"prompt": Q, "chosen": [A, B], "rejected": [B + "!"]},
        [chat(Q, A), chat(Q, B), chat(Q, B + "!")],
        True,
    ),
    (
        {"prompt": Q, "response_1": B, "response_2": A, "preference_strength": 0},
        [chat(Q, B), chat(Q, A)],
        True,
    ),
    (
        {"conversation_a": chat(Q, A), "conversation_b": chat(Q, B), "winner": "tie"},
        [chat(Q, A), chat(Q, B)],
        True,
    ),
    ({"instruction": Q, "input": "now", "output": A}, [chat(f"{Q}\nnow", A)], False),
    (
        {
            "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
            "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}",
        },
        [chat(Q, A), chat(Q, B)],
        True,
    ),
    ({"prompt": Q, "response": ""}, [chat(Q, "")], False),
    ({"text": "<s>user: x"}, ["<s>user: x"], False),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(number):
    row, conversations, several = FORMS[number]
    assert scorable(row)[:2] == (conversations, several)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": 1}, "missing_field"),
        ({"messages": chat(Q, A)[:1]}, "no_reply"),
        ({"prompt": Q, "response": 3}, "wrong_type"),
        ({"prompt": Q, "responses": [A, None]}, "wrong_type"),
        ({"prompt": Q, "chosen": A}, "missing_field"),
        ({"messages": [{"role": "pilot", "content": "x"}]}, "unknown_role"),
        ({"response": A}, "missing_field"),
        ({"text": ""}, "empty_response"),
        ({"messages": []}, "missing_field"),
        ({"messages": "hello"}, "wrong_type"),
    ],
)
def test_rows_without_a_conversation(row, reason):
    with pytest.raises(Rejected) as error:
        scorable(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": 3}, "(conversations is int, not a list of messages)"),
        ({"conversations": []}, "is empty"),
        ({"prompt": Q}, "missing: response, or a list of responses"),
        ({"prompt": Q, "chosen": A}, "missing: rejected)"),
    ],
)
def test_what_a_row_lacks_is_named(row, said):
    with pytest.raises(Rejected) as error:
        scorable(row)
    assert said in str(error.value) and len(str(error.value)) < 250


def test_a_system_column_and_tools():
    row = {"system": "Be brief.", "prompt": Q, "response": A, "tools": '[{"name": "f"}]'}
    conversations, _, tools = scorable(row)
    assert conversations == [
        [{"role": "system", "content": "Be brief."}, *chat(Q, A)]
    ] and tools == [{"name": "f"}]


def test_the_schema_is_that_of_the_whole_file(tmp_path):
    """A row whose responses both begin with its prompt is still a row of strings among rows of
    strings."""
    rows = [{"prompt": "To be", "chosen": "To be or not", "rejected": "To be it"}] + [
        {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
    ] * 3
    got = [row for row, _ in read_rows(resolve([write(tmp_path / "a.jsonl", rows)]))]
    assert got[0].conversations == [chat("To be", "To be or not"), chat("To be", "To be it")]


# ---- rewards


def test_every_form_equals_transformers(model, reference, tmp_path):
    rows = [{"id": f"r{i}", **row} for i, (row, _, _) in enumerate(FORMS)]
    lines = run(model, tmp_path, rows, max_tokens=64)  # many packs, groups cut into parts
    for i, (line, (_, conversations, several)) in enumerate(zip(lines, FORMS, strict=True)):
        assert line["index"] == i and line["id"] == f"r{i}"
        rewards = line["rewards"] if several else [line["reward"]]
        # text is taken as a sampler leaves it: the template's new line after the last turn is added
        expected = [reference.reward(c + "\n" if isinstance(c, str) else c) for c in conversations]
        assert rewards == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_rows_of_a_file_in_order_and_for_evaluate(model, reference, tmp_path, preference_files):
    data = preference_files / "messages.jsonl.gz"
    lines = run(model, tmp_path, str(data), limit=40)
    with gzip.open(data, "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 40)]
    for row, line in zip(rows, lines, strict=True):
        expected = [reference.reward(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        assert line["rewards"] == pytest.approx(expected, rel=2e-5, abs=2e-5)
    from rmega.evaluation.scores import read_scores

    assert len(read_scores(tmp_path / "out.jsonl")) == 40


def test_windows_do_not_matter(model, tmp_path, monkeypatch):
    rows = [{"prompt": f"{Q} {i % 3}", "response": f"{A} {i}"} for i in range(30)]
    whole = run(model, tmp_path, rows)
    monkeypatch.setattr("rmega.scoring.batch.WINDOW_ROWS", 4)
    for a, b in zip(whole, run(model, tmp_path, rows, "small.jsonl"), strict=True):
        assert a["index"] == b["index"] and a["reward"] == pytest.approx(
            b["reward"], rel=1e-5, abs=1e-5
        )


def test_best_of(model, reference, tmp_path, capsys):
    rows = [{"id": 7, "prompt": Q, "responses": [A, B, "Yes. " * 30]}, {"prompt": Q, "response": A}]
    lines = run(model, tmp_path, rows, best_of=True, skip_bad=True)
    expected = [reference.reward(chat(Q, r)) for r in rows[0]["responses"]]
    assert lines[0]["order"] == sorted(range(3), key=lambda i: -expected[i])
    assert "one response" in lines[1]["error"]
    capsys.readouterr()
    source = write(tmp_path / "b.jsonl", rows[:1])
    assert main(ScoreArgs(model=str(model), input=(source,), best_of=True)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "row 0 (id 7), best first:"
    assert [int(line.split("response ")[1][0]) - 1 for line in shown[1:4]] == lines[0]["order"]


def test_ranking_text_is_short():
    from rmega.preferences.scorable import ScorableRow

    row = ScorableRow(0, "f:1", conversations=[chat(Q, "word " * 100), "text\nof two lines"])
    text = ranking_text(row, {"rewards": [1.0, 2.0], "order": [1, 0]})
    assert max(map(len, text.splitlines())) < 130 and "text of two lines" in text


# ---- what is wrong

BAD = ['{"prompt": "x"', '{"prompt": "x", "response": 3}', "[1]"]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_ends_the_program(model, tmp_path, bad):
    rows = [{"prompt": Q, "response": A}, bad, {"prompt": Q, "response": B}]
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*--skip-bad"):
        run(model, tmp_path, rows)
    assert not (tmp_path / "out.jsonl").exists() and len(read(tmp_path / "out.jsonl.partial")) == 1


def test_bad_rows_skipped_keep_their_place(model, tmp_path, capsys):
    good = {"prompt": Q, "response": A}
    lines = run(model, tmp_path, [good, *BAD, good], skip_bad=True)
    assert [sorted(line) for line in lines] == [
        ["index", "reward"],
        *[["error", "index"]] * 3,
        ["index", "reward"],
    ]
    assert all(f".jsonl:{line['index'] + 1}: " in line["error"] for line in lines[1:4])
    assert "3 bad rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "/nowhere/at/all"}, "--model /nowhere"),
        ({"input": ("/nowhere.jsonl",)}, "no such file"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"resume": True}, "--resume needs --output"),
        ({"force": True}, "--force needs --output"),
        ({"format": "odd"}, "--format odd"),
        ({"resume": True, "force": True}, "--resume and --force"),
    ],
)
def test_flags(model, tmp_path, flags, message):
    source = write(tmp_path / "a.jsonl", [{"prompt": Q, "response": A}])
    with pytest.raises(ValueError, match=message):
        main(ScoreArgs(**{"model": str(model), "input": (source,), **flags}))


def test_not_a_reward_model(small_llama, tmp_path):
    with pytest.raises(ValueError, match="not a reward model"):
        run(small_llama, tmp_path, [{"prompt": Q, "response": A}])
    assert not list(tmp_path.glob("out*.partial"))


def test_output_is_not_overwritten(model, tmp_path):
    rows = [{"prompt": Q, "response": A}]
    run(model, tmp_path, rows)
    with pytest.raises(ValueError, match="exists already"):
        run(model, tmp_path, rows)
    run(model, tmp_path, rows, force=True)


# ---- interruption


@pytest.mark.parametrize("kept", [0.35, 0.9])
def test_resume_gives_the_same_file(model, tmp_path, monkeypatch, kept):
    rows = [{"id": i, "prompt": f"{Q} {i // 3}", "response": f"{A} {i}"} for i in range(24)]
    rows[10] = "{broken"
    whole = run(model, tmp_path, rows, skip_bad=True)
    text = (tmp_path / "out.jsonl").read_bytes()
    half = text[: int(len(text) * kept)]  # in the middle of a line
    (tmp_path / "out.jsonl").rename(tmp_path / "whole")
    (tmp_path / "out.jsonl.partial").write_bytes(half)
    with pytest.raises(ValueError, match="--resume continues it"):
        run(model, tmp_path, rows, skip_bad=True)
    import rmega.scoring.batch as score_files

    scored = []
    real = score_files.score_rows
    monkeypatch.setattr(
        score_files,
        "score_rows",
        lambda s, r, *a: scored.extend(x.index for x in r) or real(s, r, *a),
    )
    again = run(model, tmp_path, rows, skip_bad=True, resume=True)
    first = half.count(b"\n")
    assert (
        scored[1:] == list(range(first, 24)) and scored[0] < first
    )  # one old row is scored again as a check
    assert [list(line) for line in again] == [list(line) for line in whole]
    rewards = [[line["reward"] for line in lines if "reward" in line] for lines in (again, whole)]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5, abs=1e-5)
    assert again == run(model, tmp_path, rows, skip_bad=True, resume=True)  # nothing left to do


def test_resume_refuses_another_model_or_input(model, tmp_path, small_llama):
    rows = [{"prompt": Q, "response": f"{A} {i}"} for i in range(6)]
    run(model, tmp_path, rows)
    other = make_reward_model(small_llama, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["score.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another --model"):
        run(other, tmp_path, rows, resume=True)
    with pytest.raises(ValueError, match="another"):
        run(model, tmp_path, [{"prompt": "Something else", "response": B}] * 6, resume=True)
    with pytest.raises(ValueError, match="another --input"):
        run(model, tmp_path, rows[:3], resume=True)
    assert len(run(model, tmp_path, [*rows, *rows], resume=True)) == 12  # an input that has grown


def test_resume_refuses_a_foreign_file(model, tmp_path):
    write(tmp_path / "out.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="not a line that this program wrote"):
        run(model, tmp_path, [{"prompt": Q, "response": A}], resume=True)


# ---- processes


def _rank(rank, world_size, model, source, output):
    return main(ScoreArgs(model=model, input=(source,), output=output))


def test_torchrun_gives_the_same(model, tmp_path):
    rows = [{"prompt": f"{Q} {i % 5}", "response": f"{A} {i}"} for i in range(40)]
    one = run(model, tmp_path, rows)
    source = str(tmp_path / "out.jsonl.in.jsonl")
    assert run_distributed(_rank, 2, str(model), source, str(tmp_path / "two.jsonl")) == [0, 0]
    two = read(tmp_path / "two.jsonl")
    assert [line["index"] for line in two] == list(range(40))
    expected = [line["reward"] for line in one]
    assert [line["reward"] for line in two] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_stdin_to_stdout_is_quiet(model):
    rows = "".join(json.dumps({"prompt": Q, "response": f"{A} {i}"}) + "\n" for i in range(3))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "score.py"), "--model", str(model)],
        input=rows,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["index"] for line in done.stdout.splitlines()] == [0, 1, 2]
    assert "scored 3 rows (3 responses)" in done.stderr and "no chat template" in done.stderr
    assert "warn" not in done.stderr.lower() and len(done.stderr.splitlines()) < 10, done.stderr


# ---- shared beginnings


def saved(groups, sequences):
    from rmega.preferences.tokenizer import common_prefix_length

    return sum(
        common_prefix_length([sequences[i] for i in g]) * (len(g) - 1) for g in groups if len(g) > 1
    )


def test_groups_save_most_of_all_cuts_of_the_sorted_row():
    rng = np.random.default_rng(0)
    for _ in range(60):
        stems = [rng.integers(0, 3, rng.integers(0, 6)) for _ in range(3)]
        sequences = [
            np.concatenate([stems[rng.integers(3)], rng.integers(0, 3, rng.integers(1, 4))]).astype(
                np.int32
            )
            for _ in range(rng.integers(1, 8))
        ]
        groups = group_by_prefix(sequences, at_least=1)
        assert sorted(i for g in groups for i in g) == list(range(len(sequences)))
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
        best = 0
        for cuts in itertools.product([False, True], repeat=len(sequences) - 1):
            ends = [i + 1 for i, c in enumerate(cuts) if c]
            ways = [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)], strict=True)]
            best = max(best, saved(ways, sequences))
        assert saved(groups, sequences) == best


def test_groups_of_nested_and_of_many_equal_beginnings():
    nested = [
        np.arange(n, dtype=np.int32) for n in range(20, 2020, 2)
    ]  # each begins with the one before
    groups = group_by_prefix(nested)
    assert sorted(i for g in groups for i in g) == list(range(len(nested)))
    equal = [np.array([*range(50), i], dtype=np.int32) for i in range(1000)]
    assert len(group_by_prefix(equal)) == 1
    assert group_by_prefix([]) == []


def test_parts_stay_within_a_pack():
    sequences = [[*range(50), 100 + i, 7] for i in range(100)]
    parts = list(parts_of(sequences, 90))
    assert all(len(p.prefix) + sum(map(len, p.suffixes)) <= 90 for p in parts)
    assert [[*p.prefix, *s] for p in parts for s in p.suffixes] == sequences
    assert [p.ends_item for p in parts] == [False] * (len(parts) - 1) + [True]


def test_a_full_disk_is_named(tmp_path, small_files):
    """The rows that fit stay for --resume."""
    output = Output(str(tmp_path / "out.jsonl"))
    with small_files(), pytest.raises(OSError) as error:
        try:
            output.write('{"index": 0}\n')
            output.write("x" * 2000)
        finally:
            output.close()
    assert error.value.filename == str(tmp_path / "out.jsonl.partial")
    assert (tmp_path / "out.jsonl.partial").read_text().startswith('{"index": 0}\n')
