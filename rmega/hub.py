"""A folder, a Hugging Face hub name or ``modelscope:NAME`` -> a local folder; the tokens that
its model records.

Code that comes with a folder is never run, and nothing asks on the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmega.io import fingerprint, json_checksum, one_line, read_json

# Files of a hub repository that a reward model is built from, without weights and code.
HUB_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "LICENSE*", "README.md")
RECIPE = "reward_recipe.json"
ADAPTER_CONFIG = "adapter_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that a tokenizer can be loaded from."""


def check_folder_or_hub_name(name: str, flag: str) -> None:
    """ValueError for text written as a path to where nothing is; the hub's answer would mislead.

    A path is what no hub name can be (absolute, with ``.`` or ``~`` in front, with several
    slashes), and a name whose parent folder exists here.
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


def resolve_model(name: str, *, flag: str = "--hf-model", weights: bool = True) -> Path:
    """The local folder of a model: a folder, a Hugging Face hub name, or ``modelscope:NAME``.

    Of a hub repository everything but its code is fetched, into the hub's own cache; without
    ``weights`` only configuration and tokenizer. Raises ValueError that names ``flag`` if there is
    no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_look_alikes(path, flag, weights)
        return path
    if path.is_file():
        raise ValueError(f"{flag} {name}: a file; name the folder that holds it")
    hub, colon, repository = name.partition(":")
    if colon and hub == "modelscope":
        return _from_modelscope(name, repository, flag, weights)
    check_folder_or_hub_name(name, flag)
    from huggingface_hub import snapshot_download

    try:
        with one_line_for_retries():
            folder = Path(
                snapshot_download(
                    name, allow_patterns=[*HUB_FILES, *(["*.safetensors"] if weights else [])]
                )
            )
            if weights and not any(folder.glob("*.safetensors")):
                folder = Path(
                    snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"])
                )
    except Exception as error:  # offline, not found, gated, disk full: the hub's message says which
        raise ValueError(
            f"{flag} {name}: no such folder, and not read from the Hugging Face hub: "
            f"{one_line(error)}"
        ) from None
    return folder


def resolve_start(name: str, *, flag: str = "--hf-model") -> tuple[Path, Path | None]:
    """(folder of a model, None), or (folder of its base model, folder) of a peft adapter.

    A base model that its adapter names by a relative path is looked for beside the adapter, too.
    """
    path = Path(name).expanduser()
    folder = path if is_adapter(path) else resolve_model(name, flag=flag)
    if not is_adapter(folder):
        return folder, None
    return resolve_model(adapter_base(folder, flag), flag=f"{flag} {name}: base model"), folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft, and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not _has_weights(folder)


def adapter_base(folder: Path, flag: str) -> str:
    """Folder or hub name of an adapter's base model."""
    base = _json_of(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{flag} {folder}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path)"
        )
    beside = folder / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


