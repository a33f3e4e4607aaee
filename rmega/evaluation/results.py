"""Rewards of comparisons -> metrics, with the findings on them.

A result is a dict of plain values (``to_json`` writes it), so that the table, the page and a
training log read the same thing. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rmega import metrics
from rmega.data.pairs import response_pairs
from rmega.evaluation.benchmarks import reward_bench_2_report, reward_bench_report, rm_bench_report
from rmega.evaluation.calibration import calibration
from rmega.evaluation.findings import findings
from rmega.evaluation.length_bias import length_report

if TYPE_CHECKING:
    from rmega.preferences.comparison import Comparison

NUM_WORST = 20
MAX_LOGGED_SOURCES = 32


@dataclass(kw_only=True, slots=True)
class ScoredComparison:
    """One comparison and its rewards. Arrays are [k], in the order of the responses."""

    rewards: np.ndarray
    scores: np.ndarray
    """Scores given by people or by a model; only their order counts unless ``graded``."""
    graded: bool = False
    lengths: np.ndarray
    """Of the responses, in the unit that ``evaluate`` is told."""
    source: str = ""
    where: str = ""
    """File and row, or an id: what a person needs to find it again."""
    comparison: Comparison | None = None
    """The text, for the worst mistakes; a training log does without."""
    id: str = ""
    benchmark: str = ""
    """"rm-bench" (three chosen, then three rejected responses, each concise, detailed, detailed
    with markdown), "reward-bench-2" (its subset in ``source``, its id in ``id``), or ""."""


@dataclass(slots=True)
class Pairs:
    """All ordered pairs of a set of comparisons, as arrays [n]. ``comparison`` is the index of the
    ``ScoredComparison``."""

    comparison: np.ndarray
    chosen_reward: np.ndarray
    rejected_reward: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    margin: np.ndarray
    """Difference of the ratings; NaN where the comparison is not graded."""
    chosen: np.ndarray
    rejected: np.ndarray
    """Indices of the two responses within their comparison."""

    @property
    def d(self) -> np.ndarray:
        return self.chosen_reward - self.rejected_reward


def pairs_of(items: Sequence[ScoredComparison]) -> Pairs:
    """Every pair of responses whose scores differ, the better one first. Equal scores give no
    pair."""
    rows: list[tuple[float, ...]] = []
    for number, item in enumerate(items):
        for i, j in response_pairs(item.scores):
            rows.append(
                (
                    number,
                    item.rewards[i],
                    item.rewards[j],
                    item.lengths[i],
                    item.lengths[j],
                    item.scores[i] - item.scores[j] if item.graded else math.nan,
                    i,
                    j,
                )
            )
    columns = np.array(rows, dtype=np.float64).reshape(-1, 8).T
    return Pairs(
        columns[0].astype(np.int64),
        *columns[1:6],
        columns[6].astype(np.int64),
        columns[7].astype(np.int64),
    )


def evaluate(
    items: Sequence[ScoredComparison],
    *,
    length_unit: str = "characters",
    probes: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything about one set of comparisons. ``length_unit`` is a word for the reader.

    probes: of ``probes.probe_texts`` or ``token_probes.probe_stored``, where a model was at hand.

    Raises ValueError where a reward is not finite: a mean over the rest would hide it.
    """
    for item in items:
        if not np.isfinite(item.rewards).all():
            raise ValueError(f"{item.where}: a reward is not finite: {item.rewards.tolist()}")
    pairs = pairs_of(items)
    d = pairs.d
    length = length_report(d, pairs.chosen_length, pairs.rejected_length)
    rewards = [item.rewards for item in items]
    if items:
        flat = (
            np.concatenate(rewards),
            np.concatenate([item.lengths for item in items]).astype(np.float64),
        )
        length |= {"pearson": metrics.pearson(*flat), "spearman": metrics.spearman(*flat)}
    sources = np.array([items[i].source or "(none)" for i in pairs.comparison], dtype=str)
    many = [item for item in items if len(item.scores) > 2]
    swapped = metrics.accuracy(-d)
    out = {
        "num_comparisons": len(items),
        **metrics.accuracy(d, pairs.comparison),
        "chosen_score_mean": float(pairs.chosen_reward.mean()) if d.size else math.nan,
        "rejected_score_mean": float(pairs.rejected_reward.mean()) if d.size else math.nan,
        "length_unit": length_unit,
        "length": length,
        "calibration": calibration(d),
        "by_source": metrics.accuracy_by_group(d, sources, pairs.comparison),
        "by_margin": metrics.accuracy_by_margin(d, pairs.margin, pairs.comparison),
        "swap": {"accuracy": swapped["accuracy"], **(probes or {}).get("swap", {})},
        "prompt": {
            "share_of_variance": metrics.prompt_share(rewards),
            **(probes or {}).get("prompt", {}),
        },
        "ranked": (
            metrics.ranked_report([i.rewards for i in many], [i.scores for i in many])
            if many
            else None
        ),
        "reward_bench": reward_bench_report(d, sources),
        "reward_bench_2": reward_bench_2_report(
            *_columns(items, "reward-bench-2", "rewards", "scores", "source", "id")
        ),
        "rm_bench": rm_bench_report(*_columns(items, "rm-bench", "rewards", "source")),
    }
    out["findings"] = findings(out)
    return out


