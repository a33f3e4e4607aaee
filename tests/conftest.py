"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests.dist, examples and tools are no installed packages


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data, tokenizers and a small model that lie beside the checkout (or at RMEGA_SHARED)."""
    path = Path(os.environ.get("RMEGA_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no shared data at {path} (set RMEGA_SHARED)")
    return path


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """A real pretrained Llama of 260 thousand parameters, with its tokenizer."""
    return shared_dir / "models" / "stories260k"


@pytest.fixture(scope="session")
def internlm2_tokenizer(shared_dir: Path) -> Path:
    """The real InternLM2 tokenizer as a Hugging Face folder."""
    return shared_dir / "tokenizers" / "internlm2"


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of faults, where any were tried: docs/training.md shows it."""
    runs = sys.modules.get("tests.runs")
    if runs and runs.FAULTS:
        terminalreporter.write_line(runs.fault_table())
