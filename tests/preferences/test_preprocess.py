"""The whole line from files to a dataset: counts, order, refusals, and ten thousand hostile
inputs."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmega.data.indexed import exists, open_preferences
from rmega.data.integrity import verify
from rmega.data.stats import describe, summarize
from rmega.preferences import dedup, json_files, preprocess, reader, sources, worker
from rmega.preferences.preprocess import PreprocessArgs
from rmega.preferences.resolve import resolve
from rmega.preferences.tokenizer import PairTokenizer
from rmega.preferences.work_folder import WorkFolder
from tests.conftest import ROOT
from tests.made_rows import FILES
from tests.preferences.test_sources import write_all

Row = dict[str, Any]


def rows(num: int, start: int = 0) -> list[Row]:
    return [
        {
            "prompt": f"Tell me a story, number {i}.",
            "chosen": f"Once upon a time there were {i} cats.",
            "rejected": f"No. {i}",
        }
        for i in range(start, start + num)
    ]


def write(path: Path, data: list[Any]) -> Path:
    """JSON lines; bytes are written as they are."""
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in data)
    )
    return path


@pytest.fixture
def run(tmp_path: Path, small_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(files, name, **flags) -> the dataset; a tokenizer is loaded once for a test."""
    loaded: dict[str, PairTokenizer] = {}
    original = PairTokenizer.load

    def load(folder: Any, **settings: Any) -> PairTokenizer:
        key = f"{folder} {settings}"
        if key not in loaded:
            loaded[key] = original(folder, **settings)
        return loaded[key]

    monkeypatch.setattr(PairTokenizer, "load", load)

    def call(files: Any, name: str = "out", **flags: Any) -> Any:
        files = files if isinstance(files, list) else [files]
        flags = {
            "workers": 1,
            "max_length": 512,
            "tokenizer": str(small_llama),
            "output_prefix": str(tmp_path / name),
            **flags,
        }
        preprocess.preprocess(PreprocessArgs(input=[str(f) for f in files], **flags))
        return open_preferences(tmp_path / name)

    return call


def rejected(tmp_path: Path, name: str = "out") -> list[Row]:
    path = tmp_path / f"{name}.rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    return {p.name.removeprefix(name): p.read_bytes() for p in folder.glob(f"{name}.*")}


def test_rows_come_out_in_order(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(50)
    dataset = run(write(tmp_path / "tales.jsonl", data))
    tokenizer = PairTokenizer.load(dataset.manifest["tokenizer"])
    assert len(dataset) == 50 and verify(dataset, tokenizer.tokenizer) == []
    for i, row in enumerate(data):
        item = dataset.get(i)
        for key, suffix in zip(("chosen", "rejected"), item.suffixes, strict=True):
            assert [*item.prefix, *suffix] == tokenizer.encode_conversation(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[key]},
                ]
            )
        assert item.source == "tales" and item.scores.tolist() == [1, 0] and not item.graded
    manifest = dataset.manifest
    assert manifest["input"]["files"][0]["sha256"] == sources.checksum(
        str(tmp_path / "tales.jsonl")
    )
    assert (
        not (tmp_path / "out.partial").exists() and not (tmp_path / "out.rejected.jsonl").exists()
    )
    said = capsys.readouterr().err
    assert (
        "tales.jsonl: strings" in said
        and "Once upon a time there were 0 cats." in said
        and "50 comparisons" in said
    )


def test_any_number_of_workers_writes_the_same_bytes(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 2000)
    data = rows(300) + [b"{broken", {"prompt": "x"}] + rows(5)
    path = write(tmp_path / "d.jsonl", data)
    for workers in (1, 2, 3):
        run(path, f"w{workers}", workers=workers, valid_fraction=0.2)
    first = files_of(tmp_path, "w1")
    assert len(first) == 11 and files_of(tmp_path, "w2") == files_of(tmp_path, "w3") == first


