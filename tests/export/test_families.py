"""A model folder laid out like Qwen3's, from text to a verified export: no begin-of-text token,
<|endoftext|> for padding, a template that writes thoughts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist import run_distributed
from tests.tiny import tiny_llama

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>")
ADDED = ("<|fim_pad|>", "<think>", "</think>")  # added tokens that are not special
THINKING = (
    "{%- for message in messages %}"
    "{%- if message.role in ('user', 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- else %}"
    "{%- set content, thought = message.content, '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def make_qwen_tokenizer(folder: Path) -> int:
    """Byte-level BPE trained on the demonstration set, special tokens last; its size, which is less
    than the model's, as in Qwen's folders."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.made_models import demo_lines

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(demo_lines(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(ADDED))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=THINKING,
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


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
    from rmega.export.verify import transformers_rewards
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
    (theirs,) = transformers_rewards(out, geometry, [ids], config["pad_token_id"]).tolist()
    for path in (run, out):
        with scorer(path) as ours:
            reward = ours.score_conversations([recipe["example"]["messages"]])[0]
            assert reward == pytest.approx(theirs, rel=1e-4)
