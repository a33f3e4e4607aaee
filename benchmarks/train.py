"""Training speed with the savings switched on one by one, in turn on the same comparisons.

    python benchmarks/train.py --hf-model MODEL --data-path PREFIX --precision bf16

Rows: padded (what a trainer computes that pads batches of --batch-size comparisons to their longest
response), packed, + prefix, + last layer, + fusion (rmega's operators instead of plain torch). What
the exact savings gain by themselves is asked with --modes "packed, fused" "+prefix, fused"
"+fusion". On a CPU modes take turns within each repeat, so the ratios hold on a machine whose speed
drifts; on a GPU each has a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from benchmarks.common import RESULTS, clock, environment, matmul_rate, save, step_flops, table  # noqa: E402
from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure pairs per second of whole training steps."""

    hf_model: str | None = None
    """Model folder. Without it: --shape with random weights."""
    shape: Literal["internlm2-1.8b", "tiny-1024"] = "internlm2-1.8b"
    """Geometry for random weights; tiny-1024 is 12 layers of 1024."""
    data_path: str | None = None
    """Prefix of a dataset. Without it: --lengths are drawn."""
    lengths: Literal["ultrafeedback", "hh"] = "ultrafeedback"
    """Distribution of random comparisons: log-normal around the means of shared/README-like
    statistics (InternLM2 tokens: UltraFeedback prompt 114, response 369; HH prompt 169, response
    66)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format."""
    batch_size: int = 4
    """Comparisons per optimizer step."""
    max_tokens: int = 8192
    """Most tokens of a pack."""
    steps: int = 4
    """Optimizer steps per mode and repeat."""
    repeats: int = 3
    """Turns of all modes."""
    modes: tuple[str, ...] = ("padded", "packed", "+prefix", "+last layer", "+fusion")
    """Which rows."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation."""
    profile: bool = False
    """Also print where the time of the last mode goes."""
    name: str = "train"
    """Results go to benchmarks/results/NAME.json."""


SHAPES = {
    "internlm2-1.8b": dict(
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        vocab_size=92544,
    ),
    "tiny-1024": dict(
        num_layers=12,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=64,
        vocab_size=8192,
    ),
}
# dense bf16 and fp16 TFLOP/s of NVIDIA's data sheets (SXM)
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
# mean prompt and response tokens; log-normal with these standard deviations of the logarithm
LENGTHS = {"ultrafeedback": ((114, 0.9), (369, 0.7)), "hh": ((169, 0.9), (66, 0.9))}
SWITCHES = {
    "padded": (False, False, "reference"),
    "packed": (False, False, "reference"),
    "+prefix": (True, False, "reference"),
    "+last layer": (True, True, "reference"),
    "+fusion": (True, True, "auto"),
    # the exact savings alone, all with the same operators
    "packed, fused": (False, False, "auto"),
    "+prefix, fused": (True, False, "auto"),
}


def draw(kind: str, count: int, vocab: int, longest: int = 2048) -> list:
    """Random comparisons with the given distribution of lengths, seeded."""
    from rmega.data.indexed import StoredComparison

    rng = np.random.default_rng(0)
    (prompt, ps), (response, rs) = LENGTHS[kind]

    def length(mean: float, sigma: float) -> int:
        return int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 4, longest))

    return [
        StoredComparison(
            prefix=rng.integers(10, vocab, length(prompt, ps), dtype=np.int32),
            suffixes=[
                rng.integers(10, vocab, length(response, rs), dtype=np.int32) for _ in range(2)
            ],
            scores=np.array([1.0, 0.0], np.float32),
            graded=False,
            source="random",
        )
        for _ in range(count)
    ]


def padded(comparisons: list) -> list:
    """The same comparisons as a padding trainer sees them: not shared, every response as long as
    the longest."""
    longest = max(len(c.prefix) + len(s) for c in comparisons for s in c.suffixes)
    none = np.zeros(0, np.int32)
    whole = [[np.concatenate([c.prefix, s]) for s in c.suffixes] for c in comparisons]
    return [
        dataclasses.replace(
            c, prefix=none, suffixes=[np.pad(s, (0, longest - len(s))) for s in row]
        )
        for c, row in zip(comparisons, whole, strict=True)
    ]


