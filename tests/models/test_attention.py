"""packed_attention against its definition in fp64: values and gradients of every path; CUDA's by a
stand-in."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rmega import ops
from rmega.data.packing import Segments
from rmega.models import attention, attention_cpu, varlen
from rmega.models.attention import choose_backend, packed_attention, packed_attention_ref
from rmega.models.attention_cpu import packed_attention_flash, packed_attention_native
from rmega.models.varlen import adapt_varlen, packed_attention_varlen, varlen_plan

needs_native = pytest.mark.skipif(
    not hasattr(torch.ops.rmega, "packed_attention"),
    reason="rmega._C is not built with packed_attention",
)
CPU_PATHS = [
    pytest.param(packed_attention_native, marks=needs_native, id="native"),
    pytest.param(packed_attention_flash, id="flash"),
]


@dataclasses.dataclass(eq=False)
class Pack(Segments):
    """The segments of a pack built from [(prefix length, suffix lengths)], and its size."""

    num_queries: int = 0
    num_tokens: int = 0


def make_pack(comparisons, pruned=False, share=True) -> Pack:
    """pruned: one query per response, at its last token. share=False: each response carries its own
    prompt."""
    rows, position, num_queries = [], 0, 0
    for prefix, suffixes in comparisons:
        if not share:
            prefix, suffixes = 0, [prefix + s for s in suffixes]
        start = position
        if prefix and not pruned:
            rows.append((start, prefix, start, prefix, 0, 0))
        position += prefix
        for suffix in suffixes:
            query = (num_queries, 1) if pruned else (position, suffix)
            rows.append((*query, position, suffix, start if prefix else 0, prefix))
            position += suffix
            num_queries += 1
    columns = [torch.tensor(c, dtype=torch.int32) for c in zip(*rows, strict=True)]
    return Pack(*columns, num_queries=num_queries if pruned else position, num_tokens=position)


PACKS = {
    "pairs": [(17, (5, 9)), (70, (30, 41))],
    "two_to_five": [(13, (7, 1)), (9, (4, 11, 2)), (30, (8, 8, 8, 8)), (5, (1, 20, 3, 2, 6))],
    "no_prefix": [(0, (12, 3)), (8, (2, 5)), (0, (1, 1))],
    "one_token_suffixes": [(33, (1, 1, 1)), (1, (1, 1))],
    "one_response": [(0, (37,))],
    "longer_than_a_block": [(140, (600, 3)), (300, (129, 64))],
}


def attend(pack, dtype, function, groups=2, ratio=1, d=16, seed=0, device="cpu"):
    """[output, grad q, grad k, grad v] in fp64 for inputs that are the same numbers in every dtype
    and on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, heads):
        x = torch.randn(rows, heads, d, generator=generator, dtype=torch.float64)
        return x.bfloat16().to(device, dtype).requires_grad_()

    q, k, v = (
        draw(pack.num_queries, groups * ratio),
        draw(pack.num_tokens, groups),
        draw(pack.num_tokens, groups),
    )
    weight = draw(pack.num_queries, groups * ratio).detach().flatten(1)
    out = function(q, k, v, pack, d**-0.5)
    values = (out, *torch.autograd.grad(out, (q, k, v), weight))
    return [x.detach().cpu().double() for x in values]


def errors(values, truth):
    return [
        ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
        for x, y in zip(values, truth, strict=True)
    ]


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """Varlen attention by plain torch: causal per sequence, aligned bottom right."""
    outputs = []
    for i in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        q_len, k_len = queries.stop - queries.start, keys.stop - keys.start
        assert q_len <= max_q and k_len <= max_k
        seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
        rows = [x.transpose(0, 1) for x in (q[queries], k[keys], v[keys])]
        outputs.append(
            F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=True)
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("ratio", [1, 3, 8])
@pytest.mark.parametrize("pruned", [False, True], ids=["all_queries", "pruned"])
@pytest.mark.parametrize("name", PACKS)
def test_fp32_matches_the_definition(name, pruned, ratio, path):
    pack = make_pack(PACKS[name], pruned)
    truth = attend(pack, torch.float64, packed_attention_ref, ratio=ratio)
    assert max(errors(attend(pack, torch.float32, path, ratio=ratio), truth)) < 1e-6


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("pruned", [False, True], ids=["all_queries", "pruned"])
@pytest.mark.parametrize("name", PACKS)
def test_bf16_loses_at_most_twice_what_plain_torch_loses(name, pruned, path):
    pack = make_pack(PACKS[name], pruned)
    truth = attend(pack, torch.float64, packed_attention_ref, ratio=3, d=64)
    plain = errors(attend(pack, torch.bfloat16, packed_attention_ref, ratio=3, d=64), truth)
    ours = errors(attend(pack, torch.bfloat16, path, ratio=3, d=64), truth)
    assert all(x <= 2 * y for x, y in zip(ours, plain, strict=True)), (ours, plain)


