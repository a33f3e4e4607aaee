"""Rewards and gradients against plain transformers, and every saving against doing without it.

Tolerances are those of the exactness table: fp32 1e-5 of the largest value, bf16 twice what
transformers itself loses.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.hf_fixtures import tiny, write_folder
from tests.tiny import VOCAB, InMemory, random_comparisons, tiny_llama

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def engine():
    from rmega import distributed

    torch.set_float32_matmul_precision("highest")
    distributed.initialize()
    yield
    distributed.finish()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
    assert difference <= tolerance, difference


def ours(folder: Path, *, dtype: torch.dtype = torch.float32, **switches):
    """Our model of a folder, with a normal head where it has none."""
    from rmega.models.hf import load_hf, read_geometry
    from rmega.models.reward_model import RewardModel, transformer_config

    geometry, _ = read_geometry(folder)
    model = RewardModel(transformer_config(geometry, dtype=dtype), geometry, **switches)
    load_hf(model, folder, geometry, head_init="normal", head_seed=3)
    return model


def theirs(folder: Path, dtype: torch.dtype = torch.float32):
    """The same by transformers alone: a callable (ids [B, T], mask [B, T]) -> rewards [B]."""
    from transformers import (
        CONFIG_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
    )

    from rmega.models.hf import init_head

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind not in (*CONFIG_MAPPING, "internlm2"):  # InternLM2's code lies in its folder
        pytest.skip(f"this transformers has no {kind}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if config.architectures[0].endswith("ForSequenceClassification"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    else:
        model = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    model.requires_grad_(True)
    if hasattr(model, "score") or hasattr(model, "v_head"):
        return model, lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits[:, 0]
    head = torch.nn.Parameter(torch.zeros(1, config.hidden_size))
    with torch.no_grad():
        init_head(head, "normal", None, 3)
    model.reward_head = torch.nn.Linear(1, 1, bias=False)
    model.reward_head.weight = head

    def rewards(ids, mask):
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return (hidden[torch.arange(len(ids)), mask.sum(1) - 1].to(head.dtype) @ head.T)[:, 0]

    return model, rewards


def llama_scaled(folder: Path) -> Path:
    return tiny_llama(
        folder,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )


def llama_tied(folder: Path) -> Path:
    return tiny_llama(folder, reward_head=False, tie_word_embeddings=True)


def llama_wide_heads(folder: Path) -> Path:
    """Heads whose width is not hidden / heads, three of them per group."""
    return tiny_llama(
        folder,
        hidden=72,
        heads=6,
        groups=2,
        head_dim=16,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )


def mistral(folder: Path) -> Path:
    """With heads that do not make the hidden size, as in Nemo."""
    return tiny_llama(folder, family="mistral", head_dim=12)


def qwen2(folder: Path) -> Path:
    return tiny_llama(folder, family="qwen2", rope_parameters={"rope_theta": 1e6})


def qwen2_tied(folder: Path) -> Path:
    return tiny_llama(folder, family="qwen2", reward_head=False, tie_word_embeddings=True)


def qwen3(folder: Path) -> Path:
    """Heads whose width is not hidden / heads, three of them per group."""
    return tiny_llama(folder, family="qwen3", heads=6, hidden=72, groups=2, head_dim=16)


def qwen3_tied(folder: Path) -> Path:
    return tiny_llama(folder, family="qwen3", reward_head=False, tie_word_embeddings=True)


def internlm3(folder: Path) -> Path:
    """As published: names of fields of its own, two groups, a head dimension, dynamic RoPE."""
    rope = {"rope_type": "dynamic", "rope_theta": 5e7, "factor": 6.0}
    tiny_llama(folder, head_dim=24, rope_parameters=rope, reward_head=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for old, new in (("attention_bias", "qkv_bias"), ("mlp_bias", "bias")):
        config[new] = config.pop(old)
    config |= {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"]}
    path.write_text(json.dumps(config))
    return folder


def internlm2(folder: Path) -> Path:
    """An InternLM2 reward model with the modeling file that an export carries."""
    from rmega.models import BACKBONES
    from rmega.models.weights import hf_shapes

    family = BACKBONES["internlm2"]

    geometry = tiny(
        "internlm2",
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        rope_theta=1e6,
    )
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in hf_shapes(family.weight_table(geometry)).items():
        values = torch.randn(shape, generator=generator)
        scale = 0.5 if "embeddings" in name else 0.8 / shape[-1] ** 0.5
        tensors[name] = 1 + 0.2 * values if len(shape) == 1 else scale * values
    config = family.export_config(geometry, {}, dtype="float32", reward_token_id=3, pad_token_id=0)
    assert config["architectures"] == [family.architecture]
    folder.mkdir(parents=True, exist_ok=True)
    for file in family.code:
        shutil.copy(file, folder)
    return write_folder(folder, config, tensors)


def internlm2_as_llama(folder: Path) -> Path:
    """The InternLM2 model above, rearranged into transformers' own Llama by the published layout of
    ``wqkv``."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForSequenceClassification

    source = load_file(internlm2(folder / "source") / "model.safetensors")
    groups, per_group, d, hidden = 2, 4, 8, 64
    renamed = {}
    names = {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "v_head": "score",
    }
    for name, value in source.items():
        if name.endswith("wqkv.weight"):
            rows = value.view(groups, per_group + 2, d, hidden)
            base = name.replace("attention.wqkv.weight", "self_attn.")
            renamed[base + "q_proj.weight"] = rows[:, :per_group].reshape(-1, hidden)
            renamed[base + "k_proj.weight"] = rows[:, per_group].reshape(-1, hidden)
            renamed[base + "v_proj.weight"] = rows[:, per_group + 1].reshape(-1, hidden)
        else:
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = value
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        num_labels=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = LlamaForSequenceClassification(config)
    model.load_state_dict({k: v.contiguous() for k, v in renamed.items()})
    model.save_pretrained(folder)
    return folder


