"""Which device a process takes, and what is set before CUDA starts; GPUs are stand-ins."""

from __future__ import annotations

import os

import pytest
import torch

from rmega import distributed

READ_ONCE = (  # by CUDA, its allocator, cuBLAS, NCCL, Transformer Engine
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
)


@pytest.fixture
def environment(monkeypatch):
    """None of the variables is set, and what is set is taken back."""
    for name in (*READ_ONCE, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_each_process_takes_its_own_gpu(environment):
    gpus(environment, 2)
    for local in (0, 1):
        environment.setenv("LOCAL_RANK", str(local))
        assert distributed.device() == torch.device("cuda", local)
    gpus(environment, 0)
    assert distributed.device() == torch.device("cpu")


@pytest.mark.parametrize("count,local,processes", [(1, 1, 2), (2, 5, 8), (1, 3, None)])
def test_more_processes_than_gpus(environment, count, local, processes):
    """The first rank to be without a GPU says so, in place of CUDA's "invalid device ordinal"."""
    gpus(environment, count)
    environment.setenv("LOCAL_RANK", str(local))
    if processes:
        environment.setenv("LOCAL_WORLD_SIZE", str(processes))
    expected = f"{processes or local + 1} processes on this machine, {count} GPUs?[ ;]"
    with pytest.raises(ValueError, match=f"--nproc-per-node .*: {expected}"):
        distributed.device()
    with pytest.raises(ValueError, match=expected):
        distributed.initialize()
    environment.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=3"):
        distributed.device()


def test_what_the_user_has_set_stays(environment):
    distributed.prepare_cuda(1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG"} & os.environ.keys()
    environment.delenv("PYTORCH_ALLOC_CONF")
    environment.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    distributed.prepare_cuda(2)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    environment.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    distributed.prepare_cuda(2, deterministic=True)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_deterministic(environment):
    distributed.prepare_cuda(1)
    assert not torch.are_deterministic_algorithms_enabled()
    distributed.prepare_cuda(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_sets_it_before_it_asks_for_a_gpu(environment, tmp_path, deterministic):
    """The allocator reads its configuration when CUDA starts, which asking for a GPU's memory
    does: what is set later is not in force."""
    from rmega.config import DataArgs, ModelArgs, ParallelArgs, TrainArgs, TrainingConfig
    from rmega.training.run import train
    from tests.tiny import tiny_llama

    seen: dict[str, dict] = {}

    def first_use(name, value):
        def call(*_):
            seen.setdefault(name, {key: os.environ.get(key) for key in READ_ONCE})
            return value

        return call

    class Enough(Exception):
        pass

    def stop(*_):
        first_use("set_device", None)()
        raise Enough

    class Properties:
        total_memory = 2**40

    environment.setattr(torch.cuda, "is_available", first_use("is_available", True))
    environment.setattr(torch.cuda, "device_count", first_use("device_count", 1))
    environment.setattr(torch.cuda, "get_device_properties", first_use("properties", Properties))
    environment.setattr(torch.cuda, "set_device", stop)
    config = TrainingConfig(
        model=ModelArgs(hf_model=str(tiny_llama(tmp_path))),
        data=DataArgs(data_path=()),
        train=TrainArgs(train_steps=1, deterministic=deterministic),
        parallel=ParallelArgs(tensor_model_parallel_size=2),
    )
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(Enough):
        train(config)
    assert {"is_available", "properties", "set_device"} <= seen.keys()
    for name, values in seen.items():
        assert values["PYTORCH_ALLOC_CONF"] == "expandable_segments:True", name
        assert values["CUDA_DEVICE_MAX_CONNECTIONS"] == "1", name
        assert (values["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8") == deterministic, name
    assert torch.are_deterministic_algorithms_enabled() == deterministic
