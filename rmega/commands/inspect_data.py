"""Look into a preference dataset.

python tools/inspect_data.py PREFIX: counts, lengths, savings, heuristics.

python tools/inspect_data.py PREFIX show 0 17: comparisons as text.

python tools/inspect_data.py PREFIX verify: checksums, bounds, fingerprint.

python tools/inspect_data.py PREFIX report --output page.html: one page with plots.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from rmega.cli import parse_args, run_tool
from rmega.config import NONE


@dataclasses.dataclass(kw_only=True)
class InspectArgs:
    prefix: Positional[str]
    """The dataset, without suffix."""
    action: Positional[Literal["stats", "show", "verify", "report"]] = "stats"
    """What to do."""
    rest: Annotated[Positional[list[str]], NONE] = dataclasses.field(default_factory=list)
    """show: numbers of comparisons (from 0)."""
    tokenizer: str | None = None
    """Folder of the tokenizer; default: the one the dataset was written with, if it is still
    there."""
    output: str | None = None
    """report: the HTML file."""
    force: bool = False
    """Replace an existing output."""
    json: bool = False
    """stats: print JSON."""
    color: Literal["auto", "always", "never"] = "auto"
    """show: colors."""


READ_BY = {
    "tokenizer": ("show", "verify", "report"),
    "output": ("report",),
    "force": ("report",),
    "json": ("stats",),
    "color": ("show",),
}
"""Which actions read a flag."""


def main(args: InspectArgs) -> int:
    from rmega.data.indexed import open_preferences
    from rmega.data.stats import describe, show, summarize

    if args.rest and args.action != "show":
        raise ValueError(f"{args.action}: takes no further arguments ({' '.join(args.rest)})")
    for name, actions in READ_BY.items():
        if getattr(args, name) != getattr(InspectArgs, name) and args.action not in actions:
            raise ValueError(
                f"--{name} has no effect on {args.action}, only on {', '.join(actions)}"
            )
    dataset = open_preferences(args.prefix)
    if args.action == "stats":
        summary = summarize(dataset)
        print(json.dumps(summary, indent=1) if args.json else "\n".join(describe(summary)))
    elif args.action == "show":
        tokenizer = tokenizer_of(args.tokenizer, dataset.manifest, needed=True)
        color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
        for number in args.rest or ["0"]:
            if not number.isdigit():
                raise ValueError(f"show {number}: not the number of a comparison")
            print("\n".join(show(dataset, int(number), tokenizer, color=color)))
    elif args.action == "verify":
        from rmega.data.integrity import verify

        tokenizer = tokenizer_of(args.tokenizer, dataset.manifest, needed=False)
        wrong = verify(dataset, tokenizer)
        checked = (
            "fingerprint of the tokenizer" if tokenizer else "tokenizer missing, fingerprint not"
        )
        sound = f"{args.prefix}: sound ({len(dataset):,} comparisons; {checked} checked)"
        print("\n".join(wrong) or sound)
        return 1 if wrong else 0
    else:
        from rmega.report.dataset import write_dataset_report

        output = Path(args.output or f"{args.prefix}.html")
        if output.exists() and not args.force:
            raise ValueError(f"--output {output}: exists already; --force replaces it")
        tokenizer = tokenizer_of(args.tokenizer, dataset.manifest, needed=False)
        write_dataset_report(output, dataset, tokenizer)
        print(output)
    return 0


def tokenizer_of(name: str | None, manifest: dict[str, Any], *, needed: bool) -> Any:
    """The transformers tokenizer, or None if it is not there and not needed."""
    wanted = name or manifest.get("tokenizer")
    if not wanted or (name is None and not os.path.isdir(wanted)):
        if needed:
            raise ValueError(
                f"--tokenizer: {wanted or 'the tokenizer'} is not here; name its folder"
            )
        return None
    from rmega.preferences.load_tokenizer import load_tokenizer

    return load_tokenizer(wanted)


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main, parse_args(InspectArgs, description=__doc__))