REAL_FILES = {
    "en-dpo-multiturn/dpo_en_demo.json": 300,
    "en-dpo-multiturn/en.pairs.jsonl": 300,
    "gsm8k-solutions/all.ranked.jsonl": 1319,
    "hh-rlhf/harmless-base.test.jsonl.gz": 2312,
    "hh-rlhf/mix.eval.pairs.jsonl.gz": 874,
    "llmbar/eval.pairs.jsonl": 419,
    "qa-feedback/dev.ranked.jsonl": 500,
    "ultrafeedback-cleaned-1k/train.argilla-schema.jsonl.gz": 1000,
    "ultrafeedback-cleaned-1k/train.parquet": 1000,
    "zh-dpo/zh.pairs.jsonl": 766,
    "zh-dpo/dpo_zh_500.jsonl": 500,
    "zh-dpo/dpo_zh_demo.json": 300,
}


def test_every_file_goes_in(
    run: Any, tmp_path: Path, preference_files: Path, internlm2_tokenizer: Path
) -> None:
    counts = {name: count for name, (_, count) in FILES.items()}
    check_counts(run, tmp_path, preference_files, counts, internlm2_tokenizer)


def test_every_real_file_goes_in(
    run: Any, tmp_path: Path, shared_dir: Path, internlm2_tokenizer: Path
) -> None:
    check_counts(run, tmp_path, shared_dir / "data", REAL_FILES, internlm2_tokenizer)


def check_counts(
    run: Any, tmp_path: Path, folder: Path, counts: dict[str, int], tokenizer: Path
) -> None:
    """The counts equal the row counts minus the rows of the rejected file, without --format."""
    dataset = run(
        [folder / name for name in counts],
        keep=["duplicates"],
        workers=2,
        tokenizer=str(tokenizer),
        max_length=2048,
    )
    left_out = rejected(tmp_path)
    assert (
        len(dataset)
        == sum(counts.values()) - len(left_out)
        == dataset.manifest["input"]["rows"] - len(left_out)
    )
    assert verify(dataset) == []
    for name, num in counts.items():
        assert sum(r["file"].endswith(name) for r in left_out) < num


def test_what_is_left_out_is_listed(run: Any, tmp_path: Path) -> None:
    good = rows(60)
    data = [
        *good[:10],
        b'{"prompt": ',
        {"prompt": "a", "chosen": "b"},
        {**good[0], "prompt": "tie?", "rejected": " "},
        good[3],
        {**good[20], "chosen": good[20]["rejected"], "rejected": good[20]["chosen"]},
        b'{"prompt": "\xff"}',
        {**good[1], "chosen": "same", "rejected": "same"},
        *good[10:],
    ]
    dataset = run(write(tmp_path / "d.jsonl", data), max_rejected=0.2)
    listed = [(r["line"], r["reason"]) for r in rejected(tmp_path)]
    assert listed == [
        (11, "broken_row"),
        (12, "missing_field"),
        (13, "empty_response"),
        (14, "duplicate"),
        (15, "contradiction"),
        (16, "not_utf8"),
        (17, "identical_responses"),
        (28, "contradiction"),
    ]
    assert (
        rejected(tmp_path)[0]["file"] == str(tmp_path / "d.jsonl")
        and rejected(tmp_path)[0]["text"] == '{"prompt": '
    )
    assert len(dataset) == len(data) - len(listed)
    assert dataset.manifest["input"]["rejected"] == {
        "broken_row": 1,
        "contradiction": 2,
        "duplicate": 1,
        "empty_response": 1,
        "identical_responses": 1,
        "missing_field": 1,
        "not_utf8": 1,
    }
    assert (
        len(run(tmp_path / "d.jsonl", "kept", max_rejected=0.2, keep=["duplicates"]))
        == len(data) - 5
    )


