"""LoRA against peft on plain transformers, and every layout against one rank."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.dist import run_distributed
from tests.hf_fixtures import hf_config, hf_tensors, tiny, write_folder
from tests.tiny import VOCAB, InMemory, random_comparisons, tiny_llama
from tests.training import test_layouts

RANK, ALPHA = 4, 6.0


def test_a_rank_above_a_matrix_is_named() -> None:
    """Hidden size 32; keys and values have 2 heads of 8."""
    from rmega.config import LoraArgs
    from rmega.models.lora_weights import above_dimensions

    named = {
        rank: above_dimensions(tiny("llama"), LoraArgs(lora_rank=rank)) for rank in (16, 32, 33)
    }
    assert named == {16: "", 32: "qkv (16)", 33: "qkv (16), proj (32), fc1 (32), fc2 (32)"}
    one = LoraArgs(lora_rank=9999, lora_target="fc1")
    assert above_dimensions(tiny("internlm2"), one) == "fc1 (32)"


def gradients(rank: int, world_size: int, folder: str) -> tuple:
    """Of a step from an adapter folder: rewards, gradients in peft's names, loss."""
    from rmega.config import LoraArgs, LossArgs
    from rmega.models.lora_weights import adapter_table
    from rmega.training import components, train
    from rmega.training.parity import Layout, build, gather_global, layout_config
    from rmega.training.rewards import compute_rewards

    lora = LoraArgs(lora_rank=RANK, lora_alpha=ALPHA)
    config = layout_config(
        Layout.parse("1"),
        hf_model=folder,
        steps=1,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
        loss=LossArgs(loss="ranking", penalty="none", use_margin=True),
        lora=lora,
    )
    wrapped, _, _, geometry, device = build(config)
    data = InMemory(random_comparisons(10, seed=1))
    batcher = components.make_batcher(config, data, geometry)
    rewards = compute_rewards(wrapped, batcher, device)
    sums = train.forward_backward(wrapped, batcher.packs(batcher.documents(0)), config.loss)
    rules = {rule.name: rule for rule in adapter_table(geometry, lora)}
    grads = {}
    for name, tensor in gather_global(wrapped, geometry, lambda p: p.main_grad, lora).items():
        if name == "reward_head.weight":
            grads["score.weight"] = tensor
            continue
        for offset, part in rules[name].overlaps(0, len(tensor)):
            grads[part.name] = tensor[offset : offset + part.stop - part.start]
    return torch.from_numpy(rewards), grads, sums["base_loss"]


def peft_folder(base: Path, folder: Path, b_scale: float = 0.2, **options) -> Path:
    """An adapter with a reward head as peft saves it, B random."""
    from transformers import AutoModelForSequenceClassification

    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, b_scale)
            elif "score.modules_to_save" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    return folder


