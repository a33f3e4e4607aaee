"""Rewards of an export by the two paths that a verification compares: the training's own model on
one process, and stock transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rmega import distributed
from rmega.export.adapters import load_with_peft
from rmega.export.average import Part
from rmega.export.write_weights import DTYPES
from rmega.models import BACKBONES
from rmega.models.geometry import Geometry
from rmega.scoring.scorer import Scorer, TokenRules, load_scorer


@torch.no_grad()
def rewards_of_parts(
    parts: Sequence[Part], items: Sequence[Sequence[Sequence[int]]], dtypes: Sequence[str]
) -> list[torch.Tensor]:
    """fp32 rewards [n] by the training's own model on one process, with the mean of the parts'
    weights rounded to each of ``dtypes``.

    An item holds the token ids of the responses to one prompt; items are packed with a shared
    prefix, as in training. ``dtypes`` go from the widest to the narrowest, because weights are
    rounded in place.
    """

    def load(part: Part) -> Scorer:
        rules = TokenRules(reward_token="0")  # ids are scored, no text
        options = {"rules": rules, "flag": "--load", "adapters_base": part.base_model}
        return load_scorer(part.folder, dtype="fp32", **options)

    started_here = not dist.is_initialized()
    try:
        scorer = load(parts[0])
        for part in parts[1:]:
            added = load(part).model
            for total, value in zip(scorer.model.parameters(), added.parameters(), strict=True):
                total.add_(value)
        for parameter in scorer.model.parameters() if len(parts) > 1 else ():
            parameter.div_(len(parts))
        results = []
        for dtype in dtypes:
            for parameter in scorer.model.parameters():
                parameter.copy_(parameter.to(DTYPES[dtype][0]))
            results.append(
                torch.tensor(
                    [reward for rewards in scorer.score_tokens(items) for reward in rewards]
                )
            )
        return results
    finally:
        if started_here:
            distributed.finish()


def check_code(folder: Path, written: Iterable[Path]) -> None:
    """ValueError where a folder names other code than the files ``written`` by an export: verifying
    would run it."""
    own = {file.name: file.read_bytes() for file in written}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in sorted({str(name) for name in (config.get("auto_map") or {}).values()}):
        file = folder / f"{name.partition('.')[0]}.py"
        if not file.is_file() or file.read_bytes() != own.get(file.name):
            raise ValueError(f"{file}: not the code that an export writes, so it is not run")


@torch.no_grad()
def transformers_rewards(
    folder: Path,
    geometry: Geometry,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    batch_size: int = 8,
    adapter_of: Path | None = None,
) -> torch.Tensor:
    """fp32 rewards [2, n] by stock transformers from a written folder, in batches [B, T] that are
    padded on the right, then on the left. ``adapter_of``: the base model of a folder of peft."""
    import transformers

    if adapter_of:
        load, options = load_with_peft, {"base": adapter_of, "pad_token_id": pad_token_id}
    elif BACKBONES[geometry.family].code:
        check_code(folder, BACKBONES[geometry.family].code)
        load = transformers.AutoModel.from_pretrained
        options = {"trust_remote_code": True}  # the two files that an export writes
    else:
        load, options = transformers.AutoModelForSequenceClassification.from_pretrained, {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = load(folder, dtype=torch.float32, **options).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    rewards = torch.empty(2, len(sequences))
    for side, padded_left in enumerate((False, True)):
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            longest = max(map(len, batch))
            tokens = torch.full((len(batch), longest), pad_token_id)
            mask = torch.zeros_like(tokens)
            for row, ids in enumerate(batch):
                place = slice(longest - len(ids), longest) if padded_left else slice(0, len(ids))
                tokens[row, place], mask[row, place] = torch.tensor(ids), 1
            outputs = model(input_ids=tokens.to(device), attention_mask=mask.to(device))
            rewards[side, start : start + len(batch)] = outputs.logits[:, 0]
    return rewards
