"""A folder, a Hugging Face hub name or ``modelscope:NAME`` -> a local folder."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rmega.io import one_line

# Files of a hub repository that a reward model is built from. Never its code: rmega runs no remote
# code.
HUB_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "LICENSE*", "README.md")


def check_folder_or_hub_name(name: str, flag: str) -> None:
    """ValueError for a text that is written as a path to where nothing is; what a hub would say to
    it misleads.

    A path is what no hub's name can be (absolute, with ``.`` or ``~`` in front, with several
    slashes), and what lies in a folder that is here.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"{flag} {name}: no such folder, and not a name that a hub could have")
    if path.parent != Path(".") and path.parent.is_dir():
        raise ValueError(
            f"{flag} {name}: no such folder (there is none of that name in {path.parent})"
        )


def resolve_model(name: str, *, flag: str = "--hf-model") -> Path:
    """The local folder of a model: a folder, a Hugging Face hub name, or ``modelscope:NAME``.

    Hub files are kept in the hub's own cache. Raises ValueError that names ``flag`` if there is no
    such model.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    hub, colon, repository = name.partition(":")
    if colon and hub == "modelscope":
        try:
            from modelscope import snapshot_download
        except ImportError:
            raise ValueError(
                f"{flag} {name}: pip install modelscope to read from ModelScope"
            ) from None
        try:
            return Path(
                snapshot_download(
                    repository, ignore_file_pattern=[r".*\.(py|pth|pt|gguf|onnx|h5|msgpack)$"]
                )
            )
        except Exception as error:  # the library has no common base class for its errors
            raise ValueError(
                f"{flag} {name}: not read from ModelScope: {one_line(error)}"
            ) from None
    check_folder_or_hub_name(name, flag)
    from huggingface_hub import snapshot_download

    try:
        with one_line_for_retries():
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.safetensors"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(
                    snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"])
                )
    except Exception as error:  # offline, not found, gated, disk full: the hub's message says which
        raise ValueError(
            f"{flag} {name}: no such folder, and not read from the Hugging Face hub: "
            f"{one_line(error)}"
        ) from None
    return folder


def model_config_folder(name: str) -> Path:
    """A folder with the model's config.json; of a hub name only that file is fetched."""
    if Path(name).expanduser().is_dir() or ":" in name:
        return resolve_model(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # offline, not found, gated: the hub's message says which
        raise ValueError(
            f"--hf-model {name}: no such folder, and config.json not read from the Hugging Face"
            f" hub: {str(error).splitlines()[0]}"
        ) from None


@contextlib.contextmanager
def one_line_for_retries() -> Iterator[None]:
    """The hub's client says two lines at each of its twelve attempts; inside this, one line at the
    first."""
    said = os.environ.get("RANK", "0") != "0"  # under torchrun one rank speaks

    def once(record: logging.LogRecord) -> bool:
        nonlocal said
        text = record.getMessage()
        if "Retrying in" not in text and "thrown while requesting" not in text:
            return True
        if not said:
            print(
                "the Hugging Face hub does not answer; trying again, at most for a minute",
                file=sys.stderr,
            )
        said = True
        return False

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
