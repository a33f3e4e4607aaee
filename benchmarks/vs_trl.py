"""TRL's RewardTrainer and this project on the same pairs, model, dtype, threads and matmul setting.

    pip install 'rmega[trl]'
    python benchmarks/vs_trl.py --hf-model MODEL --data FILE.jsonl --precision bf16

Each side trains in a process of its own, the two in turn, --repeats times. Both see the same
comparisons in the same steps of --batch-size, truncate to --max-length, make one AdamW step per
batch, and keep all activations. The first --warmup steps are not counted. TRL runs as its users get
it: padded batches, fused AdamW, and in bf16 its default of autocast over fp32 weights;
--trl-pure-bf16 holds its weights and optimizer state in bf16 instead.

What padding and repeated prompts cost depends on the comparisons, and a few steps are a small
sample: of 200 seeded draws from the whole file the one is taken whose ratio of padded to shared
tokens is nearest to that of the file in random batches. Both ratios are printed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Compare with TRL."""

    hf_model: str
    """Model folder (with tokenizer and chat template)."""
    data: str
    """JSONL (also .gz) with prompt, chosen, rejected as message lists."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Both sides."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision, both sides."""
    batch_size: int = 4
    """Comparisons per optimizer step, both sides."""
    max_length: int = 1024
    """Most tokens of a conversation, both sides."""
    steps: int = 6
    """Counted steps."""
    warmup: int = 2
    """Steps before."""
    repeats: int = 3
    """Turns of both."""
    threads: int = 2
    """OpenMP threads, both sides."""
    lora_rank: int = 0
    """Adapters of this rank on all linear layers and the whole head, both sides; TRL's are peft's.
    0: full training."""
    trl_pure_bf16: bool = False
    """TRL's weights and optimizer state in bf16 (no fp32 copy), where rmega keeps fp32 ones."""
    name: str = "vs_trl"
    """Results go to benchmarks/results/NAME.json."""
    run: Literal["both", "trl", "rmega"] = "both"
    """Used between the processes."""
    sample: str | None = None
    """Used between the processes: the file of comparisons that were drawn."""


DRAWS = 200


def read_rows(path: str) -> list[dict]:
    """The comparisons of a file, as TRL wants them."""
    import gzip

    opener = gzip.open if path.endswith(".gz") else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
            if isinstance(prompt, str):  # argilla: the prompt is also the first message of both
                prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def encode(rows: list[dict], args: Args) -> list:
    """Their tokens, truncated to --max-length."""
    from rmega.preferences.comparison import Comparison
    from rmega.preferences.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.load(args.hf_model, max_length=args.max_length)
    return [
        tokenizer.encode_comparison(
            Comparison(
                prompt=row["prompt"], responses=[row["chosen"], row["rejected"]], scores=[1.0, 0.0]
            )
        )
        for row in rows
    ]


def draw(args: Args) -> tuple[list[dict], float, float]:
    """A sample that is like its file: the rows in the order of steps; padded over shared tokens of
    the steps that count, and of the file in random batches."""
    import numpy as np

    rows, skip = read_rows(args.data), args.batch_size * args.warmup
    count = skip + args.batch_size * args.steps
    if len(rows) < count:
        raise ValueError(
            f"--data {args.data}: {len(rows)} rows are too few for {args.steps + args.warmup} steps"
        )
    encoded = encode(rows, args)
    shared = np.array([len(e.prefix) + sum(map(len, e.suffixes)) for e in encoded])
    longest = np.array([len(e.prefix) + max(map(len, e.suffixes)) for e in encoded])

    def ratio(order) -> float:
        batches = order[: len(order) // args.batch_size * args.batch_size].reshape(
            -1, args.batch_size
        )
        return 2 * args.batch_size * longest[batches].max(1).sum() / shared[batches].sum()

    rng = np.random.default_rng(0)
    of_file = float(np.mean([ratio(rng.permutation(len(rows))) for _ in range(20)]))
    draws = [rng.permutation(len(rows))[:count] for _ in range(DRAWS)]
    best = min(draws, key=lambda order: abs(ratio(order[skip:]) - of_file))
    return [rows[i] for i in best], ratio(best[skip:]), of_file


