"""Evaluation from files: rows, scores in every form, the length heuristic that must be seen
through, probes."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rmega.commands.evaluate import EvaluateArgs, main
from rmega.evaluation.findings import length_flag
from rmega.evaluation.probes import pick, probe_texts
from rmega.evaluation.results import ScoredComparison
from rmega.evaluation.rows import read_eval_set, scored
from rmega.evaluation.scores import match_scores, read_scores
from rmega.preferences.comparison import Comparison
from rmega.preferences.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "data" / "demo.valid.jsonl"


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def evaluate(tmp_path: Path, **args) -> dict:
    main(EvaluateArgs(json=str(tmp_path / "out.json"), **args))
    return json.loads((tmp_path / "out.json").read_text())["sets"]


def pair(chosen: str, rejected: str, **more) -> dict:
    return {"prompt": "Q?", "chosen": chosen, "rejected": rejected, **more}


# ---- the acceptance: a length heuristic on LLMBar


def length_rows(rows):
    return [
        {
            "id": r["id"],
            "scores": [len(r["chosen"][-1]["content"]), len(r["rejected"][-1]["content"])],
        }
        for r in rows
    ]


def test_llmbar_length_heuristic(tmp_path, shared_dir, capsys):
    """The published figure: longer responses win 27.2 % of LLMBar's pairs."""
    data = shared_dir / "data" / "llmbar" / "eval.pairs.jsonl"
    check_length_heuristic(tmp_path, data, capsys, 0.272, "(0.232 to 0.317)", 419)


def test_length_heuristic(tmp_path, preference_files, capsys):
    data = preference_files / "longer_is_worse.jsonl"
    check_length_heuristic(tmp_path, data, capsys, 0.270, "(0.193 to 0.364)", 100)


