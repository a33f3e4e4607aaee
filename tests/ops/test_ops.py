"""The operators against independent arithmetic in fp64: values, gradients, odd shapes, empty and
single-row cases."""

import math
from types import SimpleNamespace

import pytest
import torch

from rmega import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("implementation", ["native", "reference"])


@pytest.fixture(autouse=True)
def auto_implementation():
    yield
    ops.set_implementation("auto")


def choose(implementation):
    if implementation == "native" and ops.implementation._C is None:
        pytest.skip(f"rmega._C is not built: {ops.implementation._why_not_built}")
    ops.set_implementation(implementation)


def max_error(got, exact):
    return (got.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_twice_plain(got, plain, exact, floor=1e-7):
    """The project's law for kernels: an error of at most twice that of plain torch in the same
    dtype."""
    assert got.dtype == plain.dtype and got.shape == plain.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    assert max_error(got, exact) <= 2 * max_error(plain, exact) + floor * scale


def both_with_grad(op, inputs, wrt, grad_seed=0):
    """(value, gradients) of op at inputs, of which those at positions ``wrt`` are
    differentiated."""
    inputs = [
        x.detach().clone().requires_grad_(i in wrt) if isinstance(x, torch.Tensor) else x
        for i, x in enumerate(inputs)
    ]
    out = op(*inputs)
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(grad_seed), dtype=torch.float64
    )
    grads = torch.autograd.grad(out, [inputs[i] for i in wrt], upstream.to(out.dtype))
    return out.detach(), grads


ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request):
    choose("native")
    try:
        ops.implementation._C.set_elementwise_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    ops.implementation._C.set_elementwise_isa("")


def opcheck(op, args):
    if ops.implementation._C is None:
        pytest.skip(f"rmega._C is not built: {ops.implementation._why_not_built}")
    torch.library.opcheck(getattr(torch.ops.rmega, op).default, args)


# ---- choice of implementation


def test_implementation_choice():
    ops.set_implementation("reference")
    assert ops.active_implementation() == "reference"
    ops.set_implementation("auto")
    assert ops.active_implementation() == ("native" if ops.implementation._C else "reference")
    with pytest.raises(ValueError, match="auto, native, reference"):
        ops.set_implementation("fast")


def test_without_the_extension_says_so_once_and_works(monkeypatch, capsys):
    monkeypatch.setattr(ops.implementation, "_C", None)
    monkeypatch.setattr(ops.implementation, "_reported", set())
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        assert ops.gather_last_token(torch.arange(6.0).view(3, 2), torch.tensor([2])).tolist() == [
            [4.0, 5.0]
        ]
    assert capsys.readouterr().err.count("plain torch") == 1
    with pytest.raises(ValueError, match="not built"):
        ops.set_implementation("native")


def test_a_named_request_that_cannot_be_met_raises(monkeypatch):
    choose("native")
    monkeypatch.setattr(ops.implementation, "_C", None)
    with pytest.raises(RuntimeError, match="native"):
        ops.gather_last_token(torch.ones(1, 1), torch.tensor([0]))


@pytest.mark.parametrize(
    "has_cuda,interface,capability,reason",
    [
        (True, 5, (8, 0), ""),
        (True, 5, (9, 0), ""),
        (True, 5, (7, 5), "need compute capability 8.0, this GPU has 7.5"),
        (True, 4, (9, 0), "was built from older sources; build it again"),
        (False, 5, (9, 0), "was built without CUDA"),
    ],
)
def test_gpus_that_the_kernels_are_not_built_for(
    monkeypatch, capsys, has_cuda, interface, capability, reason
):
    """A launch there ends in "no kernel image is available"; a stand-in for extension and GPU."""
    monkeypatch.setattr(
        ops.implementation, "_C", SimpleNamespace(has_cuda=has_cuda, interface=interface)
    )
    monkeypatch.setattr(ops.implementation, "_reported", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("RANK", raising=False)
    gpu = torch.device("cuda", 0)
    ops.implementation._why_not_cuda.cache_clear()
    try:
        ops.set_implementation("auto")
        assert ops.active_implementation(gpu) == ("reference" if reason else "native")
        assert ops.implementation.runs_native(gpu) == (not reason)
        said = capsys.readouterr().err
        assert reason in said and bool(said) == bool(reason)
        ops.set_implementation("native")
        if reason:
            with pytest.raises(RuntimeError, match=f"on cuda, but .*{reason}"):
                ops.implementation.runs_native(gpu)
        else:
            assert ops.implementation.runs_native(gpu)
    finally:
        ops.set_implementation("auto")
        ops.implementation._why_not_cuda.cache_clear()


# ---- gather_last_token


@BOTH
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "t,h,rows",
    [
        (1, 1, [0]),
        (7, 33, [6, 0, 3]),
        (5, 64, [4, 4, 1, 4]),
        (4, 8, []),
        (0, 8, []),
        (3, 0, [1]),
        (300, 130, [*range(0, 300, 7)]),
    ],
)
def test_gather_last_token(implementation, dtype, t, h, rows):
    choose(implementation)
    torch.manual_seed(0)
    hidden, last = torch.randn(t, h).to(dtype), torch.tensor(rows, dtype=torch.int64)
    out, (grad,) = both_with_grad(ops.gather_last_token, [hidden, last], [0])
    assert torch.equal(
        out, torch.stack([hidden[i] for i in rows]) if rows else hidden.new_empty(0, h)
    )
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    exact = torch.zeros(t, h, dtype=torch.float64)
    for i, row in enumerate(rows):
        exact[row] += upstream[i].double()
    plain = torch.zeros(t, h, dtype=dtype).index_add_(0, last, upstream)
    assert_twice_plain(grad, plain, exact)


