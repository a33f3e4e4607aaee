"""Exports of small trained models, for the tests of other programs that read them."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import tiny_llama

MAX_LENGTH = 1024
"""Tokens of a conversation in the training, and so in the printed commands."""
KINDS = {
    "llama": ("llama", "llama"),
    "internlm2": ("llama", "internlm2"),
    "qwen3": ("qwen3", "auto"),
}
"""Name -> (family that is trained, --format of the export)."""


def make_base(folder: Path, family: str) -> Path:
    """A causal model with a chat template; its heads have 64 dimensions, as vLLM's kernels for
    processors ask for."""
    from tests.made_tokenizers import (
        INTERNLM2_ADDED,
        INTERNLM2_PIECES,
        make_internlm2_tokenizer,
        make_qwen_tokenizer,
    )

    if family == "qwen3":
        vocab = make_qwen_tokenizer(folder)
    else:
        make_internlm2_tokenizer(folder)
        vocab = INTERNLM2_PIECES + len(INTERNLM2_ADDED)
    return tiny_llama(
        folder,
        family=family,
        reward_head=False,
        layers=3,
        hidden=128,
        heads=2,
        groups=1,
        vocab=vocab + vocab % 2,
        max_position_embeddings=MAX_LENGTH,
    )


def make_export(folder: Path, kind: str = "llama", *, steps: int = 2) -> Path:
    """Train a small model for a moment and export it, verified, in float32."""
    from rmega.export.convert import convert
    from tests.dist import run_distributed
    from tests.runs import flags, make_data, train

    family, form = KINDS[kind]
    base = make_base(folder / "base", family)
    data = make_data(base, folder, count=24, max_length=MAX_LENGTH)
    options = {"steps": steps, "valid_data_path": f"held-out={data}"}
    assert run_distributed(train, 1, flags(base, data, folder / "run", **options)) == [0]
    assert convert(run=folder / "run", output=folder / "export", family=form) == 0
    return folder / "export"
