"""A step with adapters against a step of full training, on one process.

    python benchmarks/lora.py --hf-model MODEL --threads 2

Both train in a process of their own, in turn, --repeats times, on the same random comparisons. The
ratio is of processor time, which other programs on the machine change less than the time of day;
--wall takes the latter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Literal

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Compare LoRA with full training."""

    hf_model: str
    """Model folder; with --dummy-weights only its config.json is read."""
    dummy_weights: bool = False
    """Random weights in the shape of --hf-model."""
    lora_rank: int = 16
    """Rank of the adapters, on all linear layers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Both sides."""
    tokens: int = 2048
    """Tokens of a step: pairs of a prompt of 128 tokens and two responses of 192."""
    steps: int = 3
    """Counted steps, after one that is not."""
    repeats: int = 3
    """Turns of both."""
    threads: int = 2
    """OpenMP threads."""
    wall: bool = False
    """Time of day instead of processor time."""
    name: str = "lora"
    """Results go to benchmarks/results/NAME.json."""
    run: Literal["both", "full", "lora"] = "both"
    """Used between the processes."""


def measure(args: Args) -> dict[str, float]:
    """Seconds of a step (the smallest), and bytes of weights, gradients and optimizer state."""
    import numpy as np
    import torch

    from rmega import distributed, precision
    from rmega.config import DataArgs, LoraArgs, ModelArgs, TrainArgs, TrainingConfig
    from rmega.data.indexed import StoredComparison
    from rmega.data.packing import pack
    from rmega.models.hf import load_hf, read_geometry
    from rmega.models.lora_weights import initialize
    from rmega.training import components, train

    device = distributed.initialize()
    torch.set_float32_matmul_precision("highest")
    geometry, _ = read_geometry(args.hf_model)
    config = TrainingConfig(
        model=ModelArgs(hf_model=args.hf_model),
        data=DataArgs(data_path=()),
        lora=LoraArgs(lora_rank=args.lora_rank if args.run == "lora" else 0),
        train=TrainArgs(train_steps=10**6),
    )
    dtype = precision.DTYPES[args.precision]
    (model,) = components.build_model(config, geometry, dtype=dtype, device=device)
    if args.dummy_weights:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
    else:
        load_hf(model, args.hf_model, geometry)
    if config.lora.lora_rank:
        initialize(model, geometry, config.lora)
    wrapped = components.wrap_model([model], config)
    optimizer, _ = components.build_optimizer(wrapped, config, 10**6)
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, geometry.vocab_size, count, dtype=np.int32)

    stored = [
        StoredComparison(ids(128), [ids(192), ids(192)], np.array([1, 0], np.float32), False, "")
        for _ in range(max(1, args.tokens // 512))
    ]
    clock = time.perf_counter if args.wall else time.process_time
    seconds = []
    for _ in range(args.steps + 1):
        begun = clock()
        train.train_step(wrapped, optimizer, [pack(stored)], config.loss, len(stored))
        seconds.append(clock() - begun)
    state = sum(
        value.nbytes
        for part in optimizer.chained_optimizers
        for entry in part.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    distributed.finish()
    return {
        "seconds": min(seconds[1:]),
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in wrapped[0].buffers),
        "optimizer": state,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="benchmarks/lora.py")
    if args.run != "both":
        print("RESULT " + json.dumps(measure(args)))
        return 0
    from benchmarks.common import environment, save, table

    argv = argv if argv is not None else sys.argv[1:]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    results: dict[str, list[dict[str, float]]] = {"full": [], "lora": []}
    for _ in range(args.repeats):
        for side, found in results.items():
            command = [sys.executable, __file__, *argv, "--run", side]
            out = subprocess.run(command, env=env, capture_output=True, text=True)
            lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
            if out.returncode or not lines:
                raise ValueError(f"{side} failed: {out.stderr.strip().splitlines()[-1:]}")
            found.append(json.loads(lines[-1].removeprefix("RESULT ")))
    ratios = sorted(
        one["seconds"] / other["seconds"]
        for one, other in zip(results["lora"], results["full"], strict=True)
    )
    ratio = statistics.median(ratios)
    rows = [
        {
            "side": side,
            **{f"{key} MB": found[0][key] / 1e6 for key in ("weights", "gradients", "optimizer")},
        }
        for side, found in results.items()
    ]
    print(table(rows))
    kind = "time of day" if args.wall else "processor time"
    print(f"step with adapters / step of full training ({kind}): {ratio:.3f} {ratios}")
    content = {"args": dataclasses.asdict(args), "ratio": ratio, "ratios": ratios, "rows": rows}
    save(args.name, {**environment(), **content})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
