"""Train a reward model."""

from __future__ import annotations

from rmega.cli import parse_args
from rmega.config import TrainingConfig
from rmega.training.stopping import run_ranks


def main(argv: list[str] | None = None, *, prog: str | None = None) -> int:
    config = parse_args(TrainingConfig, argv, prog=prog)

    if config.parallel.dry_run:
        from rmega.training.dry_run import dry_run

        return dry_run(config)

    from rmega import distributed

    config.check(distributed.world_size())
    from rmega.training.run import train

    code = train(config)
    distributed.finish()
    return code


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_ranks(main)
