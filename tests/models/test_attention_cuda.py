"""Packed attention on CUDA against its definition in fp64, values and gradients: rows of a pack,
grouped queries, pruned layers, alignment at the bottom right. On a CPU a stand-in takes the
place of the varlen kernel, so that the tests themselves are known to be right.

Shape letters: t tokens, a query heads, g key/value groups, d head dimension.
"""

from __future__ import annotations

import pytest
import torch

from rmega import ops
from rmega.models import varlen
from rmega.models.attention import (
    packed_attention,
    packed_attention_ref,
    pooled_attention,
    projection_attention,
)
from rmega.models.varlen import obstacle, packed_attention_varlen
from tests.gpu import ON_CPU, ON_GPU
from tests.models.test_attention import PACKS, attend, errors, fake_varlen, make_pack

DEVICES = pytest.mark.parametrize("device", [ON_GPU, ON_CPU])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SHAPES = [(1, 64), (3, 64), (2, 128), (8, 128)]  # query heads per group, head dimension
CASES = pytest.mark.parametrize(
    "device,ratio,d",
    [
        pytest.param(*where.values, ratio, d, id=f"{where.id}-{ratio}x{d}", marks=where.marks)
        for where, shapes in ((ON_GPU, SHAPES), (ON_CPU, SHAPES[1:2]))
        for ratio, d in shapes
    ],
)


def attention_on(device: str):
    """packed_attention as a model on that device runs it: by name, so that no fallback is taken."""
    if device == "cpu":
        return lambda *given: packed_attention_varlen(*given, fake_varlen)
    if reason := obstacle(torch.device("cuda", 0), torch.bfloat16, 64):
        pytest.skip(reason)
    return lambda *given: packed_attention(*given, backend="cuda")


def assert_twice_plain(pack, dtype, device, **shape):
    """Output and gradients err at most twice as much as the plain definition in that dtype does."""
    truth = attend(pack, torch.float64, packed_attention_ref, device=device, **shape)
    plain = attend(pack, dtype, packed_attention_ref, device=device, **shape)
    ours = attend(pack, dtype, attention_on(device), device=device, **shape)
    allowed, found = errors(plain, truth), errors(ours, truth)
    assert all(x <= 2 * y for x, y in zip(found, allowed, strict=True)), (found, allowed)


@CASES
@DTYPES
@pytest.mark.parametrize("pruned", [False, True], ids=["all_queries", "pruned"])
@pytest.mark.parametrize("name", PACKS)
def test_definition(name, pruned, ratio, d, dtype, device):
    assert_twice_plain(make_pack(PACKS[name], pruned), dtype, device, ratio=ratio, d=d)


@DEVICES
@DTYPES
def test_responses_that_carry_their_own_prompt(dtype, device):
    """Keys in place: nothing is gathered."""
    pack = make_pack(PACKS["two_to_five"], share=False)
    assert_twice_plain(pack, dtype, device, ratio=2, d=64)


@DEVICES
def test_rows_that_no_segment_covers(device):
    """Padding behind a pack gives zeros and takes no gradient."""
    pack = make_pack(PACKS["pairs"])
    t, padding = pack.num_tokens, 7
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(t + padding, heads, 64, generator=generator)
        .to(device, torch.bfloat16)
        .requires_grad_()
        for heads in (6, 2, 2)
    )
    out = attention_on(device)(q, k, v, pack, 0.125)  # [t + padding, a * d]
    assert out.shape == (t + padding, 6 * 64) and not out[t:].any() and out[:t].any()
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(not grad[t:].any() and grad[:t].any() for grad in grads)


@DEVICES
@DTYPES
@pytest.mark.parametrize("name", ["pairs", "no_prefix"])
def test_views_into_the_fused_projection(name, dtype, device):
    """A layer hands over slices of one tensor [t, g, r + 2, d]; gradients arrive in it."""
    pack, g, r, d = make_pack(PACKS[name]), 2, 3, 64
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(pack.num_tokens, g, r + 2, d, generator=generator).bfloat16()
    weight = torch.randn(pack.num_tokens, g * r * d, generator=generator).bfloat16()

    def run(function, kind):
        fused = values.to(device, kind).requires_grad_()
        query, key, value = fused.split([r, 1, 1], dim=2)
        query = query.reshape(-1, g * r, d)
        out = function(query, key.squeeze(2), value.squeeze(2), pack, d**-0.5)
        (grad,) = torch.autograd.grad(out, fused, weight.to(device, kind))
        return [x.detach().cpu().double() for x in (out, grad)]

    truth = run(packed_attention_ref, torch.float64)
    plain = errors(run(packed_attention_ref, dtype), truth)
    found = errors(run(attention_on(device), dtype), truth)
    assert all(x <= 2 * y for x, y in zip(found, plain, strict=True)), (found, plain)


@DEVICES
@DTYPES
@pytest.mark.parametrize("name", ["pairs", "two_to_five"])
def test_the_fused_projection_as_it_is(name, dtype, device, monkeypatch):
    """Split, rotation and gather in one kernel before varlen attention, all queries and pruned."""
    if device == "cpu":
        monkeypatch.setattr(varlen, "varlen_function", lambda: ("stand-in", fake_varlen))
        monkeypatch.setattr(varlen, "fuses_projection", lambda *_: True)
    elif reason := obstacle(torch.device("cuda", 0), dtype, 64):
        pytest.skip(reason)
    pack, pruned = (make_pack(PACKS[name], pruned=pruned) for pruned in (False, True))
    g, r, d, t, n = 2, 3, 64, pack.num_tokens, pruned.num_queries
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    fused, pair, rows = draw(t, g * (r + 2) * d), draw(t, 2 * g * d), draw(n, g * r, d)
    angles = torch.randn(t, d // 2, generator=generator)
    weights = draw(t, g * r * d), draw(n, g * r * d)

    def run(form, kind):
        inputs = [x.to(device, kind).requires_grad_() for x in (fused, pair)]
        tables = [x.to(device, kind) for x in (angles.cos(), angles.sin())]
        outs = form(*inputs, rows.to(device, kind), *tables)
        grads = torch.autograd.grad(outs, inputs, [x.to(device, kind) for x in weights])
        return [x.detach().cpu().double() for x in (*outs, *grads)]

    def in_one(x, pair, rows, cos, sin):
        return (
            projection_attention(x, cos, sin, g * r, g, pack, d**-0.5),
            pooled_attention(rows, pair, cos, sin, pruned, d**-0.5),
        )

    def apart(x, pair, rows, cos, sin):
        query, key, value = x.view(t, g, r + 2, d).split([r, 1, 1], dim=2)
        query = ops.rope_ref(query.reshape(t, g * r, d), cos, sin)
        key = ops.rope_ref(key.squeeze(2), cos, sin)
        keys, values = pair.view(t, 2, g, d).unbind(1)
        keys = ops.rope_ref(keys, cos, sin)
        return (
            packed_attention_ref(query, key, value.squeeze(2), pack, d**-0.5),
            packed_attention_ref(rows, keys, values, pruned, d**-0.5),
        )

    truth, plain, found = run(apart, torch.float64), run(apart, dtype), run(in_one, dtype)
    allowed, got = errors(plain, truth), errors(found, truth)
    assert all(x <= 2 * y for x, y in zip(got, allowed, strict=True)), (got, allowed)
