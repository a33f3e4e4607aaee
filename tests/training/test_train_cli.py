"""Whole runs on text with a model of 260 thousand weights: torchrun, resume, export.

Runs that need no torchrun of their own call the same ``main`` inside the waiting processes of
``tests.dist``.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.conftest import ROOT
from tests.dist import run_distributed

START = math.log(2) - 0.04 * math.log(5)  # focal loss with the log barrier where every score is 0
STEPS, PAIRS = 6, 8
LAYOUT = ["--tp", "2", "--pp", "1"]
OTHER = ["--tp", "2", "--pp", "2", "--num-layers-in-first-pipeline-stage", "3"]


def tool(name: str, *argv: str) -> int:
    """``python tools/NAME argv`` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    return end.value.code


@pytest.fixture(scope="module")
def data(preference_files: Path, small_llama: Path, tmp_path_factory) -> dict[str, str]:
    """Prefixes of a few hundred comparisons."""
    folder = tmp_path_factory.mktemp("data")
    sources = {
        "hh": ("messages.jsonl.gz", 0, 200),
        "valid": ("messages.jsonl.gz", 200, 220),
        "uf": ("argilla.jsonl.gz", 0, 21),
    }
    for name, (file, start, end) in sources.items():
        with gzip.open(preference_files / file, "rt", encoding="utf-8") as lines:
            (folder / f"{name}.jsonl").write_text(
                "".join(itertools.islice(lines, start, end)), encoding="utf-8"
            )
        assert (
            tool(
                "preprocess_pref.py",
                "--input",
                str(folder / f"{name}.jsonl"),
                "--tokenizer",
                str(small_llama),
                "--output-prefix",
                str(folder / name),
                "--max-length",
                "512",
                "--workers",
                "1",
            )
            == 0
        )
    return {name: str(folder / name) for name in sources}


def argv(small_llama: Path, data: str, *more: str) -> list[str]:
    return [
        "--hf-model",
        str(small_llama),
        "--data-path",
        data,
        "--train-steps",
        str(STEPS),
        "--global-batch-size",
        str(PAIRS),
        "--lr",
        "2e-3",
        "--precision",
        "fp32",
        "--matmul-precision",
        "highest",
        "--log-interval",
        "1",
        "--max-tokens-per-microbatch",
        "6000",
        *more,
    ]


def train_cli(rank: int, world_size: int, arguments: list[str]) -> int:
    from examples.pretrain_reward import main

    return main(arguments)


def rows(run: Path | str, kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["type"] == kind]


def losses(run: Path | str) -> list[float]:
    return [row["loss"] for row in rows(run)]


@pytest.fixture(scope="module")
def tp2(data, small_llama, tmp_path_factory) -> tuple[Path, str]:
    """The acceptance's own command line: (run folder, what it printed)."""
    run = tmp_path_factory.mktemp("run") / "tp2"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "examples/pretrain_reward.py",
        *LAYOUT,
        *argv(small_llama, data["hh"]),
        "--valid-data-path",
        data["valid"],
        "--save",
        str(run),
        "--save-interval",
        "3",
    ]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


