"""Load the tokenizer of a folder or hub name without running its code. The only loader of
tokenizers in rmega."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmega.hub import VOCABULARIES, export_damage, resolve_model
from rmega.io import one_line, read_json, refuse_pointer

_BESIDE_VOCABULARY = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ABOUT_MODELS = re.compile("model of type|rope_scaling|rope_parameters")
"""Warnings of transformers while it loads a tokenizer that concern only the model's weights."""


def load_tokenizer(
    name: str | Path, *, flag: str = "--tokenizer", messages: list[str] | None = None
) -> Any:
    """The transformers tokenizer of a folder or hub name (as `resolve_model`).

    ``messages`` is extended by a line for each thing that transformers warns of. Raises ValueError
    that names ``flag`` and the remedy.
    """
    # one process per core is the parallelism
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = resolve_model(str(name), flag=flag, weights=False)
    vocabulary = next((n for n in VOCABULARIES if (folder / n).is_file()), None)
    if vocabulary is None:
        raise ValueError(f"{flag} {name}: no tokenizer in it ({', '.join(VOCABULARIES)})")
    if problem := export_damage(folder, weights=False):
        raise ValueError(problem)
    for file in (*VOCABULARIES, *_BESIDE_VOCABULARY):
        path = folder / file
        refuse_pointer(path)
        # transformers would read on without a file that is a broken link.
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{flag} {path}: not a file that can be read")
        if file in _SETTINGS and path.is_file():
            read_json(path)
    if vocabulary == "tokenizer.model":
        _need_to_read_sentencepiece(f"{flag} {name}")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _transformers_warnings() as lines:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            tokenizer.encode("a")  # uses settings of other types than transformers checks
        except Exception as error:  # json, the Rust layer and transformers raise their own kinds
            if "custom code" not in str(error):
                reasons = "; ".join([one_line(error), *lines[:1]])
                raise ValueError(f"{flag} {name}: cannot be loaded ({reasons})") from None
            if vocabulary != "tokenizer.json":
                raise ValueError(
                    f"{flag} {name}: its tokenizer is code of its own, which is never run;"
                    " a folder with a tokenizer.json is read without it"
                ) from None
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
            lines.append("code of its own is not run; tokenizer.json alone is read")
    if not (folder / "tokenizer_config.json").is_file():
        lines.append("no tokenizer_config.json: no roles of tokens and no chat template are known")
    if messages is not None:
        messages += [f"tokenizer {name}: {line}" for line in dict.fromkeys(lines)]
    return tokenizer


def _need_to_read_sentencepiece(what: str) -> None:
    """ValueError if a library is missing, for which transformers would blame tiktoken."""
    for module, package in (("google.protobuf", "protobuf"), ("sentencepiece", "sentencepiece")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # not even a package "google"
            found = None
        if found is None:
            raise ValueError(
                f"{what}: tokenizer.model is read with {package}, which is not installed (pip"
                f" install {package})"
            )


@contextlib.contextmanager
def _transformers_warnings() -> Iterator[list[str]]:
    """Collects what transformers would log inside, one line each, except what concerns weights."""
    from transformers.utils.logging import get_logger

    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if not _ABOUT_MODELS.search(text):
                lines.append(text[:300])

    root = get_logger("transformers")  # the library's handler is made by its first logger
    handlers, propagate = root.handlers, root.propagate
    root.handlers, root.propagate = [Collect(logging.WARNING)], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # on names of model configurations
            yield lines
    finally:
        root.handlers, root.propagate = handlers, propagate
