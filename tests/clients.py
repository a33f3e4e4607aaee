"""Pythons that read exported folders with transformers alone, without rmega: one process of each,
kept for all tests of a worker, because it takes seconds to import them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "hf_load_check.py"


@functools.cache
def _start(python: str) -> tuple[subprocess.Popen, Any]:
    """(process, file with its stderr)."""
    dropped = ("PYTHONPATH", "RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [python, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    atexit.register(process.kill)
    return process, errors


def ask(python: str, jobs: list[dict]) -> list[dict]:
    """The answers of ``hf_load_check.py`` to jobs, run by ``python``; AssertionError with its
    stderr where it fails."""
    process, errors = _start(python)
    process.stdin.write(json.dumps(jobs) + "\n")
    process.stdin.flush()
    while line := process.stdout.readline():
        if line.startswith("answers: "):
            return json.loads(line.removeprefix("answers: "))
    process.wait()
    _start.cache_clear()
    errors.seek(0)
    raise AssertionError(errors.read())
