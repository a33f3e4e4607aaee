"""A model folder laid out like Qwen3's, from text to a verified export: no begin-of-text token,
<|endoftext|> for padding, a template that writes thoughts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist import run_distributed
from tests.made_tokenizers import make_qwen_tokenizer
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """A causal model whose vocabulary is odd and larger than its tokenizer's."""
    folder = tmp_path_factory.mktemp("qwen") / "qwen3"
    size = make_qwen_tokenizer(folder)
    return tiny_llama(
        folder,
        family="qwen3",
        reward_head=False,
        layers=3,
        head_dim=24,
        tie_word_embeddings=True,
        vocab=(size + 8) // 2 * 2 + 1,
    )


def test_reward_token_and_pad_of_a_qwen_tokenizer(qwen3: Path) -> None:
    """The reward token is none that the template writes, and never the pad token."""
    from rmega.preferences.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.load(qwen3)
    ids = tokenizer.tokenizer.convert_tokens_to_ids
    chat = [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded = list(tokenizer.encode_conversation(chat))
    reward = tokenizer.reward_token_id
    assert encoded[0] == ids("<|im_start|>")  # no begin-of-text token
    assert encoded[-1] == reward and reward not in encoded[:-1]
    text = tokenizer.tokenizer.convert_ids_to_tokens(reward)
    assert text not in tokenizer.template and tokenizer.pad_token_id != reward
    own = tokenizer.tokenizer.apply_chat_template(chat, tokenize=False)
    assert encoded[:-1] == tokenizer.tokenizer.encode(own, add_special_tokens=False)
    assert encoded.count(ids("<think>")) == 1  # an empty thought in the last turn


def test_a_qwen3_folder_from_text_to_a_verified_export(qwen3: Path, tmp_path: Path) -> None:
    """Preprocess, train on two tensor ranks, export, score: every door gives one reward."""
    from rmega.export.convert import convert
    from rmega.export.destination import RECIPE, UNVERIFIED
    from rmega.export.rewards import transformers_rewards
    from rmega.models.hf import read_geometry
    from rmega.scoring.scorer import scorer
    from tests.runs import flags, make_data, train

    data = make_data(qwen3, tmp_path, count=24)
    run, out = tmp_path / "run", tmp_path / "out"
    argv = flags(qwen3, data, run, steps=2, tp=2, sp=True, num_verification_comparisons=16)
    assert run_distributed(train, 2, argv) == [0, 0]
    assert convert(run=run, output=out) == 0 and not (out / UNVERIFIED).exists()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    recipe = json.loads((out / RECIPE).read_text())
    assert recipe["verification"]["training_difference"] <= 1e-5  # two tensor ranks against one
    assert recipe["pad_token_id"] == config["pad_token_id"] != recipe["reward_token_id"]
    assert recipe["pad_token_id"] not in recipe["example"]["token_ids"]

    ids = recipe["example"]["token_ids"]
    geometry, _ = read_geometry(out)
    ((theirs,), _) = transformers_rewards(out, geometry, [ids], config["pad_token_id"]).tolist()
    for path in (run, out):
        with scorer(path) as ours:
            reward = ours.score_conversations([recipe["example"]["messages"]])[0]
            assert reward == pytest.approx(theirs, rel=1e-4)
