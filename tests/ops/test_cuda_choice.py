"""Whether setup.py builds for CUDA: it is run beside a stand-in for torch and toolkits of a few
empty files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
EXTENSION = """
import os
CUDA_HOME = os.environ.get("TORCH_FINDS")
def CppExtension(name, sources, **_):
    print("built: cpu")
def CUDAExtension(name, sources, **_):
    print("built: cuda with", CUDA_HOME)
class BuildExtension: pass
"""


@pytest.fixture
def build(tmp_path):
    """Runs setup.py with torch's CUDA version and where torch finds nvcc -> (exit code, output)."""
    stand_in = tmp_path / "stand_in"
    (stand_in / "torch/utils").mkdir(parents=True)
    (stand_in / "torch/utils/__init__.py").touch()
    (stand_in / "torch/utils/cpp_extension.py").write_text(EXTENSION)
    (stand_in / "setuptools.py").write_text("def setup(**_): pass\n")
    # The usual places are those of the machine that the test runs on: none there.
    text = SETUP.read_text()
    assert text.count('"/usr/local') == 2
    copy = tmp_path / "setup.py"
    copy.write_text(text.replace('"/usr/local', f'"{tmp_path}/local'))

    def run(torch_cuda, finds=None, **environment):
        (stand_in / "torch/__init__.py").write_text(
            "from types import SimpleNamespace\n"
            f"version = SimpleNamespace(cuda={torch_cuda!r})\n__version__ = '2.11.0'\n"
        )
        environment |= {"PYTHONPATH": str(stand_in), "PATH": os.environ["PATH"]}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the stand-in changes within a second
        if finds:
            environment["TORCH_FINDS"] = str(finds)
        done = subprocess.run(
            [sys.executable, str(copy)], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


def toolkit(folder: Path, version: str, *, headers: bool = True) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").touch()
    return folder


def test_a_toolkit_of_the_same_major_version(build, tmp_path):
    home = toolkit(tmp_path / "toolkit", "13.2")
    code, out = build("13.0", home)
    assert code == 0 and f"CPU and CUDA 13.2 ({home})" in out
    assert f"built: cuda with {home}" in out


def test_torch_without_cuda(build, tmp_path):
    code, out = build(None, toolkit(tmp_path / "toolkit", "13.0"))
    assert code == 0 and "CPU only: torch is built without CUDA" in out and "built: cpu" in out


def test_nvcc_is_a_wrapper_in_a_folder_without_a_toolkit(build, tmp_path):
    """torch takes the folder above the wrapper's for the toolkit; the real one is found."""
    wrapper = toolkit(tmp_path / "wrapped", "13.0", headers=False)
    code, out = build("13.0", wrapper)
    assert code == 0 and "CPU only: no toolkit of CUDA 13.0" in out and "built: cpu" in out
    for folder in ("local/cuda-12.8", "local/cuda-13.0"):
        toolkit(tmp_path / folder, folder[-4:])
    code, out = build("13.0", wrapper)
    assert code == 0 and f"built: cuda with {tmp_path}/local/cuda-13.0" in out
    code, out = build("12.6", wrapper)
    assert code == 0 and f"built: cuda with {tmp_path}/local/cuda-12.8" in out


@pytest.mark.parametrize("torch_cuda,version", [("13.0", "12.8"), ("12.8", "13.0")])
def test_a_toolkit_of_another_major_version(build, tmp_path, torch_cuda, version):
    home = toolkit(tmp_path / "toolkit", version)
    code, out = build(torch_cuda, home)
    assert code == 0 and "built: cpu" in out
    assert f"CPU only: torch is built with CUDA {torch_cuda}, {home} has CUDA {version}" in out


def test_wishes(build, tmp_path):
    home = toolkit(tmp_path / "toolkit", "13.0")
    code, out = build("13.0", home, RMEGA_BUILD_CUDA="0")
    assert code == 0 and "built: cpu" in out
    code, out = build("13.0", home, RMEGA_BUILD_CUDA="1")
    assert code == 0 and "built: cuda" in out
    code, out = build("13.0", RMEGA_BUILD_CUDA="1")
    assert code == 1 and "error: RMEGA_BUILD_CUDA=1, but no toolkit of CUDA 13.0" in out
