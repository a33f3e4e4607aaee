"""Rewards of comparisons -> metrics and findings.

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
from rmega.data.indexed import response_pairs
from rmega.evaluation.benchmarks import reward_bench_2_report, reward_bench_report, rm_bench_report

if TYPE_CHECKING:
    from rmega.preferences.comparison import Comparison

NUM_WORST = 20
MAX_LOGGED_SOURCES = 32


@dataclass(kw_only=True, slots=True)
class ScoredComparison:
    """One comparison and what a model made of it. Arrays are [k], in the order of the responses."""

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
    length = metrics.length_report(d, pairs.chosen_length, pairs.rejected_length)
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
        "calibration": metrics.calibration(d),
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
    length, calibration = result["length"], result["calibration"]
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
        "ece": calibration["ece"],
        "brier": calibration["brier"],
        "log_loss": calibration["log_loss"],
        "temperature": calibration["temperature"],
        "length_gap": length["gap"],
        "length_spearman": length["spearman_within"],
        "always_longer": length["always_longer"],
        "length_controlled_accuracy": length["controlled_accuracy"],
    }
    if 1 < len(result["by_source"]) <= MAX_LOGGED_SOURCES:
        flat |= {f"accuracy/{name}": row["accuracy"] for name, row in result["by_source"].items()}
    flat |= {key: result[key] for key in ("reward_mean", "reward_std") if key in result}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in flat.items()}


# ---- findings

FEW = 20  # pairs on one side below which a difference of accuracies is not worth a word


def length_flag(length: dict[str, Any]) -> str:
    """ "none", "mild", "strong", or "unknown" (fewer than ``FEW`` pairs on a side and no clear
     correlation).

    Strong: accuracy differs by 0.3 or more between pairs whose chosen is the longer and those whose
    chosen is the shorter, or the reward differences follow the length differences (Spearman 0.7).
    Mild: by 0.1 or more. The 95 % interval of the difference must exclude 0. The correlation needs
    ``FEW`` pairs of unequal length, and once more from pairs counted in one direction only, whose
    95 % interval must exclude 0.5: of pairs that all have the longer response chosen, any accurate
    model shows the former.
    """
    if (
        abs(length["spearman_within"]) >= 0.7
        and _num_unequal(length) >= FEW
        and (length["spearman_pairs_low"] > 0.5 or length["spearman_pairs_high"] < -0.5)
    ):
        return "strong"
    if min(length["chosen_longer"]["num_pairs"], length["chosen_shorter"]["num_pairs"]) < FEW:
        return "unknown"
    if length["gap_low"] <= 0 <= length["gap_high"] or abs(length["gap"]) < 0.1:
        return "none"
    return "strong" if abs(length["gap"]) >= 0.3 else "mild"


def _num_unequal(length: dict[str, Any]) -> int:
    return length["chosen_longer"]["num_pairs"] + length["chosen_shorter"]["num_pairs"]


def percent(x: float | None, digits: int = 1) -> str:
    """0.2721 -> "27.2 %"; NaN and None -> "-"."""
    return "-" if x is None or math.isnan(x) else f"{100 * x:.{digits}f} %"


def finding(about: str, level: str, text: str) -> dict[str, str]:
    """A plain sentence; level: good, warn, bad or note."""
    return {"about": about, "level": level, "text": text}


def findings(j: dict[str, Any]) -> list[dict[str, str]]:
    """``finding``s, most important first."""
    if not j["num_pairs"]:
        return [
            finding(
                "accuracy",
                "bad",
                "No pair to evaluate: no two responses of one prompt have different scores.",
            )
        ]
    return [_accuracy_finding(j), _length_finding(j), _calibration_finding(j), *_other_findings(j)]


def _accuracy_finding(j: dict[str, Any]) -> dict[str, str]:
    low, high, n = j["accuracy_low"], j["accuracy_high"], j["num_pairs"]
    text = (
        f"The chosen response gets the higher reward in {percent(j['accuracy'])} of {n:,} pairs "
        f"(95 % interval {100 * low:.1f} to {percent(high)})."
    )
    longer = j["length"]["always_longer"]
    rule, best = ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)
    if high < 0.5:
        level, more = (
            "bad",
            "That is worse than chance: the rewards point the wrong way on this data.",
        )
    elif low <= 0.5:
        level, more = "bad", "That is not distinguishable from chance."
        if n < 100:
            level, more = "warn", "Too few pairs to tell it from chance."
    elif low <= best:
        level = "warn"
        more = f'The rule "the {rule} response wins" gets {percent(best)} without reading a word.'
    else:
        level, more = "good", f"The best rule that reads length alone gets {percent(best)}."
    return finding("accuracy", level, f"{text} {more}")


def _length_finding(j: dict[str, Any]) -> dict[str, str]:
    length, flag = j["length"], length_flag(j["length"])
    longer, shorter = length["chosen_longer"], length["chosen_shorter"]
    sides = [
        f"{percent(side['accuracy'])} where {{}} is the {word} one"
        for side, word in ((longer, "longer"), (shorter, "shorter"))
        if side["num_pairs"]
    ]
    numbers = (
        f"accuracy is {' and '.join(sides).format('the chosen response', 'it')}; always taking the"
        f" longer would give {percent(length['always_longer'])}; at equal length the accuracy would"
        f" be about {percent(length['controlled_accuracy'])}"
    )
    if flag == "unknown":
        few = min(longer["num_pairs"], shorter["num_pairs"])
        side = "shorter" if shorter["num_pairs"] == few else "longer"
        return finding(
            "length",
            "note",
            f"Length bias cannot be assessed: the chosen response is the {side} one in "
            f"{f'only {few:,} pair' if few else 'no pair'}{'s' if few > 1 else ''}.",
        )
    if flag == "none":
        # a wide difference of few pairs proves nothing
        word = (
            "No length bias to speak of"
            if abs(length["gap"]) < 0.1
            else "No length bias beyond what chance explains (few pairs)"
        )
        return finding(
            "length", "good" if abs(length["gap"]) < 0.1 else "note", f"{word}: {numbers}."
        )
    strong = flag == "strong"
    leans = length["gap"] if not math.isnan(length["gap"]) else length["spearman_within"]
    return finding(
        "length",
        "bad" if strong else "warn",
        f"{'Strong length' if strong else 'Some length'} bias, towards "
        f"{'longer' if leans > 0 else 'shorter'} responses: {numbers}.",
    )


def _calibration_finding(j: dict[str, Any]) -> dict[str, str]:
    c = j["calibration"]
    t, head = c["temperature"], f"expected calibration error {c['ece']:.3f}"
    if t is None:
        why = {
            "no signal": (
                "the margins carry no usable confidence (on average the rejected response scores at"
                " least as high)"
            ),
            "no errors": "no error to calibrate against",
        }[c["reason"]]
        return finding(
            "calibration",
            "warn" if c["reason"] == "no signal" else "note",
            f"Calibration cannot be fitted: {why}; {head}.",
        )
    # the temperature is fitted to the likelihood: that need not lower the calibration error
    fitted = (
        f"dividing rewards by {t:.3g} would fit best, calibration error then {c['ece_scaled']:.3f}"
        if round(c["ece_scaled"], 3) < round(c["ece"], 3)
        else "no fitted temperature lowers it"
    )
    sure = c["low"] <= 1 <= (c["high"] or math.inf)
    if sure or 0.8 <= t <= 1.25 or c["ece"] <= 0.03:
        return finding("calibration", "good", f"Well calibrated: {head}; {fitted}.")
    word = "Overconfident" if t > 1 else "Underconfident"
    return finding("calibration", "warn", f"{word}: {head}; {fitted}.")


def _other_findings(j: dict[str, Any]) -> list[dict[str, str]]:
    out = []
    if j["num_ties"] > 0.01 * j["num_pairs"]:
        out.append(
            finding(
                "ties",
                "warn",
                f"{j['num_ties']:,} of {j['num_pairs']:,} pairs have equal rewards; each counts"
                " as half right. Rewards stored with few digits do that.",
            )
        )
    if j["prompt"]["share_of_variance"] > 0.95:
        out.append(
            finding(
                "prompt",
                "warn",
                f"{percent(j['prompt']['share_of_variance'])} of the reward's variance lies"
                " between prompts: the response itself moves the reward little.",
            )
        )
    swap = j["swap"]
    if abs(swap["accuracy"] + j["accuracy"] - 1) > 1e-9:
        out.append(
            finding(
                "swap",
                "bad",
                "Accuracy and accuracy with chosen and rejected swapped "
                "do not add up to one: the metric is broken.",
            )
        )
    if "changed_share" in swap:
        good = swap["changed_share"] <= 0.005
        text = (
            f"Scored again with the responses in reverse order, {percent(swap['changed_share'])} of"
            f" {swap['num_comparisons']:,} comparisons changed their order (largest difference of a"
            f" reward {swap['max_difference']:.2g})."
        )
        out.append(finding("swap", "good" if good else "bad", text))
    prompt = j["prompt"]
    if "blank_accuracy" in prompt:
        good = abs(prompt["blank_accuracy"] - 0.5) < 1e-9
        out.append(
            finding(
                "prompt only",
                "good" if good else "bad",
                "With every response blanked the accuracy is"
                f" {percent(prompt['blank_accuracy'])} "
                + (
                    "(all ties), as it must be."
                    if good
                    else "and must be 50 %: something other than the response decides."
                ),
            )
        )
    if "shuffled_accuracy" in prompt:
        out.append(
            finding(
                "wrong prompt",
                "note",
                "With each pair of responses put under another pair's prompt the accuracy is"
                f" {percent(prompt['shuffled_accuracy'])} (own prompt:"
                f" {percent(prompt['own_accuracy'])} on the same {prompt['num_comparisons']:,}"
                " comparisons); the closer, the less the prompt matters to the model.",
            )
        )
    return out


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
