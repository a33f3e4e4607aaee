"""Opening somebody's checkpoint runs none of their code: neither ``.metadata`` nor a shard can name
a function that is then called."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rmega.checkpointing import run_folder
from rmega.checkpointing.metadata import read_metadata
from rmega.io import fingerprint
from tests.checkpointing.test_checkpoint import steps
from tests.dist import run_distributed
from tests.tiny import tiny_llama


class Calls:
    """Pickled, it calls a function when it is read."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    run_distributed(steps, 1, "1", folder, None, str(run), 1)
    return run


def record(checkpoint: Path) -> None:
    """Give rmega.json the checksums of what is there, as whoever crafts a checkpoint would."""
    info = json.loads((checkpoint / "rmega.json").read_text())
    info["files"] = {name: fingerprint(checkpoint / name) for name in info["files"]}
    (checkpoint / "rmega.json").write_text(run_folder.info_text(info))


def craft(run: Path, target: Path, metadata: object) -> Path:
    """A copy of a run whose newest checkpoint has another .metadata, with the right checksum."""
    shutil.copytree(run, target)
    checkpoint = target / "iter_0000001"
    (checkpoint / ".metadata").write_bytes(
        metadata if isinstance(metadata, bytes) else pickle.dumps(metadata)
    )
    record(checkpoint)
    return target


def test_what_a_checkpoint_holds_is_read(run) -> None:
    ours = read_metadata(run / "iter_0000001")
    theirs = pickle.loads((run / "iter_0000001" / ".metadata").read_bytes())
    assert ours == theirs and len(ours.state_dict_metadata) > 10
    assert not [key for key in ours.state_dict_metadata if "_extra_state" in key]


CALLS = [
    (os.system, "touch hacked"),
    (eval, "open('hacked', 'w')"),
    (getattr, 3, "real"),
    (torch.load, "x"),
    (__import__, "os"),
    (print, "hacked"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
@pytest.mark.parametrize("where", ["alone", "inside"])
def test_code_in_metadata_is_refused(call, where, run, folder, tmp_path) -> None:
    """By the reader that exports use, and before Megatron-Core's reads it in training or
    scoring."""
    function, *args = call
    here = str(tmp_path / "hacked")
    content = crafted = Calls(function, *(str(a).replace("hacked", here) for a in args))
    if where == "inside":
        content = read_metadata(run / "iter_0000001")
        content.planner_data = crafted
    target = craft(run, tmp_path / "run", content)
    with pytest.raises(ValueError, match=r"/\.metadata: not a readable checkpoint: it names "):
        read_metadata(target / "iter_0000001")
    from rmega.export.checkpoint_tensors import CheckpointTensors

    with pytest.raises(ValueError, match="it names"):
        CheckpointTensors(target / "iter_0000001")
    if call is CALLS[0]:
        with pytest.raises(RuntimeError, match=r"ValueError: .*\.metadata: not a readable"):
            run_distributed(steps, 1, "1", folder, str(target), None, 2)
    assert not (tmp_path / "hacked").exists()


def test_code_in_the_common_state_is_refused(run, folder, tmp_path) -> None:
    """Megatron-Core reads common.pt by ``torch.load``, whose default refuses functions."""
    target = tmp_path / "run"
    shutil.copytree(run, target)
    torch.save(
        {"x": Calls(os.system, f"touch {tmp_path}/hacked")}, target / "iter_0000001/common.pt"
    )
    record(target / "iter_0000001")
    with pytest.raises(RuntimeError, match="WeightsUnpickler|weights_only"):
        run_distributed(steps, 1, "1", folder, str(target), None, 2)
    assert not (tmp_path / "hacked").exists()


def test_code_in_a_shard_is_refused(run, folder, tmp_path) -> None:
    """What .metadata calls bytes, torch's loader unpickles without restriction: here a tensor of
    the model, and the extra state of a layer, which is not read at all."""
    for key, refused in (
        ("decoder.final_layernorm.weight", True),
        ("embedding.word_embeddings.weight", True),
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", False),
    ):
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        metadata = read_metadata(run / "iter_0000001")
        place = next(
            p for i, p in metadata.storage_data.items() if i.fqn.startswith("decoder.final")
        )
        buffer = io.BytesIO()
        torch.save(Calls(os.system, f"touch {tmp_path}/hacked"), buffer)
        entry = BytesStorageMetadata()
        entry.size = torch.Size((1,))  # as checks of shapes would ask for it
        metadata.state_dict_metadata[key] = entry
        metadata.storage_data = {
            index: p for index, p in metadata.storage_data.items() if index.fqn != key
        }
        target = tmp_path / key.replace("/", "_")
        shutil.copytree(run, target)
        shard = target / "iter_0000001" / place.relative_path
        place = type(place)(place.relative_path, shard.stat().st_size, len(buffer.getvalue()))
        metadata.storage_data[MetadataIndex(key)] = place
        with open(shard, "ab") as file:
            file.write(buffer.getvalue())
        (target / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(metadata))
        record(target / "iter_0000001")
        if refused:
            with pytest.raises(RuntimeError, match=f"ValueError: .*{key} is not a tensor"):
                run_distributed(steps, 1, "1", folder, str(target), None, 2)
        else:
            assert len(run_distributed(steps, 1, "1", folder, str(target), None, 2)[0]["losses"])
        assert not (tmp_path / "hacked").exists()


def test_a_shard_of_another_folder_is_refused(run, tmp_path) -> None:
    metadata = read_metadata(run / "iter_0000001")
    for path in ("../iter_0000009/__0_0.distcp", "/etc/passwd"):
        for place in metadata.storage_data.values():
            place.relative_path = path
        target = craft(run, tmp_path / path.replace("/", "_"), metadata)
        with pytest.raises(ValueError, match="is not a file of this folder"):
            read_metadata(target / "iter_0000001")


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"junk", pickle.dumps(None), pickle.dumps({"a": 1}), pickle.dumps(3)]
)
def test_metadata_that_is_none(content, run, tmp_path) -> None:
    target = craft(run, tmp_path / "run", content)
    with pytest.raises(ValueError, match=r"\.metadata: not a readable checkpoint"):
        read_metadata(target / "iter_0000001")


def test_metadata_cut_or_changed_anywhere(run, tmp_path) -> None:
    """1,000 random changes, with a checksum that fits: read, or refused in one line."""
    import random

    rng = random.Random(0)
    content = (run / "iter_0000001" / ".metadata").read_bytes()
    path = tmp_path / ".metadata"
    refused = 0
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])
        try:
            read_metadata(tmp_path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 500
