"""A few of the random walks of ``tests.fuzz.run_folders``; 200 of them take a quarter of an
hour."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_short_walks_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run_folders", "--count", "4", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "0 lost a state" in done.stdout, done.stdout + done.stderr