def _columns(items: Sequence[ScoredComparison], benchmark: str, *names: str) -> list[list[Any]]:
    """These fields of the rows of one benchmark, a list each."""
    return [
        [getattr(item, name) for item in items if item.benchmark == benchmark] for name in names
    ]


def stored_items(dataset: Any, rewards: np.ndarray) -> list[ScoredComparison]:
    """An open preference dataset and a model's rewards as input of ``evaluate``; without text.

    dataset: ``rmega.data.indexed.PreferenceDataset``. rewards: float [responses], all responses of
    all comparisons in the dataset's order. Lengths are tokens of the responses.
    """
    items, first = [], 0
    for i in range(len(dataset)):
        stored = dataset.get(i)
        k = len(stored.suffixes)
        items.append(
            ScoredComparison(
                rewards=np.asarray(rewards[first : first + k], dtype=np.float64),
                scores=np.asarray(stored.scores, dtype=np.float64),
                graded=bool(stored.graded),
                lengths=np.array([len(s) for s in stored.suffixes]),
                source=stored.source,
                where=f"comparison {i}",
            )
        )
        first += k
    if first != len(rewards):
        raise ValueError(f"{len(rewards)} rewards for {first} responses")
    return items


def flat_summary(result: dict[str, Any]) -> dict[str, float | int | None]:
    """The few numbers of a result that a training log keeps, flat; NaN becomes None.

    Where there are several sources (at most ``MAX_LOGGED_SOURCES``), also each one's accuracy, as
    "accuracy/SOURCE"; of a training's result also the mean and the spread of all rewards.
    """
    length, calibrated = result["length"], result["calibration"]
    flat = {
        key: result[key]
        for key in (
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "num_pairs",
            "num_ties",
            "mean_margin",
            "chosen_score_mean",
            "rejected_score_mean",
        )
    }
    flat |= {
        "ece": calibrated["ece"],
        "brier": calibrated["brier"],
        "log_loss": calibrated["log_loss"],
        "temperature": calibrated["temperature"],
        "length_gap": length["gap"],
        "length_spearman": length["spearman_within"],
        "always_longer": length["always_longer"],
        "length_controlled_accuracy": length["controlled_accuracy"],
    }
    if 1 < len(result["by_source"]) <= MAX_LOGGED_SOURCES:
        flat |= {f"accuracy/{name}": row["accuracy"] for name, row in result["by_source"].items()}
    flat |= {key: result[key] for key in ("reward_mean", "reward_std") if key in result}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in flat.items()}


def worst_mistakes(
    items: Sequence[ScoredComparison], count: int = NUM_WORST
) -> list[dict[str, Any]]:
    """The pairs the model got most wrong, by d, at most one per comparison; plain values and the
    text if known."""
    pairs = pairs_of(items)
    d = pairs.d
    out, seen = [], set()
    for n in np.argsort(d, kind="stable"):
        if d[n] >= 0 or len(out) == count:
            break
        number = int(pairs.comparison[n])
        if number in seen:
            continue
        seen.add(number)
        item, c, r = items[number], int(pairs.chosen[n]), int(pairs.rejected[n])
        comparison = item.comparison
        out.append(
            {
                "where": item.where,
                "source": item.source,
                "chosen_reward": float(item.rewards[c]),
                "rejected_reward": float(item.rewards[r]),
                "chosen_length": int(item.lengths[c]),
                "rejected_length": int(item.lengths[r]),
                "prompt": comparison.prompt if comparison else [],
                "chosen": comparison.responses[c] if comparison else [],
                "rejected": comparison.responses[r] if comparison else [],
            }
        )
    return out


def to_json(value: Any) -> Any:
    """Plain JSON values: NaN and infinities become null, numpy numbers become Python's."""
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_json(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