MODELS = {
    "llama": tiny_llama,
    "llama_scaled": llama_scaled,
    "llama_tied": llama_tied,
    "llama_wide_heads": llama_wide_heads,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen2_tied": qwen2_tied,
    "qwen3": qwen3,
    "qwen3_tied": qwen3_tied,
    "internlm3": internlm3,
    "internlm2": internlm2,
    "internlm2_as_llama": internlm2_as_llama,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


def comparison(prefix, *suffixes, scores=None, graded=False):
    """By lengths (ids drawn from the lengths) or by ids."""
    rng = np.random.default_rng(
        [len(suffixes), *(np.size(x) if np.ndim(x) else x for x in (prefix, *suffixes))]
    )

    def ids(x):
        return (
            np.array(x, dtype=np.int32) if np.ndim(x) else rng.integers(4, VOCAB, x, dtype=np.int32)
        )

    return SimpleNamespace(
        prefix=ids(prefix),
        suffixes=[ids(s) for s in suffixes],
        graded=graded,
        scores=np.array(
            scores if scores is not None else range(len(suffixes), 0, -1), dtype=np.float32
        ),
    )


# Each shape that packing could get wrong.
EDGES = [
    comparison(11, 5, 9),
    comparison(7, 3, 8, 4),
    comparison(5, 2, 6, 3, 4, scores=[3, 2, 2, 1], graded=True),
    comparison(0, 6, 4),  # no common prefix
    comparison(20, [3], [9]),  # all but one token in common, one-token suffixes
    comparison(0, [5], [6]),  # texts of a single token
    comparison(1, 1, 30),
    comparison(90, 60, 45),
]


def sequences(comparisons) -> list[np.ndarray]:
    return [np.concatenate([c.prefix, s]) for c in comparisons for s in c.suffixes]


def padded(texts) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        mask[row, : len(text)] = 1
    return ids, mask


def loss_by_hand(rewards: torch.Tensor, comparisons) -> torch.Tensor:
    """Mean focal loss with log barrier over all pairs, as in the InternLM2 report, in the plainest
    torch."""
    first, terms = 0, []
    for c in comparisons:
        own = rewards[first : first + len(c.suffixes)]
        first += len(c.suffixes)
        for i, a in enumerate(c.scores):
            for j, b in enumerate(c.scores):
                if a > b:
                    d = own[i] - own[j]
                    focal = (1 - 2 * torch.relu(torch.sigmoid(d) - 0.5)) ** 2 * -F.logsigmoid(d)
                    barrier = sum(-torch.log(5 - s) - torch.log(s + 5) for s in (own[i], own[j]))
                    terms.append(focal + 0.01 * barrier)
    return torch.stack(terms).mean()


def our_gradients(model, folder: Path, comparisons, **switches):
    """(rewards, loss, gradients by global name) of one pack."""
    from rmega.config import LossArgs
    from rmega.data.packing import pack
    from rmega.training.loss import pair_loss

    batch = pack(comparisons, **switches)
    model.zero_grad()
    rewards = model(batch)
    total, count, _ = pair_loss(LossArgs(), batch, rewards)
    loss = total / count
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return rewards.detach(), loss.item(), grads


@pytest.mark.parametrize("name", MODELS)
def test_rewards_and_gradients_are_transformers(name: str, folders) -> None:
    from rmega.models import BACKBONES
    from rmega.models.hf import read_geometry

    folder = folders(name)
    reference, forward = theirs(folder)
    one_by_one = torch.cat([forward(*padded([text])) for text in sequences(EDGES)]).detach()
    rewards = forward(*padded(sequences(EDGES)))
    close(
        rewards.detach(), one_by_one
    )  # transformers agrees with itself, so what follows means something
    loss = loss_by_hand(rewards, EDGES)
    loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters()}

    got, our_loss, grads = our_gradients(ours(folder), folder, EDGES)
    close(got, one_by_one)
    assert got.abs().max() > 0.2 and got.std() > 0.1  # the comparison is not between zeros
    assert abs(our_loss - loss.item()) <= TOLERANCE * loss.item()

    geometry, _ = read_geometry(folder)
    backbone = BACKBONES[geometry.family]
    table = {rule.name: rule for rule in backbone.weight_table(geometry)}
    assert grads.keys() == table.keys()
    if "reward_head.weight" in expected:  # a bare backbone with our head beside it
        expected = {f"model.{n}": g for n, g in expected.items()}
        expected[backbone.names.head] = expected.pop("model.reward_head.weight")
    for ours_name, rule in table.items():
        close(grads[ours_name], torch.cat([expected[p.name][p.start : p.stop] for p in rule.parts]))
    assert expected.keys() == {part.name for rule in table.values() for part in rule.parts}


