"""Reward models of other programs (TRL, Skywork, RLHFlow): what plain transformers gives for the
templated text comes out of scoring, evaluation and training, in the layout of each family.

They have no reward token and are read at the last token that is not ``pad_token_id``. The traps of
published ones: a vocabulary made odd by an added pad token; a pad token that ends every turn, so
that the reward is read before it; no pad token at all; ``id2label`` of one label.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rmega.scoring.scorer import scorer
from tests.dist import run_distributed
from tests.made_models import make_family
from tests.reward_fixture import chat

PADDED_BY = {
    # name: (family, id or text of the pad token in config.json, further rows of the embedding)
    "Skywork on Llama 3.1": ("llama", "added", 0),
    "TRL on Llama 3.1": ("llama", "<|eot_id|>", 0),
    "RLHFlow on Mistral": ("mistral", "added", 0),
    "TRL on Mistral": ("mistral", "</s>", 0),
    "Mistral without a pad token": ("mistral", None, 0),
    "TRL on Qwen2.5": ("qwen2", "<|endoftext|>", 4),
    "TRL on Qwen3, padded by the end of a turn": ("qwen3", "<|im_end|>", 1),
    "Skywork on Qwen3": ("qwen3", "<|endoftext|>", 0),
}
CONVERSATIONS = [
    chat("What is a cat?", "An animal.\n"),
    chat("  Sum 1, 2 and 3.\n", "6"),
    chat("Who? 你好", "Nobody, nowhere. ") + chat("Why?", "Because."),
]


def make_foreign(folder: Path, name: str) -> Path:
    """A reward model as its program publishes it; the added pad token makes the vocabulary odd."""
    from transformers import AutoTokenizer

    family, pad, more = PADDED_BY[name]
    make_family(family, folder, reward_model=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if pad == "added":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)
    pad_id = None if pad is None else tokenizer.convert_tokens_to_ids(tokenizer.pad_token or pad)
    if pad in tokenizer.get_vocab():
        pad_id = tokenizer.get_vocab()[pad]
    vocab = (len(tokenizer) + more) // 2 * 2 + 1
    weights = folder / "weights"
    make_family(family, weights, reward_model=True, vocab=vocab, pad_token_id=pad_id)
    for file in ("config.json", "model.safetensors"):
        (weights / file).replace(folder / file)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] % 2
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = make_foreign(tmp_path_factory.mktemp("foreign") / "model", name)
        return made[name]

    return of


@torch.no_grad()
def published(folder: Path, conversations, template: str | None = None) -> list[float]:
    """As model cards show it: the template, AutoModelForSequenceClassification, the only logit."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    rewards = []
    for conversation in conversations:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=template)
        ids = tokenizer.encode(text, add_special_tokens=False)
        rewards.append(model(torch.tensor([ids])).logits[0, 0].item())
    return rewards


def close(rewards: list[float], expected: list[float]) -> None:
    assert rewards == pytest.approx(expected, abs=1e-5 * max(map(abs, expected)))


@pytest.mark.parametrize("name", PADDED_BY)
def test_what_was_published_comes_out(name: str, foreign, tmp_path: Path) -> None:
    """Messages, rendered text, comparisons of an evaluation, one by one and together."""
    from rmega.commands.evaluate import EvaluateArgs, main

    folder = foreign(name)
    with scorer(folder) as s:
        tokenizer = s.tokenizer
        expected = published(folder, CONVERSATIONS, tokenizer.template)  # its date is frozen
        assert len({round(r, 4) for r in expected}) == len(expected)
        assert tokenizer.reward_token_id is None
        close(s.score_conversations(CONVERSATIONS), expected)
        texts = [
            tokenizer.tokenizer.apply_chat_template(
                conversation, tokenize=False, chat_template=tokenizer.template
            )
            for conversation in CONVERSATIONS
        ]
        for variant in (texts, [text.rstrip() for text in texts]):
            close(s.score_conversations(variant), expected)
        ids = tokenizer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        close(s.score_sequences([s.complete(i) for i in ids]), expected)
    other = [[*c[:-1], {**c[-1], "content": "No."}] for c in CONVERSATIONS]
    rows = [{"chosen": a, "rejected": b} for a, b in zip(CONVERSATIONS, other, strict=True)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = tmp_path / "scores"
    main(EvaluateArgs(model=str(folder), data=[str(source)], probes=0, save_scores=str(scores)))
    lines = (scores / "pairs.scores.jsonl").read_text().splitlines()
    close([json.loads(line)["scores"][0] for line in lines], expected)


@pytest.mark.parametrize("name", ["Skywork on Llama 3.1", "TRL on Mistral"])
def test_a_training_begins_with_the_head_and_its_reading(name: str, foreign, tmp_path) -> None:
    """On two tensor ranks, which an odd vocabulary does not divide; with steps that change nothing
    the export gives what was published, to plain transformers and through its recipe."""
    from rmega.export.convert import convert
    from rmega.export.destination import RECIPE, UNVERIFIED
    from tests.runs import flags, make_data, train

    folder = foreign(name)
    data = make_data(folder, tmp_path, count=24)
    run, out = tmp_path / "run", tmp_path / "out"
    argv = flags(
        folder, data, run, steps=1, tp=2, sp=True, lr=1e-12, num_verification_comparisons=16
    )
    assert run_distributed(train, 2, argv) == [0, 0]
    with safe_open(folder / "model.safetensors", "pt") as file:
        head = file.get_tensor("score.weight")
    assert convert(run=run, output=out) == 0 and not (out / UNVERIFIED).exists()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("score.weight"), head, atol=1e-9)

    with scorer(folder) as s:
        template = s.tokenizer.template
    expected = published(folder, CONVERSATIONS, template)
    close(published(out, CONVERSATIONS), expected)
    for path in (run, out):
        with scorer(path) as s:
            close(s.score_conversations(CONVERSATIONS), expected)
    recipe = json.loads((out / RECIPE).read_text())
    config = json.loads((out / "config.json").read_text())
    assert recipe["reward_token_id"] is None
    assert recipe["pad_token_id"] == config["pad_token_id"]
    assert recipe["template_ends_with_pad_token"] == (name == "TRL on Mistral")
    assert recipe["example"]["token_ids"][-1] != recipe["pad_token_id"]


def test_the_code_of_a_card_leaves_out_the_pad_token_at_the_end() -> None:
    from rmega.export.usage import client_duties, usage

    recipe = {
        "reward_token_id": None,
        "template_ends_with_pad_token": True,
        "pad_token_id": 2,
        "pad_token": "</s>",
        "architecture": "MistralForSequenceClassification",
        "dtype": "bfloat16",
        "max_model_len": 512,
    }
    for title, _, code in usage(recipe, "out"):
        assert "while ids[-1] == 2:\n    ids.pop()" in code, title
    assert any("Leave out the pad token, id 2 (</s>)" in duty for duty in client_duties(recipe))
