"""The InternLM2 reward model that an export carries along, against transformers' own Llama with the
same weights."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rmega.models import BACKBONES, hf_internlm2
from rmega.models.geometry import RopeScaling
from rmega.models.hf_internlm2.configuration_internlm2 import InternLM2Config
from rmega.models.hf_internlm2.modeling_internlm2 import InternLM2ForRewardModel
from tests.hf_fixtures import SCALED, hf_config, hf_tensors, tiny

CODE = Path(hf_internlm2.__file__).parent
SCALINGS = [RopeScaling(), *SCALED]


def config_of(scaling: RopeScaling, **fields) -> InternLM2Config:
    config = hf_config(tiny("internlm2", rope_scaling=scaling, rope_theta=3e4))
    return InternLM2Config(
        **{key: config[key] for key in config if key not in ("architectures", "model_type")},
        pad_token_id=0,
        reward_token_id=3,
        num_labels=1,
        **fields,
    )


def pair(
    scaling: RopeScaling = SCALINGS[0],
) -> tuple[InternLM2ForRewardModel, LlamaForSequenceClassification]:
    """The same random weights as InternLM2 here and as Llama in transformers."""
    geometry = tiny("internlm2", rope_scaling=scaling, rope_theta=3e4)
    tensors = hf_tensors(geometry, head=True)
    model = InternLM2ForRewardModel(config_of(scaling)).eval()
    model.load_state_dict(tensors)
    config = hf_config(tiny("llama", rope_scaling=scaling, rope_theta=3e4))
    llama = LlamaForSequenceClassification(
        LlamaConfig(
            **{
                key: value
                for key, value in config.items()
                if key not in ("architectures", "model_type")
            },
            num_labels=1,
            pad_token_id=0,
        )
    ).eval()
    theirs = {}
    for rule, other in zip(
        *(BACKBONES[family].weight_table(tiny(family)) for family in ("internlm2", "llama")),
        strict=True,
    ):
        whole = torch.cat([tensors[part.name][part.start : part.stop] for part in rule.parts])
        at = 0
        for part in other.parts:
            rows = whole[at : at + part.stop - part.start]
            theirs[part.name] = (
                torch.cat([theirs[part.name], rows]) if part.name in theirs else rows
            )
            at += len(rows)
    llama.load_state_dict(theirs)
    return model, llama


def batch(lengths: list[int], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 50, (n,), generator=generator) for n in lengths]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        place = slice(max(lengths) - len(row), None) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type)
def test_rewards_are_those_of_llama(scaling: RopeScaling) -> None:
    model, llama = pair(scaling)
    for length in (
        1,
        2,
        33,
        64,
        90,
    ):  # 90: beyond the model's 64 positions, where dynamic scaling acts
        tokens, _ = batch([length])
        torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type)
def test_padding_and_neighbours_change_nothing(scaling: RopeScaling) -> None:
    model, _ = pair(scaling)
    lengths = [5, 1, 80, 33, 64]
    right, left = (model(*batch(lengths, left)).logits for left in (False, True))
    tokens, mask = batch(lengths)
    alone = torch.cat([model(tokens[i : i + 1, :n]).logits for i, n in enumerate(lengths)])
    torch.testing.assert_close(right, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)
    tokens[mask == 0] = 7  # what stands in the padding does not matter
    torch.testing.assert_close(model(tokens, mask).logits, alone, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_with_left_padding() -> None:
    model, _ = pair()
    model(*batch([3, 9], left=True)).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_bf16_keeps_close() -> None:
    model, llama = pair()
    tokens, mask = batch([9, 30])
    exact = model(tokens, mask).logits
    ours = (model.bfloat16()(tokens, mask).logits - exact).abs().max()
    theirs = (llama.bfloat16()(tokens, mask).logits.float() - exact).abs().max()
    assert model(tokens, mask).logits.dtype == torch.float32
    assert ours <= 2 * theirs


class Words:
    """A tokenizer of words, with the two methods that are asked of one."""

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is False
        return " ".join(message["content"] for message in conversation)

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [int(word) for word in text.split()]


@torch.no_grad()
def test_scoring_conversations() -> None:
    model, _ = pair()
    chats = [
        [
            {"role": "user", "content": "5 6 7"},
            {"role": "assistant", "content": " ".join(["9"] * n)},
        ]
        for n in (4, 30, 1, 12, 2)
    ]
    scores = model.get_scores(Words(), chats, batch_size=2)
    for chat, score in zip(chats, scores, strict=True):
        ids = [*(int(w) for m in chat for w in m["content"].split()), 3]
        assert abs(model(torch.tensor([ids])).logits.item() - score) < 1e-5
        assert abs(model.get_score(Words(), chat) - score) < 1e-5
    order = model.rank(Words(), chats)
    assert [scores[i] for i in order] == sorted(scores, reverse=True)
    assert model.compare(Words(), chats[order[0]], chats[order[1]])
    # what the published class takes, and what RewardBench reads of it
    assert model.reward_token_id == 3
    best = (scores[order[0]], scores[order[1]])
    for given in ({}, {"return_dict": False}, {"batch_size": 2}):
        assert model.compare(
            Words(),
            conversation1=chats[order[0]],
            conversation2=chats[order[1]],
            return_logits=True,
            **given,
        ) == pytest.approx(best, abs=1e-5)
        ranked = model.rank(Words(), conversations=chats, return_logits=True, **given)
        assert ranked == pytest.approx(scores, abs=1e-5)
    model.reward_token_id = None  # a model that reads its reward at the end of the text
    ids = [int(w) for m in chats[0] for w in m["content"].split()]
    expected = model(torch.tensor([ids])).logits.item()
    assert model.get_score(Words(), chats[0]) == pytest.approx(expected, abs=1e-5)


def test_what_the_published_configuration_class_asks_of_rope_scaling() -> None:
    """Exactly two fields, ``type`` and a ``factor`` that is a float above 1, or null."""
    for scaling in SCALINGS[:3]:
        geometry = tiny("internlm2", rope_scaling=scaling)
        config = BACKBONES["internlm2"].export_config(
            geometry, {}, dtype="float32", reward_token_id=3, pad_token_id=0
        )
        written = config.get("rope_scaling")
        if scaling.rope_type == "default":
            assert written is None
            continue
        assert written == {"type": scaling.rope_type, "factor": scaling.factor}
        assert isinstance(written["factor"], float)
        assert BACKBONES["internlm2"].read_geometry(config).rope_scaling == scaling


def test_saved_again_and_read_again(tmp_path: Path) -> None:
    """By any release: what transformers writes of the configuration gives the same arithmetic."""
    for scaling in SCALINGS:
        model, _ = pair(scaling)
        model.save_pretrained(tmp_path)
        again = InternLM2ForRewardModel.from_pretrained(tmp_path).eval()
        tokens, mask = batch([5, 70])
        with torch.no_grad():
            assert torch.equal(again(tokens, mask).logits, model(tokens, mask).logits)
        assert BACKBONES["internlm2"].read_geometry(again.config.to_dict()).rope_scaling == scaling


def test_no_buffer_that_loading_could_spoil() -> None:
    model, _ = pair()
    assert list(model.buffers()) == []


@pytest.mark.parametrize("fields", [{"bias": True}, {"hidden_act": "gelu"}])
def test_what_it_cannot_honour(fields: dict) -> None:
    config = config_of(RopeScaling())
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=next(iter(fields))):
        InternLM2ForRewardModel(config)


def test_the_files_need_torch_and_transformers_only() -> None:
    for file in ("configuration_internlm2.py", "modeling_internlm2.py"):
        for node in ast.walk(ast.parse((CODE / file).read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] in ("torch", "transformers", "configuration_internlm2"), (
                    name
                )