@pytest.mark.parametrize(
    "policy, reason",
    [("left-prompt", None), ("right", "identical_after_cut"), ("drop", "overlong")],
)
def test_cut_rows_are_kept_or_listed(
    run: Any, tmp_path: Path, preference_files: Path, policy: str, reason: str | None
) -> None:
    """80 conversations that are nearly all too long for 512 tokens of a small vocabulary: none is
    missing unsaid."""
    with gzip.open(preference_files / "argilla.jsonl.gz", "rb") as file:
        data = write(tmp_path / "uf.jsonl", [json.loads(next(file)) for _ in range(80)])
    kept = run(data, overlong=policy)
    listed = tmp_path / "out.rejected.jsonl"
    missing = (
        [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    )
    assert len(kept) + len(missing) == 80 and {m["reason"] for m in missing} == (
        {reason} if reason else set()
    )
    assert kept.manifest["input"]["rejected"] == ({reason: len(missing)} if reason else {})
    assert len({m["line"] for m in missing}) == len(missing)


def test_ranked_rows_with_ties(run: Any, tmp_path: Path) -> None:
    ranked = [
        {
            "prompt": f"p{i}",
            "responses": [
                {"content": f"{c}{i}", "score": s}
                for c, s in zip("abcd", (i % 3, 1, 1, 1), strict=True)
            ],
        }
        for i in range(30)
    ]
    dataset = run(write(tmp_path / "d.jsonl", ranked))  # ten ties are no fault
    assert [r["reason"] for r in rejected(tmp_path)] == ["tie"] * 10 and len(dataset) == 20
    assert dataset.manifest["num_pairs"] == 60 and dataset.get(0).graded
    assert dataset.manifest["position_heuristic"] == {"first_wins": 30, "pairs": 60}


def test_ties_are_kept_where_they_are_asked_for(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": f"question {i}",
            "responses": [
                {"content": f"{c}{i}", "score": s}
                for c, s in zip("abc", (2, 1, 1) if i % 2 else (1, 1), strict=False)
            ],
        }
        for i in range(10)
    ]
    rows.append({**rows[0], "responses": [{"content": "same", "score": 1}] * 2})
    path = write(tmp_path / "d.jsonl", rows)
    kept = run(path, keep=["ties"], max_rejected=0.1)
    assert "10 comparisons, 10 pairs, 10 tied pairs, " in capsys.readouterr().err
    assert [r["reason"] for r in rejected(tmp_path)] == ["identical_responses"]
    assert len(kept) == 10 and kept.manifest["num_pairs"] == 10 and kept.manifest["ties"] == "keep"
    assert "10 tied pairs are kept" in "\n".join(describe(summarize(kept)))
    dropped = run(path, force=True, max_rejected=0.1)
    assert len(dropped) == 5 and "ties" not in dropped.manifest
    assert "5 tied pairs give none" in "\n".join(describe(summarize(dropped)))
    with pytest.raises(ValueError, match="--keep some: unknown; known are duplicates, ties"):
        run(path, force=True, keep=["ties", "some"])


def test_the_missing_column_is_named(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"prompt": f"p {i}", "chosen": "b"} for i in range(2)]
    run(
        write(tmp_path / "d.jsonl", [*rows(10), *bad, {"prompt": "p", "rejected": "b"}]),
        max_rejected=0.5,
    )
    assert (
        "left out: 3 x a column the schema needs is missing or null: rejected 2 x, chosen"
        in capsys.readouterr().err
    )


def test_grouped_rows(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 300)
    data = [
        {"prompt": f"prompt {i // 2}", "response": f"reply {i}", "helpfulness": i % 2}
        for i in range(60)
    ]
    dataset = run(
        write(tmp_path / "d.jsonl", [*data, {"prompt": "alone", "response": "x", "helpfulness": 1}])
    )
    assert len(dataset) == 30 and [r["reason"] for r in rejected(tmp_path)] == ["too_few_responses"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [*rows(10), b'{"prompt": "a', *rows(10, 10)],
            r"d.jsonl:11: not a JSON object.*--max-rejected 0.01",
        ),
        (
            [*rows(10), {"prompt": "a", "chosen": "b"}, *rows(10, 10)],
            r"d.jsonl:11: a column .* missing or null .rejected",
        ),
        (
            [{"prompt": "a", "rejected": "b"}] * 3,
            r"d.jsonl: no known schema has the columns prompt, rejected; nearest is "
            r"strings \(prompt, chosen, rejected .*\); missing: chosen\. ",
        ),
        (
            [{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": None}],
            r"nearest is messages \(.*; missing: rejected \(it is null\)",
        ),
        (
            [{"prompt": "a", "chosen": 3, "rejected": 4}],
            "nearest is messages .*; but chosen is int, not a list of mess",
        ),
        ([{"text": "a"}], "no known schema has the columns text"),
        ([b"{", b"\xff"], r"d.jsonl:1: not a JSON object.*no row of its beginning can be read"),
        ([b"", b" "], "d.jsonl: no rows"),
        (
            [rows(1)[0]] * 2 + [{**rows(1)[0], "chosen": "same", "rejected": "same"}] * 8,
            "10 rows are faulty|of 10 rows",
        ),
    ],
)
def test_bad_rows_stop_the_run(run: Any, tmp_path: Path, data: list[Any], message: str) -> None:
    path = write(tmp_path / "d.jsonl", data)
    with pytest.raises(ValueError, match=message) as caught:
        run(path, max_rejected=0.01)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"d.jsonl", "out.rejected.jsonl"} and not exists(tmp_path / "out")


