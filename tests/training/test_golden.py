"""A short loss curve of each family, held in text files: no change may move it by more than 1e-4
unnoticed.

Weights and comparisons come from numpy's seeded generators, so the curve is the same on every
machine and release. A change that moves it on purpose writes the files again and says why:

    python -m tests.training.test_golden
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist import run_distributed
from tests.hf_fixtures import FAMILIES, hf_config, is_norm, tiny, write_folder
from tests.tiny import VOCAB, InMemory, random_comparisons

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 8
TOLERANCE = 1e-4


def model_folder(folder: Path, family: str) -> Path:
    """A random reward model whose weights numpy draws."""
    from rmega.models import BACKBONES
    from rmega.models.weights import hf_shapes

    geometry = tiny(
        family,
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=256,
    )
    rng = np.random.default_rng(20)
    tensors = {}
    for name, shape in hf_shapes(BACKBONES[family].weight_table(geometry)).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        scale = 0.5 if "embed" in name else 0.8 / shape[-1] ** 0.5
        tensors[name] = torch.from_numpy(
            1 + 0.2 * values if is_norm(name) else np.float32(scale) * values
        )
    return write_folder(
        folder, hf_config(geometry, BACKBONES[family].architecture, num_labels=1), tensors
    )


def curve(rank: int, world_size: int, folder: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on one rank."""
    from rmega.training.parity import Layout, layout_config, run_layout

    torch.set_float32_matmul_precision("highest")
    config = layout_config(
        Layout.parse("1"),
        hf_model=folder,
        steps=STEPS,
        global_batch_size=12,
        max_tokens=400,
        lr=5e-4,
    )
    result = run_layout(config, InMemory(random_comparisons(12, seed=21)))
    return list(zip(result.losses, result.grad_norms, strict=True))


def measure(family: str, folder: Path) -> list[tuple[float, float]]:
    return run_distributed(curve, 1, str(model_folder(folder, family)))[0]


def read(family: str) -> list[tuple[float, float]]:
    lines = (GOLDEN / f"{family}.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(map(float, line.split()[1:])) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_curve_is_the_golden_one(family: str, tmp_path: Path) -> None:
    golden, now = read(family), measure(family, tmp_path)
    assert len(golden) == STEPS and golden[-1][0] < golden[0][0]
    for step, (old, new) in enumerate(zip(golden, now, strict=True), start=1):
        assert new == pytest.approx(old, rel=TOLERANCE), (
            f"step {step} (loss, gradient norm): {new}, was {old}"
        )


def write() -> None:
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(family, Path(folder))
        lines = [
            "# step, loss, gradient norm; written by python -m tests.training.test_golden",
            *(f"{step} {loss:.8f} {norm:.8f}" for step, (loss, norm) in enumerate(rows, start=1)),
        ]
        (GOLDEN / f"{family}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {GOLDEN / f'{family}.txt'}")


if __name__ == "__main__":
    sys.exit(write())
