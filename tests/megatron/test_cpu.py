"""What ``rmega.megatron.cpu.install`` replaces, name by name: another release of Megatron-Core
fails here and not in a run."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmega import distributed
from tests.conftest import ROOT
from tests.dist import run_distributed

ENGINE = ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
GOLDEN = ROOT / "tests" / "golden" / f"cpu_modules_{ENGINE}.txt"  # one list per release

# Looks into a fresh interpreter: which names differ before and after.
PROBE = """
import ast, collections, importlib, json, sys
import torch
from rmega import distributed
from rmega.megatron import cpu
distributed.quiet_megatron()
for name in cpu.MEGATRON_MODULES:
    importlib.import_module(name)
import rmega.training.components, rmega.training.train, rmega.checkpointing.checkpoint
engine = {n: m for n, m in sys.modules.items() if n.startswith("megatron.core")}
others = {n: m for n, m in sys.modules.items()
          if not n.startswith("megatron") and getattr(m, "__dict__", None)
          and n not in ("rmega.megatron.cpu", "__main__", "__mp_main__")}
before = {n: dict(vars(m)) for n, m in {**others, **engine}.items()}
kinds = (torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.Generator)
classes = {c: dict(vars(c)) for c in kinds}
torch.manual_seed(5)
cpu.install(); cpu.install()
def new(now, old): return sorted(k for k, v in vars(now).items() if old.get(k) is not v)
changed = {n: new(m, before[n]) for n, m in {**others, **engine}.items()}
uses, makes = collections.defaultdict(list), collections.defaultdict(list)
for n in cpu.installed():
    for node in ast.walk(ast.parse(open(sys.modules[n].__file__).read())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            uses[node.attr].append(n)
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if function.startswith("torch.") and function.count(".") == 1:
            given = [k.value for k in node.keywords if k.arg == "device"]
            given = node.args if function == "torch.device" else given
            if any("cuda" in ast.unparse(value) for value in given):
                makes[function.removeprefix("torch.")].append(n)
substitute = sys.modules["megatron.core.parallel_state"].torch
x = torch.ones(2)
print("PROBE", json.dumps({
    "others": {n: c for n, c in changed.items() if c and n in others},
    "engine": {n: c for n, c in changed.items() if c and n in engine},
    "classes": {c.__name__: new(c, old) for c, old in classes.items()},
    "installed": cpu.installed(), "uses": uses, "makes": makes,
    "cuda": [k for k in new(substitute.cuda, vars(torch.cuda)) if k[0] != "_"],
    "torch": [k for k in new(substitute, vars(torch)) if k[0] != "_"],
    "type": x.type(), "device": str(substitute.ones(2, device="cuda").device),
    "lazy": substitute.nn.functional is torch.nn.functional}))
"""

# Names of torch.cuda that the replaced modules speak of and that are left as they are, with why
# that is harmless.
LEFT_ALONE = {
    "is_available": "says False, as it should",
    "nvtx": "marks for a profiler, off by default",
    "Event": "timers and offloading, off by default",
    "amp": "decorators of custom functions, which run on any device",
    "FloatTensor": "names of types",
    "HalfTensor": "names of types",
    "BFloat16Tensor": "names of types",
    "default_generators": "read in graph-safe mode only",
    "random": "read in graph-safe mode only",
    "OutOfMemoryError": "an exception's name",
    **dict.fromkeys(
        (
            "CUDAGraph",
            "graph",
            "graph_pool_handle",
            "set_stream",
            "memory_stats",
            "get_device_capability",
            "_sleep",
        ),
        "CUDA graphs",
    ),
    **dict.fromkeys(
        (
            *("MemPool", "use_mem_pool", "memory_allocated", "memory_reserved"),
            *("get_device_properties", "device_memory_used", "memory_snapshot"),
        ),
        "NCCL's own memory, FSDP, and inference",
    ),
    "is_current_stream_capturing": "experts",
    **dict.fromkeys(
        ("clock_rate", "power_draw", "temperature", "utilization"),
        "straggler detection, off by default",
    ),
}


@pytest.fixture(scope="module")
def probe() -> dict:
    return look()


def look() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("PROBE ")[1])


def test_outside_the_engine_nothing_changes(probe: dict) -> None:
    assert probe["others"] == {"torch.distributed.distributed_c10d": ["ProcessGroupGloo"]}
    assert probe["classes"] == {
        "Tensor": ["cuda", "type"],
        "Module": [],
        "Parameter": [],
        "Generator": [],
    }
    assert probe["type"] == "torch.FloatTensor"


def sockets(rank: int, world_size: int, interface: str) -> tuple[int, int, set, float]:
    """After a run's groups were made: how many there are, threads that serve their sockets,
    timeouts in seconds, and a sum over the ranks."""
    from rmega.config import ParallelArgs

    parallel = ParallelArgs(tensor_model_parallel_size=world_size, distributed_timeout_minutes=1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", interface)
        distributed.initialize(parallel)
    groups = torch.distributed.distributed_c10d._world.pg_map
    timeouts = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    threads = [name.read_text() for name in names if name.exists()]
    (total,) = distributed.sum_over_ranks(torch.ones(1)).tolist()
    return (
        len(groups),
        sum("gloo_tcp_loop" in name for name in threads),
        {t.total_seconds() for t in timeouts},
        total,
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("interface", ["", "lo"])
def test_groups_of_gloo_share_a_thread(interface):
    """One for each interface that was ever named; torch has one for each group."""
    for groups, threads, timeouts, total in run_distributed(sockets, 2, interface):
        assert groups > 10 and 1 <= threads <= 2 and timeouts == {90.0} and total == 2


def test_inside_the_engine_only_torch_changes(probe: dict) -> None:
    """Besides the module's name ``torch``, two functions that keep CUDA's random state."""
    random = probe["engine"].pop("megatron.core.tensor_parallel.random")
    assert random == ["_get_cuda_rng_state", "_set_cuda_rng_state", "torch"]
    assert all(names == ["torch"] for names in probe["engine"].values()), probe["engine"]
    assert set(probe["engine"]) | {"megatron.core.tensor_parallel.random"} == set(
        probe["installed"]
    )


def test_the_list_of_replaced_modules(probe: dict) -> None:
    assert GOLDEN.is_file(), (
        f"no list for megatron-core {ENGINE}: look at what changed, then write it:"
        " python -m tests.megatron.test_cpu"
    )
    golden = GOLDEN.read_text().split()
    missing, new = (
        sorted(set(golden) - set(probe["installed"])),
        sorted(set(probe["installed"]) - set(golden)),
    )
    assert not missing and not new, (
        f"megatron-core {importlib.import_module('megatron.core').__version__}: no longer replaced"
        f" {missing}, newly replaced {new}. If that is right: python -m tests.megatron.test_cpu"
    )


def test_the_list_of_replaced_names(probe: dict) -> None:
    assert probe["cuda"] == [
        "Stream",
        "current_device",
        "current_stream",
        "default_stream",
        "device_count",
        "empty_cache",
        "get_rng_state",
        "manual_seed",
        "set_device",
        "set_rng_state",
        "stream",
        "synchronize",
    ]
    assert probe["torch"] == [
        "arange",
        "cuda",
        "empty",
        "empty_like",
        "full",
        "ones",
        "ones_like",
        "rand",
        "randn",
        "tensor",
        "zeros",
        "zeros_like",
    ]
    assert probe["device"] == "cpu" and probe["lazy"]


def test_every_name_of_cuda_that_the_engine_speaks_of_is_known(probe: dict) -> None:
    unknown = {
        name: where
        for name, where in probe["uses"].items()
        if name not in {*probe["cuda"], *LEFT_ALONE}
    }
    assert not unknown, f"Megatron-Core uses names of torch.cuda that nobody looked at: {unknown}"


def test_every_function_that_the_engine_gives_cuda_as_device_is_replaced(probe: dict) -> None:
    devices = {name.removeprefix("megatron.core.") for name in probe["makes"].pop("device")}
    assert set(probe["makes"]) <= set(probe["torch"]), probe["makes"]
    # torch.device("cuda") itself is left alone; those who write it are not reached, or in
    # graph-safe mode only.
    assert {name for name in devices if not name.startswith("distributed.fsdp")} == {
        "nccl_allocator",
        "tensor_parallel.random",
        "transformer.moe.token_dispatcher",
    }


def test_the_engine_sees_the_cpu_and_others_do_not() -> None:
    from rmega.megatron import cpu

    cpu.install()
    import torch
    from megatron.core import parallel_state

    fake = parallel_state.torch
    assert fake is not torch and fake.cuda.current_device() == torch.device("cpu")
    assert fake.nn is torch.nn and fake.distributed is torch.distributed
    assert isinstance(torch.ones(1), fake.Tensor)
    if getattr(torch._C, "_cuda_getDeviceCount", lambda: 0)() == 0:
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(1).cuda()
    state = fake.cuda.get_rng_state()
    a = torch.rand(3)
    fake.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), a)


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(look()["installed"]) + "\n")
