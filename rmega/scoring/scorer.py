"""Rewards of conversations, from an exported folder or from a run's checkpoint, by the training
path.

    scorer = load_scorer("RUN")          # or a Hugging Face reward model
    scorer.score_conversations([[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]])

Batches are packed without padding and conversations with the same beginning compute it once;
neither changes a reward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rmega import distributed, precision
from rmega.checkpointing import checkpoint, run_folder
from rmega.checkpointing.find import find
from rmega.data.balance import CostModel, balanced_bins
from rmega.data.packing import pack
from rmega.hub import resolve_model
from rmega.models.geometry import Geometry
from rmega.models.hf import load_hf, read_geometry
from rmega.models.reward_model import RewardModel, transformer_config
from rmega.preferences.comparison import Comparison, Rejected
from rmega.preferences.scorable import Conversation
from rmega.preferences.tokenizer import PairTokenizer, common_prefix_length

MIN_SHARED = 16  # tokens: less is not worth a segment
MAX_DEPTH = 64  # of nested beginnings that are looked at
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
        return cls(
            reward_token=str(manifest["reward_token_id"]),
            chat_template=manifest.get("chat_template"),
            max_length=manifest.get("max_length"),
            overlong=manifest.get("overlong") or "left-prompt",
        )


def load_scorer(
    path: str | Path,
    *,
    dtype: str | None = None,
    max_tokens: int = 8192,
    rules: TokenRules | None = None,
    flag: str = "--model",
) -> Scorer:
    """A scorer of a Hugging Face reward model (folder or hub name), a run folder, or one checkpoint
    of a run.

    ``dtype`` is fp32, bf16, fp16, auto, or None: bf16 on a GPU (where fp32 would leave attention to
    the plain reference), fp32 on a CPU. Under torchrun the ranks share the work. Raises ValueError
    naming ``flag`` where there is no reward model.
    """
    found = find(path, flag, "weights from") if Path(path).is_dir() else None
    device = distributed.initialize()
    if dtype is None:
        dtype = "auto" if device.type == "cuda" else "fp32"
    chosen = precision.choose_together(dtype, "auto", device)
    if found is not None:
        info = run_folder.read_info(found)
        geometry = Geometry.from_dict(info["geometry"])
        model = _empty_model(geometry, chosen.dtype, device)
        checkpoint.load(found, wrapped=[model])
        return Scorer(
            model,
            _tokenizer(found / "hf", rules or TokenRules.from_manifest(info["manifest"])),
            device,
            max_tokens=max_tokens,
            name=str(path),
        )
    folder = resolve_model(str(path), flag=flag)
    geometry, config = read_geometry(folder)
    if not geometry.has_reward_head:
        raise ValueError(
            f"{flag} {path}: not a reward model"
            f" ({', '.join(config.get('architectures') or ['?'])}), and not a run with a checkpoint"
        )
    model = _empty_model(geometry, chosen.dtype, device)
    load_hf(model, folder, geometry)
    if rules is None:
        recipe = folder / RECIPE
        reward_token = config.get("reward_token_id")
        if recipe.is_file():
            rules = TokenRules.from_manifest(json.loads(recipe.read_text(encoding="utf-8")))
        else:
            rules = TokenRules(reward_token="auto" if reward_token is None else str(reward_token))
    return Scorer(model, _tokenizer(folder, rules), device, max_tokens=max_tokens, name=str(path))


def _empty_model(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> RewardModel:
    config = transformer_config(geometry, dtype=dtype, on_cpu=device.type == "cpu")
    return RewardModel(config, geometry).to(device).eval()


def _tokenizer(folder: Path, rules: TokenRules) -> PairTokenizer | None:
    """None where the folder has no tokenizer: token ids can still be scored."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return PairTokenizer.load(
        folder,
        reward_token=rules.reward_token,
        chat_template=rules.chat_template,
        max_length=rules.max_length,
        overlong=rules.overlong,
    )


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
    ) -> None:
        self.model, self.tokenizer, self.device, self.max_tokens = (
            model,
            tokenizer,
            device,
            max_tokens,
        )
        self.name = name
        self._cost = CostModel.of(model.geometry)
        self._turn_end: str | None = None

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

        Text instead of messages is taken as the output of a chat template: no token is added but
        the reward token, and the white space that the template puts behind the end of a turn (a
        sampler stops before it). ValueError where there is nothing to score. ``max_length`` stands
        in for the training's limit of tokens.
        """
        if self.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer, so only token ids can be scored")
        if isinstance(conversation, str):
            return self._encode_text(conversation, notes, max_length)
        return self.tokenizer.encode_conversation(
            conversation, tools=tools, notes=notes, max_length=max_length
        )

    def _encode_text(self, text: str, notes: list[str] | None, max_length: int | None) -> list[int]:
        tokenizer = self.tokenizer
        end = self.turn_end
        if end != end.rstrip() and not text.endswith(end) and text.endswith(end.rstrip()):
            text += end[len(end.rstrip()) :]
        try:
            ids = list(tokenizer.tokenizer.encode(text, add_special_tokens=False))
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no text") from None
        if not ids:
            raise ValueError("no text")
        if ids[-1] != tokenizer.reward_token_id:
            ids.append(tokenizer.reward_token_id)
        limit = max_length or tokenizer.max_length
        if limit is not None and len(ids) > limit:
            if tokenizer.overlong in ("drop", "error"):
                raise ValueError(f"{Rejected('overlong', f'{len(ids)} tokens')}")
            ids = (
                ids[-limit:]
                if tokenizer.overlong == "left-prompt"
                else [*ids[: limit - 1], ids[-1]]
            )
            if notes is not None:
                notes.append("cut: beginning or end of the text left out")
        return ids

    @property
    def turn_end(self) -> str:
        """What the chat template puts behind the last answer: ``<|im_end|>`` and a new line, for
        example."""
        if self._turn_end is None:
            probe = [
                {"role": "user", "content": "question"},
                {"role": "assistant", "content": "answer"},
            ]
            try:
                text = self.tokenizer.tokenizer.apply_chat_template(
                    probe, chat_template=self.tokenizer.template, tokenize=False
                )
                self._turn_end = text.rpartition("answer")[2]
            except Exception:  # a template that refuses the probe: then nothing is known of its end
                self._turn_end = ""
        return self._turn_end

    # ---- tokens to rewards

    @torch.no_grad()
    def score_tokens(
        self,
        items: Sequence[Sequence[Sequence[int]]],
        progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Rewards of token sequences that end with the reward token; the sequences of an item may
        share a prefix, and equal ones are computed once: their rewards are the same number."""
        distinct = [_distinct(item) for item in items]
        parts = [part for own, _ in distinct for part in _parts(own, self.max_tokens)]
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
        self, comparisons: Iterable[Comparison], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Rewards of each comparison's responses, in the order of ``comparison.responses``."""
        items = [
            [self.encode([*c.prompt, *response], c.tools) for response in c.responses]
            for c in comparisons
        ]
        return self.score_tokens(items, progress)

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


