"""Rewards of conversations, from an exported folder or from a run's checkpoint, by the training path.

    scorer = load_scorer("RUN")          # or a Hugging Face reward model
    scorer.score_conversations([[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]])

Batches are packed without padding and responses to one prompt share it; neither changes a reward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rmega import checkpoint, distributed, precision
from rmega.data.batching import CostModel, balanced_bins, pack
from rmega.data.records import Comparison
from rmega.data.tokenize import PairTokenizer, common_prefix_length
from rmega.models.geometry import Geometry, RopeScaling
from rmega.models.hf import load_hf, read_geometry, resolve_model
from rmega.models.reward_model import RewardModel, transformer_config

GROUP = 256  # prompts that are packed together: enough to fill bins, few enough to report progress
RECIPE = "reward_recipe.json"


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """How text becomes ids: must be as in training, or rewards mean nothing."""

    reward_token: str = "auto"
    chat_template: str | None = None
    max_length: int | None = None
    overlong: str = "left-prompt"

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> TokenRules:
        """The rules that a dataset's manifest (or an export's recipe) records."""
        return cls(reward_token=str(manifest["reward_token_id"]), chat_template=manifest.get("chat_template"),
                   max_length=manifest.get("max_length"), overlong=manifest.get("overlong") or "left-prompt")


def load_scorer(path: str | Path, *, dtype: str = "fp32", max_tokens: int = 8192, rules: TokenRules | None = None,
                flag: str = "--model") -> Scorer:
    """A scorer of a Hugging Face reward model (folder or hub name), a run folder, or one checkpoint of a run.

    ``dtype`` is fp32, bf16, fp16 or auto. Under torchrun the ranks share the work. Raises ValueError naming ``flag``
    where there is no reward model.
    """
    found = checkpoint.find(path) if Path(path).is_dir() else None
    device = distributed.initialize()
    chosen = precision.choose_together(dtype, "auto", device)
    if found is not None:
        info = checkpoint.read_info(found)
        scaling = RopeScaling(**info["geometry"]["rope_scaling"])
        geometry = Geometry(**{**info["geometry"], "rope_scaling": scaling})
        model = _empty_model(geometry, chosen.dtype, device)
        checkpoint.load(found, wrapped=[model])
        return Scorer(model, _tokenizer(found / "hf", rules or TokenRules.from_manifest(info["manifest"])), device,
                      max_tokens=max_tokens)
    folder = resolve_model(str(path), flag=flag)
    geometry, config = read_geometry(folder)
    if not geometry.has_reward_head:
        raise ValueError(f"{flag} {path}: not a reward model ({', '.join(config.get('architectures') or ['?'])}), and "
                         "not a run with a checkpoint")
    model = _empty_model(geometry, chosen.dtype, device)
    load_hf(model, folder, geometry)
    if rules is None:
        recipe = folder / RECIPE
        reward_token = config.get("reward_token_id")
        if recipe.is_file():
            rules = TokenRules.from_manifest(json.loads(recipe.read_text(encoding="utf-8")))
        else:
            rules = TokenRules(reward_token="auto" if reward_token is None else str(reward_token))
    return Scorer(model, _tokenizer(folder, rules), device, max_tokens=max_tokens)


def _empty_model(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> RewardModel:
    config = transformer_config(geometry, dtype=dtype, on_cpu=device.type == "cpu")
    return RewardModel(config, geometry).to(device).eval()


def _tokenizer(folder: Path, rules: TokenRules) -> PairTokenizer | None:
    """None where the folder has no tokenizer: token ids can still be scored."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return PairTokenizer.load(folder, reward_token=rules.reward_token, chat_template=rules.chat_template,
                              max_length=rules.max_length, overlong=rules.overlong)


class Scorer:
    """A reward model with its tokenizer."""

    def __init__(self, model: RewardModel, tokenizer: PairTokenizer | None, device: torch.device, *,
                 max_tokens: int = 8192) -> None:
        self.model, self.tokenizer, self.device, self.max_tokens = model, tokenizer, device, max_tokens
        self._cost = CostModel.of(model.geometry)

    @torch.no_grad()
    def score_tokens(self, items: Sequence[Sequence[Sequence[int]]],
                     progress: Callable[[int], None] | None = None) -> list[list[float]]:
        """Rewards of token sequences that end with the reward token; the sequences of an item may share a prefix."""
        shared = [_share(sequences) for sequences in items]
        out = torch.zeros(sum(len(s.suffixes) for s in shared), device=self.device)
        firsts = np.cumsum([0, *(len(s.suffixes) for s in shared)])
        ranks, me = distributed.world_size(), distributed.rank()
        for start in range(0, len(shared), GROUP):
            group = shared[start : start + GROUP]
            lengths = [(len(s.prefix), [len(x) for x in s.suffixes]) for s in group]
            bins = balanced_bins([p + sum(x) for p, x in lengths], [self._cost(p, x) for p, x in lengths],
                                 num_ranks=ranks, capacity=self.max_tokens)[me]
            for numbers in bins:
                if not numbers:
                    continue
                batch = pack([group[i] for i in numbers], responses=[int(firsts[start + i]) for i in numbers])
                out[batch.responses.to(self.device)] = self.model(batch.to(self.device))
            if progress:
                progress(len(group))
        if ranks > 1:
            distributed.sum_over_ranks(out)
        rewards = out.tolist()
        return [rewards[a:b] for a, b in zip(firsts, firsts[1:], strict=False)]

    def score_comparisons(self, comparisons: Iterable[Comparison],
                          progress: Callable[[int], None] | None = None) -> list[list[float]]:
        """Rewards of each comparison's responses, in the order of ``comparison.responses``."""
        encode = self._encoder()
        items = [[encode([*c.prompt, *response], c.tools) for response in c.responses] for c in comparisons]
        return self.score_tokens(items, progress)

    def score_conversations(self, conversations: Sequence[list[dict[str, Any]]],
                            progress: Callable[[int], None] | None = None) -> list[float]:
        """One reward for each conversation. Equal beginnings of neighbouring conversations are computed once."""
        encode = self._encoder()
        items: list[list[list[int]]] = []
        prompt = None
        for conversation in conversations:
            if conversation[:-1] == prompt and items:
                items[-1].append(encode(conversation, None))
            else:
                items.append([encode(conversation, None)])
                prompt = conversation[:-1]
        return [reward for rewards in self.score_tokens(items, progress) for reward in rewards]

    def _encoder(self) -> Callable[[list[dict[str, Any]], Any], list[int]]:
        if self.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer, so only token ids can be scored")
        return lambda messages, tools: self.tokenizer.encode_conversation(messages, tools=tools)


def _share(sequences: Sequence[Sequence[int]]) -> SimpleNamespace:
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    for array in arrays:
        if not len(array):
            raise ValueError("an empty token sequence has no reward")
    length = common_prefix_length(arrays) if len(arrays) > 1 else 0
    return SimpleNamespace(prefix=arrays[0][:length], suffixes=[a[length:] for a in arrays],
                           scores=[0.0] * len(arrays), graded=False)


@contextlib.contextmanager
def scorer(path: str | Path, **kwargs: Any):
    """``load_scorer`` that leaves the process group again."""
    try:
        yield load_scorer(path, **kwargs)
    finally:
        distributed.finish()
