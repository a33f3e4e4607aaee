"""Kernels, bytes and waits of the path that GPUs take, counted on a CPU: nothing here is a time.

A decoder of InternLM2-1.8B's proportions at a quarter of its width runs one training pass with
stand-ins for what only a GPU has, and every operator that reaches torch's dispatcher is noted.

- Kernels: one for each operator that is no view and allocates only nothing; rmega's operators by
  their launches (``LAUNCHES``). GEMMs and attention are left out: they are the same in all rows.
- Bytes: each tensor of an operator read or written once, caches not counted. The unit U is one
  tensor [tokens, hidden] in the dtype of the model.
- Per layer: the difference between models of 4 and 3 layers.
- Waits: values that the host reads from tensors of the device during a whole training step.

    python benchmarks/count.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from benchmarks.common import environment, save, table  # noqa: E402

GEMMS = ("mm", "addmm", "addmm_", "bmm", "matmul")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "alias")
LAUNCHES = {"rms_norm_backward": 2, "add_rms_norm_backward": 2, "qkv_norm_rope_backward": 2}
"""Of rmega's operators that are more than one kernel: the sum of the weight's partial gradients."""
INDEX = 4 * 8
"""Kernels per layer with which the gather made its index before it was made once per pack: 4 calls
(keys and values, both ways) of 4 casts, sum of lengths, cumulative sum, difference and stack. Read
from the source of that version, which kept no bookkeeping."""
WIDTH = dict(hidden_size=512, ffn_hidden_size=2048, num_attention_heads=4, num_query_groups=2)
"""InternLM2-1.8B's proportions: a d = h, a = 2 g, f = 4 h."""


class Noted(TorchDispatchMode):
    """What reaches the dispatcher, as kernels and bytes by name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        returns = [r.alias_info for r in op._schema.returns]
        view = any(info is not None and not info.is_write for info in returns)
        if name in (*GEMMS, *FREE, "detach") or view or name.startswith("_local"):
            return out
        read = {id(x): x for x in _tensors((args, kwargs or {}))}
        written = {id(x): x for x in _tensors(out)}  # in place: read and written
        self.kernels[name] += LAUNCHES.get(name, 1)
        self.bytes[name] += sum(_size(x) for x in (*read.values(), *written.values()))
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _size(x: torch.Tensor) -> int:
    """Bytes of the different elements: an expanded dimension counts once."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * torch.Size(sizes).numel()


