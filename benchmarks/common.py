"""What every benchmark shares: where it ran, the FLOP formula, the matmul rate, a JSON beside a
table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from rmega import ops  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("RMEGA_RESULTS", ROOT / "benchmarks" / "results"))


def commit() -> str:
    """The commit that was measured: RMEGA_COMMIT where it is set (a copy without history), else
    git's answer, with "+changes" where files differ from it; "unknown" without either."""
    if name := os.environ.get("RMEGA_COMMIT"):
        return name

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, versions, commit and command of this measurement."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{
            name: installed(name)
            for name in ("megatron-core", "transformers", "trl")
            if installed(name)
        },
        "cuda": torch.version.cuda,
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
    }


def cpu_name() -> str:
    """Name and bf16 features of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in text]
    return f"{name} ({', '.join(features)})"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``NAME.json`` in benchmarks/results (or RMEGA_RESULTS) and print where."""
    RESULTS.mkdir(exist_ok=True, parents=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", flush=True)
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    cells = [[_cell(row[n]) for n in names] for row in rows]
    widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]

    def line(values: list[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    return "\n".join([line(names), line(["-" * w for w in widths]), *(line(c) for c in cells)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def layer_flops(geometry, tokens: int, attended: float) -> float:
    """Forward FLOP of one decoder layer: 2 x multiply-adds of the matmuls over ``tokens``
    rows, and 4 a d per attended query-key pair (scores and values). Norms, rotation, activation
    and softmax are not counted.
    """
    g = geometry
    qkv = g.hidden_size * (g.num_attention_heads + 2 * g.num_query_groups) * g.head_dim
    proj = g.num_attention_heads * g.head_dim * g.hidden_size
    mlp = 3 * g.hidden_size * g.ffn_hidden_size
    return 2.0 * tokens * (qkv + proj + mlp) + 4.0 * attended * g.num_attention_heads * g.head_dim


def step_flops(geometry, segments, pooled_segments, *, prune_last_layer: bool) -> float:
    """FLOP of one training step on a pack: three times the forward pass (the backward pass is two),
    no recomputation.

    ``segments`` and ``pooled_segments`` are those of a ``PackedBatch``; with pruning the last layer
    makes keys and values for every token and the rest for pooled rows only. Embedding and head have
    no matmuls worth counting.
    """

    def attended(s) -> float:
        q, k, p = s.q_len.double(), s.k_len.double(), s.prefix_len.double()
        return float((q * p + q * k - q * (q - 1) / 2).sum())

    tokens, pooled = int(segments.q_len.sum()), int(pooled_segments.q_len.sum())
    forward = (geometry.num_layers - 1) * layer_flops(geometry, tokens, attended(segments))
    if prune_last_layer:
        kv = 2.0 * tokens * geometry.hidden_size * 2 * geometry.num_query_groups * geometry.head_dim
        own = layer_flops(geometry, pooled, attended(pooled_segments))
        own -= (
            2.0 * pooled * geometry.hidden_size * 2 * geometry.num_query_groups * geometry.head_dim
        )
        forward += kv + own
    else:
        forward += layer_flops(geometry, tokens, attended(segments))
    return 3.0 * forward


def matmul_rate(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None
) -> float:
    """FLOP/s of a square matmul in this process, made as linear layers make it, best of
    several: the machine's, not the data sheet's."""
    cuda = torch.device(device).type == "cuda"
    size = size or (8192 if cuda else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10 if cuda else 5):
        start = clock(device)
        ops.linear(a, b)
        best = min(best, clock(device) - start)
    return 2.0 * size**3 / best


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds, after everything on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
