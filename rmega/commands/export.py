"""Export a checkpoint to a verified Hugging Face folder.

    python tools/convert_to_hf.py --load RUN --output FOLDER

Reads any layout on one process without building the model. Exit code 0: written and verified; 1:
the verification failed, and the folder holds a file UNVERIFIED; 2: nothing was written, or a
verified folder was not uploaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rmega.cli import parse_args, run_tool


@dataclasses.dataclass(kw_only=True)
class WritingArgs:
    """How an export is written: flags of tools/convert_to_hf.py and tools/average.py."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype of the written weights. auto: the dtype that the (first) training computed in, or of
    the (first) export. Checkpoints hold fp32 weights: bfloat16 and float16 round them once, as each
    training step did; float32 rounds nothing."""
    max_shard_size: str = "5GB"
    """Maximum size of one file."""
    force: bool = False
    """Replace an older export, which is removed once the new one is verified. Folders that are not
    exports, and exports with added or edited files, are refused."""
    verify: bool = True
    """Compare every written value, and the rewards of stock transformers with those of the training
    code. --no-verify skips this, on machines too small to run the model, and marks the folder
    UNVERIFIED."""


@dataclasses.dataclass(kw_only=True)
class Args(WritingArgs):
    """Write a checkpoint as a Hugging Face folder, and verify that it gives the training's
    rewards."""

    load: str
    """Run folder (--save of the training), or one of its iter_ folders."""
    output: str
    """Folder to write. A run, a checkpoint, the base model, and folders inside them are refused."""
    iteration: str = "latest"
    """Which checkpoint of the run: a number, latest, or best (by accuracy on the first held-out
    set)."""
    format: Literal["auto", "internlm2", "llama", "adapter"] = "auto"
    """internlm2: InternLM2ForRewardModel with its code. llama: LlamaForSequenceClassification,
    which every serving engine loads without remote code. auto: the family that was trained. The
    same rewards either way. adapter: of a run with --lora-rank, the adapters and the reward head
    alone, as peft reads them (fp32); other formats merge them into the base model."""
    verify_only: bool = False
    """Write no weights: verify the export already in --output."""
    push_to_hub: str | None = None
    """Upload the verified folder to the Hugging Face hub as OWNER/NAME; a repository that is not
    there is made, private. Needs `hf auth login` or HF_TOKEN."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="tools/convert_to_hf.py")

    if args.verify_only:
        writing = [field.name for field in dataclasses.fields(WritingArgs)]
        for name in ("format", *writing):
            if getattr(args, name) != getattr(Args, name):
                flag = "no-verify" if name == "verify" else name.replace("_", "-")
                raise ValueError(f"--verify-only writes no weights: --{flag} does not go with it")
    if args.format == "adapter":
        for name, needed in (("dtype", ("auto", "float32")), ("max_shard_size", ("5GB",))):
            if (value := getattr(args, name)) not in needed:
                raise ValueError(
                    f"--format adapter writes one file in float32: --{name.replace('_', '-')}"
                    f" {value} does not go with it"
                )
    from rmega.export import convert

    load, output = Path(args.load), Path(args.output)
    if args.verify_only:
        return convert.verify_only(
            run=load, output=output, iteration=args.iteration, hub_name=args.push_to_hub
        )
    return convert.convert(
        run=load,
        output=output,
        iteration=args.iteration,
        dtype=args.dtype,
        family=args.format,
        max_shard_size=args.max_shard_size,
        force=args.force,
        verify=args.verify,
        hub_name=args.push_to_hub,
    )


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main)
