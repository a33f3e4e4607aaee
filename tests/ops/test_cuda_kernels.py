"""The logic of the CUDA kernels, run on the CPU by tests/cuda_on_host.h, against the plain-torch
reference in fp64.

A GPU runs the operators' own tests instead (tests/ops/test_ops_cuda.py); these run wherever a C++
compiler is.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rmega import ops

HERE = Path(__file__).resolve().parents[1]
CSRC = HERE.parent / "csrc"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # DType in launchers.h

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

WRAPPERS = """
#include "launchers.h"
#define DT static_cast<rmega::DType>(dtype)
typedef const int64_t* Rows; typedef const int32_t* Index;
typedef const void* In; typedef void* Out; typedef int64_t N;
extern "C" {
void gather(In hidden, Rows last, Out out, N t, N n, N row_bytes) {
  rmega::launch_gather_rows(hidden, last, out, t, n, row_bytes, nullptr);
}
void gather_backward(In grad, Rows last, Out out, N t, N n, N h, N dtype) {
  rmega::launch_gather_rows_backward(grad, last, out, t, n, h, DT, nullptr);
}
void pairs(In rewards, Rows c, Rows r, In margin, In weight, Out loss, Out stats, Out grad,
           N n, N m, N dtype, N loss_name, N penalty, N clamp) {
  const rmega::LossOptions options{static_cast<rmega::Loss>(loss_name),
                                   static_cast<rmega::Penalty>(penalty), 0.02,
                                   loss_name == 2 ? 0.0 : 0.1, clamp != 0};
  rmega::launch_pairwise_loss(rewards, c, r, margin, weight, loss, stats, grad, n, m, DT, options,
                              nullptr);
}
void prefix(In x, Index rows, Out out, N t, N total, N g, N d, N row, N group, N size) {
  rmega::launch_gather_prefix(x, rows, out, t, total, g, d, row, group, int(size), nullptr);
}
void prefix_backward(In grad, Index offsets, Index sources, Out out, N t, N total, N width,
                     N dtype) {
  rmega::launch_gather_prefix_backward(grad, offsets, sources, out, t, total, width, DT, nullptr);
}
void qkv(In x, In cos, In sin, Index rows, Out q, Out k, Out v, N t, N total, N a, N g, N d,
         N row_stride, N dtype, N float_tables) {
  rmega::launch_qkv_rope(x, cos, sin, rows, q, k, v, {t, total, a, g, d}, row_stride, DT,
                         float_tables != 0, nullptr);
}
void qkv_backward(In dq, In dk, In dv, In cos, In sin, Index offsets, Index sources, Out dx, N t,
                  N total, N a, N g, N d, N dtype, N float_tables) {
  rmega::launch_qkv_rope_backward(dq, dk, dv, cos, sin, offsets, sources, dx, {t, total, a, g, d},
                                  DT, float_tables != 0, nullptr);
}
void qkv_norm(In x, In qw, In kw, In cos, In sin, Index rows, Out q, Out k, Out v, N t, N total,
              N a, N g, N d, N row_stride, N dtype, N float_tables) {
  rmega::launch_qkv_norm_rope(x, {qw, kw, 1e-5}, cos, sin, rows, q, k, v, {t, total, a, g, d},
                              row_stride, DT, float_tables != 0, nullptr);
}
void qkv_norm_backward(In dq, In dk, In dv, In x, In qw, In kw, In cos, In sin, Index offsets,
                       Index sources, Out dx, Out partial, N t, N total, N a, N g, N d,
                       N row_stride, N parts, N dtype, N float_tables) {
  rmega::launch_qkv_norm_rope_backward(dq, dk, dv, x, {qw, kw, 1e-5}, cos, sin, offsets, sources,
                                       dx, partial, {t, total, a, g, d}, row_stride, parts, DT,
                                       float_tables != 0, nullptr);
}
void norm(In x, In weight, Out y, Out inv, N rows, N h, N dtype) {
  rmega::launch_rms_norm(x, nullptr, weight, nullptr, y, inv, rows, h, 1e-5, DT, nullptr);
}
void norm_backward(In dy, In x, In weight, In inv, Out dx, Out partial, N rows, N h, N parts,
                   N dtype) {
  rmega::launch_rms_norm_backward(dy, nullptr, x, weight, inv, dx, partial, rows, h, parts, DT,
                                  nullptr);
}
void add_norm(In x, In residual, In weight, Out total, Out y, Out inv, N rows, N h, N dtype) {
  rmega::launch_rms_norm(x, residual, weight, total, y, inv, rows, h, 1e-5, DT, nullptr);
}
void add_norm_backward(In dy, In dtotal, In x, In weight, In inv, Out dx, Out partial, N rows,
                       N h, N parts, N dtype) {
  rmega::launch_rms_norm_backward(dy, dtotal, x, weight, inv, dx, partial, rows, h, parts, DT,
                                  nullptr);
}
void glu(In x, Out y, N rows, N f, N dtype) { rmega::launch_swiglu(x, y, rows, f, DT, nullptr); }
void glu_backward(In dy, In x, Out dx, N rows, N f, N dtype) {
  rmega::launch_swiglu_backward(dy, x, dx, rows, f, DT, nullptr);
}
void rope(In x, In cos, In sin, Out y, N t, N a, N d, N row, N head, N backwards, N dtype,
          N float_tables) {
  rmega::launch_rope(x, cos, sin, y, t, a, d, row, head, backwards != 0, DT, float_tables != 0,
                     nullptr);
}
}
"""


def as_cpp(cuda: str) -> str:
    """CUDA source as C++: ``kernel<<<grid, block, shared, stream>>>(args)`` becomes a call of
    on_host::launch."""

    def launch(match: re.Match) -> str:
        grid, block = re.split(r",\s*(?![^()]*\))", match[2])[:2]
        return f"on_host::launch({grid}, {block}, [&] {{ {match[1]}({match[3]}); }});"

    cuda = re.sub(r"#include <cuda_\w+\.h>", '#include "cuda_on_host.h"', cuda)
    cpp = re.sub(r"(\w+(?:<[^<>]*>)?)\s*<<<(.*?)>>>\((.*?)\);", launch, cuda, flags=re.S)
    assert "<<<" not in cpp
    return cpp


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    (folder / "cuda").mkdir()
    for header in ("launchers.h", "pair_math.h", "cuda/device.cuh"):
        (folder / header).write_text(as_cpp((CSRC / header).read_text()))
    (folder / "wrappers.cpp").write_text(WRAPPERS)
    for kernel in (
        "gather_last_token",
        "pairwise_loss",
        "gather_prefix_kv",
        "qkv_rope",
        "elementwise",
    ):
        (folder / f"cuda/{kernel}.cpp").write_text(as_cpp((CSRC / f"cuda/{kernel}.cu").read_text()))
    library = folder / "kernels.so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{HERE}",
        "-o",
        str(library),
        *map(str, sorted(folder.rglob("*.cpp"))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "_Float16" in done.stderr:
        pytest.skip("this C++ compiler has no _Float16")
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *args):
        getattr(loaded, name)(
            *(
                ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int64(x)
                for x in args
            )
        )

    return call


def nearly(got, exact, dtype):
    """Within a rounding to ``dtype`` and what fp32 sums lose."""
    return torch.allclose(
        got.double(),
        exact,
        rtol={torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2**-7),
        atol=1e-12 if dtype == torch.float64 else 1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "t,h,rows", [(1, 1, [0]), (7, 33, [6, 0, 3]), (40, 300, [39, 2, 39, 39, 1, 2]), (9, 8, [])]
)
def test_gather_last_token(kernels, dtype, t, h, rows):
    torch.manual_seed(0)
    hidden, last = torch.randn(t, h).to(dtype), torch.tensor(rows, dtype=torch.int64)
    out = torch.full((len(rows), h), 7.0, dtype=dtype)
    if rows:
        kernels("gather", hidden, last, out, t, len(rows), h * hidden.element_size())
    assert torch.equal(out, hidden[last])
    grad, got = torch.randn(len(rows), h).to(dtype), torch.full((t, h), 7.0, dtype=dtype)
    kernels("gather_backward", grad, last, got, t, len(rows), h, DTYPES.index(dtype))
    assert nearly(
        got, torch.zeros(t, h, dtype=torch.float64).index_add_(0, last, grad.double()), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ops.LOSSES)
@pytest.mark.parametrize(
    "penalty,clamp", [*((name, False) for name in ops.PENALTIES), ("log_barrier", True)]
)
@pytest.mark.parametrize("n,m", [(1, 1), (19, 300), (3, 0), (0, 0)])
def test_pairwise_loss(kernels, dtype, loss, penalty, clamp, n, m):
    torch.manual_seed(n)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rewards = (torch.randn(n) * 3).to(dtype)
    chosen, rejected = torch.randint(max(n, 1), (2, m))
    if loss == "plackett_luce":
        chosen = chosen.sort().values  # choices of some 15 pairs
    margin, weight = torch.rand(m, dtype=compute), torch.rand(m, dtype=compute) + 0.5
    loss_sum, stats, grad = (torch.full(shape, 7.0, dtype=compute) for shape in ((), (8,), (n,)))
    kernels(
        "pairs",
        rewards,
        chosen,
        rejected,
        margin,
        weight,
        loss_sum,
        stats,
        grad,
        n,
        m,
        DTYPES.index(dtype),
        ops.LOSSES.index(loss),
        ops.PENALTIES.index(penalty),
        clamp,
    )
    exact = rewards.double().requires_grad_()
    right, right_stats = ops.pairwise_loss_ref(
        exact,
        chosen,
        rejected,
        margin,
        weight,
        loss=loss,
        penalty=penalty,
        penalty_weight=0.02,
        label_smoothing=0.0 if loss == "plackett_luce" else 0.1,
        barrier_clamp=clamp,
    )
    (right_grad,) = torch.autograd.grad(right, exact)
    assert nearly(loss_sum, right.detach(), compute) and nearly(stats, right_stats, compute)
    assert torch.allclose(
        grad.double(), right_grad, rtol=1e-5, atol=1e-4
    )  # sums of 300 terms of either sign


# Four responses to one prompt, 150 short segments that share two rows, an empty one, rows that
# nobody reads: (prefix start, length, own start, length).
SEGMENTS = [(0, 0, 0, 5), (0, 5, 5, 1), (0, 5, 6, 2), (0, 5, 8, 1), (3, 0, 4, 0)]
SEGMENTS += [(20, 2, 22 + i % 3, 1) for i in range(150)]
COLUMNS = [torch.tensor(column) for column in zip(*SEGMENTS, strict=True)]
T, TOTAL = 30, int((COLUMNS[1] + COLUMNS[3]).sum())


def index_of_segments():
    """rows, offsets, sources"""
    return ops.prefix_index_ref(*COLUMNS, T).split([TOTAL, T + 1, TOTAL])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g,d", [(1, 1), (2, 16), (3, 5), (8, 96)])
def test_gather_prefix_kv(kernels, dtype, g, d):
    torch.manual_seed(0)
    rows, offsets, sources = index_of_segments()
    fused = torch.randn(T, g, 3 * d).to(dtype)
    for x in (fused[..., d : 2 * d], fused[..., :d].contiguous()):
        out = torch.full((TOTAL, g, d), 7.0, dtype=dtype)
        kernels("prefix", x, rows, out, T, TOTAL, g, d, *x.stride()[:2], x.element_size())
        assert torch.equal(out, ops.gather_prefix_kv_ref(x, *COLUMNS))
    grad, got = torch.randn(TOTAL, g, d).to(dtype), torch.full((T, g, d), 7.0, dtype=dtype)
    kernels("prefix_backward", grad, offsets, sources, got, T, TOTAL, g * d, DTYPES.index(dtype))
    exact = torch.zeros(T, g, d, dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(ops.gather_prefix_kv_ref(exact, *COLUMNS), exact, grad.double())
    assert nearly(got, right, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float_tables", [True, False])
@pytest.mark.parametrize(
    "a,g,d,more",
    [(1, 1, 2, 0), (6, 2, 16, 0), (6, 2, 6, 0), (3, 3, 128, 0), (0, 2, 16, 0), (4, 2, 32, 8)],
)
def test_qkv_rope(kernels, dtype, float_tables, a, g, d, more):
    """Values and gradients; ``more`` columns between the rows of the projection."""
    torch.manual_seed(d)
    rows, offsets, sources = index_of_segments()
    width = (a + 2 * g) * d
    x = torch.randn(T, width + more).to(dtype)[:, :width]
    angles = torch.randn(T, d // 2)
    cos, sin = (
        y.to(torch.float32 if float_tables else dtype) for y in (angles.cos(), angles.sin())
    )
    outs = [torch.full((n, heads, d), 7.0, dtype=dtype) for n, heads in ((T, a), *[(TOTAL, g)] * 2)]
    kernels(
        "qkv", x, cos, sin, rows, *outs, T, TOTAL, a, g, d, x.stride(0), DTYPES.index(dtype),
        float_tables,
    )  # fmt: skip
    exact = x.double().contiguous().requires_grad_()
    index = torch.cat([rows, offsets, sources])
    right = ops.qkv_rope_ref(exact, cos.double(), sin.double(), index, a, g)
    assert all(nearly(out, value.detach(), dtype) for out, value in zip(outs, right, strict=True))
    assert torch.equal(outs[2], right[2].detach().to(dtype))  # values are copied
    grads = [torch.randn(out.shape).to(dtype) for out in outs]
    dx = torch.full((T, width), 7.0, dtype=dtype)
    kernels(
        "qkv_backward", *grads, cos, sin, offsets, sources, dx, T, TOTAL, a, g, d,
        DTYPES.index(dtype), float_tables,
    )  # fmt: skip
    first = 0 if a else 1  # no queries, no gradient
    upstream = [grad.double() for grad in grads[first:]]
    (right_dx,) = torch.autograd.grad(right[first:], exact, upstream)
    assert nearly(dx, right_dx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float_tables", [True, False])
@pytest.mark.parametrize(
    "a,g,d,more,parts",
    [
        (1, 1, 2, 0, 1),
        (6, 2, 16, 0, 7),
        (3, 3, 128, 0, T),
        (0, 2, 16, 0, 3),
        (4, 2, 32, 8, 2),
        (40, 8, 16, 0, 4),  # more than one turn of a block per row
    ],
)
def test_qkv_norm_rope(kernels, dtype, float_tables, a, g, d, more, parts):
    """As test_qkv_rope, with norms of queries and keys and the gradients of their weights."""
    torch.manual_seed(d + a)
    rows, offsets, sources = index_of_segments()
    width = (a + 2 * g) * d
    x = (torch.randn(T, width + more) * 3).to(dtype)[:, :width]
    weights = [(0.5 + torch.rand(d)).to(dtype) for _ in range(2)]
    angles = torch.randn(T, d // 2)
    cos, sin = (
        y.to(torch.float32 if float_tables else dtype) for y in (angles.cos(), angles.sin())
    )
    outs = [torch.full((n, heads, d), 7.0, dtype=dtype) for n, heads in ((T, a), *[(TOTAL, g)] * 2)]
    kernels(
        "qkv_norm", x, *weights, cos, sin, rows, *outs, T, TOTAL, a, g, d, x.stride(0),
        DTYPES.index(dtype), float_tables,
    )  # fmt: skip
    exact = [y.double().contiguous().requires_grad_() for y in (x, *weights)]
    index = torch.cat([rows, offsets, sources])
    right = ops.qkv_norm_rope_ref(*exact, cos.double(), sin.double(), index, a, g, 1e-5)
    assert all(nearly(out, value.detach(), dtype) for out, value in zip(outs, right, strict=True))
    assert torch.equal(outs[2], right[2].detach().to(dtype))  # values are copied
    grads = [torch.randn(out.shape).to(dtype) for out in outs]
    dx = torch.full((T, width), 7.0, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    partial = torch.full((parts, 2, d), 7.0, dtype=compute)
    kernels(
        "qkv_norm_backward", *grads, x, *weights, cos, sin, offsets, sources, dx, partial, T,
        TOTAL, a, g, d, x.stride(0), parts, DTYPES.index(dtype), float_tables,
    )  # fmt: skip
    first = 0 if a else 1  # no queries, no gradient
    inputs = exact if a else [exact[0], exact[2]]
    right_dx, *right_weights = torch.autograd.grad(
        right[first:], inputs, [grad.double() for grad in grads[first:]]
    )
    assert nearly(dx, right_dx, dtype)
    for found, expected in zip(partial.double().sum(0)[first:], right_weights, strict=True):
        rounding = 1e-12 if dtype == torch.float64 else 1e-5
        assert (found - expected).abs().max() <= rounding * max(1.0, expected.abs().max().item())
    if not a:
        assert not partial[:, 0].any()


def at_offset(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, ``offset`` elements behind an aligned address."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)
    return room[offset:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,h,parts,offset",
    [
        (1, 1, 1, 0),
        (5, 40, 2, 0),
        (7, 64, 7, 0),
        (6, 64, 4, 1),
        (3, 576, 2, 0),
        (3, 577, 2, 0),
        (2, 1100, 1, 1),
        (2, 4104, 2, 0),
        (1, 8200, 1, 0),
        (1, 16384, 1, 0),
    ],
)
def test_rms_norm(kernels, dtype, rows, h, parts, offset):
    torch.manual_seed(h)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (at_offset((torch.randn(rows, h) * 3).to(dtype), offset) for _ in range(2))
    weight = (1 + torch.rand(h)).to(dtype)
    y, inv, dx = (
        torch.full((rows, h), 7.0, dtype=dtype),
        torch.full((rows,), 7.0, dtype=compute),
        dy * 0 + 7,
    )
    kernels("norm", x, weight, y, inv, rows, h, DTYPES.index(dtype))
    partial = torch.full((parts, h), 7.0, dtype=compute)
    kernels("norm_backward", dy, x, weight, inv, dx, partial, rows, h, parts, DTYPES.index(dtype))
    exact, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    right = ops.rms_norm_ref(exact, scale, 1e-5)
    right_dx, right_dw = torch.autograd.grad(right, (exact, scale), dy.double())
    assert nearly(y, right.detach(), dtype)
    assert nearly(inv, torch.rsqrt(x.double().square().mean(1) + 1e-5), compute)
    assert nearly(dx, right_dx, dtype)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2**-7)
    assert (partial.double().sum(0) - right_dw).abs().max() <= rounding * right_dw.abs().max()
    if dtype != torch.float64:  # the normalized value is rounded before the product, as on a CPU
        assert torch.equal(
            y, (weight.float() * (x.float() * inv[:, None]).to(dtype).float()).to(dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,h,parts,offset",
    [(1, 1, 1, 0), (7, 64, 3, 0), (6, 64, 4, 1), (3, 577, 2, 0), (2, 4104, 2, 0), (1, 8200, 1, 0)],
)
def test_add_rms_norm(kernels, dtype, rows, h, parts, offset):
    """The sum is rounded first: then the norm is that of the norm kernel, bit for bit."""
    torch.manual_seed(h)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, dy, dtotal = (
        at_offset((torch.randn(rows, h) * 3).to(dtype), offset) for _ in range(4)
    )
    weight = (1 + torch.rand(h)).to(dtype)
    total, y, alone, dx, dx_alone = (torch.full((rows, h), 7.0, dtype=dtype) for _ in range(5))
    inv, inv_alone = (torch.full((rows,), 7.0, dtype=compute) for _ in range(2))
    size, kind = (rows, h), DTYPES.index(dtype)
    kernels("add_norm", x, residual, weight, total, y, inv, *size, kind)
    assert torch.equal(total, x + residual)
    kernels("norm", total, weight, alone, inv_alone, *size, kind)
    if not offset:  # else the first takes single elements, and adds them up in another order
        assert torch.equal(y, alone) and torch.equal(inv, inv_alone)
    partial, partial_alone = (torch.full((parts, h), 7.0, dtype=compute) for _ in range(2))
    kernels("add_norm_backward", dy, dtotal, total, weight, inv, dx, partial, *size, parts, kind)
    kernels("norm_backward", dy, total, weight, inv, dx_alone, partial_alone, *size, parts, kind)
    assert torch.equal(partial, partial_alone)
    exact, scale = total.double().requires_grad_(), weight.double()
    right = ops.rms_norm_ref(exact, scale, 1e-5)
    (right_dx,) = torch.autograd.grad(right, exact, dy.double())
    assert nearly(y, right.detach(), dtype) and nearly(dx, right_dx + dtotal.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,f,offset", [(1, 1, 0), (3, 24, 0), (3, 24, 1), (2, 37, 0), (2, 4096, 0), (2, 1030, 0)]
)
def test_swiglu(kernels, dtype, rows, f, offset):
    torch.manual_seed(f)
    x = at_offset((torch.randn(rows, 2 * f) * 4).to(dtype), offset)
    dy, y, dx = torch.randn(rows, f).to(dtype), torch.full((rows, f), 7.0, dtype=dtype), x * 0 + 7
    kernels("glu", x, y, rows, f, DTYPES.index(dtype))
    kernels("glu_backward", dy, x, dx, rows, f, DTYPES.index(dtype))
    exact = x.double().requires_grad_()
    right = ops.swiglu_ref(exact)
    assert nearly(y, right.detach(), dtype)
    assert nearly(dx, torch.autograd.grad(right, exact, dy.double())[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,a,d", [(1, 1, 2), (5, 3, 16), (4, 2, 6), (7, 4, 128)])
@pytest.mark.parametrize("float_tables", [True, False])
def test_rope(kernels, dtype, t, a, d, float_tables):
    torch.manual_seed(d)
    fused = torch.randn(t, a, 3 * d).to(dtype)  # a view into a projection is read in place
    angles = torch.randn(t, d // 2)
    cos, sin = (
        x.to(torch.float32 if float_tables else dtype) for x in (angles.cos(), angles.sin())
    )
    for x in (fused[..., d : 2 * d], fused[..., :d].contiguous()):
        for backwards in (False, True):
            y = torch.full((t, a, d), 7.0, dtype=dtype)
            kernels(
                "rope",
                x,
                cos,
                sin,
                y,
                t,
                a,
                d,
                x.stride(0),
                x.stride(1),
                backwards,
                DTYPES.index(dtype),
                float_tables,
            )
            turned = ops.rope_ref(
                x.double(), cos.double(), -sin.double() if backwards else sin.double()
            )
            assert nearly(y, turned, dtype)
