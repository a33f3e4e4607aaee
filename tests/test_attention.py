"""packed_attention against its definition in fp64: values and gradients of every backend that runs on a CPU."""

import dataclasses

import pytest
import torch

from rmega.models.attention import packed_attention


@dataclasses.dataclass
class Pack:
    """The attributes of a pack's segments that attention reads, built from [(prefix length, suffix lengths)]."""

    q_start: torch.Tensor
    q_len: torch.Tensor
    k_start: torch.Tensor
    k_len: torch.Tensor
    prefix_start: torch.Tensor
    prefix_len: torch.Tensor
    num_queries: int
    num_tokens: int
    cache: dict = dataclasses.field(default_factory=dict)


def make_pack(comparisons, pruned=False, share=True) -> Pack:
    """pruned: one query per response, at its last token. share=False: each response carries its own prompt."""
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
    return Pack(*columns, num_queries if pruned else position, position)


PACKS = {
    "pairs": [(17, (5, 9)), (70, (30, 41))],
    "two_to_five": [(13, (7, 1)), (9, (4, 11, 2)), (30, (8, 8, 8, 8)), (5, (1, 20, 3, 2, 6))],
    "no_prefix": [(0, (12, 3)), (8, (2, 5)), (0, (1, 1))],
    "one_token_suffixes": [(33, (1, 1, 1)), (1, (1, 1))],
    "one_response": [(0, (37,))],
    "longer_than_a_block": [(140, (600, 3)), (300, (129, 64))],
}


def attend(pack, dtype, backend, groups=2, ratio=1, d=16, seed=0):
    """[output, grad q, grad k, grad v] in fp64 for inputs that are the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, heads):
        x = torch.randn(rows, heads, d, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
        return x.requires_grad_()

    q, k, v = draw(pack.num_queries, groups * ratio), draw(pack.num_tokens, groups), draw(pack.num_tokens, groups)
    weight = draw(pack.num_queries, groups * ratio).detach().flatten(1)
    out = packed_attention(q, k, v, pack, d**-0.5, backend)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, (q, k, v), weight))]


def errors(values, truth):
    return [((x - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(values, truth, strict=True)]


@pytest.mark.parametrize("ratio", [1, 3, 8])
@pytest.mark.parametrize("pruned", [False, True], ids=["all_queries", "pruned"])
@pytest.mark.parametrize("name", PACKS)
def test_cpu_matches_reference(name, pruned, ratio):
    pack = make_pack(PACKS[name], pruned)
    truth = attend(pack, torch.float64, "reference", ratio=ratio)
    assert max(errors(attend(pack, torch.float32, "cpu", ratio=ratio), truth)) < 1e-6