def check_length_heuristic(tmp_path, data, capsys, accuracy, interval, pairs):
    """Scores that are lengths, on pairs whose longer response is usually the worse one."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    scores = write(tmp_path / "s.jsonl", length_rows(rows))
    got = evaluate(tmp_path, data=[str(data)], scores=[scores])[data.stem]
    assert round(got["accuracy"], 3) == accuracy and got["num_pairs"] == pairs
    assert (
        round(got["length"]["always_longer"], 3) == accuracy
        and length_flag(got["length"]) == "strong"
    )
    assert {v["about"]: v["level"] for v in got["findings"]} | {
        "accuracy": "bad",
        "length": "bad",
    } == {v["about"]: v["level"] for v in got["findings"]}
    printed = capsys.readouterr().out
    assert (
        f"{accuracy:.3f}  {interval}" in printed
        and "Strong length bias, towards longer responses" in printed
    )

    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    other = write(tmp_path / "swapped.jsonl", swapped)
    got = evaluate(
        tmp_path, data=[other], scores=[write(tmp_path / "t.jsonl", length_rows(swapped))]
    )["swapped"]
    assert round(got["accuracy"], 3) == 1 - accuracy and length_flag(got["length"]) == "strong"
    assert round(got["swap"]["accuracy"], 3) == accuracy


def test_works_without_torch_transformers_matplotlib(tmp_path):
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    scores = write(tmp_path / "s.jsonl", [{"scores": [1, 0]} for _ in rows])
    code = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers', 'megatron', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Block())\n"
        "runpy.run_path('tools/evaluate.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--data", str(DEMO), "--scores", scores],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "100.0 % of 112 pairs" in done.stdout
    done = subprocess.run(
        [sys.executable, "tools/evaluate.py", "--data", str(DEMO)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: give either --model or --scores\n")


# ---- scores files

COLUMNS = {
    "model": "m",
    "id": ["a", "b"],
    "subset": ["x", "x"],
    "scores_chosen": [1, [0.5]],
    "scores_rejected": [[0], 2],
}


@pytest.mark.parametrize(
    "name, text",
    [
        ("lists.jsonl", '{"scores": [1, 0]}\n\n{"scores": [0.5, 2]}\n'),
        ("bare.jsonl", "[1, 0]\n[0.5, 2]\n"),
        ("rewards.json", '[{"rewards": [1, 0]}, {"rewards": [0.5, 2]}]'),
        ("pairs.jsonl", '{"chosen": 1, "rejected": 0}\n{"chosen": 0.5, "rejected": 2}\n'),
        (
            "rmbench.json",
            (
                '[{"score_chosen": [1], "score_rejected": [0]}, {"score_chosen": [0.5],'
                ' "score_rejected": [2]}]'
            ),
        ),
        (
            "text.jsonl",
            (
                '{"chosen": "t", "rejected": "u", "chosen_score": 1, "rejected_score": 0}\n'
                '{"chosen": "t", "rejected": "u", "chosen_score": 0.5, "rejected_score": 2}\n'
            ),
        ),
        ("rewardbench.json", json.dumps(COLUMNS, indent=4)),
        ("wrapped.json", json.dumps({"results": COLUMNS})),
        ("named.csv", "id,chosen,rejected\na,1,0\nb,0.5,2\n"),
        ("turned.csv", "rejected,chosen\n0,1\n2,0.5\n"),
        ("plain.tsv", "1\t0\n0.5\t2\n"),
        ("plain.txt", "# comment\n1 0\n0.5 2\n"),
    ],
)
def test_scores_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = read_scores(tmp_path / name)
    assert [r.scores.tolist() for r in rows] == [[1, 0], [0.5, 2]]
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(text)
    assert [r.scores.tolist() for r in read_scores(tmp_path / f"{name}.gz")] == [[1, 0], [0.5, 2]]


SEPARATORS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_separators_inside_a_value(tmp_path, separator, ending):
    """CSV allows any of them in a quoted cell; JSON allows raw all but control characters."""
    rows = [["id", "chosen", "rejected", "comment"]]
    rows += [[f"r{i}", str(1.5 + i), "0.5", f"two{separator}lines"] for i in range(3)]
    with open(tmp_path / "s.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows(rows)
    got = read_scores(tmp_path / "s.csv")
    assert [(r.id, r.scores.tolist()) for r in got] == [(f"r{i}", [1.5 + i, 0.5]) for i in range(3)]
    line = 4 if separator in SEPARATORS[:3] else 3  # those of them that end a line of the file
    assert got[1].where.endswith(f"s.csv:{line}")
    lines = [{"id": f"r{i}", "scores": [i, 0], "comment": f"two{separator}lines"} for i in range(3)]
    text = "".join(json.dumps(line, ensure_ascii=False) + ending for line in lines)
    (tmp_path / "s.jsonl").write_bytes(text.encode())
    got = read_scores(tmp_path / "s.jsonl")
    assert [(r.id, r.scores.tolist(), r.where[-2:]) for r in got] == [
        (f"r{i}", [i, 0], f":{i + 1}") for i in range(3)
    ]


def test_a_quote_that_is_never_closed_names_its_line(tmp_path):
    (tmp_path / "s.csv").write_text('id,chosen,rejected,note\na,1,0,x\nb,1,0,"open\nc,1,0,y\n')
    with pytest.raises(ValueError, match=r"s\.csv:3: "):
        read_scores(tmp_path / "s.csv")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("# only\n# comments\n", "no rows"),
        ('{"scores": [1, NaN]}\n', r"s:1.*not a finite number"),
        ('{"scores": ["1"]}\n', "not a finite"),
        ('{"scores": [1, 0]}\n{"foo": 1}\n', r"s:2.*found foo"),
        ('{"scores": [1, 0]}\n{"sco\n', r"s:2: not JSON"),
        ("1,0\nx,1\n", r"s:2: not numbers"),
        ("a,b\n1\n", r"s:2: 1 cells, but 2 names"),
        ('{"id": ["a"], "scores_chosen": [1, 2], "scores_rejected": [1, 2]}', "different lengths"),
        ("1,inf\n", "not a finite"),
        ('{"scores": [true, 0]}\n', "not a finite"),
        ("[[1, 0], 3]", "neither an object"),
    ],
)
def test_scores_errors(tmp_path, text, message):
    (tmp_path / "s").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "s")


def test_match_by_id_or_order(tmp_path):
    rows = read_scores(
        write(tmp_path / "s", [{"id": "b", "scores": [1]}, {"id": "a", "scores": [2]}])
    )
    assert [r.id for r in match_scores(rows, ["a", "b"], "d")] == ["a", "b"]
    with pytest.raises(ValueError, match="no scores for 1 of 2 rows of d, the first: id 'c'"):
        match_scores(rows, ["a", "c"], "d")
    with pytest.raises(ValueError, match="2 rows of scores for 3 rows of d"):
        match_scores(rows, [None, None, None], "d")
    with pytest.raises(ValueError, match=r"s:1: id 'b' where d has 'a'"):
        match_scores(rows, ["a", None], "d")
    assert match_scores(rows, [None, None], "d") == rows


def test_rows_left_out_keep_their_scores_apart(tmp_path, capsys):
    data = write(
        tmp_path / "d.jsonl",
        [pair("good", "bad"), pair("same", "same"), pair("", "x"), pair("yes", "no")],
    )
    scores = write(tmp_path / "s.jsonl", [{"scores": s} for s in ([2, 1], [], [9, 9], [0, 5])])
    got = evaluate(tmp_path, data=[data], scores=[scores])["d"]
    assert got["num_pairs"] == 2 and got["accuracy"] == 0.5 and got["mean_margin"] == -2
    assert got["left_out"] == {"identical_responses": 1, "empty_response": 1}
    assert (
        "left out: 1 a response without text, 1 all responses are the same"
        in capsys.readouterr().out
    )


def test_scores_follow_the_row_not_the_ranking(tmp_path):
    rows = [
        {
            "prompt": "Q?",
            "responses": [
                {"content": "a", "score": 1},
                {"content": "b", "score": 3},
                {"content": "c", "score": 2},
            ],
        }
    ]
    data = write(tmp_path / "d.jsonl", rows)
    saved = tmp_path / "saved"
    got = evaluate(
        tmp_path,
        data=[data],
        scores=[write(tmp_path / "s", [{"scores": [1, 3, 2]}])],
        save_scores=str(saved),
    )["d"]
    assert (
        got["accuracy"] == 1.0
        and got["ranked"]["kendall_tau_b"] == 1.0
        and got["by_margin"][0]["low"] == 1
    )
    assert json.loads((saved / "d.scores.jsonl").read_text()) == {"scores": [1, 3, 2]}
    again = evaluate(tmp_path, data=[data], scores=[str(saved / "d.scores.jsonl")])["d"]
    assert again == got
    with pytest.raises(ValueError, match=r"s:1: 2 scores for the 3 responses of .*d.jsonl:1"):
        evaluate(tmp_path, data=[data], scores=[write(tmp_path / "s", [{"scores": [1, 3]}])])


def test_benchmark_files(tmp_path):
    rm = [
        {
            "id": str(i),
            "prompt": "Q?",
            "chosen": ["a", "aa", "aaa"],
            "rejected": ["b", "bb", "bbb"],
            "domain": "chat",
        }
        for i in range(3)
    ]
    scores = [
        {"id": str(i), "score_chosen": [0.1, 1.1, 2.1], "score_rejected": [0, 1, 2]}
        for i in range(3)
    ]
    (tmp_path / "total.json").write_text(json.dumps(rm))
    (tmp_path / "s.json").write_text(json.dumps(scores))
    got = evaluate(
        tmp_path, data=[str(tmp_path / "total.json")], scores=[str(tmp_path / "s.json")]
    )["total"]
    assert {k: got["rm_bench"][k] for k in ("easy", "normal", "hard")} == {
        "easy": 1,
        "normal": 1,
        "hard": 0,
    }
    assert got["num_pairs"] == 27 and got["effective_pairs"] == 3

    del rm[0]["domain"]  # the file of one domain names it in its own name only
    for i, name in enumerate(("safety-refuse_filtered", "safety-response_filtered", "other")):
        rows = [{**row, "domain": None, "subset": f"part {i}"} for row in rm[: 3 - i]]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        (tmp_path / "some.json").write_text(json.dumps(scores[: 3 - i]))
        got = evaluate(
            tmp_path, data=[str(tmp_path / f"{name}.json")], scores=[str(tmp_path / "some.json")]
        )[name]
        known = name != "other"
        assert (got["rm_bench"] is not None) == known
        assert not known or got["rm_bench"]["domains"]["safety"]["num_prompts"] == 3 - i
    (tmp_path / "total.json").write_text(
        json.dumps([{**row, "domain": "code", "subset": "x", "source": "y"} for row in rm])
    )
    got = evaluate(
        tmp_path, data=[str(tmp_path / "total.json")], scores=[str(tmp_path / "s.json")]
    )["total"]
    assert list(got["rm_bench"]["domains"]) == ["code"]

    bench = [
        pair(f"yes {i}", "no", subset="hep-go" if i else "math-prm", id=str(i)) for i in range(2)
    ]
    data = write(tmp_path / "filtered.jsonl", bench)
    published = {
        "model": "m",
        "id": ["0", "1"],
        "subset": ["math-prm", "hep-go"],
        "scores_chosen": [1, 1],
        "scores_rejected": [0, 2],
    }
    (tmp_path / "m.json").write_text(json.dumps(published, indent=4))
    got = evaluate(tmp_path, data=[data], scores=[str(tmp_path / "m.json")])["filtered"]
    assert (
        got["by_source"]["hep-go"]["accuracy"] == 0
        and got["reward_bench"]["sections"]["Reasoning"] is None
    )
    assert "hep-cpp" in got["reward_bench"]["missing"]


def test_reward_bench_2_file(tmp_path, capsys):
    """Rows of its schema, with the scores file its own program writes: six subsets, Ties by its own
    rule."""

    def row(id_, subset, right, wrong):
        return {
            "id": id_,
            "subset": subset,
            "prompt": "Q?",
            "chosen": [f"r{i}" for i in range(right)],
            "rejected": [f"w{i}" for i in range(wrong)],
            "num_correct": right,
            "num_incorrect": wrong,
            "total_completions": right + wrong,
        }

    rows = [
        row("0", "Factuality", 1, 3),
        row("1", "Precise IF", 1, 3),
        row("2", "Math", 1, 3),
        row("3", "Safety", 1, 3),
        row("4", "Focus", 1, 3),
        row("ref:7", "Ties", 1, 2),
        row("tied:7", "Ties", 2, 2),
    ]
    data = write(tmp_path / "rb2.jsonl", rows)
    scores = [[[4.0], [1.0], [2.0], [3.0]]] * 5 + [
        [[2.0], [1.0], [0.0]],
        [[3.0], [2.5], [1.0], [0.0]],
    ]
    published = {
        "model": "m",
        "id": [r["id"] for r in rows],
        "scores": scores,
        "subset": [r["subset"] for r in rows],
    }
    (tmp_path / "m.json").write_text(json.dumps(published, indent=4))
    got = evaluate(tmp_path, data=[data], scores=[str(tmp_path / "m.json")])["rb2"]
    assert got["rm_bench"] is None and got["reward_bench"] is None
    b = got["reward_bench_2"]
    assert list(b["subsets"].values())[:5] == [1.0] * 5 and b["missing"] == []
    want = 1.0 + 0.01 * np.tanh(1 / 0.5 - 1)  # gaps 1.5 and 1, spread 0.5
    assert b["subsets"]["Ties"] == pytest.approx(want) and b["overall"] == pytest.approx(
        (5 + want) / 6
    )
    printed = capsys.readouterr().out
    assert "RewardBench 2" in printed and f"{want:.3f}" in printed
    flat = [[s[0] for s in values] for values in scores]
    (tmp_path / "lists.json").write_text(json.dumps({"scores": flat}))
    assert [r.scores.tolist() for r in read_scores(tmp_path / "lists.json")] == flat
    with pytest.raises(ValueError, match="different lengths: 7 scores, 1 id"):
        (tmp_path / "bad.json").write_text(json.dumps({"scores": flat, "id": ["0"]}))
        read_scores(tmp_path / "bad.json")


def test_several_files_and_flags(tmp_path):
    a, b = (
        write(tmp_path / f"{n}.jsonl", [pair("long answer", "no"), pair("y", "nope")]) for n in "ab"
    )
    s = write(tmp_path / "s.jsonl", [{"scores": [1, 0]}, {"scores": [1, 1]}])
    got = evaluate(tmp_path, data=[a, b], scores=[s, s])
    assert list(got) == ["a", "b", "all files"] and got["all files"]["num_pairs"] == 4
    assert got["a"]["accuracy"] == 0.75 and got["a"]["num_ties"] == 1
    with pytest.raises(ValueError, match="--scores: 1 files for 2 data files"):
        evaluate(tmp_path, data=[a, b], scores=[s])
    with pytest.raises(ValueError, match="--limit 0"):
        evaluate(tmp_path, data=[a], scores=[s], limit=0)
    with pytest.raises(ValueError, match="--data .*no known schema has the columns x;"):
        evaluate(tmp_path, data=[write(tmp_path / "x.jsonl", [{"x": 1}])], scores=[s])
    with pytest.raises(ValueError, match="nothing to evaluate .1 all responses are the same"):
        evaluate(tmp_path, data=[write(tmp_path / "y.jsonl", [pair("a", "a")])], scores=[s])
    first = write(tmp_path / "one.jsonl", [{"scores": [1, 0]}])
    assert evaluate(tmp_path, data=[a], scores=[first], limit=1)["a"]["num_pairs"] == 1


def test_a_file_counts_once(tmp_path):
    """Named twice, also by another path or by a folder around it."""
    (tmp_path / "in").mkdir()
    a = write(tmp_path / "in" / "a.jsonl", [pair("long answer", "no")])
    s = write(tmp_path / "s.jsonl", [{"scores": [1, 0]}])
    (tmp_path / "link.jsonl").symlink_to(a)
    for other in (a, f"{tmp_path}/./in/a.jsonl", tmp_path / "link.jsonl", tmp_path / "in"):
        with pytest.raises(ValueError, match="--data .*: is named twice"):
            evaluate(tmp_path, data=[a, str(other)], scores=[s, s])


@pytest.mark.parametrize("flag", [{"dtype": "bf16"}, {"reward_token": "1"}, {"probes": 4}])
def test_scores_are_not_computed(tmp_path, flag):
    a = write(tmp_path / "a.jsonl", [pair("long answer", "no")])
    s = write(tmp_path / "s.jsonl", [{"scores": [1, 0]}])
    name = next(iter(flag)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--{name} does not go with --scores"):
        evaluate(tmp_path, data=[a], scores=[s], **flag)
    assert evaluate(tmp_path, data=[a], scores=[s], probes=0)["a"]["num_pairs"] == 1


@pytest.mark.parametrize("flag", ["json", "save_scores", "report"])
def test_what_cannot_be_written_is_refused_before_scoring(tmp_path, flag):
    a = write(tmp_path / "a.jsonl", [pair("long answer", "no")])
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}: .*a.jsonl is a file, not"):
        main(EvaluateArgs(data=[a], model="no such model", **{flag: f"{a}/x/out"}))


def test_files_have_no_splits(tmp_path):
    a = write(tmp_path / "a.jsonl", [pair("long answer", "no")])
    s = write(tmp_path / "s.jsonl", [{"scores": [1, 0]}])
    with pytest.raises(ValueError, match="--split test has no effect on .*a.jsonl"):
        evaluate(tmp_path, data=[a], scores=[s], split="test")


def test_sample_and_rest_of_a_file_are_read_once(tmp_path):
    rows = [pair(f"a{i}" * 400, "b", id=str(i)) for i in range(3000)]  # several chunks
    data = read_eval_set(resolve([write(tmp_path / "d.jsonl", rows)], flag="--data")[0])
    assert [r.id for r in data.rows] == [str(i) for i in range(3000)]
    assert data.rows[-1].where.endswith("d.jsonl:3000")


# ---- probes


def items_for(score, count=20) -> list[ScoredComparison]:
    rng = random.Random(0)
    out = []
    for i in range(count):
        texts = ["word " * rng.randint(1, 30) + str(i) for _ in range(2)]
        c = Comparison(
            prompt=[{"role": "user", "content": f"prompt {i}"}],
            scores=[1.0, 0.0],
            responses=[[{"role": "assistant", "content": t}] for t in texts],
        )
        out.append(
            ScoredComparison(
                rewards=np.array(score([c])[0]),
                scores=np.array(c.scores),
                lengths=np.array([1, 1]),
                comparison=c,
            )
        )
    return out


def by_text(comparisons):
    return [
        [len(r[-1]["content"]) + len(c.prompt[0]["content"]) / 100 for r in c.responses]
        for c in comparisons
    ]


def by_place(comparisons):
    return [[float(-i) for i in range(len(c.responses))] for c in comparisons]


def test_probes_pass_an_honest_scorer_and_catch_a_dishonest_one():
    honest = items_for(by_text)
    swap, prompt = probe_texts(honest, by_text).values()
    assert (swap["max_difference"], swap["changed_share"]) == (0.0, 0.0)
    assert prompt["blank_accuracy"] == 0.5 and prompt["shuffled_accuracy"] == prompt["own_accuracy"]
    assert swap["rescored_accuracy"] == pytest.approx(1 - prompt["own_accuracy"])
    cheat = items_for(by_place)
    swap, prompt = probe_texts(cheat, by_place).values()
    assert swap["changed_share"] == 1.0 and prompt["blank_accuracy"] == 1.0


def test_probes_forgive_rounding():
    noise = np.random.default_rng(0)

    def rounded(comparisons):
        return [[r + noise.normal() * 1e-6 for r in rewards] for rewards in by_text(comparisons)]

    items = items_for(rounded)
    swap, prompt = probe_texts(items, rounded).values()
    assert swap["changed_share"] == 0.0 and prompt["blank_accuracy"] == 0.5
    assert len(pick(items, 7)) == 7 and pick(items, 100) == items


def test_model_path(tmp_path, small_llama, capsys):
    """A real folder: rewards equal plain transformers, probes hold, and saved scores give the same
    numbers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(small_llama, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(small_llama).save_pretrained(tmp_path / "rm")
    args = dict(data=[str(DEMO)], limit=12)
    got = evaluate(
        tmp_path, model=str(tmp_path / "rm"), probes=6, save_scores=str(tmp_path / "saved"), **args
    )
    got = got["demo.valid"]
    assert got["swap"]["changed_share"] == 0 and got["swap"]["max_difference"] < 1e-4
    assert got["prompt"]["blank_accuracy"] == 0.5 and got["prompt"]["num_comparisons"] == 6
    again = evaluate(
        tmp_path, scores=[str(tmp_path / "saved" / "demo.valid.scores.jsonl")], **args
    )["demo.valid"]
    assert again["accuracy"] == got["accuracy"] and again["mean_margin"] == got["mean_margin"]
    assert "accuracy, ties half" in capsys.readouterr().out


def test_scored_checks_the_count(tmp_path):
    row = read_eval_set(
        resolve([write(tmp_path / "d.jsonl", [pair("a", "b")])], flag="--data")[0]
    ).rows[0]
    with pytest.raises(ValueError, match="d.jsonl:1: 3 rewards for 2 responses"):
        scored(row, [1, 2, 3], len)


@pytest.mark.parametrize(
    "separator", ["\n", "\r\n", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"]
)
def test_scores_with_line_separators_inside_a_cell(tmp_path: Path, separator: str) -> None:
    import csv

    from rmega.evaluation.scores import read_scores

    with (tmp_path / "s.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "chosen", "rejected", "comment"])
        writer.writerows([f"r{i}", i + 1.5, 0.5, f"two{separator}lines"] for i in range(3))
    rows = [{"id": f"r{i}", "scores": [i + 1.5, 0.5], "c": f"a{separator}b"} for i in range(3)]
    lines = "".join(json.dumps(r, ensure_ascii=separator < " ") + "\n" for r in rows)
    (tmp_path / "s.jsonl").write_text(lines, encoding="utf-8", newline="")
    for name in ("s.csv", "s.jsonl"):
        found = read_scores(tmp_path / name)
        assert [r.scores.tolist() for r in found] == [[i + 1.5, 0.5] for i in range(3)]
        assert [r.id for r in found] == ["r0", "r1", "r2"]
    (tmp_path / "bad.csv").write_text('chosen,rejected\n1,2\n3,"4\n')
    with pytest.raises(ValueError, match="bad.csv:3: "):
        read_scores(tmp_path / "bad.csv")


def test_scores_of_all_responses_where_one_was_left_out(tmp_path: Path) -> None:
    """A row whose third response has no rating: scores of all three, or of the rated two."""
    from rmega.evaluation.rows import read_eval_set, rewards_in_order
    from rmega.evaluation.scores import ScoreRow
    from rmega.preferences.resolve import resolve

    row = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [2, None, 5]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    data = read_eval_set(resolve([str(tmp_path / "d.jsonl")])[0])
    for scores in ([1.0, 9.0, 3.0], [1.0, 3.0]):
        given = ScoreRow(np.array(scores), None, "s:1")
        assert rewards_in_order(data.rows[0], given).tolist() == [3.0, 1.0]
