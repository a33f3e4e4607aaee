"""Rewards of conversations, from an export or a checkpoint.

    scorer = load_scorer("RUN")          # or a Hugging Face reward model
    scorer.score_conversations([[{"role": "user", "content": ...},
                                 {"role": "assistant", "content": ...}]])

Batches are packed without padding and conversations with the same beginning compute it once;
neither changes a reward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmega import distributed, precision
from rmega.checkpointing import base_model, checkpoint, run_folder
from rmega.checkpointing.find import check_exports, find
from rmega.config import LoraArgs
from rmega.data.balance import CostModel, balanced_bins
from rmega.data.packing import pack
from rmega.hub import RECIPE, has_tokenizer, read_recipe, recorded_reward_token, resolve_start
from rmega.models import lora, lora_weights
from rmega.models.geometry import Geometry
from rmega.models.hf import load_hf, read_geometry
from rmega.models.peft_folder import PeftFolder
from rmega.models.reward_model import RewardModel, transformer_config
from rmega.preferences.comparison import Comparison, Rejected
from rmega.preferences.scorable import Conversation
from rmega.preferences.special_tokens import NO_REWARD_TOKEN
from rmega.preferences.tokenizer import NotEncoded, PairTokenizer
from rmega.scoring.prefixes import distinct_sequences, group_by_prefix, parts_of

NO_LIMIT = 2**40  # tokens
GROUP = 256  # prompts that are packed together: enough to fill bins, few enough to report progress


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """How text becomes ids: must be as in training, or rewards mean nothing."""

    reward_token: str = "auto"
    chat_template: str | None = None
    max_length: int | None = None
    overlong: str = "left-prompt"
    pad_token_id: int | None = None

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> TokenRules:
        """The rules that a dataset's manifest (or an export's recipe) records."""
        token = manifest["reward_token_id"]
        return cls(
            reward_token=NO_REWARD_TOKEN if token is None else str(token),
            chat_template=manifest.get("chat_template"),
            max_length=manifest.get("max_length"),
            overlong=manifest.get("overlong") or "left-prompt",
            pad_token_id=manifest.get("pad_token_id"),
        )


def load_scorer(
    path: str | Path,
    *,
    dtype: str | None = None,
    max_tokens: int = 8192,
    rules: TokenRules | None = None,
    reward_token: str | None = None,
    flag: str = "--model",
    adapters_base: Path | None = None,
) -> Scorer:
    """A scorer of a Hugging Face reward model or an adapter of peft with a reward head (folder or
    hub name), of a run folder, or of one checkpoint of a run. Adapters are merged into their base
    model.

    ``dtype`` is fp32, bf16, fp16, auto, or None: bf16 on a GPU (where fp32 would leave attention to
    the plain reference), fp32 on a CPU. ``rules`` stand in for those that the model records;
    ``reward_token`` (a token's text or id, or none) names what it does not record: a reward model
    of another program is read at the last token of the text, nothing appended. ``adapters_base``:
    the base model of a checkpoint of adapters, where it is already verified. Under torchrun the
    ranks share the work. Raises ValueError naming ``flag`` where there is no reward model.
    """
    device = distributed.initialize()  # first: the ranks share the reading of checksums
    found = find(path, flag, "weights from") if Path(path).is_dir() else None
    if dtype is None:
        dtype = "auto" if device.type == "cuda" else "fp32"
    chosen = precision.choose_together(dtype, "auto", device)
    options: dict[str, Any] = {"max_tokens": max_tokens, "name": str(path)}
    if found is not None:
        info = run_folder.read_info(found)
        geometry = Geometry.from_dict(info["geometry"])
        model = _empty_model(geometry, chosen.dtype, device)
        if (args := LoraArgs.recorded(info.get("config"))).lora_rank:
            load_hf(model, adapters_base or base_model.find(info, found, flag), geometry)
            lora.attach(model, args)
        checkpoint.load(found, wrapped=[model])
        lora.merge(model)
        rules = rules or TokenRules.from_manifest(info["manifest"])
        tokenizer = _tokenizer(found / "hf", rules, reward_token)
        return Scorer(model, tokenizer, device, folder=found, **options)
    base, folder = resolve_start(str(path), flag=flag)
    check_exports(flag, base, folder)
    geometry, config = read_geometry(base)
    adapter = PeftFolder(folder, geometry) if folder else None
    if not geometry.has_reward_head and not (adapter and adapter.has_head):
        raise ValueError(
            f"{flag} {path}: not a reward model"
            f" ({', '.join(config.get('architectures') or ['?'])}), and not a run with a checkpoint"
        )
    model = _empty_model(geometry, chosen.dtype, device)
    load_hf(model, base, geometry)
    if adapter:
        lora.attach(model, adapter.args)
        lora_weights.initialize(model, geometry, adapter.args, start=adapter)
        lora.merge(model)
    folder = folder if folder and has_tokenizer(folder) else base
    recipe = read_recipe(folder)
    if rules is None and recipe is not None:
        if "reward_token_id" not in recipe:
            raise ValueError(f"{folder / RECIPE}: has no reward_token_id")
        rules = TokenRules.from_manifest(recipe)
    tokenizer = _tokenizer(folder, rules, reward_token)
    return Scorer(model, tokenizer, device, folder=folder, **options)


def _empty_model(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> RewardModel:
    config = transformer_config(geometry, dtype=dtype, on_cpu=device.type == "cpu")
    return RewardModel(config, geometry).to(device).eval()


def _tokenizer(
    folder: Path, rules: TokenRules | None, reward_token: str | None
) -> PairTokenizer | None:
    """None where the folder has no tokenizer: token ids can still be scored."""
    if not has_tokenizer(folder):
        return None
    recorded = recorded_reward_token(folder) if rules is None else rules.reward_token
    rules = dataclasses.asdict(rules or TokenRules())
    tokenizer = PairTokenizer.load(folder, **rules)
    if reward_token is None:
        return tokenizer
    named = PairTokenizer.load(folder, **{**rules, "reward_token": reward_token})
    if recorded != NO_REWARD_TOKEN and named.reward_token_id != tokenizer.reward_token_id:
        raise ValueError(
            f"--reward-token {reward_token}: the model was trained with {tokenizer.reading}"
        )
    return named


class Scorer:
    """A reward model with its tokenizer."""

    def __init__(
        self,
        model: RewardModel,
        tokenizer: PairTokenizer | None,
        device: torch.device,
        *,
        max_tokens: int = 8192,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.device, self.max_tokens = (
            model,
            tokenizer,
            device,
            max_tokens,
        )
        self.name, self.folder = name, folder
        """What was asked for, and the folder or checkpoint that was read."""
        self._cost = CostModel.of(model.geometry)

    # ---- text to tokens

    def encode(
        self,
        conversation: Conversation,
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[int]:
        """Ids with the reward token, as in training. ``notes`` is extended by what was changed
        (such as a cut).

        Text instead of messages is the output of a chat template, with or without the white space
        that the template puts behind the last turn, padding and the reward token. ValueError where
        there is nothing to score. ``max_length`` stands in for the training's limit of tokens.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: no tokenizer in it, so only token ids can be scored")
        if isinstance(conversation, str):
            ids = self.tokenizer.encode_text(conversation, notes=notes, max_length=max_length)
        else:
            ids = self.tokenizer.encode_conversation(
                conversation, tools=tools, notes=notes, max_length=max_length
            )
        if (largest := max(ids)) >= self.model.geometry.vocab_size:
            token = self.tokenizer.tokenizer.convert_ids_to_tokens(largest)
            size = self.model.geometry.vocab_size
            detail = f"{token}, id {largest} of {size}"
            raise NotEncoded(Rejected("outside_vocabulary", detail))
        return ids

    def complete(self, ids: Sequence[int]) -> list[int]:
        """Ids that a client made, up to the token at which the reward is read: the reward token,
        which is appended unless it ends them. ValueError for an id that the model does not know."""
        if (largest := max(ids)) >= self.model.geometry.vocab_size:
            raise ValueError(f"id {largest} of {self.model.geometry.vocab_size}")
        return self.tokenizer.complete(ids) if self.tokenizer else list(ids)

    # ---- tokens to rewards

    @torch.no_grad()
    def score_tokens(
        self,
        items: Sequence[Sequence[Sequence[int]]],
        progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Rewards of token sequences that end with the reward token; the sequences of an item may
        share a prefix, and equal ones are computed once: their rewards are the same number."""
        distinct = [distinct_sequences(item) for item in items]
        parts = [part for own, _ in distinct for part in parts_of(own, self.max_tokens)]
        out = torch.zeros(sum(len(s.suffixes) for s in parts), device=self.device)
        firsts = np.cumsum([0, *(len(s.suffixes) for s in parts)])
        ranks, me = distributed.world_size(), distributed.rank()
        for start in range(0, len(parts), GROUP):
            group = parts[start : start + GROUP]
            lengths = [(len(s.prefix), [len(x) for x in s.suffixes]) for s in group]
            bins = balanced_bins(
                [p + sum(x) for p, x in lengths],
                [self._cost(p, x) for p, x in lengths],
                num_ranks=ranks,
                capacity=self.max_tokens,
            )[me]
            for numbers in bins:
                if not numbers:
                    continue
                batch = pack(
                    [group[i] for i in numbers], responses=[int(firsts[start + i]) for i in numbers]
                )
                out[batch.responses.to(self.device)] = self.model(batch.to(self.device))
            if progress:
                progress(sum(s.ends_item for s in group))
        if ranks > 1:
            distributed.sum_over_ranks(out)
        rewards = iter(out.tolist())
        computed = [[next(rewards) for _ in own] for own, _ in distinct]
        return [[own[i] for i in which] for own, (_, which) in zip(computed, distinct, strict=True)]

    def score_sequences(
        self, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """One reward for each token sequence, in order. Those with the same beginning compute it
        once, wherever they stand."""
        arrays = [np.asarray(s, dtype=np.int32) for s in sequences]
        groups = group_by_prefix(arrays)
        scored = self.score_tokens([[arrays[i] for i in group] for group in groups], progress)
        out = [0.0] * len(arrays)
        for group, rewards in zip(groups, scored, strict=True):
            for i, reward in zip(group, rewards, strict=True):
                out[i] = reward
        return out

    def score_comparisons(
        self,
        comparisons: Iterable[Comparison],
        progress: Callable[[int], None] | None = None,
        *,
        notes: Counter[str] | None = None,
        errors: dict[int, NotEncoded] | None = None,
        max_length: int | None = None,
    ) -> list[list[float]]:
        """Rewards of each comparison's responses, in the order of ``comparison.responses``.

        ``notes`` counts what was changed in the responses on the way, such as cuts. With ``errors``
        a comparison that cannot be encoded, such as one over the limit of the training, gets no
        rewards ([]), and its number and reason go there; without, ValueError.
        """
        items: list[list[list[int]]] = []
        for number, c in enumerate(comparisons):
            changes: list[str] = []
            try:
                items.append(
                    [
                        self.encode([*c.prompt, *r], c.tools, changes, max_length=max_length)
                        for r in c.responses
                    ]
                )
            except NotEncoded as error:
                if errors is None:
                    raise
                errors[number] = error
                items.append([])
                continue
            if notes is not None:
                notes.update(changes)
        return self.score_tokens(items, progress)

    def score_uncut(self, comparisons: Iterable[Comparison]) -> list[list[float]]:
        """As `score_comparisons`, of altered comparisons (probes): none is left out because it is
        longer than what the training took."""
        policy = self.tokenizer.overlong if self.tokenizer else None
        limit = NO_LIMIT if policy in ("drop", "error") else None
        return self.score_comparisons(comparisons, max_length=limit)

    def score_conversations(
        self, conversations: Sequence[Conversation], progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """One reward for each conversation, in order."""
        return self.score_sequences(
            [self.encode(conversation) for conversation in conversations], progress
        )

    def describe(self) -> dict[str, Any]:
        """What a user of the rewards should know: model, number format, and the recipe of the
        tokens."""
        recipe = self.tokenizer.manifest() if self.tokenizer else {}
        recipe.pop("tokenizer", None)
        dtype = next(
            name
            for name, value in precision.DTYPES.items()
            if value is self.model.config.params_dtype
        )
        return {
            "model": self.name,
            "family": self.model.geometry.family,
            "dtype": dtype,
            "device": str(self.device),
            "max_position_embeddings": self.model.geometry.max_position_embeddings,
            **recipe,
        }


@contextlib.contextmanager
def scorer(path: str | Path, **kwargs: Any):
    """``load_scorer`` that leaves the process group again."""
    try:
        yield load_scorer(path, **kwargs)
    finally:
        distributed.finish()
