"""Report on a training run: RUN/report.html.

One page with curves and findings that needs no network; may be called during the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rmega.cli import parse_args, run_tool


@dataclass(kw_only=True)
class ReportArgs:
    """Draw a training run from its metrics.jsonl."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run (its --save)."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["--out"])] = None
    """File to write the page to. Default: RUN/report.html."""


def main(args: ReportArgs) -> None:
    if not Path(args.run).is_dir():  # before what the page needs is asked for
        raise ValueError(f"{args.run}: no such folder")
    from rmega.report.training import write_run_report

    print(f"report: {write_run_report(args.run, args.output)}")


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main, parse_args(ReportArgs))
