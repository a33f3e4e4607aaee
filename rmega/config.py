"""Every training flag, its default and its meaning; and the one way in which programs read flags.

Imports neither torch nor megatron-core, so that ``--help`` answers at once on a login node.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse_args(cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None,
               description: str | None = None) -> T:
    """Read flags into the dataclass ``cls`` (nested groups are flattened: ``--lr``, not ``--optimizer.lr``).

    A field's docstring is its help text. Ends the program with exit code 2 on a flag that is unknown or malformed.
    """
    import tyro

    return tyro.cli(cls, args=argv, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))


def run_tool(main: Callable[..., Any], *args: Any) -> int:
    """Call ``main``; an error that the user can mend becomes one line on stderr and exit code 2, not a traceback.

    ``ValueError`` and ``OSError`` are the user's (law 7: they name flag, file and line); everything else is ours and
    keeps its traceback.
    """
    try:
        return int(main(*args) or 0)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