class Mode:
    """One row of the table: its model, its packs, its times."""

    def __init__(
        self, name: str, args: Args, geometry, batches: list[list], dtype: torch.dtype, device
    ) -> None:
        from rmega.config import (
            DataArgs,
            ModelArgs,
            OptimizerArgs,
            ParallelArgs,
            TrainArgs,
            TrainingConfig,
        )
        from rmega.data.balance import CostModel, balanced_bins
        from rmega.data.packing import pack
        from rmega.models.hf import load_hf
        from rmega.training import components

        self.name, (share, prune, self.implementation) = name, SWITCHES[name]
        self.prune = prune
        self.config = TrainingConfig(
            model=ModelArgs(hf_model=args.hf_model or args.shape, prune_last_layer=prune),
            data=DataArgs(data_path=()),
            train=TrainArgs(train_steps=10**6),
            optimizer=OptimizerArgs(lr=1e-6),
            parallel=ParallelArgs(recompute=args.recompute),
        )
        chunks = components.build_model(self.config, geometry, dtype=dtype, device=device)
        if args.hf_model:
            load_hf(chunks[0], args.hf_model, geometry)
        else:
            for parameter in chunks[0].parameters():
                (
                    torch.nn.init.normal_(parameter, std=0.02)
                    if parameter.ndim > 1
                    else torch.nn.init.ones_(parameter)
                )
        self.wrapped = components.wrap_model(chunks, self.config)
        self.optimizer, _ = components.build_optimizer(self.wrapped, self.config, 10**6)
        cost = CostModel.of(geometry)
        self.packs = []
        for batch in batches:
            batch = padded(batch) if name == "padded" else batch
            sizes = [(len(c.prefix), [len(s) for s in c.suffixes]) for c in batch]
            if not share:
                sizes = [(0, [p + x for x in s]) for p, s in sizes]
            bins = balanced_bins(
                [p + sum(s) for p, s in sizes],
                [cost(p, s) for p, s in sizes],
                num_ranks=1,
                capacity=args.max_tokens,
            )[0]
            self.packs.append(
                [pack([batch[i] for i in b], share_prefix=share).to(device) for b in bins]
            )
        self.flops = [
            sum(
                step_flops(geometry, p.segments, p.pooled_segments, prune_last_layer=prune)
                for p in packs
            )
            for packs in self.packs
        ]
        self.tokens = sum(p.num_tokens for packs in self.packs for p in packs)
        self.times: list[float] = []

    def step(self, i: int) -> None:
        from rmega import ops
        from rmega.training import train

        ops.set_implementation(self.implementation)
        report = train.train_step(
            self.wrapped, self.optimizer, self.packs[i], self.config.loss, len(self.packs[i])
        )
        if not math.isfinite(report.loss):
            raise FloatingPointError(f"{self.name}: the loss is {report.loss}")

    def run(self, device) -> None:
        start = clock(device)
        for i in range(len(self.packs)):
            self.step(i)
        self.times.append(clock(device) - start)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="benchmarks/train.py")
    if len(args.modes) > 1 and torch.cuda.is_available():
        return one_process_per_mode(args, sys.argv[1:] if argv is None else argv)
    from rmega import distributed, precision
    from rmega.data.indexed import open_preferences
    from rmega.models.geometry import Geometry
    from rmega.models.hf import read_geometry
    from rmega.training.logs import memory_mb

    device = distributed.initialize()
    chosen = precision.choose_together(args.precision, "auto", device)
    if args.hf_model:
        geometry, _ = read_geometry(args.hf_model)
    else:
        geometry = Geometry(
            family="internlm2",
            max_position_embeddings=32768,
            norm_eps=1e-5,
            rope_theta=1e6,
            **SHAPES[args.shape],
        )
    count = args.batch_size * args.steps
    if args.data_path:
        dataset = open_preferences(args.data_path)
        spread = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(
            int
        )  # the first are no sample of it
        comparisons = [dataset.get(int(i)) for i in spread]
    else:
        comparisons = draw(args.lengths, count, geometry.vocab_size)
    batches = [
        comparisons[i : i + args.batch_size] for i in range(0, len(comparisons), args.batch_size)
    ]
    print(f"{chosen.description}; {len(comparisons)} comparisons in steps of {args.batch_size}")
    rate = matmul_rate(chosen.dtype, device)
    found = {
        "environment": environment(device),
        "precision": chosen.description,
        "matmul_flops": rate,
        "rows": [],
    }
    modes = [Mode(name, args, geometry, batches, chosen.dtype, device) for name in args.modes]
    for mode in modes:
        mode.step(0)  # memory is touched, kernels are chosen
    for _ in range(args.repeats):
        for mode in modes:
            mode.run(device)
    real = sum(len(c.prefix) + len(s) for c in comparisons for s in c.suffixes)
    for mode in modes:
        found["rows"].append(row_of(mode, modes[0], len(comparisons), real, rate, device))
    found["peak_mb_of_process"] = memory_mb()
    print(table(found["rows"]))
    print(f"matmul rate {rate / 1e12:.3g} TFLOP/s in the same process")
    save(args.name, found)
    if args.profile:
        profile(modes[-1], device)
    distributed.finish()
    return 0


