"""Verification: every written value is the checkpoint's, and stock transformers reproduces the
rewards.

Both sides compute in fp32 on the same rounded weights, so that one tolerance serves every dtype:
what remains is summation order. What rounding the weights does to the rewards is measured
separately. Where the checkpoint holds the rewards that the training itself computed for the
comparisons, the checkpoint's weights must reproduce them, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rmega.config import MIN_COMPARISONS
from rmega.export.adapters import compare_peft
from rmega.export.average import MeanTensors, Part, weights_of
from rmega.export.checkpoint_tensors import GlobalTensors
from rmega.export.rewards import rewards_of_parts, transformers_rewards
from rmega.export.write_weights import DTYPES, hf_rows
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf import HfFolder, source_names

TOLERANCE = 1e-4
"""Largest difference of a reward that is accepted, relative to the largest reward among the
comparisons."""
TRAINING_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""The same for the rewards that the training computed, by the dtype of its arithmetic: other
layouts and kernels, and weights and activations that were rounded.

Largest differences measured (tests/training/test_verification_rewards.py: 3 checkpoints in each of
5 layouts): fp32 7.4e-7, bf16 2.8e-2; random models of 2 to 24 layers in bf16: 1.3e-2. fp16, not
measured, has three more bits than bf16."""


@dataclasses.dataclass(kw_only=True)
class Verification:
    """Result of a verification. ``relative_difference`` is compared with ``tolerance``."""

    passed: bool
    comparisons: int
    held_out: int
    """How many of the comparisons the training did not see."""
    random: bool = False
    """Whether they are random tokens, because exports hold no comparisons."""
    responses: int
    largest_difference: float
    largest_reward: float
    relative_difference: float
    tolerance: float
    rounding_effect: float
    """Largest change of a reward by rounding the weights to the dtype of the files."""
    training_difference: float | None
    """Largest difference of the checkpoint's rewards from those that the training computed,
    relative to the largest; None where the checkpoint holds none."""
    weights: str
    """One sentence on the comparison of the written values."""
    transformers: str
    reason: str = ""
    """Why it did not pass."""
    example_reward: float | None = None
    """Reward of the recipe's example, by the training path with the written weights."""


def compare_weights(
    source: GlobalTensors, folder: Path, geometry: Geometry, dtype: str
) -> tuple[str, bool]:
    """Read the written files again, one tensor at a time: (a sentence, whether every value is that
    of ``source``)."""
    owner = "mean" if isinstance(source, MeanTensors) else "checkpoint"
    kind = DTYPES[dtype][0]
    bits = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    table, compared = BACKBONES[geometry.family].weight_table(geometry), 0
    written = HfFolder(folder)
    names = source_names(written.files, geometry, folder)
    for part, rows in hf_rows(source, table):
        theirs = written.read(names[part.name], part.start, part.stop)
        ours = rows.to(kind)
        if theirs.dtype != kind or not torch.equal(ours.view(bits), theirs.contiguous().view(bits)):
            file = written.files[names[part.name]]
            return f"{part.name} in {file} is not the {owner}'s.", False
        compared += ours.numel()
        del rows, theirs, ours  # before the next are read
    return f"All {compared:,} written values are the {owner}'s, rounded to {dtype}.", True


