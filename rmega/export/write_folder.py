"""Write an export's folder: weights or adapters, tokenizer, configuration, license; all but the
card and the recipe's last fields."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rmega.distributed import log
from rmega.export.adapters import base_name, tensor, write_peft
from rmega.export.average import Part, weights_of
from rmega.export.checkpoint_tensors import CheckpointTensors
from rmega.export.folder import check_pad, make_recipe, write_config
from rmega.export.tokenizer import write_tokenizer
from rmega.export.write_weights import export_weights
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.models.hf import TIE_THRESHOLD
from rmega.models.weights import WeightRule


def write_folder(
    parts: Sequence[Part],
    partial: Path,
    geometry: Geometry,
    dtype: str,
    shard_bytes: int,
    as_adapter: bool,
    output: Path,
) -> dict[str, Any]:
    """Write into ``partial`` all files of the export ``output`` but card and recipe; returns the
    recipe as far as it is known."""
    started, folders = time.perf_counter(), [part.folder for part in parts]
    folder, info, files = parts[0].folder, parts[0].info, parts[0].files
    render_only = not BACKBONES[geometry.family].code
    example = write_tokenizer(files, partial, info, render_only=render_only)
    if example is None:
        log(
            f"{files} holds no tokenizer: put the one of the training into the output folder"
            " yourself"
        )
    elif example["template_ends_with_pad_token"]:
        log(
            f"the chat template ends with the pad token {example['pad_token']} (id"
            f" {info['pad_token_id']}): rewards are read before it, as in the model that the"
            " training began with"
        )
    elif example["pad_token_id"] != info["pad_token_id"]:
        log(
            f"pad token: {example['pad_token']} (id {example['pad_token_id']}), because id"
            f" {info['pad_token_id']} occurs in texts, where transformers 4 would read the"
            " reward before it"
        )
        info = {**info, "pad_token_id": example["pad_token_id"]}
    elif info["pad_token_id"] in example["token_ids"] and render_only:
        log(
            f"warning: pad token {example['pad_token']} (id {info['pad_token_id']}) occurs in"
            " texts and the tokenizer has no free one: transformers 4 would read rewards too"
            " early (5 does not; nor does --format internlm2)"
        )
    check_pad(info)
    if as_adapter:
        writer = write_peft(folder, info, geometry, partial)
    else:
        write_config(partial, geometry, info, dtype)
        writer = export_weights(
            weights_of(parts), geometry, partial, dtype=dtype, max_shard_bytes=shard_bytes
        )
    for file in sorted(files.glob("LICENSE*")):
        shutil.copyfile(file, partial / file.name)
    recipe = make_recipe(info=info, geometry=geometry, dtype=dtype, checkpoint=folder.resolve())
    if as_adapter:
        recipe["adapter_of"] = base_name(info)
    if (threshold := _tie_threshold(parts)) is not None:
        recipe["tie_threshold"] = threshold
    if len(parts) > 1:  # nothing that was measured of the first is true of the mean
        recipe |= {
            "average_of": [f"{f.resolve().parent.name}/{f.resolve().name}" for f in folders],
            "evaluation": [],
            "held_out_rewards": None,
            "comparisons_seen": None,
        }
    if example:
        recipe |= {
            key: example[key]
            for key in (
                "reward_token",
                "pad_token",
                "template_writes_reward_token",
                "template_ends_with_pad_token",
            )
        }
        recipe["example"] = {key: example[key] for key in ("messages", "text", "token_ids")}
    log(
        f"wrote {output}: {'adapter of ' * as_adapter}{recipe['architecture']}, {dtype},"
        f" {writer.total_size / 1e9:.2f} GB in"
        f" {len(writer.files)} file{'s' if len(writer.files) > 1 else ''},"
        f" {time.perf_counter() - started:.1f} s, from {', '.join(map(str, folders))}"
    )
    return recipe


def _tie_threshold(parts: Sequence[Part]) -> float | None:
    """eta of a run with ``--loss rao_kupper``, None for others and for means. Rewards do not depend
    on it; the probability of a tie does."""
    if len(parts) > 1 or TIE_THRESHOLD not in (source := CheckpointTensors(parts[0].folder)):
        return None
    value = tensor(source, WeightRule(TIE_THRESHOLD, (1,), ()))
    return torch.nn.functional.softplus(value).item()
