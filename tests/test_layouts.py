"""Layout parity: every layout gives the single rank's losses, gradients, parameters and rewards (fp32, 1e-5)."""

from __future__ import annotations

import pytest

from tests.dist import run_distributed
from tests.tiny import InMemory, random_comparisons, tiny_llama

TOLERANCE = 1e-5
LAYOUTS = ["tp2", "tp2,sp", "pp2", "pp2,vpp2", "dp2", "dp2,plainopt", "tp2,pp2", "tp2,recompute", "tp2,sp,selective",
           "pp2,first1,last3", "dp2,overlap"]


def run(rank: int, world_size: int, text: str, folder: str, switches: dict) -> object:
    from rmega.layouts import Layout, layout_config, run_layout

    config = layout_config(Layout.parse(text), hf_model=folder, steps=3, global_batch_size=10, max_tokens=260, lr=1e-3,
                           **switches)
    return run_layout(config, InMemory(random_comparisons(24, seed=1)))


def result_of(text: str, folder, **switches):
    from rmega.layouts import Layout

    return run_distributed(run, Layout.parse(text).world_size, text, str(folder), switches)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def single(folder):
    return result_of("1", folder)


def test_the_single_rank_learns(single):
    assert len(set(single.losses)) == 3 and all(norm > 1e-3 for norm in single.grad_norms)


@pytest.mark.parametrize("text", LAYOUTS)
def test_parity(text, folder, single):
    from rmega.layouts import compare

    differences = compare(result_of(text, folder), single)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("switches", [{"share_prefix": False}, {"prune_last_layer": False},
                                      {"share_prefix": False, "prune_last_layer": False}])
@pytest.mark.parametrize("text", ["1", "tp2,sp", "pp2"])
def test_savings_are_exact(text, switches, folder, single):
    from rmega.layouts import compare

    differences = compare(result_of(text, folder, **switches), single)
    assert max(differences.values()) <= TOLERANCE, differences


def test_padded_heads_are_exact(tmp_path):
    """Three key/value groups on two ranks: the fourth is zero and stays zero."""
    from rmega.layouts import compare

    folder = tiny_llama(tmp_path, heads=9, groups=3, hidden=72, head_dim=8)
    differences = compare(result_of("tp2,pad", folder), result_of("1", folder))
    assert max(differences.values()) <= TOLERANCE, differences


def test_heads_that_do_not_divide_are_refused(tmp_path):
    folder = tiny_llama(tmp_path, heads=9, groups=3, hidden=72, head_dim=8)
    with pytest.raises(RuntimeError, match="--tp 2 does not divide the model's 3 key/value heads.*--pad-attention"):
        result_of("tp2", folder)