@BOTH
def test_gather_last_token_takes_strided_rows(implementation):
    choose(implementation)
    hidden = torch.arange(24.0).view(6, 4)
    last = torch.tensor([2, 0])
    assert torch.equal(ops.gather_last_token(hidden.t(), last), hidden.t()[[2, 0]])
    assert torch.equal(ops.gather_last_token(hidden[::2, 1:3], last), hidden[::2, 1:3][[2, 0]])


def test_gather_last_token_gradcheck_and_opcheck():
    hidden, last = (
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([4, 1, 4]),
    )
    assert torch.autograd.gradcheck(ops.gather_last_token, (hidden, last))
    assert torch.autograd.gradgradcheck(ops.gather_last_token, (hidden, last))
    opcheck("gather_last_token", (hidden, last))
    opcheck("gather_last_token_backward", (torch.randn(3, 2, requires_grad=True), last, 5))


@pytest.mark.parametrize("row", [-1, 3])
def test_gather_last_token_refuses_rows_outside(row):
    choose("native")
    with pytest.raises(IndexError, match=rf"last\[1\] = {row} with t = 3"):
        ops.gather_last_token(torch.ones(3, 2), torch.tensor([0, row]))


def test_gather_last_token_names_shapes():
    choose("native")
    with pytest.raises(RuntimeError, match=r"hidden must be \[rows, h\], got \[3, 1, 2\]"):
        ops.gather_last_token(torch.ones(3, 1, 2), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="int64"):
        ops.gather_last_token(torch.ones(3, 2), torch.tensor([0], dtype=torch.int32))


# ---- pairwise_loss

OPTIONS = [
    dict(loss=loss, penalty=penalty, label_smoothing=smoothing, barrier_clamp=clamp)
    for loss in ("ranking", "focal")  # of pairs; plackett_luce: below
    for penalty in ops.PENALTIES
    for smoothing in (0.0, 0.1)
    for clamp in ((False, True) if penalty == "log_barrier" else (False,))
]


def pair_by_hand(c, r, margin, *, loss, penalty, penalty_weight, label_smoothing, barrier_clamp):
    """(base, penalty) of one pair with Python's math: the formulas as they are printed in the
    papers."""
    x = c - r - margin
    sigmoid = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    log_sigmoid = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
    base = -(1 - label_smoothing) * log_sigmoid - label_smoothing * (log_sigmoid - x)
    if loss == "focal":
        base *= (1 - 2 * max(sigmoid - 0.5, 0)) ** 2
    extra = {"none": 0.0, "l2": c * c + r * r, "center": (c + r) ** 2}.get(penalty)
    if penalty == "log_barrier":
        extra = 0.0
        for score in (c, r):
            inside = min(max(score, -4.999), 4.999)
            extra -= math.log(5 - inside) + math.log(5 + inside)
            if not barrier_clamp and abs(score) > 4.999:
                extra += (abs(score) - 4.999) * (1 / (5 - 4.999) - 1 / (5 + 4.999))
    return base, penalty_weight * extra