class _Attention(torch.autograd.Function):
    """In place of varlen attention, unseen by ``Noted``: shapes only."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.shapes = q.shape, k.shape, v.shape
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.zeros(q.shape)

    @staticmethod
    def backward(ctx, grad):
        with torch.utils._python_dispatch._disable_current_modes():
            return tuple(torch.zeros(shape) for shape in ctx.shapes)


@contextlib.contextmanager
def path_of_gpus(*, fused: bool, projection: bool = True) -> Iterator[None]:
    """Within it models on the CPU take the path of GPUs; ``fused``: with the kernels that join
    several operators, ``projection``: also those from the fused projection on."""
    from rmega import ops
    from rmega.models import attention, layers, varlen

    def stand_in(q, k, v, *_):
        return _Attention.apply(q, k, v)

    changes = {
        (varlen, "varlen_function"): lambda: ("stand-in", stand_in),
        (varlen, "fuses_projection"): lambda *_: fused and projection,
        (ops, "fuses_add_rms_norm"): lambda _: fused,
        **{
            (module, "packed_attention"): lambda q, k, v, segments, scale, _="auto": (
                varlen.packed_attention_varlen(q, k, v, segments, scale, stand_in)
            )
            for module in (attention, layers)
        },
    }
    before = {place: getattr(*place) for place in changes}
    try:
        for (module, name), value in changes.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def build(layers: int, family: str = "internlm2"):
    """(config, wrapped model, optimizer, packs of a step)"""
    from benchmarks.train import draw
    from rmega import distributed
    from rmega.config import DataArgs, ModelArgs, TrainArgs, TrainingConfig
    from rmega.data.packing import pack
    from rmega.models.geometry import Geometry
    from rmega.training import components

    device = distributed.initialize()
    geometry = Geometry(
        family=family,
        qk_norm=family == "qwen3",
        num_layers=layers,
        head_dim=128,
        vocab_size=512,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        rope_theta=1e6,
        **WIDTH,
    )
    config = TrainingConfig(
        model=ModelArgs(hf_model=""), data=DataArgs(data_path=()), train=TrainArgs(train_steps=9)
    )
    chunks = components.build_model(config, geometry, dtype=torch.float32, device=device)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    wrapped = components.wrap_model(chunks, config)
    optimizer, _ = components.build_optimizer(wrapped, config, 9)
    comparisons = draw("ultrafeedback", 4, 512)
    return config, wrapped, optimizer, lambda: [pack(comparisons[:2]), pack(comparisons[2:])]


def passes(layers: int, family: str, **path: bool) -> tuple[list[Noted], int]:
    """([forward, backward], tokens) of one pack; the plan of attention is made before, as it is
    for GPUs."""
    from rmega.models.varlen import varlen_plan

    _, (model,), _, packs = build(layers, family)
    batch = packs()[0]
    for segments in (batch.segments, batch.pooled_segments):
        varlen_plan(segments, torch.device("cpu"), batch.num_tokens)
    noted = [Noted(), Noted()]
    with path_of_gpus(**path):
        with noted[0]:
            rewards = model(batch)
        with noted[1]:
            rewards.sum().backward()
    return noted, batch.num_tokens


PATHS: dict[str, tuple[str, dict[str, bool]]] = {
    "separate": ("internlm2", dict(fused=False)),
    "fused": ("internlm2", dict(fused=True)),
    "heads normalized, separate": ("qwen3", dict(fused=True, projection=False)),
    "heads normalized, fused": ("qwen3", dict(fused=True)),
}
"""Name of a path -> family of the model, and the path; "separate" also makes the index per call."""


@functools.cache
def per_layer(path: str) -> list[dict[str, Any]]:
    """Forward and backward of one layer that is neither the first nor the pruned last one."""
    family, switches = PATHS[path]
    (more, tokens), (less, _) = (passes(layers, family, **switches) for layers in (3, 2))
    unit = tokens * WIDTH["hidden_size"] * 4
    rows = []
    for name, a, b in zip(("forward", "backward"), more, less, strict=True):
        kernels, size = a.kernels - b.kernels, a.bytes - b.bytes
        index = INDEX // 2 if path == "separate" else 0
        rows.append(
            {
                "path": path,
                "pass": name,
                "kernels": kernels.total() + index,
                "of the index": index,
                "U": round(size.total() / unit, 1),
                "operators": ", ".join(
                    f"{count} {op} ({size[op] / unit:.1f} U)" for op, count in kernels.items()
                ),
            }
        )
    return rows


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
HOST = ("rmega/models/segments.py", "rmega/models/varlen.py")
"""Files that read tensors which stay on the host: the segments of a pack."""


@contextlib.contextmanager
def reads_of_the_device(places: Counter[str]) -> Iterator[None]:
    """Counts the calls that would wait for a GPU, by the line that makes them."""
    originals = {name: getattr(torch.Tensor, name) for name in READS}

    def noting(name):
        def call(self, *args, **kwargs):
            frames = traceback.extract_stack(limit=12)[:-1]
            known = ("/rmega/", "/megatron/core/")
            frame = next((f for f in reversed(frames) if any(k in f.filename for k in known)), None)
            if frame is not None:
                file = next(
                    frame.filename[frame.filename.rindex(k) + 1 :]
                    for k in known
                    if k in frame.filename
                )
                if file not in HOST:
                    places[f"{file}: {frame.line}"] += 1
            return originals[name](self, *args, **kwargs)

        return call

    try:
        for name in READS:
            setattr(torch.Tensor, name, noting(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def waits() -> Counter[str]:
    """Of one training step of two packs."""
    from rmega.training import train

    config, wrapped, optimizer, packs = build(3)
    places: Counter[str] = Counter()
    with path_of_gpus(fused=True):
        train.train_step(wrapped, optimizer, packs(), config.loss, 4)  # makes Adam's state
        batches = packs()
        with reads_of_the_device(places):
            train.train_step(wrapped, optimizer, batches, config.loss, 4)
    return places


@dataclasses.dataclass
class Result:
    layers: list[dict[str, Any]]
    waits: dict[str, int]


def count() -> Result:
    return Result([row for path in PATHS for row in per_layer(path)], dict(waits()))


def main() -> int:
    result = count()
    print(table(result.layers))
    print()
    print(table([{"waits per step": n, "where": place} for place, n in result.waits.items()]))
    save("count", {**environment(), **dataclasses.asdict(result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