@pytest.fixture(scope="module")
def single(data, small_llama, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "single"
    assert run_distributed(
        train_cli,
        1,
        [*argv(small_llama, data["hh"]), "--valid-data-path", data["valid"], "--save", str(run)],
    ) == [0]
    return run


def test_first_loss_is_the_known_one_and_it_falls(tp2) -> None:
    run, said = tp2
    curve = losses(run)
    assert (
        len(curve) == STEPS
        and curve[0] == pytest.approx(START, abs=2e-7)
        and round(START, 6) == 0.628770
    )
    assert curve[-1] < curve[0] - 0.005
    cosine = [
        1e-3 * (1 + math.cos(math.pi * step / (STEPS + 1))) for step in range(1, STEPS + 1)
    ]  # no step at lr 0
    assert [row["lr"] for row in rows(run)] == pytest.approx(cosine, rel=1e-6)
    assert rows(run)[0]["acc"] == 0.5 and rows(run)[0]["chosen_score_mean"] == 0.0  # all ties: half
    lines = [line for line in said.splitlines() if line.startswith("Iter(train)")]
    assert (
        len(lines) == STEPS
        and f"Iter(train) [1/{STEPS}]  lr: " in lines[0]
        and "loss: 0.6288" in lines[0]
    )
    for name in (
        "eta",
        "time",
        "data_time",
        "memory",
        "acc",
        "grad_norm",
        "num_samples",
        "num_tokens",
        "pairs/s",
    ):
        assert f"{name}: " in lines[0]
    assert "new head (zero)" in said and "tp 2, pp 1, dp 1" in said
    assert said.count(f"done: {STEPS} steps") == 1  # one rank speaks


def test_it_equals_the_single_process_run(tp2, single) -> None:
    run, _ = tp2
    for ours, alone in zip(rows(run), rows(single), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        for field in ("num_samples", "num_pairs", "num_tokens", "real_tokens", "lr", "step"):
            assert ours[field] == alone[field], field
    ours, alone = rows(run, "eval"), rows(single, "eval")
    assert [row["step"] for row in ours] == [row["step"] for row in alone] == [0, STEPS]
    assert ours[0]["accuracy"] == 0.5 and ours[-1]["accuracy"] == alone[-1]["accuracy"]
    assert ours[-1]["reward_std"] == pytest.approx(alone[-1]["reward_std"], rel=1e-4)


def test_resume_goes_on_as_if_nothing_had_been(tp2, data, small_llama, tmp_path) -> None:
    """From the middle: the same layout gives the same numbers, bit for bit; four ranks and one give
    them to 1e-5."""
    run, _ = tp2
    half = run / "iter_0000003"
    for name, layout, ranks in (("same", LAYOUT, 2), ("more", OTHER, 4), ("one", [], 1)):
        arguments = [
            *layout,
            *argv(small_llama, data["hh"]),
            "--load",
            str(half),
            "--save",
            str(tmp_path / name),
        ]
        assert run_distributed(train_cli, ranks, arguments) == [0] * ranks
    assert [row["step"] for row in rows(tmp_path / "same")] == [4, 5, 6]
    assert losses(tmp_path / "same") == losses(run)[3:]
    for name in ("more", "one"):
        assert losses(tmp_path / name) == pytest.approx(losses(run)[3:], rel=1e-5)


def test_a_finished_run_is_not_run_again(single, data, small_llama) -> None:
    before = (single / "metrics.jsonl").read_text()
    again = [
        *argv(small_llama, data["hh"]),
        "--valid-data-path",
        data["valid"],
        "--load",
        str(single),
        "--save",
        str(single),
    ]
    ((code, said),) = run_distributed(runs.train_and_say, 1, again)
    assert (
        code == 0 and said.splitlines()[-1] == f"nothing to do: the run is complete at step {STEPS}"
    )
    assert "Iter(val)" not in said and (single / "metrics.jsonl").read_text() == before


def test_only_sets_without_an_evaluation_are_evaluated_at_the_end(
    single, data, small_llama, tmp_path
) -> None:
    """A run that was stopped between the last evaluations of two sets: the second is made, the
    first has one row."""
    run = tmp_path / "run"
    shutil.copytree(single, run)
    ((code, said),) = run_distributed(
        runs.train_and_say,
        1,
        [
            *argv(small_llama, data["hh"]),
            "--valid-data-path",
            data["valid"],
            f"other={data['uf']}",
            "--load",
            str(run),
            "--save",
            str(run),
        ],
    )
    assert code == 0 and "head from the checkpoint" in said and "new head" not in said
    assert [(row["step"], row["name"]) for row in rows(run, "eval")] == [
        (0, "valid"),
        (STEPS, "valid"),
        (STEPS, "other"),
    ]
    assert (
        json.loads((run / f"iter_{STEPS:07d}" / "rmega.json").read_text())["head"]
        == "new head (zero)"
    )


def scored(rank: int, world_size: int, run: str) -> str:
    """What is said when a run's weights are read for scoring."""
    from rmega.scoring.scorer import load_scorer

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        load_scorer(run)
    return said.getvalue()


def test_scoring_does_not_claim_to_go_on(single) -> None:
    (said,) = run_distributed(scored, 1, str(single))
    assert f"weights from {single / f'iter_{STEPS:07d}'}\n" in said and "resuming" not in said


def test_ranking_loss_starts_at_ln_2_and_replicas_agree(data, small_llama, tmp_path) -> None:
    """Long answers on two replicas and on one; the last batch of the epoch is a partial one."""
    from rmega.data.indexed import open_preferences

    arguments = argv(small_llama, data["uf"], "--loss", "ranking", "--penalty", "none")
    at = arguments.index("--train-steps")
    arguments[at : at + 2] = ["--train-epochs", "1"]
    for ranks in (1, 2):
        assert (
            run_distributed(
                train_cli,
                ranks,
                [*arguments, "--save", str(tmp_path / str(ranks)), "--tp", "1", "--dp", str(ranks)],
            )
            == [0] * ranks
        )
    assert losses(tmp_path / "1")[0] == pytest.approx(math.log(2), abs=2e-7)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    count = len(open_preferences(data["uf"]))
    assert PAIRS < count and count % PAIRS
    sizes = [row["num_samples"] for row in rows(tmp_path / "2")]
    assert sum(sizes) == count and sizes == [PAIRS] * (count // PAIRS) + [count % PAIRS]
    info = json.loads((tmp_path / "2" / f"iter_{len(sizes):07d}" / "rmega.json").read_text())
    assert info["consumed"] == count and info["config"]["parallel"]["data_parallel_size"] == 2


def test_the_export_gives_the_same_rewards_in_transformers(tp2, data, tmp_path, capsys) -> None:
    run, _ = tp2
    assert tool("convert_to_hf.py", "--load", str(run), "--output", str(tmp_path / "hf")) == 0
    from transformers import AutoModelForSequenceClassification

    from rmega.data.indexed import open_preferences
    from rmega.scoring.scorer import scorer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    dataset = open_preferences(data["valid"])
    texts = [
        [np.concatenate([c.prefix, s]) for s in c.suffixes]
        for c in (dataset.get(i) for i in range(12))
    ]
    with torch.no_grad():
        theirs = [
            [float(model(torch.from_numpy(t.astype(np.int64))[None]).logits[0, 0]) for t in own]
            for own in texts
        ]
    largest = np.abs(theirs).max()
    assert largest > 0.01
    for source in (run, run / "iter_0000006", tmp_path / "hf"):
        with scorer(source) as s:
            assert (
                np.abs(np.array(s.score_tokens(texts)) - np.array(theirs)).max() <= 1e-5 * largest
            )
    shutil.rmtree(tmp_path / "hf")
