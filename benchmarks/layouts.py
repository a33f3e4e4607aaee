"""Steps of a run on two processes, in each layout that they allow, against the fastest.

    python benchmarks/layouts.py --hf-model MODEL --data-path PREFIX

Each turn trains --steps + 1 steps in every layout, under torchrun and with the program's own clock,
and leaves out the first. All see the same comparisons in the same steps.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import subprocess
import sys

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from rmega.cli import parse_args, run_tool  # noqa: E402

LAYOUTS = {
    "tp 2": ["--tp", "2", "--pad-attention-heads"],
    "tp 2 + sequence parallel": ["--tp", "2", "--sequence-parallel", "--pad-attention-heads"],
    "pp 2": ["--pp", "2"],
    "dp 2": ["--dp", "2"],
}


@dataclasses.dataclass(kw_only=True)
class Args:
    """Compare the layouts of two processes."""

    hf_model: str
    """Model folder."""
    data_path: str
    """Prefix written by tools/preprocess_pref.py."""
    global_batch_size: int = 16
    """Comparisons per step."""
    steps: int = 4
    """Counted steps."""
    repeats: int = 3
    """Turns of all layouts."""
    name: str = "layouts"
    """Results go to benchmarks/results/NAME.json."""


def seconds(args: Args, flags: list[str]) -> float:
    """Of the counted steps of one run, the mean."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("examples/pretrain_reward.py", "--hf-model", args.hf_model),
        *("--data-path", args.data_path, "--train-steps", str(args.steps + 1)),
        *("--global-batch-size", str(args.global_batch_size), "--precision", "fp32"),
        *("--matmul-precision", "highest", "--log-interval", "1", *flags),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = re.findall(r"^Iter\(train\).*? time: ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or len(found) != args.steps + 1:
        raise ValueError(f"{' '.join(flags)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return statistics.mean(map(float, found[1:]))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="benchmarks/layouts.py")
    from benchmarks.common import ROOT, environment, save, table

    os.chdir(ROOT)
    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(args.repeats):
        for name, flags in LAYOUTS.items():
            found[name].append(seconds(args, flags))
    fastest = min(found, key=lambda name: statistics.median(found[name]))
    rows = []
    for name, times in found.items():
        ratios = sorted(a / b for a, b in zip(found[fastest], times, strict=True))
        rows.append(
            {
                "layout": name,
                "seconds": round(statistics.median(times), 2),
                "speed over the fastest": round(statistics.median(ratios), 3),
                "spread": f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
            }
        )
    print(table(rows))
    save(args.name, {"environment": environment(), "settings": vars(args), "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
