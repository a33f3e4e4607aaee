"""The CUDA kernels on a GPU, against plain torch there and the reference in fp64. Skipped where
there is none."""

import pytest
import torch

from rmega import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(
        not getattr(ops.implementation._C, "has_cuda", False),
        reason="rmega._C was built without CUDA",
    ),
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)


def assert_twice_plain(op, plain, inputs, dtype, **options):
    """Value and gradient of the first input: the error is at most twice that of plain torch in
    ``dtype``, or two units in the last place of the dtype that sums are kept in: with one pair
    plain torch may be exact, and CUDA's expf and log1pf may round the other way."""
    last_place = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    upstream, results = None, []
    for form, kind in ((op, dtype), (plain, dtype), (plain, torch.float64)):
        x = inputs[0].to(dtype).to(kind).clone().requires_grad_()
        out = form(x, *inputs[1:], **options)
        out = out if isinstance(out, tuple) else (out,)
        if upstream is None:
            upstream = torch.randn(out[0].shape, device="cuda", dtype=torch.float64).to(
                out[0].dtype
            )
        (grad,) = torch.autograd.grad(out[0], x, upstream.to(out[0].dtype))
        results.append((*out, grad))
    for got, simple, exact in zip(*results, strict=True):
        assert got.dtype == simple.dtype and got.shape == simple.shape
        if exact.numel():
            allowed = 2 * (simple.double() - exact).abs().max() + last_place * exact.abs().max()
            assert (got.double() - exact).abs().max() <= allowed


@DTYPES
@pytest.mark.parametrize(
    "t,h,rows",
    [
        (1, 1, [0]),
        (7, 33, [6, 0, 3]),
        (500, 2048, [4, 4, 499, 4]),
        (4, 8, []),
        (0, 8, []),
        (3000, 130, [*range(0, 3000, 3)]),
    ],
)
def test_gather_last_token(dtype, t, h, rows):
    torch.manual_seed(0)
    last = torch.tensor(rows, dtype=torch.int64, device="cuda")
    hidden = torch.randn(t, h, device="cuda")
    assert_twice_plain(ops.gather_last_token, ops.gather_last_token_ref, [hidden, last], dtype)


@DTYPES
@pytest.mark.parametrize("loss", ops.LOSSES)
@pytest.mark.parametrize(
    "penalty,clamp", [*((name, False) for name in ops.PENALTIES), ("log_barrier", True)]
)
@pytest.mark.parametrize("n,m", [(1, 1), (128, 64), (77, 1000), (5, 0), (0, 0)])
def test_pairwise_loss(dtype, loss, penalty, clamp, n, m):
    torch.manual_seed(0)
    chosen, rejected = torch.randint(max(n, 1), (2, m), device="cuda")
    if loss == "plackett_luce":
        chosen = chosen.sort().values  # choices of one to some 15 pairs
    inputs = [
        torch.randn(n, device="cuda") * 2,
        chosen,
        rejected,
        torch.rand(m, device="cuda"),
        torch.rand(m, device="cuda") + 0.5,
    ]
    assert_twice_plain(
        ops.pairwise_loss,
        ops.pairwise_loss_ref,
        inputs,
        dtype,
        loss=loss,
        penalty=penalty,
        label_smoothing=0.0 if loss == "plackett_luce" else 0.1,
        barrier_clamp=clamp,
    )