def _from_modelscope(name: str, repository: str, flag: str, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ValueError(f"{flag} {name}: pip install modelscope to read from ModelScope") from None
    unwanted = ["pth", "pt", "gguf", "onnx", "h5", "msgpack", "py"]
    unwanted += [] if weights else ["safetensors", "bin"]
    try:
        return Path(
            snapshot_download(repository, ignore_file_pattern=[rf".*\.({'|'.join(unwanted)})$"])
        )
    except Exception as error:  # the library has no common base class for its errors
        raise ValueError(f"{flag} {name}: not read from ModelScope: {one_line(error)}") from None


def _refuse_look_alikes(folder: Path, flag: str, weights: bool) -> None:
    """ValueError for what is often taken for a model folder: a hub cache, a PEFT adapter."""
    if (folder / "config.json").is_file() or (not weights and has_tokenizer(folder)):
        if not weights or not (folder / ADAPTER_CONFIG).is_file() or _has_weights(folder):
            return
    if (folder / ADAPTER_CONFIG).is_file():
        base = _json_of(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{flag} {folder}: a PEFT adapter (adapter_config.json), not a model of its own; merge"
            f" it into its base model{f' {base}' if base else ''} and name the merged folder"
        )
    repository = folder.parent if folder.name == "snapshots" else folder
    if repository.name.startswith("models--") and (repository / "snapshots").is_dir():
        snapshots = sorted((repository / "snapshots").iterdir())
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        where = f" or {snapshots[-1]}" if snapshots else ""
        raise ValueError(
            f"{flag} {folder}: the cache of a hub repository, not a model folder: name {name}"
            f"{where}"
        )
    if cached := sorted(folder.glob("models--*")):
        name = cached[0].name.removeprefix("models--").replace("--", "/", 1)
        raise ValueError(
            f"{flag} {folder}: a hub cache of {len(cached)} models, not a model folder: name one"
            f" of them, such as {name}"
        )


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _json_of(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. ValueError where it cannot be read."""
    return read_json(path) if os.path.lexists(path) else {}


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """``reward_recipe.json`` of an export; None where there is none. ValueError where it is
    damaged."""
    path = folder / RECIPE
    if not os.path.lexists(path):
        return None
    recipe = read_json(path)
    if "checksum" in recipe and recipe["checksum"] != json_checksum(recipe):
        raise ValueError(
            f"{path}: its content has changed since the export (checksum; without the field of that"
            " name it is read as it is)"
        )
    return recipe


def export_damage(
    folder: Path, *, weights: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """What has changed in an export since it was written, by the sizes and checksums in its recipe,
    or None. Looks at what rewards depend on; finds nothing in a folder of another program.

    ``weights``: also at the weights, which takes reading them. ``share`` (i, n) reads each n-th
    file, for n ranks.
    """
    try:
        files = (read_recipe(folder) or {}).get("files") or {}
    except ValueError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{folder / RECIPE}: its list of files cannot be read"
    names = [
        name
        for name in files
        if not name.startswith(("README", "LICENSE"))
        and not name.endswith(".py")  # not run, and not fetched from a hub
        and (weights or not name.endswith(".safetensors"))
    ]
    for name in names[share[0] :: share[1]]:
        try:
            if fingerprint(folder / name) == files[name]:
                continue
        except (OSError, ValueError) as error:
            return f"{folder / name}: {getattr(error, 'strerror', None) or error}"
        return (
            f"{folder / name}: its content has changed since the export (checksum; without its line"
            f" in {RECIPE}, and without the checksum there, it is read as it is)"
        )
    return None


def model_config_folder(name: str) -> Path:
    """A folder with the model's config.json (an adapter's base model's); of a hub name only that
    file is fetched."""
    if is_adapter(Path(name).expanduser()):
        name = adapter_base(Path(name).expanduser(), "--hf-model")
    if Path(name).expanduser().exists() or ":" in name:
        return resolve_model(name)
    check_folder_or_hub_name(name, "--hf-model")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # offline, not found, gated: the hub's message says which
        raise ValueError(
            f"--hf-model {name}: no such folder, and config.json not read from the Hugging Face"
            f" hub: {one_line(error)}"
        ) from None


def recorded_reward_token(folder: Path) -> str | None:
    """The reward token that a reward model's folder records: an id as text, or ``none``.

    ``none``: a reward model of another program, which is read at the last token of the templated
    text (TRL, Skywork, RLHFlow). None: not a reward model.
    """
    recipe, config = read_recipe(folder) or {}, _json_of(folder / "config.json")
    for record in (recipe, config):
        if record.get("reward_token_id") is not None:
            return str(record["reward_token_id"])
    heads = ("ForSequenceClassification", "ForRewardModel")
    names, labels = config.get("architectures") or (), config.get("id2label")
    if not isinstance(names, list | tuple) or not isinstance(labels or {}, dict):
        raise ValueError(f"{folder / 'config.json'}: architectures or id2label cannot be read")
    if not any(str(name).endswith(heads) for name in names):
        return None
    labels = len(labels) if labels else config.get("num_labels", 1)
    return "none" if labels == 1 else None


def recorded_pad_token(folder: Path) -> int | None:
    """The pad token in the config.json beside a tokenizer; None where it has none."""
    token = _json_of(folder / "config.json").get("pad_token_id")
    return token if isinstance(token, int) and token >= 0 else None


def recorded_vocab_size(folder: Path) -> int | None:
    """Rows of the embedding, as the config.json beside a tokenizer has it; None where it has
    none."""
    size = _json_of(folder / "config.json").get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary that a tokenizer can be loaded from."""
    return any((folder / name).is_file() for name in VOCABULARIES)


@contextlib.contextmanager
def one_line_for_retries() -> Iterator[None]:
    """The hub's client logs two lines at each of its twelve attempts; inside this, one line at the
    first."""
    reported = os.environ.get("RANK", "0") != "0"  # under torchrun one rank reports

    def once(record: logging.LogRecord) -> bool:
        nonlocal reported
        text = record.getMessage()
        if "Retrying in" not in text and "thrown while requesting" not in text:
            return True
        if not reported:
            print(
                "the Hugging Face hub does not answer; trying again, at most for a minute",
                file=sys.stderr,
            )
        reported = True
        return False

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
