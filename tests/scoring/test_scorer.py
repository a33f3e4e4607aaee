"""Scoring: the training path's rewards, whatever the grouping, from an export or a checkpoint, on
one rank or more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rmega.preferences.comparison import Comparison
from rmega.scoring import scorer as scorer_module
from rmega.scoring.scorer import load_scorer, scorer
from tests.dist import run_distributed
from tests.tiny import random_comparisons, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reward_model(small_llama, tmp_path_factory) -> Path:
    """``small_llama`` with a random reward head, as transformers writes it, and its tokenizer."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(
        small_llama, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    target = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(target)
    for file in small_llama.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def items() -> list[list[np.ndarray]]:
    return [
        [np.concatenate([c.prefix, s]) for s in c.suffixes] for c in random_comparisons(40, seed=6)
    ]


def by_transformers(folder: Path, texts) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.tensor(
            [
                model(torch.as_tensor(np.asarray(t, dtype=np.int64))[None]).logits[0, 0]
                for t in texts
            ]
        )


def close(a, b) -> None:
    a, b = (torch.as_tensor(x, dtype=torch.float32).flatten() for x in (a, b))
    assert a.shape == b.shape and ((a - b).abs().max() / b.abs().max()).item() <= 1e-5


def flat(rewards) -> list[float]:
    return [r for own in rewards for r in own]


def test_equal_texts_are_computed_once(folder: Path, monkeypatch) -> None:
    """A product's rows may round differently in different places, so two passes would not give a
    tie."""
    computed, pack = [], scorer_module.pack
    monkeypatch.setattr(
        scorer_module,
        "pack",
        lambda group, **options: (
            computed.append(sum(len(c.suffixes) for c in group)),
            pack(group, **options),
        )[1],
    )
    a, b = items()[0][:2]
    with scorer(folder) as s:
        first, second = s.score_tokens([[a, b, list(a), a], [b]])
        assert sum(computed) == 3 and first[0] == first[2] == first[3] != first[1]
        close(first[1:2], second)


def test_against_transformers_in_any_grouping(folder: Path) -> None:
    texts = items()
    expected = by_transformers(folder, [t for own in texts for t in own])
    for capacity in (30, 8192):
        with scorer(folder, max_tokens=capacity) as s:
            done: list[int] = []
            close(flat(s.score_tokens(texts, done.append)), expected)
            close(
                flat(s.score_tokens([[t] for own in texts for t in own])), expected
            )  # nothing shared
            assert sum(done) == len(texts)
    with scorer(folder) as s:
        many = texts * 8  # more than are packed together
        close(flat(s.score_tokens(many)), expected.repeat(8))
        same = s.score_tokens([[texts[0][0], texts[0][0]]])[0]  # the same text twice
        assert same[0] == pytest.approx(float(expected[0]), rel=1e-5) and same[0] == same[1]
        assert s.score_tokens([]) == []
        with pytest.raises(ValueError, match="empty token sequence"):
            s.score_tokens([[[5, 3], []]])
        with pytest.raises(ValueError, match="no tokenizer"):
            s.score_conversations([[{"role": "user", "content": "x"}]])


def on_ranks(rank: int, world_size: int, folder: str, texts) -> list[list[float]]:
    return load_scorer(folder).score_tokens(texts)


def test_ranks_share_the_work(folder: Path) -> None:
    texts = [[t.tolist() for t in own] for own in items()[:5]]
    both = run_distributed(on_ranks, 2, str(folder), texts)
    assert both[0] == both[1]
    close(flat(both[0]), by_transformers(folder, [t for own in texts for t in own]))


QUESTION = {"role": "user", "content": "Tell me a story."}
ANSWERS = [
    {"role": "assistant", "content": text}
    for text in (
        "Once upon a time there was a cat.",
        "No.",
        "Once upon a time there was a dog who liked to run.",
    )
]


def test_conversations(reward_model: Path) -> None:
    """The same rewards one by one, together, as a comparison, and by transformers on the same
    ids."""
    with scorer(reward_model) as s:
        conversations = [[QUESTION, answer] for answer in ANSWERS] + [
            [{**QUESTION, "content": "Hi"}, ANSWERS[0]]
        ]
        together = s.score_conversations(conversations)
        close([s.score_conversations([c])[0] for c in conversations], together)
        comparison = Comparison(
            prompt=[QUESTION],
            responses=[[a] for a in ANSWERS],
            scores=[2.0, 1.0, 0.0],
            graded=False,
            source="",
        )
        close(s.score_comparisons([comparison])[0], together[:3])
        ids = [s.tokenizer.encode_conversation(c) for c in conversations]
    assert (
        len({len(i) for i in ids}) > 1 and len({i[-1] for i in ids}) == 1
    )  # all end with the reward token
    close(by_transformers(reward_model, ids), together)


@pytest.mark.parametrize(
    "device,dtype,chosen",
    [
        ("cuda", None, "auto"),
        ("cpu", None, "fp32"),
        ("cuda", "fp32", "fp32"),
        ("cpu", "auto", "auto"),
    ],
)
def test_bf16_on_a_gpu_unless_another_dtype_is_named(folder, monkeypatch, device, dtype, chosen):
    """By a stand-in: "auto" is bf16 on every GPU that has it."""

    class Chosen(Exception):
        pass

    def choose(name, matmul_precision, where):
        raise Chosen(name)

    monkeypatch.setattr(scorer_module.distributed, "initialize", lambda: torch.device(device))
    monkeypatch.setattr(scorer_module.precision, "choose_together", choose)
    with pytest.raises(Chosen, match=f"^{chosen}$"):
        load_scorer(folder, dtype=dtype)


def test_half_precision_keeps_the_order(folder: Path) -> None:
    texts = items()
    with scorer(folder) as s:
        exact = np.array(flat(s.score_tokens(texts)))
    with scorer(folder, dtype="bf16") as s:
        half = np.array(flat(s.score_tokens(texts)))
    assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()
    assert np.corrcoef(half, exact)[0, 1] > 0.995


def test_what_is_no_reward_model_is_refused(small_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="--model .*small_llama: not a reward model .*LlamaForCausalLM"
    ):
        load_scorer(small_llama)
    with pytest.raises(ValueError, match="no config.json"):
        load_scorer(tmp_path)
    with pytest.raises(ValueError, match="--judge ./nowhere: no such folder"):
        load_scorer("./nowhere", flag="--judge")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="config.json: model_type='bert' is not supported"):
        load_scorer(tmp_path)
    from rmega import distributed

    distributed.finish()
