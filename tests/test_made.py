"""The made models, tokenizers and rows are what the tests need them to be."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import torch

from tests.made_rows import argilla, demo_rows, longer_is_worse, messages, ranked
from tests.made_tokenizers import INTERNLM2_ADDED, INTERNLM2_PIECES
from tests.reward_fixture import Reference, chat, make_reward_model


def texts() -> list[str]:
    return [
        *(row[side][0]["content"] for row in demo_rows() for side in ("chosen", "rejected")),
        "  Two  spaces, \t tabs\n\n lines; 国会由众议院 123 naïve 🙂 ▁ \x00",
    ]


def test_tokenizer_json_is_tokenizer_model(internlm2_tokenizer) -> None:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(internlm2_tokenizer)
    plain = sentencepiece.SentencePieceProcessor(
        model_file=str(internlm2_tokenizer / "tokenizer.model")
    )
    assert plain.vocab_size() == len(fast) == INTERNLM2_PIECES + len(INTERNLM2_ADDED)
    for text in texts():
        assert fast.encode(text, add_special_tokens=False) == plain.encode(text)
    assert plain.encode("[UNUSED_TOKEN_130]") == [len(fast) - 17]
    assert fast.convert_tokens_to_ids(["[UNUSED_TOKEN_130]", "<|im_start|>"]) == [
        len(fast) - 17,
        len(fast) - 1,
    ]


def test_the_hub_folder_has_no_tokenizer_json(internlm2_of_the_hub, internlm2_tokenizer) -> None:
    names = {path.name for path in internlm2_of_the_hub.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    same = [f / "tokenizer.model" for f in (internlm2_of_the_hub, internlm2_tokenizer)]
    assert same[0].read_bytes() == same[1].read_bytes()
    config = json.loads((internlm2_of_the_hub / "config.json").read_text())
    assert config["vocab_size"] == INTERNLM2_PIECES + len(INTERNLM2_ADDED) and config["auto_map"]


def test_rewards_differ_between_conversations(small_llama, tmp_path) -> None:
    reference = Reference(make_reward_model(small_llama, tmp_path / "model"))
    rewards = torch.tensor(
        [reference.reward(chat(f"Question {i}?", text)) for i, text in enumerate(texts()[:8])]
    )
    assert rewards.std() > 0.1 and len(set(rewards.tolist())) == 8


def test_rows_have_the_properties_of_real_ones() -> None:
    pairs, several = messages(300), messages(100, lang="zh")
    turns = [sum(m["role"] == "user" for m in row["prompt"]) for row in pairs]
    assert sum(t > 1 for t in turns) > 180 and min(turns) == 1
    assert any(row["prompt"][0]["role"] == "system" for row in pairs)
    lengths = [len(row["chosen"][0]["content"]) for row in pairs]
    assert max(lengths) > 8 * sorted(lengths)[len(lengths) // 4]
    assert any("\u4e00" <= c <= "\u9fff" for c in several[0]["chosen"][0]["content"])
    scores = [[r["score"] for r in row["responses"]] for row in ranked(80)]
    assert any(len(set(s)) < len(s) for s in scores) and any(len(set(s)) > 2 for s in scores)
    solutions = [{r["score"] for r in row["responses"]} for row in ranked(100, right_or_wrong=True)]
    assert {1} in solutions and {0, 1} in solutions
    assert all(len(row["chosen"][1]["content"]) > 400 for row in argilla(45))
    longer = [
        len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        for row in longer_is_worse(100)
    ]
    assert sum(longer) == 27


@pytest.mark.parametrize("maker", [messages, argilla, ranked, longer_is_worse])
def test_rows_are_the_same_every_time(maker) -> None:
    assert maker(5) == maker(7)[:5] == maker(5)
