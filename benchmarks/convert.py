"""Memory and speed of going in and out of Hugging Face, on a synthetic checkpoint of
InternLM2-1.8B's shapes.

    python benchmarks/convert.py --layers 9 --folder /tmp/convert

Writes a checkpoint (fp32, 9 layers = 3.0 GB; the embedding, its largest tensor, is 758 MB), whole
and cut over two ranks, and then measures, each in a fresh process, best of --repeats:
- out: ``export_weights`` against ``cp`` of the same bytes; peak memory of the whole process
  (allowed: twice the largest tensor plus 300 MB; speed: at least half that of the copy). Processor
  seconds stand beside wall seconds, because on a machine with other work only they say what each of
  the two costs;
- in: ``load_hf`` into a model, whole and as one of two ranks; peak memory beside the model
  (allowed: the largest tensor plus 300 MB).
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from rmega.cli import parse_args, run_tool  # noqa: E402

Role = Literal["all", "make", "out", "in"]


@dataclasses.dataclass(kw_only=True)
class Args:
    """Measure memory and speed of going in and out of Hugging Face."""

    folder: str = "/tmp/rmega-convert"
    """Scratch folder; needs about four times the size of the checkpoint."""
    layers: int = 9
    """Layers of InternLM2-1.8B's shape."""
    repeats: int = 3
    """Times that each measurement is taken."""
    role: Role = "all"
    """What this process does (the others are its own children)."""
    tp: int = 1
    """Ranks over which the checkpoint or model is cut (children only)."""
    family: Literal["internlm2", "llama"] = "internlm2"
    """Format that is written (children only)."""
    dtype: str = "float32"
    """Dtype that is written (children only)."""


def geometry(layers: int, family: str = "internlm2") -> Any:
    from rmega.models.geometry import Geometry

    return Geometry(
        family=family,
        num_layers=layers,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        vocab_size=92544,
        max_position_embeddings=32768,
        norm_eps=1e-5,
        rope_theta=1e6,
    )


def memory() -> dict[str, float]:
    """Resident memory of this process in MB, now and at its peak."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {
        key: int(status[field].split()[0]) * 1024 / 1e6
        for key, field in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def make(args: Args) -> None:
    """Write the checkpoint from ``args.tp`` processes, each with its own rows or columns."""
    import torch
    import torch.multiprocessing

    torch.multiprocessing.spawn(
        _make_rank, (args.tp, args.layers, str(Path(args.folder) / f"tp{args.tp}")), args.tp
    )


def _make_rank(rank: int, tp: int, layers: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from rmega.models import BACKBONES

    store = dist.FileStore(folder + ".store", tp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    mesh = init_device_mesh("cpu", (tp,))
    torch.manual_seed(rank)
    state = {}
    for rule in BACKBONES["internlm2"].weight_table(geometry(layers)):
        shape = list(rule.shape)
        if rule.shard_dim is not None:
            shape[rule.shard_dim] //= tp
        placement = Replicate() if rule.shard_dim is None else Shard(rule.shard_dim)
        state[rule.name] = DTensor.from_local(
            torch.empty(shape).uniform_(-0.05, 0.05), mesh, [placement]
        )
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()


def out(args: Args) -> None:
    """Write the weights once and say how long it took and how much memory it had."""
    import torch.distributed.checkpoint  # noqa: F401  (its import is no part of the copying)

    from rmega.export.checkpoint_tensors import CheckpointTensors
    from rmega.export.write_weights import export_weights

    target = Path(args.folder) / "out"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    begun, worked = time.perf_counter(), time.process_time()
    source = CheckpointTensors(Path(args.folder) / f"tp{args.tp}")
    writer = export_weights(
        source, geometry(args.layers, args.family), target, dtype=args.dtype, max_shard_bytes=10**9
    )
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begun,
                "cpu": time.process_time() - worked,
                "bytes": writer.total_size,
                **memory(),
            }
        )
    )


def read_in(args: Args) -> None:
    """Fill a model (parameters only, as rank 0 of ``args.tp``) and say what memory that took beside
    the model."""
    import torch

    from rmega.models.hf import load_hf
    from tests.hf_fixtures import Stage

    shape = geometry(args.layers, args.family)
    stage = Stage(shape, tp_rank=0, tp_size=args.tp)  # filled with nan: every page is there
    before = memory()["now"]
    begun = time.perf_counter()
    load_hf(stage, Path(args.folder) / "out", shape, tp_rank=0, tp_size=args.tp)
    assert not any(torch.isnan(parameter).any() for parameter in stage.names.values())
    after = memory()
    print(
        json.dumps(
            {"seconds": time.perf_counter() - begun, "extra": after["peak"] - before, **after}
        )
    )


def child(args: Args, role: Role, **fields: Any) -> dict[str, Any]:
    flags = {"folder": args.folder, "layers": args.layers, "role": role, **fields}
    command = [
        sys.executable,
        __file__,
        *(text for key, value in flags.items() for text in (f"--{key}", str(value))),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1]) if answer.stdout.strip() else {}


def copy_seconds(source: Path, target: Path) -> tuple[float, float]:
    """(wall, processor) seconds of copying the checkpoint's files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = [str(file) for file in source.glob("*.distcp")]
    begun, worked = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(target)
    return seconds, after.ru_utime + after.ru_stime - worked.ru_utime - worked.ru_stime


