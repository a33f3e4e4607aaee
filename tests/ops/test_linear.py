"""The half-precision matmuls of a linear layer on a CPU, native (csrc/cpu/linear.cpp) and through
fp32, against fp64 and inside megatron-core's linear layers."""

import pytest
import torch

from rmega import ops

needs_tiles = pytest.mark.skipif(
    not ops.has_native_linear(), reason="this CPU has no AMX, or rmega._C is not built"
)

# rows around a strip of 32 and a block; inputs and outputs around a panel, a chunk of terms,
# several chunks
SHAPES = [
    (1, 32, 32),
    (31, 64, 96),
    (33, 96, 64),
    (320, 320, 352),
    (257, 576, 1536),
    (1118, 576, 960),
    (50, 2080, 64),
    (40, 64, 4128),
    (2100, 64, 1056),
    (1500, 1056, 32),
]


def operands(t: int, k: int, n: int):
    generator = torch.Generator().manual_seed(t * k + n)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((t, k), (n, k), (t, n))
    )
    return x, weight, grad


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.fixture(autouse=True)
def automatic():
    ops.set_implementation("auto")


@pytest.mark.parametrize("t, k, n", SHAPES)
@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_tiles), "fp32"])
def test_matmuls_are_those_of_fp64(t, k, n, kind, monkeypatch):
    monkeypatch.setattr(ops.gemm, "best_matmul", lambda device, dtype: kind)
    x, weight, grad = operands(t, k, n)
    total = torch.randn(n, k)
    before = total.double()
    exact = (
        x.double() @ weight.double().t(),
        grad.double() @ weight.double(),
        grad.double().t() @ x.double(),
    )
    ops.linear_grad_weight(grad, x, total)
    # one rounding to bfloat16 at the end; fp32 sums for the weight gradient
    assert relative(ops.linear(x, weight), exact[0]) <= 2**-8
    assert relative(ops.linear_grad_input(grad, weight), exact[1]) <= 2**-8
    assert relative(total, before + exact[2]) <= 1e-6
    # and each element, not only the largest, is as near as the reference comes
    for result, reference, truth in (
        (ops.linear(x, weight), x @ weight.t(), exact[0]),
        (ops.linear_grad_input(grad, weight), grad @ weight, exact[1]),
    ):
        own, theirs = (
            (result.double() - truth).abs().mean(),
            (reference.double() - truth).abs().mean(),
        )
        assert own <= 1.1 * theirs


@needs_tiles
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_do_not_depend_on_threads(threads):
    x, weight, grad = operands(700, 608, 992)
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        total = torch.zeros(992, 608)
        ops.linear_grad_weight(grad, x, total)
        results.append((ops.linear(x, weight), ops.linear_grad_input(grad, weight), total))
    torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@needs_tiles
def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, _ = operands(300, 576, 960)
    assert torch.equal(ops.linear(x, weight)[37:41], ops.linear(x[37:41].contiguous(), weight))


@needs_tiles
def test_views_and_leading_dimensions():
    x, weight, grad = operands(66, 64, 96)
    wide = torch.randn(96, 128).bfloat16()
    assert torch.equal(ops.linear(x, wide[:, 32:96]), ops.linear(x, wide[:, 32:96].contiguous()))
    assert torch.equal(ops.linear(x.view(33, 2, 64), weight), ops.linear(x, weight).view(33, 2, 96))
    assert torch.equal(
        ops.linear_grad_input(grad.t().contiguous().t(), weight),
        ops.linear_grad_input(grad, weight),
    )


@needs_tiles
def test_other_sizes_run_in_torch():
    x, weight, grad = operands(10, 40, 24)
    total = torch.zeros(24, 40)
    ops.linear_grad_weight(grad, x, total)
    assert torch.equal(ops.linear(x, weight), x @ weight.t())
    assert torch.equal(ops.linear_grad_input(grad, weight), grad @ weight)
    assert torch.equal(total, (grad.t() @ x).float())


@needs_tiles
def test_not_a_number_stays_one():
    x, weight, _ = operands(32, 64, 32)
    x[3, 5] = float("nan")
    x[4, 5] = float("inf")
    y = ops.linear(x, weight)
    assert y[3].isnan().all() and not y[4].isfinite().any() and y[5].isfinite().all()


@needs_tiles
def test_shapes_that_do_not_go_together_are_named():
    x, weight, grad = operands(32, 64, 96)
    with pytest.raises(RuntimeError, match=r"linear: .*\[32, 64\].*\[96, 32\]"):
        ops.linear(x, weight[:, :32])
    with pytest.raises(RuntimeError, match="linear_grad_weight"):
        ops.linear_grad_weight(grad, x[:, :32], torch.zeros(96, 64))


