"""The Slurm scripts against a real controller and node daemon on this machine: submit, requeue, see it go on.

Needs root and Debian's slurm-wlm and munge; RMEGA_INSTALL_SLURM=1 installs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import runs

SETUP = runs.ROOT / "tests" / "slurm_setup.sh"
SCRIPTS = sorted((runs.ROOT / "examples" / "slurm").glob("*.sbatch"))


def setup(*argv: str) -> None:
    done = subprocess.run(["bash", str(SETUP), *argv], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"no Slurm here: {done.stdout.strip() or done.stderr.strip()}")


@pytest.fixture(scope="module")
def slurm():
    if os.environ.get("RMEGA_INSTALL_SLURM") == "1":
        setup("install")
    folder = tempfile.mkdtemp(prefix="rmega-slurm-")  # not pytest's, which the munge daemon's user may not enter
    try:
        setup("start", folder)
        yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    finally:
        subprocess.run(["bash", str(SETUP), "stop", folder], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def ask(slurm: dict, *argv: str) -> str:
    done = subprocess.run(argv, env=slurm, capture_output=True, text=True, timeout=60, cwd=runs.ROOT)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_accepted(script, slurm):
    """Slurm reads the header and would start the job (on one node, of which there are no more here)."""
    said = ask({**slurm, "DATA": "x", "VALID": "x"}, "sbatch", "--test-only", "--nodes=1", str(script))
    assert "to start at" in said, said


@pytest.mark.slow
def test_requeue_goes_on(slurm, shared_dir, stories260k, tmp_path):
    """The script of the 1.8B model with a tiny one: SIGTERM by scontrol requeue saves, the second start goes on."""
    data = runs.make_data(shared_dir, stories260k, tmp_path)
    log, run = tmp_path / "log", tmp_path / "run"
    environment = {**slurm, "DATA": data, "VALID": data, "RUN": str(run), "RANKS_PER_NODE": "2",
                   "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    said = ask(environment, "sbatch", f"--output={log}", "examples/slurm/internlm2-1.8b.sbatch",
               *runs.flags(stories260k, data, steps=None, train_epochs=4, batch=6, dp=2, save_interval=1000,
                           eval_interval=0))
    assert "Submitted batch job" in said, said
    job = said.split()[-1]

    def wait_for(text: str, seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, (text, log.read_text()[-2000:] if log.exists() else "no log",
                                                 ask(slurm, "scontrol", "show", "job", job))
            time.sleep(0.3)

    wait_for("[ 3/40]")
    ask(slurm, "scontrol", "requeue", job)
    wait_for("stopping after step")
    wait_for("saved ")
    deadline = time.monotonic() + 60
    while "PENDING" not in (state := ask(slurm, "squeue", "-h", "-j", job, "-o", "%T")):
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
    ask(slurm, "scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm holds a requeued job back for two minutes
    wait_for("going on from")
    wait_for("done: 40 steps")
    steps = [int(line.split("[")[1].split("/")[0]) for line in log.read_text().splitlines()
             if line.startswith("Iter(train)")]
    assert steps == list(range(1, 41))  # none skipped, none repeated
    assert (Path(run) / "iter_0000040" / "rmega.json").is_file()