def test_flags_are_checked(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(5))
    for flags, message in (
        ({"max_length": 1}, "--max-length"),
        ({"overlong": "x"}, "--overlong"),
        ({"format": "x"}, "--format x: unknown"),
        ({"keep": ["x"]}, "--keep x"),
        ({"valid_fraction": 1.0}, "--valid-fraction"),
        ({"max_rejected": -1.0}, "--max-rejected"),
        ({"workers": -1}, "--workers"),
        ({"reward_token": "<none>"}, "--reward-token"),
        ({"map": "x"}, "--map x: expected FILE.py:FUNCTION"),
        ({"map": f"{path}:f"}, "--map"),
        ({"holdout": ["/none.jsonl"]}, "--holdout /none.jsonl"),
        ({"max_length": 4, "overlong": "error"}, "d.jsonl:1: a conversation of"),
    ):
        with pytest.raises(ValueError, match=message):
            run(path, **flags)
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="--input /none.jsonl: no such file"):
        run("/none.jsonl")


def test_an_existing_output_is_refused(run: Any, tmp_path: Path) -> None:
    run(write(tmp_path / "a.jsonl", rows(5)))
    before = files_of(tmp_path, "out")
    with pytest.raises(ValueError, match="--output-prefix .*out: a dataset is there already"):
        run(write(tmp_path / "b.jsonl", rows(9)))
    assert files_of(tmp_path, "out") == before
    with pytest.raises(ValueError, match="no rows"):
        run(write(tmp_path / "c.jsonl", [b""]), force=True)
    assert files_of(tmp_path, "out") == before
    assert len(run(tmp_path / "b.jsonl", force=True)) == 9


def test_validation_split_and_holdout(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{**row, "chosen": f"{row['chosen']} {j}"} for row in rows(100) for j in range(3)]
    path = write(tmp_path / "d.jsonl", data)
    train = run(path, valid_fraction=0.1)
    valid = open_preferences(tmp_path / "out.valid")
    assert len(train) + len(valid) == 300 and len(valid) == 30
    prompts = [{bytes(d.get(i).prefix[:45]) for i in range(len(d))} for d in (train, valid)]
    assert not prompts[0] & prompts[1]
    assert train.manifest["split"]["part"] == "train" and valid.manifest["split"]["part"] == "valid"
    assert verify(train) == verify(valid) == []
    held = write(
        tmp_path / "held.jsonl",
        [*rows(10), {"prompt": rows(1, 10)[0]["prompt"], "chosen": "x"}, *rows(5, 5000)],
    )
    dataset = run(path, "apart", holdout=[str(held)])
    assert dataset.manifest["holdout"] == {"prompts": 11, "comparisons": 33, "held_out_prompts": 16}
    assert (
        "11 of its 16 prompts also occur here; their 33 comparisons are left out"
        in capsys.readouterr().err
    )
    assert len(dataset) == 267 and {r["reason"] for r in rejected(tmp_path, "apart")} == {"holdout"}