@needs_tiles
def test_operators_are_well_formed():
    x, weight, grad = operands(32, 64, 96)
    check = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.rmega.linear.default, (x, weight), **check)
    torch.library.opcheck(torch.ops.rmega.linear_grad_input.default, (grad, weight), **check)
    torch.library.opcheck(
        torch.ops.rmega.linear_grad_weight.default, (grad, x, torch.zeros(96, 64)), **check
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_runs_where(dtype, monkeypatch):
    assert ops.active_matmul("cpu", torch.float32) == ops.active_matmul("cuda", dtype) == "torch"
    monkeypatch.setattr(ops.gemm, "has_native_linear", lambda: False)
    monkeypatch.setattr(ops.gemm, "_has_instructions", lambda dtype: True)
    assert ops.active_matmul("cpu", dtype) == "torch"
    monkeypatch.setattr(ops.gemm, "_has_instructions", lambda dtype: False)
    assert ops.active_matmul("cpu", dtype) == "fp32"
    monkeypatch.setattr(ops.gemm, "has_native_linear", lambda: True)
    assert ops.active_matmul("cpu", dtype) == ("native" if dtype is torch.bfloat16 else "fp32")
    ops.set_implementation("reference")
    assert ops.active_matmul("cpu", dtype) == "torch"


def test_half_precision_is_never_a_loop_over_numbers():
    """Without bf16 instructions ATen's matmul is 5 (emulated with AVX-512) to 100 times as slow as
    in fp32."""
    from rmega.precision import _rate

    a, b = torch.randn(2, 768, 768)
    assert _rate(a.bfloat16(), b.bfloat16()) > 0.2 * _rate(a, b)


def train_gradients(
    rank: int, world_size: int, implementation: str, tp: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Of megatron-core's two linear layers after two micro-batches: fp32 weight gradients, input
    gradients, outputs. ``implementation``: "native", "fp32" or "reference" matmuls."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rmega.megatron import fusion

    best = ops.best_matmul
    chosen = "native" if implementation == "native" else "fp32"
    ops.best_matmul = ops.gemm.best_matmul = lambda device, dtype: chosen
    ops.set_implementation("reference" if implementation == "reference" else "auto")
    fused = fusion.fuse_weight_gradients(torch.device("cpu"), dtype)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=fused,
        tensor_model_parallel_size=tp,
    )
    assert parallel_state.get_tensor_model_parallel_world_size() == tp
    generator = torch.Generator().manual_seed(1)
    out: dict[str, torch.Tensor] = {}
    for name, kind, options in (
        ("column", ColumnParallelLinear, {"gather_output": True}),
        ("row", RowParallelLinear, {"input_is_parallel": False, "skip_bias_add": False}),
    ):
        layer = kind(
            64, 128, config=config, init_method=torch.nn.init.zeros_, bias=False, **options
        )
        whole = torch.randn(128, 64, generator=generator).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(whole.chunk(tp, 0 if name == "column" else 1)[rank])
        layer.weight.main_grad = torch.zeros(layer.weight.shape)
        layer.weight.grad_added_to_main_grad = False
        for _ in range(2):
            x = torch.randn(70, 1, 64, generator=generator).to(dtype).requires_grad_()
            y, _ = layer(x)
            y.backward(torch.randn(70, 1, 128, generator=generator).to(dtype))
        out |= {
            f"{name} weight": layer.weight.main_grad.clone(),
            f"{name} input": x.grad,
            f"{name} output": y.detach(),
        }
    assert (
        fused
        and layers.torch.matmul is not torch.matmul
        and torch.matmul.__module__ != "rmega.megatron.cpu"
    )
    ops.best_matmul = ops.gemm.best_matmul = best
    ops.set_implementation("auto")
    return out


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        pytest.param("native", torch.bfloat16, marks=needs_tiles),
        ("fp32", torch.bfloat16),
        ("fp32", torch.float16),
    ],
)
def test_linear_layers_of_the_engine_use_them(tp, kind, dtype):
    """These matmuls and plain ones inside Megatron-Core's layers agree, and the former did run."""
    from tests.dist import run_distributed

    ours = run_distributed(gradients_in_process, tp, kind, tp, dtype)[0]
    plain = run_distributed(gradients_in_process, tp, "reference", tp, dtype)[0]
    for name, value in ours.items():
        assert relative(value, plain[name].double()) <= 2**-7, name
    assert not torch.equal(
        ours["column weight"], plain["column weight"]
    )  # else it was the same path


def gradients_in_process(
    rank: int, world_size: int, implementation: str, tp: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from rmega import distributed
    from rmega.config import ParallelArgs

    distributed.initialize(ParallelArgs(tensor_model_parallel_size=tp))
    return train_gradients(rank, world_size, implementation, tp, dtype)
