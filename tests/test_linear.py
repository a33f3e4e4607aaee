"""The native products of a linear layer (csrc/linear.cpp) against fp64, and inside megatron-core's linear layers."""

import pytest
import torch

from rmega import ops

pytestmark = pytest.mark.skipif(not ops.has_native_linear(), reason="this CPU has no AMX, or rmega._C is not built")

# rows around a strip of 32 and a block; inputs and outputs around a panel, a chunk of terms, several chunks
SHAPES = [(1, 32, 32), (31, 64, 96), (33, 96, 64), (320, 320, 352), (257, 576, 1536), (1118, 576, 960), (50, 2080, 64),
          (40, 64, 4128), (2100, 64, 1056), (1500, 1056, 32)]


def operands(t: int, k: int, n: int):
    generator = torch.Generator().manual_seed(t * k + n)
    x, weight, grad = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((t, k), (n, k), (t, n)))
    return x, weight, grad


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.fixture(autouse=True)
def native():
    ops.set_implementation("native")
    yield
    ops.set_implementation("auto")


@pytest.mark.parametrize("t, k, n", SHAPES)
def test_products_are_those_of_fp64(t, k, n):
    x, weight, grad = operands(t, k, n)
    total = torch.randn(n, k)
    before = total.double()
    exact = (x.double() @ weight.double().t(), grad.double() @ weight.double(), grad.double().t() @ x.double())
    ops.linear_grad_weight(grad, x, total)
    # one rounding to bfloat16 at the end; fp32 sums for the weight gradient
    assert relative(ops.linear(x, weight), exact[0]) <= 2**-8
    assert relative(ops.linear_grad_input(grad, weight), exact[1]) <= 2**-8
    assert relative(total, before + exact[2]) <= 1e-6
    # and each element, not only the largest, is as near as the reference comes
    for result, reference, truth in ((ops.linear(x, weight), x @ weight.t(), exact[0]),
                                     (ops.linear_grad_input(grad, weight), grad @ weight, exact[1])):
        own, theirs = (result.double() - truth).abs().mean(), (reference.double() - truth).abs().mean()
        assert own <= 1.1 * theirs


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


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, _ = operands(300, 576, 960)
    assert torch.equal(ops.linear(x, weight)[37:41], ops.linear(x[37:41].contiguous(), weight))


def test_views_and_leading_dimensions():
    x, weight, grad = operands(66, 64, 96)
    wide = torch.randn(96, 128).bfloat16()
    assert torch.equal(ops.linear(x, wide[:, 32:96]), ops.linear(x, wide[:, 32:96].contiguous()))
    assert torch.equal(ops.linear(x.view(33, 2, 64), weight), ops.linear(x, weight).view(33, 2, 96))
    assert torch.equal(ops.linear_grad_input(grad.t().contiguous().t(), weight), ops.linear_grad_input(grad, weight))


def test_other_sizes_run_in_torch():
    x, weight, grad = operands(10, 40, 24)
    total = torch.zeros(24, 40)
    ops.linear_grad_weight(grad, x, total)
    assert torch.equal(ops.linear(x, weight), x @ weight.t())
    assert torch.equal(ops.linear_grad_input(grad, weight), grad @ weight)
    assert torch.equal(total, (grad.t() @ x).float())


def test_not_a_number_stays_one():
    x, weight, _ = operands(32, 64, 32)
    x[3, 5] = float("nan")
    x[4, 5] = float("inf")
    y = ops.linear(x, weight)
    assert y[3].isnan().all() and not y[4].isfinite().any() and y[5].isfinite().all()


def test_shapes_that_do_not_go_together_are_named():
    x, weight, grad = operands(32, 64, 96)
    with pytest.raises(RuntimeError, match=r"linear: .*\[32, 64\].*\[96, 32\]"):
        ops.linear(x, weight[:, :32])
    with pytest.raises(RuntimeError, match="linear_grad_weight"):
        ops.linear_grad_weight(grad, x[:, :32], torch.zeros(96, 64))


def test_operators_are_well_formed():
    x, weight, grad = operands(32, 64, 96)
    check = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.rmega.linear.default, (x, weight), **check)
    torch.library.opcheck(torch.ops.rmega.linear_grad_input.default, (grad, weight), **check)
    torch.library.opcheck(torch.ops.rmega.linear_grad_weight.default, (grad, x, torch.zeros(96, 64)), **check)


def train_gradients(rank: int, world_size: int, implementation: str, tp: int) -> dict[str, torch.Tensor]:
    """Of megatron-core's two linear layers after two micro-batches: fp32 weight gradients, input gradients, outputs."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rmega import fusion

    ops.set_implementation(implementation)
    fused = fusion.fuse_weight_gradients(torch.device("cpu"), torch.bfloat16)
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16,
        use_cpu_initialization=True, gradient_accumulation_fusion=fused, tensor_model_parallel_size=tp)
    assert parallel_state.get_tensor_model_parallel_world_size() == tp
    generator = torch.Generator().manual_seed(1)
    out: dict[str, torch.Tensor] = {}
    for name, kind, options in (("column", ColumnParallelLinear, {"gather_output": True}),
                                ("row", RowParallelLinear, {"input_is_parallel": False, "skip_bias_add": False})):
        layer = kind(64, 128, config=config, init_method=torch.nn.init.zeros_, bias=False, **options)
        whole = torch.randn(128, 64, generator=generator).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(whole.chunk(tp, 0 if name == "column" else 1)[rank])
        layer.weight.main_grad = torch.zeros(layer.weight.shape)
        layer.weight.grad_added_to_main_grad = False
        for _ in range(2):
            x = torch.randn(70, 1, 64, generator=generator).bfloat16().requires_grad_()
            y, _ = layer(x)
            y.backward(torch.randn(70, 1, 128, generator=generator).bfloat16())
        out |= {f"{name} weight": layer.weight.main_grad.clone(), f"{name} input": x.grad, f"{name} output": y.detach()}
    assert layers.torch.matmul is not torch.matmul and torch.matmul.__module__ != "rmega.cpu"
    ops.set_implementation("auto")
    return out


@pytest.mark.parametrize("tp", [1, 2])
def test_linear_layers_of_the_engine_use_them(tp):
    """Native and plain products inside the engine's layers agree, and the native ones did run."""
    from tests.dist import run_distributed

    native = run_distributed(gradients_in_process, tp, "native", tp)[0]
    plain = run_distributed(gradients_in_process, tp, "reference", tp)[0]
    for name, value in native.items():
        assert relative(value, plain[name].double()) <= 2**-7, name
    assert not torch.equal(native["column weight"], plain["column weight"])  # else the native path did not run


def gradients_in_process(rank: int, world_size: int, implementation: str, tp: int) -> dict[str, torch.Tensor]:
    from rmega import distributed

    distributed.initialize(tp=tp)
    return train_gradients(rank, world_size, implementation, tp)