def _distinct(sequences: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The sequences without repetitions, in order, and which of these each one is."""
    found: dict[bytes, tuple[int, Sequence[int]]] = {}
    which = [
        found.setdefault(np.asarray(s, dtype=np.int64).tobytes(), (len(found), s))[0]
        for s in sequences
    ]
    return [s for _, s in found.values()], which


def _parts(sequences: Sequence[Sequence[int]], capacity: int) -> Iterator[SimpleNamespace]:
    """The shared prefix of an item and the rest of each sequence; several times where they are too
    many for a pack."""
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    for array in arrays:
        if not len(array):
            raise ValueError("an empty token sequence has no reward")
    length = common_prefix_length(arrays) if len(arrays) > 1 else 0
    suffixes = [a[length:] for a in arrays]
    ends = np.cumsum([len(s) for s in suffixes])
    start = 0
    while start < len(suffixes):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + capacity - length, side="right")))
        yield SimpleNamespace(
            prefix=arrays[0][:length],
            suffixes=suffixes[start:end],
            graded=False,
            scores=[0.0] * (end - start),
            ends_item=end == len(suffixes),
        )
        start = end


def group_by_prefix(sequences: Sequence[np.ndarray], at_least: int = MIN_SHARED) -> list[list[int]]:
    """Numbers of the sequences (int32 arrays) in groups that share a beginning of ``at_least``
    tokens.

    Sequences are sorted, so that those with equal beginnings are neighbours; the sorted row is then
    cut where that saves most tokens: a group of m that shares p tokens saves p (m - 1). Groups are
    in the order of their first member.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
    shared = [
        common_prefix_length([sequences[a], sequences[b]])
        for a, b in zip(order, order[1:], strict=False)
    ]
    groups: list[list[int]] = []

    def best(first: int, end: int, depth: int) -> tuple[int, list[tuple[int, int]]]:
        """(tokens saved, ranges) of the best way to cut ``order[first:end]``."""
        if end - first == 1:
            return 0, [(first, end)]
        least = min(shared[first : end - 1])
        whole = least * (end - first - 1) if least >= at_least else 0
        if depth == MAX_DEPTH and whole:
            return whole, [(first, end)]
        cuts = [
            i + 1
            for i in range(first, end - 1)
            if shared[i] <= (least if depth < MAX_DEPTH else at_least)
        ]
        saved, ranges = 0, []
        for a, b in zip([first, *cuts], [*cuts, end], strict=True):
            more, parts = best(a, b, min(depth + 1, MAX_DEPTH))
            saved, ranges = saved + more, ranges + parts
        return (whole, [(first, end)]) if whole and whole >= saved else (saved, ranges)

    if sequences:
        groups = [sorted(order[a:b]) for a, b in best(0, len(order), 0)[1]]
    return sorted(groups, key=lambda group: group[0])


@contextlib.contextmanager
def scorer(path: str | Path, **kwargs: Any):
    """``load_scorer`` that leaves the process group again."""
    try:
        yield load_scorer(path, **kwargs)
    finally:
        distributed.finish()