def row_of(mode: Mode, first: Mode, comparisons: int, real: int, rate: float, device) -> dict:
    """What is reported of a mode."""
    from rmega.training.logs import memory_mb

    median = statistics.median(mode.times)
    ratios = [a / b for a, b in zip(first.times, mode.times, strict=True)]
    row = {
        "mode": mode.name,
        "pairs/s": comparisons / median,
        "real tokens": real,
        "computed tokens": mode.tokens,
        "TFLOP/s": sum(mode.flops) / median / 1e12,
        "of matmul rate": sum(mode.flops) / median / rate,
        f"x {first.name}": statistics.median(ratios),
        "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
    }
    if device.type == "cuda":
        row["peak MB"] = memory_mb()
        name = torch.cuda.get_device_name(device)
        if peak := next((peak for chip, peak in PEAKS.items() if chip in name), None):
            row["of data sheet"] = row["TFLOP/s"] / peak
    return row


def one_process_per_mode(args: Args, argv: list[str]) -> int:
    """Measure each mode in a process of its own, since a GPU holds one model of this size and a
    process frees all of it, and rewrite table and JSON after each. A mode that fails (no memory,
    say) does not cost the others; the exit code is then 1."""
    rows, failed, found = [], [], {}
    if "--modes" in argv:  # a list is given once: each process gets its own
        at = argv.index("--modes")
        rest = itertools.dropwhile(lambda word: not word.startswith("--"), argv[at + 1 :])
        argv = [*argv[:at], *rest]
    for i, name in enumerate(args.modes):
        part = f"{args.name}_part{i}"
        command = [sys.executable, __file__, *argv, "--modes", name, "--name", part]
        if args.profile and i < len(args.modes) - 1:
            command.append("--no-profile")
        path = RESULTS / f"{part}.json"
        path.unlink(missing_ok=True)
        code = subprocess.run(command).returncode
        if code or not path.is_file():
            failed.append(name)
            print(f"{name}: exit code {code}", flush=True)
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        (row,) = found["rows"]
        del row[f"x {name}"], row["spread"]
        rows.append(row)
        first = rows[0]
        row[f"x {first['mode']}"] = row["pairs/s"] / first["pairs/s"]
        found["environment"]["command"] = "python " + " ".join(sys.argv)
        print(table(rows), flush=True)
        save(args.name, {**found, "rows": rows, "failed": failed})
    return 1 if failed else 0


def profile(mode: Mode, device, by_shape: bool = False) -> None:
    """Where the time of one step goes, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with record(activities=activities, record_shapes=True) as trace:
        mode.step(0)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(
        trace.key_averages(group_by_input_shape=by_shape).table(
            sort_by=key, row_limit=40, max_name_column_width=60
        )
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
