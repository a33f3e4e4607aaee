"""The mean of checkpoints as one export: every value, its verification, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from rmega.commands import average
from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE, UNVERIFIED, mark_unverified
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
    assert "written values are the mean's" in recipe["verification"]["weights"]
    assert recipe["evaluation"] == [] and recipe["verification"]["training_difference"] is None
    assert (
        "| mean of the weights of | `run_base/iter_0000010`" in (output / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="an average, which tools/average.py verifies"):
        verify_only(run=runs[0], output=output)


def test_a_value_that_is_not_the_mean_fails(parts, tmp_path, monkeypatch, capsys) -> None:
    from rmega.export import write_folder as steps

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
        ([run], "two or more checkpoints or exports were expected"),
        ([run, f"{run}/iter_0000010"], "iter_0000010: is named twice"),
        ([run, str(parts[0][0])], "base is a model folder and .*run_base is not"),
        (list(map(str, parts[0])), "base: no reward_recipe.json of an export"),
        ([run, str(tmp_path)], "no checkpoint in it"),
        ([run, str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(ValueError, match=says):
            average.main([*argv, "--output", str(tmp_path / "mean")])
    other = str(parts[1][1])
    with pytest.raises(ValueError, match="lies in the run folder"):
        average.main([run, other, "--output", f"{other}/mean"])
    with pytest.raises(ValueError, match=f"mean: lies in the part {run};"):
        average.main([run, other, "--output", f"{run}/mean"])


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
    for folder in folders:
        edit_info(folder, base={"folder": "/gone", "files": {}}, base_model="/gone")
    with pytest.raises(ValueError, match=f"^{folders[0]}: base model /gone: no such folder"):
        convert(run=folders[0], output=tmp_path / "no", average_with=folders[1:])


@pytest.fixture(scope="module", params=["internlm2", "llama"])
def exports(parts, request, tmp_path_factory):
    """Three exports of one base, in one format."""
    root = tmp_path_factory.mktemp(f"exports_{request.param}")
    for run in parts[1]:
        assert convert(run=run, output=root / run.name, family=request.param) == 0
    return [root / run.name for run in parts[1]]


def test_exports_are_averaged(exports, parts, tmp_path, capsys) -> None:
    output = tmp_path / "mean"
    assert average.main([*map(str, exports), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "verified" in said.splitlines() and "16 comparisons of random tokens" in said
    written, of = weights(output), [weights(folder) for folder in exports]
    assert written.keys() == of[0].keys()
    for name, value in written.items():
        exact = torch.stack([part[name].double() for part in of]).mean(0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, of[0][name])
    recipe, first = (json.loads((f / RECIPE).read_text()) for f in (output, exports[0]))
    assert recipe["average_of"] == [f"{f.parent.name}/{f.name}" for f in exports]
    assert recipe["architecture"] == first["architecture"]
    assert recipe["verification"]["passed"] and recipe["verification"]["random"]
    assert recipe["evaluation"] == [] and recipe["held_out_rewards"] is None
    assert "32 responses of 16 comparisons of random tokens" in (output / "README.md").read_text()
    # The mean of the checkpoints in the same format has the same bytes.
    family = "internlm2" if "InternLM2" in recipe["architecture"] else "llama"
    of_runs = tmp_path / "of_runs"
    options = dict(average_with=parts[1][1:], family=family)
    assert convert(run=parts[1][0], output=of_runs, **options) == 0
    assert all(torch.equal(value, written[name]) for name, value in weights(of_runs).items())


def test_a_mean_of_exports_is_verified_by_its_rewards(exports, tmp_path, monkeypatch) -> None:
    """Values that are compared with themselves say nothing: the rewards are compared, too."""
    from rmega.export import verify
    from rmega.export import write_folder as steps

    def of_the_first_alone(parts):
        return parts[0].tensors()

    monkeypatch.setattr(steps, "weights_of", of_the_first_alone)
    monkeypatch.setattr(verify, "weights_of", of_the_first_alone)
    output = tmp_path / "mean"
    assert convert(run=exports[0], output=output, average_with=exports[1:]) == 1
    assert "Rewards differ by" in (output / UNVERIFIED).read_text()


def test_exports_of_half_precision_are_averaged_in_fp32(parts, tmp_path) -> None:
    exports = [tmp_path / run.name for run in parts[1]]
    for run, folder in zip(parts[1], exports, strict=True):
        assert convert(run=run, output=folder, dtype="bfloat16") == 0
    for dtype, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        output = tmp_path / dtype
        options = dict(dtype=dtype, average_with=exports[1:])
        assert convert(run=exports[0], output=output, **options) == 0
        a, b, c = map(weights, exports)
        for name, value in weights(output).items():
            total = a[name].float() + b[name].float() + c[name].float()
            assert torch.equal(value, (total / 3).to(kind)), name


def test_exports_that_cannot_be_averaged(exports, parts, tmp_path) -> None:
    def changed(name: str, **fields) -> str:
        """A copy of the second export whose recipe has other fields."""
        from rmega.export.folder import write_recipe

        copy = shutil.copytree(exports[1], tmp_path / name)
        recipe = json.loads((copy / RECIPE).read_text())
        write_recipe(copy, {**recipe, **fields})
        return str(copy)

    first, output = str(exports[0]), str(tmp_path / "mean")
    damaged = shutil.copytree(exports[1], tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    unverified = shutil.copytree(exports[1], tmp_path / "unverified")
    mark_unverified(unverified, "")
    foreign = shutil.copytree(exports[1], tmp_path / "foreign")
    (foreign / RECIPE).unlink()
    other = "llama" if "internlm2" in str(exports[0].parent) else "internlm2"
    assert convert(run=parts[1][1], output=tmp_path / "other_format", family=other) == 0
    for second, says in (
        (changed("base", base_model="org/other"), "its base_model is org/other, that of "),
        (changed("token", reward_token_id=7), "its reward_token_id is 7, that of .* is 3"),
        (changed("tokenizer", data={"tokenizer_fingerprint": "x"}), "tokenizer_fingerprint is x"),
        (changed("template", data={"template_hash": "x"}), "its template_hash is x, that of "),
        (changed("adapter", adapter_of="org/base"), "adapter: an adapter; average exports of"),
        (str(damaged), "its content has changed since the export"),
        (str(unverified), "marked as UNVERIFIED"),
        (str(foreign), "foreign: no reward_recipe.json of an export"),
        (str(tmp_path / "other_format"), "its geometry is {'family': "),
        (str(parts[1][1]), "is a model folder and .* is not: export checkpoints first"),
        (first, "is named twice"),
    ):
        with pytest.raises(ValueError, match=says):
            average.main([first, second, "--output", output])
    with pytest.raises(ValueError, match=f"--format {other}: an average of exports keeps"):
        average.main([first, str(exports[1]), "--output", output, "--format", other])
    with pytest.raises(ValueError, match=f"is the part {first};"):
        average.main([first, str(exports[1]), "--output", first, "--force"])
    assert not (tmp_path / "mean").exists()


def test_exports_with_a_tokenizer(tmp_path) -> None:
    """Templates that write the reward token already are read as they are."""
    from tests.exports import make_export

    for kind in ("llama", "internlm2"):
        export = make_export(tmp_path / kind, kind)
        output = tmp_path / f"mean_{kind}"
        twin = shutil.copytree(export, tmp_path / kind / "twin")
        assert convert(run=export, output=output, average_with=[twin]) == 0
        ours, theirs = (json.loads((f / RECIPE).read_text()) for f in (output, export))
        keys = ("token_ids", "text", "messages")
        assert [ours["example"][k] for k in keys] == [theirs["example"][k] for k in keys]
        keys = ("reward_token", "pad_token", "pad_token_id", "template_writes_reward_token")
        assert [ours[k] for k in keys] == [theirs[k] for k in keys]
        # Twice the same weights: their mean is exactly that.
        assert all(torch.equal(v, weights(export)[name]) for name, v in weights(output).items())
