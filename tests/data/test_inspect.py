"""inspect_data: the numbers are right, the text is decoded, the page stands alone, bad input is
refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmega.cli import run_tool
from rmega.data.indexed import PreferenceDataset, StoredComparison, open_preferences
from rmega.data.pairs import pairs
from rmega.data.stats import describe, lengths_of, show, summarize
from rmega.data.writer import PreferenceWriter
from rmega.preferences.preprocess import PreprocessArgs, preprocess
from rmega.preferences.tokenizer import PairTokenizer
from rmega.report.dataset import write_dataset_report

R = 99


def stored(
    prefix: int, suffixes: list[int], scores: list[float], graded: bool, source: str
) -> StoredComparison:
    return StoredComparison(
        np.ones(prefix, np.int32),
        [np.append(np.ones(n - 1, np.int32), R) for n in suffixes],
        np.array(scores, np.float32),
        graded,
        source,
    )


@pytest.fixture
def dataset(tmp_path: Path) -> PreferenceDataset:
    items = [
        stored(10, [5, 2], [1, 0], False, "a"),
        stored(0, [3, 3], [1, 0], False, "b"),
        stored(4, [1, 9, 2], [5, 3, 3], True, "a"),
    ]
    with PreferenceWriter(tmp_path / "d") as writer:
        for item in items:
            writer.add(item, "ab".index(item.source))
        writer.close(
            {
                "sources": ["a", "b"],
                "vocab_size": 100,
                "reward_token_id": R,
                "scripts": {"Latin": 3},
                "position_heuristic": {"first_wins": 1, "pairs": 2},
                "tokenizer": "<script>alert(1)</script>",
            }
        )
    return open_preferences(tmp_path / "d")


def test_numbers(dataset: PreferenceDataset) -> None:
    summary = summarize(dataset)
    assert (
        summary["comparisons"],
        summary["responses"],
        summary["pairs"],
        summary["tied_pairs"],
    ) == (3, 7, 4, 1)
    assert summary["graded_comparisons"] == 1 and summary["mean_margin"] == pytest.approx(
        (2 + 2) / 4
    )
    assert summary["tokens"] == {
        "stored": 17 + 6 + 16,
        "without_sharing": 15 + 12 + 3 + 3 + 5 + 13 + 6,
        "padded_in_fours": 15 * 7,
    }
    # longer wins: 5 > 2 yes, 3 = 3 half, 1 < 9 no, 1 < 2 no
    assert summary["length_heuristic"]["accuracy"] == pytest.approx(1.5 / 4)
    assert (
        summary["position_heuristic"]["accuracy"] == 0.5
        and summary["position_heuristic"]["pairs"] == 2
    )
    assert summary["sources"] == {
        "a": {"comparisons": 2, "tokens": 33},
        "b": {"comparisons": 1, "tokens": 6},
    }
    assert summary["responses_per_comparison"] == {"2": 2, "3": 1}
    assert summary["prefix_tokens"]["max"] == 10 and summary["suffix_tokens"][
        "mean"
    ] == pytest.approx(25 / 7)
    json.dumps(summary)
    text = "\n".join(describe(summary))
    assert (
        "3 (responses: 2 with 2, 1 with 3)" in text
        and "1 tied pairs give none" in text
        and "Latin 3" in text
    )
    assert "per comparison   13 stored, 19 without the shared prefix, 35 padded in fours" in text


def test_against_one_comparison_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with PreferenceWriter(tmp_path / "d") as writer:
        for _ in range(200):
            k = int(rng.integers(2, 6))
            scores = sorted(rng.integers(0, 4, k).tolist(), reverse=True)
            writer.add(
                stored(
                    int(rng.integers(0, 9)), rng.integers(1, 20, k).tolist(), scores, False, "a"
                ),
                0,
            )
        writer.close({"sources": ["a"]})
    dataset = open_preferences(tmp_path / "d")
    want, wins = [], 0.0
    for i in range(len(dataset)):
        item, first = dataset.get(i), int(dataset.document_indices[i]) + 1
        for a in range(len(item.scores)):
            for b in range(a + 1, len(item.scores)):
                if item.scores[a] > item.scores[b]:
                    want.append((i, first + a, first + b))
                    longer = len(item.suffixes[a]) - len(item.suffixes[b])
                    wins += 0.5 if longer == 0 else float(longer > 0)
    got = [
        triple
        for arrays in pairs(dataset.document_indices, dataset.scores)
        for triple in zip(*(a.tolist() for a in arrays), strict=True)
    ]
    assert sorted(got) == want
    summary = summarize(dataset)
    assert summary["pairs"] == len(want)
    assert summary["length_heuristic"]["accuracy"] == pytest.approx(wins / len(want))
    lengths = lengths_of(dataset)
    items = [dataset.get(i) for i in range(200)]
    assert lengths.conversation.tolist() == [
        len(item.prefix) + len(s) for item in items for s in item.suffixes
    ]


def test_the_page_stands_alone(dataset: PreferenceDataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_dataset_report(tmp_path / "page.html", dataset).read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") == 5
    outside = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert not re.search(r"<script|<link|<img|src=|href=\"[^#]|url\(|@import|https?:", outside)
    assert "&lt;script&gt;alert(1)" in page and "1.500" not in page
    assert "Mean 5, median 5" not in page and "Mean 4.667 (dashed), median 4." in page


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Any:
    """tool(args) -> (exit code, stdout, stderr) of tools/inspect_data.py, in this process."""
    from rmega.cli import parse_args
    from rmega.commands import inspect_data

    def call(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        parsed = parse_args(inspect_data.InspectArgs, [str(a) for a in args])
        code = run_tool(inspect_data.main, parsed)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "page.html"], "--output has no effect on stats, only on report"),
        (["show", "--json"], "--json has no effect on show, only on stats"),
        (["verify", "--color", "never"], "--color has no effect on verify, only on show"),
        (["verify", "--force"], "--force has no effect on verify, only on report"),
        (["--tokenizer", "t"], "--tokenizer has no effect on stats, only on show, verify, report"),
    ],
)
def test_flags_of_another_action(tool: Any, flags: list[str], message: str) -> None:
    code, _, err = tool("prefix", *flags)
    assert code == 2 and message in err


def test_the_tool_on_tokens_of_a_tokenizer(tool: Any, tmp_path: Path, small_llama: Path) -> None:
    bad = "Bad <b>answer</b>."
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Good answer {i}.", "rejected": bad}
        for i in range(30)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prefix = tmp_path / "out"
    preprocess(
        PreprocessArgs(
            input=[str(tmp_path / "d.jsonl")],
            tokenizer=str(small_llama),
            output_prefix=str(prefix),
            workers=1,
            valid_fraction=0.2,
        )
    )
    assert tool(prefix)[0] == 0 and "24 (responses: 24 with 2)" in tool(prefix)[1]
    assert json.loads(tool(prefix, "stats", "--json")[1])["comparisons"] == 24
    tokenizer = PairTokenizer.load(small_llama).tokenizer
    plain = show(open_preferences(prefix), 3, tokenizer)
    code, out, _ = tool(prefix, "show", 3)
    assert (
        code == 0
        and out == "\n".join(plain) + "\n"
        and "Question" in plain[2]
        and plain[-1].endswith("</s>")
    )
    colored = tool(prefix, "show", 3, "--color", "always")[1]
    assert "\x1b[32m" in colored and re.sub(r"\x1b\[\d+m", "", colored) == out
    code, out, _ = tool(prefix, "verify")
    assert code == 0 and "sound (24 comparisons; fingerprint of the tokenizer checked)" in out
    assert tool(prefix, "report")[0] == 0
    page = Path(f"{prefix}.html").read_text()
    assert "Good answer" in page and "Bad &lt;b&gt;answer" in page and "<b>" not in page
    for args, message in (
        (("show", 24), "comparison 24 is out of range: the set has 24"),
        (("show", "x"), "show x: not the number"),
        (("report",), "--output .*html: exists already"),
        (("stats", "x"), "stats: takes no further"),
        (("show", "--tokenizer", "/none"), "--tokenizer /none"),
    ):
        code, _, err = tool(prefix, *args)
        assert code == 2 and re.search(f"error: .*{message}", err), (args, err)
    assert tool(tmp_path / "none")[0] == 2
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.write(b"\xff\xff\xff\x7f")
    code, out, _ = tool(prefix, "verify")
    assert code == 1 and "checksum" in out and "outside the vocabulary" in out