def test_tied_embeddings_and_an_odd_number_of_layers(small_llama: Path) -> None:
    check_long_texts(small_llama)


def test_a_pretrained_model(shared_dir: Path) -> None:
    check_long_texts(shared_dir / "models" / "stories260k")


def check_long_texts(folder: Path) -> None:
    """A language model of 512 tokens and positions, on texts as long as it allows."""
    from rmega.data.packing import pack

    texts = [
        comparison(3, 4, 6),
        comparison(100, 300, 411),
        comparison(0, 512, 512),
        comparison(511, [5], [9]),
    ]
    for c in texts:
        c.prefix, c.suffixes = c.prefix % 500 + 3, [s % 500 + 3 for s in c.suffixes]
    _, forward = theirs(folder)
    with torch.no_grad():
        expected = torch.cat([forward(*padded([text])) for text in sequences(texts)])
        close(ours(folder)(pack(texts)), expected)


@pytest.mark.parametrize("name", ["llama", "internlm2", "llama_scaled", "qwen2", "qwen3"])
def test_bf16_loses_at_most_twice_what_transformers_loses(name: str, folders) -> None:
    from rmega.data.packing import pack

    texts = random_comparisons(40, seed=9, longest=60)
    errors = {}
    with torch.no_grad():
        exact = theirs(folders(name))[1](*padded(sequences(texts)))
        _, forward = theirs(folders(name), torch.bfloat16)
        errors["transformers"] = forward(*padded(sequences(texts))).float() - exact
        for prune in (True, False):
            model = ours(folders(name), dtype=torch.bfloat16, prune_last_layer=prune)
            for share in (True, False):
                rewards = model(pack(texts, share_prefix=share))
                assert rewards.dtype == torch.float32
                errors[f"prune {prune}, share {share}"] = rewards - exact
    rms = {key: error.square().mean().sqrt().item() for key, error in errors.items()}
    plain = rms["prune False, share False"]
    assert all(error <= 2 * rms["transformers"] for error in rms.values()), rms
    assert rms["prune True, share True"] <= 1.1 * plain, rms  # the savings themselves lose nothing


@pytest.fixture(scope="module")
def alone(folders):
    return nothing_saved(folders("llama"))