def random_pairs(n, m, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(n, generator=generator) * spread
    chosen = torch.randint(n, (m,), generator=generator)
    rejected = torch.randint(n, (m,), generator=generator)
    margin, weight = torch.rand(m, generator=generator), torch.rand(m, generator=generator) + 0.5
    return rewards, chosen, rejected, margin, weight


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_pairwise_loss_against_the_printed_formulas(implementation, options):
    choose(implementation)
    rewards, chosen, rejected, margin, weight = random_pairs(40, 57, spread=3.0)
    rejected[3] = chosen[3]  # a tie
    rewards[chosen[0]] = 6.5  # outside the barrier's range
    rewards, margin, weight = rewards.double(), margin.double(), weight.double()
    loss_sum, stats = ops.pairwise_loss(
        rewards, chosen, rejected, margin, weight, penalty_weight=0.02, **options
    )
    base = penalty = correct = 0.0
    for c, r, mg, w in zip(
        rewards[chosen].tolist(),
        rewards[rejected].tolist(),
        margin.tolist(),
        weight.tolist(),
        strict=True,
    ):
        terms = pair_by_hand(c, r, mg, penalty_weight=0.02, **options)
        base, penalty = base + w * terms[0], penalty + w * terms[1]
        correct += 1.0 if c > r else 0.5 if c == r else 0.0
    d = rewards[chosen] - rewards[rejected]
    expected = [
        57,
        base,
        penalty,
        correct,
        (d == 0).sum().item(),
        rewards[chosen].sum().item(),
        rewards[rejected].sum().item(),
        d.abs().sum().item(),
    ]
    assert loss_sum.item() == pytest.approx(base + penalty, rel=1e-12)
    assert stats.tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[4] >= 1 and stats.requires_grad is False


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_pairwise_loss_gradcheck(implementation, options):
    choose(implementation)
    rewards, chosen, rejected, margin, weight = random_pairs(9, 12)
    rewards[0], rewards[1] = 5.5, -6.0
    rewards = rewards.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: ops.pairwise_loss(r, chosen, rejected, margin, weight, **options)[0], (rewards,)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_pairwise_loss_error_is_at_most_twice_plain_torchs(isa, dtype, options):
    rewards, chosen, rejected, margin, weight = random_pairs(128, 200)
    rewards = rewards.to(dtype)
    results = []
    plain = ops.pairwise_loss_ref
    for op, cast in ((ops.pairwise_loss, dtype), (plain, dtype), (plain, torch.float64)):
        x = rewards.to(cast).clone().requires_grad_()
        loss_sum, stats = op(x, chosen, rejected, margin, weight, **options)
        loss_sum.backward()
        results.append((loss_sum.detach(), stats, x.grad))
    for got, plain, exact in zip(*results, strict=True):
        assert_twice_plain(got, plain, exact)


@BOTH
def test_pairwise_loss_at_the_start_of_training(implementation):
    """A head that starts at zero: ln 2, and with focal and barrier the figure of the InternLM2
    recipe."""
    choose(implementation)
    rewards = torch.zeros(8, requires_grad=True)
    chosen, rejected = torch.arange(0, 8, 2), torch.arange(1, 8, 2)
    zero, one = torch.zeros(4), torch.ones(4)
    loss_sum, _ = ops.pairwise_loss(rewards, chosen, rejected, zero, one)
    assert loss_sum.item() / 4 == pytest.approx(math.log(2), rel=1e-6)
    loss_sum, stats = ops.pairwise_loss(
        rewards, chosen, rejected, zero, one, loss="focal", penalty="log_barrier"
    )
    assert loss_sum.item() / 4 == pytest.approx(0.628770, abs=1e-6)
    assert stats.tolist()[3:5] == [2.0, 4.0]
    loss_sum.backward()
    assert rewards.grad.tolist() == [-0.5, 0.5] * 4


@BOTH
def test_pairwise_loss_barrier_pulls_back_unless_clamped(implementation):
    choose(implementation)
    args = (torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.ones(1))
    for score in (5.0, 80.0, -5.0, -300.0):
        for clamp in (False, True):
            rewards = torch.tensor([score, score], requires_grad=True)
            loss_sum, _ = ops.pairwise_loss(
                rewards, *args, penalty="log_barrier", barrier_clamp=clamp
            )
            loss_sum.backward()
            expected = 0.0 if clamp else math.copysign(0.01 * 999.9, score)
            assert math.isfinite(loss_sum.item())
            assert rewards.grad.sum().item() / 2 == pytest.approx(expected, rel=1e-4, abs=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_loss_far_scores_stay_finite(implementation, dtype):
    choose(implementation)
    rewards = torch.tensor([300.0, -300.0, 0.0, 100.0], dtype=dtype, requires_grad=True)
    pairs = (torch.tensor([0, 1, 3, 2]), torch.tensor([1, 0, 2, 3]), torch.zeros(4), torch.ones(4))
    for loss in ops.LOSSES:
        loss_sum, _ = ops.pairwise_loss(rewards, *pairs, loss=loss)
        (grad,) = torch.autograd.grad(loss_sum, rewards)
        assert loss_sum.item() == pytest.approx(700.0)
        assert grad.tolist() == [-1.0, 1.0, -1.0, 1.0][::-1] or grad.tolist() == [
            1.0,
            -1.0,
            -1.0,
            1.0,
        ]


@BOTH
def test_pairwise_loss_of_nothing(implementation):
    choose(implementation)
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for n in (0, 3):
        rewards = torch.randn(n, requires_grad=True)
        loss_sum, stats = ops.pairwise_loss(
            rewards, no_index, no_index, none, none, penalty="log_barrier"
        )
        (grad,) = torch.autograd.grad(loss_sum, rewards)
        assert loss_sum.item() == 0 and stats.tolist() == [0.0] * 8 and grad.tolist() == [0.0] * n


@BOTH
def test_pairwise_loss_is_additive_over_pairs(implementation):
    """However a batch is cut, sums and gradients add up: no mean hides inside."""
    choose(implementation)
    rewards, *pairs = random_pairs(20, 30)
    rewards = rewards.double().requires_grad_()
    options = dict(loss="focal", penalty="center", label_smoothing=0.05)
    whole, stats = ops.pairwise_loss(rewards, *pairs, **options)
    parts = [
        ops.pairwise_loss(rewards, *(x[a:b] for x in pairs), **options)
        for a, b in ((0, 11), (11, 12), (12, 30))
    ]
    assert torch.allclose(whole, sum(part[0] for part in parts), rtol=1e-12)
    assert torch.allclose(stats, sum(part[1] for part in parts), rtol=1e-12)
    (grad,) = torch.autograd.grad(whole, rewards)
    (grad_parts,) = torch.autograd.grad(sum(part[0] for part in parts), rewards)
    assert torch.allclose(grad, grad_parts, rtol=1e-12)


def test_pairwise_loss_scales_with_the_upstream_gradient():
    choose("native")
    rewards, *pairs = random_pairs(6, 8)
    rewards = rewards.to(torch.bfloat16).requires_grad_()
    loss_sum, _ = ops.pairwise_loss(rewards, *pairs)
    (one,) = torch.autograd.grad(loss_sum, rewards, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss_sum * 64, rewards)
    assert one.dtype == torch.bfloat16 and torch.equal(scaled, one * 64)


def test_pairwise_loss_refuses_what_it_does_not_know():
    args = random_pairs(4, 3)
    for implementation in ("reference", "auto"):
        ops.set_implementation(implementation)
        with pytest.raises(ValueError, match="ranking, focal"):
            ops.pairwise_loss(*args, loss="hinge")
        with pytest.raises(ValueError, match="log_barrier"):
            ops.pairwise_loss(*args, penalty="l1")
    choose("native")
    rewards, chosen, rejected, margin, weight = args
    with pytest.raises(RuntimeError, match=r"margin \[2\] for chosen \[3\]"):
        ops.pairwise_loss(rewards, chosen, rejected, margin[:2], weight)
    with pytest.raises(RuntimeError, match=r"rewards must be \[n\], got \[4, 1\]"):
        ops.pairwise_loss(rewards[:, None], chosen, rejected, margin, weight)
    with pytest.raises(IndexError, match="pair 0 is"):
        ops.pairwise_loss(rewards, chosen + 4, rejected, margin, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairwise_loss_opcheck(dtype):
    rewards, *pairs = random_pairs(6, 8)
    opcheck(
        "pairwise_loss",
        (rewards.to(dtype).requires_grad_(), *pairs, "focal", "log_barrier", 0.01, 0.1, False),
    )


# ---- pairwise_loss, Plackett-Luce


def ranked(sizes, seed=0, spread=2.0):
    """Comparisons of so many responses, best first: (rewards, chosen, rejected, margin, weight)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(sum(sizes), generator=generator) * spread
    pairs, first = [], 0
    for size in sizes:
        pairs += [(first + i, first + j) for i in range(size) for j in range(i + 1, size)]
        first += size
    chosen, rejected = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()
    margin = torch.rand(len(pairs), generator=generator)
    return rewards, chosen, rejected, margin, torch.rand(len(pairs), generator=generator) + 0.5


@BOTH
@pytest.mark.parametrize("sizes", [[2], [3], [2, 2], [4, 2, 7, 3], [1, 5, 1, 2]])
def test_plackett_luce_is_the_likelihood_of_the_order(implementation, sizes):
    """By its stages: the best of all, the best of what is left, ...; torch's softmax in fp64."""
    choose(implementation)
    rewards, chosen, rejected, *_ = ranked(sizes)
    rewards = rewards.double().requires_grad_()
    zero, one = torch.zeros(len(chosen)), torch.ones(len(chosen))
    loss_sum, stats = ops.pairwise_loss(rewards, chosen, rejected, zero, one, loss="plackett_luce")
    expected = torch.zeros((), dtype=torch.float64)
    for one_order in rewards.split(sizes):
        for stage in range(len(one_order) - 1):
            expected = expected - torch.log_softmax(one_order[stage:], 0)[0]
    torch.testing.assert_close(loss_sum, expected, rtol=1e-12, atol=0)
    want, got = (torch.autograd.grad(x, rewards)[0] for x in (expected, loss_sum))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert stats[0] == len(chosen) and stats[1] == loss_sum.detach() and stats[2] == 0


@BOTH
def test_plackett_luce_of_two_is_ranking(implementation):
    choose(implementation)
    rewards, chosen, rejected, margin, weight = ranked([2] * 9, spread=4.0)
    rewards = rewards.double().requires_grad_()
    results = []
    for loss in ("ranking", "plackett_luce"):
        loss_sum, stats = ops.pairwise_loss(
            rewards, chosen, rejected, margin, weight, loss=loss, penalty="log_barrier"
        )
        results.append((loss_sum.detach(), stats, *torch.autograd.grad(loss_sum, rewards)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@BOTH
@pytest.mark.parametrize("penalty", ops.PENALTIES)
def test_plackett_luce_by_hand_and_gradcheck(implementation, penalty):
    """A choice has the mean weight of its pairs and the mean penalty; margins count per pair."""
    choose(implementation)
    sizes = [4, 2, 3]
    rewards, chosen, rejected, margin, weight = ranked(sizes)
    rewards[0], rewards[1] = 5.5, -6.0
    rewards, margin, weight = rewards.double(), margin.double(), weight.double()
    options = dict(loss="plackett_luce", penalty=penalty, penalty_weight=0.02)
    loss_sum, stats = ops.pairwise_loss(rewards, chosen, rejected, margin, weight, **options)
    base = extra = 0.0
    for c in set(chosen.tolist()):
        pairs = [i for i, row in enumerate(chosen.tolist()) if row == c]
        terms = [
            (rewards[c].item(), rewards[rejected[i]].item(), margin[i].item(), weight[i].item())
            for i in pairs
        ]
        total = 1 + sum(math.exp(r + mg - s) for s, r, mg, _ in terms)
        base += sum(w for *_, w in terms) / len(terms) * math.log(total)
        for s, r, mg, w in terms:
            by_hand = pair_by_hand(
                s,
                r,
                mg,
                loss="ranking",
                penalty=penalty,
                penalty_weight=0.02,
                label_smoothing=0.0,
                barrier_clamp=False,
            )
            extra += w * by_hand[1] / len(terms)
    assert loss_sum.item() == pytest.approx(base + extra, rel=1e-12)
    assert stats[1:3].tolist() == pytest.approx([base, extra], rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda r: ops.pairwise_loss(r, chosen, rejected, margin, weight, **options)[0],
        (rewards.requires_grad_(),),
    )


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_plackett_luce_far_scores_stay_finite(implementation, dtype):
    choose(implementation)
    rewards = torch.tensor([-300.0, 300.0, 299.0, 0.0], dtype=dtype, requires_grad=True)
    chosen, rejected = torch.tensor([[0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]])
    loss_sum, _ = ops.pairwise_loss(
        rewards, chosen, rejected, torch.zeros(6), torch.ones(6), loss="plackett_luce"
    )
    exact = rewards.detach().double()
    total = sum(-torch.log_softmax(exact[i:], 0)[0] for i in range(3)).item()
    assert loss_sum.item() == pytest.approx(total, rel=1e-6)
    (grad,) = torch.autograd.grad(loss_sum, rewards)
    assert grad.isfinite().all() and grad.sum().item() == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", ops.PENALTIES)
def test_plackett_luce_error_is_at_most_twice_plain_torchs(dtype, penalty):
    choose("native")
    rewards, *pairs = ranked([4, 2, 3, 5] * 10)
    rewards = rewards.to(dtype)
    results = []
    plain = ops.pairwise_loss_ref
    for op, cast in ((ops.pairwise_loss, dtype), (plain, dtype), (plain, torch.float64)):
        x = rewards.to(cast).clone().requires_grad_()
        loss_sum, stats = op(x, *pairs, loss="plackett_luce", penalty=penalty)
        loss_sum.backward()
        results.append((loss_sum.detach(), stats, x.grad))
    for got, plain, exact in zip(*results, strict=True):
        assert_twice_plain(got, plain, exact)


@BOTH
def test_plackett_luce_of_nothing(implementation):
    choose(implementation)
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    rewards = torch.randn(3, requires_grad=True)
    loss_sum, stats = ops.pairwise_loss(
        rewards, no_index, no_index, none, none, loss="plackett_luce", penalty="l2"
    )
    (grad,) = torch.autograd.grad(loss_sum, rewards)
    assert loss_sum.item() == 0 and stats.tolist() == [0.0] * 8 and grad.tolist() == [0.0] * 3


@BOTH
def test_plackett_luce_has_no_label_smoothing(implementation):
    choose(implementation)
    with pytest.raises(ValueError, match="label_smoothing 0.1: plackett_luce has none"):
        ops.pairwise_loss(*ranked([3]), loss="plackett_luce", label_smoothing=0.1)


def test_plackett_luce_opcheck():
    rewards, *pairs = ranked([3, 2])
    opcheck(
        "pairwise_loss",
        (rewards.requires_grad_(), *pairs, "plackett_luce", "log_barrier", 0.01, 0.0, False),
    )


# ---- gather_prefix_kv

SEGMENTS = {  # prefix_start, prefix_len, own_start, own_len
    "one pair": ([0, 0, 0], [0, 4, 4], [0, 4, 7], [4, 3, 2]),
    "four responses": ([0] * 5, [0, 5, 5, 5, 5], [0, 5, 6, 7, 20], [5, 1, 1, 13, 2]),
    "no prefix": ([0, 0], [0, 0], [0, 3], [3, 9]),
    "single row": ([0], [0], [0], [1]),
    "rows nobody reads": ([3], [2], [9], [2]),
    "empty segment": ([0, 2, 0], [0, 0, 3], [0, 2, 3], [2, 0, 1]),
    "nothing": ([], [], [], []),
}


def prefix_rows(segments):
    return [
        row
        for ps, pl, os, ol in zip(*segments, strict=True)
        for row in [*range(ps, ps + pl), *range(os, os + ol)]
    ]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("g,d", [(1, 1), (2, 16), (3, 5)])
def test_gather_prefix_kv(implementation, dtype, case, g, d):
    choose(implementation)
    torch.manual_seed(0)
    t, rows = 23, prefix_rows(SEGMENTS[case])
    x = torch.randn(t, g, d).to(dtype)
    index = [torch.tensor(column, dtype=torch.int32) for column in SEGMENTS[case]]
    out, (grad,) = both_with_grad(ops.gather_prefix_kv, [x, *index], [0])
    assert torch.equal(out, x[rows])
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    exact = torch.zeros(t, g, d, dtype=torch.float64)
    for i, row in enumerate(rows):
        exact[row] += upstream[i].double()
    plain = torch.zeros(t, g, d, dtype=dtype).index_add_(
        0, torch.tensor(rows, dtype=torch.int64), upstream
    )
    assert_twice_plain(grad, plain, exact)


@BOTH
def test_gather_prefix_kv_takes_views_of_the_fused_projection(implementation):
    choose(implementation)
    qkv = torch.randn(9, 2, 12)  # per group: two queries, a key, a value of size 3
    index = [torch.tensor(column) for column in SEGMENTS["one pair"]]
    for view in (qkv[..., 9:], qkv[..., 6:9], qkv[:, :1, 6:9], qkv.transpose(1, 2)):
        assert torch.equal(
            ops.gather_prefix_kv(view, *index), view[prefix_rows(SEGMENTS["one pair"])]
        )
        assert torch.equal(
            ops.gather_prefix_kv(view, *index, total=17), view[prefix_rows(SEGMENTS["one pair"])]
        )


def test_gather_prefix_kv_many_rows_and_threads(isa):
    t, rows, k = 3000, 64, 20
    index = [
        torch.tensor([0] * k),
        torch.tensor([2000] * k),
        torch.arange(k) * 50 + 2000,
        torch.tensor([50] * k),
    ]
    x = torch.randn(t, 2, rows, dtype=torch.bfloat16)
    plain = ops.gather_prefix_kv_ref(x, *index)
    assert torch.equal(ops.gather_prefix_kv(x, *index), plain)
    grad = torch.randn_like(plain)
    exact = torch.zeros(x.shape, dtype=torch.float64).index_add_(
        0, torch.tensor(prefix_rows([c.tolist() for c in index])), grad.double()
    )
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.rmega.gather_prefix_kv_backward(grad, *index, t))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0], exact.float().to(torch.bfloat16))  # summed in fp32, rounded once


def test_gather_prefix_kv_gradcheck_and_opcheck():
    index = [torch.tensor(column, dtype=torch.int32) for column in SEGMENTS["one pair"]]
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.gather_prefix_kv(x, *index), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.gather_prefix_kv(x, *index), (x,))
    opcheck("gather_prefix_kv", (x, *index, 17))
    opcheck("gather_prefix_kv_backward", (torch.randn(17, 2, 3, requires_grad=True), *index, 9))


def test_gather_prefix_kv_refuses_segments_outside():
    choose("native")
    x, one = torch.ones(4, 1, 1), torch.tensor([1])
    with pytest.raises(IndexError, match=r"segment 0 has prefix 1\+1, own 3\+2 with t = 4"):
        ops.gather_prefix_kv(x, one, one, one + 2, one + 1)
    with pytest.raises(RuntimeError, match="total is 3, the lengths sum to 2"):
        ops.gather_prefix_kv(x, one, one, one, one, total=3)
    with pytest.raises(RuntimeError, match=r"\[t, g, d\]"):
        ops.gather_prefix_kv(x[0], one, one, one, one)


@pytest.mark.parametrize("case", SEGMENTS)
def test_prefix_index(case):
    columns = [torch.tensor(column, dtype=torch.int32) for column in SEGMENTS[case]]
    t, rows = 23, prefix_rows(SEGMENTS[case])
    made = [ops.prefix_index_ref(*columns, t)]
    choose("native")
    if ops.gather._prefix_index is not None:
        made.append(ops.prefix_index(*columns, t))
    for index in made:
        assert index.dtype == torch.int32
        found, offsets, sources = index.split([len(rows), t + 1, len(rows)])
        assert found.tolist() == rows
        for row in range(t):
            held_by = sources[offsets[row] : offsets[row + 1]].tolist()
            assert held_by == [i for i, r in enumerate(rows) if r == row]


def test_prefix_index_refuses_segments_outside():
    choose("native")
    one = torch.tensor([1])
    with pytest.raises(IndexError, match=r"segment 0 has prefix 1\+1, own 3\+2 with t = 4"):
        ops.prefix_index(one, one, one + 2, one + 1, 4)


# ---- qkv_rope


def fused_projection(a, g, d, dtype, case="one pair", seed=0):
    """(x, cos, sin, index) of a pack with the segments of a case."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.tensor(column, dtype=torch.int32) for column in SEGMENTS[case]]
    t = 23
    x = torch.randn(t, (a + 2 * g) * d, generator=generator).to(dtype)
    angles = torch.randn(t, d // 2, generator=generator)
    return x, angles.cos(), angles.sin(), ops.prefix_index_ref(*columns, t)


def qkv_in_one(op):
    """op with its three outputs flattened into one tensor, as the helpers here want them."""
    return lambda *inputs: torch.cat([out.flatten() for out in op(*inputs)])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("a,g,d", [(1, 1, 2), (6, 2, 16), (0, 3, 8), (4, 4, 10)])
def test_qkv_rope(implementation, dtype, case, a, g, d):
    """Split, rotation and gather by hand, in fp64."""
    choose(implementation)
    x, cos, sin, index = fused_projection(a, g, d, dtype, case)

    def by_hand(x, cos, sin):
        rows, groups = prefix_rows(SEGMENTS[case]), x.view(len(x), g, -1, d)
        if a:
            query, key, value = groups[:, :, : a // g], groups[:, :, -2], groups[:, :, -1]
        else:
            query, (key, value) = x.new_empty(len(x), 0, 1, d), x.view(len(x), 2, g, d).unbind(1)
        query, key = (
            ops.rope_ref(query.reshape(len(x), a, d), cos, sin),
            ops.rope_ref(key, cos, sin),
        )
        return torch.cat([query.flatten(), key[rows].flatten(), value[rows].flatten()])

    def run(x, cos, sin):
        if x.dtype == torch.float64:
            return by_hand(x, cos, sin)
        return qkv_in_one(ops.qkv_rope)(x, cos, sin, index, a, g)

    assert_kernel(run, by_hand, [x, cos, sin], [0], dtype)
    query, key, value = ops.qkv_rope(x, cos, sin, index, a, g)
    total = len(prefix_rows(SEGMENTS[case]))
    assert query.shape == (len(x), a, d) and key.shape == value.shape == (total, g, d)


def test_qkv_rope_opcheck_and_refusals():
    choose("native")
    if ops.qkv._qkv_rope is None:
        pytest.skip("rmega._C is from older sources")
    x, cos, sin, index = fused_projection(4, 2, 6, torch.float32)
    opcheck("qkv_rope", (x.requires_grad_(), cos, sin, index, 4, 2))
    query, key, value = (y.detach() for y in ops.qkv_rope(x, cos, sin, index, 4, 2))
    opcheck("qkv_rope_backward", (query, key, value, cos, sin, index))
    with pytest.raises(RuntimeError, match=r"rows of 48 for 4 \+ 2 \* 4 heads of 6"):
        ops.qkv_rope(x, cos, sin, index, 4, 4)
    with pytest.raises(RuntimeError, match=r"int32 \[2 total \+ t \+ 1\]"):
        ops.qkv_rope(x, cos, sin, index.long(), 4, 2)
    with pytest.raises(RuntimeError, match="cos and sin"):
        ops.qkv_rope(x, cos, sin[1:], index, 4, 2)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("a,g,d", [(1, 1, 2), (6, 2, 16), (0, 3, 8)])
def test_qkv_norm_rope(implementation, dtype, case, a, g, d):
    """The three steps by hand in fp64; gradients of the projection and of both weights."""
    choose(implementation)
    x, cos, sin, index = fused_projection(a, g, d, dtype, case)
    weights = [(0.5 + torch.rand(d, generator=torch.Generator().manual_seed(i))) for i in (1, 2)]

    def run(*inputs):
        return qkv_in_one(ops.qkv_norm_rope)(*inputs, index, a, g, 1e-5)

    def steps(x, q_weight, k_weight, cos, sin):
        t, normed = len(x), x.view(len(x), g, -1, d) if a else x.view(len(x), 2, g, d)
        if a:
            query, key, value = normed.split([a // g, 1, 1], dim=2)
            query = ops.rms_norm_ref(query, q_weight, 1e-5)
            key = ops.rms_norm_ref(key, k_weight, 1e-5)
            normed = torch.cat([query, key, value], dim=2)
        else:
            key, value = normed.unbind(1)
            normed = torch.stack([ops.rms_norm_ref(key, k_weight, 1e-5), value], dim=1)
        return qkv_in_one(ops.qkv_rope_ref)(normed.reshape(t, -1), cos, sin, index, a, g)

    inputs = [x, *(weight.to(dtype) for weight in weights), cos, sin]
    # Without queries their weight takes no part.
    assert_kernel(run, steps, inputs, [0, 1, 2] if a else [0, 2], dtype)


def test_qkv_norm_rope_opcheck_and_refusals():
    choose("native")
    if ops.qkv._qkv_norm_rope is None:
        pytest.skip("rmega._C is from older sources")
    x, cos, sin, index = fused_projection(4, 2, 6, torch.float32)
    weights = [torch.rand(6, requires_grad=True) for _ in range(2)]
    opcheck("qkv_norm_rope", (x.requires_grad_(), *weights, cos, sin, index, 4, 2, 1e-5))
    outs = ops.qkv_norm_rope(x, *weights, cos, sin, index, 4, 2, 1e-5)
    grads = [out.detach() for out in outs]
    fixed = [value.detach() for value in (x, *weights)]
    opcheck("qkv_norm_rope_backward", (*grads, *fixed, cos, sin, index, 1e-5))
    with pytest.raises(RuntimeError, match=r"weight Float \[7\]"):
        ops.qkv_norm_rope(x, weights[0], torch.rand(7), cos, sin, index, 4, 2, 1e-5)


# ---- fused elementwise: every instruction set that this CPU has


def assert_kernel(op, plain, inputs, wrt, dtype):
    """Values and gradients within twice plain torch's error; the exact ones are plain torch's in
    fp64."""
    inputs = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs]
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    out, grads = both_with_grad(op, inputs, wrt)
    plain_out, plain_grads = both_with_grad(plain, inputs, wrt)
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    wide = [
        x.requires_grad_(i in wrt) if isinstance(x, torch.Tensor) else x for i, x in enumerate(wide)
    ]
    exact = plain(*wide)
    exact_grads = torch.autograd.grad(exact, [wide[i] for i in wrt], upstream.double())
    assert_twice_plain(out, plain_out, exact.detach())
    for got, simple, right in zip(grads, plain_grads, exact_grads, strict=True):
        assert_twice_plain(got, simple, right)


ELEMENTWISE_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@ELEMENTWISE_DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (7, 1, 64), (130, 1, 576), (65, 131), (0, 16), (2, 3, 48)]
)
def test_rms_norm(isa, dtype, shape):
    torch.manual_seed(1)
    x, weight = torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5
    assert_kernel(ops.rms_norm, ops.rms_norm_ref, [x, weight, 1e-5], [0, 1], dtype)


@ELEMENTWISE_DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 1, 64), (130, 1, 576), (0, 16)])
def test_add_rms_norm(isa, dtype, shape):
    torch.manual_seed(1)
    x, residual, weight = torch.randn(shape) * 3, torch.randn(shape), torch.rand(shape[-1]) + 0.5

    def both(op):
        return lambda *inputs: torch.cat([out.flatten() for out in op(*inputs)])

    inputs = [x, residual, weight, 1e-5]
    assert_kernel(both(ops.add_rms_norm), both(ops.add_rms_norm_ref), inputs, [0, 1, 2], dtype)
    x, residual, weight = (y.to(dtype) for y in (x, residual, weight))
    total, y = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(y, ops.rms_norm(total, weight, 1e-5))


def test_rms_norm_rounds_as_llama_does():
    """bf16 values equal those of transformers' LlamaRMSNorm, but where fp32 sums in another order
    round otherwise."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    choose("native")
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-5).to(torch.bfloat16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(200, 96).to(torch.bfloat16)
    got, expected = ops.rms_norm(x, norm.weight, 1e-5), norm(x)
    assert (got != expected).float().mean() < 1e-3
    assert torch.allclose(got.float(), expected.float(), rtol=2**-7)


@ELEMENTWISE_DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (7, 1, 128), (33, 1, 3072), (5, 262), (0, 16)])
def test_swiglu(isa, dtype, shape):
    torch.manual_seed(2)
    assert_kernel(ops.swiglu, ops.swiglu_ref, [torch.randn(shape) * 4], [0], dtype)


