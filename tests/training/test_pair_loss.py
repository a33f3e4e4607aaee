"""The loss of a pack against its definition in plain Python and torch, in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rmega import ops
from rmega.config import LossArgs
from rmega.data.packing import pack
from rmega.training.loss import REPORTED, pair_loss, rao_kupper_loss, with_centering
from tests.tiny import random_comparisons, with_ties


def pairs_of(comparisons):
    """(row of chosen, row of rejected, gap of ratings or None, gap of lengths), from the stored
    comparisons alone."""
    first = 0
    for c in comparisons:
        for i, better in enumerate(c.scores):
            for j, worse in enumerate(c.scores):
                if better > worse:
                    gap = float(better) - float(worse) if c.graded else None
                    yield first + i, first + j, gap, len(c.suffixes[i]) - len(c.suffixes[j])
        first += len(c.suffixes)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    "args",
    [
        LossArgs(loss="ranking", penalty="none"),
        LossArgs(loss="ranking", penalty="none", use_margin=True),
        LossArgs(loss="ranking", penalty="none", scale_by_rating=True),
        LossArgs(loss="ranking", penalty="none", length_penalty=0.03),
        LossArgs(
            loss="ranking",
            penalty="center",
            penalty_weight=0.1,
            use_margin=True,
            scale_by_rating=True,
            length_penalty=0.03,
            label_smoothing=0.1,
        ),
    ],
    ids=["plain", "margin", "scaled", "length", "all"],
)
def test_the_loss_of_a_pack_is_its_definition(args, share_prefix):
    comparisons = random_comparisons(12, seed=5)
    batch = pack(comparisons, share_prefix=share_prefix)
    rewards = torch.randn(len(batch.pooled), dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for c, r, gap, longer in pairs_of(comparisons):
        x = rewards[c] - rewards[r] + args.length_penalty * longer
        x = x - (gap or 0.0) * args.use_margin
        e = args.label_smoothing
        term = -(1 - e) * torch.log(torch.sigmoid(x)) - e * torch.log(torch.sigmoid(-x))
        if args.penalty == "center":
            term = term + args.penalty_weight * (rewards[c] + rewards[r]) ** 2
        total = total + (gap if args.scale_by_rating and gap is not None else 1.0) * term
    loss, count, _ = pair_loss(args, batch, rewards)
    assert int(count) == len(list(pairs_of(comparisons)))
    # ratings and lengths are exact in fp32, 0.03 times a length is not
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    want, got = (torch.autograd.grad(x, rewards)[0] for x in (total, loss))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_plackett_luce_is_the_likelihood_of_each_comparisons_order(share_prefix):
    """Any number of responses in any stored order; of responses with equal scores each is chosen
    among the worse ones, and the last have nothing to be chosen from."""
    comparisons = random_comparisons(12, seed=8)
    comparisons[4].scores[:] = [1, 3, 2, 0][: len(comparisons[4].scores)]
    comparisons[8].scores[:] = 0
    comparisons[8].scores[1] = 1
    args = LossArgs(loss="plackett_luce", penalty="none")
    batch = pack(comparisons, share_prefix=share_prefix)
    rewards = torch.randn(len(batch.pooled), dtype=torch.float64, requires_grad=True)
    total, choices, first = torch.zeros((), dtype=torch.float64), 0, 0
    for c in comparisons:
        own = rewards[first : first + len(c.suffixes)]
        for reward, score in zip(own, c.scores, strict=True):
            worse = [r for r, s in zip(own, c.scores, strict=True) if s < score]
            if worse:
                total = total - torch.log_softmax(torch.stack([reward, *worse]), 0)[0]
                choices += 1
        first += len(c.suffixes)
    loss, count, sums = pair_loss(args, batch, rewards)
    assert int(count) == batch.num_choices == choices < len(batch.chosen)
    assert dict(zip(REPORTED, sums.tolist(), strict=True))["num_terms"] == choices
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    want, got = (torch.autograd.grad(x, rewards)[0] for x in (total, loss))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("penalty", ["none", "center", "log_barrier"])
@pytest.mark.parametrize("raw", [-3.0, 0.0, 1.5])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_rao_kupper_is_its_likelihood(raw, penalty, implementation, monkeypatch):
    """Values and gradients, of rewards and threshold, against the probabilities themselves."""
    monkeypatch.setattr(ops.implementation, "_implementation", implementation)
    comparisons = with_ties(random_comparisons(24, seed=9))
    batch = pack(comparisons, ties=True)
    rewards = torch.randn(len(batch.pooled), dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([raw], dtype=torch.float64, requires_grad=True)
    eta = torch.log1p(torch.exp(threshold))
    args = LossArgs(loss="rao_kupper", penalty=penalty, penalty_weight=0.3)

    def penalty_of(a, b):
        if penalty == "log_barrier":
            return sum(-torch.log(5 - r) - torch.log(5 + r) for r in (a, b))
        return (a + b) ** 2 if penalty == "center" else 0.0 * a

    base = extra = correct = torch.zeros((), dtype=torch.float64)
    wins = ties = first = 0
    for c in comparisons:
        own = rewards[first : first + len(c.suffixes)]
        first += len(own)
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                a, b = own[i], own[j]
                win, lose = torch.sigmoid(a - b - eta), torch.sigmoid(b - a - eta)
                tie = (torch.exp(2 * eta) - 1) * win * lose
                torch.testing.assert_close(win + lose + tie, torch.ones_like(win))
                base = base - torch.log(tie if c.scores[i] == c.scores[j] else win).sum()
                extra = extra + 0.3 * penalty_of(a, b)
                ties += c.scores[i] == c.scores[j]
                wins += c.scores[i] != c.scores[j]
                correct = correct + (a > b) * (c.scores[i] != c.scores[j])
    loss, count, sums = rao_kupper_loss(args, batch, threshold, rewards)
    sums = dict(zip(REPORTED, sums.tolist(), strict=True))
    assert ties > 5 and wins > 5 and int(count) == sums["num_terms"] == wins + ties
    assert sums["num_pairs"] == wins and sums["num_correct"] == correct
    assert sums["base_loss"] == pytest.approx(base.item(), rel=1e-12)
    assert sums["penalty"] == pytest.approx(extra.item(), rel=1e-12)
    assert sums["tie_threshold"] == pytest.approx((wins + ties) * eta.item(), rel=1e-12)
    torch.testing.assert_close(loss, base + extra, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(base + extra, (rewards, threshold))
    for got, want in zip(torch.autograd.grad(loss, (rewards, threshold)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ["ranking", "plackett_luce", "rao_kupper"])
def test_batch_centering_is_the_squared_mean_of_the_whole_batch(loss):
    """Packs know the sums of the batch; together they have its value and gradient. An empty pack
    has none."""
    comparisons = with_ties(random_comparisons(12, seed=9))
    args = LossArgs(loss=loss, penalty="none", batch_centering=0.7)
    ties = loss == "rao_kupper"
    parts = [pack(part, ties=ties) for part in (comparisons[:3], comparisons[3:], [])]
    whole = pack(comparisons, ties=ties)
    n = len(whole.pooled)
    rewards = (torch.randn(n, dtype=torch.float64) + 2).requires_grad_()
    threshold = torch.ones(1, dtype=torch.float64)

    def loss_of(batch, own):
        if ties:
            return rao_kupper_loss(args, batch, threshold, own)
        return pair_loss(args, batch, own)

    plain, terms, _ = loss_of(whole, rewards)
    want = plain + terms * 0.7 * rewards.mean() ** 2
    sums = torch.stack([rewards.detach().sum(), torch.tensor(float(n)), terms]).double()
    first = len(parts[0].pooled)
    padding = torch.full((1,), 9.0, dtype=torch.float64)
    own = [rewards[:first], rewards[first:], padding]
    got = [
        with_centering(partial(loss_of, batch), 0.7, batch, sums, part)
        for batch, part in zip(parts, own, strict=True)
    ]
    alone = with_centering(partial(loss_of, whole), 0.7, whole, None, rewards)
    (slope,) = torch.autograd.grad(want, rewards, retain_graph=True)
    for total, report in (
        (sum(x for x, _, _ in got), sum(x for _, _, x in got)),
        (alone[0], alone[2]),
    ):
        torch.testing.assert_close(total, want)
        reported = dict(zip(REPORTED, report.tolist(), strict=True))
        assert reported["base_loss"] + reported["penalty"] == pytest.approx(want.item())
        torch.testing.assert_close(torch.autograd.grad(total, rewards)[0], slope)


def test_rao_kupper_of_an_empty_pack_and_of_ties_alone():
    """A rank without comparisons still has a gradient of 0 for the threshold."""
    args = LossArgs(loss="rao_kupper", penalty="none")
    threshold = torch.zeros(1, requires_grad=True)
    empty, rewards = pack([], ties=True), torch.zeros(1, requires_grad=True)
    loss, count, _ = rao_kupper_loss(args, empty, threshold, rewards)
    loss.backward()
    assert loss == 0 and count == 0 and threshold.grad == 0 and rewards.grad == 0
    (tie,) = random_comparisons(2, seed=1)[1:]
    tie.scores[:] = 1
    batch, rewards = pack([tie], ties=True), torch.zeros(2, requires_grad=True)
    loss, count, _ = rao_kupper_loss(args, batch, threshold, rewards)
    assert count == 1 and loss.item() == pytest.approx(math.log(3))  # all three are as likely


def test_equal_responses_are_no_tied_pair():
    (c,) = random_comparisons(2, seed=1)[1:]
    c.scores[:] = 1
    c.suffixes[1] = c.suffixes[0].copy()
    assert pack([c], ties=True).tied.shape == (2, 0)


def test_packs_hold_tied_pairs_only_where_they_are_asked_for():
    comparisons = with_ties(random_comparisons(12, seed=5))
    batch, plain = pack(comparisons, ties=True), pack(comparisons)
    assert batch.tied.shape[1] > 3 and plain.tied.shape == (2, 0)
    assert torch.equal(batch.chosen, plain.chosen) and torch.equal(batch.rejected, plain.rejected)


def test_a_length_penalty_makes_the_reward_explain_less_of_a_longer_answer():
    """Two comparisons with equal rewards: the winner that is longer is pushed less than the one
    that is shorter."""
    long, short = random_comparisons(40, seed=6)[1:3]
    for c in (long, short):
        c.suffixes.sort(key=len, reverse=c is long)
        assert len(c.suffixes[0]) != len(c.suffixes[1])
    batch = pack([long, short])
    rewards = torch.zeros(4, requires_grad=True)
    grads = {}
    for penalty in (0.0, 0.1):
        args = LossArgs(loss="ranking", penalty="none", length_penalty=penalty)
        (grads[penalty],) = torch.autograd.grad(pair_loss(args, batch, rewards)[0], rewards)
    assert abs(grads[0.1][0]) < abs(grads[0.0][0]) and abs(grads[0.1][2]) > abs(grads[0.0][2])


def test_a_scaled_pair_counts_as_many_pairs_as_its_gap():
    """Scaled Bradley-Terry of whole gaps is the same loss on pairs that are repeated, penalty
    included."""
    comparisons = [c for c in random_comparisons(12, seed=7) if c.graded and len(c.scores) == 2]
    for i, c in enumerate(comparisons):
        c.scores[0] = c.scores[1] + 1 + i % 3
    repeated = [c for i, c in enumerate(comparisons) for _ in range(1 + i % 3)]
    rewards = torch.randn(2 * len(comparisons), dtype=torch.float64)
    copies = torch.cat(
        [rewards[2 * i : 2 * i + 2].repeat(1 + i % 3) for i in range(len(comparisons))]
    )
    scaled, count, _ = pair_loss(LossArgs(scale_by_rating=True), pack(comparisons), rewards)
    plain, _, _ = pair_loss(LossArgs(), pack(repeated), copies)
    torch.testing.assert_close(scaled, plain)
    assert int(count) == len(comparisons)
