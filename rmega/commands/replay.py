"""Repeat a batch whose gradient was not finite, one comparison at a time.

python tools/replay.py RUN/skipped_120.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from tyro.conf import Positional

from rmega.cli import parse_args, run_tool
from rmega.config import TrainingConfig


@dataclasses.dataclass(kw_only=True)
class ReplayArgs:
    """Repeat a batch whose gradient was not finite."""

    file: Positional[str]
    """skipped_STEP.json of a run folder."""


@dataclasses.dataclass
class Row:
    """One comparison: its loss, gradient norm and rewards."""

    document: int
    tokens: int
    loss: float
    grad_norm: float
    rewards: list[float]

    @property
    def finite(self) -> bool:
        return all(math.isfinite(x) for x in (self.loss, self.grad_norm, *self.rewards))


def replay(file: str | Path) -> list[Row]:
    """Loss, gradient norm and rewards of every comparison of the batch, each computed alone, on one
    process; ``--batch-centering`` then takes the mean of that comparison's rewards."""
    path = Path(file)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        documents, folder = kept["documents"], path.parent / kept["checkpoint"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a file that a run left for replaying ({error})") from None
    from rmega import precision
    from rmega.checkpointing import checkpoint, run_folder
    from rmega.data.batching import Mixture
    from rmega.training import components, parity, resume, train

    config = TrainingConfig.from_dict(kept["config"])
    layout = parity.Layout.parse("1")
    config.parallel = dataclasses.replace(
        parity.layout_config(
            layout,
            hf_model=config.model.hf_model,
            steps=1,
            global_batch_size=1,
            max_tokens=1,
            lr=1.0,
        ).parallel,
        recompute=config.parallel.recompute,
    )
    dtype = precision.DTYPES[resume.precision_of(run_folder.read_info(folder))]
    config.train.train_steps, config.train.train_epochs = 1, None
    wrapped, optimizer, _, geometry, device = parity.build(config, dtype)
    checkpoint.load(folder, wrapped=wrapped)
    batcher = components.make_batcher(
        config, Mixture.open(config.data.data_path, seed=config.train.seed), geometry
    )
    rows = []
    for document in documents:
        pack = batcher.pack([document], consumed=kept.get("consumed")).to(device)
        optimizer.zero_grad()
        sums = train.forward_backward(wrapped, [pack], config.loss)
        terms = max(sums["num_terms"], 1.0)
        squares = [
            p.main_grad.double().square().sum().item()
            for p in wrapped[0].parameters()
            if p.requires_grad
        ]
        norm = math.sqrt(sum(squares)) / terms
        ((_, rewards),) = train.run_schedule(
            wrapped, [pack], train.forward_rewards, forward_only=True
        )
        rows.append(
            Row(
                document,
                pack.num_tokens,
                (sums["base_loss"] + sums["penalty"]) / terms,
                norm,
                [round(x, 6) for x in rewards.tolist()],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """A line per comparison; those that are not finite are marked."""
    lines = ["comparison   tokens         loss    grad norm  rewards"]
    for row in rows:
        lines.append(
            f"{row.document:>10} {row.tokens:>8} {row.loss:>12.6g} {row.grad_norm:>12.6g}  "
            f"{' '.join(f'{r:.4g}' for r in row.rewards)}"
            f"{'' if row.finite else '   <-- not finite'}"
        )
    bad = [row.document for row in rows if not row.finite]
    return "\n".join(
        [*lines, f"not finite: {bad}" if bad else "all comparisons are finite, each computed alone"]
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(ReplayArgs, argv, prog="tools/replay.py", description=__doc__)
    print(table(replay(args.file)))


def cli() -> int:
    """Parse the command line, run, return the exit code."""
    return run_tool(main)