def test_sources(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write(tmp_path / "a.jsonl", [{**r, "source": "wiki"} for r in rows(40)])
    b = write(tmp_path / "b.jsonl", rows(40, 40))
    dataset = run([a, b])
    names = [dataset.sources[i] for i in dataset.source_ids]
    assert names == ["wiki"] * 40 + ["b"] * 40 and verify(dataset) == []
    many = write(
        tmp_path / "many.jsonl", [{**r, "source": f"url {i}"} for i, r in enumerate(rows(40))]
    )
    monkeypatch.setattr("rmega.preferences.assemble.MAX_SOURCES", 10)
    assert run([many, b], "few").sources == ["b", "many"]


def test_map(run: Any, tmp_path: Path) -> None:
    (tmp_path / "my_map.py").write_text("""
from rmega.preferences.comparison import Comparison
def f(row):
    n = row["n"]
    if n % 10 == 0: return None
    if n == 11: raise KeyError("oh\\nno")
    if n == 12: return 5
    if n == 13: return {"text": "nothing known"}
    if n % 2: return {"prompt": f"p{n}", "chosen": "a", "rejected": "b"}
    return Comparison(prompt=[{"role": "user", "content": f"p{n}"}], scores=[2.0, 1.0], graded=True,
                      responses=[[{"role": "assistant", "content": t}] for t in "ab"])
""")
    dataset = run(
        write(tmp_path / "d.jsonl", [{"n": n} for n in range(100)]), map=f"{tmp_path}/my_map.py:f"
    )
    reasons = [r["reason"] for r in rejected(tmp_path)]
    assert (
        len(dataset) == 87
        and reasons.count("skipped_by_map") == 10
        and reasons.count("map_failed") == 3
    )
    assert dataset.get(0).source == dataset.get(1).source == "d" and dataset.get(1).graded
    (tmp_path / "bad.py").write_text("1/0")
    for spec, message in (
        (f"{tmp_path}/bad.py:f", "ZeroDivisionError"),
        (f"{tmp_path}/my_map.py:g", "no function g"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "d.jsonl", "x", map=spec)


def test_a_dead_worker_is_reported(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker.Converter, "convert", lambda self, chunk: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(OSError, match="a worker process died"):
        run(write(tmp_path / "d.jsonl", rows(5)), workers=2)


class Noted:
    """Garbage for the collector alone; notes the process that frees it."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self

    def __del__(self) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_free_nothing_of_their_parent(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process group of gloo that waits for the collector: freeing it in a fork, where it has no
    threads, ends the worker."""
    convert = worker.Converter.convert

    def collecting(self: Any, chunk: Any) -> Any:
        gc.collect()
        return convert(self, chunk)

    def started(_: Any) -> None:
        if os.getpid() != parent:
            gc.collect()

    parent = os.getpid()
    multiprocessing.util.register_after_fork(started, started)  # before the worker's own code
    monkeypatch.setattr(worker.Converter, "convert", collecting)
    gc.disable()
    try:
        Noted(tmp_path / "freed")
        run(write(tmp_path / "d.jsonl", rows(50)), workers=2)
    finally:
        gc.enable()
    gc.collect()
    assert set((tmp_path / "freed").read_text().split()) == {str(os.getpid())}


def test_workers_can_be_spawned(run: Any, tmp_path: Path, small_llama: Path) -> None:
    import pickle

    source = resolve([str(write(tmp_path / "d.jsonl", rows(20)))])[0]
    tokenizer = PairTokenizer.load(small_llama, max_length=100)
    here = worker.Converter(tokenizer, [reader.plan_input(source)], None)
    there = pickle.loads(pickle.dumps(here))
    for chunk in sources.read_chunks(source, 0):
        assert there.convert(pickle.loads(pickle.dumps(chunk))) == here.convert(chunk)


def tool(*flags: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess_pref.py", *map(str, flags)],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_the_tool(tmp_path: Path, small_llama: Path) -> None:
    flags = [
        "--tokenizer",
        small_llama,
        "--output-prefix",
        tmp_path / "out",
        "--max-length",
        256,
        "--workers",
        2,
    ]
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows(50))))
    done = tool("--input", path, *flags)
    assert done.returncode == 0 and len(open_preferences(tmp_path / "out")) == 50, done.stderr
    done = tool("--input", path, *flags)
    assert (
        done.returncode == 2
        and "error: --output-prefix" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = tool("--input", tmp_path / "none.jsonl", *flags, "--force")
    assert (
        done.returncode == 2
        and f"error: --input {tmp_path}/none.jsonl: no such file or folder\n" in done.stderr
    )
    assert "Traceback" not in done.stderr


# ---- hostile input


def hostile(rng: np.random.Generator) -> Any:
    """A random value of any type and depth, with texts that hurt."""
    kind = int(rng.integers(0, 12))
    if kind < 4:
        return str(
            rng.choice(
                [
                    "",
                    " ",
                    "text",
                    "a\ud800",
                    "\x00",
                    "<|im_end|>",
                    "</s>",
                    "\n\nHuman: a\n\nAssistant: b",
                    "x" * 3000,
                    "[{",
                    "1e999",
                    "🙂" * 50,
                ]
            )
        )
    if kind < 7:
        return [None, True, float("nan"), -1, 10**30, 1.5, float("inf")][int(rng.integers(0, 7))]
    if kind < 9:
        return [hostile(rng) for _ in range(rng.integers(0, 4))]
    if kind < 11:
        return {
            str(
                rng.choice(["role", "content", "from", "value", "score", "rank", "tool_calls", "x"])
            ): hostile(rng)
            for _ in range(rng.integers(0, 4))
        }
    deep: Any = "x"
    for _ in range(int(rng.integers(1, 200))):
        deep = [deep] if rng.integers(2) else {"content": deep}
    return deep


def templates() -> list[Row]:
    """A good row of every schema, to be spoiled."""
    turn, reply = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    other = [{"role": "assistant", "content": "b"}]
    return [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": turn, "chosen": reply, "rejected": other},
        {
            "chosen": turn + reply,
            "rejected": turn + other,
            "chosen-rating": 1,
            "rejected-rating": 0,
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"instruction": "q", "input": "", "output": ["a", "b"], "history": []},
        {"prompt": "q", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 0}]},
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1},
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
        {"prompt": "q", "response": "a", "helpfulness": 1},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"conversation_a": turn + reply, "conversation_b": turn + other, "winner": "model_a"},
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"question": "q", "response_A": "a", "response_B": "b", "label": "A>B"},
    ]


