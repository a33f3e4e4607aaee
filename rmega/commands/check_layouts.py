"""Compare layouts: a few steps in each, every number against a single rank.

    python tools/check_layouts.py --hf-model MODEL --data-path PREFIX \
        --layouts "tp2 pp2 tp2,sp dp2 tp2,pp2 pp2,vpp2"

A layout is written tpN, ppN, vppN, dpN, sp, overlap, gather, plainopt, recompute, selective,
firstN, lastN, pad, joined by commas. Processes are started here, on this machine. Exit code 1 where
a difference is larger than --tolerance.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

from rmega.cli import num_cores, parse_args, run_tool

OTHER_PACKS = "1, other packs"
TOLERANCE = 1e-5


@dataclasses.dataclass(kw_only=True)
class CheckArgs:
    """Compare layouts with a single rank."""

    hf_model: str
    """Model folder or hub name."""
    data_path: tuple[str, ...]
    """Prefixes written by tools/preprocess_pref.py."""
    layouts: str = "tp2 tp2,sp pp2 dp2 tp2,pp2"
    """Layouts, separated by spaces."""
    steps: int = 3
    """Optimizer steps in each."""
    global_batch_size: int = 16
    """Comparisons per step."""
    max_tokens_per_microbatch: int = 2048
    """Most tokens in one forward pass."""
    lr: float = 1e-4
    """Learning rate."""
    tolerance: float | None = None
    """Largest difference that passes, relative to the reference's largest value. Default: 1e-5, or,
    where one rank alone differs by more from itself with a pack for each comparison and no
    shared prefix (fp32 sums of a deep model), twice that."""
    timeout_s: float = 1800.0
    """A layout that takes longer has failed."""


def work(
    rank: int,
    world_size: int,
    port: int,
    text: str,
    args: CheckArgs,
    folder: str,
    share_prefix: bool,
    environment: dict[str, str],
) -> None:
    """One rank of one layout; rank 0 leaves the result, a rank that fails leaves its reason."""
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import torch

        from rmega import distributed
        from rmega.data.batching import Mixture
        from rmega.hub import resolve_model
        from rmega.training import parity

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, num_cores() // world_size))
        torch.set_float32_matmul_precision("highest")
        distributed.quiet_megatron()
        config = parity.layout_config(
            parity.Layout.parse(text),
            hf_model=str(resolve_model(args.hf_model)),
            steps=args.steps,
            global_batch_size=args.global_batch_size,
            max_tokens=args.max_tokens_per_microbatch,
            lr=args.lr,
            share_prefix=share_prefix,
        )
        result = parity.run_layout(config, Mixture.open(args.data_path, seed=config.train.seed))
        if result is not None:
            torch.save(dataclasses.asdict(result), Path(folder, "result.pt"))
        distributed.finish()
    except BaseException as error:  # the parent reports it
        own = isinstance(error, (ValueError, OSError))
        Path(folder, f"failed_{rank}").write_text(
            str(error) if own else traceback.format_exc(), encoding="utf-8"
        )
        os._exit(2 if own else 1)


def run(text: str, args: CheckArgs, *, share_prefix: bool = True):
    """The ``LayoutResult`` of one layout. Raises ValueError, with the first failing rank's
    reason."""
    import multiprocessing

    import torch

    from rmega.training.parity import Layout, LayoutResult

    layout = Layout.parse(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked from a process that has imported torch and Megatron-Core (seconds) and done nothing;
    # torch's optimizers import its compiler when the first of them is made.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rmega.training.parity", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        common = (layout.world_size, port, text, args, folder, share_prefix, dict(os.environ))
        ranks = [
            context.Process(target=work, args=(rank, *common)) for rank in range(layout.world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + args.timeout_s
        try:
            while any(p.is_alive() for p in ranks) and time.monotonic() <= deadline:
                if any(p.exitcode for p in ranks):
                    break
                time.sleep(0.05)
            reasons = sorted(
                Path(folder).glob("failed_*"), key=lambda path: path.stat().st_mtime_ns
            )
            if reasons:
                raise ValueError(f"layout {text}: {reasons[0].read_text(encoding='utf-8').strip()}")
            for process in ranks:
                if process.exitcode:
                    raise ValueError(
                        f"layout {text}: a rank ended with exit code {process.exitcode}"
                    )
            if any(p.is_alive() for p in ranks):
                raise ValueError(f"layout {text}: not done after {args.timeout_s:g} s")
        finally:
            for process in ranks:
                process.kill()
        return LayoutResult(**torch.load(Path(folder, "result.pt"), weights_only=False))


def row(seen: dict[str, float]) -> str:
    """The differences as cells of the table."""
    return " ".join(
        f"{seen[k]:>9.1e}" for k in ("loss", "grad_norm", "gradient", "parameter", "reward")
    )


def main() -> int:
    args = parse_args(CheckArgs, description=__doc__)

    from rmega.training.parity import Layout, compare, worst_gradient

    texts = args.layouts.split()
    for text in texts:
        Layout.parse(text)  # all are understood before the first is run
    reference = run("1", args)
    print(
        f"one rank: loss {' '.join(f'{x:.7f}' for x in reference.losses)}; gradient norm "
        f"{' '.join(f'{x:.6g}' for x in reference.grad_norms)}\n"
    )
    # The same sums in another order: what fp32 itself does to this model. A pack for each
    # comparison, because packs of fewer tokens are the same packs where a step has few comparisons;
    # and no prefix shared, because other packs alone leave the sums inside a comparison as they
    # were, while a layout changes those, too.
    apart = dataclasses.replace(args, max_tokens_per_microbatch=1)
    rounding = compare(run("1", apart, share_prefix=False), reference)
    width = max(len(OTHER_PACKS), *(len(text) for text in texts))
    print(
        f"{'layout':<{width}} {'last loss':>11} {'grad norm':>11}    largest relative difference"
        f" of\n{'':<{width}} {'':>11} {'':>11}  {'loss':>9} {'grad norm':>9} {'gradient':>9}"
        f" {'parameter':>9} {'reward':>9}\n{OTHER_PACKS:<{width}} {'':>11} {'':>11} "
        f" {row(rounding)}",
        flush=True,
    )
    limits = {
        name: args.tolerance if args.tolerance is not None else max(TOLERANCE, 2 * noise)
        for name, noise in rounding.items()
    }
    bad = 0
    for text in texts:
        try:
            result = run(text, args)
        except ValueError as error:
            print(f"{text:<{width}} failed: {error}", flush=True)
            bad += 1
            continue
        seen = compare(result, reference)
        good = all(value <= limits[name] for name, value in seen.items())  # False for nan
        bad += not good
        print(
            f"{text:<{width}} {result.losses[-1]:>11.7f} {result.grad_norms[-1]:>11.6g} "
            f" {row(seen)}"
            + ("  ok" if good else f"  DIFFERS (gradient of {worst_gradient(result, reference)})"),
            flush=True,
        )
    wider = {name: limit for name, limit in limits.items() if limit > (args.tolerance or TOLERANCE)}
    print(
        f"\n{len(texts) - bad} of {len(texts)} layouts give one rank's numbers to"
        f" {args.tolerance or TOLERANCE:g}"
        + "".join(
            f", {name} to {limit:.1e} (twice what other packs change)"
            for name, limit in wider.items()
        )
    )
    return 1 if bad else 0


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main)
