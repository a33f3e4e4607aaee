"""The CUDA kernels on a GPU, against plain torch there and the reference in fp64. Skipped where there is none."""

import pytest
import torch

from rmega import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(ops._C is None or not ops._C.has_cuda, reason="rmega._C was built without CUDA"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def assert_twice_plain(op, plain, inputs, dtype, **options):
    """Value and gradient of the first input: the error is at most twice that of plain torch in ``dtype``."""
    upstream, results = None, []
    for form, kind in ((op, dtype), (plain, dtype), (plain, torch.float64)):
        x = inputs[0].to(dtype).to(kind).clone().requires_grad_()
        out = form(x, *inputs[1:], **options)
        out = out if isinstance(out, tuple) else (out,)
        if upstream is None:
            upstream = torch.randn(out[0].shape, device="cuda", dtype=torch.float64).to(out[0].dtype)
        (grad,) = torch.autograd.grad(out[0], x, upstream.to(out[0].dtype))
        results.append((*out, grad))
    for got, simple, exact in zip(*results, strict=True):
        assert got.dtype == simple.dtype and got.shape == simple.shape
        if exact.numel():
            allowed = 2 * (simple.double() - exact).abs().max() + 1e-7 * exact.abs().max()
            assert (got.double() - exact).abs().max() <= allowed


@DTYPES
@pytest.mark.parametrize("t,h,rows", [(1, 1, [0]), (7, 33, [6, 0, 3]), (500, 2048, [4, 4, 499, 4]), (4, 8, []),
                                      (0, 8, []), (3000, 130, [*range(0, 3000, 3)])])
def test_gather_last_token(dtype, t, h, rows):
    torch.manual_seed(0)
    last = torch.tensor(rows, dtype=torch.int64, device="cuda")
    hidden = torch.randn(t, h, device="cuda")
    assert_twice_plain(ops.gather_last_token, ops.gather_last_token_ref, [hidden, last], dtype)


@DTYPES
@pytest.mark.parametrize("loss", ops.LOSSES)
@pytest.mark.parametrize("penalty,clamp", [*((name, False) for name in ops.PENALTIES), ("log_barrier", True)])
@pytest.mark.parametrize("n,m", [(1, 1), (128, 64), (77, 1000), (5, 0), (0, 0)])
def test_pairwise_loss(dtype, loss, penalty, clamp, n, m):
    torch.manual_seed(0)
    chosen, rejected = torch.randint(max(n, 1), (2, m), device="cuda")
    inputs = [torch.randn(n, device="cuda") * 2, chosen, rejected, torch.rand(m, device="cuda"),
              torch.rand(m, device="cuda") + 0.5]
    assert_twice_plain(ops.pairwise_loss, ops.pairwise_loss_ref, inputs, dtype, loss=loss, penalty=penalty,
                       label_smoothing=0.1, barrier_clamp=clamp)


@DTYPES
@pytest.mark.parametrize("g,d", [(1, 1), (3, 5), (8, 128)])
@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
def test_gather_prefix_kv(dtype, g, d, index_device):
    torch.manual_seed(0)
    segments = [(0, 0, 0, 50), (0, 50, 50, 1), (0, 50, 51, 20), (0, 50, 71, 9), (3, 0, 4, 0)]
    segments += [(200, 20, 220 + i % 30, 1) for i in range(300)]
    index = [torch.tensor(column, dtype=torch.int32, device=index_device) for column in zip(*segments, strict=True)]
    total = int((index[1] + index[3]).sum())
    fused = torch.randn(400, g, 2 * d, device="cuda")
    for x in (fused[..., :d], fused[..., d:].contiguous()):
        assert_twice_plain(ops.gather_prefix_kv, ops.gather_prefix_kv_ref, [x, *index, total], dtype)
    x = fused[..., d:].to(dtype)  # a view: read in place
    assert torch.equal(ops.gather_prefix_kv(x, *index, total), ops.gather_prefix_kv_ref(x, *index, total))


def test_sums_have_one_order():
    """The same bits every time, whatever the scheduling."""
    torch.manual_seed(0)
    index = [torch.tensor(c, device="cuda") for c in zip(*[(0, 300, 300 + i, 1) for i in range(200)], strict=True)]
    grad = torch.randn(200 * 301, 4, 64, device="cuda", dtype=torch.bfloat16)
    rewards, weight = torch.randn(64, device="cuda"), torch.rand(2000, device="cuda")
    chosen, rejected = torch.randint(64, (2, 2000), device="cuda")
    last = torch.randint(50, (4000,), device="cuda")
    rows = torch.randn(4000, 256, device="cuda")

    def once():
        return (torch.ops.rmega.gather_prefix_kv_backward(grad, *index, 500),
                torch.ops.rmega.gather_last_token_backward(rows, last, 50),
                *torch.ops.rmega.pairwise_loss(rewards, chosen, rejected, weight, weight, "focal", "log_barrier", 0.01,
                                               0.0, False))

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_opcheck():
    index = [torch.tensor(c, device="cuda") for c in ([0, 0, 0], [0, 4, 4], [0, 4, 7], [4, 3, 2])]
    x = torch.randn(9, 2, 3, device="cuda", requires_grad=True)
    last, ones = torch.tensor([4, 1, 4], device="cuda"), torch.ones(2, device="cuda")
    torch.library.opcheck(torch.ops.rmega.gather_prefix_kv.default, (x, *index, 17))
    torch.library.opcheck(torch.ops.rmega.gather_last_token.default, (x.detach()[:, 0].requires_grad_(), last))
    torch.library.opcheck(torch.ops.rmega.pairwise_loss.default,
                          (torch.randn(5, device="cuda", requires_grad=True), last[:2], last[1:], ones, ones, "focal",
                           "l2", 0.01, 0.1, False))