def unshare(comparisons, values):
    """Rows of a shared pack laid out as the pack in which each response carries its own prompt."""
    rows, start = [], 0
    for prefix, suffixes in comparisons:
        position = start + prefix
        for suffix in suffixes:
            rows += [*range(start, start + prefix), *range(position, position + suffix)]
            position += suffix
        start = position
    return values[torch.tensor(rows)], torch.tensor(rows)


@needs_native
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, None)])
def test_sharing_the_prefix_changes_nothing_and_costs_no_accuracy(dtype, limit):
    """Rewards read the suffixes; their gradients reach a prefix through every copy of it."""
    comparisons = [(40, (30, 25)), (0, (9, 20)), (61, (1, 17, 33)), (150, (90, 70))]
    shared, plain = make_pack(comparisons), make_pack(comparisons, share=False)
    generator = torch.Generator().manual_seed(3)
    base = [
        torch.randn(shared.num_tokens, n, 64, generator=generator, dtype=torch.float64).bfloat16()
        for n in (6, 2, 2, 6)
    ]
    in_prefix = torch.zeros(shared.num_tokens, dtype=torch.bool)
    for s in attention.segment_list(shared):
        in_prefix[s.prefix_start : s.prefix_start + s.prefix_len] = True
    base[3][in_prefix] = 0  # weights of the output

    def gradients(pack, kind, function):
        inputs = [
            (unshare(comparisons, x)[0] if pack is plain else x).to(kind).requires_grad_()
            for x in base[:3]
        ]
        weight = (
            (unshare(comparisons, base[3])[0] if pack is plain else base[3]).to(kind).flatten(1)
        )
        grads = torch.autograd.grad(function(*inputs, pack, 0.125), inputs, weight)
        if pack is shared:
            return [x.double() for x in grads]
        rows = unshare(comparisons, base[0])[1]
        return [
            torch.zeros(x.shape, dtype=torch.float64).index_add_(0, rows, g.double())
            for x, g in zip(base[:3], grads, strict=True)
        ]

    truth = gradients(plain, torch.float64, packed_attention_ref)
    ours = errors(gradients(shared, dtype, packed_attention_native), truth)
    if limit is not None:
        assert max(ours) < limit
    else:
        copies = errors(gradients(plain, dtype, packed_attention_native), truth)
        assert all(x <= 1.1 * y for x, y in zip(ours, copies, strict=True)), (ours, copies)


@pytest.mark.parametrize("path", CPU_PATHS)
def test_general_bottom_right_alignment(path):
    """More own keys than queries, but more than one query: a case between ordinary and pruned
    layers."""
    columns = [(0, 5), (5, 40), (10, 60), (20, 90), (0, 0), (10, 10)]
    pack = Pack(
        *(torch.tensor(c, dtype=torch.int32) for c in columns), num_queries=45, num_tokens=150
    )
    truth = attend(pack, torch.float64, packed_attention_ref, ratio=3)
    assert max(errors(attend(pack, torch.float32, path, ratio=3), truth)) < 1e-6


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("d", [8, 40, 128])
def test_head_sizes_and_views(d, path):
    """Values arrive as a view into the fused projection; rows that no segment covers give and get
    zeros."""
    pack = make_pack([(11, (6, 3)), (0, (5,))])
    t, g, r, covered = 30, 2, 3, pack.num_tokens
    fused = torch.randn(t, g * (r + 2) * d, generator=torch.Generator().manual_seed(1)).unflatten(
        1, (g, r + 2, d)
    )

    def run(function, kind):
        x = fused.to(kind).detach().requires_grad_()
        out = function(x[:, :, :r].reshape(t, g * r, d), x[:, :, r], x[:, :, r + 1], pack, 0.3)
        out.sin().sum().backward()
        return out.detach().double(), x.grad.double()

    (out, grad), truth = run(path, torch.float32), run(packed_attention_ref, torch.float64)
    assert max(errors((out, grad), truth)) < 1e-6
    assert not out[covered:].any() and not grad[covered:].any()


