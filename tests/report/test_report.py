"""The pages: whole, harmless whatever the data says, and the same numbers as the result; curves
of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rmega.evaluation.results import ScoredComparison, evaluate, worst_mistakes
from rmega.preferences.comparison import Comparison
from rmega.report import figures, page
from rmega.report.evaluation import MAX_TEXT, write_evaluation_report
from rmega.report.run_findings import run_findings
from rmega.report.run_metrics import read_metrics, running_median, smoothed
from rmega.report.training import write_run_report

EVIL = (
    "<script>alert('x')</script><img src=http://example.com/a.png onerror=alert(1)> & \"quoted\""
    " \ud800 \x1b[31m $x$ 中文"
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as it matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.refs: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.refs.append(value)
            assert not name.startswith("on"), (tag, name)
        if tag not in ("meta", "br", "img", "link", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def check(path: Path) -> Page:
    """Self-contained, no script, every tag closed, every id once, every reference inside the
    page."""
    text = path.read_text(encoding="utf-8")
    got = Page(text)
    assert got.open == [] and "script" not in got.tags and "img" not in got.tags
    assert len(set(got.ids)) == len(got.ids)
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in got.refs), got.refs
    assert {r[1:] for r in got.refs if r.startswith("#")} <= set(got.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(got.ids)
    assert "default-src 'none'" in text and "http-equiv" in text
    return got


def make_items(count: int = 60, k: int = 2, **more) -> list[ScoredComparison]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        c = Comparison(
            prompt=[{"role": "user", "content": f"{EVIL} {i}"}],
            scores=[float(k - j) for j in range(k)],
            responses=[[{"role": "assistant", "content": f"{EVIL}{'x' * (3000 if i % 2 else 9)}"}]]
            * k,
        )
        out.append(
            ScoredComparison(
                rewards=rng.normal(np.linspace(1, 0, k), 1),
                scores=np.array(c.scores),
                comparison=c,
                lengths=rng.integers(5, 3000, k),
                source=f"{EVIL}{i % 3}",
                where=f"file:{i}",
                **more,
            )
        )
    return out


def render(tmp_path: Path, sets: dict[str, list[ScoredComparison]]) -> Page:
    results = {n: evaluate(items) for n, items in sets.items()}
    path = write_evaluation_report(
        tmp_path / "r", EVIL, results, sets, {n: worst_mistakes(i) for n, i in sets.items()}
    )
    assert path == tmp_path / "r" / "report.html"
    return check(path)


def test_evaluation_page(tmp_path):
    pytest.importorskip("matplotlib")
    items = make_items()
    got = render(tmp_path, {"one": items})
    accuracy = evaluate(items)["accuracy"]
    assert f"{100 * accuracy:.1f} %" in got.text and "worst mistakes" in got.text
    assert got.text.count("alert('x')") > 20 and "中文" in got.text  # shown, as text
    assert f"{len(EVIL) + 3000 - MAX_TEXT:,} more characters" in got.text and "\x1b" not in got.text
    assert got.tags.count("details") == min(20, sum(i.rewards[0] < i.rewards[1] for i in items))
    # drawn twice, the same page
    first = (tmp_path / "r" / "report.html").read_bytes()
    render(tmp_path, {"one": items})
    assert (tmp_path / "r" / "report.html").read_bytes() == first


def test_evaluation_page_of_several_sets(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = make_items(), make_items(30, 4, graded=True)
    got = render(tmp_path, {"a": a, "b": b, "all files": a + b})
    assert got.tags.count("svg") == 6 + 7 + 7 and "Accuracy by margin of the ratings" in got.text
    assert "best-of-N accuracy" in got.text and "set-2" in got.ids


def test_benchmark_tables(tmp_path):
    """RewardBench 2, whole and in part, and RM-Bench find their tables on the page."""
    pytest.importorskip("matplotlib")
    items = []
    for name, k, id_ in (
        ("Factuality", 4, "1"),
        ("Precise IF", 4, "2"),
        ("Math", 4, "3"),
        ("Safety", 4, "4"),
        ("Focus", 4, "5"),
        ("Ties", 3, "ref:6"),
        ("Ties", 3, "tied:6"),
    ):
        (item,) = make_items(1, k, id=id_, benchmark="reward-bench-2")
        item.source, item.scores = name, np.array([1.0, float(id_ == "tied:6"), *[0.0] * (k - 2)])
        item.rewards = np.arange(k, 0, -1.0)
        items.append(item)
    whole, part = render(tmp_path, {"rb2": items}), render(tmp_path, {"rb2": items[:1]})
    assert "RewardBench 2 subset" in whole.text and "Not in the data" not in whole.text
    # tied:6 has gap 1 and spread 1: a draw, so neither preferred nor hard; tanh(1 / 1 - 1) is 0
    assert "1 questions, each with one and with several" in whole.text and "0.600" in whole.text
    assert f"{(5 + 0.6) / 6:.3f}" in whole.text
    assert "Not in the data: Precise IF, Math, Safety, Focus, Ties" in part.text
    (item,) = make_items(1, 6, benchmark="rm-bench")
    item.scores = np.array([1.0, 1, 1, 0, 0, 0])
    assert "RM-Bench" in render(tmp_path, {"rm": [item]}).text


def test_odd_sets_still_draw(tmp_path):
    """All ties and an absurd scale, one pair without a mistake, nothing to evaluate."""
    pytest.importorskip("matplotlib")
    ties, single, none = make_items(4), make_items(1), make_items(2)
    for i, item in enumerate(ties):
        item.rewards = np.array([0.0, 0.0 if i else 1e9])
    single[0].rewards = np.array([3.0, 2.0])
    for item in none:
        item.scores = np.zeros(2)
    assert (
        "No pair to evaluate"
        in render(tmp_path, {"ties": ties, "single": single, "none": none}).text
    )


@pytest.mark.slow
def test_pages_in_a_browser(tmp_path):
    """A real browser draws both pages, nothing sticks out of the page's width, and every plot has
    its colors."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
    )
    if browser is None:
        pytest.skip("no chromium on this machine")
    image = pytest.importorskip("matplotlib.image")
    items = make_items(200)
    write_evaluation_report(
        tmp_path,
        "a model",
        {"one": evaluate(items)},
        {"one": items},
        {"one": worst_mistakes(items)},
    )
    rows = [train_row(s) for s in range(1, 101)] + [
        eval_row(
            s,
            0.6,
            length_gap=0.1,
            ece=0.1,
            temperature=1.0,
            mean_margin=0.5,
            num_ties=0,
            reward_mean=0.1,
            reward_std=1,
            length_controlled_accuracy=0.6,
        )
        for s in (50, 100)
    ]
    run = write_run_report(write_run(tmp_path / "run", rows))
    for page_path in (tmp_path / "report.html", run):
        shot = tmp_path / "shot.png"
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--window-size=1200,2000",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--screenshot={shot}",
                page_path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and shot.is_file(), done.stderr[-2000:]
        pixels = image.imread(shot)[..., :3]  # [2000, 1200, 3]
        assert (pixels[:, 1145:] > 0.99).all() and (
            pixels[:, :55] > 0.99
        ).all()  # the margins are white
        blue = (np.abs(pixels - np.array([0.0, 0.447, 0.698])) < 0.02).all(-1)
        assert (
            blue[600:, :600].sum() > 500 and (pixels[:600].min(-1) < 0.3).sum() > 2000
        )  # plots below, words above
        shot.unlink()


