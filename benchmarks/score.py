"""Rate of scoring: the path of tools/score.py against a padded loop of plain transformers, on the
same conversations.

    python benchmarks/score.py --model SMOLLM2 --data HH.jsonl.gz ULTRAFEEDBACK.jsonl.gz

The loops of transformers: AutoModelForSequenceClassification, batches of --batch-size conversations
padded to the longest, once in the order of the file and once sorted by length. Every mode starts
from messages and ends with rewards (chat template and tokenizer included), in the same dtype, with
the same threads and the same weights; modes take turns within each repeat, and the rewards of all
modes are compared. "cpu ratio" is the same ratio in seconds of CPU instead of seconds of the clock,
to judge a measurement on a machine with other work. A folder that is no reward model gets a random
head.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure conversations per second of scoring."""

    model: str
    """Folder of a Llama, with or without a reward head."""
    data: tuple[str, ...]
    """Preference files; each is a table of its own."""
    rows: int = 48
    """Rows of each file, drawn at random."""
    repeats: int = 3
    """Turns of all modes."""
    batch_size: int = 8
    """Conversations in a batch of transformers."""
    modes: tuple[Literal["file order", "sorted", "rmega"], ...] = ("file order", "sorted", "rmega")
    """Which modes; the first is what the others are compared with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of every mode."""
    max_tokens: int = 8192
    """Most tokens of a pack of rmega."""
    threads: int | None = None
    """Threads of every mode; default: torch's choice."""
    name: str = "score"
    """Results go to benchmarks/results/NAME.json."""


def with_head(source: str, folder: str) -> str:
    """``source`` as a reward model: itself, or a copy with a random head in ``folder``."""
    import json

    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    config = json.loads((Path(source) / "config.json").read_text())
    if "LlamaForSequenceClassification" in (config.get("architectures") or []):
        return source
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


class Padded:
    """A scoring loop as one writes it with transformers."""

    def __init__(self, folder: str, tokenizer: Any, dtype: Any, batch_size: int) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        self.model.config.pad_token_id = tokenizer.pad_token_id
        self.tokenizer, self.reward_token_id = tokenizer.tokenizer, tokenizer.reward_token_id
        self.pad, self.template, self.batch_size = (
            tokenizer.pad_token_id,
            tokenizer.template,
            batch_size,
        )
        self.tokens = 0

    def score(self, conversations: list, by_length: bool) -> list[float]:
        import torch

        self.tokens = 0
        texts = self.tokenizer.apply_chat_template(
            conversations, chat_template=self.template, tokenize=False
        )
        ids = [
            row if row[-1] == self.reward_token_id else [*row, self.reward_token_id]
            for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        order = (
            sorted(range(len(ids)), key=lambda i: len(ids[i]))
            if by_length
            else list(range(len(ids)))
        )
        rewards = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            longest = max(len(ids[i]) for i in numbers)
            tokens = torch.full((len(numbers), longest), self.pad)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(numbers):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[
                    :, 0
                ]
            for i, reward in zip(numbers, logits.tolist(), strict=True):
                rewards[i] = reward
            self.tokens += tokens.numel()
        return rewards


class Packed:
    """What tools/score.py does with the rows of a file."""

    def __init__(self, scorer: Any, max_tokens: int) -> None:
        self.scorer, self.max_tokens, self.tokens = scorer, max_tokens, 0

    def score(self, rows: list) -> list[float]:
        from rmega.scoring.batch import score_rows, windows

        results = [
            r
            for w in windows(((row, None) for row in rows), self.max_tokens)
            for r in score_rows(self.scorer, w.rows)
        ]
        return [reward for result in results for reward in result.rewards]

    def computed(self, rows: list) -> int:
        """Tokens of one pass, after sharing; not timed."""
        import numpy as np

        from rmega.scoring.batch import windows
        from rmega.scoring.prefixes import group_by_prefix, parts_of

        total = 0
        for window in windows(((row, None) for row in rows), self.max_tokens):
            ids = [
                np.asarray(self.scorer.encode(c, row.tools), np.int32)
                for row in window.rows
                for c in row.conversations
            ]
            parts = [
                p
                for g in group_by_prefix(ids)
                for p in parts_of([ids[i] for i in g], self.max_tokens)
            ]
            total += sum(len(p.prefix) + sum(map(len, p.suffixes)) for p in parts)
        return total


def main(args: Args) -> int:
    import torch

    from benchmarks.common import environment, save, table
    from rmega.precision import DTYPES
    from rmega.preferences.resolve import resolve
    from rmega.preferences.scorable import read_rows
    from rmega.scoring.scorer import load_scorer

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = with_head(args.model, temporary)
        scorer = load_scorer(folder, dtype=args.dtype, max_tokens=args.max_tokens)
        padded = Padded(folder, scorer.tokenizer, DTYPES[args.dtype], args.batch_size)
    packed = Packed(scorer, args.max_tokens)
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": dataclasses.asdict(args),
        "files": {},
    }
    for source in resolve(list(args.data), flag="--data"):
        rows = [row for row, _ in read_rows([source]) if row.error is None]
        rows = [
            rows[i]
            for i in sorted(random.Random(0).sample(range(len(rows)), min(args.rows, len(rows))))
        ]
        conversations = list(itertools.chain.from_iterable(row.conversations for row in rows))
        run = {
            "file order": lambda c=conversations: padded.score(c, False),
            "sorted": lambda c=conversations: padded.score(c, True),
            "rmega": lambda r=rows: packed.score(r),
        }
        times: dict[str, list[float]] = {mode: [] for mode in args.modes}
        cpu: dict[str, list[float]] = {mode: [] for mode in args.modes}
        rewards: dict[str, list[float]] = {}
        tokens: dict[str, int] = {}
        padded.score(
            conversations[: args.batch_size], False
        )  # memory is touched, kernels are chosen
        packed.score(rows[: args.batch_size // 2])
        for _ in range(args.repeats):
            for mode in args.modes:
                start, cpu_start = time.perf_counter(), time.process_time()
                rewards[mode] = run[mode]()
                times[mode].append(time.perf_counter() - start)
                cpu[mode].append(time.process_time() - cpu_start)
                tokens[mode] = packed.computed(rows) if mode == "rmega" else padded.tokens
        first = args.modes[0]
        lines = []
        for mode in args.modes:
            ratios = [a / b for a, b in zip(times[first], times[mode], strict=True)]
            lines.append(
                {
                    "mode": "rmega" if mode == "rmega" else f"transformers, {mode}",
                    "conversations/s": len(conversations) / statistics.median(times[mode]),
                    "tokens computed": tokens[mode],
                    "ratio": statistics.median(ratios),
                    "ratio min": min(ratios),
                    "ratio max": max(ratios),
                    "cpu ratio": statistics.median(
                        a / b for a, b in zip(cpu[first], cpu[mode], strict=True)
                    ),
                    "max difference": max(
                        abs(a - b) for a, b in zip(rewards[first], rewards[mode], strict=True)
                    ),
                }
            )
        print(
            f"\n{source.label}: {len(rows)} rows, {len(conversations)} conversations,"
            f" {args.repeats} repeats, {args.dtype}, {torch.get_num_threads()}"
            f" threads\n{table(lines)}"
        )
        result["files"][source.label] = {
            "conversations": len(conversations),
            "modes": lines,
            "seconds": times,
        }
    save(args.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args, prog="benchmarks/score.py")))
