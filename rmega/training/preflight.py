"""Checks before the model is built: folders, data, tokenizer, the checkpoint to resume from.

Every function raises ValueError with the flag. None of them writes anything.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from rmega import distributed
from rmega.checkpointing import run_folder
from rmega.checkpointing.find import find
from rmega.config import LossArgs, TrainingConfig
from rmega.data import integrity
from rmega.data.fingerprint import is_tokenizer_of, tokenizer_fingerprint
from rmega.distributed import log
from rmega.evaluation.files import eval_rows
from rmega.hub import has_tokenizer, recorded_reward_token
from rmega.io import check_writable
from rmega.models.geometry import Geometry
from rmega.models.rotary import check_length
from rmega.preferences.load_tokenizer import load_tokenizer


def check_save(config: TrainingConfig) -> None:
    """``--save`` must be a folder that can be written, and hold no other run."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if not save:
        return
    check_writable(f"--save {save}", save)
    if resumes_in_place(config):
        if run_folder.ABANDONED in Path(load).name:
            raise ValueError(
                f"--load {load}: the run in --save {save} has left this checkpoint; continue from"
                " it in another --save folder"
            )
    elif run_folder.list_folders(save):
        raise ValueError(
            f"--save {save}: holds a run already; resume it with --load {save}, or choose another"
            " folder"
        )


def resumes_in_place(config: TrainingConfig) -> bool:
    """Whether ``--load`` is the run in ``--save``, or one of its checkpoints."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if not save or not load:
        return False
    return Path(save).resolve() in (Path(load).resolve(), Path(load).resolve().parent)


def find_start(config: TrainingConfig) -> Path | None:
    """The checkpoint to resume from, its files verified; None at the start of a run. Called by
    every rank."""
    c = config.checkpoint
    found = find(c.load) if c.load else None
    if c.load and found is None and not resumes_in_place(config):
        raise ValueError(f"--load {c.load}: no checkpoint in it")
    return found


def check_dataset(flag: str, dataset, first, geometry: Geometry, folder: Path) -> None:
    """A dataset must fit the model, and the dataset ``first`` of the run."""
    manifest = dataset.manifest
    # A tokenizer may have more ids than the model, such as a pad token: only those in texts count.
    if (
        manifest["vocab_size"] > geometry.vocab_size
        and (largest := int(dataset.tokens.max(initial=0))) >= geometry.vocab_size
    ):
        raise ValueError(
            f"{flag} {dataset.prefix}: has token id {largest}, from a tokenizer of"
            f" {manifest['vocab_size']} ids; the vocabulary of the model {folder} ends before"
            f" {geometry.vocab_size}"
        )
    for field in ("tokenizer_fingerprint", "reward_token_id", "template_hash"):
        if field == "template_hash" and not (manifest.get(field) and first.manifest.get(field)):
            continue  # of an earlier version
        if manifest[field] != first.manifest[field] and not (
            field == "tokenizer_fingerprint" and _same_but_for_pad(manifest, first.manifest, folder)
        ):
            raise ValueError(
                f"{flag} {dataset.prefix}: {field} {manifest[field]} differs from that of "
                f"{first.prefix} ({first.manifest[field]}); preprocess both alike"
            )
    check_positions(flag, dataset, geometry)


def _same_but_for_pad(one: dict[str, Any], other: dict[str, Any], folder: Path) -> bool:
    """Whether both datasets were written with the model's tokenizer, whatever it pads with: an
    earlier version, or the tokenizer of an export, gives such datasets other fingerprints."""
    tokenizer = _tokenizer_of(folder)
    return (
        tokenizer is not None
        and is_tokenizer_of(tokenizer, one)
        and is_tokenizer_of(tokenizer, other)
    )


def _tokenizer_of(folder: Path) -> Any:
    """transformers' tokenizer of a model's folder; None where it has none, or none that loads."""
    if not has_tokenizer(folder):
        return None
    try:
        return load_tokenizer(folder, flag="--hf-model")
    except ValueError as error:
        log(f"warning: not checked whether the data were written for this model: {error}")
        return None


def check_reward_token(dataset, folder: Path) -> None:
    """Warn where the head of ``--hf-model`` was trained to be read at another token than the
    data's."""
    recorded, token = recorded_reward_token(folder), dataset.manifest["reward_token_id"]
    if recorded in (None, "none" if token is None else str(token)):
        return

    def name(text: str) -> str:
        return "the last token of the text" if text == "none" else f"token {text}"

    log(
        f"warning: the reward head of --hf-model {folder} was trained to be read at"
        f" {name(recorded)}, {dataset.prefix} has it read at"
        f" {name('none' if token is None else str(token))}; tools/preprocess_pref.py --tokenizer"
        f" {folder} --reward-token {recorded} writes data for it"
    )


def check_content(flag: str, dataset) -> None:
    """The files of a dataset must be those that were written; every rank reads its share."""
    own = integrity.damage(dataset, share=distributed.own_share())
    if problem := distributed.first_problem(own):
        raise ValueError(f"{flag} {problem}")


RATED_LOSSES = {
    "use_margin": ("whose difference is the margin", "margin is 0"),
    "scale_by_rating": ("whose difference is the pair's weight", "weight is 1"),
}
"""Switches of LossArgs that read ratings: what they make of them, and what holds without them."""