@ELEMENTWISE_DTYPES
@pytest.mark.parametrize(
    "t,a,d", [(1, 1, 2), (5, 3, 8), (33, 9, 64), (4, 2, 130), (0, 2, 16), (7, 1, 96)]
)
def test_rope(isa, dtype, t, a, d):
    torch.manual_seed(3)
    angles = torch.rand(t, d // 2) * 100
    assert_kernel(
        ops.rope, ops.rope_ref, [torch.randn(t, a, d), angles.cos(), angles.sin()], [0], dtype
    )


def test_rope_of_bf16_with_fp32_tables_and_of_views(isa):
    torch.manual_seed(3)
    angles = torch.rand(6, 16) * 100
    qkv = torch.randn(6, 2, 4 * 32).to(torch.bfloat16)
    for view in (
        qkv[..., 64:96],
        qkv.view(6, 8, 32)[:, ::3],
        qkv.view(6, 2, 4, 32)[:, :, 1].transpose(1, 2).mT,
    ):
        exact = ops.rope_ref(view.double(), angles.cos().double(), angles.sin().double())
        got = ops.rope(view, angles.cos(), angles.sin())
        assert got.is_contiguous() and torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-2)


def test_elementwise_extremes(isa):
    """What overflows, vanishes or is not a number comes out as plain torch has it."""
    gate = torch.tensor(
        [-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, math.inf, math.nan]
    )
    x = torch.cat([gate, torch.ones_like(gate)])[None].requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        got, (grad,) = both_with_grad(ops.swiglu, [x.detach().to(dtype)], [0])
        plain, (plain_grad,) = both_with_grad(ops.swiglu_ref, [x.detach().to(dtype)], [0])
        assert torch.allclose(got[..., :9].float(), plain[..., :9].float(), rtol=1e-2, atol=1e-6)
        assert torch.allclose(
            grad[..., 1:8].float(), plain_grad[..., 1:8].float(), rtol=1e-2, atol=1e-6
        )
        assert got[0, -2] == math.inf and got[0, -1].isnan()
        bad = torch.ones(3, 40, dtype=dtype)
        bad[1, 3] = math.nan
        assert ops.rms_norm(bad, torch.ones(40, dtype=dtype), 1e-5).isnan().all(1).tolist() == [
            False,
            True,
            False,
        ]
        turned = ops.rope(
            bad.view(3, 2, 20), torch.ones(3, 10, dtype=dtype), torch.zeros(3, 10, dtype=dtype)
        )
        assert turned.isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_elementwise_sums_do_not_depend_on_threads(isa):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(900, 96), torch.rand(96), torch.randn(900, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, inv = torch.ops.rmega.rms_norm(x, weight, 1e-5)
            results.append((y, *torch.ops.rmega.rms_norm_backward(grad, x, weight, inv)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_opcheck(dtype):
    x, weight = (
        torch.randn(3, 1, 8, dtype=dtype, requires_grad=True),
        torch.rand(8, dtype=dtype, requires_grad=True),
    )
    table = torch.rand(3, 4)
    opcheck("rms_norm", (x, weight, 1e-5))
    opcheck("rms_norm_backward", (x.detach(), x.detach(), weight.detach(), torch.rand(3)))
    if ops.elementwise._add_rms_norm is not None:
        opcheck("add_rms_norm", (x, torch.rand_like(x), weight, 1e-5))
        plain = x.detach()
        opcheck("add_rms_norm_backward", (plain, plain, plain, weight.detach(), torch.rand(3)))
    opcheck("swiglu", (x,))
    opcheck("swiglu_backward", (x.detach()[..., :4], x.detach()))
    opcheck("rope", (x, table, table, False))


def test_elementwise_refuses_other_shapes():
    choose("native")
    x = torch.ones(3, 2, 8)
    with pytest.raises(RuntimeError, match=r"weight Float \[7\] for x Float \[3, 2, 8\]"):
        ops.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(RuntimeError, match=r"x must be \[..., 2f\], got \[3, 5\]"):
        ops.swiglu(torch.ones(3, 5))
    with pytest.raises(RuntimeError, match=r"cos and sin must be \[t, d/2\].* \[3, 8\]"):
        ops.rope(x, torch.ones(3, 8), torch.ones(3, 8))


def test_elementwise_elsewhere_is_plain_torch():
    choose("native")
    for dtype in (torch.float16, torch.float64):
        x = torch.randn(4, 16, dtype=dtype)
        assert torch.equal(ops.rms_norm(x, x[0], 1e-5), ops.rms_norm_ref(x, x[0], 1e-5))
        assert torch.equal(ops.swiglu(x), ops.swiglu_ref(x))
