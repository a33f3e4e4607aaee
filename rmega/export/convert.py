"""From a run to a verified Hugging Face folder: the steps in order, and what happens when one
fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rmega.checkpointing import run_folder
from rmega.checkpointing.find import damage
from rmega.config import TrainArgs
from rmega.export.folder import (
    RECIPE,
    UNVERIFIED,
    evaluations,
    mark_unverified,
    write_config,
    write_recipe,
    write_tokenizer,
)
from rmega.export.model_card import client_duties, kept_comparisons, usage, write_card
from rmega.export.write_weights import DTYPES, CheckpointTensors, export_weights, parse_size
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry


def say(text: str = "") -> None:
    print(text, flush=True)


def find_checkpoint(run: Path, iteration: str) -> Path:
    """The folder of one checkpoint of a run: ``latest``, ``best`` or a number; ``run`` may be that
    folder itself."""
    if (run / run_folder.INFO).is_file():
        if iteration != "latest":
            raise ValueError(
                f"--iteration {iteration}: {run} is a single checkpoint; give --load the run folder"
            )
        return run
    if not run.is_dir():
        raise ValueError(f"--load {run}: no such folder")
    found = run_folder.list_iterations(run)
    if not found:
        raise ValueError(
            f"--load {run}: no checkpoint in it (folders iter_NNNNNNN with {run_folder.INFO})"
        )
    if iteration == "latest":
        return run_folder.iteration_dir(run, run_folder.latest_iteration(run))
    if iteration == "best":
        best = run_folder.read_info(run_folder.iteration_dir(run, found[-1])).get("best")
        if not best:
            raise ValueError(
                f"--iteration best: {run} was trained without a held-out set (--valid-data-path)"
            )
        if best[1] not in found:
            raise ValueError(
                f"--iteration best: the best evaluation was at step {best[1]}, where no checkpoint"
                f" was kept (there are {', '.join(map(str, found))}); save at each evaluation to"
                " have it"
            )
        return run_folder.iteration_dir(run, best[1])
    if not iteration.isdigit() or int(iteration) not in found:
        raise ValueError(
            f"--iteration {iteration}: not among the checkpoints of {run}"
            f" ({', '.join(map(str, found))})"
        )
    return run_folder.iteration_dir(run, int(iteration))


def planned_steps(info: dict[str, Any]) -> int | None:
    """Steps of the whole run that a checkpoint belongs to; None where it does not say."""
    known = {field.name for field in dataclasses.fields(TrainArgs)}
    plan = TrainArgs(
        **{k: v for k, v in info.get("config", {}).get("train", {}).items() if k in known}
    )
    if plan.train_steps is None and (plan.train_epochs is None or "num_comparisons" not in info):
        return None
    return plan.total_steps(info.get("num_comparisons", 0))[0]


def convert(
    *,
    run: Path,
    output: Path,
    iteration: str = "latest",
    dtype: str = "auto",
    family: str = "auto",
    max_shard_size: str = "5GB",
    force: bool = False,
    verify: bool = True,
    write: bool = True,
) -> int:
    """Export one checkpoint of ``run`` to ``output`` and verify it. Returns 0, or 1 if the
    verification failed.

    The folder appears whole or not at all. It holds a file UNVERIFIED from its first moment until
    its rewards have been confirmed. Raises ValueError or OSError, with nothing written, on anything
    that stands in the way.
    """
    shard_bytes = parse_size(max_shard_size)
    folder = find_checkpoint(run, iteration)
    info = run_folder.read_info(folder)
    if problem := damage(folder):
        raise ValueError(
            f"--load {folder}: damaged ({problem}); another checkpoint can be named by --iteration"
        )
    trained = Geometry.from_dict(info["geometry"])
    if (planned := planned_steps(info)) and info["iteration"] < planned:
        say(
            f"note: {folder} is step {info['iteration']:,} of the {planned:,} that the run is"
            " planned for"
        )
    if write:
        geometry = dataclasses.replace(
            trained, family=trained.family if family == "auto" else family
        )
        dtype = info.get("dtype", "float32") if dtype == "auto" else dtype
        _check_output(output, force)
        _write(folder, info, output, geometry, dtype, shard_bytes)
        if not verify:
            mark_unverified(
                output,
                "The rewards of this folder have not been compared with those of the training "
                "(--no-verify). Verify it with: tools/convert_to_hf.py --verify-only",
            )
            say(f"not verified (--no-verify): {output / UNVERIFIED}")
            _show_usage(output)
            return 0
    else:
        geometry, dtype = _written_geometry(output, trained)
    return _verify(folder, info, output, geometry, dtype)


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output {output}: exists and is not a folder")
    if not any(output.iterdir()):
        return
    if not force:
        raise ValueError(f"--output {output}: exists already; --force replaces it")
    if not (output / "config.json").is_file():
        raise ValueError(
            f"--output {output}: --force replaces only a model folder, and this holds no"
            " config.json"
        )


def _write(
    folder: Path,
    info: dict[str, Any],
    output: Path,
    geometry: Geometry,
    dtype: str,
    shard_bytes: int,
) -> None:
    started = time.perf_counter()
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        mark_unverified(
            partial,
            "The rewards of this folder have not been compared with those of the training yet.",
        )
        example = write_tokenizer(folder / "hf", partial, info)
        if example is None:
            say(
                f"{folder}/hf holds no tokenizer: put the one of the training into the output"
                " folder yourself"
            )
        elif example["pad_token_id"] != info["pad_token_id"]:
            say(
                f"pad token: {example['pad_token']} (id {example['pad_token_id']}), because id"
                f" {info['pad_token_id']} occurs in texts, where transformers 4 would read the"
                " reward before it"
            )
            info = {**info, "pad_token_id": example["pad_token_id"]}
        elif info["pad_token_id"] in example["token_ids"] and not BACKBONES[geometry.family].code:
            say(
                f"warning: pad token {example['pad_token']} (id {info['pad_token_id']}) occurs in"
                " texts and the tokenizer has no free one: transformers 4 would read rewards too"
                " early (5 does not; nor does --format internlm2)"
            )
        write_config(partial, geometry, info, dtype)
        source = CheckpointTensors(folder)
        table = BACKBONES[geometry.family].weight_table(geometry)
        bar = tqdm(desc="writing", total=len(table), leave=False, disable=None)
        writer = export_weights(
            source, geometry, partial, dtype=dtype, max_shard_bytes=shard_bytes, progress=bar.update
        )
        bar.close()
        recipe = write_recipe(
            partial,
            info=info,
            geometry=geometry,
            dtype=dtype,
            source=folder.name,
            example=example,
            evaluation=evaluations(folder.parent, info["iteration"]),
            verification=None,
        )
        for file in sorted((folder / "hf").glob("LICENSE*")):
            shutil.copyfile(file, partial / file.name)
        write_card(partial, recipe, folder / "hf")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.perf_counter() - started
    say(
        f"wrote {output}: {recipe['architecture']}, {dtype}, {writer.total_size / 1e9:.2f} GB in"
        f" {len(writer.files)} file{'s' if len(writer.files) > 1 else ''}, {seconds:.1f} s, from"
        f" {folder}"
    )


def _written_geometry(output: Path, trained: Geometry) -> tuple[Geometry, str]:
    """Geometry and dtype of a folder that was written before."""
    from rmega.models.hf import read_geometry

    geometry, config = read_geometry(output)
    if config.get("dtype") not in DTYPES:
        raise ValueError(
            f"{output}/config.json: dtype={config.get('dtype')!r} is none of {', '.join(DTYPES)}"
        )
    wanted = dataclasses.replace(trained, family=geometry.family, has_reward_head=True)
    if geometry != wanted:
        raise ValueError(f"{output}/config.json: describes another model than the checkpoint")
    return geometry, config["dtype"]


def _verify(
    folder: Path, info: dict[str, Any], output: Path, geometry: Geometry, dtype: str
) -> int:
    from rmega.export.verify import verify_export

    mark_unverified(output, "The verification of this folder was interrupted.")
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    info = {**info, "pad_token_id": written["pad_token_id"]}
    recipe_path = output / RECIPE
    recipe = json.loads(recipe_path.read_text(encoding="utf-8")) if recipe_path.is_file() else {}
    example = recipe.get("example")
    result = verify_export(
        folder, info, output, geometry, dtype, example=(example or {}).get("token_ids"), say=say
    )
    if example:
        example["reward"] = result.example_reward
    recipe = write_recipe(
        output,
        info=info,
        geometry=geometry,
        dtype=dtype,
        source=folder.name,
        example=example,
        evaluation=evaluations(folder.parent, info["iteration"]),
        verification=dataclasses.asdict(result),
    )
    write_card(output, recipe, folder / "hf")
    say(f"verification: {result.weights}")
    kept = kept_comparisons(result.comparisons, result.held_out)
    say(
        f"verification: {result.responses} responses of {kept}: largest difference"
        f" {result.largest_difference:.3g} on rewards up to {result.largest_reward:.3g} ="
        f" {result.relative_difference:.2g} relative, tolerance {result.tolerance:.0e}"
    )
    if result.rounding_effect:
        say(
            f"verification: rounding the weights to {dtype} moves a reward by {result.rounding_effect:.3g}"
            " at most"
        )
    if not result.passed:
        mark_unverified(output, result.why)
        say(f"NOT VERIFIED: {result.why} The folder is marked: {output / UNVERIFIED}")
        return 1
    (output / UNVERIFIED).unlink()
    say("verified")
    _show_usage(output)
    return 0


def _show_usage(output: Path) -> None:
    recipe = json.loads((output / RECIPE).read_text(encoding="utf-8"))
    for title, command, code in usage(recipe, str(output)):
        say(f"\n---- score with {title}")
        if command:
            say(f"{command}\n")
        say(code)
    say("\nWhat a client must do:")
    for number, duty in enumerate(client_duties(recipe), 1):
        say(f"{number}. {duty}")
