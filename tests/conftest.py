"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests.dist, examples and tools are no installed packages


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Only tests marked ``gpu`` see one, themselves and in the programs that they start: the others
    compare CPU computations, some of them on more ranks than a machine has GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            if "torch" in sys.modules:
                patch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
        return (yield)


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
