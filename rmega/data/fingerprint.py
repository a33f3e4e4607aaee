"""Fingerprint of a tokenizer: whether two datasets, or a dataset and a model, speak the same token
ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

PROBES = (
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  two spaces,\ttab\n\n\nnew lines  \n",
    "你好，世界！今天天气很好。",
    "def f(x):\n    return x**2  # α ≤ β",
    "naïve café – „Größe“ 🙂👍🏽 \u200b\u00a0",
    "مرحبا Привет こんにちは 안녕하세요 नमस्ते",
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits that name a tokenizer: vocabulary, special tokens, template and
    behaviour on probe texts.

    The probes catch a lost normaliser or pre-tokenizer, and a release of transformers that reads
    the files differently. A token that is special for padding alone is left out: no text holds it,
    and an export may have chosen another.
    """
    return _fingerprint(tokenizer, _special_but_for_pad(tokenizer), own_template(tokenizer) or "")


def is_tokenizer_of(tokenizer: Any, manifest: Mapping[str, Any]) -> bool:
    """Whether a dataset was written with this tokenizer, or with one that differs from it in the
    pad token alone.

    Datasets of earlier versions counted the pad token among the special ones: what the fingerprint
    would be with the tokenizer's pad token, or with the dataset's own in its place, is good as
    well.
    """
    special = _special_but_for_pad(tokenizer)
    pad_id = manifest.get("pad_token_id")
    theirs = None if pad_id is None else tokenizer.convert_ids_to_tokens(int(pad_id))
    pads = [set(), *({str(pad)} for pad in (tokenizer.pad_token, theirs) if pad is not None)]
    templates = [own_template(tokenizer) or ""]
    if manifest.get("chat_template") == templates[0]:
        templates.append(
            ""
        )  # an export writes down the template that stood in for one that its base did not have
    return manifest.get("tokenizer_fingerprint") in {
        _fingerprint(tokenizer, special | pad, template) for pad in pads for template in templates
    }


def _special_but_for_pad(tokenizer: Any) -> set[str]:
    """Special tokens but for one that is nothing but the pad token."""
    roles = dict(tokenizer.special_tokens_map)
    pad = roles.pop("pad_token", None)
    elsewhere = [
        token
        for value in roles.values()
        for token in (value if isinstance(value, list) else [value])
    ]
    elsewhere += getattr(tokenizer, "extra_special_tokens", None) or []
    return set(map(str, tokenizer.all_special_tokens)) - ({str(pad)} - set(map(str, elsewhere)))


def _fingerprint(tokenizer: Any, special: set[str], template: str) -> str:
    digest = hashlib.sha256()
    for text, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\0{text}\0".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(sorted(special)).encode())
    digest.update(template.encode())
    for probe in PROBES:
        digest.update(
            np.asarray(tokenizer.encode(probe, add_special_tokens=False), np.int64).tobytes()
        )
    return digest.hexdigest()[:16]


def own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