def spoil(row: Row, rng: np.random.Generator) -> Row:
    row = json.loads(json.dumps(row))
    for _ in range(int(rng.integers(1, 4))):
        key = str(rng.choice([*row, "prompt", "tools", "system", "margin", "source"]))
        where: Any = row
        while isinstance(
            where.get(key) if isinstance(where, dict) else None, dict
        ) and rng.integers(2):
            where = where[key]
            key = str(rng.choice([*where, "role"]))
        if rng.integers(4):
            where[key] = hostile(rng)
        else:
            where.pop(key, None)
    return row


def test_hostile_rows(run: Any, tmp_path: Path) -> None:
    """8,000 spoiled rows of all schemas: each is kept or listed, none is lost, nothing raises."""
    rng = np.random.default_rng(0)
    for number, template in enumerate(templates()):
        good = [template] * 40
        if "helpfulness" in template:  # two rows to a comparison
            good = [
                {**template, "prompt": f"q{i // 2}", "response": f"a{i}", "helpfulness": i % 2}
                for i in range(40)
            ]
        lines = [json.dumps(row) for row in good] + [
            json.dumps(spoil(template, rng)) for _ in range(620)
        ]
        raw = [line.encode("utf-8", "surrogatepass") for line in lines]
        for i in rng.choice(
            np.arange(50, 660), 60, replace=False
        ).tolist():  # and bytes that are no text
            at = int(rng.integers(0, len(raw[i])))
            raw[i] = [
                raw[i][:at],
                raw[i][:at] + rng.bytes(3) + raw[i][at:],
                raw[i].replace(b'"', b"", 1),
            ][i % 3].replace(b"\n", b"")
        path = write(tmp_path / f"{number}.jsonl", [line or b"0" for line in raw])
        dataset = run(path, str(number), max_rejected=1.0, keep=["duplicates"])
        listed = rejected(tmp_path, str(number))
        read = dataset.manifest["input"]["rows"]
        assert len(dataset) + len(listed) == read
        if "helpfulness" not in template:  # whose rows are grouped
            assert read == len(raw) and len({r["line"] for r in listed}) == len(listed)
        assert verify(dataset) == []