def check_ratings(mixture, loss: LossArgs) -> None:
    """``--use-margin`` and ``--scale-by-rating`` need ratings; how many comparisons have none is
    reported."""
    graded = [d.scores[d.document_indices[:-1]] == 1 for d in mixture.datasets]
    for name, (use, default) in RATED_LOSSES.items():
        if not getattr(loss, name):
            continue
        flag = "--" + name.replace("_", "-")
        if not any(part.any() for part in graded):
            raise ValueError(
                f"{flag}: no comparison of {', '.join(d.prefix for d in mixture.datasets)} has"
                f" ratings, {use}"
            )
        for dataset, part in zip(mixture.datasets, graded, strict=True):
            if missing := int((~part).sum()):
                log(
                    f"warning: {flag}: {missing:,} of {len(part):,} comparisons of"
                    f" {dataset.prefix} have no ratings: their {default}"
                )


def check_ties(mixture, valid, loss: LossArgs) -> None:
    """Training data with tied pairs and ``--loss rao_kupper`` need each other. The datasets
    ``valid`` may have ties, which do not count there, beside other pairs."""
    needed = loss.loss == "rao_kupper"
    for dataset in mixture.datasets:
        kept = dataset.manifest.get("ties") == "keep"
        if needed and not kept:
            raise ValueError(
                f"--loss rao_kupper: {dataset.prefix} was written without its ties"
                " (tools/preprocess_pref.py --keep ties)"
            )
        if kept and not needed and dataset.num_tied_pairs:
            raise ValueError(
                f"--data-path {dataset.prefix}: has tied pairs (--keep ties), which --loss"
                f" {loss.loss} does not read: --loss rao_kupper"
            )
    for dataset in valid:
        if not dataset.manifest["num_pairs"]:
            raise ValueError(
                f"--valid-data-path {dataset.prefix}: all its pairs are tied; accuracy is over"
                " pairs that are not"
            )


def check_positions(flag: str, dataset, geometry: Geometry) -> None:
    """Warn of comparisons with a text beyond the model's positions; refuse where its scaling
    depends on them."""
    lengths, known = longest_texts(dataset), geometry.max_position_embeddings
    if not len(lengths) or lengths.max() <= known:
        return
    check_length(geometry, int(lengths.max()), f"{flag} {dataset.prefix}")
    over = int((lengths > known).sum())
    log(
        f"warning: {flag} {dataset.prefix}: {over:,} of {len(lengths):,} comparisons have a text"
        f" longer than the model's {known:,} positions (the longest: {int(lengths.max()):,}"
        f" tokens), of which it has learned nothing; preprocess with --max-length {known}"
    )


def longest_texts(dataset) -> np.ndarray:
    """Tokens of the longest text (prefix and response) of each stored comparison: int64
    [comparisons]."""
    starts, lengths = dataset.document_indices[:-1], dataset.sequence_lengths
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    responses = np.array(lengths, dtype=np.int64)
    responses[starts] = 0  # the prefix stands first in its document
    return lengths[starts] + np.maximum.reduceat(responses, starts)


def check_tokenizer(dataset, folder: Path) -> None:
    """The data must have been written with the model's own tokenizer. Read on rank 0, known to
    all."""
    manifest = dataset.manifest

    def compare() -> str | None:
        tokenizer = _tokenizer_of(folder)
        if tokenizer is None or is_tokenizer_of(tokenizer, manifest):
            return None
        return (
            f"--data-path {dataset.prefix}: was written with the tokenizer {manifest['tokenizer']}"
            f" ({manifest['tokenizer_fingerprint']}), which is not that of --hf-model {folder}"
            f" ({tokenizer_fingerprint(tokenizer)}); tools/preprocess_pref.py --tokenizer {folder}"
            " writes data for this model"
        )

    if problem := distributed.from_rank_0(compare):
        raise ValueError(problem)


def evaluated_before(config: TrainingConfig, step: int) -> set[str]:
    """Validation sets that ``--save`` has an evaluation of at the step that a run resumes at. Read
    on rank 0, known to all."""
    if not (run := config.checkpoint.save):
        return set()
    return distributed.from_rank_0(
        lambda: {str(row.get("name")) for row in eval_rows(run) if row.get("step") == step}
    )


def check_same_model(info: dict[str, Any], found: Path, geometry: Geometry, folder: Path) -> None:
    """Report a checkpoint of another backbone by its geometry, not by the first tensor that does
    not fit."""
    saved = info["geometry"]
    for field, value in json.loads(json.dumps(dataclasses.asdict(geometry))).items():
        if field != "has_reward_head" and saved.get(field, value) != value:
            raise ValueError(
                f"--load {found}: is of another model: {field} {saved[field]} there, {value} in "
                f"--hf-model {folder}"
            )


def check_same_data(info: dict[str, Any], found: Path, dataset) -> None:
    """Other data, or the same in another order, would give other comparisons than the ones that are
    left."""
    saved = info.get("data", dataset.identity)
    if info["num_comparisons"] != len(dataset) or saved != dataset.identity:
        raise ValueError(
            f"--data-path: {found} was trained on other data ({info['num_comparisons']} comparisons"
            f" per epoch then, {len(dataset)} now; weights and contents must be the same, in the"
            " same order)"
        )
