"""Reads the quick start's flags before anything is downloaded: paths that are not there, flags that
training has not.

python examples/quickstart_check.py MODEL DATA VALID NPROC TP LENGTH_FLAG LENGTH [flags of
pretrain_reward.py]
"""

from __future__ import annotations

import sys

from rmega.cli import parse_args, run_tool
from rmega.config import TrainingConfig

OWN = (
    "--model",
    "--data",
    "--valid-data",
    "--output",
    "--steps",
    "--epochs",
    "--max-length",
    "--nproc",
    "--tp",
)


def main(argv: list[str]) -> None:
    model, data, valid, nproc, tp, length_flag, length, *extra = argv
    tp = tp or (
        "1" if nproc and int(nproc) % 2 else "2"
    )  # as quickstart.sh chooses, where it can be known by now
    flags = [
        "--hf-model",
        model or "demo",
        "--data-path",
        "demo",
        "--tp",
        tp,
        "--global-batch-size",
        "16",
        length_flag,
        length,
        *extra,
    ]
    config = parse_args(TrainingConfig, flags, prog="examples/quickstart.sh", also=OWN)
    shards = (
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    )
    config.check(int(nproc) if nproc else shards * (config.parallel.data_parallel_size or 1))
    from rmega.hub import check_folder_or_hub_name
    from rmega.preferences.resolve import resolve

    if model:
        check_folder_or_hub_name(model, "--model")
    for flag, value in (("--data", data), ("--valid-data", valid)):
        if value:
            resolve([value], flag=flag)


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