def test_hostile_files(tmp_path: Path, small_llama: Path) -> None:
    """3,000 damaged files of all kinds: each is read to its end or refused in one line."""
    rng = np.random.default_rng(1)
    (tmp_path / "good").mkdir()
    tokenizer = PairTokenizer.load(small_llama, max_length=64)
    good = {p: p.read_bytes() for p in write_all(tmp_path / "good", rows(25))}
    for number in range(3000):
        path = list(good)[number % len(good)]
        data = bytearray(good[path][: int(rng.integers(20, 4000))])
        for _ in range(int(rng.integers(0, 4))):
            at = int(rng.integers(0, len(data)))
            data[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 4)))
        if number % 7 == 0:
            data = bytearray(rng.bytes(int(rng.integers(1, 400))))
        target = tmp_path / f"x{path.name}"
        target.write_bytes(data)
        with contextlib.suppress(ValueError):  # with its one line
            try:
                source = resolve([str(target)])[0]
                plan = reader.plan_input(source)
                converter = worker.Converter(tokenizer, [plan], None)
                for chunk in sources.read_chunks(source, 0):
                    result = converter.convert(chunk)
                    documents = len(result.documents) // dedup.DOCUMENT.itemsize
                    assert documents + len(result.rejected) == result.num_rows
            except ValueError as error:
                assert "\n" not in str(error) and path.name in str(error), error
                raise


def test_nothing_is_left_of_an_interrupted_run(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.jsonl", rows(20))

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]
    monkeypatch.undo()
    (tmp_path / "out.partial").mkdir()  # as a run that was killed leaves it
    (tmp_path / "out.partial" / "tokens").write_bytes(b"12345")
    assert len(run(path)) == 20 and not (tmp_path / "out.partial").exists()


def test_the_work_folder_is_shared_with_nobody(run: Any, tmp_path: Path) -> None:
    """Neither files of the user nor those of another process that writes the same prefix are
    overwritten or removed."""
    path, partial = write(tmp_path / "d.jsonl", rows(20)), tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"--output-prefix .*out\.partial.* mine\.txt"):
        run(path)
    assert (partial / "mine.txt").read_text() == "keep"
    (partial / "mine.txt").unlink()
    with (
        WorkFolder(str(tmp_path / "out"), []),
        pytest.raises(ValueError, match="another process is writing it"),
    ):
        run(path)
    assert len(run(path)) == 20


@pytest.mark.parametrize("moment", ["announce", "_convert_all"])
@pytest.mark.parametrize("output", ["out", "out.valid"])
def test_what_came_there_meanwhile_stays(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, output: str
) -> None:
    """Nothing was there at the start: of two processes that began together the second is refused,
    as if it began now. ``_convert_all``: a dataset that was copied."""
    path = write(tmp_path / "d.jsonl", rows(40))
    first = run(write(tmp_path / "e.jsonl", rows(30)), "elsewhere")
    original = getattr(preprocess, moment)

    def meanwhile(*args: Any) -> Any:
        result = original(*args)
        for file in tmp_path.glob("elsewhere.*"):
            shutil.copy(file, tmp_path / f"{output}{file.name.removeprefix('elsewhere')}")
        return result

    monkeypatch.setattr(preprocess, moment, meanwhile)
    with pytest.raises(ValueError, match=rf"a dataset is there already \(.*/{output}\.\*\)"):
        run(path, valid_fraction=0.5)
    assert len(open_preferences(tmp_path / output)) == len(first) == 30
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.partial"))


def test_the_validation_part_is_not_shared_either(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(20))
    with (
        WorkFolder(str(tmp_path / "out.valid"), []),
        pytest.raises(ValueError, match="another process is writing it"),
    ):
        run(path, valid_fraction=0.5)


