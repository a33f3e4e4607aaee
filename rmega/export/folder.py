"""What an exported folder holds beside its weights: configuration, modeling code, tokenizer,
recipe, model card.

Everything is written so that transformers 4.44 and 5 both read it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rmega import __version__
from rmega.evaluation.files import eval_rows
from rmega.hub import has_tokenizer, load_tokenizer
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry

UNVERIFIED = "UNVERIFIED"
RECIPE = "reward_recipe.json"
RECIPE_VERSION = 1
EXAMPLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
NOT_TOKENIZER = ("config.json", "generation_config.json", "README.md")


def write_config(folder: Path, geometry: Geometry, info: dict[str, Any], dtype: str) -> None:
    """``config.json`` and the files of modeling code that it names, if any. ``info`` is the
    checkpoint's rmega.json.

    Raises ValueError if padding and reward token are the same: the pooled token could not be found
    in a batch.
    """
    if info["pad_token_id"] == info["reward_token_id"]:
        raise ValueError(
            f"pad_token_id and reward_token_id are both {info['pad_token_id']}: a padded batch"
            " would be read at the wrong token"
        )
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


def write_tokenizer(source: Path, folder: Path, info: dict[str, Any]) -> dict[str, Any] | None:
    """Copy the tokenizer, with the template of the training and the pad token set; returns an
    example for the recipe.

    The example is a conversation with its ids as the training would make them and as a client makes
    them from the written folder; they must agree (ValueError). None if the checkpoint holds no
    tokenizer.
    """
    if not has_tokenizer(source):
        return None
    from rmega.preferences.special_tokens import NO_REWARD_TOKEN
    from rmega.preferences.tokenizer import PairTokenizer

    for file in sorted(source.iterdir()):
        if file.name not in NOT_TOKENIZER:
            shutil.copyfile(file, folder / file.name)
    template = (info.get("manifest") or {}).get("chat_template")
    reward_id = info["reward_token_id"]
    reward_token = NO_REWARD_TOKEN if reward_id is None else str(reward_id)
    ours = PairTokenizer.load(source, chat_template=template, reward_token=reward_token)
    if not (folder / "tokenizer.json").is_file():
        ours.tokenizer.save_pretrained(folder)
    wanted = ours.encode_conversation(EXAMPLE)
    pad_id = choose_pad_token(ours.tokenizer, ours.template, info, wanted)
    pad = ours.tokenizer.convert_ids_to_tokens(pad_id)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # transformers 4 knows neither this class name nor a template in a file of its own.
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop(
        "auto_map", None
    )  # code of the base model, which is not carried along; tokenizer.json says it all
    config["chat_template"] = ours.template
    (folder / "chat_template.jinja").write_text(ours.template, encoding="utf-8")
    if pad is not None:
        config["pad_token"] = pad
        special = folder / "special_tokens_map.json"
        if special.is_file():
            write_json(
                special, {**json.loads(special.read_text(encoding="utf-8")), "pad_token": pad}
            )
    write_json(path, config)
    _merges_as_text(folder / "tokenizer.json")

    theirs = load_tokenizer(folder, flag="--output")
    text = theirs.apply_chat_template(EXAMPLE, tokenize=False)
    ids = theirs.encode(text, add_special_tokens=False)  # as a client makes them
    if reward_id not in (None, ids[-1]):
        ids.append(reward_id)
    if ids != wanted:
        raise ValueError(
            f"{folder}: the written tokenizer gives other ids than the training: {ids}, not"
            f" {wanted}"
        )
    reward = None if reward_id is None else theirs.convert_ids_to_tokens(reward_id)
    return {
        "messages": EXAMPLE,
        "text": text,
        "token_ids": ids,
        "reward_token": reward,
        "pad_token": pad,
        "pad_token_id": pad_id,
    }


def choose_pad_token(
    tokenizer: Any, template: str, info: dict[str, Any], example: list[int]
) -> int:
    """A pad token that no text contains: the training's own, else a special token that the template
    does not write.

    transformers 4 reads a Llama's reward before the *first* pad token of a row. Many tokenizers pad
    with the token that ends every turn (SmolLM2: ``<|im_end|>``), so the reward would be read in
    the middle of the text, without a word. The training pads nothing, so an export is free to
    choose. The training's own where no token is free.
    """
    used = {*example, info["reward_token_id"]}
    for kept in info.get("verification") or ():
        used.update(kept["prefix"], *kept["suffixes"])
    special = {
        int(index): str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if index in tokenizer.all_special_ids or token.special
    }
    free = sorted(
        (index for index, text in special.items() if text not in template),
        key=lambda index: (
            "pad" not in special[index].lower(),
            special[index] != tokenizer.unk_token,
            index,
        ),
    )
    own = info["pad_token_id"]
    mine = [own] if tokenizer.convert_ids_to_tokens(own) not in template else []
    for index in (*mine, *free):
        if index not in used and index < info["geometry"]["vocab_size"]:
            return index
    return own


def _merges_as_text(path: Path) -> None:
    """Write BPE merges as "a b", which every version of tokenizers reads; pairs are read by 0.20
    and later only."""
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content.get("model", {}).get("merges")
    if (
        not merges
        or isinstance(merges[0], str)
        or any(" " in part for pair in merges for part in pair)
    ):
        return
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


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


def write_recipe(
    folder: Path,
    *,
    info: dict[str, Any],
    geometry: Geometry,
    dtype: str,
    source: str,
    example: dict[str, Any] | None,
    evaluation: list[dict[str, Any]],
    verification: dict[str, Any] | None,
) -> dict[str, Any]:
    """``reward_recipe.json``: everything that a client or a later training must know to get the
    same rewards."""
    manifest = dict(info.get("manifest") or {})
    recipe = {
        "format_version": RECIPE_VERSION,
        "written_by": f"rmega {__version__}",
        "architecture": BACKBONES[geometry.family].architecture,
        "dtype": dtype,
        "base_model": info.get("base_model"),
        "checkpoint": source,
        "iteration": info["iteration"],
        "comparisons_seen": info.get("consumed"),
        "reward_token_id": info["reward_token_id"],
        "reward_token": (example or {}).get("reward_token"),
        "pad_token_id": info["pad_token_id"],
        "pad_token": (example or {}).get("pad_token"),
        "template_hash": manifest.get("template_hash"),
        "tokenizer_fingerprint": manifest.get("tokenizer_fingerprint"),
        "max_length": manifest.get("max_length"),
        "overlong": manifest.get("overlong"),
        "data": {key: value for key, value in manifest.items() if key != "chat_template"},
        "config": info.get("config"),
        "evaluation": evaluation,
        "verification": verification,
        "example": example,
    }
    write_json(folder / RECIPE, recipe)
    return recipe


def mark_unverified(folder: Path, why: str) -> None:
    """Put the marker into a folder whose rewards have not been, or could not be, confirmed."""
    (folder / UNVERIFIED).write_text(why.rstrip() + "\n", encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
