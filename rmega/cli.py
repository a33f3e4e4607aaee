"""Command-line parsing and exit codes of the programs.

Imports neither torch nor megatron-core, so that ``--help`` answers at once on a login node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro

T = TypeVar("T")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    also: Sequence[str] = (),
) -> T:
    """Read flags into the dataclass ``cls`` (nested groups are flattened: ``--lr``, not
    ``--optimizer.lr``).

    A field's docstring is its help text. Ends the program with exit code 2 on a flag that is
    unknown or malformed, with a last line that names the flag which may have been meant: also one
    of ``also``, which the caller reads itself. The last value of a repeated flag counts, as a
    script's ``"$@"`` needs it, but a list is given once.
    """
    # tools/score.py whatever the current folder; an installed program by its name
    called = Path(sys.argv[0])
    prog = prog or (
        called.name if called.name.startswith("rmega-") else "/".join(called.parts[-2:])
    )
    speaks = os.environ.get("RANK", "0") == "0"
    given = [_at_home(text) for text in (sys.argv[1:] if argv is None else argv)]
    if message := _value_lost(cls, given):
        if speaks:
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
    try:
        return tyro.cli(
            cls,
            args=given,
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=speaks,
        )
    except SystemExit as end:
        if end.code == 2 and speaks:
            for line in hints(cls, given, also):
                print(line, file=sys.stderr)
        try:
            sys.stdout.flush()  # of --help; not at the very end, where nobody catches an error
        except BrokenPipeError:
            _drop_stdout()
        raise
    except BrokenPipeError:
        _drop_stdout()
        raise SystemExit(0) from None


def _at_home(text: str) -> str:
    """With ``~`` at the beginning of the value expanded: shells leave that of ``--flag=~/x``."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return flag + equals + os.path.expanduser(value) if value[:2] in ("~", "~/") else text


def _value_lost(cls: type, argv: Sequence[str]) -> str:
    """What argparse would accept silently although a value is missing or would be lost: an empty
    text (an unset shell variable), a list without values, a list given twice. "" if nothing."""
    lists = {flag for flag, kind, _ in _fields(cls) if get_origin(kind) in (list, tuple)}
    given = set()
    for i, text in enumerate(argv):
        name, equals, value = text.partition("=")
        flag = name.replace("_", "-") if name.startswith("--") else ""
        if not text or (flag and equals and not value):
            return f"{flag or (argv[i - 1] if i else 'argument 1')}: the value is empty"
        if flag not in lists:
            continue
        if flag in given:
            return f"{flag}: given twice; write all its values after one {flag}"
        given.add(flag)
        if not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            return f"{flag}: needs at least one value"
    return ""


def _drop_stdout() -> None:
    """Discard further output: the reader of standard output, such as head, has closed it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_ELSEWHERE = {
    "--learning-rate": "--lr",
    "--bf16": "--precision bf16|--dtype",
    "--fp16": "--precision fp16|--dtype",
    "--per-device-train-batch-size": "--global-batch-size",
    "--train-batch-size": "--global-batch-size",
    "--micro-batch-size": "--max-tokens-per-microbatch",
    "--batch-size": "--global-batch-size",
    "--gradient-accumulation-steps": "--global-batch-size",
    "--epochs": "--train-epochs",
    "--num-train-epochs": "--train-epochs",
    "--max-epochs": "--train-epochs",
    "--max-steps": "--train-steps",
    "--train-iters": "--train-steps",
    "--steps": "--train-steps",
    "--output-dir": "--save|--output",
    "--save-path": "--save",
    "--model-name-or-path": "--hf-model|--model",
    "--pretrain": "--hf-model",
    "--model": "--hf-model",
    "--resume-from-checkpoint": "--load",
    "--warmup-ratio": "--lr-warmup-fraction",
    "--lr-scheduler-type": "--lr-decay-style",
    "--max-grad-norm": "--clip-grad",
    "--logging-steps": "--log-interval",
    "--eval-steps": "--eval-interval",
    "--save-steps": "--save-interval",
    "--save-total-limit": "--keep-last",
    "--gradient-checkpointing": "--recompute full",
    "--train-data": "--data-path",
    "--dataset": "--data-path",
    "--eval-data": "--valid-data-path",
    "--report-to": "--tensorboard",
}
"""What other trainers call the flags of this one (or of its tools)."""


def hints(cls: type, argv: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """A line for each flag in ``argv`` that ``cls`` has not, where one that it has may have been
    meant."""
    known, lines = [*also, *_flags(cls)], []
    for given in dict.fromkeys(
        text.split("=")[0] for text in argv if text.startswith("--") and len(text) > 2
    ):
        flag = given.replace("_", "-")
        if flag in known or flag in (
            "--help",
            "--tyro-print-completion",
            "--tyro-write-completion",
        ):
            continue
        meant = [
            other for other in _ELSEWHERE.get(flag, "").split("|") if other.split(" ")[0] in known
        ] or difflib.get_close_matches(flag, known, n=2, cutoff=0.75)
        if meant:
            lines.append(f"error: {given}: no such flag; did you mean {' or '.join(meant)}?")
    return lines


def _flags(cls: type) -> list[str]:
    """The flags that ``parse_args`` reads into the dataclass ``cls``."""
    found: list[str] = []
    for flag, kind, extras in _fields(cls):
        found.append(flag)
        if kind is bool:
            found.append(f"--no-{flag[2:]}")
        for more in extras:
            found += getattr(more, "aliases", None) or ()
    return found


def _fields(cls: type) -> Iterator[tuple[str, Any, tuple]]:
    """(flag, type, what annotates it) of each field of the dataclass ``cls`` and of its groups."""
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind)
            continue
        extras = getattr(kind, "__metadata__", ())
        yield f"--{name.replace('_', '-')}", kind.__origin__ if extras else kind, extras


def run_tool(main: Callable[..., Any], *args: Any) -> int:
    """Call ``main``; an error that the user can fix becomes one line on stderr and exit code 2,
    not a traceback.

    ``ValueError`` and ``OSError`` are the user's (design rule 7 of CONTRIBUTING.md: they name flag,
    file and line); everything else is ours and keeps its traceback.
    """
    try:
        code = int(main(*args) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