def by_peft(base: Path, folder: Path, data) -> tuple:
    """The same by peft on plain transformers, one response at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    own = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    rewards, loss = [], torch.zeros(())
    for comparison in data:
        each = []
        for suffix in comparison.suffixes:
            ids = torch.tensor([[*comparison.prefix.tolist(), *suffix.tolist()]])
            hidden = model.model.model(ids).last_hidden_state[0, -1]
            each.append(model.model.score(hidden)[0])
        for i in range(len(each)):
            for j in range(i + 1, len(each)):
                margin = float(comparison.scores[i] - comparison.scores[j]) * comparison.graded
                loss = loss - torch.nn.functional.logsigmoid(each[i] - each[j] - margin)
        rewards += [x.item() for x in each]
    loss.backward()
    return torch.tensor(rewards), {name: p.grad for name, p in own.items()}, loss.item()


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize("b_scale", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_values_and_gradients_are_those_of_peft(family, b_scale, tmp_path):
    base = tiny_llama(tmp_path / "base", family=family)
    folder = peft_folder(base, tmp_path / "adapter", b_scale)
    rewards, grads, loss = run_distributed(gradients, 1, str(folder))[0]
    theirs, their_grads, their_loss = by_peft(base, folder, random_comparisons(10, seed=1))
    assert grads.keys() == their_grads.keys() and len(grads) == 4 * 7 * 2 + 1
    assert largest(rewards, theirs) < 1e-5
    assert loss == pytest.approx(their_loss, rel=1e-5)
    for name, grad in grads.items():
        if b_scale or not name.endswith("lora_A.weight"):
            assert largest(grad, their_grads[name]) < 2e-5, name
        else:
            assert not grad.any()


# Also full recomputation where a frozen embedding is.
LAYOUTS = [*test_layouts.LAYOUTS, "tp2,sp,recompute", "pp2,recompute"]


def run(rank: int, world_size: int, text: str, folder: str, target: str, switches: dict) -> object:
    from rmega.config import LoraArgs
    from rmega.training.parity import Layout, layout_config, run_layout

    config = layout_config(
        Layout.parse(text),
        hf_model=folder,
        steps=3,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-3,
        lora=LoraArgs(lora_rank=RANK, lora_alpha=ALPHA, lora_target=target),
        **switches,
    )
    return run_layout(config, InMemory(random_comparisons(24, seed=1)))


def result_of(text: str, folder, target: str = "all-linear", **switches):
    from rmega.training.parity import Layout

    world = Layout.parse(text).world_size
    return run_distributed(run, world, text, str(folder), target, switches)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return peft_folder(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def single(folder):
    return result_of("1", folder)


def test_adapters_and_head_learn_and_nothing_else(single):
    assert len(single.params) == 4 * (4 + 2 + 3 + 2) + 1
    assert len(set(single.losses)) == 3 and all(norm > 1e-3 for norm in single.grad_norms)


@pytest.mark.parametrize(
    "switches",
    [{"share_prefix": False}, {"prune_last_layer": False}],
    ids=["no shared prefix", "whole last layer"],
)
@pytest.mark.parametrize("text", ["1", "tp2,sp"])
def test_savings_are_exact(text, switches, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder, **switches), single)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize(
    "family,target", [("llama", "qkv"), ("qwen2", "proj,fc2"), ("internlm2", "all-linear")]
)
def test_parity_of_some_targets_and_of_a_fused_projection(family, target, tmp_path):
    """From new adapters: InternLM2's are none of peft. The steps are longer than the rounding of
    small B."""
    from rmega.training.parity import compare

    if family == "internlm2":
        from rmega.models import BACKBONES

        geometry = tiny(family, num_layers=2, vocab_size=VOCAB, max_position_embeddings=512)
        config = hf_config(geometry, BACKBONES[family].architecture, num_labels=1)
        base = write_folder(tmp_path, config, hf_tensors(geometry, head=True))
    else:
        base = tiny_llama(tmp_path, family=family, layers=2)
    alone, other = (result_of(text, base, target) for text in ("1", "tp2,sp"))
    differences = compare(other, alone)
    assert differences.pop("parameter") <= 1e-4  # of B, which starts at zero
    assert max(differences.values()) <= 1e-5, differences


def test_padded_heads_are_exact(tmp_path):
    """Three key/value groups on two ranks: what adapters add to the fourth is zero and stays so."""
    from rmega.training.parity import compare

    base = tiny_llama(tmp_path / "base", heads=9, groups=3, hidden=72, head_dim=8, layers=2)
    folder = peft_folder(base, tmp_path / "adapter")
    differences = compare(result_of("tp2,pad", folder), result_of("1", folder))
    assert max(differences.values()) <= 1e-5, differences


def heads_after(rank: int, world_size: int, folder: str) -> tuple:
    """Three steps in which adapters hardly move: (documents of each, the head before, after)."""
    from rmega.config import LoraArgs, LossArgs
    from rmega.training import components, train
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse("1"),
        hf_model=folder,
        steps=3,
        global_batch_size=10,
        max_tokens=260,
        lr=1e-30,
        loss=LossArgs(loss="ranking", penalty="none"),
        lora=LoraArgs(lora_rank=RANK),
    )
    config.optimizer.head_lr, config.optimizer.clip_grad = 1e-2, 0.0
    wrapped, optimizer, scheduler, geometry, _ = build(config)
    batcher = components.make_batcher(config, InMemory(random_comparisons(24, seed=1)), geometry)
    head = wrapped[0].module.reward_head.weight
    before, steps = head.detach().clone(), []
    for step in range(3):
        documents = batcher.documents(10 * step)
        train.train_step(wrapped, optimizer, batcher.packs(documents), config.loss, len(documents))
        scheduler.step(1)
        steps.append(documents.tolist())
    return steps, before, head.detach().clone()


def test_adapters_that_add_nothing_leave_training_of_the_head(tmp_path):
    """The same head as Adam on the last hidden states of plain transformers; --head-lr is its
    learning rate."""
    from transformers import AutoModel

    base = tiny_llama(tmp_path)
    steps, before, after = run_distributed(heads_after, 1, str(base))[0]
    model = AutoModel.from_pretrained(str(base)).eval()
    head = torch.nn.Parameter(before.clone())
    adam = torch.optim.AdamW([head], lr=1e-2, eps=1e-3, weight_decay=0.01)
    data = random_comparisons(24, seed=1)
    for documents in steps:
        loss, pairs = torch.zeros(()), 0
        for number in documents:
            comparison, each = data[number], []
            for suffix in comparison.suffixes:
                ids = torch.tensor([[*comparison.prefix.tolist(), *suffix.tolist()]])
                with torch.no_grad():
                    hidden = model(ids).last_hidden_state[0, -1]
                each.append(head[0] @ hidden)
            for i, j in itertools.combinations(range(len(each)), 2):
                loss, pairs = loss - torch.nn.functional.logsigmoid(each[i] - each[j]), pairs + 1
        adam.zero_grad()
        (loss / pairs).backward()
        adam.step()
    assert (after - before).abs().max() > 1e-2
    assert largest(after, head.detach()) < 1e-5


@pytest.mark.parametrize(
    "change,says",
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"peft_type": "IA3"}, "no adapter of type LORA"),
        ({"r": None}, "r=None"),
        ({"something_new": 1}, "something_new=1 is not supported"),
    ],
)
def test_adapters_of_other_kinds_are_refused(change, says, folder, tmp_path):
    from rmega.hub import resolve_start
    from rmega.models.hf import read_geometry
    from rmega.models.peft_folder import PeftFolder

    shutil.copytree(folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    base, adapter = resolve_start(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{says}"):
        PeftFolder(adapter, read_geometry(base)[0])


def test_tensors_that_are_no_adapters_of_linear_layers_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from rmega.hub import resolve_start
    from rmega.models.hf import read_geometry
    from rmega.models.peft_folder import PeftFolder

    shutil.copytree(folder, tmp_path / "adapter")
    base, adapter = resolve_start(str(tmp_path / "adapter"))
    geometry, file = read_geometry(base)[0], adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    few = {k: v for k, v in tensors.items() if ".mlp." not in k and "k_proj" not in k}
    save_file(few, file)
    own = PeftFolder(adapter, geometry)
    assert own.args.targets == ("qkv", "proj") and own.has_head
    assert len(own.missing) == 4 and "4 linear layers without one" in own.describe()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**few, name: few[name][:2].clone()}, file)
    with pytest.raises(ValueError, match="q_proj.lora_A.weight has shape"):
        PeftFolder(adapter, geometry).read(name.removeprefix("base_model.model."), (RANK, 64))
    save_file({**few, "base_model.model.model.embed_tokens.lora_A": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="embed_tokens.lora_A cannot be honored"):
        PeftFolder(adapter, geometry)


@pytest.mark.parametrize("text", LAYOUTS)
def test_parity(text, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder), single)
    assert max(differences.values()) <= 1e-5, differences


def losses(rank: int, world_size: int, folder: str, steps: int) -> list[float]:
    """The loss of each of some steps on all of eight comparisons."""
    from rmega.config import LoraArgs, LossArgs
    from rmega.training import components, train
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse("1"),
        hf_model=folder,
        steps=steps,
        global_batch_size=8,
        max_tokens=260,
        lr=1e-3,
        loss=LossArgs(loss="ranking", penalty="none"),
        lora=LoraArgs(lora_rank=RANK, lora_alpha=ALPHA),
    )
    config.optimizer.adam_eps, config.optimizer.weight_decay = 1e-8, 0.0
    wrapped, optimizer, scheduler, geometry, _ = build(config)
    batcher = components.make_batcher(config, InMemory(two_responses()), geometry)
    out = []
    for step in range(steps):
        packs = batcher.packs(batcher.documents(8 * step))
        out.append(train.train_step(wrapped, optimizer, packs, config.loss, 8).loss)
        scheduler.step(1)
    return out


def two_responses() -> list:
    return [c for c in random_comparisons(12, seed=1) if len(c.suffixes) == 2][:8]


def test_the_loss_follows_that_of_trl_with_peft(small_llama, tmp_path):
    """Six steps on the whole of a small set, from the same adapter and head."""
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install 'rmega[trl]')")
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = peft_folder(small_llama, tmp_path / "adapter", 0.05)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(small_llama), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = 0
    rows = [[[*c.prefix.tolist(), *s.tolist()] for s in c.suffixes] for c in two_responses()]
    tokenizer = AutoTokenizer.from_pretrained(str(small_llama), pad_token="<unk>")
    trainer = trl.RewardTrainer(
        PeftModel.from_pretrained(model, str(folder), is_trainable=True),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            max_steps=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(
            {"chosen_ids": [row[0] for row in rows], "rejected_ids": [row[1] for row in rows]}
        ),
    )
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    ours = run_distributed(losses, 1, str(folder), 6)[0]
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