def test_missing_matplotlib_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--report needs matplotlib.*rmega\[plots\]") as error:
        figures.require_matplotlib("--report")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="report_run.py needs matplotlib"):
        write_run_report(tmp_path)


def test_escape():
    assert page.escape('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert page.escape("a\tb\nc\x00\x1b\ud800") == "a\tb\nc\ufffd\ufffd?"


# ---- a run


def train_row(step: int, **more) -> dict:
    return {
        "type": "train",
        "step": step,
        "lr": 1e-5,
        "loss": 0.7 - step / 1000,
        "acc": 0.5 + step / 1000,
        "chosen_score_mean": step / 100,
        "rejected_score_mean": -step / 100,
        "grad_norm": 2.0,
        "pairs_per_second": 6.0,
        "time": 0.6,
        "num_pairs": 64,
        "num_tokens": 9000,
        **more,
    }


def eval_row(step: int, accuracy: float, name: str = "hh", half: float = 0.03, **more) -> dict:
    return {
        "type": "eval",
        "step": step,
        "name": name,
        "accuracy": accuracy,
        "accuracy_low": accuracy - half,
        "accuracy_high": accuracy + half,
        "num_pairs": 900,
        **more,
    }


def write_run(path: Path, rows, tail: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return path


def test_run_page(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [train_row(s) for s in range(1, 101)]
    rows += [eval_row(50, 0.6), eval_row(100, 0.65), eval_row(100, 0.5, "llmbar")]
    run = write_run(tmp_path / "run <b>", rows)
    (run / "config.json").write_text(
        json.dumps({"model": {"hf_model": EVIL}, "data": {"data_path": ["a", "b"]}})
    )
    assert write_run_report(run) == run / "report.html"
    got = check(run / "report.html")
    assert got.tags.count("svg") == 7 and "65.0 %" in got.text and "data.data_path" in got.text
    for title in (
        "Loss",
        "Training accuracy",
        "Mean rewards",
        "Learning rate",
        "Gradient norm",
        "Throughput",
    ):
        assert title in got.text
    assert "run <b>" in got.text and "6,400 pairs seen" in got.text


def test_the_head_of_a_page(tmp_path):
    """How far, how long, of what; a run of an earlier version is asked for what its files have."""
    from rmega.report.run_metrics import head

    rows = [train_row(s, time=0.5, num_pairs=160) for s in (10, 20)] + [
        train_row(23, time=2.0, num_pairs=48)
    ]
    config = {
        "model": {"hf_model": "m"},
        "train": {"train_steps": None},
        "run": {"steps": 23, "layout": "tp 1, pp 1, dp 2", "precision": "bf16 (fast)"},
    }
    assert head(rows, config) == [
        "finished: 23 of 23 steps; 0:00:16; 368 pairs seen",
        "m; tp 1, pp 1, dp 2; bf16 (fast)",
    ]
    assert head(rows[:2], config)[0].startswith(
        "unfinished, or still running: 20 of 23 steps; 0:00:10; "
    )
    assert head([{**rows[0], "train_seconds": 75.0}], {"train": {"train_steps": 10}}) == [
        "finished: 10 of 10 steps; 0:01:15; 160 pairs seen"
    ]
    assert head([{"step": 3}], {}) == ["step 3"] and head([], {}) == []


def test_words_and_marks_of_a_short_run(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [train_row(s, lr=2.5e-5 / s) for s in range(1, 24, 2)]
    got = check(
        write_run_report(
            write_run(tmp_path / "short", rows + [eval_row(20, 0.911), eval_row(23, 0.911)])
        )
    )
    assert (
        "last tenth" not in got.text
        and "Loss, last row" in got.text
        and "first and last row" in got.text
    )
    assert (
        "the best of the run, as it was at step 20 already" in got.text
        and "the best was" not in got.text
    )
    assert "2.5e-05" in got.text and "1e-05" in got.text
    marked = (tmp_path / "short" / "report.html").read_text().count("<use ")
    many = [train_row(s) for s in range(1, 101)]
    write_run_report(
        write_run(tmp_path / "long", many + [eval_row(20, 0.911), eval_row(23, 0.911)])
    )
    ticks_alone = (tmp_path / "long" / "report.html").read_text().count("<use ")
    assert marked >= ticks_alone + 6 * len(rows) - 40  # a mark for each point of six curves


def test_run_page_of_little(tmp_path):
    pytest.importorskip("matplotlib")
    for name, rows in {
        "one": [train_row(1)],
        "eval": [eval_row(0, 0.5)],
        "bare": [{"type": "train", "step": 1, "loss": 0.7, "grad_norm": None}],
        "broken": [train_row(s, loss=math.nan, grad_norm=math.nan) for s in range(30)],
    }.items():
        check(write_run_report(write_run(tmp_path / name, rows), tmp_path / f"{name}.html"))


def test_read_metrics(tmp_path):
    rows = [train_row(1), train_row(2), train_row(2, loss=9.0), eval_row(2, 0.6), eval_row(2, 0.7)]
    train, evals = read_metrics(write_run(tmp_path / "r", rows, tail='{"type": "tra'))
    assert (
        [r["step"] for r in train] == [1, 2]
        and train[1]["loss"] == 9.0
        and evals[0]["accuracy"] == 0.7
    )
    with pytest.raises(ValueError, match="metrics.jsonl:1: not a row"):
        read_metrics(write_run(tmp_path / "s", [{"x": 1}, train_row(1)]))
    with pytest.raises(ValueError, match="no such file"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no rows"):
        read_metrics(write_run(tmp_path / "t", []))


def test_run_findingss():
    def levels(train, evals, config=None):
        return {(v["about"], v["level"]) for v in run_findings(train, evals, config or {})}

    good = [train_row(s) for s in range(1, 101)]
    assert levels(good, [eval_row(100, 0.65)]) == {
        ("evaluation", "good"),
        ("loss", "good"),
        ("rewards", "good"),
    }
    assert ("evaluation", "warn") in levels(good, [])
    assert ("evaluation", "warn") in levels(
        good, [eval_row(50, 0.75), eval_row(100, 0.6)]
    )  # it was better before
    assert ("evaluation", "bad") in levels(good, [eval_row(100, 0.4)])
    assert ("stability", "warn") in levels(
        [*good, train_row(101, grad_norm=99.0), train_row(102, grad_norm=99.0)], []
    )
    assert ("stability", "bad") in levels([train_row(0, loss=None), *good], [])
    assert ("loss", "warn") in levels([train_row(s, loss=s) for s in range(30)], [])
    assert ("loss", "note") in levels([train_row(s, loss=s) for s in range(9)], [])
    assert ("loss", "bad") in levels(
        [*good, *(train_row(s, loss=math.nan) for s in range(101, 120))], []
    )
    reverse = [train_row(s, chosen_score_mean=-1, rejected_score_mean=1) for s in range(9)]
    assert ("rewards", "bad") in levels(reverse, [])
    assert ("rewards", "warn") in levels([train_row(s, chosen_score_mean=9) for s in range(9)], [])
    noisy = [
        train_row(s, chosen_score_mean=0.1 + s % 2, rejected_score_mean=0.5) for s in range(100)
    ]
    assert ("rewards", "note") in levels(noisy, [])  # 0.1 apart, which the batches differ by anyway


def test_smoothing():
    y = np.array([1.0, 3.0, math.nan, 5.0, 100.0])
    assert smoothed(y, 2).tolist() == [1, 2, 3, 5, 52.5]
    assert running_median(y, 3).tolist() == [1, 2, 2, 4, 52.5]
    assert np.isnan(smoothed(np.full(3, math.nan), 2)).all()
