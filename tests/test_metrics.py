"""Every number of an evaluation against published values, brute force, or a case whose answer is
known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rmega import metrics as m
from rmega.evaluation.benchmarks import (
    REWARD_BENCH,
    REWARD_BENCH_2,
    reward_bench_2_report,
    reward_bench_report,
    rm_bench_report,
    ties_report,
)
from rmega.evaluation.calibration import calibration, fit_temperature
from rmega.evaluation.findings import length_flag
from rmega.evaluation.length_bias import (
    length_controlled_accuracy,
    length_report,
    rank_correlation_interval,
)
from rmega.evaluation.results import (
    ScoredComparison,
    evaluate,
    flat_summary,
    pairs_of,
    stored_items,
    to_json,
    worst_mistakes,
)


def item(rewards, scores, lengths=None, **more) -> ScoredComparison:
    lengths = [10] * len(rewards) if lengths is None else lengths
    return ScoredComparison(
        rewards=np.array(rewards, float),
        scores=np.array(scores, float),
        lengths=np.array(lengths),
        **more,
    )


# ---- intervals


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(successes, n, low, high):
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    assert m.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges():
    assert m.wilson_interval(0, 0) == (0.0, 1.0)
    assert m.wilson_interval(5, 5)[1] == 1.0 and m.wilson_interval(0, 5)[0] == 0.0
    low, high = m.wilson_interval(2.5, 5)
    assert low + high == pytest.approx(1.0)
    for bad in ((6, 5), (-1, 5)):
        with pytest.raises(ValueError):
            m.wilson_interval(*bad)


@pytest.mark.parametrize(
    "a, b, low, high",
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_difference_published(a, b, low, high):
    # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
    difference, got_low, got_high = m.difference_interval((a[0], b[0]), (a[1], b[1]))
    assert difference == pytest.approx(a[0] / a[1] - b[0] / b[1])
    assert (got_low, got_high) == pytest.approx((low, high), abs=6e-5)


def test_accuracy_ties_and_swap():
    d = np.array([1.0, -2.0, 0.0, 3.0])
    got = m.accuracy(d)
    assert (got["accuracy"], got["num_ties"], got["mean_margin"]) == (0.625, 1, 0.5)
    assert got["accuracy"] + m.accuracy(-d)["accuracy"] == 1.0


def test_pairs_of_one_prompt_are_not_independent():
    # 50 prompts of 6 pairs that are right or wrong together: worth 50 pairs, not 300
    rng = np.random.default_rng(0)
    right = rng.random(50) < 0.6
    d = np.repeat(np.where(right, 1.0, -1.0), 6)
    clustered = m.accuracy(d, np.repeat(np.arange(50), 6))
    assert clustered["effective_pairs"] == pytest.approx(49, rel=0.03)
    plain = m.accuracy(d)
    assert plain["effective_pairs"] == 300
    assert clustered["accuracy_high"] - clustered["accuracy_low"] > 2 * (
        plain["accuracy_high"] - plain["accuracy_low"]
    )
    # pairs that know nothing of each other keep nearly their number
    free = m.accuracy(rng.normal(0.3, 1, 3000), np.repeat(np.arange(500), 6))
    assert free["effective_pairs"] > 2300
    # all right: as many as there are prompts
    assert m.accuracy(np.ones(300), np.repeat(np.arange(50), 6))["effective_pairs"] == 50


def test_by_group_and_margin():
    groups = m.accuracy_by_group(np.array([1.0, -1, 1]), np.array(["b", "b", "a"]))
    assert {k: v["accuracy"] for k, v in groups.items()} == {"a": 1.0, "b": 0.5}
    margin = np.array([0.8 - 0.6, 0.4 - 0.2, 1.0, math.nan])
    rows = m.accuracy_by_margin(np.array([1.0, -1, 1, 1]), margin)
    assert [(r["low"], r["num_pairs"], r["accuracy"]) for r in rows] == [
        (0.2, 2, 0.5),
        (1.0, 1, 1.0),
    ]
    many = m.accuracy_by_margin(np.ones(100), np.arange(100) / 7)
    assert len(many) == 5 and sum(r["num_pairs"] for r in many) == 100
    assert all(a["high"] < b["low"] for a, b in zip(many, many[1:], strict=False))
    assert m.accuracy_by_margin(np.ones(3), np.full(3, math.nan)) == []


# ---- correlation


def test_correlations():
    # the examples of scipy.stats' own documentation
    assert m.spearman(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7])) == pytest.approx(
        0.8207826816681233
    )
    x, y = np.array([12, 2, 1, 12, 2]), np.array([1, 4, 7, 1, 0])
    assert m.kendall_tau_b(x, y) == pytest.approx(-0.47140452079103173)
    x = np.random.default_rng(1).normal(size=(2, 50))
    assert m.pearson(*x) == pytest.approx(np.corrcoef(x)[0, 1])
    assert m.ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert math.isnan(m.pearson(np.ones(4), np.arange(4.0))) and math.isnan(
        m.kendall_tau_b(np.ones(3), np.arange(3))
    )


# ---- length


def test_length_controlled_accuracy_solves_its_equations():
    rng = np.random.default_rng(2)
    delta = rng.normal(size=400) * 100
    d = rng.normal(0.5, 1, 400) + delta / 150
    value, low, high = length_controlled_accuracy(d, delta, ridge=0.0)
    assert low < value < high
    # brute force over the two coefficients
    y, x = m.correct(d), np.tanh(delta / delta.std())
    a, b = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 3, 61), indexing="ij")
    z = a[..., None] + b[..., None] * x
    loss = (np.logaddexp(0, z) - y * z).sum(-1)
    best = np.unravel_index(loss.argmin(), loss.shape)
    assert value == pytest.approx(1 / (1 + math.exp(-a[best])), abs=4e-3)


def test_length_report_of_known_models():
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(10, 1000, 3000), rng.integers(10, 1400, 3000)
    blind = length_report((chosen - rejected).astype(float), chosen, rejected)
    assert (
        blind["chosen_longer"]["accuracy"],
        blind["chosen_shorter"]["accuracy"],
        blind["gap"],
    ) == (1.0, 0.0, 1.0)
    assert blind["balanced_accuracy"] == 0.5 and blind["prefers_longer"] == 1.0
    assert blind["controlled_accuracy"] == pytest.approx(0.5, abs=0.06)
    assert blind["pearson_within"] == pytest.approx(1.0) and length_flag(blind) == "strong"
    fair = length_report(rng.normal(0.5, 1, 3000), chosen, rejected)
    assert length_flag(fair) == "none" and fair["gap_low"] < 0 < fair["gap_high"]
    assert fair["controlled_accuracy"] == pytest.approx(0.69, abs=0.03)
    perfect = length_report(np.ones(3000), chosen, rejected)
    assert length_flag(perfect) == "none" and perfect["controlled_accuracy"] > 0.99
    likes_short = length_report(
        rng.normal(0.5, 1, 3000) - (chosen - rejected) / 1000, chosen, rejected
    )
    assert likes_short["gap"] < -0.1 and length_flag(likes_short) in ("mild", "strong")
    # which of the two was chosen plays no part in the correlation
    d = rng.normal(size=3000)
    flip = np.where(rng.random(3000) < 0.5, 1, -1)
    once = length_report(d, chosen, rejected)["spearman_within"]
    other = np.where(flip > 0, chosen, rejected), np.where(flip > 0, rejected, chosen)
    assert length_report(d * flip, *other)["spearman_within"] == pytest.approx(once)


def test_length_bias_unknown_on_one_side():
    n = 200
    report = length_report(np.random.default_rng(0).normal(0.5, 1, n), np.full(n, 9), np.full(n, 5))
    assert length_flag(report) == "unknown" and report["chosen_shorter"]["num_pairs"] == 0


@pytest.mark.parametrize("n, delta", [(4, [5.0, 3.0, 8.0, 1.0]), (19, np.arange(1.0, 20.0))])
def test_a_handful_of_pairs_shows_no_length_bias(n, delta):
    delta = np.asarray(delta)
    report = length_report(delta, 10 + delta, np.full(n, 10))  # a scorer that reads length alone
    assert report["spearman_within"] == pytest.approx(1.0) and length_flag(report) == "unknown"


def test_a_side_without_pairs_has_no_accuracy_in_the_findings():
    from rmega.evaluation.results import ScoredComparison, evaluate

    def said(n):
        items = [
            ScoredComparison(
                rewards=np.array([float(i), 0.0]),
                scores=np.array([1.0, 0.0]),
                lengths=np.array([10 + i, 9]),
            )
            for i in range(1, n + 1)
        ]
        return next(v["text"] for v in evaluate(items)["findings"] if v["about"] == "length")

    assert (
        said(4)
        == "Length bias cannot be assessed: the chosen response is the shorter one in no pair."
    )
    assert said(60).startswith("Strong length bias, towards longer") and " - where" not in said(60)


def test_an_accurate_model_on_longer_chosen_responses_is_not_biased_by_that_alone():
    rng = np.random.default_rng(1)
    d, delta = (
        rng.exponential(1, 500),
        rng.exponential(100, 500),
    )  # always right, by amounts that length does not tell
    report = length_report(d, 10 + delta, np.full(500, 10.0))
    assert report["spearman_within"] > 0.7 and length_flag(report) == "unknown"
    assert length_flag(length_report(delta + 20 * d, 10 + delta, np.full(500, 10.0))) == "strong"


def test_rank_correlation_interval_covers():
    """Of a bivariate normal, whose Spearman correlation is known: 6 / pi asin(r / 2)."""
    rng, r, n, hits = np.random.default_rng(2), 0.6, 40, 0
    true = 6 / math.pi * math.asin(r / 2)
    for _ in range(1000):
        x = rng.normal(size=n)
        low, high = rank_correlation_interval(
            m.spearman(x, r * x + math.sqrt(1 - r * r) * rng.normal(size=n)), n
        )
        hits += low <= true <= high
    assert 925 <= hits <= 975
    assert rank_correlation_interval(0.9, 3) != (0.9, 0.9) and rank_correlation_interval(
        1.0, 9
    ) == (1.0, 1.0)


# ---- calibration


def test_calibration_of_a_calibrated_model():
    rng = np.random.default_rng(4)
    d = rng.normal(0, 2, 40000)
    d *= np.where(rng.random(d.size) < 1 / (1 + np.exp(-d)), 1, -1)  # right as often as it says
    report = calibration(d)
    assert report["ece"] < 0.01 and report["temperature"] == pytest.approx(1, abs=0.04)
    assert report["low"] < 1 < report["high"]
    hot = calibration(3 * d)
    assert (
        hot["temperature"] == pytest.approx(3 * report["temperature"], rel=1e-6)
        and hot["ece"] > 0.08
    )
    assert hot["ece_scaled"] == pytest.approx(report["ece"], abs=0.005)


def test_calibration_by_hand():
    d = np.array([0.2, -0.2, 3.0, 3.0])
    s = 1 / (1 + np.exp(-np.abs(d)))
    report = calibration(d)
    assert report["ece"] == pytest.approx((2 * abs(0.5 - s[0]) + 2 * (1 - s[2])) / 4)
    assert report["brier"] == pytest.approx(((1 - s[0]) ** 2 + s[0] ** 2 + 2 * (1 - s[2]) ** 2) / 4)
    assert [b["num_pairs"] for b in report["reliability"]] == [2, 2]
    chance = calibration(np.zeros(7))
    assert (chance["ece"], chance["brier"]) == (0.0, 0.25) and chance["log_loss"] == pytest.approx(
        math.log(2)
    )


def test_temperature_is_the_minimum():
    d = np.random.default_rng(5).normal(0.7, 2, 500)
    t = fit_temperature(d)["temperature"]
    loss = [np.logaddexp(0, -d / x).mean() for x in (0.99 * t, t, 1.01 * t)]
    assert loss[1] < min(loss[0], loss[2])
    # a scale of the rewards only scales it, also where sigmoid(d) is all 0 and 1
    assert fit_temperature(1e6 * d)["temperature"] == pytest.approx(1e6 * t, rel=1e-6)
    assert fit_temperature(np.array([1.0, 2.0]))["reason"] == "no errors"
    assert fit_temperature(np.array([1.0, -2.0]))["reason"] == "no signal"
    assert fit_temperature(np.array([]))["reason"] == "no pairs"


# ---- more than two responses, prompts


def test_ranked():
    rewards = [
        np.array([3.0, 1, 2]),
        np.array([1.0, 1, 0]),
        np.array([5.0, 6]),
        np.array([0.0, 0, 0]),
    ]
    scores = [
        np.array([1.0, 0, 2]),
        np.array([1.0, 0, 0]),
        np.array([1.0, 1]),
        np.array([1.0, 0, 0]),
    ]
    got = m.ranked_report(rewards, scores)
    assert (got["num_prompts"], got["num_unordered"]) == (3, 1)
    assert got["best_of_n"] == pytest.approx((0 + 0.5 + 1 / 3) / 3) and got[
        "chance"
    ] == pytest.approx(1 / 3)
    assert got["num_tau"] == 2 and got["best_score"] == pytest.approx(4 / 3)
    assert got["kendall_tau_b"] == pytest.approx((1 / 3 + 0.5) / 2)


def test_prompt_share():
    assert m.prompt_share([np.array([1.0, 1]), np.array([3.0, 3])]) == 1.0
    assert m.prompt_share([np.array([1.0, 3]), np.array([3.0, 1])]) == 0.0


# ---- benchmarks


def test_rm_bench_against_loops():
    rng = np.random.default_rng(6)
    rewards = [rng.normal(size=6) for _ in range(30)]
    domains = ["chat"] * 10 + ["safety-refuse"] * 5 + ["safety-response"] * 15
    got = rm_bench_report(rewards, domains)

    def loops(rows):
        cells = {
            (i, j): np.mean([r[i] > r[3 + j] for r in rows]) for i in range(3) for j in range(3)
        }
        return {
            "easy": np.mean([v for (i, j), v in cells.items() if i > j]),
            "normal": np.mean([v for (i, j), v in cells.items() if i == j]),
            "hard": np.mean([v for (i, j), v in cells.items() if i < j]),
        }

    parts = {
        name: loops([r for r, d in zip(rewards, domains, strict=True) if d.startswith(name)])
        for name in ("chat", "safety")  # the rows of both safety parts are one domain's
    }
    for name, want in parts.items():
        assert {k: got["domains"][name][k] for k in want} == pytest.approx(want)
    for k in ("easy", "normal", "hard"):
        assert got[k] == pytest.approx((parts["chat"][k] + parts["safety"][k]) / 2)
    assert got["ties_half"] == pytest.approx({k: got[k] for k in got["ties_half"]})  # no tie
    ties = rm_bench_report([np.zeros(6)], ["chat"])
    assert (ties["average"], ties["ties_half"]["average"]) == (0.0, 0.5)
    # a model that loves markdown: easy is easy, hard is hopeless
    style = rm_bench_report([np.array([0.1, 1.1, 2.1, 0, 1, 2])], ["chat"])
    assert (style["easy"], style["normal"], style["hard"]) == (1.0, 1.0, 0.0)
    assert rm_bench_report([], []) is None


def test_reward_bench_sections():
    names = [s for section in REWARD_BENCH.values() for s in section]
    d = np.array([-1.0 if n == "math-prm" else 1.0 for n in names])
    got = reward_bench_report(d, np.array(names))
    assert (
        got["sections"] == {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.5}
        and got["overall"] == 0.875
    )
    refuses = np.array([-1.0 if n == "xstest-should-respond" else 1.0 for n in names])
    safety = reward_bench_report(refuses, np.array(names))["sections"]["Safety"]
    assert safety == pytest.approx((100 + 100 + 154 + 136) / (100 + 100 + 154 + 250 + 136))
    ties = reward_bench_report(np.zeros(len(names)), np.array(names))
    assert (ties["overall"], ties["ties_half"]["overall"]) == (0.0, 0.5)
    some = reward_bench_report(d[:5], np.array(names[:5]))
    assert (
        some["sections"]["Chat"] == 1
        and some["sections"]["Safety"] is None
        and some["overall"] is None
    )
    assert len(some["missing"]) == len(names) - 5
    assert reward_bench_report(np.ones(2), np.array(["a", "b"])) is None


def ties_rows(*rows):
    """(id, right rewards, wrong rewards) ... -> the arguments of ``ties_report``."""
    return (
        [np.array([*r, *w], float) for _, r, w in rows],
        [np.array([1.0] * len(r) + [0.0] * len(w)) for _, r, w in rows],
        [i for i, _, _ in rows],
    )


def test_ties_by_hand():
    got = ties_report(
        *ties_rows(
            ("tied:1", [5, 4.5, 4], [1, 0]),
            ("ref:1", [4], [2, 1]),  # gaps 3 and 2, spread 1: all right
            ("tied:2", [5, 3], [2, 1]),
            ("ref:2", [2], [1.5]),  # gaps 1 and 0.5, spread 2: solved, no more
            ("tied:3", [3, 2.5], [2]),
            ("ref:3", [1], [2]),  # gaps 0.5 and -1, spread 0.5: a draw is no win
            ("tied:4", [2, 2], [1]),
            ("ref:4", [0], [0]),  # spread 0 with gap 0: 0 / 0 counts 0
            ("ref:9", [3], [1]),
            ("7", [3], [1]),
        )
    )  # a reference without its twin; a plain id
    assert got["num_questions"] == 4
    assert got["tied_accuracy"] == 1.0 and got["ref_accuracy"] == 3 / 5  # of all that came this way
    assert got["preferred"] == 2 / 4 and got["preferred_hard"] == 1 / 4
    margin = (math.tanh(1) + math.tanh(0.25 - 1) + math.tanh(-3) + 0) / 4
    assert got["margin"] == pytest.approx(margin)
    assert got["score"] == pytest.approx(0.3 + 0.3 * 0.6 + 0.2 * 0.5 + 0.2 * 0.25 + 0.01 * margin)
    perfect = ties_report(*ties_rows(("tied:1", [1, 1], [0]), ("ref:1", [1], [0])))
    assert perfect["score"] == pytest.approx(1.01)  # tanh(1 / 0) is 1
    assert (
        ties_report(*ties_rows(("tied:1", [1, 1], [0]))) is None and ties_report([], [], []) is None
    )


def test_ties_against_loops():
    rng = np.random.default_rng(5)
    rows = [
        (f"{kind}:{q}", rng.normal(1, 1, 1 if kind == "ref" else 3), rng.normal(0, 1, 4))
        for q in range(40)
        for kind in ("tied", "ref")
    ]
    order = rng.permutation(len(rows))
    got = ties_report(*ties_rows(*(rows[i] for i in order)))
    by_id = {i: (min(r) - max(w), max(r) - min(r)) for i, r, w in rows}
    want = 0.0
    for q in range(40):
        (gap, spread), (ref, _) = by_id[f"tied:{q}"], by_id[f"ref:{q}"]
        want += (
            0.3 * (gap > 0)
            + 0.3 * (ref > 0)
            + 0.2 * (gap > spread)
            + 0.2 * (min(gap, ref) > spread)
        )
        want += 0.01 * math.tanh(min(gap, ref) / spread - 1)
    assert got["score"] == pytest.approx(want / 40)


def test_reward_bench_2():
    rewards = [
        np.array(r, float) for r in ([3, 1, 2, 0], [3, 3, 2, 0], [1, 2, 3, 4], [1, 1, 0], [1, 0])
    ]
    scores = [
        np.array(s, float) for s in ([1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0], [1, 0])
    ]
    names = ["Math", "math", "Focus", "Ties", "Ties"]
    got = reward_bench_2_report(rewards, scores, names, ["1", "2", "3", "tied:1", "ref:1"])
    assert (
        got["subsets"]["Math"] == (1 + 0.5) / 2 and got["subsets"]["Focus"] == 0.0
    )  # a shared first place is half
    assert got["subsets"]["Ties"] == pytest.approx(1.01) and got["num_prompts"]["Ties"] == 2
    assert got["overall"] is None and got["missing"] == ["Factuality", "Precise IF", "Safety"]
    whole = reward_bench_2_report(
        rewards[:1] * 5 + rewards[3:],
        scores[:1] * 5 + scores[3:],
        [*REWARD_BENCH_2[:5], "Ties", "Ties"],
        [*"12345", "tied:1", "ref:1"],
    )
    assert whole["overall"] == pytest.approx((5 + 1.01) / 6) and whole["missing"] == []
    assert reward_bench_2_report([], [], [], []) is None


# ---- the whole result


def test_pairs_and_result():
    items = [
        item([2, 1, 1], [3, 2, 2], [5, 6, 7], graded=True, source="x"),
        item([0, 1], [1, 0], [4, 9], source="y"),
    ]
    pairs = pairs_of(items)
    assert (
        pairs.d.tolist() == [1, 1, -1]
        and pairs.margin[:2].tolist() == [1, 1]
        and math.isnan(pairs.margin[2])
    )
    got = evaluate(items)
    assert got["accuracy"] == pytest.approx(2 / 3) and got["swap"]["accuracy"] == pytest.approx(
        1 / 3
    )
    assert set(got["by_source"]) == {"x", "y"} and got["ranked"]["best_of_n"] == 1.0
    assert [w["where"] for w in worst_mistakes(items)] == [""]
    text = str(to_json(got))
    assert "nan" not in text and "inf" not in text
    flat = flat_summary(got)
    assert flat["accuracy"] == got["accuracy"] and (flat["accuracy/x"], flat["accuracy/y"]) == (
        1.0,
        0.0,
    )
    assert "accuracy/x" not in flat_summary(evaluate(items[:1]))  # one source is the whole


def test_nothing_to_evaluate_and_not_finite():
    empty = evaluate([item([1, 2], [1, 1])])
    assert empty["num_pairs"] == 0 and empty["findings"][0]["level"] == "bad"
    to_json(empty), flat_summary(empty)
    with pytest.raises(ValueError, match="here:3.*not finite"):
        evaluate([item([1, math.nan], [1, 0], where="here:3")])


def test_stored_items():
    class Stored:
        def __init__(self, n):
            self.suffixes, self.scores = [np.zeros(5), np.zeros(3)], np.array([1.0, 0.0])
            self.graded, self.source = False, f"s{n}"

    class Dataset(list):
        def get(self, i):
            return self[i]

    got = evaluate(
        stored_items(Dataset([Stored(0), Stored(1)]), np.array([1.0, 0, 0, 1])),
        length_unit="tokens",
    )
    assert (
        got["accuracy"] == 0.5
        and got["length_unit"] == "tokens"
        and got["length"]["always_longer"] == 1.0
    )
    with pytest.raises(ValueError, match="5 rewards for 4"):
        stored_items(Dataset([Stored(0), Stored(1)]), np.zeros(5))


def test_findings_words():
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 50, (400, 2))
    fair = evaluate([item(rng.normal([1.2, 0], 1), [1, 0], n) for n in lengths])
    assert [v["level"] for v in fair["findings"][:2]] == ["good", "good"]
    reversed_ = evaluate([item(rng.normal([-1, 1], 1), [1, 0], n) for n in lengths])
    assert (
        reversed_["findings"][0]["level"] == "bad"
        and "worse than chance" in reversed_["findings"][0]["text"]
    )
    longer = evaluate([item(n.astype(float), [1, 0], n) for n in lengths])
    assert "Strong length bias, towards longer" in longer["findings"][1]["text"]
    stuck = evaluate([item([float(i), float(i)], [1, 0], n) for i, n in enumerate(lengths)])
    assert {v["about"] for v in stuck["findings"]} >= {"ties", "prompt"}


def test_no_best_fit_that_is_worse():
    """The temperature of the highest likelihood may have the larger calibration error: then no
    finding calls it the best."""
    rng, worse = np.random.default_rng(8), 0
    for n in (8, 30, 200):
        for scale in (0.3, 1.0, 1.2, 4.0):
            for _ in range(5):
                d = rng.logistic(size=n) + 0.8
                items = [item([scale * x, 0.0], [1, 0]) for x in d]
                result = evaluate(items)
                c = result["calibration"]
                text = next(v["text"] for v in result["findings"] if v["about"] == "calibration")
                if c["temperature"] and c["ece_scaled"] >= c["ece"]:
                    worse += 1
                    assert "best" not in text and "no fitted temperature lowers it" in text
    assert worse > 3