def measure(args: Args) -> int:
    from benchmarks.common import environment, save, table

    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    largest = 92544 * 2048 * 4 / 1e6
    rows = []
    for tp in (1, 2):
        child(args, "make", tp=tp)
        for family, dtype in (
            ("internlm2", "float32"),
            ("llama", "float32"),
            ("internlm2", "bfloat16"),
        ):
            runs, copies = [], []
            for _ in range(args.repeats):  # in turn, so that both meet the same machine
                copies.append(copy_seconds(folder / f"tp{tp}", folder / "copy"))
                runs.append(child(args, "out", tp=tp, family=family, dtype=dtype))
            size = sum(f.stat().st_size for f in (folder / f"tp{tp}").glob("*.distcp")) / 1e9
            seconds, copied = min(run["seconds"] for run in runs), min(wall for wall, _ in copies)
            cpu, copied_cpu = min(run["cpu"] for run in runs), min(worked for _, worked in copies)
            rows.append(
                {
                    "what": f"out: {family} {dtype}, checkpoint of {tp} rank{'s' * (tp > 1)}",
                    "GB read": size,
                    "seconds": seconds,
                    "cp seconds": copied,
                    "speed / cp": copied / seconds,
                    "CPU s": cpu,
                    "cp CPU s": copied_cpu,
                    "by CPU": copied_cpu / cpu,
                    "peak MB": max(run["peak"] for run in runs),
                    "allowed MB": 2 * largest + 300,
                }
            )
    for family in ("internlm2", "llama"):
        child(args, "out", tp=1, family=family)
        for tp in (1, 2):
            runs = [child(args, "in", tp=tp, family=family) for _ in range(args.repeats)]
            rows.append(
                {
                    "what": f"in: {family}, 1 of {tp} rank{'s' * (tp > 1)}",
                    "GB read": rows[0]["GB read"] / tp,
                    "seconds": min(run["seconds"] for run in runs),
                    "cp seconds": float("nan"),
                    "speed / cp": float("nan"),
                    "CPU s": float("nan"),
                    "cp CPU s": float("nan"),
                    "by CPU": float("nan"),
                    "peak MB": max(run["extra"] for run in runs),
                    "allowed MB": largest + 300,
                }
            )
    shutil.rmtree(folder)
    print(table(rows))
    save("convert", {"environment": environment(), "largest_tensor_mb": largest, "rows": rows})
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(Args, argv, prog="benchmarks/convert.py")
    if args.role == "all":
        return measure(args)
    {"make": make, "out": out, "in": read_in}[args.role](args)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