@needs_native
def test_native_is_deterministic_and_independent_of_neighbours():
    alone, crowd = (
        make_pack([(50, (20, 31))]),
        make_pack([(50, (20, 31)), (3, (200, 1)), (0, (64,))]),
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(crowd.num_tokens, n, 32, dtype=torch.bfloat16) for n in (4, 2, 2))
    n = alone.num_tokens
    both = packed_attention_native(q, k, v, crowd, 0.2)
    assert torch.equal(both, packed_attention_native(q, k, v, crowd, 0.2))
    assert torch.equal(both[:n], packed_attention_native(q[:n], k[:n], v[:n], alone, 0.2))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa, dtype):
    set_isa = getattr(ops.implementation._C, "set_elementwise_isa", None)
    if set_isa is None or (isa == "avx2" and ops.implementation._C.elementwise_isa() == "portable"):
        pytest.skip(f"this CPU or build has no {isa} to choose")
    pack = make_pack(PACKS["longer_than_a_block"])
    truth = attend(pack, torch.float64, packed_attention_ref, ratio=3, d=64)
    plain = errors(attend(pack, dtype, packed_attention_ref, ratio=3, d=64), truth)
    set_isa(isa)
    try:
        ours = errors(attend(pack, dtype, packed_attention_native, ratio=3, d=64), truth)
    finally:
        set_isa("")
    assert all(x <= 2 * y for x, y in zip(ours, plain, strict=True)), (ours, plain)


@needs_native
def test_extreme_scores_and_not_a_number():
    pack = make_pack([(20, (150, 9)), (4, (3, 3))])
    torch.manual_seed(0)
    q, k, v = (torch.randn(pack.num_tokens, 2, 16) for _ in range(3))
    large = packed_attention_native(100 * q, 100 * k, v, pack, 1.0)
    truth = packed_attention_ref((100 * q).double(), (100 * k).double(), v.double(), pack, 1.0)
    assert (
        errors([large.double()], [truth])[0] < 1e-3
    )  # scores of 1e5 are themselves known to 1e-2 only
    q[170, 0, 0] = float("nan")  # a lost number must not look like a good one
    out = packed_attention_native(q, k, v, pack, 1.0).unflatten(1, (2, 16))
    assert out[170, 0].isnan().all() and not out[:170].isnan().any() and not out[-10:].isnan().any()


@needs_native
def test_native_refuses_what_it_cannot_honour():
    pack = make_pack([(4, (3, 2))])
    q = torch.randn(9, 2, 8)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        packed_attention_native(q.half(), q.half(), q.half(), pack, 1.0)
    with pytest.raises(RuntimeError, match="segment 2"):
        packed_attention_native(q[:8], q[:8], q[:8], pack, 1.0)
    pack.k_start[2] = 5  # the second response now claims keys of the first
    pack.cache.clear()
    with pytest.raises(RuntimeError, match="overlap at key row"):
        packed_attention_native(q, q, q, pack, 1.0)


@needs_native
def test_opcheck():
    pack = make_pack([(5, (3, 1))])
    table = torch.stack(
        [pack.q_start, pack.q_len, pack.k_start, pack.k_len, pack.prefix_start, pack.prefix_len]
    )
    q, k, v = (torch.randn(9, n, 8, requires_grad=True) for n in (4, 2, 2))
    torch.library.opcheck(torch.ops.rmega.packed_attention, (q, k, v, table, 0.5))


