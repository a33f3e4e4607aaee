"""Dropout of adapters: the mask's statistics, values and gradients against peft with the same mask,
and the same numbers in every layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests import runs
from tests.dist import run_distributed
from tests.models.test_lora import ALPHA, RANK, largest, peft_folder
from tests.tiny import InMemory, random_comparisons, tiny_llama

P, SEED, CONSUMED = 0.3, 7, 20
LAYOUTS = ["tp2", "tp2,sp", "pp2", "pp2,vpp2", "dp2", "tp2,sp,recompute", "tp2,sp,selective"]


def configuration(text: str, folder: str, steps: int = 3, **switches):
    from rmega.config import LoraArgs, LossArgs
    from rmega.training.parity import Layout, layout_config

    return layout_config(
        Layout.parse(text),
        hf_model=folder,
        **{"steps": steps, "global_batch_size": 10, "max_tokens": 260, "lr": 1e-3, **switches},
        loss=LossArgs(loss="ranking", penalty="none", batch_centering=0.1),
        lora=LoraArgs(lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=P),
    )


def run(rank: int, world_size: int, text: str, folder: str, switches: dict) -> object:
    from rmega.training.parity import run_layout

    config = configuration(text, folder, **switches)
    return run_layout(config, InMemory(random_comparisons(24, seed=1)))


def result_of(text: str, folder, **switches):
    from rmega.training.parity import Layout

    world = Layout.parse(text).world_size
    return run_distributed(run, world, text, str(folder), switches)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    return peft_folder(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def single(folder):
    return result_of("1", folder)


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_layout_has_the_same_masks(text, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of(text, folder), single)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("switches", [{"share_prefix": False}, {"prune_last_layer": False}])
def test_savings_are_exact(switches, folder, single):
    from rmega.training.parity import compare

    differences = compare(result_of("1", folder, **switches), single)
    assert max(differences.values()) <= 1e-5, differences


def step(rank: int, world_size: int, folder: str) -> tuple:
    """Rewards of evaluation, and of a training batch the loss and gradients in peft's names, of
    another step as well."""
    from rmega.models.lora_weights import adapter_table
    from rmega.training import components, train
    from rmega.training.parity import build, gather_global
    from rmega.training.rewards import compute_rewards

    config = configuration("1", folder)
    config.loss.batch_centering = 0.0
    wrapped, _, _, geometry, device = build(config)
    batcher = components.make_batcher(config, InMemory(random_comparisons(10, seed=1)), geometry)
    rewards = compute_rewards(wrapped, batcher, device)
    losses, rules = [], {rule.name: rule for rule in adapter_table(geometry, config.lora)}
    for consumed in (CONSUMED + 10, CONSUMED):
        packs = batcher.packs(np.arange(10), consumed)
        losses.append(train.forward_backward(wrapped, packs, config.loss)["base_loss"])
    grads = {}
    for name, tensor in gather_global(
        wrapped, geometry, lambda p: p.main_grad, config.lora
    ).items():
        for offset, part in rules[name].overlaps(0, len(tensor)) if name in rules else ():
            grads[part.name] = tensor[offset : offset + part.stop - part.start]
    return torch.from_numpy(rewards), losses, grads


class Masked(torch.nn.Module):
    """In place of peft's dropout: zero what the keys say."""

    def __init__(self, layer: int, target: int, batch: dict) -> None:
        super().__init__()
        self.layer, self.target, self.batch = layer, target, batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from rmega.data.token_keys import chain, keys
        from rmega.models.lora import drop_mask

        document, response, prefix = (self.batch[k] for k in ("document", "response", "prefix"))
        of_prefix, own = (chain(SEED, CONSUMED, document, r) for r in (-1, response))
        tokens = np.concatenate(
            [keys(of_prefix, 0, prefix), keys(own, prefix, x.shape[1] - prefix)]
        )
        channels = keys(chain(self.layer + 1, self.target), 0, x.shape[2])
        mask = drop_mask(torch.from_numpy(tokens), torch.from_numpy(channels), P)
        return x.masked_fill(mask, 0) / (1 - P)


def test_values_and_gradients_are_those_of_peft_with_the_same_masks(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    data = random_comparisons(10, seed=1)
    rewards, (other, loss), grads = run_distributed(step, 1, str(folder))[0]
    assert other != pytest.approx(loss, rel=1e-4)  # of another step

    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)

    def score(document: int, response: int) -> torch.Tensor:
        comparison = data[document]
        batch.update(document=document, response=response, prefix=len(comparison.prefix))
        ids = [*comparison.prefix.tolist(), *comparison.suffixes[response].tolist()]
        hidden = model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.model.score(hidden)[0]

    batch: dict = {}
    everything = [(d, r) for d, c in enumerate(data) for r in range(len(c.suffixes))]
    with torch.no_grad():  # evaluations drop nothing
        assert largest(rewards, torch.stack([score(*each) for each in everything])) < 1e-5
    targets = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
    for number, layer in enumerate(model.model.model.layers):
        for name, module in layer.named_modules():
            if hasattr(module, "lora_dropout"):
                target = targets.get(name.rpartition(".")[2], 3)
                module.lora_dropout["default"] = Masked(number, target, batch)
    total = torch.zeros(())
    for document, comparison in enumerate(data):
        each = [score(document, r) for r in range(len(comparison.suffixes))]
        for better, worse in itertools.combinations(each, 2):
            total = total - torch.nn.functional.logsigmoid(better - worse)
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    assert grads.keys() == theirs.keys() and len(grads) == 4 * 7 * 2
    for name, grad in grads.items():
        assert largest(grad, theirs[name]) < 2e-5, name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_look_random(p):
    """Their mean, and the correlation of neighbouring rows, columns and of two steps, within five
    standard deviations of what independent draws have."""
    from rmega.data.token_keys import chain, keys
    from rmega.models.lora import drop_mask

    channels = torch.from_numpy(keys(chain(3, 1), 0, 512))
    one, other = (
        drop_mask(
            torch.from_numpy(keys(chain(SEED, consumed, 5, 0), 17, 400)), channels, p
        ).double()
        for consumed in (0, 16)
    )
    count = one.numel()
    assert abs(one.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, other)):
        correlation = ((a - p) * (b - p)).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / count**0.5
    for axis in (0, 1):  # no row and no column that is dropped more often than chance has it
        spread = (one.mean(axis) - p).abs().max()
        assert spread < 5.5 * (p * (1 - p) / one.shape[axis]) ** 0.5


def test_a_resumed_run_draws_the_same_masks(small_llama, tmp_path):
    data = runs.make_data(small_llama, tmp_path)
    lora = dict(lora_rank=2, lora_dropout=P)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = runs.flags(small_llama, data, whole, steps=4, **lora)
    assert run_distributed(runs.train, 1, argv) == [0]
    for stop in (2, 4):
        argv = runs.flags(small_llama, data, cut, steps=4, **lora)
        events = {2: ("SIGTERM", 0)} if stop == 2 else None
        run_distributed(runs.train, 1, argv, events)
    runs.assert_same(whole / "iter_0000004", cut / "iter_0000004")


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_impossible_probabilities_are_refused(value, small_llama):
    from rmega.config import LoraArgs

    with pytest.raises(ValueError, match="--lora-dropout .*: must lie from 0 to below 1"):
        LoraArgs(lora_rank=2, lora_dropout=float(value)).check()
