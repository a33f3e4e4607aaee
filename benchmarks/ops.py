"""Each operator against eager torch and torch.compile: the same inputs, interleaved, the fastest of
the rounds.

    python benchmarks/ops.py --threads 2
    python benchmarks/ops.py --device cuda --output results/ops-h100.json

Prints a table and writes JSON with device, versions, commit and command. Eager is the operator's
``_ref`` in plain torch; a time is that of one call including its dispatch. GB/s counts what must be
read and written once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

sys.path.insert(0, __file__.rsplit("/", 2)[0])

from benchmarks.common import environment  # noqa: E402
from rmega.cli import parse_args, run_tool  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Args:
    """Time the operators of rmega."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 9
    """Rounds; in each, every implementation of a case is timed once."""
    min_time: float = 0.01
    """Seconds that one timing lasts at least (short calls are repeated)."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of this process, for one thread on a machine that others use too."""
    only: str = ""
    """Only cases whose name contains this text."""
    compile: bool = True
    """Also time torch.compile of the reference (takes minutes)."""
    output: Path | None = None
    """JSON file; none by default. Rewritten after each operator."""
    models: tuple[Literal["135M", "1.8B"], ...] = ("135M", "1.8B")
    """Shapes of SmolLM2-135M, of InternLM2-1.8B."""


@dataclasses.dataclass
class Case:
    """One row: ``run[name]()`` is one timed call."""

    name: str
    shape: str
    dtype: str
    num_bytes: int
    run: dict[str, Callable[[], object]]


# t tokens, h hidden, f MLP, a heads, g groups, d head size: SmolLM2-135M, and InternLM2-1.8B.
MODELS = {
    "135M": dict(h=576, f=1536, a=9, g=3, d=64),
    "1.8B": dict(h=2048, f=8192, a=16, g=8, d=128),
}


def forward_and_backward(
    name: str,
    shape: str,
    dtype,
    num_bytes: tuple[int, int],
    forms: dict[str, Callable],
    inputs: tuple,
    wrt: tuple[int, ...],
) -> list[Case]:
    """Three cases: calls with grad enabled, backward alone through a kept graph, and one call with
    its backward (an operator that makes its gradient on the way forward shifts work from the
    second into the first).
    """
    import torch

    inputs = tuple(
        x.requires_grad_(i in wrt) if isinstance(x, torch.Tensor) else x
        for i, x in enumerate(inputs)
    )
    leaves = [inputs[i] for i in wrt]

    def differentiable(out):
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    forward, backward, both = {}, {}, {}
    for form, op in forms.items():
        out = differentiable(op(*inputs))
        grad = [torch.ones_like(x) if x.dim() == 0 else torch.randn_like(x) for x in out]
        forward[form] = lambda op=op: op(*inputs)
        backward[form] = lambda out=out, grad=grad: torch.autograd.grad(
            out, leaves, grad, retain_graph=True
        )

        def call_and_backward(op=op, grad=grad):
            torch.autograd.grad(differentiable(op(*inputs)), leaves, grad)

        both[form] = call_and_backward
    label = str(dtype).removeprefix("torch.")
    return [
        Case(name, shape, label, num_bytes[0], forward),
        Case(f"{name} backward", shape, label, num_bytes[1], backward),
        Case(f"{name} both", shape, label, sum(num_bytes), both),
    ]


