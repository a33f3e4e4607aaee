"""Disk space that the checkpoints of a run will take."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from rmega.checkpointing.run_folder import list_iterations
from rmega.config import TrainingConfig
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.training.plan import plan_stages

FRAME = 2500  # bytes that describe one stored tensor; they count in tiny models alone


def checkpoint_bytes(
    config: TrainingConfig,
    geometry: Geometry,
    *,
    bytes_per_element: int,
    files: Sequence[Path] = (),
) -> int:
    """Bytes of one checkpoint: weights, an fp32 copy of them, Adam's two moments, and the ``files``
    that are copied along; nothing of frozen weights. The same in every layout but for what padding
    adds.

    The distributed optimizer stores its fp32 copy also where the weights are fp32 themselves.
    """
    p = config.parallel
    stages = plan_stages(
        config, geometry, replicas=1, bytes_per_element=bytes_per_element, tokens=0, microbatches=1
    )
    main_copy = 4 if bytes_per_element == 2 or p.use_distributed_optimizer else 0
    # The head, of fp32 in every precision, is too small to count.
    tensors = p.tensor_model_parallel_size * sum(
        (bytes_per_element + 8 + main_copy) * s.trained for s in stages
    )
    layers = 11 * geometry.num_layers  # tensors of adapters on every linear layer
    if not config.lora.lora_rank:
        layers = len(BACKBONES[geometry.family].weight_table(geometry))
    frames = 4 * layers * FRAME
    return tensors + frames + sum(file.stat().st_size for file in files)


def to_come(
    config: TrainingConfig, *, first: int, steps: int, best_of_evaluations: bool
) -> tuple[int, int, int]:
    """(fewest, most) checkpoints that will be written after step ``first``, and the most that lie
    there at a time.

    Between them are those of evaluations that turn out the best so far. With --keep-last the newest
    stay, the best one beside them, and the oldest goes when the next has been written.
    """
    c, interval = config.checkpoint, config.train.eval_interval

    def multiples(of: int) -> int:
        return (steps - 1) // of - first // of if of else 0

    due = multiples(c.save_interval) + (first < steps)
    best = 0
    if c.save_best and best_of_evaluations and interval:
        best = multiples(interval) - (
            multiples(math.lcm(interval, c.save_interval)) if c.save_interval else 0
        )
    at_once = due + best
    if c.keep_last:
        at_once = min(at_once, c.keep_last + 1 + bool(best))
    return due, due + best, at_once


def announce(
    config: TrainingConfig, size: int, *, first: int, steps: int, best_of_evaluations: bool
) -> list[str]:
    """The lines for the log: size and number of the checkpoints and the room at --save, and a
    warning if they do not fit there."""
    run, keep = config.checkpoint.save, config.checkpoint.keep_last
    fewest, most, at_once = to_come(
        config, first=first, steps=steps, best_of_evaluations=best_of_evaluations
    )
    if keep:  # checkpoints that the run resumes with make room
        at_once = max(min(most, 1), at_once - len(list_iterations(run)))
    free, need = shutil.disk_usage(run).free, at_once * size
    number = (
        f"{fewest} to {most} are" if fewest < most else f"{most} {'is' if most == 1 else 'are'}"
    )
    kept = f", with --keep-last {keep} at most {at_once} more at a time" if at_once < most else ""
    lines = [
        f"disk: a checkpoint takes about {gigabytes(size)}, {number} to come{kept}:"
        f" {gigabytes(need)}; {gigabytes(free)} free at {run}"
    ]
    if need > free:
        sure = fewest * size > free and not keep
        lines.append(
            f"warning: --save {run}: the checkpoints {'will' if sure else 'may'} not fit there;"
            " --keep-last, --no-save-best and a larger --save-interval need less"
        )
    return lines


def gigabytes(size: float) -> str:
    """``1.84 GB``, or megabytes where these are few."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
