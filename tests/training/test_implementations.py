"""Which implementation of each part a run uses and reports: Transformer Engine by Megatron-Core's
own answer, weight gradients, attention. Packages and GPUs are stand-ins."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.extensions import transformer_engine as core_te

from rmega.config import DataArgs, ModelArgs, TrainArgs, TrainingConfig
from rmega.training import components

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def config(**model) -> TrainingConfig:
    return TrainingConfig(
        model=ModelArgs(hf_model="m", **model),
        data=DataArgs(data_path=()),
        train=TrainArgs(train_steps=1),
    )


@pytest.fixture
def package(monkeypatch):
    """Transformer Engine as a package that can be found, with or without what Megatron-Core
    imports of it."""

    def make(name: str, *, usable: bool) -> None:
        module = ModuleType(name)
        module.__version__ = "2.7.0"
        module.__spec__ = SimpleNamespace(name=name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(core_te, "HAVE_TE", usable)
        monkeypatch.setattr("megatron.core.utils._te_version", None)

    return make


def parts_of(dtype=torch.bfloat16, fused_weight_gradients=True):
    core = SimpleNamespace(
        params_dtype=dtype, kv_channels=64, gradient_accumulation_fusion=fused_weight_gradients
    )
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    optimizer = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(optimizer=inner)], param_groups=[{"fused": True}]
    )
    return [SimpleNamespace(config=core)], optimizer


def line(settings=None, device=CPU, **parts) -> str:
    return components.implementations(settings or config(), *parts_of(**parts), device)


@pytest.fixture
def no_te(monkeypatch):
    monkeypatch.setattr(core_te, "HAVE_TE", False)
    monkeypatch.setattr(components, "find_spec", lambda name: None)


def test_without_transformer_engine(no_te):
    assert not components.use_transformer_engine(config(), GPU)
    for asked in (dict(transformer_impl="transformer_engine"), dict(fp8_format="hybrid")):
        with pytest.raises(ValueError, match=r"--\S+ \S+: Transformer Engine is not installed"):
            components.use_transformer_engine(config(**asked), GPU)
    assert "; not installed: transformer_engine, apex" in line()


def test_with_transformer_engine(package):
    package("transformer_engine", usable=True)
    assert components.use_transformer_engine(config(), GPU)
    assert not components.use_transformer_engine(config(), torch.device("cpu"))
    assert not components.use_transformer_engine(config(transformer_impl="local"), GPU)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        components.use_transformer_engine(config(fp8_format="hybrid"), torch.device("cpu"))


def test_a_package_that_megatron_core_cannot_use(package, monkeypatch):
    """The meta package without its PyTorch part, or a release that moved what is imported: layers
    would stand on Megatron-Core's placeholders."""
    package("transformer_engine", usable=False)
    assert not components.use_transformer_engine(config(), GPU)
    why = "Transformer Engine is installed, but Megatron-Core cannot use it (ModuleNotFoundError"
    assert components.transformer_engine_obstacle().startswith(why)
    with pytest.raises(ValueError, match="--fp8-format hybrid: Transformer Engine is installed, b"):
        components.use_transformer_engine(config(fp8_format="hybrid"), GPU)
    assert f"; {why}" in line() and "not installed: transformer_engine" not in line()


def test_the_line_names_the_release(package, monkeypatch):
    package("transformer_engine", usable=True)
    monkeypatch.setattr(components, "active_kernel", lambda *given: f"kernel{given}")
    monkeypatch.setattr(components.ops, "active_implementation", lambda device: "native")
    monkeypatch.setattr(components.ops, "active_elementwise", lambda device, dtype: "native")
    text = line(config(fp8_format="hybrid"), GPU)
    assert "linear transformer_engine 2.7.0 in fp8 (hybrid, tensorwise)" in text
    assert f"attention kernel{(GPU, torch.bfloat16, 64)}" in text


@pytest.mark.parametrize(
    "fused,words", [(True, "weight gradients fused"), (False, "weight gradients in bf16, then add")]
)
def test_the_line_names_how_weight_gradients_are_added(no_te, fused, words):
    assert words in line(fused_weight_gradients=fused)


@pytest.mark.parametrize("found", [None, ("torch", None)])
def test_flash_attn_is_missed_only_where_torch_has_no_varlen_attention(no_te, monkeypatch, found):
    monkeypatch.setattr(components, "varlen_function", lambda: found)
    assert ("flash_attn" in line()) == (found is None)


def test_the_line_names_deterministic_algorithms(no_te):
    settings = config()
    assert "deterministic" not in line(settings)
    settings.train.deterministic = True
    assert "deterministic algorithms" in line(settings)


@pytest.mark.parametrize("asked,expected", [(None, True), (True, True), (False, False)])
@pytest.mark.parametrize("device,replicas", [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_gradients_are_reduced_during_the_backward_pass(
    monkeypatch, asked, expected, device, replicas
):
    """By default on GPUs with several replicas; never against what was asked for."""
    ddp = []

    def wrapper(config, settings, chunk, **_):
        ddp.append(settings)
        return SimpleNamespace(no_sync=None, param_to_bucket_group={}, modules=lambda: [])

    monkeypatch.setattr(components, "DistributedDataParallel", wrapper)
    monkeypatch.setattr(components, "skip_single_rank_collectives", lambda wrapped: None)
    monkeypatch.setattr(
        components.parallel_state, "get_data_parallel_world_size", lambda *a, **k: replicas
    )
    parameter = SimpleNamespace(is_cuda=device == "cuda")
    chunk = SimpleNamespace(
        config=SimpleNamespace(no_sync_func=None), parameters=lambda: iter([parameter])
    )
    settings = config()
    settings.parallel.overlap_grad_reduce = asked
    components.wrap_model([chunk], settings)
    if asked is None:
        expected = (device, replicas) == ("cuda", 2)
    assert ddp[0].overlap_grad_reduce is expected
    # By default weights are gathered late where gradients are reduced early, on GPUs.
    assert ddp[0].overlap_param_gather is (expected and device == "cuda")
