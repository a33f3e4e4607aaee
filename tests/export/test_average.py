"""The mean of checkpoints as one export: every value, its verification, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from rmega.commands import average
from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE, UNVERIFIED
from tests.export.test_convert import make_run, reward_folder, weights
from tests.runs import edit_info


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Three folders of one shape with other weights, and a run of each, in three layouts, which
    names the first folder as its base."""
    root = tmp_path_factory.mktemp("parts")
    folders = [reward_folder(root / "base", "llama")]
    for number in (1, 2):
        folder = shutil.copytree(folders[0], root / f"weights{number}")
        generator = torch.Generator().manual_seed(number)
        (file,) = folder.glob("*.safetensors")
        tensors = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in weights(folders[0]).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        folders.append(folder)
    runs = []
    for folder, layout in zip(folders, ("tp2,pp2", "1", "tp2"), strict=True):
        runs.append(make_run(folder, root / f"run_{folder.name}", layout))
        edit_info(runs[-1] / "iter_0000010", base_model=str(folders[0]))
    return folders, runs


def test_every_value_is_the_mean(parts, tmp_path, capsys) -> None:
    folders, runs = parts
    output = tmp_path / "mean"
    assert average.main([*map(str, runs), "--output", str(output)]) == 0
    assert "verified" in capsys.readouterr().out.splitlines()
    written, of = weights(output), [weights(folder) for folder in folders]
    assert written.keys() == of[0].keys()
    for name, value in written.items():
        exact = torch.stack([part[name].double() for part in of]).mean(0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, of[0][name])
    recipe = json.loads((output / RECIPE).read_text())
    assert recipe["average_of"] == [f"run_{f.name}/iter_0000010" for f in folders]
    assert recipe["verification"]["passed"] and recipe["verification"]["responses"] > 30
    assert recipe["evaluation"] == [] and recipe["verification"]["training_difference"] is None
    assert (
        "| mean of the weights of | `run_base/iter_0000010`" in (output / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="an average, which tools/average.py verifies"):
        verify_only(run=runs[0], output=output)


def test_a_value_that_is_not_the_mean_fails(parts, tmp_path, monkeypatch, capsys) -> None:
    from rmega.export import convert as steps

    export_weights = steps.export_weights

    def of_the_first_alone(source, *args, **options):
        return export_weights(source._sources[0], *args, **options)

    monkeypatch.setattr(steps, "export_weights", of_the_first_alone)
    output = tmp_path / "mean"
    assert convert(run=parts[1][0], output=output, average_with=parts[1][1:]) == 1
    assert (output / UNVERIFIED).exists() and "NOT VERIFIED" in capsys.readouterr().out


def test_half_precision_rounds_the_mean_once(parts, tmp_path) -> None:
    folders, runs = parts
    output = tmp_path / "mean"
    options = dict(dtype="bfloat16", average_with=runs[1:2])
    assert convert(run=runs[0], output=output, **options) == 0
    a, b = weights(folders[0]), weights(folders[1])
    for name, value in weights(output).items():
        assert torch.equal(value, ((a[name] + b[name]) / 2).bfloat16())


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"base_model": "org/other"}, "its base_model is org/other, that of "),
        ({"reward_token_id": 7}, "its reward_token_id is 7, that of .* is 3"),
        ({"pad_token_id": 7}, "its pad_token_id is 7, that of .* is 2"),
        ({"manifest": {"tokenizer_fingerprint": "x"}}, "its tokenizer_fingerprint is x, that of "),
        ({"manifest": {"template_hash": "x"}}, "its template_hash is x, that of "),
        ("rope_theta", r"its geometry is {'rope_theta': 7.0}, that of "),
    ],
)
def test_other_models_are_refused(parts, tmp_path, changes, says) -> None:
    runs = parts[1]
    other = shutil.copytree(runs[1], tmp_path / "run")
    if changes == "rope_theta":
        info = json.loads((other / "iter_0000010" / "rmega.json").read_text())
        changes = {"geometry": {**info["geometry"], "rope_theta": 7.0}}
    edit_info(other / "iter_0000010", **changes)
    with pytest.raises(ValueError, match=says):
        convert(run=runs[0], output=tmp_path / "mean", average_with=[other])
    assert not (tmp_path / "mean").exists()


def test_what_is_no_set_of_checkpoints(parts, tmp_path) -> None:
    run = str(parts[1][0])
    for argv, says in (
        ([run], "two or more checkpoints were expected"),
        ([run, f"{run}/iter_0000010"], "iter_0000010: is named twice"),
        ([run, str(parts[0][0])], "no checkpoint in it"),
        ([run, str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(ValueError, match=says):
            average.main([*argv, "--output", str(tmp_path / "mean")])
    inside = f"{parts[1][1]}/mean"
    with pytest.raises(ValueError, match="lies in the run folder"):
        average.main([run, str(parts[1][1]), "--output", inside])


def test_adapters_are_averaged_merged(small_llama, tmp_path) -> None:
    """The mean of B A is not the product of means."""
    from tests.dist import run_distributed
    from tests.runs import flags, make_data, train

    run, data = tmp_path / "run", make_data(small_llama, tmp_path)
    options = {"lora_rank": 4, "lr": 3e-2, "adam_eps": 0.1, "save_interval": 2}
    run_distributed(train, 1, flags(small_llama, data, run, steps=4, **options))
    folders = [run / "iter_0000002", run / "iter_0000004"]
    for folder in folders:
        assert convert(run=folder, output=tmp_path / folder.name) == 0
    output = tmp_path / "mean"
    assert convert(run=folders[0], output=output, average_with=folders[1:]) == 0
    a, b = (weights(tmp_path / folder.name) for folder in folders)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(a[name], b[name])
    for name, value in weights(output).items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