def nothing_saved(folder: Path):
    """Rewards and gradients with nothing saved: one text per pass, every layer for every token."""
    from rmega.config import LossArgs
    from rmega.data.packing import pack
    from rmega.training.loss import pair_loss

    model = ours(folder, prune_last_layer=False)
    rewards = torch.cat(
        [
            model(
                pack(
                    [SimpleNamespace(prefix=text[:0], suffixes=[text], scores=[0.0], graded=False)]
                )
            )
            for text in sequences(EDGES)
        ]
    )
    batch = pack(EDGES)
    total, count, _ = pair_loss(LossArgs(), batch, rewards)
    (total / count).backward()
    return rewards.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_saving_is_exact(prune: bool, share: bool, multiple: int, folders, alone) -> None:
    model = ours(folders("llama"), prune_last_layer=prune)
    rewards, _, grads = our_gradients(
        model, folders("llama"), EDGES, share_prefix=share, multiple=multiple
    )
    close(rewards, alone[0])
    for name, grad in alone[1].items():
        close(grads[name], grad)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "internlm2"])
def test_every_saving_is_exact_in_each_family(name: str, folders) -> None:
    expected, expected_grads = nothing_saved(folders(name))
    for prune in (False, True):
        rewards, _, grads = our_gradients(
            ours(folders(name), prune_last_layer=prune), folders(name), EDGES
        )
        close(rewards, expected)
        for key, grad in expected_grads.items():
            close(grads[key], grad)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_either_implementation_of_the_operators(implementation: str, folders, alone) -> None:
    from rmega import ops

    ops.set_implementation(implementation)
    try:
        rewards, _, grads = our_gradients(ours(folders("llama")), folders("llama"), EDGES)
    finally:
        ops.set_implementation("auto")
    close(rewards, alone[0])
    for name, grad in alone[1].items():
        close(grads[name], grad)


def test_neighbours_do_not_matter(folders, alone) -> None:
    """The same comparison alone, last instead of first, and among others that are longer, has the
    same rewards."""
    from rmega.data.packing import pack

    model = ours(folders("llama"))
    firsts = np.cumsum([0, *(len(c.suffixes) for c in EDGES)])
    with torch.no_grad():
        backwards = model(pack(EDGES[::-1]))
        crowd = model(pack([*random_comparisons(30, seed=4), *EDGES]))[-int(firsts[-1]) :]
        close(crowd, alone[0])
        for i, c in enumerate(EDGES):
            expected = alone[0][firsts[i] : firsts[i + 1]]
            close(model(pack([c])), expected)
            end = len(backwards) - int(firsts[i])
            close(backwards[end - len(expected) : end], expected)
            swapped = SimpleNamespace(**{**vars(c), "suffixes": c.suffixes[::-1]})
            close(model(pack([swapped])).flip(0), expected)


def test_other_ids_in_neighbours_change_nothing_at_all(folders) -> None:
    """Stronger than a tolerance: whatever else is in the pack, these rewards are the same bits."""
    from rmega.data.packing import pack

    model = ours(folders("llama"))
    rng = np.random.default_rng(0)
    mine = comparison(9, 4, 7)
    seen = []
    for _ in range(3):
        noise = SimpleNamespace(
            prefix=rng.integers(4, VOCAB, 12, dtype=np.int32),
            scores=[1.0, 0.0],
            graded=False,
            suffixes=[rng.integers(4, VOCAB, k, dtype=np.int32) for k in (6, 8)],
        )
        with torch.no_grad():
            seen.append(model(pack([noise, mine, noise]))[2:4])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("capacity", [16, 100, 10**6])
def test_bins_do_not_matter(capacity: int, folders, alone) -> None:
    """Cut into any number of packs, also with comparisons that are longer than a bin, by the path
    of an evaluation."""
    from rmega.data.batching import Batcher
    from rmega.training.rewards import compute_rewards

    batcher = Batcher(InMemory(EDGES), global_batch_size=len(EDGES), max_tokens=capacity, seed=0)
    assert (len(batcher.plan(np.arange(len(EDGES)))[0]) > 1) == (capacity < 200)
    rewards = torch.from_numpy(
        compute_rewards([ours(folders("llama"))], batcher, torch.device("cpu"))
    )
    close(rewards, alone[0])


