"""A scorer without a model, and a server with it: ``python -m tests.scoring.lengths FLAGS``."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace


class Lengths:
    """Stands in for a scorer: a character is a token, the reward is the number of tokens."""

    tokenizer = SimpleNamespace(
        max_length=None, messages=[], reading="none", overlong="left-prompt"
    )
    model = SimpleNamespace(geometry=SimpleNamespace(max_position_embeddings=100))

    folder = None

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reward = float

    def encode(self, conversation, tools=None, notes=None, *, max_length=None):
        text = conversation if isinstance(conversation, str) else conversation[-1]["content"]
        if len(text) > max_length:
            notes.append("cut: the end")
        return list(range(min(len(text), max_length)))

    def complete(self, ids):
        return list(ids)

    def score_sequences(self, sequences):
        self.batches.append([len(s) for s in sequences])
        assert self.gate.wait(60)
        return [self.reward(len(s)) for s in sequences]

    def describe(self):
        return {"model": "lengths", "family": "none", "dtype": "fp32", "device": "cpu"}


def serve(argv: list[str]) -> int:
    """tools/serve.py with this scorer; with ``--model stuck`` no batch is ever scored."""
    from rmega.cli import parse_args, run_tool
    from rmega.commands.serve import ServeArgs, main

    args = parse_args(ServeArgs, argv)
    scorer = Lengths()
    if args.model == "stuck":
        scorer.gate.clear()
    module = ModuleType("rmega.scoring.scorer")
    module.load_scorer = lambda *_, **__: scorer
    sys.modules[module.__name__] = module  # instead of the one that needs torch
    return run_tool(main, args)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
