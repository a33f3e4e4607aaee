"""Tiny random backbones and comparisons for tests: Hugging Face folders made here, nothing
fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rmega.data.indexed import StoredComparison

VOCAB = 256
REWARD_TOKEN = 3


def tiny_llama(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    groups: int = 2,
    ffn: int = 96,
    seed: int = 0,
    reward_head: bool = True,
    family: str = "llama",
    vocab: int = VOCAB,
    **config,
) -> Path:
    """A random reward model (or causal model) as transformers itself writes it: a Llama, or the
    same shape of another family."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": hidden // heads}}
    c = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        pad_token_id=0,
        num_labels=1,
        rms_norm_eps=1e-5,
        **{"max_position_embeddings": 512, **own.get(family, {}), **config},
    )
    kind = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    model = kind.from_config(c)
    scatter_weights(model)
    model.save_pretrained(folder)
    return folder


def scatter_weights(model: torch.nn.Module) -> None:
    """Norm weights away from 1, biases away from 0 and projections large enough that every part of
    the model matters to the reward."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(
                    0, 0.8 / parameter.shape[1] ** 0.5 if "embed" not in name else 0.5
                )


def random_comparisons(count: int, *, seed: int = 0, longest: int = 40) -> list[StoredComparison]:
    """Comparisons of 2 to 4 responses with shared prefixes of 0 to ``longest`` tokens and suffixes
    of at least one."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        responses = 2 if i % 4 else int(rng.integers(2, 5))
        suffixes = []
        for _ in range(responses):
            suffix = rng.integers(4, VOCAB, int(rng.integers(1, longest)), dtype=np.int32)
            suffix[-1] = REWARD_TOKEN
            suffixes.append(suffix)
        prefix = rng.integers(
            4, VOCAB, int(rng.integers(0, longest)) if i % 7 else 0, dtype=np.int32
        )
        out.append(
            StoredComparison(
                prefix=prefix,
                suffixes=suffixes,
                graded=bool(i % 3),
                source="random",
                scores=np.arange(responses, 0, -1, dtype=np.float32),
            )
        )
    return out


def with_ties(comparisons: list[StoredComparison]) -> list[StoredComparison]:
    """The same, with equal scores: of the last two of three and more responses, and of every third
    pair of two."""
    for i, c in enumerate(comparisons):
        if len(c.scores) > 2 or i % 4 == 1:
            c.scores[-1] = c.scores[-2]
    return comparisons


class InMemory:
    """Comparisons with the accessors of a stored dataset."""

    def __init__(self, comparisons: list[StoredComparison]) -> None:
        self.comparisons = comparisons
        lengths, scores, documents = [], [], [0]
        for c in comparisons:
            lengths += [len(c.prefix), *(len(s) for s in c.suffixes)]
            scores += [float(c.graded), *c.scores]
            documents.append(len(lengths))
        self.sequence_lengths = np.array(lengths, dtype=np.int32)
        self.scores = np.array(scores, dtype=np.float32)
        self.document_indices = np.array(documents, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.comparisons)

    def get(self, index: int) -> StoredComparison:
        return self.comparisons[index]
