"""Average the weights of several checkpoints into one verified Hugging Face folder.

    python tools/average.py RUN_A RUN_B RUN_C --output FOLDER

Exit codes as of tools/convert_to_hf.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rmega.cli import parse_args, run_tool


@dataclasses.dataclass(kw_only=True)
class AverageArgs:
    """Write the mean of checkpoints' weights, made in fp32, as a Hugging Face folder, and verify
    it."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more: run folders (their newest checkpoints) or iter_ folders in them. They
    must come from one base model, with one tokenizer, chat template, reward and pad token."""
    output: str
    """Folder to write: not a run, the base model, or in one of them."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the written weights, rounded once after averaging. auto: that of the first training's
    arithmetic."""
    format: Literal["auto", "internlm2", "llama"] = "auto"
    """As of tools/convert_to_hf.py."""
    max_shard_size: str = "5GB"
    """Largest size of one file."""
    force: bool = False
    """Replace an older export, once the new one is verified."""
    verify: bool = True
    """Compare every written value and the rewards of stock transformers with those of the averaged
    weights. --no-verify leaves the folder marked as UNVERIFIED."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(AverageArgs, argv, prog="tools/average.py", description=__doc__)
    if len(args.checkpoints) < 2:
        raise ValueError(f"{' '.join(args.checkpoints)}: two or more checkpoints were expected")
    from rmega.export.convert import convert

    first, *others = map(Path, args.checkpoints)
    return convert(
        run=first,
        output=Path(args.output),
        dtype=args.dtype,
        family=args.format,
        max_shard_size=args.max_shard_size,
        force=args.force,
        verify=args.verify,
        average_with=others,
    )


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main)
