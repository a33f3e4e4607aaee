"""What an evaluation with probes costs over scoring its comparisons once, in processor time.

    python benchmarks/evaluate.py --model SMOLLM2 --data examples/data/demo.valid.jsonl

The two parts of ``tools/evaluate.py`` with its default flags, in one process with one model: the
rewards of all comparisons, and the probes (``rmega.evaluation.probes``). The parts take turns; the
start of the program and loading the model count on neither side, which makes the ratio larger than
that of the whole programs. A folder that is no reward model gets a random head.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rmega.cli import parse_args, run_tool  # noqa: E402
from rmega.evaluation.probes import NUM_PROBED  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure the processor time of the probes."""

    model: str
    """Folder of a Llama, with or without a reward head."""
    data: tuple[str, ...] = ("examples/data/demo.valid.jsonl",)
    """Preference files."""
    probes: int = NUM_PROBED
    """Comparisons that are scored again; the default is that of tools/evaluate.py."""
    repeats: int = 2
    """Turns of both parts."""
    name: str = "evaluate"
    """Results go to benchmarks/results/NAME.json."""


def main(args: Args) -> int:
    import numpy as np

    from benchmarks.common import environment, save, table
    from benchmarks.score import with_head
    from rmega.evaluation.probes import pick, probe_texts
    from rmega.evaluation.rows import read_eval_set, scored
    from rmega.preferences.resolve import resolve
    from rmega.scoring.scorer import load_scorer

    with tempfile.TemporaryDirectory() as temporary:
        scorer = load_scorer(with_head(args.model, temporary), dtype="fp32")
    sources = resolve(list(args.data), flag="--data")
    rows = [row for source in sources for row in read_eval_set(source, "auto", None).usable]
    comparisons = [row.comparison for row in rows]
    scorer.score_comparisons(comparisons[:2])  # memory is touched, kernels are chosen
    times: dict[str, list[float]] = {"score": [], "probe": []}
    for _ in range(args.repeats):
        start = time.process_time()
        rewards = scorer.score_comparisons(comparisons)
        scored_at = time.process_time()
        items = [scored(row, np.array(r), len) for row, r in zip(rows, rewards, strict=True)]
        probe_texts(pick(items, args.probes), scorer.score_uncut)
        times["score"].append(scored_at - start)
        times["probe"].append(time.process_time() - scored_at)
    ratios = [1 + p / s for s, p in zip(times["score"], times["probe"], strict=True)]
    line = {
        "comparisons": len(rows),
        "probed": min(args.probes, len(rows)),
        "scoring once, processor s": statistics.median(times["score"]),
        "probes, processor s": statistics.median(times["probe"]),
        "ratio": statistics.median(ratios),
        "ratio min": min(ratios),
        "ratio max": max(ratios),
    }
    print(table([line]))
    result = {"environment": environment(), "arguments": dataclasses.asdict(args)}
    save(args.name, {**result, "result": line, "processor_seconds": times})
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args, prog="benchmarks/evaluate.py")))
