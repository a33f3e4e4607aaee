"""Attention over packs with a shared prefix, forward and backward: the paths that compute the same
thing.

    python benchmarks/attention.py --threads 1 2
    python benchmarks/attention.py --device cuda --name gpu_attention

- native: csrc/cpu/packed_attention.cpp (rmega's choice on a CPU); varlen: one varlen call over
  gathered keys (on CUDA);
- flash: ATen's CPU flash kernel per part, merged by log-sum-exp (where the extension is not built);
- tree: scaled_dot_product_attention with one dense tree mask per comparison;
- copies: rmega's choice on the pack in which each response carries its own prompt (no sharing).

Lengths are drawn (seeded, log-normal) around the means of HH-RLHF and UltraFeedback. The paths are
interleaved; a figure is the best of --repeats. With one thread it is processor time, which a busy
machine disturbs less; with more it is wall time, and so it is on CUDA (bf16 only, ten times as many
comparisons). GFLOP/s count the useful work only, 3.5 * 4 * d * a FLOP for each (query, key) pair of
the shared pack.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from benchmarks import common  # noqa: E402
from rmega.cli import parse_args, run_tool  # noqa: E402
from rmega.data.packing import Segments  # noqa: E402
from rmega.models import attention, attention_cpu  # noqa: E402

SHAPES = {"SmolLM2-135M": (9, 3, 64), "hidden 2048": (16, 8, 128)}  # a, g, d
LENGTHS = {
    "HH": (170, 66, 14),
    "UltraFeedback": (114, 369, 5),
}  # mean prefix, mean suffix, comparisons


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure packed attention against other ways to compute it."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads to measure with."""
    repeats: int = 10
    """Runs of each path; the best counts."""
    shapes: tuple[Literal["SmolLM2-135M", "hidden 2048"], ...] = tuple(SHAPES)
    """Numbers of heads and head dimensions."""
    name: str = "attention"
    """Results go to benchmarks/results/NAME.json."""


def draw_lengths(kind: str, times: int) -> list[tuple[int, tuple[int, int]]]:
    """(prefix, two suffixes) of some comparisons."""
    prefix, suffix, count = LENGTHS[kind]
    generator = random.Random(0)

    def length(mean: int) -> int:
        return max(1, int(mean * generator.lognormvariate(-0.18, 0.6)))

    return [(length(prefix), (length(suffix), length(suffix))) for _ in range(count * times)]


def make_segments(comparisons: list, share: bool) -> tuple[Segments, int]:
    """The segments of a pack and its tokens."""
    rows, at = [], 0
    for prefix, suffixes in comparisons:
        start = at
        if share:
            rows.append((start, prefix, start, prefix, 0, 0))
            at += prefix
        for suffix in suffixes:
            n = suffix if share else prefix + suffix
            rows.append((at, n, at, n, start if share else 0, prefix if share else 0))
            at += n
    return (
        Segments(*(torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))),
        at,
    )


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
):
    """One dense mask per comparison, made once per pack."""
    if "tree" not in segments.cache:
        comparisons: dict[int, list] = {}
        for s in attention.segment_list(segments):
            comparisons.setdefault(s.prefix_start if s.prefix_len else s.k_start, []).append(s)
        blocks = []
        for first, parts in comparisons.items():
            end = max(s.k_start + s.k_len for s in parts)
            mask = torch.zeros(end - first, end - first, dtype=torch.bool, device=q.device)
            for s in parts:
                rows = slice(s.q_start - first, s.q_start - first + s.q_len)
                mask[rows, : s.prefix_len] = True
                mask[rows, rows] = torch.ones(
                    s.q_len, s.q_len, dtype=torch.bool, device=q.device
                ).tril()
            blocks.append((first, end, mask))
        segments.cache["tree"] = blocks
    out = []
    for first, end, mask in segments.cache["tree"]:
        rows = [x[None, first:end].transpose(1, 2) for x in (q, k, v)]
        out.append(
            F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(out, dim=2)[0].transpose(0, 1).flatten(1)


def measure(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, threads: int, args: Args
) -> dict:
    """{path: (forward ms, backward ms, GFLOP/s)}."""
    torch.set_num_threads(threads)
    on_cuda = args.device == "cuda"
    clock = (
        time.process_time if threads == 1 and not on_cuda else partial(common.clock, args.device)
    )
    a, g, d = shape
    comparisons = draw_lengths(kind, 10 if on_cuda else 1)
    packs = {share: make_segments(comparisons, share) for share in (True, False)}
    paths = {
        "native": (attention_cpu.packed_attention_native, True),
        "flash": (attention_cpu.packed_attention_flash, True),
        "tree": (tree_attention, True),
        "copies": (attention_cpu.packed_attention_native, False),
    }
    if on_cuda:
        paths = {
            "varlen": (attention.packed_attention, True),
            "tree": (tree_attention, True),
            "copies": (attention.packed_attention, False),
        }
    elif not hasattr(torch.ops.rmega, "packed_attention"):
        print("rmega._C is not built: no native and copies rows")
        del paths["native"], paths["copies"]
    inputs = {}
    for share, (_, t) in packs.items():
        generator = torch.Generator().manual_seed(0)
        inputs[share] = [
            torch.randn(t, n, d, generator=generator).to(args.device, dtype).requires_grad_()
            for n in (a, g, g)
        ]
    best = {name: [float("inf")] * 2 for name in paths}
    for _ in range(args.repeats):
        for name, (path, share) in paths.items():
            q, k, v = inputs[share]
            begin = clock()
            out = path(q, k, v, packs[share][0], d**-0.5)
            middle = clock()
            torch.autograd.grad(out, (q, k, v), q.detach().flatten(1))
            times = middle - begin, clock() - middle
            best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
    pairs = sum(
        p * (p + 1) // 2 + sum(s * (s + 1) // 2 + s * p for s in suffixes)
        for p, suffixes in comparisons
    )
    flop = 3.5 * 4 * d * a * pairs
    return {name: (x * 1e3, y * 1e3, flop / (x + y) / 1e9) for name, (x, y) in best.items()}


def main(args: Args) -> int:
    """Print the table and write it."""
    rows = []
    columns = [
        "threads",
        "dtype",
        "shape",
        "lengths",
        "path",
        "forward_ms",
        "backward_ms",
        "gflops",
        "over_first",
    ]
    print(("{:>7} {:>8} {:>13} {:>14} {:>7} {:>10} {:>11} {:>7} {:>11}").format(*columns))
    on_cuda = args.device == "cuda"
    for threads in args.threads[:1] if on_cuda else args.threads:
        for dtype in (torch.bfloat16,) if on_cuda else (torch.float32, torch.bfloat16):
            for shape_name in args.shapes:
                shape = SHAPES[shape_name]
                for kind in LENGTHS:
                    result = measure(kind, shape, dtype, threads, args)
                    chosen = sum(next(iter(result.values()))[:2])  # rmega's choice stands first
                    for name, (forward, backward, gflops) in result.items():
                        row = [
                            threads,
                            str(dtype)[6:],
                            shape_name,
                            kind,
                            name,
                            forward,
                            backward,
                            gflops,
                            (forward + backward) / chosen,
                        ]
                        rows.append(dict(zip(columns, row, strict=True)))
                        print(
                            "{:>7} {:>8} {:>13} {:>14} {:>7} {:>10.2f} {:>11.2f} {:>7.0f}"
                            " {:>11.2f}".format(*row),
                            flush=True,
                        )
    common.save(args.name, {**common.environment(args.device), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args)))
