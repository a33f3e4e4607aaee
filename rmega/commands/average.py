"""Average the weights of several checkpoints or exports into one verified Hugging Face folder.

    python tools/average.py RUN_A RUN_B RUN_C --output FOLDER

Exit codes as of tools/convert_to_hf.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rmega.cli import parse_args, run_tool
from rmega.commands.export import WritingArgs


@dataclasses.dataclass(kw_only=True)
class AverageArgs(WritingArgs):
    """Write the mean of the weights of checkpoints or exports, computed in fp32, as a Hugging Face
    folder, and verify it."""

    parts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more: run folders (their newest checkpoints) or iter_ folders in them, or instead
    verified exports of rmega. They must come from one base model, with one tokenizer, chat
    template, reward and pad token."""
    output: str
    """Folder to write. The base model, one of the parts, a run, a checkpoint, and folders inside
    the last three are refused."""
    format: Literal["auto", "internlm2", "llama"] = "auto"
    """As of tools/convert_to_hf.py. An average of exports keeps their format."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(AverageArgs, argv, prog="tools/average.py", description=__doc__)
    if len(args.parts) < 2:
        raise ValueError(
            f"{' '.join(args.parts)}: two or more checkpoints or exports were expected"
        )
    from rmega.export.convert import convert

    first, *others = map(Path, args.parts)
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
