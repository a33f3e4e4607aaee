"""Train a reward model. This file is the composition of a run: copy it to change what a run does.

    torchrun --nproc-per-node 2 examples/pretrain_reward.py --tp 2 --pp 1 --hf-model MODEL \\
        --data-path TRAIN_PREFIX --valid-data-path VALID_PREFIX --save RUN --train-epochs 1
"""

from __future__ import annotations

import sys

from rmega.cli import parse_args
from rmega.config import TrainingConfig
from rmega.training.stopping import run_ranks


def main(argv: list[str] | None = None) -> int:
    config = parse_args(TrainingConfig, argv, prog="examples/pretrain_reward.py")

    if config.parallel.dry_run:
        from rmega.training.plan import dry_run

        return dry_run(config)

    from rmega import distributed

    config.check(distributed.world_size())
    from rmega.training.run import Run

    code = 0
    with Run(config) as run:
        run.load_data()
        if not run.is_complete():
            run.build()
            run.restore_or_start()
            code = run.train()
    distributed.finish()
    return code


if __name__ == "__main__":
    sys.exit(run_ranks(main))
