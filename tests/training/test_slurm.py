"""The Slurm scripts against a real controller and node daemon on this machine: submit, requeue, see
it go on.

Needs root and Debian's slurm-wlm and munge; RMEGA_INSTALL_SLURM=1 installs them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    folder = tempfile.mkdtemp(
        prefix="rmega-slurm-"
    )  # not pytest's, which the munge daemon's user may not enter
    try:
        setup("start", folder)
        yield {
            **os.environ,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
    finally:
        subprocess.run(["bash", str(SETUP), "stop", folder], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def ask(slurm: dict, *argv: str) -> str:
    done = subprocess.run(
        argv, env=slurm, capture_output=True, text=True, timeout=60, cwd=runs.ROOT
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_accepted(script, slurm):
    """Slurm reads the header and would start the job (on one node, of which there are no more
    here)."""
    said = ask(
        {**slurm, "DATA": "x", "VALID": "x"}, "sbatch", "--test-only", "--nodes=1", str(script)
    )
    assert "to start at" in said, said


# layers, hidden, heads, key/value groups, MLP width, vocabulary
SHAPES = {
    "internlm2-1.8b": (24, 2048, 16, 8, 8192, 92544),
    "internlm2-7b": (32, 4096, 32, 8, 14336, 92544),
    "internlm2-20b": (48, 6144, 48, 8, 16384, 92544),
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": (80, 8192, 64, 8, 28672, 128256),
    "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256),
    "qwen3-8b": (36, 4096, 32, 8, 12288, 151936),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_fits_its_nodes(script):
    """Its flags are known, its layout takes every GPU that it asks for, and full micro-batches fit
    80 GB."""
    from rmega.cli import parse_args
    from rmega.config import TrainingConfig
    from rmega.models.geometry import Geometry
    from rmega.training import components, plan

    text = script.read_text()
    gpus = int(re.search(r"--nodes=(\d+)", text)[1]) * int(
        re.search(r"--gpus-per-node=(\d+)", text)[1]
    )
    flags = shlex.split(
        text[text.index("examples/slurm/run.sh") :].replace('"$@"', "").replace("\\\n", " ")
    )[1:]
    config = parse_args(
        TrainingConfig, [*flags, "--precision", "bf16", "--save", "x", "--load", "x"]
    )
    config.check(gpus)
    layers, hidden, heads, groups, ffn, vocab = SHAPES[script.stem]
    geometry = Geometry(
        family="qwen3" if "qwen3" in script.stem else "llama",
        qk_norm="qwen3" in script.stem,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    components.transformer_layout(config, geometry, on_cpu=True)
    stages = plan.plan_stages(
        config,
        geometry,
        replicas=config.parallel.data_parallel_size,
        bytes_per_element=2,
        tokens=config.data.max_tokens_per_microbatch,
        microbatches=64,
    )
    plan.refuse_what_cannot_fit(stages, 0.9 * 80e9)


STOPS = {
    "scontrol requeue": ("an administrator", lambda job: ("scontrol", "requeue", job)),
    "SIGUSR1": ("the job's time is nearly over", lambda job: ("scancel", "--signal=USR1", job)),
    "preemption": (
        "a job of a higher partition",
        lambda job: (
            "sbatch",
            "--partition=urgent",
            "--exclusive",
            "--gpus-per-node=8",
            "--output=/dev/null",
            "--wrap=sleep 3",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_requeue_goes_on(how, slurm, small_llama, tmp_path):
    """The script of the 1.8B model with a tiny one: it is stopped, saves, is queued again, and goes
    on to its end."""
    data = runs.make_data(small_llama, tmp_path)
    log, run = tmp_path / "log", tmp_path / "run"
    environment = {
        **slurm,
        "DATA": data,
        "VALID": data,
        "RUN": str(run),
        "RANKS_PER_NODE": "2",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    said = ask(
        environment,
        "sbatch",
        f"--output={log}",
        "examples/slurm/internlm2-1.8b.sbatch",
        *runs.flags(
            small_llama,
            data,
            steps=None,
            train_epochs=4,
            batch=6,
            dp=2,
            save_interval=1000,
            eval_interval=0,
        ),
    )
    assert "Submitted batch job" in said, said
    job = said.split()[-1]

    def wait_for(what: Callable[[], bool], seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, (
                log.read_text()[-2000:] if log.exists() else "no log",
                ask(slurm, "scontrol", "show", "job", job),
            )
            time.sleep(0.3)

    def logged(text: str) -> Callable[[], bool]:
        return lambda: log.exists() and text in log.read_text()

    def in_state(state: str) -> Callable[[], bool]:
        return lambda: f"JobState={state} " in ask(slurm, "scontrol", "show", "job", job)

    with runs.fault(
        f"Slurm: {how}, {STOPS[how][0]}",
        "the job saves, is queued again, and no step is lost or repeated",
    ):
        wait_for(logged("[ 3/40]"))
        ask(slurm, *STOPS[how][1](job))
        wait_for(logged("stopping after step"))
        wait_for(logged("saved "))
        wait_for(in_state("PENDING"))
        time.sleep(
            3.0
        )  # a start within the second in which the first one's credential ended would be refused
        ask(
            slurm, "scontrol", "update", f"jobid={job}", "StartTime=now"
        )  # Slurm holds it back for two minutes
        wait_for(logged("resuming from"))
        wait_for(logged("done: 40 steps"))
        steps = [
            int(line.split("[")[1].split("/")[0])
            for line in log.read_text().splitlines()
            if line.startswith("Iter(train)")
        ]
        assert steps == list(range(1, 41))
        assert (Path(run) / "iter_0000040" / "rmega.json").is_file()
        wait_for(in_state("COMPLETED"))
        assert "ExitCode=0:0" in ask(slurm, "scontrol", "show", "job", job)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_outside_a_job_says_how_it_is_started(script):
    env = {"PATH": os.environ["PATH"], "DATA": "x", "VALID": "x", "RUN": "x"}
    done = subprocess.run(
        ["bash", str(script)], env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: not inside a Slurm job: start the .sbatch file with sbatch"
    ]


def test_the_length_that_is_given_replaces_that_of_a_script(tmp_path):
    """srun and python are stand-ins that say what they were called with."""
    for name in ("srun", "python", "scontrol"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$*"\n')
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DATA": "x",
        "VALID": "y",
        "RUN": "z",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "PYTHON": "python",
    }
    done = subprocess.run(
        ["bash", "examples/slurm/llama3-8b.sbatch", "--train-steps", "4"],
        env=env,
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 0
        and "--train-steps 4" in done.stdout
        and "--train-epochs" not in done.stdout
    ), done
