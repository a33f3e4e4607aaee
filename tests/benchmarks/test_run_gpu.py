"""benchmarks/run_gpu.sh without a GPU, and its bookkeeping with a stand-in for Python; the helpers
of the benchmarks that a GPU machine depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "check": "probe build attention ops training end_to_end one_step_1.8b".split(),
    "measure": "probe all_savings profile packed last_layer hh_packed hh_all_savings operators"
    " attention padded real_run".split(),
}


def run(mode: str, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/run_gpu.sh"), mode, "--out", str(out), *more],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def states(out: Path) -> dict[str, str]:
    """What the summary reports of each part."""
    lines = (out / "summary.txt").read_text().splitlines()
    words = [line.split() for line in lines if line and line[0].isupper()]
    return {w[1]: w[0] for w in words if w[0] in ("PASS", "FAIL", "SKIPPED")}


@pytest.mark.parametrize("mode", PARTS)
def test_without_a_gpu_every_part_is_skipped_with_its_reason(mode, tmp_path):
    begun = time.monotonic()
    done = run(mode, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and time.monotonic() - begun < 60, done.stdout + done.stderr
    assert states(tmp_path) == dict.fromkeys(PARTS[mode], "SKIPPED")
    text = (tmp_path / "summary.txt").read_text()
    assert text.count("no CUDA device") == len(PARTS[mode])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "summary.txt"]


@pytest.fixture
def stand_in(tmp_path):
    """A Python whose programs do what FAILS and HANGS say, and a timeout of one second."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "python": """#!/bin/bash
            [[ "$*" == *gpu_probe* ]] && { echo "ok everything"; exit 0; }
            [[ -n "$FAILS" && "$*" == *$FAILS* ]] && { echo "it broke"; exit 3; }
            [[ -n "$HANGS" && "$*" == *$HANGS* ]] && { echo "begun"; sleep 60; }
            [[ "$*" == *"-m pytest"* ]] && { echo "${TESTS:-5 passed}"; exit 0; }
            [[ "$*" == *train.py* ]] && echo "{}" > "$RMEGA_RESULTS/${@: -1}.json"
            echo "done: $*"
        """,
        "timeout": '#!/bin/bash\nexec /usr/bin/timeout -k 1 1 "${@:4}"\n',
    }.items():
        (folder / name).write_text("\n".join(line.strip() for line in text.splitlines()))
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {"PATH": path, "PYTHON": str(folder / "python"), "FAILS": "", "HANGS": ""}


def test_a_part_that_fails_does_not_stop_the_others(stand_in, tmp_path):
    done = run("check", tmp_path / "out", **{**stand_in, "FAILS": "test_ops_cuda"})
    assert done.returncode == 1
    assert states(tmp_path / "out") == {
        name: "FAIL" if name == "ops" else "PASS" for name in PARTS["check"]
    }
    assert "it broke" in (tmp_path / "out/summary.txt").read_text()


def test_a_part_that_hangs_is_ended(stand_in, tmp_path):
    done = run("measure", tmp_path / "out", **{**stand_in, "HANGS": "benchmarks/ops.py"})
    assert done.returncode == 1
    found = states(tmp_path / "out")
    assert found.pop("operators") == "FAIL" and found.pop("real_run") == "SKIPPED"
    assert set(found.values()) == {"PASS"} and {*found} == {*PARTS["measure"], "build"} - {
        "operators",
        "real_run",
    }
    text = (tmp_path / "out/summary.txt").read_text()
    assert "ended at its limit" in text and "begun" in text
    assert "--model, --pairs and --valid name a backbone" in text
    with tarfile.open(tmp_path / "out/logs.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"operators.log", "padded.log", "summary.txt"} <= names


def test_tests_that_are_all_skipped_are_no_pass(stand_in, tmp_path):
    done = run("check", tmp_path / "out", **{**stand_in, "TESTS": "7 skipped"})
    assert done.returncode == 1
    found = states(tmp_path / "out")
    assert [name for name, state in found.items() if state == "FAIL"] == [
        "attention",
        "ops",
        "training",
        "end_to_end",
    ]


def test_the_real_run_takes_its_files(stand_in, tmp_path):
    files = [tmp_path / name for name in ("model", "pairs.jsonl", "valid.jsonl")]
    for file in files:
        file.touch()
    given = [x for flag, f in zip(("model", "pairs", "valid"), files, strict=True)
             for x in (f"--{flag}", str(f))]  # fmt: skip
    run("measure", tmp_path / "out", *given, **stand_in)
    assert states(tmp_path / "out")["real_run"] == "FAIL"  # the stand-in writes no metrics
    with tarfile.open(tmp_path / "out/logs.tar.gz") as tar:
        text = tar.extractfile("logs/real_run.log").read().decode()
    assert f"--hf-model {files[0]}" in text and "--train-epochs 1" in text


def test_the_budget_is_held():
    """The limits of all parts, and the time that ends them all."""
    text = (ROOT / "benchmarks/run_gpu.sh").read_text()
    assert "check) total=330" in text and "measure) total=400" in text
    assert "limit > left" in text and "timeout -k 5" in text


@pytest.mark.parametrize("git", ["absent", "no repository", "named"])
def test_results_are_kept_where_there_is_no_git(git, monkeypatch, tmp_path):
    from benchmarks import common

    if git == "named":
        monkeypatch.setenv("RMEGA_COMMIT", "abc1234")
    else:
        monkeypatch.delenv("RMEGA_COMMIT", raising=False)
        monkeypatch.setattr(common, "ROOT", tmp_path)
    if git == "absent":
        monkeypatch.setenv("PATH", str(tmp_path))
    if git == "no repository":
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results" / "deep")
    expected = "abc1234" if git == "named" else "unknown"
    assert common.commit() == expected
    path = common.save("here", common.environment())
    assert json.loads(path.read_text())["commit"] == expected


def test_modes_on_a_gpu_have_a_process_each(monkeypatch, tmp_path, capsys):
    """A mode that fails leaves the others' rows; JSON is rewritten after each."""
    from benchmarks import common, train

    commands, saved = [], []

    class Done:
        returncode = 0

    def start(command):
        commands.append(command)
        args = train.parse_args(train.Args, command[2:])
        (mode,), name = args.modes, args.name
        done = Done()
        if mode == "padded":
            done.returncode = 1
            return done
        row = {"mode": mode, "pairs/s": 2.0 * len(commands), f"x {mode}": 1.0, "spread": "1-1"}
        found = {"environment": {"command": "inner"}, "rows": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        return done

    monkeypatch.setattr(train, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(train.subprocess, "run", start)
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "save", lambda name, found: saved.append((name, found["rows"][:])))
    code = train.main(["--modes", "packed", "padded", "+fusion", "--profile", "--name", "all"])
    assert code == 1 and len(commands) == 3 and "padded: exit code 1" in capsys.readouterr().out
    assert ["--no-profile" in command for command in commands] == [True, True, False]
    assert [len(rows) for _, rows in saved] == [1, 2]
    name, rows = saved[-1]
    assert name == "all" and [row["mode"] for row in rows] == ["packed", "+fusion"]
    assert [row["x packed"] for row in rows] == [1.0, 3.0]
    assert not list(tmp_path.glob("all_part*.json"))
