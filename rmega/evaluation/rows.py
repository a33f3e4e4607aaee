"""Data files -> comparisons that can be evaluated, with their file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rmega.evaluation.benchmarks import benchmark_of, rm_bench_domain
from rmega.evaluation.results import ScoredComparison
from rmega.preferences.closest_schema import left_out
from rmega.preferences.comparison import REASONS, Comparison, Message, Rejected
from rmega.preferences.reader import plan_input
from rmega.preferences.resolve import Input
from rmega.preferences.schemas import Schema, source_of

if TYPE_CHECKING:
    from rmega.evaluation.scores import ScoreRow


@dataclass(slots=True)
class EvalRow:
    """One row of a data file; ``comparison`` is None where it cannot be used (then ``reason``
    says why)."""

    comparison: Comparison | None
    id: str | None
    where: str
    reason: str = ""
    missing: str = ""
    """The column, where one is missing."""
    benchmark: str = ""
    """See ``benchmarks.benchmark_of``."""


@dataclass(slots=True)
class EvalSet:
    """The rows of one file (or one hub set), in order."""

    name: str
    label: str
    schema: str
    rows: list[EvalRow] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    """What was changed in how many responses to score them, such as cuts."""

    @property
    def usable(self) -> list[EvalRow]:
        """The rows that have a comparison."""
        return [row for row in self.rows if row.comparison is not None]

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> number of rows that cannot be used."""
        return dict(Counter(row.reason for row in self.rows if row.comparison is None))

    def summary(self) -> str:
        """One line for the terminal: how many comparisons, and what was left out and why."""
        used = len(self.usable)
        text = f"{self.name}: {used:,} comparisons (schema {self.schema})"
        if used < len(self.rows):
            text += "; left out: " + ", ".join(self.reasons())
        return text

    def reasons(self) -> list[str]:
        """ "3 fewer than two responses" for each reason for which rows were left out."""
        missing = Counter(row.missing for row in self.rows if row.missing)
        return [
            f"{n:,} {left_out(REASONS[r], r, missing)}" for r, n in sorted(self.left_out.items())
        ]


def read_eval_set(source: Input, format_name: str = "auto", limit: int | None = None) -> EvalSet:
    """All rows of one input (the first ``limit``). ValueError where no schema fits or no row can be
    used."""
    plan = plan_input(source, format_name, "--data")
    assert plan.schema is not None
    out = EvalSet(source.name, source.label, plan.schema.name)
    for number, row, _ in islice(plan.rows(), limit):
        out.rows.append(_eval_row(row, plan.schema, source, number))
    if not out.usable:
        reasons = ", ".join(out.reasons()) or "no rows"
        raise ValueError(f"--data {out.name}: nothing to evaluate ({reasons})")
    return out


def _eval_row(
    row: dict[str, Any] | Rejected, schema: Schema, source: Input, number: int
) -> EvalRow:
    where = f"{source.name}:{number}"
    if isinstance(row, Rejected):
        return EvalRow(None, None, where, row.reason)
    first = row["rows"][0] if schema.groups_by else row
    given = first.get("id")
    id_ = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else None
    try:
        comparison = schema.convert(row)
    except Rejected as rejected:
        return EvalRow(
            None,
            id_,
            where,
            rejected.reason,
            rejected.detail if rejected.reason == "missing_field" else "",
        )
    comparison.source = source_of(first, source.label)
    benchmark = benchmark_of(row, source.label) if schema.name == "many-against-many" else ""
    if benchmark == "rm-bench":  # its figures are by domain, whatever "source" or "subset" says
        comparison.source = rm_bench_domain(row, source.label)
    return EvalRow(comparison, id_, where, benchmark=benchmark)


def response_text(messages: Sequence[Message]) -> str:
    """The text of a response: the contents of its messages, a line between them."""
    return "\n".join(str(m.get("content", "")) for m in messages)


def scored(
    row: EvalRow, rewards: Sequence[float] | np.ndarray, length: Callable[[str], int]
) -> ScoredComparison:
    """A row and its rewards [k], in the order of ``row.comparison.responses``."""
    comparison = row.comparison
    assert comparison is not None
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(comparison.responses),):
        raise ValueError(
            f"{row.where}: {values.size} rewards for {len(comparison.responses)} responses"
        )
    lengths = np.array([length(response_text(r)) for r in comparison.responses])
    return ScoredComparison(
        rewards=values,
        scores=np.array(comparison.scores),
        graded=comparison.graded,
        lengths=lengths,
        source=comparison.source,
        where=row.where if row.id is None else f"{row.where} (id {row.id})",
        comparison=comparison,
        benchmark=row.benchmark,
        id=row.id or "",
    )


def rewards_in_order(row: EvalRow, given: ScoreRow) -> np.ndarray:
    """Scores in the order of the data row -> in the order of ``row.comparison.responses`` (best
    first)."""
    comparison = row.comparison
    assert comparison is not None
    k, scores = len(comparison.responses), given.scores
    if comparison.left_out and scores.size == k + len(comparison.left_out):
        scores = np.delete(scores, comparison.left_out)  # scores of all responses of the row
    if scores.size != k:
        raise ValueError(
            f"--scores {given.where}: {scores.size} scores for the {k} responses of {row.where}"
        )
    return scores if comparison.positions is None else scores[comparison.positions]
