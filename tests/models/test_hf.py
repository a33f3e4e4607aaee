"""Reading model folders: every tensor, in every slice, against the files and against plain
transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rmega.hub import resolve_model
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry, RopeScaling
from rmega.models.hf import load_hf, read_geometry
from rmega.models.weights import hf_shapes
from tests.hf_fixtures import FAMILIES, SCALED, Stage, hf_config, hf_tensors, tiny, write_folder


def load(folder: Path, geometry: Geometry, **layout: int) -> tuple[dict[str, torch.Tensor], str]:
    stage = Stage(geometry, **layout)
    size = {key: value for key, value in layout.items() if key.startswith("tp_")} or {
        "tp_rank": 0,
        "tp_size": 1,
    }
    origin = load_hf(stage, folder, geometry, **size)
    return {name: parameter.detach() for name, parameter in stage.names.items()}, origin


def rewards_of(weights: dict[str, torch.Tensor], g: Geometry, ids: torch.Tensor) -> torch.Tensor:
    """Global rmega tensors -> reward at the last of ``ids`` [t]: the model written out in plain
    torch."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + g.norm_eps).rsqrt() * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [t, heads, d]
        frequency = g.rope_theta ** (-torch.arange(0, g.head_dim, 2) / g.head_dim)
        angle = (torch.arange(len(x))[:, None] * frequency)[:, None]
        low, high = x.chunk(2, -1)
        return torch.cat(
            [low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1
        )

    t, r = len(ids), g.num_attention_heads // g.num_query_groups
    x = weights["embedding.word_embeddings.weight"][ids]
    for i in range(g.num_layers):
        w = {
            key.split(".", 3)[3]: value
            for key, value in weights.items()
            if key.startswith(f"decoder.layers.{i}.")
        }
        qkv = norm(x, w["input_layernorm.weight"]) @ w["self_attention.linear_qkv.weight"].T
        if g.qkv_bias:
            qkv = qkv + w["self_attention.linear_qkv.bias"]
        qkv = qkv.view(t, g.num_query_groups, r + 2, g.head_dim)
        q, k = qkv[:, :, :r].reshape(t, -1, g.head_dim), qkv[:, :, r]
        if g.qk_norm:
            q = norm(q, w["self_attention.q_layernorm.weight"])
            k = norm(k, w["self_attention.k_layernorm.weight"])
        q, k = rotate(q), rotate(k).repeat_interleave(r, 1)
        v = qkv[:, :, r + 1].repeat_interleave(r, 1)
        scores = torch.einsum("qad,kad->aqk", q, k) / g.head_dim**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("aqk,kad->qad", scores.softmax(-1), v).reshape(t, -1)
        x = x + mixed @ w["self_attention.linear_proj.weight"].T
        gate, up = (norm(x, w["pre_mlp_layernorm.weight"]) @ w["mlp.linear_fc1.weight"].T).chunk(
            2, -1
        )
        x = x + (F.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T
    return norm(x[-1], weights["decoder.final_layernorm.weight"]) @ weights["reward_head.weight"][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", (1, 3))
def test_slices_of_all_ranks_make_the_whole(tmp_path: Path, family: str, shards: int) -> None:
    geometry = tiny(family)
    folder = write_folder(tmp_path / "m", hf_config(geometry), hf_tensors(geometry), shards)
    whole, origin = load(folder, geometry)
    assert origin == "new head (zero)" and not any(value.isnan().any() for value in whole.values())
    assert whole["reward_head.weight"].abs().max() == 0
    ranks = [load(folder, geometry, tp_rank=rank, tp_size=2)[0] for rank in range(2)]
    for rule in BACKBONES[family].weight_table(geometry):
        shares = [rank[rule.name] for rank in ranks]
        if rule.shard_dim is None:
            assert torch.equal(shares[0], whole[rule.name]) and torch.equal(
                shares[1], whole[rule.name]
            )
        elif rule.shard_blocks == 2:
            blocks = [share.chunk(2)[b] for b in range(2) for share in shares]
            assert torch.equal(torch.cat(blocks), whole[rule.name]), rule.name
        else:
            assert torch.equal(torch.cat(shares, rule.shard_dim), whole[rule.name]), rule.name
    first, last = (
        load(folder, geometry, layers=layers)[0] for layers in (range(0, 1), range(1, 3))
    )
    joined = first | {
        n.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1."): v
        for n, v in last.items()
        if "layers.1." in n or not n.startswith("decoder.layers.")
    }
    joined |= {n.replace("layers.0.", "layers.1."): v for n, v in last.items() if "layers.0." in n}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_backwards_gives_every_tensor_back(tmp_path: Path, family: str) -> None:
    geometry = tiny(family)
    tensors = hf_tensors(geometry, head=True, dtype=torch.bfloat16)
    architecture = BACKBONES[family].architecture
    folder = write_folder(
        tmp_path / "m", hf_config(geometry, architecture, id2label={"0": "r"}), tensors
    )
    geometry, _ = read_geometry(folder)
    weights, origin = load(folder, geometry)
    assert origin == "head from model.safetensors"
    table = BACKBONES[family].weight_table(geometry)
    back = {name: torch.full(shape, float("nan")) for name, shape in hf_shapes(table).items()}
    for rule in table:
        at = 0
        for part in rule.parts:
            back[part.name][part.start : part.stop] = weights[rule.name][
                at : at + part.stop - part.start
            ]
            at += part.stop - part.start
        assert at == rule.shape[0]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].bfloat16(), tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not BACKBONES[name].code])
