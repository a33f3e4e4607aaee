"""Which implementation of an operator runs: native (``rmega._C``) or plain torch."""

from __future__ import annotations

import functools
import os
import sys

import torch
from torch import Tensor

_why_not_built = ""
try:
    from rmega import _C

    # csrc/bindings.cpp; 4 lacks operators that only GPUs use
    if getattr(_C, "interface", 1) not in (4, 5):
        _C, _why_not_built = None, "it was built from older sources; build it again"
except ImportError as _error:  # not built, or built for another torch
    _C, _why_not_built = None, str(_error)

IMPLEMENTATIONS = ("auto", "native", "reference")

# dtypes of native elementwise operators; in others ("native" or not) they are plain torch
_ELEMENTWISE = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

_implementation = "auto"
_reported: set[str] = set()  # devices whose fallback was reported


def set_implementation(name: str) -> None:
    """Choose ``"native"`` (raises where ``rmega._C`` is not built), ``"reference"`` or ``"auto"``
    (native if built)."""
    global _implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {name!r}"
        )
    if name == "native" and _C is None:
        raise ValueError(
            f"native operators are not built ({_why_not_built}): pip install --no-build-isolation"
            " -e ."
        )
    _implementation = name


def requested_implementation() -> str:
    """What was last given to :func:`set_implementation`."""
    return _implementation


def active_implementation(device: str | torch.device = "cpu") -> str:
    """``"native"`` or ``"reference"``: what an operator on ``device`` runs now."""
    return "reference" if _why_reference(torch.device(device)) else "native"


def _why_reference(device: torch.device) -> str:
    if _implementation == "reference":
        return "asked for"
    if _C is None:
        return f"rmega._C is not available ({_why_not_built})"
    return _why_not_cuda(device) if device.type == "cuda" else ""


@functools.cache
def _why_not_cuda(device: torch.device) -> str:
    if not _C.has_cuda:
        return "rmega._C was built without CUDA"
    if _C.interface < 5:
        return "rmega._C was built from older sources; build it again"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):  # the oldest that setup.py builds for
        return f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def runs_native(device: torch.device) -> bool:
    """Whether an operator on ``device`` runs natively now; raises where that was asked for and
    cannot be, and reports the first fallback of a device."""
    why = _why_reference(device)
    if not why:
        return True
    if _implementation == "native":
        raise RuntimeError(f"native operators were asked for on {device.type}, but {why}")
    if _implementation == "auto" and device.type not in _reported:
        _reported.add(device.type)
        if os.environ.get("RANK", "0") == "0":
            print(f"rmega: operators on {device.type} run in plain torch: {why}", file=sys.stderr)
    return False


def native_operator(name: str, fake):
    """``torch.ops.rmega.<name>``, given its shape-only kernel; csrc/autograd.cpp has the real ones,
    and derivatives."""
    if _C is None or not hasattr(torch.ops.rmega, name):
        return None
    if fake is not None:
        torch.library.register_fake(f"rmega::{name}", fake)
    # The overload itself: finding it at each call takes a microsecond.
    return getattr(torch.ops.rmega, name).default


def runs_native_elementwise(x: Tensor) -> bool:
    """:func:`runs_native` of an elementwise operator, which has to know the dtype of ``x``."""
    return x.dtype in _ELEMENTWISE.get(x.device.type, ()) and runs_native(x.device)


def active_elementwise(device: torch.device, dtype: torch.dtype) -> str:
    """``"native"`` or ``"torch"``: what norm, rotation and activation run for tensors of this
    device and dtype."""
    return (
        "native" if runs_native_elementwise(torch.empty(0, device=device, dtype=dtype)) else "torch"
    )
