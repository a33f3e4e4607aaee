"""What is wrong with the data is said before a model is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rmega.config import LossArgs
from rmega.data import integrity
from rmega.data.batching import Mixture
from rmega.data.indexed import open_preferences, split_label
from rmega.training import preflight
from tests import runs
from tests.dist import run_distributed
from tests.training.test_resume import refused


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(data, tmp_path) -> Path:
    """A dataset of the test's own."""
    for file in Path(data).parent.glob("rows.*"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / "rows"


def write_manifest(prefix: Path, **fields) -> None:
    file = Path(f"{prefix}.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".scores.npy", ".sources.npy"])
def test_one_bit_of_the_data_is_noticed(suffix, copy, small_llama) -> None:
    """By whichever rank reads the file."""
    file = Path(f"{copy}{suffix}")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    if suffix == ".idx":  # which is noticed even earlier
        with pytest.raises(ValueError, match="damaged"):
            open_preferences(copy)
        return
    shares = [integrity.damage(open_preferences(copy), share=(i, 5)) for i in range(5)]
    assert sum(map(bool, shares)) >= 1
    assert f"rows{suffix}: its content has changed" in next(filter(None, shares))
    if suffix == ".bin":
        for said in run_distributed(refused, 2, runs.flags(small_llama, str(copy), steps=1)):
            assert f"--data-path {copy}.bin: its content has changed (checksum)" in said


@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_an_id_outside_the_vocabulary_is_noticed(value, copy) -> None:
    tokens = np.fromfile(f"{copy}.bin", np.int32)
    tokens[7] = value
    tokens.tofile(f"{copy}.bin")
    write_manifest(copy, checksums={})
    assert f"token 7 is {value}, outside the vocabulary" in integrity.damage(open_preferences(copy))


def test_other_chat_templates_are_refused(copy, data, small_llama) -> None:
    write_manifest(copy, template_hash="0123456789abcdef")
    for more in ({"valid_data_path": copy}, {}):
        argv = runs.flags(small_llama, data, steps=1, **more)
        if not more:
            argv.insert(argv.index("--data-path") + 2, str(copy))
        (said,) = run_distributed(refused, 1, argv)
        assert f"{copy}: template_hash 0123456789abcdef differs from that of {data}" in said


@pytest.mark.parametrize("switch", ["use_margin", "scale_by_rating"])
def test_losses_that_need_ratings(switch, data, copy, capsys) -> None:
    rated, loss = open_preferences(copy), LossArgs(**{switch: True})
    flag = "--" + switch.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag}: no comparison of {data} has ratings"):
        preflight.check_ratings(Mixture([open_preferences(data)], [1.0], seed=0), loss)
    scores = np.array(rated.scores)
    scores[rated.document_indices[:5]] = 1
    np.save(f"{copy}.scores.npy", scores)
    both = [open_preferences(copy), open_preferences(data)]
    preflight.check_ratings(Mixture(both, [1.0, 1.0], seed=0), loss)
    said = capsys.readouterr().out
    assert f"{flag}: 55 of 60 comparisons of {copy} have no ratings" in said
    assert f"60 of 60 comparisons of {data}" in said


def test_a_path_with_an_equals_sign_is_a_path(copy, tmp_path) -> None:
    folder = tmp_path / "lr=1e-5"
    other = tmp_path / "2=x"
    for target in (folder, other, tmp_path / "x"):
        target.mkdir()
        for file in copy.parent.glob("rows.*"):
            shutil.copy(file, target / file.name)
    assert split_label(f"{folder}/rows") == (None, f"{folder}/rows")
    assert split_label(f"{other}/rows") == (None, f"{other}/rows")
    assert split_label(f"a/b={folder}/rows") == ("a/b", f"{folder}/rows")
    assert split_label(f"0.5={folder}/rows") == ("0.5", f"{folder}/rows")
    assert split_label(f"{folder}/nothing") == (None, f"{folder}/nothing")
    assert split_label("name=nothing") == ("name", "nothing")
    assert len(Mixture.open([f"{folder}/rows"], seed=0)) == 60
    assert len(Mixture.open([f"2={folder}/rows"], seed=0)) == 120
    with pytest.raises(ValueError, match="1e-5/nothing"):
        Mixture.open([f"{folder}/nothing"], seed=0)