def test_rewards_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    geometry = tiny(family)
    config = hf_config(
        geometry, BACKBONES[family].architecture, id2label={"0": "r"}, pad_token_id=0
    )
    folder = write_folder(tmp_path / "m", config, hf_tensors(geometry, head=True))
    weights, _ = load(folder, read_geometry(folder)[0])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.randint(3, geometry.vocab_size, (11,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0, 0]
    torch.testing.assert_close(rewards_of(weights, geometry, ids), expected, rtol=1e-5, atol=1e-6)


def test_hidden_state_of_a_causal_model(small_llama: Path) -> None:
    from transformers import LlamaModel

    geometry, _ = read_geometry(small_llama)
    weights, origin = load(small_llama, geometry)
    assert origin == "new head (zero)"
    weights["reward_head.weight"] = torch.randn(
        1, geometry.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.arange(5, 60, 3)
    with torch.no_grad():
        hidden = LlamaModel.from_pretrained(small_llama).eval()(ids[None]).last_hidden_state[0, -1]
    expected = weights["reward_head.weight"][0] @ hidden
    torch.testing.assert_close(rewards_of(weights, geometry, ids), expected, rtol=1e-5, atol=1e-5)


def test_dtype_padding_bare_names_and_bin(tmp_path: Path) -> None:
    geometry = tiny("internlm2", vocab_size=51, tie_word_embeddings=True)
    tensors = hf_tensors(geometry)
    write_folder(tmp_path / "a", hf_config(geometry), tensors)
    parts = [
        load(tmp_path / "a", geometry, tp_rank=rank, tp_size=2, vocab=28)[0] for rank in range(2)
    ]
    table = torch.cat([part["embedding.word_embeddings.weight"] for part in parts])
    assert (
        torch.equal(table[:51], tensors["model.tok_embeddings.weight"])
        and table[51:].abs().max() == 0
    )
    half, _ = load(tmp_path / "a", geometry, dtype=torch.bfloat16)
    assert torch.equal(
        half["decoder.final_layernorm.weight"], tensors["model.norm.weight"].bfloat16()
    )
    # a bare backbone, in .bin, whose tied embedding is kept under the name of the output matrix
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    bare["output.weight"] = bare.pop("tok_embeddings.weight")
    folder = write_folder(
        tmp_path / "b", hf_config(geometry, "InternLM2Model"), {"x": torch.zeros(1)}
    )
    (folder / "model.safetensors").unlink()
    torch.save(bare, folder / "pytorch_model.bin")
    assert all(
        torch.equal(value, load(folder, geometry)[0][name])
        for name, value in load(tmp_path / "a", geometry)[0].items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_groups_of_heads_are_zero(tmp_path: Path, family: str) -> None:
    """2 groups over 4 ranks, padded to 4: two ranks hold a group each, two hold zeros."""
    geometry = tiny(family)
    folder = write_folder(tmp_path / "m", hf_config(geometry), hf_tensors(geometry))
    whole, _ = load(folder, geometry)
    qkv, proj = (
        f"decoder.layers.1.self_attention.linear_{kind}.weight" for kind in ("qkv", "proj")
    )
    ranks = []
    for rank in range(4):
        stage = Stage(geometry, tp_rank=rank, tp_size=4, vocab=13)
        for name in list(stage.names):
            if "linear_qkv.bias" in name:
                stage.names[name] = torch.nn.Parameter(torch.full((32,), float("nan")))
            if "linear_qkv.weight" in name:
                stage.names[name] = torch.nn.Parameter(torch.full((32, 32), float("nan")))
            if "linear_proj" in name:
                stage.names[name] = torch.nn.Parameter(torch.full((32, 16), float("nan")))
        load_hf(stage, folder, geometry, tp_rank=rank, tp_size=4)
        ranks.append(stage.names)
    for name in (qkv, qkv.replace("weight", "bias")):
        if name in whole:
            padded = torch.cat([rank[name] for rank in ranks])
            assert torch.equal(padded[:64], whole[name]) and padded[64:].abs().max() == 0
    padded = torch.cat([rank[proj] for rank in ranks], 1)
    assert torch.equal(padded[:, :32], whole[proj]) and padded[:, 32:].abs().max() == 0


def test_head_start(tmp_path: Path) -> None:
    geometry = tiny("llama")
    folder = write_folder(tmp_path / "m", hf_config(geometry), hf_tensors(geometry))
    heads = []
    for rank in range(2):
        stage = Stage(geometry, tp_rank=rank, tp_size=2)
        assert (
            load_hf(stage, folder, geometry, tp_rank=rank, tp_size=2, head_init="normal")
            == "new head (normal)"
        )
        heads.append(stage.names["reward_head.weight"].detach())
    assert torch.equal(*heads) and 0.05 < heads[0].std() < 0.4


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("internlm2", {"bias": True}, "bias=True"),
        ("internlm2", {"bias": None}, "^$"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "needs a positive factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
            "does not agree",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
        (
            "llama",
            {"architectures": ["LlamaForTokenClassification"]},
            "LlamaForTokenClassification",
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "2 labels",
        ),
        ("llama", {"num_key_value_heads": 3}, "does not divide"),
        ("llama", {"model_type": "gemma2"}, "only internlm2, internlm3, llama, mistral, qwen2"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: biases"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: dropout is not supported"),
        ("internlm2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("internlm2", {"head_dim": 16}, "head_dim=16: InternLM2ForRewardModel has hidden_size /"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True: biases"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supp"),
        ("qwen2", {"use_sliding_window": True}, "sliding_window=16: .* shorter than max_pos.*=64"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ("mistral", {"sliding_window": 63}, "sliding_window=63: .* set to null"),
        ("mistral", {"sliding_window": "x"}, "sliding_window='x': a whole number or null"),
        ("mistral", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not one of"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias=True: biases"),
        ("internlm3", {"bias": True}, "bias=True: biases"),
        ("llama", {"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, family: str, change: dict, message: str
) -> None:
    config = hf_config(tiny("llama" if family == "internlm3" else family))
    config |= {"model_type": family} | change
    if change == {"bias": None}:
        del config["bias"]
        message = "missing field means True"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        read_geometry(tmp_path)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"attention_dropout": None, "attention_bias": None}),
        ("llama", {"sliding_window": 8}),  # which its class does not read
        ("mistral", {"sliding_window": 64}),  # acts on no text of at most 64 tokens
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),  # from the fourth on
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}),
        ("qwen3", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}),
    ],
)
def test_fields_that_change_nothing_are_accepted(family: str, change: dict) -> None:
    assert BACKBONES[family].read_geometry(hf_config(tiny(family)) | change) == tiny(family)