def test_a_head_of_zeros_needs_no_forward(folders, monkeypatch) -> None:
    """The evaluation before the first step knows its result; with any other head it is computed."""
    from rmega.data.batching import Batcher
    from rmega.training import train
    from rmega.training.rewards import compute_rewards

    calls: list[int] = []
    schedule = train.run_schedule
    monkeypatch.setattr(train, "run_schedule", lambda *a, **k: calls.append(1) or schedule(*a, **k))
    model, done = ours(folders("llama")), []
    batcher = Batcher(InMemory(EDGES), global_batch_size=2, max_tokens=100, seed=0)

    def rewards() -> np.ndarray:
        return compute_rewards([model], batcher, torch.device("cpu"), done.append)

    with torch.no_grad():
        computed = rewards()
        assert calls and computed.any()
        head = model.reward_head.weight.clone()
        model.reward_head.weight.zero_()
        calls.clear(), done.clear()
        known = rewards()
        assert not calls and done == [len(EDGES)]
        assert known.dtype == computed.dtype and known.shape == computed.shape and not known.any()
        model.reward_head.weight[0, -1] = head[0, -1]
        assert rewards().any() and calls


def test_heads_that_do_not_divide_name_the_flag() -> None:
    from rmega.config import ParallelArgs
    from rmega.models.reward_model import transformer_config

    tp2 = ParallelArgs(tensor_model_parallel_size=2)
    padded = ParallelArgs(tensor_model_parallel_size=2, pad_attention_heads=True)
    pp2 = ParallelArgs(pipeline_model_parallel_size=2)
    uneven = ParallelArgs(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=3)
    geometry = tiny(
        "llama", num_attention_heads=6, num_query_groups=3, head_dim=8, hidden_size=48, num_layers=5
    )
    with pytest.raises(
        ValueError, match="--tp 2 .*3 key/value heads .*--pad-attention-heads adds 1 group of"
    ):
        transformer_config(geometry, tp2)
    assert transformer_config(geometry, padded).num_query_groups == 4
    with pytest.raises(
        ValueError, match="--pp 2 does not divide the model's 5 layers.*--num-layers-in-first"
    ):
        transformer_config(geometry, pp2)
    assert transformer_config(geometry, uneven).num_layers == 5
    with pytest.raises(ValueError, match="--tp 9 does not divide the model's MLP width 48"):
        transformer_config(
            tiny("llama", num_query_groups=9, num_attention_heads=9, ffn_hidden_size=48),
            ParallelArgs(tensor_model_parallel_size=9),
        )


@pytest.mark.parametrize("prune", [True, False])
def test_fp8_covers_every_layer_but_a_pruned_one(tmp_path, monkeypatch, prune):
    """What is asked of Transformer Engine, which is not needed for that; and packs in whole blocks
    give the same."""
    from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer
    from megatron.core.transformer import transformer_block

    from rmega.cli import parse_args
    from rmega.config import TrainingConfig
    from rmega.data.packing import pack
    from rmega.models.hf import load_hf, read_geometry
    from rmega.models.reward_model import RewardModel
    from rmega.training.components import build_model, transformer_layout

    folder = tiny_llama(tmp_path, layers=3)
    geometry, _ = read_geometry(folder)
    flags = [
        "--hf-model",
        str(folder),
        "--data-path",
        "d",
        "--train-steps",
        "1",
        "--fp8-format",
        "hybrid",
        *([] if prune else ["--no-prune-last-layer"]),
    ]
    config = parse_args(TrainingConfig, flags)
    core = transformer_layout(config, geometry, on_cpu=True)
    assert (core.fp8, core.fp8_recipe) == ("hybrid", "tensorwise")
    asked = []
    monkeypatch.setattr(
        transformer_block,
        "get_fp8_context",
        lambda core, layer, is_init=False: (
            asked.append(None if is_first_last_bf16_layer(core, layer) else layer)
            or contextlib.nullcontext()
        ),
    )
    model = RewardModel(core, geometry, prune_last_layer=prune)
    asked.clear()  # of the layers' making
    load_hf(model, folder, geometry, head_init="normal", head_seed=3)
    comparisons = random_comparisons(5, seed=4)
    multiple = config.token_multiple
    assert multiple == get_fp8_align_size(core.fp8_recipe)
    whole, plain = pack(comparisons, multiple=multiple), pack(comparisons)
    assert plain.num_tokens % multiple and not whole.num_tokens % multiple
    close(model(whole), ours(folder, prune_last_layer=prune)(plain))
    assert asked == ([0, 1, None] if prune else [0, 1, 2])
    with pytest.raises(
        ValueError, match="--fp8-format hybrid: Transformer Engine is not installed"
    ):
        build_model(config, geometry, dtype=torch.bfloat16, device=torch.device("cpu"))
