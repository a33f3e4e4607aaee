"""The export: steps in order, and what happens when one fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmega.checkpointing.find import damage
from rmega.config import TrainArgs
from rmega.distributed import log
from rmega.export import destination
from rmega.export import push as hub
from rmega.export.adapters import check_peft
from rmega.export.average import Part, read_part, read_parts
from rmega.export.destination import RECIPE, UNVERIFIED, mark_unverified
from rmega.export.folder import write_recipe
from rmega.export.model_card import kept_comparisons, write_card
from rmega.export.usage import client_duties, usage
from rmega.export.write_folder import write_folder
from rmega.export.write_weights import DTYPES, parse_size
from rmega.io import fingerprint, naming, one_line
from rmega.models.geometry import Geometry
from rmega.models.hf import read_geometry

ADAPTER = "adapter"
"""The --format of a folder of peft."""
NO_VERIFY = (
    "Its rewards have not been compared with those of the training (--no-verify);"
    " tools/convert_to_hf.py --verify-only does that."
)


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
    hub_name: str | None = None,
    average_with: Sequence[Path] = (),
) -> int:
    """Export one checkpoint of ``run`` to ``output`` and verify it. Returns 0, or 1 if the
    verification failed. Adapters are merged into their base model, unless ``family`` is "adapter":
    then they and the reward head are written alone, in fp32, as peft reads them. A verified export
    is uploaded as ``hub_name``, where that is given. ``average_with``: further runs (their newest
    checkpoints) or checkpoints; the weights written are the mean over all, computed in fp32.
    ``run`` and these may also be exports of rmega, of one format, which the mean keeps.

    The folder appears complete or not at all, with a file UNVERIFIED if its rewards have not been
    confirmed. An older export is replaced only with ``force``, and removed only after the new one
    has been verified. Raises ValueError or OSError, with nothing written, on anything that
    prevents it.
    """
    shard_bytes = parse_size(max_shard_size)
    if hub_name is not None:
        hub.check(hub_name, verify=verify)
    paths = [run, *average_with]
    flag = "" if average_with else "--load "
    parts = read_parts(paths) if average_with else [read_part(run, iteration, flag)]
    info = parts[0].info
    base = info["base"]["folder"] if "base" in info else info.get("base_model")
    for load, part in zip(paths, parts, strict=True):
        target = destination.check(
            output,
            load=load,
            checkpoint=part.folder,
            base=base,
            force=force,
            verify=verify,
            named=flag or "the part ",
        )
    for part in parts:
        _check_checkpoint(part)
    geometry = Geometry.from_dict(info["geometry"])
    as_adapter = family == ADAPTER
    assert not (as_adapter and average_with)
    if as_adapter:
        check_peft(info, geometry)
        dtype = "float32"
    elif family not in ("auto", geometry.family):
        if parts[0].is_export:
            raise ValueError(
                f"--format {family}: an average of exports keeps their format, {geometry.family}"
            )
        geometry = dataclasses.replace(geometry, family=family)
    dtype = info.get("dtype", "float32") if dtype == "auto" else dtype
    with naming(output), destination.being_written(target) as partial:
        recipe = write_folder(parts, partial, geometry, dtype, shard_bytes, as_adapter, output)
        passed = verify and _verify(parts, partial, geometry, recipe)
        mark_unverified(partial, recipe["verification"]["reason"] if verify else NO_VERIFY)
        write_card(partial, output.resolve().name, recipe, parts[0].files, hub_name)
        recipe["files"] = destination.list_files(partial)
        write_recipe(partial, recipe)
        if passed:
            (partial / UNVERIFIED).unlink()
        published = destination.publish(partial, target)
    shown = output if published == target else published
    if verify and not passed:
        _report_failure(shown, recipe["verification"]["reason"])
        if shown != output:
            log(f"The older export stays: {output}")
        return 1
    log("verified" if passed else f"not verified (--no-verify): {shown / UNVERIFIED}")
    _hand_over(output, recipe, hub_name)
    return 0


def verify_only(
    *, run: Path, output: Path, iteration: str = "latest", hub_name: str | None = None
) -> int:
    """Verify an export that was written before, against the checkpoint that it was made of.
    Returns 0, or 1 if it failed; the folder's recipe, card and marker follow. A verified one is
    uploaded as ``hub_name``, where that is given."""
    if hub_name is not None:
        hub.check(hub_name, verify=True)
    recipe = destination.read_recipe(output)
    if recipe is None:
        raise ValueError(f"--output {output}: no export of rmega ({RECIPE} is missing)")
    if recipe.get("average_of"):
        raise ValueError(f"--output {output}: an average, which tools/average.py verifies")
    part = read_part(run, iteration, "--load ")
    folder = part.folder
    if folder.resolve().name != recipe["checkpoint"]:
        number = str(recipe["checkpoint"]).removeprefix("iter_").lstrip("0")
        raise ValueError(
            f"--output {output}: was exported from {recipe['checkpoint']}, not from {folder.name}:"
            f" --iteration {number}"
        )
    _check_checkpoint(part)
    geometry = _read_export(output, Geometry.from_dict(part.info["geometry"]), recipe)
    mark_unverified(output, "The verification was interrupted.")
    changed = destination.changed_files(output, recipe["files"])
    others = [name for name in changed if name != "README.md"]
    try:
        passed = _verify([part], output, geometry, recipe)
    except Exception as error:  # transformers raises what it likes of a damaged file
        if not others:
            raise
        raise ValueError(
            f"{output / others[0]}: changed since the export, and not readable: {one_line(error)}"
        ) from None
    if others:
        passed = recipe["verification"]["passed"] = False
        reason = f"Changed since the export: {', '.join(others)}."
        recipe["verification"]["reason"] = f"{recipe['verification']['reason']} {reason}".strip()
    if "README.md" in changed:
        log(f"{output / 'README.md'} has been edited: it keeps its text")
    else:
        write_card(output, output.resolve().name, recipe, part.files, hub_name)
        recipe["files"]["README.md"] = fingerprint(output / "README.md")
    write_recipe(output, recipe)
    if not passed:
        mark_unverified(output, recipe["verification"]["reason"])
        _report_failure(output, recipe["verification"]["reason"])
        return 1
    (output / UNVERIFIED).unlink()
    log("verified")
    _hand_over(output, recipe, hub_name)
    return 0


def _check_checkpoint(part: Part) -> None:
    """ValueError for a damaged checkpoint; a note where the run is not complete."""
    if part.is_export:  # read_parts has checked it
        return
    folder, info = part.folder, part.info
    if problem := damage(folder):
        raise ValueError(
            f"{folder}: damaged ({problem}); another checkpoint of the run can be named"
        )
    if (planned := planned_steps(info)) and info["iteration"] < planned:
        log(
            f"note: {folder} is step {info['iteration']:,} of the {planned:,} that the run is"
            " planned for"
        )


def _read_export(output: Path, trained: Geometry, recipe: dict[str, Any]) -> Geometry:
    """The geometry of a folder that was written before."""
    if recipe.get("adapter_of"):
        return trained
    geometry, config = read_geometry(output)
    if config.get("dtype") != recipe["dtype"] or recipe["dtype"] not in DTYPES:
        raise ValueError(
            f"{output}/config.json: dtype={config.get('dtype')!r}, exported as {recipe['dtype']!r}"
        )
    expected = dataclasses.replace(trained, family=geometry.family, has_reward_head=True)
    if geometry != expected:
        raise ValueError(f"{output}/config.json: describes another model than the checkpoint")
    return geometry


def _verify(
    parts: Sequence[Part], output: Path, geometry: Geometry, recipe: dict[str, Any]
) -> bool:
    """Verify a written folder, put the result into its recipe and report it."""
    from rmega.export.verify import verify_export

    example = recipe.get("example")
    result = verify_export(
        parts,
        output,
        geometry,
        recipe["dtype"],
        pad_token_id=recipe["pad_token_id"],
        as_adapter=bool(recipe.get("adapter_of")),
        example=example["token_ids"] if example else None,
        say=log,
    )
    if example:
        example["reward"] = result.example_reward
    recipe["verification"] = dataclasses.asdict(result)
    log(f"verification: {result.weights}")
    kept = kept_comparisons(result.comparisons, result.held_out, result.random)
    log(
        f"verification: {result.responses} responses of {kept}: largest difference"
        f" {result.largest_difference:.3g} on rewards up to {result.largest_reward:.3g} ="
        f" {result.relative_difference:.2g} relative, tolerance {result.tolerance:.0e}"
    )
    if result.training_difference is not None:
        log(
            "verification: rewards that the training computed:"
            f" {result.training_difference:.2g} relative"
        )
    if result.rounding_effect:
        log(
            f"verification: rounding the weights to {recipe['dtype']} moves a reward by"
            f" {result.rounding_effect:.3g} at most"
        )
    return result.passed


def _report_failure(folder: Path, reason: str) -> None:
    log(f"NOT VERIFIED: {reason} The folder is marked: {folder / UNVERIFIED}")


def _hand_over(output: Path, recipe: dict[str, Any], hub_name: str | None) -> None:
    """Print how to score with a finished export, and upload it where a name is given."""
    for title, command, code in usage(recipe, str(output)):
        log(f"\n---- score with {title}")
        if command:
            log(f"{command}\n")
        log(code)
    log("\nWhat a client must do:")
    for number, duty in enumerate(client_duties(recipe), 1):
        log(f"{number}. {duty}")
    if hub_name is not None:
        message = f"rmega: step {recipe['iteration']}, {recipe['dtype']}"
        log(f"\nuploaded: {hub.push(output, hub_name, message)}")