def test_a_missing_field_is_the_default_of_its_class(tmp_path: Path) -> None:
    """Read from the configuration classes of transformers, so that a new release is noticed."""
    from transformers import AutoConfig

    needed = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
    needed = {**dict.fromkeys(needed, 64), "hidden_size": 256}
    for family, page in BACKBONES.items():
        if page.code:
            continue
        theirs = AutoConfig.for_model(family)
        for field, value in page.defaults.items():
            # a window that is switched off reads as None
            assert getattr(theirs, field) in (value, None), (family, field)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **needed}))
        if family == "mistral":
            with pytest.raises(ValueError, match="sliding_window=4096.*missing field means 4096"):
                read_geometry(tmp_path)
            needed = {**needed, "sliding_window": None}
            (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **needed}))
        geometry, _ = read_geometry(tmp_path)
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert geometry.num_query_groups == theirs.num_key_value_heads, family
        assert geometry.head_dim == getattr(theirs, "head_dim", 4), family
        assert geometry.max_position_embeddings == theirs.max_position_embeddings, family
        assert geometry.rope_theta == theirs.rope_parameters["rope_theta"], family
        assert geometry.tie_word_embeddings == theirs.tie_word_embeddings, family


def test_internlm3_is_a_llama(tmp_path: Path) -> None:
    """As published: another name, names of fields of its own, a head dimension, dynamic RoPE."""
    geometry = tiny(
        "llama",
        num_query_groups=1,
        head_dim=16,
        rope_theta=5e7,
        rope_scaling=RopeScaling(rope_type="dynamic", factor=6.0),
    )
    config = hf_config(geometry, "InternLM3ForCausalLM", model_type="internlm3")
    config |= {"qkv_bias": False, "bias": False, "auto_map": {"AutoModel": "modeling.X"}}
    folder = write_folder(tmp_path / "m", config, hf_tensors(geometry))
    assert read_geometry(folder)[0] == geometry
    assert load(folder, geometry)[1] == "new head (zero)"
    assert BACKBONES["internlm3"].trained_as == "llama"


