"""Help texts of every program: readable through a pipe, and without doubled negations."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from rmega.cli import num_cores, parse_args, run_tool
from rmega.config import TrainingConfig
from tests.conftest import ROOT

PROGRAMS = [
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tools").glob("*.py")),
    "examples/pretrain_reward.py",
]


def ended(command: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a program whose standard output nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program):
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--no-no-" not in re.sub(r"\s+", "", done.stdout)
    code, error = ended([sys.executable, program, "--help"])
    assert code == 0 and not error, error


def test_output_that_nobody_reads_is_no_error():
    """Also what is still in the buffer when the program ends."""
    code = (
        "import sys; from rmega.cli import run_tool;"
        "sys.exit(run_tool(lambda: print('x' * int(sys.argv[1]))))"
    )
    for size in ("10", "1000000"):
        assert ended([sys.executable, "-c", code, size]) == (0, ""), size
    assert run_tool(lambda: 3) == 3


NEEDED = ["--hf-model", "m", "--train-steps", "1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data-path", "a", "--data_path", "b"], "--data-path: given twice"),
        (["--data-path=a", "--data-path=b"], "--data-path: given twice"),
        (["--data-path", "a", "--valid-data-path"], "--valid-data-path: needs at least one value"),
        (["--valid-data-path", "--data-path", "a"], "--valid-data-path: needs at least one value"),
        (["--data-path", "a", "--save", ""], "--save: the value is empty"),
        (["--data-path", "a", "--load="], "--load: the value is empty"),
        (["--data-path", "", "b"], "--data-path: the value is empty"),
    ],
)
def test_no_value_is_lost_without_a_word(more, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(TrainingConfig, [*NEEDED, *more])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_last_value_of_a_repeated_flag_counts():
    config = parse_args(TrainingConfig, [*NEEDED, "--data-path", "a", "--lr", "1", "--lr", "2"])
    assert config.optimizer.lr == 2


@pytest.mark.parametrize("given, expected", [(None, max(1, num_cores() // 3)), ("7", 7)])
def test_ranks_share_the_cores(given, expected, tmp_path):
    """Where OMP_NUM_THREADS is not set; torchrun would give each rank one thread."""
    program = tmp_path / "program.py"
    program.write_text("import os; os.write(1, os.environ['OMP_NUM_THREADS'].encode() + b' ')")
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": given} if given else {}
    launch = [sys.executable, "tools/launch.py", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*launch, str(program)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [str(expected)] * 3, done.stderr