def test_a_full_disk_is_named_and_nothing_stays(run: Any, tmp_path: Path, small_files: Any) -> None:
    path = write(tmp_path / "d.jsonl", rows(400))
    with small_files(), pytest.raises(OSError) as error:
        run(path)
    assert error.value.filename == str(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_names_that_are_no_text_are_refused_at_the_start(run: Any, tmp_path: Path) -> None:
    """The manifest, which is written last, could not record them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xffc"))
    folder.mkdir()
    path = write(folder / "d.jsonl", rows(20))
    for files in ([path], [folder], [tmp_path / "*" / "d.jsonl"]):
        with pytest.raises(ValueError, match="--input .*b.udcffc.*: bytes that are no UTF-8 text"):
            run(files)
    shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="--output-prefix .*: bytes that are no UTF-8 text"):
        run(tmp_path / "d.jsonl", "b\udcffc/out")


def test_a_split_needs_a_folder(run: Any, tmp_path: Path) -> None:
    """One of --input or of --holdout."""
    path, held_out = write(tmp_path / "d.jsonl", rows(20)), tmp_path / "h" / "test.jsonl"
    for files in ([path], [f"{tmp_path}/*.jsonl"]):
        with pytest.raises(ValueError, match="--split test has no effect on .*jsonl"):
            run(files, split="test")
    held_out.parent.mkdir()
    write(held_out, rows(5))
    assert len(run(path, split="test", holdout=[str(held_out.parent)])) == 15


@pytest.mark.parametrize("prefix", ["", ".", "data/", "data/.."])
def test_a_prefix_has_a_name(prefix: str) -> None:
    with pytest.raises(ValueError, match="--output-prefix .*is a folder"):
        preprocess.preprocess(
            PreprocessArgs(input=["d.jsonl"], tokenizer="t", output_prefix=prefix)
        )


def test_at_most_sixteen_flags() -> None:
    assert len(PreprocessArgs.__dataclass_fields__) <= 16


def test_workers_end_on_sigterm_whatever_their_parent_does(tmp_path: Path) -> None:
    """Else a pool that loses a worker waits forever, from Python 3.12 on."""
    code = (
        "import signal, sys\n"
        "from rmega.preferences import preprocess as p\n"
        "p._CONVERTER = None\n"
        "class Ask:\n"
        "    def convert(self, chunk):\n"
        "        return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]\n"
        "signal.signal(signal.SIGTERM, lambda *a: None)\n"
        "if __name__ == '__main__':\n"
        "    found = [r for _, r in p._results(Ask(), iter([1, 2]), 2)]\n"
        "    wanted = [signal.SIG_DFL, signal.SIG_IGN]\n"
        "    assert found == [wanted, wanted], found\n"
    )
    (tmp_path / "ask.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_close_scores_are_not_ties(run: Any, tmp_path: Path) -> None:
    """Ratings that fp32 cannot tell apart are preferences; such that it cannot hold have no
    margin."""
    data = [
        {"prompt": f"p{i}", "responses": ["a", "b"], "scores": [100000000 + i, 100000001 + i]}
        for i in range(10)
    ]
    wide = {"prompt": "wide", "responses": ["a", "b"], "scores": [1e39, -1e39]}
    dataset = run(write(tmp_path / "d.jsonl", [*data, wide]))
    assert len(dataset) == dataset.manifest["num_pairs"] == 11 and verify(dataset) == []
    assert dataset.get(3).graded and not dataset.get(10).graded
    assert dataset.get(3).scores.tolist() == [100000004, 100000003]
    note = "ratings too far apart for a margin: their order counts"
    assert dataset.manifest["input"]["notes"] == {note: 1}


def test_a_guessed_prompt_and_unused_columns_are_said(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        {"chosen": f"What is {i}? It is 1.", "rejected": f"What is {i}? It is 2."} for i in "abc"
    ]
    path = write(tmp_path / "d.jsonl", data)
    run(path)
    assert "warning: where the prompt ends is a guess" in capsys.readouterr().err
    run(path, "named", format="strings-with-prompt")
    assert "warning" not in capsys.readouterr().err
    extra = [{**r, "context": "a document", "id": i, "empty": None} for i, r in enumerate(rows(5))]
    run(write(tmp_path / "e.jsonl", extra), "extra")
    assert "columns not used: context, id\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--format: the schema of what --map returns"):
        run(path, "both", format="strings", map="x.py:f")