@pytest.mark.parametrize("scaling", SCALED)
def test_rope_scaling_is_read_in_both_forms(tmp_path: Path, scaling: RopeScaling) -> None:
    geometry = tiny("llama", rope_theta=5e5, rope_scaling=scaling)
    old = hf_config(geometry)
    assert BACKBONES["llama"].read_geometry(old) == geometry
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    kind = {"rope_type": scaling.rope_type, "rope_theta": 5e5}
    new["rope_parameters"] = {
        key: value for key, value in old["rope_scaling"].items() if key != "type"
    } | kind
    assert BACKBONES["llama"].read_geometry(new) == geometry
    assert BACKBONES["llama"].read_geometry(old | new) == geometry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            "q_proj.bias.*biases",
        ),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.zeros(32)}),
            "layers.3.*not part",
        ),
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "up_proj.weight not found"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"shape \(31,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "quantized"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:
    geometry = tiny("llama")
    tensors = hf_tensors(geometry)
    change(tensors)
    folder = write_folder(tmp_path / "m", hf_config(geometry), tensors)
    with pytest.raises(ValueError, match=message):
        load(folder, geometry)


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    geometry = tiny("llama", has_reward_head=True)
    folder = write_folder(
        tmp_path / "m", hf_config(geometry, "LlamaForSequenceClassification"), hf_tensors(geometry)
    )
    with pytest.raises(ValueError, match="score.weight is not among"):
        load(folder, geometry)


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="--hf-model ./nowhere: no such folder"):
        resolve_model("./nowhere")
    with pytest.raises(ValueError, match="pip install modelscope"):
        monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
        resolve_model("modelscope:Shanghai_AI_Laboratory/internlm2-1_8b")
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path, tiny("llama"))