def random_comparisons(
    geometry: Geometry, reward_token_id: int | None, pad_token_id: int
) -> list[dict[str, Any]]:
    """``MIN_COMPARISONS`` comparisons of random tokens, the same at every call, to verify with
    where a part holds none. Ids other than the reward and the pad token; the reward token ends
    each response."""
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor(sorted(set(range(geometry.vocab_size)) - {reward_token_id, pad_token_id}))

    def ids(most: int) -> list[int]:
        count = int(torch.randint(1, most + 1, (), generator=generator))
        return usable[torch.randint(len(usable), (count,), generator=generator)].tolist()

    most = min(64, geometry.max_position_embeddings // 2 - 1)
    end = [] if reward_token_id is None else [reward_token_id]
    return [
        {"prefix": ids(most), "suffixes": [[*ids(most), *end] for _ in range(2)]}
        for _ in range(MIN_COMPARISONS)
    ]


def verify_export(
    parts: Sequence[Part],
    folder: Path,
    geometry: Geometry,
    dtype: str,
    *,
    pad_token_id: int,
    example: Sequence[int] | None = None,
    as_adapter: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Compare a written folder with the checkpoint, or the mean of the parts, that it was made of.
    ``geometry`` is that of the folder (its family may be another). ``as_adapter``: a folder of
    peft. ``example``: ids of one more sequence, whose reward is reported.

    The comparisons are those that the first checkpoint holds; exports hold none, and their mean is
    verified with random tokens.
    """
    import transformers

    info, averaged = parts[0].info, len(parts) > 1
    if made := parts[0].is_export:
        kept = random_comparisons(geometry, info["reward_token_id"], pad_token_id)
    else:
        kept = info.get("verification") or ()
    items = [
        [[*comparison["prefix"], *suffix] for suffix in comparison["suffixes"]]
        for comparison in kept
    ]
    items += [[list(example)]] if example else []
    sequences = [sequence for item in items for sequence in item]
    say(f"comparing every written value with the {'mean' if averaged else 'checkpoint'}")
    base = parts[0].base_model if as_adapter else None
    if base:
        sentence, equal = compare_peft(parts[0].folder, info, folder, geometry)
    else:
        sentence, equal = compare_weights(weights_of(parts), folder, geometry, dtype)
    say(f"scoring {len(sequences)} responses by the training path")
    rewards = rewards_of_parts(parts, items, list(dict.fromkeys(("float32", dtype))))
    exact, rounded = rewards[0], rewards[-1]
    say(f"scoring them by transformers {transformers.__version__} from {folder}")
    served = transformers_rewards(folder, geometry, sequences, pad_token_id, adapter_of=base)
    largest = scale = torch.zeros(())
    if sequences:
        largest, scale = (served - rounded).abs().max(), rounded.abs().max()
    relative = (largest / scale if scale > 0 else largest).item()
    # No training computed the rewards of a mean.
    drift = None if averaged else training_difference(kept, exact)
    allowed = TRAINING_TOLERANCE.get(_training_dtype(info), 0.0)
    reasons = []
    if not equal:
        reasons.append(sentence)
    if not relative <= TOLERANCE:
        reasons.append(f"Rewards differ by {relative:.3g} relative, more than {TOLERANCE:.0e}.")
    if drift is not None and not drift <= allowed:
        reasons.append(
            f"Rewards of the checkpoint differ from those of its training by {drift:.3g} relative,"
            f" more than {allowed:.0e}."
        )
    if len(kept) < MIN_COMPARISONS:
        reasons.append(
            f"The checkpoint holds {len(kept)} comparisons to verify with; at least"
            f" {MIN_COMPARISONS} are needed (--num-verification-comparisons of the training)."
        )
    return Verification(
        passed=not reasons,
        comparisons=len(kept),
        held_out=0 if made else sum(x.get("held_out", True) for x in kept),
        random=made,
        responses=len(sequences),
        largest_difference=largest.item(),
        largest_reward=scale.item(),
        relative_difference=relative,
        tolerance=TOLERANCE,
        rounding_effect=(exact - rounded).abs().max().item() if sequences else 0.0,
        training_difference=drift,
        weights=sentence,
        transformers=transformers.__version__,
        reason=" ".join(reasons),
        example_reward=rounded[-1].item() if example else None,
    )


def _training_dtype(info: dict[str, Any]) -> str:
    """The dtype that a training's matmuls rounded to: fp32 ones may round to TF32 or bf16."""
    setting = info.get("config", {}).get("train", {}).get("matmul_precision")
    dtype = info.get("dtype", "float32")
    return "bfloat16" if dtype == "float32" and setting in ("high", "medium") else dtype


def training_difference(kept: Sequence[dict[str, Any]], rewards: torch.Tensor) -> float | None:
    """Largest difference between ``rewards`` [n] of the kept comparisons' responses (n may be
    larger) and the field ``rewards`` of those comparisons, relative to the largest of these."""
    pairs, at = [], 0
    for comparison in kept:
        computed = comparison.get("rewards")
        count = len(comparison["suffixes"])
        if computed is not None:
            if len(computed) != count:
                return float("nan")
            pairs += zip(computed, rewards[at : at + count].tolist(), strict=True)
        at += count
    if not pairs:
        return None
    theirs, ours = torch.tensor(pairs).unbind(dim=1)
    scale = theirs.abs().max()
    difference = (theirs - ours).abs().max()
    return (difference / scale if scale > 0 else difference).item()
