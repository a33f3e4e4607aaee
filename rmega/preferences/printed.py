"""What the preprocessing run prints: recognized schemas before, progress, counts after."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from rmega.data.indexed import open_preferences
from rmega.preferences.closest_schema import left_out
from rmega.preferences.comparison import REASONS, Comparison, Parsed, Rejected
from rmega.preferences.fitting import BROKEN_UP
from rmega.preferences.pairs import IMPLICIT_PROMPT

if TYPE_CHECKING:
    from rmega.preferences.reader import Plan
    from rmega.preferences.tokenizer import PairTokenizer
    from rmega.preferences.worker import Converter


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def announce(plans: list[Plan], tokenizer: PairTokenizer, converter: Converter) -> None:
    """Print what was recognized, with an example, before the work starts."""
    say(
        f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids; {tokenizer.reading}, pad id"
        f" {tokenizer.pad_token_id}"
    )
    shown: set[str] = set()
    for plan in plans:
        name = plan.schema.name if plan.schema else "--map"
        say(f"{plan.source.name}: {name}")
        if name in shown:
            continue
        shown.add(name)
        for row in plan.sample:
            with contextlib.suppress(Rejected, UnicodeEncodeError):
                if plan.schema is not None and plan.schema.groups_by:
                    _show_example(plan.schema.parse(row))
                else:
                    _show_example(converter.comparison(row, plan))
                break
        unused = _unused_columns(plan)
        if unused:
            say(f"    columns not used: {', '.join(unused)}"[:200])


class _Watched(dict):  # type: ignore[type-arg]
    """A row that records which columns are read."""

    def __init__(self, row: dict[str, Any], seen: set[str]) -> None:
        super().__init__(row)
        self._seen = seen

    def get(self, name: str, default: Any = None) -> Any:
        self._seen.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._seen.add(name)
        return super().__getitem__(name)


def _unused_columns(plan: Plan) -> list[str]:
    """Columns with values in the first rows that the schema does not read."""
    if plan.schema is None:
        return []
    seen = {"source", "subset", "domain"}
    for row in plan.sample:
        with contextlib.suppress(Rejected):
            plan.schema.parse(_Watched(row, seen))
    given = {name for row in plan.sample for name, value in row.items() if value is not None}
    return sorted(map(str, given - seen))


def _show_example(example: Parsed | Comparison) -> None:
    def short(text: str) -> str:
        text = " ".join(text.split())
        return text if len(text) <= 100 else f"{text[:97]}..."

    for message in example.prompt[-2:]:
        say(f"    {message['role']}: {short(message['content'])}")
    for score, response in zip(example.scores, example.responses, strict=True):
        if response and score is not None:
            say(f"    [{score:g}] {response[-1]['role']}: {short(response[-1]['content'])}")


def progress_bar(total: int) -> Any:
    """A bar over ``total`` bytes (0: unknown); few lines where stderr is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total or None,
        unit="B",
        unit_scale=True,
        mininterval=10 if quiet else 0.2,
        desc="tokenize",
        file=sys.stderr,
        dynamic_ncols=True,
    )


def report(manifests: list[dict[str, Any]], outputs: list[str], *, recognized: bool) -> None:
    """Print what was left out and why, what was changed, and what was written.

    recognized: the schema was not named with --format.
    """
    run = manifests[0]["input"]
    for reason, num in sorted(run["rejected"].items(), key=lambda item: (-item[1], item[0])):
        say(f"left out: {num:,} x {left_out(REASONS[reason], reason, run['missing'])}")
    if run["rejected"]:
        say(f"    listed with file and line in {outputs[0]}.rejected.jsonl")
    for note, num in sorted(run["notes"].items(), key=lambda item: (-item[1], item[0])):
        say(f"note: {num:,} x {note}")
    if run["notes"].get(BROKEN_UP, 0) * 2 > run["rows"]:
        say(
            "warning: most rows hold special-token text: a chat template seems to have been applied"
            " to them already. Better give the messages themselves (--format chatml reads"
            " <|im_start|> turns; --map for others)"
        )
    overlap = manifests[0]["holdout"]
    if overlap:
        say(
            f"held-out data: {overlap['prompts']:,} of its {overlap['held_out_prompts']:,} prompts"
            f" also occur here; their {overlap['comparisons']:,} comparisons are left out"
        )
    for manifest, output in zip(manifests, outputs, strict=True):
        tied = ""
        if manifest.get("ties") == "keep":
            tied = f", {open_preferences(output).num_tied_pairs:,} tied pairs"
        say(
            f"{output}: {manifest['num_comparisons']:,} comparisons, {manifest['num_pairs']:,}"
            f" pairs{tied}, {manifest['num_tokens']:,} tokens"
        )
    if recognized and run["notes"].get(IMPLICIT_PROMPT):
        say(
            "warning: where the prompt ends is a guess: words with which both responses begin count"
            " as the prompt. Name the prompt in a column of its own, or accept it with"
            " --format strings-with-prompt"
        )