@DTYPES
@pytest.mark.parametrize("g,d", [(1, 1), (3, 5), (8, 128)])
@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
def test_gather_prefix_kv(dtype, g, d, index_device):
    torch.manual_seed(0)
    segments = [(0, 0, 0, 50), (0, 50, 50, 1), (0, 50, 51, 20), (0, 50, 71, 9), (3, 0, 4, 0)]
    segments += [(200, 20, 220 + i % 30, 1) for i in range(300)]
    index = [
        torch.tensor(column, dtype=torch.int32, device=index_device)
        for column in zip(*segments, strict=True)
    ]
    total = int((index[1] + index[3]).sum())
    fused = torch.randn(400, g, 2 * d, device="cuda")
    for x in (fused[..., :d], fused[..., d:].contiguous()):
        assert_twice_plain(
            ops.gather_prefix_kv, ops.gather_prefix_kv_ref, [x, *index, total], dtype
        )
    x = fused[..., d:].to(dtype)  # a view: read in place
    assert torch.equal(
        ops.gather_prefix_kv(x, *index, total), ops.gather_prefix_kv_ref(x, *index, total)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a,g,d", [(1, 1, 2), (16, 8, 128), (6, 3, 10), (0, 8, 128)])
@pytest.mark.parametrize("float_tables", [True, False])
def test_qkv_rope(dtype, a, g, d, float_tables):
    torch.manual_seed(0)
    segments = [(0, 0, 0, 50), (0, 50, 50, 1), (0, 50, 51, 20), (0, 50, 71, 9), (3, 0, 4, 0)]
    segments += [(200, 20, 220 + i % 30, 1) for i in range(300)]
    columns = [torch.tensor(column) for column in zip(*segments, strict=True)]
    t, index = 400, ops.prefix_index(*columns, 400).cuda()
    angles = torch.randn(t, d // 2, device="cuda")
    tables = [y.to(torch.float32 if float_tables else dtype) for y in (angles.cos(), angles.sin())]

    def flat(op):
        return lambda x, *given: torch.cat([out.flatten() for out in op(x, *given)])

    inputs = [torch.randn(t, (a + 2 * g) * d, device="cuda"), *tables, index, a, g]
    assert_twice_plain(flat(ops.qkv_rope), flat(ops.qkv_rope_ref), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a,g,d", [(1, 1, 16), (16, 8, 128), (32, 8, 128), (0, 8, 128)])
@pytest.mark.parametrize("float_tables", [True, False])
def test_qkv_norm_rope(dtype, a, g, d, float_tables):
    torch.manual_seed(0)
    segments = [(0, 0, 0, 50), (0, 50, 50, 1), (0, 50, 51, 20), (0, 50, 71, 9), (3, 0, 4, 0)]
    segments += [(200, 20, 220 + i % 30, 1) for i in range(300)]
    columns = [torch.tensor(column) for column in zip(*segments, strict=True)]
    t, index = 400, ops.prefix_index(*columns, 400).cuda()
    angles = torch.randn(t, d // 2, device="cuda")
    tables = [y.to(torch.float32 if float_tables else dtype) for y in (angles.cos(), angles.sin())]
    weights = [(0.5 + torch.rand(d, device="cuda")).to(dtype) for _ in range(2)]

    def flat(op):
        return lambda x, *given: torch.cat([out.flatten() for out in op(x, *given)])

    x = torch.randn(t, (a + 2 * g) * d, device="cuda")
    inputs = [x, *weights, *tables, index, a, g, 1e-5]
    assert_twice_plain(flat(ops.qkv_norm_rope), flat(ops.qkv_norm_rope_ref), inputs, dtype)


ELEMENTWISE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@ELEMENTWISE
@pytest.mark.parametrize(
    "rows,h", [(1, 1), (5, 33), (3000, 576), (2000, 2048), (300, 8192), (3, 16384), (0, 8)]
)
def test_rms_norm(dtype, rows, h):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(rows, h, device="cuda") * 3,
        (1 + torch.rand(h, device="cuda")).to(dtype),
    )

    def form(op):
        return lambda x, weight: op(x, weight.to(x.dtype), 1e-5)

    assert_twice_plain(form(ops.rms_norm), form(ops.rms_norm_ref), [x, weight], dtype)
    # And the weight's gradient, by exchanging the two.
    assert_twice_plain(
        lambda weight, x: ops.rms_norm(x.to(weight.dtype), weight, 1e-5),
        lambda weight, x: ops.rms_norm_ref(x.to(weight.dtype), weight, 1e-5),
        [weight.float(), x.to(dtype)],
        dtype,
    )


@ELEMENTWISE
@pytest.mark.parametrize("rows,h", [(1, 1), (5, 33), (2000, 2048), (3, 16384), (0, 8)])
def test_add_rms_norm(dtype, rows, h):
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, h, device="cuda") * 3 for _ in range(2))
    weight = (1 + torch.rand(h, device="cuda")).to(dtype)

    def flat(op):
        return lambda x, *more: torch.cat(
            [out.flatten() for out in op(x, *(y.to(x.dtype) for y in more), 1e-5)]
        )

    inputs = [x, residual.to(dtype), weight]
    assert_twice_plain(flat(ops.add_rms_norm), flat(ops.add_rms_norm_ref), inputs, dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    total, y = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(y, ops.rms_norm(total, weight, 1e-5))


@ELEMENTWISE
@pytest.mark.parametrize("rows,f", [(1, 1), (5, 33), (2000, 1536), (300, 8192), (0, 8)])
def test_swiglu(dtype, rows, f):
    torch.manual_seed(0)
    assert_twice_plain(
        ops.swiglu, ops.swiglu_ref, [torch.randn(rows, 1, 2 * f, device="cuda") * 3], dtype
    )


@ELEMENTWISE
@pytest.mark.parametrize("t,a,d", [(1, 1, 2), (100, 3, 10), (3000, 16, 128), (0, 2, 8)])
def test_rope(dtype, t, a, d):
    torch.manual_seed(0)
    angles = torch.randn(t, d // 2, device="cuda")
    for cos, sin in (
        (angles.cos(), angles.sin()),
        (angles.cos().to(dtype), angles.sin().to(dtype)),
    ):
        fused = torch.randn(t, a, 2 * d, device="cuda")
        for x in (fused[..., d:], fused[..., :d].contiguous()):
            assert_twice_plain(ops.rope, ops.rope_ref, [x, cos, sin], dtype)


def test_elementwise_agrees_with_the_cpu():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(50, 576).to(dtype), torch.rand(576).to(dtype)
        for op in (
            lambda x, weight: ops.rms_norm(x, weight, 1e-5),
            lambda x, weight: ops.swiglu(x),
        ):
            here, there = op(x, weight), op(x.cuda(), weight.cuda()).cpu()
            assert torch.allclose(
                here.float(),
                there.float(),
                rtol=2**-7 if dtype == torch.bfloat16 else 1e-5,
                atol=1e-6,
            )


def test_sums_have_one_order():
    """The same bits every time, whatever the scheduling."""
    torch.manual_seed(0)
    index = [
        torch.tensor(c, device="cuda")
        for c in zip(*[(0, 300, 300 + i, 1) for i in range(200)], strict=True)
    ]
    grad = torch.randn(200 * 301, 4, 64, device="cuda", dtype=torch.bfloat16)
    rewards, weight = torch.randn(64, device="cuda"), torch.rand(2000, device="cuda")
    chosen, rejected = torch.randint(64, (2, 2000), device="cuda")
    last = torch.randint(50, (4000,), device="cuda")
    rows = torch.randn(4000, 256, device="cuda")

    plan = ops.prefix_index(*(column.cpu() for column in index), 500).cuda()
    queries = torch.randn(500, 8, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(500, 32, device="cuda")

    def once():
        return (
            *torch.ops.rmega.rms_norm_backward(rows, rows, rows[0], rows[:, 0].abs()),
            torch.ops.rmega.gather_prefix_kv_backward(grad, *index, 500),
            torch.ops.rmega.qkv_rope_backward(queries, grad, grad, table, table, plan),
            torch.ops.rmega.gather_last_token_backward(rows, last, 50),
            *torch.ops.rmega.pairwise_loss(
                rewards, chosen, rejected, weight, weight, "focal", "log_barrier", 0.01, 0.0, False
            ),
        )

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_opcheck():
    index = [torch.tensor(c, device="cuda") for c in ([0, 0, 0], [0, 4, 4], [0, 4, 7], [4, 3, 2])]
    x = torch.randn(9, 2, 3, device="cuda", requires_grad=True)
    last, ones = torch.tensor([4, 1, 4], device="cuda"), torch.ones(2, device="cuda")
    torch.library.opcheck(torch.ops.rmega.gather_prefix_kv.default, (x, *index, 17))
    torch.library.opcheck(
        torch.ops.rmega.gather_last_token.default, (x.detach()[:, 0].requires_grad_(), last)
    )
    torch.library.opcheck(
        torch.ops.rmega.pairwise_loss.default,
        (
            torch.randn(5, device="cuda", requires_grad=True),
            last[:2],
            last[1:],
            ones,
            ones,
            "focal",
            "l2",
            0.01,
            0.1,
            False,
        ),
    )