def run_trl(args: Args) -> list[float]:
    """Seconds of each step."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    torch.set_float32_matmul_precision(args.matmul_precision)

    class InOrder(RewardTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    class Stamps(TrainerCallback):
        times: list[float] = []

        def on_train_begin(self, *_, **__):
            self.times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    peft_config = None
    if args.lora_rank:
        from peft import LoraConfig

        peft_config = LoraConfig(
            task_type="SEQ_CLS",
            r=args.lora_rank,
            lora_alpha=2 * args.lora_rank,
            target_modules="all-linear",
            modules_to_save=["score"],
        )
    pure = args.precision == "bf16" and args.trl_pure_bf16
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps + args.warmup,
            max_length=args.max_length,
            gradient_checkpointing=False,
            bf16=args.precision == "bf16" and not pure,
            learning_rate=1e-6,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16" if pure else "float32", "num_labels": 1},
        )
        InOrder(
            args.hf_model,
            args=config,
            train_dataset=Dataset.from_list(read_rows(args.sample)),
            callbacks=[Stamps()],
            peft_config=peft_config,
        ).train()
    return [b - a for a, b in zip(Stamps.times, Stamps.times[1:], strict=False)]


def run_rmega(args: Args) -> list[float]:
    """Seconds of each step, packing included."""
    import numpy as np
    import torch

    from rmega import distributed
    from rmega.config import (
        DataArgs,
        LoraArgs,
        LossArgs,
        ModelArgs,
        OptimizerArgs,
        TrainArgs,
        TrainingConfig,
    )
    from rmega.data.balance import CostModel, balanced_bins
    from rmega.data.indexed import StoredComparison
    from rmega.data.packing import pack
    from rmega.models.hf import load_hf, read_geometry
    from rmega.models.lora_weights import initialize
    from rmega.training import components, train

    device = distributed.initialize()
    torch.set_float32_matmul_precision(args.matmul_precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    geometry, _ = read_geometry(args.hf_model)
    config = TrainingConfig(
        model=ModelArgs(hf_model=args.hf_model),
        data=DataArgs(data_path=()),
        loss=LossArgs(loss="ranking", penalty="none"),
        lora=LoraArgs(lora_rank=args.lora_rank),
        train=TrainArgs(train_steps=10**6),
        optimizer=OptimizerArgs(lr=1e-6),
    )
    chunks = components.build_model(config, geometry, dtype=dtype, device=device)
    load_hf(chunks[0], args.hf_model, geometry)
    if args.lora_rank:
        initialize(chunks[0], geometry, config.lora)
    wrapped = components.wrap_model(chunks, config)
    optimizer, _ = components.build_optimizer(wrapped, config, 10**6)
    stored = [
        StoredComparison(e.prefix, e.suffixes, np.array([1, 0], np.float32), False, "")
        for e in encode(read_rows(args.sample), args)
    ]
    cost, times = CostModel.of(geometry), []
    for start in range(0, len(stored), args.batch_size):
        begun = time.perf_counter()
        batch = stored[start : start + args.batch_size]
        sizes = [(len(c.prefix), [len(s) for s in c.suffixes]) for c in batch]
        bins = balanced_bins(
            [p + sum(s) for p, s in sizes],
            [cost(p, s) for p, s in sizes],
            num_ranks=1,
            capacity=8192,
        )
        packs = [pack([batch[i] for i in b]) for b in bins[0]]
        train.train_step(wrapped, optimizer, packs, config.loss, len(batch))
        times.append(time.perf_counter() - begun)
    distributed.finish()
    return times


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="benchmarks/vs_trl.py")
    if args.run != "both":
        times = run_trl(args) if args.run == "trl" else run_rmega(args)
        print("TIMES " + json.dumps(times[args.warmup :]))
        return 0
    from benchmarks.common import environment, save, table

    if find_spec("trl") is None:
        raise ValueError("trl is not installed (pip install 'rmega[trl]')")
    rows, sampled, of_file = draw(args)
    print(
        f"padded over shared tokens: {sampled:.2f} in the {args.batch_size * args.steps}"
        f" comparisons that count, {of_file:.2f} in the file"
    )
    folder = tempfile.TemporaryDirectory()
    sample = Path(folder.name, "sample.jsonl")
    sample.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = [
        sys.executable,
        __file__,
        *(argv if argv is not None else sys.argv[1:]),
        "--sample",
        str(sample),
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    totals: dict[str, list[float]] = {"trl": [], "rmega": []}
    for _ in range(args.repeats):
        for side in totals:
            done = subprocess.run([*base, "--run", side], capture_output=True, text=True, env=env)
            line = next((x for x in done.stdout.splitlines() if x.startswith("TIMES ")), None)
            if line is None:
                raise ValueError(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
            totals[side].append(sum(json.loads(line[6:])))
            print(
                f"{side}: {args.batch_size * args.steps / totals[side][-1]:.3f} pairs/s", flush=True
            )
    pairs = args.batch_size * args.steps
    ratios = [a / b for a, b in zip(totals["trl"], totals["rmega"], strict=True)]
    folder.cleanup()
    rows = [
        {"side": side, "pairs/s": pairs / statistics.median(times)}
        for side, times in totals.items()
    ]
    print(table(rows))
    print(
        f"rmega over TRL: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    save(
        args.name,
        {
            "environment": {**environment(), "threads": args.threads},
            "settings": dataclasses.asdict(args),
            "padded_over_shared_tokens": {"sample": sampled, "file": of_file},
            "rows": rows,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
