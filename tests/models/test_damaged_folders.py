"""Damaged model folders: an error of one line that names the file, and nothing of torch's,
safetensors' or Python's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmega.models.hf import load_hf, read_geometry
from tests.hf_fixtures import Stage, hf_config, hf_tensors, tiny, write_folder

SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in three shards."""
    geometry = tiny("llama")
    return write_folder(tmp_path / "model", hf_config(geometry), hf_tensors(geometry), shards=3)


def read(folder: Path) -> None:
    geometry, _ = read_geometry(folder)
    load_hf(Stage(geometry), folder, geometry, tp_rank=0, tp_size=1)


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors.popitem()
    save_file(tensors, folder / SHARD)


def not_finite(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        next(iter(tensors.values())).view(-1)[3] = value
        save_file(tensors, folder / SHARD)

    return damage


def shard_named(name: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"]["model.norm.weight"] = name
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def holds(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lacks_a_tensor, f"{SHARD}: .*which the index names there, is not in it"),
        (not_finite(float("nan")), f"{SHARD}: .* holds values that are not finite"),
        (not_finite(float("-inf")), f"{SHARD}: .* holds values that are not finite"),
        (shard_named("model-00001-of-00003.safetensors"), "00001-of-00003.*norm.*is not in it"),
        (shard_named("../model.safetensors"), "is no name of a file"),
        (shard_named("/etc/passwd"), "is no name of a file"),
        (shard_named(""), "is no name of a file"),
        (shard_named(None), "is no name of a file"),
        (shard_named(["a"]), "is no name of a file"),
        (holds(INDEX, b"\xff\xfe"), f"{INDEX}: .*utf-8"),
        (holds(INDEX, b"[" * 100_000), f"{INDEX}: .*nested too deeply"),
        (holds(INDEX, b'{"weight_map": [1]}'), f"{INDEX}: no weight_map"),
        (holds("config.json", '{"a": "b"}'.encode("utf-16")), "config.json: .*utf-8"),
        (holds("config.json", b"[" * 100_000), "config.json: .*nested too deeply"),
        (holds("config.json", b'{"a": 1, "a": 2}'), "config.json: the key 'a' is there twice"),
        (holds("config.json", b'{"a": ' + b"9" * 5000 + b"}"), "config.json: "),
        (holds("config.json", b"{"), "config.json: line 1: not JSON"),
    ],
)
def test_damage_is_named_in_one_line(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    read(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", None])
def test_a_damaged_bin_file(tmp_path: Path, content: bytes | None) -> None:
    geometry = tiny("llama")
    folder = write_folder(tmp_path / "model", hf_config(geometry), {"a": torch.ones(1)})
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if content is None:
        torch.save([1, 2], file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="pytorch_model.bin|weights"):
        read(folder)