@needs_native
def test_memory_is_linear_in_tokens():
    """A dense mask alone of this one comparison would be 36 MB, its scores 144 MB a head."""
    import resource

    n = 6000
    pack = make_pack([(n // 2, (n // 4, n // 4))])
    q, k, v = (torch.randn(n, 1, 32, requires_grad=True) for _ in range(3))
    small = make_pack([(40, (20, 20))])
    packed_attention_native(q[:80], k[:80], v[:80], small, 0.2).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed_attention_native(q, k, v, pack, 0.2).sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 30  # MB; inputs, output and gradients are 0.8 MB each


# ---- choosing, and the varlen path


def test_choosing_a_backend():
    x = torch.zeros(1, 1, 8)
    assert choose_backend(x) == "cpu" and choose_backend(x.double()) == "reference"
    assert choose_backend(x, "reference") == "reference"
    with pytest.raises(ValueError, match="tensors are on cpu"):
        choose_backend(x, "cuda")
    with pytest.raises(ValueError, match="cpu cannot run"):
        choose_backend(x.to("meta"), "cpu")
    with pytest.raises(ValueError, match="is not one of"):
        choose_backend(x, "flash")


@pytest.mark.parametrize(
    "head_dim,dtype,capability,reason",
    [
        (64, torch.bfloat16, (9, 0), ""),
        (256, torch.float16, (8, 0), ""),
        (8, torch.bfloat16, (12, 0), ""),
        (60, torch.bfloat16, (9, 0), "multiples of 8 up to 256, not 60"),
        (264, torch.bfloat16, (9, 0), "multiples of 8 up to 256, not 264"),
        (64, torch.float16, (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        (64, torch.float32, (9, 0), "takes bfloat16 and float16, not float32"),
    ],
)
def test_what_varlen_attention_cannot_run_is_known_before_it_is_called(
    monkeypatch, head_dim, dtype, capability, reason
):
    """By a stand-in for a GPU: an error out of torch's kernel names neither flag nor way out."""
    if varlen.varlen_function() is None:
        pytest.skip("neither torch nor flash_attn has varlen attention here")
    varlen.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in varlen.obstacle(torch.device("cuda", 0), dtype, head_dim)
    assert bool(reason) == bool(varlen.obstacle(torch.device("cuda", 0), dtype, head_dim))
    varlen.capability.cache_clear()
    # Whole tensors on the meta device take the same way, up to the device.
    q = torch.empty(3, 2, head_dim, dtype=dtype, device="meta")
    monkeypatch.setattr(varlen, "obstacle", lambda *given: str(given))
    with pytest.raises(ValueError, match=f"meta.*{dtype}, {head_dim}"):
        choose_backend(q, "cuda")


def test_cpu_falls_back_where_native_operators_are_off(monkeypatch):
    pack = make_pack(PACKS["pairs"])
    monkeypatch.setattr(attention_cpu, "packed_attention_native", None)
    monkeypatch.setattr(ops, "active_implementation", lambda device: "reference")
    q = torch.randn(pack.num_tokens, 2, 16)
    expected = packed_attention_ref(q, q, q, pack, 0.25)
    torch.testing.assert_close(packed_attention(q, q, q, pack, 0.25), expected)


@pytest.mark.parametrize("pruned", [False, True], ids=["all_queries", "pruned"])
@pytest.mark.parametrize("name", PACKS)
def test_varlen_arguments_describe_the_pack(name, pruned):
    pack = make_pack(PACKS[name], pruned)
    truth = attend(pack, torch.float64, packed_attention_ref, ratio=3)
    ours = attend(pack, torch.float64, lambda *a: packed_attention_varlen(*a, fake_varlen), ratio=3)
    assert max(errors(ours, truth)) < 1e-12


def test_varlen_plan_is_made_once_and_gathers_only_where_a_prefix_is_shared():
    shared, plain = make_pack(PACKS["pairs"]), make_pack(PACKS["pairs"], share=False)
    cpu = torch.device("cpu")
    t = shared.num_tokens
    assert varlen_plan(shared, cpu, t) is varlen_plan(shared, cpu, t)
    assert varlen_plan(plain, cpu, plain.num_tokens).gather is None
    plan = varlen_plan(shared, cpu, t)
    assert torch.equal(plan.index, ops.prefix_index_ref(*plan.gather, t))
    assert plan.cu_seqlens_q.tolist() == [0, 17, 22, 31, 101, 131, 172]
    assert plan.cu_seqlens_k.tolist() == [0, 17, 39, 65, 135, 235, 346]
    assert (plan.max_q, plan.max_k, plan.num_keys) == (70, 111, 346)
    shared.q_start[1] += 1
    shared.cache.clear()
    with pytest.raises(ValueError, match="order of their query rows"):
        varlen_plan(shared, cpu, t)


@pytest.mark.parametrize("share", [True, False], ids=["prefix", "in_place"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("name", ["pairs", "no_prefix", "two_to_five"])
def test_attention_from_the_fused_projection(name, padding, share, monkeypatch):
    """Split, rotation and gather in one operator: the values and gradients of each alone."""
    monkeypatch.setattr(varlen, "varlen_function", lambda: ("stand-in", fake_varlen))
    monkeypatch.setattr(varlen, "fuses_projection", lambda *a: True)
    g, r, d = 2, 3, 16
    torch.manual_seed(0)

    def gradients(out, x):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return out.detach(), torch.autograd.grad(out, x, weight, retain_graph=True)[0]

    def close(found, expected):
        assert max(errors(found, expected)) < 1e-12

    pack = make_pack(PACKS[name], share=share)
    t = pack.num_tokens + padding
    cos, sin = torch.randn(2, t, d // 2, dtype=torch.float64).unbind()
    x = torch.randn(t, g * (r + 2) * d, dtype=torch.float64, requires_grad=True)
    query, key, value = x.view(t, g, r + 2, d).split([r, 1, 1], dim=2)
    query, key = ops.rope(query.reshape(t, g * r, d), cos, sin), ops.rope(key.squeeze(2), cos, sin)
    expected = packed_attention_ref(query, key, value.squeeze(2), pack, 0.25)
    found = attention.projection_attention(x, cos, sin, g * r, g, pack, 0.25)
    close(gradients(found, x), gradients(expected, x))

    pruned = make_pack(PACKS[name], pruned=True, share=share)
    rows = torch.randn(pruned.num_queries, g * r, d, dtype=torch.float64)
    x = torch.randn(t, 2 * g * d, dtype=torch.float64, requires_grad=True)
    key, value = x.view(t, 2, g, d).unbind(1)
    expected = packed_attention_ref(rows, ops.rope(key, cos, sin), value, pruned, 0.25)
    found = attention.pooled_attention(rows, x, cos, sin, pruned, 0.25)
    close(gradients(found, x), gradients(expected, x))
    monkeypatch.setattr(varlen, "fuses_projection", lambda *a: False)
    pruned.cache.clear()
    apart = attention.pooled_attention(rows, x, cos, sin, pruned, 0.25)
    close(gradients(apart, x), gradients(expected, x))


def test_varlen_leaves_uncovered_rows_zero():
    pack = make_pack(PACKS["pairs"])
    q = torch.randn(pack.num_tokens + 3, 2, 16)
    out = packed_attention_varlen(q, q, q, pack, 0.25, fake_varlen)
    torch.testing.assert_close(out, packed_attention_ref(q, q, q, pack, 0.25))
    assert not out[-3:].any()


def test_varlen_of_every_release_is_called_causally():
    calls = {}

    def torch_2_10(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
    ):
        calls["2.10"] = (is_causal, query)

    def torch_2_11(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        calls["2.11"] = (window_size, scale)

    def torch_2_12(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        calls["2.12"] = (window_size, scale, enable_gqa)

    def flash_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        calls["flash_attn"] = (causal, softmax_scale, window_size, deterministic)

    q = torch.ones(1, 1, 16)
    for function in (torch_2_10, torch_2_11, torch_2_12, flash_attn):
        adapt_varlen(function)(q, q, q, None, None, 1, 1, 0.5)
    assert (
        calls["2.10"][0] is True and calls["2.10"][1].unique().item() == 2.0
    )  # its own scale is 1/4
    assert calls["2.11"] == ((-1, 0), 0.5)
    assert calls["2.12"] == ((-1, 0), 0.5, True)
    assert calls["flash_attn"] == (True, 0.5, (-1, -1), False)
    adapted = adapt_varlen(flash_attn)
    torch.use_deterministic_algorithms(True)  # after it was adapted: a run sets it once, early
    try:
        adapted(q, q, q, None, None, 1, 1, 0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls["flash_attn"] == (True, 0.5, (-1, -1), True)
