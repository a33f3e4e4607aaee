"""The exported folder's other files: configuration, modeling code, recipe.

Everything is written so that transformers 4.44 and 5 both read it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rmega import __version__
from rmega.checkpointing.run_folder import INFO, read_info
from rmega.evaluation.files import eval_rows
from rmega.hub import RECIPE, read_recipe
from rmega.io import json_checksum
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry

RECIPE_VERSION = 1


def check_pad(info: dict[str, Any]) -> None:
    """ValueError if padding and reward token are the same: the pooled token could not be found in a
    batch. ``info`` is the checkpoint's rmega.json."""
    if info["pad_token_id"] == info["reward_token_id"]:
        raise ValueError(
            f"pad_token_id and reward_token_id are both {info['pad_token_id']}: a padded batch"
            " would be read at the wrong token"
        )


def write_config(folder: Path, geometry: Geometry, info: dict[str, Any], dtype: str) -> None:
    """``config.json`` and the files of modeling code that it names, if any. ``info`` is the
    checkpoint's rmega.json."""
    config = BACKBONES[geometry.family].export_config(
        geometry,
        info.get("hf_config") or {},
        dtype=dtype,
        reward_token_id=info["reward_token_id"],
        pad_token_id=info["pad_token_id"],
    )
    write_json(folder / "config.json", config)
    for file in BACKBONES[geometry.family].code:
        shutil.copyfile(file, folder / file.name)


def evaluations(run: Path, iteration: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: for each held-out set, the first evaluation and the last one up to
    ``iteration``."""
    first, last = {}, {}
    for row in eval_rows(run):
        if row.get("step", 0) <= iteration:
            first.setdefault(row.get("name"), row)
            last[row.get("name")] = row
    rows = [row for name in last for row in (first[name], last[name])]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def held_out_rewards(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean and standard deviation of all rewards of the first held-out set at its last evaluation:
    {"mean", "std", "set", "step"}; None where none recorded them. ``rows`` are `evaluations`."""
    first = [row for row in rows if row.get("name") == rows[0].get("name")]
    known = [row for row in first if row.get("reward_std") is not None]
    if not known:
        return None
    row = known[-1]
    values = {"mean": row["reward_mean"], "std": row["reward_std"]}
    return {**values, "set": row.get("name"), "step": row.get("step")}


def rewards_of_model(folder: Path) -> dict[str, Any] | None:
    """`held_out_rewards` of an export, or of a checkpoint in its run."""
    if (recipe := read_recipe(folder)) is not None:
        return held_out_rewards(recipe.get("evaluation") or [])
    if not (folder / INFO).is_file():
        return None
    return held_out_rewards(evaluations(folder.parent, read_info(folder)["iteration"]))


def max_model_len(geometry: Geometry, max_length: int | None) -> int:
    """Tokens that a serving engine should admit: those of the training, where the engine takes so
    many. Engines multiply the positions of linearly scaled rotary embeddings by their factor."""
    scaling, positions = geometry.rope_scaling, geometry.max_position_embeddings
    if scaling.rope_type == "linear":
        positions = int(positions * scaling.factor)
    return min(max_length or geometry.max_position_embeddings, positions)


def make_recipe(
    *, info: dict[str, Any], geometry: Geometry, dtype: str, checkpoint: Path
) -> dict[str, Any]:
    """The content of ``reward_recipe.json``: all that a client or a later training must know to get
    the same rewards. Example, verification and list of files are added as they are made."""
    manifest = dict(info.get("manifest") or {})
    return {
        "format_version": RECIPE_VERSION,
        "written_by": f"rmega {__version__}",
        "architecture": BACKBONES[geometry.family].architecture,
        "dtype": dtype,
        "base_model": info.get("base_model"),
        "checkpoint": checkpoint.name,
        "iteration": info["iteration"],
        "comparisons_seen": info.get("consumed"),
        "reward_token_id": info["reward_token_id"],
        "reward_token": None,
        "template_writes_reward_token": False,
        "template_ends_with_pad_token": False,
        "pad_token_id": info["pad_token_id"],
        "pad_token": None,
        "template_hash": manifest.get("template_hash"),
        "tokenizer_fingerprint": manifest.get("tokenizer_fingerprint"),
        "max_length": manifest.get("max_length"),
        "max_model_len": max_model_len(geometry, manifest.get("max_length")),
        "overlong": manifest.get("overlong"),
        "data": {key: value for key, value in manifest.items() if key != "chat_template"},
        "config": info.get("config"),
        "evaluation": (rows := evaluations(checkpoint.parent, info["iteration"])),
        "held_out_rewards": held_out_rewards(rows),
        "verification": None,
        "example": None,
        "files": {},
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """``reward_recipe.json`` with a checksum of everything else in it."""
    rest = {key: value for key, value in recipe.items() if key != "checksum"}
    write_json(folder / RECIPE, {**rest, "checksum": json_checksum(rest)})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
