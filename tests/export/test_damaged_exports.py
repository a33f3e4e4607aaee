"""An export whose files are not as they were written is refused by every reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE, UNVERIFIED, not_ours
from rmega.preferences.load_tokenizer import load_tokenizer
from rmega.scoring.scorer import scorer
from tests import runs
from tests.dist import run_distributed


@pytest.fixture(scope="module")
def work(small_llama: Path, tmp_path_factory) -> Path:
    """A folder with a run and its export in shards."""
    work = tmp_path_factory.mktemp("work")
    data = runs.make_data(small_llama, work, count=24)
    argv = runs.flags(small_llama, data, work / "run", steps=1)
    assert run_distributed(runs.train, 1, argv) == [0]
    assert convert(run=work / "run", output=work / "out", max_shard_size="400KB") == 0
    return work


@pytest.fixture
def export(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "out", tmp_path / "out"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-*.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        RECIPE,
    ],
)
@pytest.mark.parametrize("how", ["one bit", "gone"])
def test_a_changed_file_is_named(name: str, how: str, export: Path) -> None:
    (file,) = export.glob(name)
    if how == "gone":
        file.unlink()
    elif name == RECIPE:  # a number that would change every reward
        text = file.read_text()
        assert '"reward_token_id": 2' in text
        file.write_text(text.replace('"reward_token_id": 2', '"reward_token_id": 3'))
    else:
        flip(file)
    if (name, how) == (RECIPE, "gone"):
        with scorer(export) as model:  # then it is a model folder like any other
            assert model.tokenizer.reward_token_id == 2
        return
    with pytest.raises(ValueError, match=file.name) as error, scorer(export):
        pass
    assert str(export) in str(error.value) and "\n" not in str(error.value)
    if "safetensors" not in name:
        with pytest.raises(ValueError, match=file.name):
            load_tokenizer(export)
    assert not_ours(export) or how == "gone"


def test_a_changed_export_is_no_base_of_a_training(work: Path, export: Path, tmp_path) -> None:
    (file,) = export.glob("model-00002-of-*.safetensors")
    flip(file)
    argv = runs.flags(export, str(work / "rows"), tmp_path / "run", steps=1)
    with pytest.raises(RuntimeError, match=f"--hf-model .*{file.name}: its content has changed"):
        run_distributed(runs.train, 1, argv)


def test_what_no_reward_depends_on_may_change(export: Path) -> None:
    with scorer(export) as model:
        before = model.score_tokens([[[5, 6, 2]]])
    (export / "README.md").write_text("edited\n")
    (export / "added.txt").write_text("added\n")
    with scorer(export) as model:
        assert model.score_tokens([[[5, 6, 2]]])[0] == pytest.approx(before[0], rel=1e-5)


def test_an_edit_on_purpose(export: Path) -> None:
    """Without its line in the list of files a changed file is read as it is."""
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    recipe = json.loads((export / RECIPE).read_text())
    del recipe["files"]["config.json"], recipe["checksum"]
    (export / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="rope_parameters"), scorer(export):
        pass  # the two forms of the field disagree: it is read
    (export / "config.json").write_text(json.dumps(config))
    with scorer(export):
        pass


def test_verify_only_of_a_file_that_transformers_cannot_read(work: Path, export: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = export.glob("model-00002-of-*.safetensors")
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.dim() == 2)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{file.name}: changed since the export") as error:
        verify_only(run=work / "run", output=export)
    assert "\n" not in str(error.value) and (export / UNVERIFIED).exists()
