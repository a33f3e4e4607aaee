"""Findings: what the metrics of an evaluation say, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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


def _other_findings(j: dict[str, Any]) -> Iterator[dict[str, str]]:
    if j["num_ties"] > 0.01 * j["num_pairs"]:
        yield finding(
            "ties",
            "warn",
            f"{j['num_ties']:,} of {j['num_pairs']:,} pairs have equal rewards; each counts as half"
            " right. Rewards stored with few digits do that.",
        )
    swap, prompt = j["swap"], j["prompt"]
    if prompt["share_of_variance"] > 0.95:
        yield finding(
            "prompt",
            "warn",
            f"{percent(prompt['share_of_variance'])} of the reward's variance lies between prompts:"
            " the response itself moves the reward little.",
        )
    if abs(swap["accuracy"] + j["accuracy"] - 1) > 1e-9:
        yield finding(
            "swap",
            "bad",
            "Accuracy and accuracy with chosen and rejected swapped do not add up to one: the"
            " metric is broken.",
        )
    if "changed_share" in swap:
        yield finding(
            "swap",
            "good" if swap["changed_share"] <= 0.005 else "bad",
            f"Scored again with the responses in reverse order, {percent(swap['changed_share'])} of"
            f" {swap['num_comparisons']:,} comparisons changed their order (largest difference of a"
            f" reward {swap['max_difference']:.2g}).",
        )
    if "blank_accuracy" in prompt:
        good = abs(prompt["blank_accuracy"] - 0.5) < 1e-9
        end = (
            "(all ties), as it must be."
            if good
            else "and must be 50 %: something other than the response decides."
        )
        yield finding(
            "prompt only",
            "good" if good else "bad",
            "With every response blanked the accuracy is"
            f" {percent(prompt['blank_accuracy'])} {end}",
        )
    if "shuffled_accuracy" in prompt:
        yield finding(
            "wrong prompt",
            "note",
            "With each pair of responses put under another pair's prompt the accuracy is"
            f" {percent(prompt['shuffled_accuracy'])} (own prompt:"
            f" {percent(prompt['own_accuracy'])} on the same {prompt['num_comparisons']:,}"
            " comparisons); the closer, the less the prompt matters to the model.",
        )
