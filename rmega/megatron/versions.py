"""Tested releases of torch and Megatron-Core, notes on newer ones, and the import itself.

The package's metadata has no upper bound, because pip would replace the torch of a container to
meet it: a newer release runs, with a note.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

NEWEST_TESTED = {"torch": (2, 15), "megatron-core": (0, 19)}
# From 0.17 on Megatron-Core looks for this package and fails at import where it is older.
RESILIENCY = "nvidia-resiliency-ext"
RESILIENCY_NEEDED = (0, 6)


def release(package: str) -> tuple[int, int] | None:
    """(major, minor) of an installed package, pre-releases included; None where it is not there."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def notes() -> list[str]:
    """A line for each package that is newer than its newest tested release."""
    return [
        f"note: {package} {importlib.metadata.version(package)} is newer than"
        f" {'.'.join(map(str, tested))}, the newest release that rmega was tested with"
        for package, tested in NEWEST_TESTED.items()
        if (release(package) or tested) > tested
    ]


def check_importable() -> None:
    """ValueError, with a way out, where importing Megatron-Core would fail in another package."""
    installed, core = release(RESILIENCY), release("megatron-core")
    if not installed or installed >= RESILIENCY_NEEDED or not core or core < (0, 17):
        return
    try:
        importlib.import_module("nvidia_resiliency_ext.checkpointing.async_ckpt.core")
    except ImportError:  # without a requirement of its own, Megatron-Core takes it for absent
        return
    raise ValueError(
        f"{RESILIENCY} {importlib.metadata.version(RESILIENCY)} is too old for megatron-core"
        f" {importlib.metadata.version('megatron-core')}, which does not start beside it: pip"
        f" uninstall {RESILIENCY}, or install {'.'.join(map(str, RESILIENCY_NEEDED))} or newer"
    )


def import_megatron() -> None:
    """Import Megatron-Core without torch's compiler, the larger part of what it would import.

    It decorates its fused activations with ``torch.compile``, and decorating is enough to import
    the compiler. rmega calls none of them (it has kernels of its own); they stay as written.
    """
    check_importable()
    if "megatron.core" in sys.modules:
        return
    from unittest import mock

    with mock.patch("torch.compile", lambda f=None, **_: f or (lambda function: function)):
        from megatron.core import jit
    jit.disable_jit_fuser()  # for those of its modules that are imported later