def cases(args: Args):
    """Yields lists of cases, made when they are needed, so that one case's tensors are gone before
    the next."""
    import torch

    from rmega import ops

    def forms(name: str, **options) -> dict[str, Callable]:
        native, reference = getattr(ops, name), getattr(ops, f"{name}_ref")
        made = {
            "native": lambda *x: native(*x, **options),
            "eager": lambda *x: reference(*x, **options),
        }
        if args.compile:
            torch._dynamo.reset()
            made["compile"] = torch.compile(made["eager"], dynamic=False)
        return made

    device = args.device
    cuda = device == "cuda"
    dtypes = [torch.float32, torch.bfloat16]
    for m in (4, 64, 1024, 16384):
        for options in (dict(loss="ranking"), dict(loss="focal", penalty="log_barrier")):
            rewards = torch.randn(2 * m, device=device)
            index = torch.arange(2 * m, device=device).view(m, 2).t().contiguous()
            margin, weight = torch.zeros(m, device=device), torch.ones(m, device=device)
            yield forward_and_backward(
                f"pairwise_loss {options['loss']}",
                f"m={m}",
                rewards.dtype,
                (40 * m, 16 * m),
                forms("pairwise_loss", **options),
                (rewards, *index, margin, weight),
                (0,),
            )
    for model in args.models:
        size = MODELS[model]
        t, h, f, a, g, d = 8192 if cuda else 2048, *size.values()
        n = t // 128
        for dtype in dtypes:
            e = torch.empty((), dtype=dtype).element_size()

            def random(*shape, dtype=dtype):
                return torch.randn(*shape, device=device).to(dtype)

            last = torch.arange(n, device=device) * 128 + 127
            yield forward_and_backward(
                "gather_last_token",
                f"{model} t={t} n={n}",
                dtype,
                (2 * n * h * e, t * h * e),
                forms("gather_last_token"),
                (random(t, h), last),
                (0,),
            )
            # Comparisons of 1,024 tokens: a prefix of 512, two responses of 256.
            starts = torch.arange(0, t, 1024)
            segments = (
                torch.stack([starts] * 3, 1),
                torch.tensor([[0, 512, 512]]).expand(len(starts), 3),
                torch.stack([starts, starts + 512, starts + 768], 1),
                torch.tensor([[512, 256, 256]]).expand(len(starts), 3),
            )
            segments = tuple(x.reshape(-1).to(torch.int32) for x in segments)
            index = ops.prefix_index(*segments, t).to(device)  # once per pack
            segments = tuple(x.to(device) for x in segments)
            row = g * d * e
            gathers = forms("gather_prefix_kv")
            gathers["native"] = lambda *x, index=index: ops.gather_prefix_kv(*x, index=index)
            yield forward_and_backward(
                "gather_prefix_kv",
                f"{model} t={t}",
                dtype,
                (4 * t * row, 3 * t * row),
                gathers,
                (random(t, g, d), *segments, 2 * t),
                (0,),
            )
            if cuda:  # on a CPU they are the operators beside them
                fused = (a + 4 * g) * d * t * e  # each gathered row is read and written
                yield forward_and_backward(
                    "qkv_rope",
                    f"{model} t={t}",
                    dtype,
                    (2 * fused, fused + (a + 2 * g) * d * t * e),
                    forms("qkv_rope", index=index, heads=a, groups=g),
                    (random(t, (a + 2 * g) * d), random(t, d // 2), random(t, d // 2)),
                    (0,),
                )
                yield forward_and_backward(
                    "add_rms_norm",
                    f"{model} t={t}",
                    dtype,
                    (4 * t * h * e, 4 * t * h * e),
                    forms("add_rms_norm", eps=1e-5),
                    (random(t, 1, h), random(t, 1, h), random(h)),
                    (0, 1, 2),
                )
            yield forward_and_backward(
                "rms_norm",
                f"{model} t={t}",
                dtype,
                (2 * t * h * e, 3 * t * h * e),
                forms("rms_norm", eps=1e-5),
                (random(t, 1, h), random(h)),
                (0, 1),
            )
            yield forward_and_backward(
                "swiglu",
                f"{model} t={t}",
                dtype,
                (3 * t * f * e, 5 * t * f * e),
                forms("swiglu"),
                (random(t, 1, 2 * f),),
                (0,),
            )
            yield forward_and_backward(
                "rope",
                f"{model} t={t}",
                dtype,
                (2 * t * a * d * e, 2 * t * a * d * e),
                forms("rope"),
                (random(t, a, d), random(t, d // 2), random(t, d // 2)),
                (0,),
            )


def time_case(case: Case, args: Args) -> dict[str, list[float]]:
    """Seconds of one call, per implementation and round."""
    import time

    import torch

    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    cuda = args.device == "cuda"
    # On a GPU each call starts with inputs in memory, as in a model: a cache of 50 MB or so would
    # hold those of the call before. The events leave the clearing out.
    cache = torch.empty(256 * 2**20 if cuda else 0, dtype=torch.uint8, device=args.device)

    def elapsed(call, count: int) -> float:
        if not cuda:
            start = clock()
            for _ in range(count):
                call()
            return (clock() - start) / count
        events = []
        for _ in range(count):
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / count / 1e3

    counts, times = {}, {form: [] for form in case.run}
    for form, call in case.run.items():
        elapsed(call, 2)
        counts[form] = max(1, round(args.min_time / max(elapsed(call, 2), 1e-7)))
    for _ in range(args.repeats):
        for form, call in case.run.items():
            times[form].append(elapsed(call, counts[form]))
    return times


def keep_pages() -> None:
    """Let the C library keep freed memory: else every tensor above 32 MB is given back and its
    pages are faulted in anew at each call, which takes longer than any operator here, in every
    implementation alike."""
    import ctypes

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main(args: Args) -> int:
    import statistics

    import torch

    from rmega import ops

    torch.set_num_threads(args.threads)
    if ops.active_implementation(args.device) != "native":
        raise ValueError(f"--device {args.device}: the native operators are not built for it")
    keep_pages()
    torch.manual_seed(0)
    provenance = {
        **environment(args.device),
        "instructions": ops.implementation._C.elementwise_isa(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    rows, forms = [], ("native", "eager", "compile") if args.compile else ("native", "eager")
    print(
        f"{'operator':32}{'shape':18}{'dtype':10}"
        + "".join(f"{form + ' us':>12}" for form in forms)
        + "".join(f"{form + ' x':>11}" for form in forms[1:])
        + f"{'GB/s':>8}"
    )
    for group in cases(args):
        for case in group:
            if args.only not in case.name:
                continue
            rounds = time_case(case, args)
            # The fastest round: what else runs on the machine only ever adds.
            times = {form: min(values) for form, values in rounds.items()}
            ratio = {form: times[form] / times["native"] for form in forms[1:]}
            rate = case.num_bytes / times["native"] / 1e9
            rows.append(
                {
                    "operator": case.name,
                    "shape": case.shape,
                    "dtype": case.dtype,
                    "seconds": times,
                    "median": {form: statistics.median(values) for form, values in rounds.items()},
                    "ratio": ratio,
                    "gb_per_s": rate,
                }
            )
            print(
                f"{case.name:32}{case.shape:18}{case.dtype:10}"
                + "".join(f"{seconds * 1e6:12.1f}" for seconds in times.values())
                + "".join(f"{value:11.2f}" for value in ratio.values())
                + f"{rate:8.1f}",
                flush=True,
            )
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({**provenance, "rows": rows}, indent=1) + "\n")
    slower = [row for row in rows if min(row["ratio"].values()) < 1]
    print(f"\n{len(rows)} rows; native is slower than eager or compiled torch in {len(slower)}:")
    for row in slower:
        print(
            f"  {row['operator']} {row['shape']} {row['dtype']}: "
            + ", ".join(f"{form} {ratio:.2f}x" for form, ratio in row["ratio"].items())
        )
    if args.output:
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, parse_args(Args)))
