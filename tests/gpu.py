"""Marks for tests that a GPU runs, and that a CPU runs with a stand-in or as it is."""

from __future__ import annotations

import pytest
import torch

ON_GPU = pytest.param(
    "cuda",
    id="gpu",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
ON_CPU = pytest.param("cpu", id="cpu")
