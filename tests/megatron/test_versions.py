"""Releases that were not tested, and a package that stops Megatron-Core from being imported."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmega.megatron import versions
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("torch", "engine", "noted"),
    [
        ("2.13.0+cpu", "0.16.1", []),
        ("2.14.0a0+nv", "0.19.2", []),
        ("2.14.1+cu130", "0.20.0rc1", ["megatron-core 0.20.0rc1 is newer than 0.19,"]),
        ("2.99.0a0+git12", "1.0", ["torch 2.99.0a0+git12 is newer", "megatron-core 1.0 is newer"]),
    ],
)
def test_newer_releases_are_noted(monkeypatch, torch: str, engine: str, noted: list[str]) -> None:
    installed = {"torch": torch, "megatron-core": engine}
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    notes = versions.notes()
    assert len(notes) == len(noted)
    assert all(part in note and "\n" not in note for part, note in zip(noted, notes, strict=True))


def test_the_note_goes_to_stderr(capsys, monkeypatch) -> None:
    from rmega import distributed

    distributed.finish()  # what an earlier test of this process joined
    monkeypatch.setitem(versions.NEWEST_TESTED, "torch", (1, 0))
    distributed.initialize()
    distributed.finish()
    out, err = capsys.readouterr()
    assert not out and err.startswith("note: torch 2.") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("resiliency", "engine", "importable", "fails"),
    [
        ("0.4.1", "0.19.2", True, True),
        ("0.4.1", "0.17.0", True, True),
        ("0.4.1", "0.16.1", True, False),  # which does not look at it
        ("0.6.0", "0.19.2", True, False),
        ("0.4.1", "0.19.2", False, False),  # without psutil: Megatron-Core does without it
        (None, "0.19.2", False, False),
    ],
)
def test_when_a_package_stops_the_import(resiliency, engine, importable, fails, monkeypatch):
    def version(name: str) -> str:
        found = {"nvidia-resiliency-ext": resiliency, "megatron-core": engine}[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    core = "nvidia_resiliency_ext.checkpointing.async_ckpt.core"
    monkeypatch.setitem(sys.modules, core, sys if importable else None)  # None: ImportError
    for name in (core.rsplit(".", n)[0] for n in (1, 2, 3)):
        monkeypatch.setitem(sys.modules, name, sys)
    if not fails:
        versions.check_importable()
        return
    with pytest.raises(ValueError, match=f"{resiliency} is too old .* {engine}.* uninstall"):
        versions.check_importable()


def package(folder: Path, name: str, version: str) -> None:
    """The metadata of a package that is installed in ``folder``."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "command",
    [
        ["tools/score.py", "--model", "nowhere/", "--input", "x.jsonl"],
        ["examples/pretrain_reward.py", "--hf-model", "nowhere/", "--data-path", "x"]
        + ["--train-steps", "1"],
    ],
    ids=lambda command: command[0],
)
def test_programs_name_it_before_megatron_core_is_imported(command: list[str], tmp_path: Path):
    package(tmp_path, "nvidia-resiliency-ext", "0.4.1")
    package(tmp_path, "megatron-core", "0.19.2")
    code = tmp_path / "nvidia_resiliency_ext" / "checkpointing" / "async_ckpt"
    code.mkdir(parents=True)
    (code / "core.py").touch()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: nvidia-resiliency-ext 0.4.1 is too old for megatron-core")


def test_the_import_leaves_the_compiler_out() -> None:
    """torch's compiler, most of the modules that Megatron-Core would bring along; who compiles in
    the same process still can."""
    program = (
        "import sys, torch; before = torch.compile; import rmega.scoring.scorer, rmega.training.run"
        "; assert torch.compile is before; from megatron.core.fusions import fused_bias_swiglu"
        "; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr
