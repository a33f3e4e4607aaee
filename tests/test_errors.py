"""What bad input gets: one line that names flag, file and line, exit code 2, nothing half-written.

The programs run in this process; processes that torchrun would start are pretended by its
environment variable.
"""

from __future__ import annotations

import gzip
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from rmega.cli import run_tool
from tests.conftest import ROOT
from tests.tiny import tiny_llama

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} and {i}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * i}."}],
        "rejected": [{"role": "assistant", "content": "I do not like numbers."}],
    }
    for i in range(12)
]


@pytest.fixture(autouse=True)
def leave_the_group():
    yield
    from rmega import distributed

    distributed.finish()


@pytest.fixture
def program(capsys, monkeypatch):
    """Run a program; (exit code, the error line) after checking that there is one line and no
    traceback."""

    def run(path: str, *argv: object, world: int = 1) -> tuple[int, str]:
        if world > 1:
            monkeypatch.setenv("WORLD_SIZE", str(world))
        capsys.readouterr()
        if path == "examples/pretrain_reward.py":
            from examples.pretrain_reward import main

            code = run_tool(main, [str(a) for a in argv])
        else:
            monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            code = end.value.code
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said
        assert code == 0 or len(errors) == 1, said
        return code, errors[0] if errors else ""

    return run


def refused(result: tuple[int, str], *parts: object) -> None:
    code, line = result
    assert code == 2
    for part in parts:
        assert str(part) in line, line


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory) -> Path:
    """A small good dataset for small_llama."""
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    preprocess(
        PreprocessArgs(
            input=[str(folder / "rows.jsonl")],
            tokenizer=str(small_llama),
            output_prefix=str(folder / "train"),
            workers=1,
        )
    )
    return folder / "train"


# Preference files

PREPROCESS = "tools/preprocess_pref.py"


@pytest.fixture
def preprocess(program, small_llama, tmp_path):
    def run(source: object, *more: object) -> tuple[int, str]:
        return program(
            PREPROCESS,
            "--input",
            source,
            "--tokenizer",
            small_llama,
            "--output-prefix",
            tmp_path / "out",
            "--workers",
            1,
            *more,
        )

    return run


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n\n", "no rows"),
        ("other.jsonl", b'{"a": 1}\n', "no known schema"),
        (
            "cut.jsonl.gz",
            gzip.compress(json.dumps(ROWS[0]).encode() * 500, mtime=0)[:60],
            "cannot be read",
        ),
        ("rows.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_data_files_that_cannot_be_used(
    name: str, content: bytes, said: str, preprocess, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(preprocess(tmp_path / name), name, said)
    assert files(tmp_path) == {name}


def test_a_run_folder_that_is_not_there_comes_before_matplotlib(
    tmp_path: Path, monkeypatch
) -> None:
    from rmega.report import figures

    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    from rmega.commands import report_run

    with pytest.raises(ValueError, match="nope: no such folder"):
        report_run.main(report_run.ReportArgs(run=str(tmp_path / "nope")))


def test_the_comparison_with_trl_asks_for_it(monkeypatch) -> None:
    from benchmarks import vs_trl

    monkeypatch.setattr(vs_trl, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^trl is not installed \(pip install 'rmega\[trl\]'\)$"):
        vs_trl.main(["--hf-model", "m", "--data", "d"])


def test_a_missing_data_file(preprocess, tmp_path: Path) -> None:
    refused(preprocess(tmp_path / "nowhere.jsonl"), "--input", "nowhere.jsonl", "no such file")
    assert files(tmp_path) == set()


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_rows_without_a_response(field: str, preprocess, tmp_path: Path) -> None:
    """A third of the rows is more than can be an accident: stop, and name the first."""
    rows = [
        {k: v for k, v in row.items() if i % 3 or k != field} for i, row in enumerate(ROWS, start=1)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(preprocess(tmp_path / "rows.jsonl"), "rows.jsonl:3", field, "of 12 rows")
    assert not [f for f in files(tmp_path) if f.endswith((".bin", ".idx", ".json", ".npy"))]


def test_a_broken_line_in_the_middle(preprocess, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[6] = lines[6][:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    refused(preprocess(tmp_path / "rows.jsonl"), "rows.jsonl:7")
    code, _ = preprocess(tmp_path / "rows.jsonl", "--max-rejected", "0.2", "--force")
    assert code == 0  # allowed by name: left out, counted, and written down with its line
    assert json.loads((tmp_path / "out.json").read_text())["num_comparisons"] == 11
    assert any("rejected" in name for name in files(tmp_path))


def test_an_output_that_exists(preprocess, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert preprocess(tmp_path / "rows.jsonl")[0] == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    refused(preprocess(tmp_path / "rows.jsonl"), "--output-prefix", "out", "--force")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_tokenizer_that_is_none(program, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "empty").mkdir()
    refused(
        program(
            PREPROCESS,
            "--input",
            tmp_path / "rows.jsonl",
            "--tokenizer",
            tmp_path / "empty",
            "--output-prefix",
            tmp_path / "out",
        ),
        "--tokenizer",
        "empty",
    )
    assert files(tmp_path) == {"rows.jsonl", "empty"}


# Training


def good_flags(model: object, data: object) -> list[object]:
    """What a training needs beside its length and a place to save."""
    flags = "--global-batch-size 4 --precision fp32 --matmul-precision highest".split()
    sources = data if isinstance(data, list) else [data]
    return ["--hf-model", model, "--data-path", *sources, *flags]


@pytest.fixture
def train(program, small_llama, data, tmp_path):
    """The training program with good flags, which ``more`` overrides; nothing may be left behind in
    --save."""

    def run(
        *more: object,
        model: object = None,
        source: object = None,
        steps: bool = True,
        world: int = 1,
    ) -> tuple[int, str]:
        result = program(
            "examples/pretrain_reward.py",
            *good_flags(model or small_llama, source or data),
            *(("--train-steps", 1) if steps else ()),
            "--save",
            tmp_path / "run",
            *more,
            world=world,
        )
        assert result[0] == 0 or not (tmp_path / "run").exists()
        return result

    return run


def test_steps_or_epochs(train) -> None:
    refused(train(steps=False), "--train-steps", "--train-epochs")
    refused(train("--train-epochs", 1), "--train-steps", "--train-epochs")


def test_layouts_that_do_not_fit(train) -> None:
    refused(train("--tp", 2, world=3), "--tp 2 x --pp 1 = 2 does not divide the 3 processes")
    refused(
        train("--tp", 4, "--sp", "--pp", 2, world=12),
        "--tp 4 x --pp 2 = 8 does not divide the 12 processes",
    )
    refused(
        train("--tp", 8, world=8),
        "--tp 8 does not divide the model's 4 key/value heads",
        "--pad-attention-heads",
    )
    refused(train("--pp", 2, world=2), "--pp 2", "5 layers", "--num-layers-in-first-pipeline-stage")
    refused(train("--dp", 3, world=2), "--dp 3")
    refused(
        train("--global-batch-size", 1, world=2), "--global-batch-size 1", "2 data-parallel ranks"
    )


def test_datasets_that_are_not_there(train, data, tmp_path: Path) -> None:
    refused(train(source=tmp_path / "nowhere"), "nowhere", "tools/preprocess_pref.py")
    refused(train("--valid-data-path", tmp_path / "nowhere"), "nowhere", "tools/preprocess_pref.py")
    refused(train(source=f"x={data}"), f"--data-path x={data}", "not a number")
    refused(train("--valid-data-path", data, data), "--valid-data-path", "the name train is taken")
    for suffix in (".bin", ".idx", ".scores.npy"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(data.parent, tmp_path / "copy")
        (tmp_path / "copy" / f"train{suffix}").unlink()
        refused(train(source=tmp_path / "copy" / "train"), f"train{suffix}: missing")


def edited(data: Path, folder: Path, **fields: object) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data.parent, folder)
    manifest = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**manifest, **fields}))
    return folder / "train"


def test_tokenizer_and_dataset_that_do_not_match(
    train, data, internlm2_tokenizer, small_llama, tmp_path
) -> None:
    other = edited(data, tmp_path / "other", tokenizer_fingerprint="0123456789abcdef")
    refused(
        train(source=other), "--data-path", other, "0123456789abcdef", "--hf-model", small_llama
    )
    refused(train("--valid-data-path", other), "--valid-data-path", other, "tokenizer_fingerprint")
    refused(
        train("--valid-data-path", edited(data, tmp_path / "token", reward_token_id=7)),
        "reward_token_id 7",
    )
    second = [data, tmp_path / "token" / "train"]  # each of several, not the first alone
    refused(train(source=second), "--data-path", "token", "reward_token_id 7")
    refused(
        train(source=edited(data, tmp_path / "old", format_version=0)),
        "train.json",
        "format version 0",
    )


def test_models_that_cannot_be_used(train, small_llama, tmp_path: Path) -> None:
    refused(train(model=tmp_path / "nowhere"), "--hf-model", "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(train(model=tmp_path / "empty"), "empty", "config.json")
    for change, parts in (
        ({"model_type": "gpt2"}, ("config.json", "model_type='gpt2'", "internlm2", "llama")),
        ({"architectures": ["LlamaForTokenClassification"]}, ("config.json", "architectures")),
        ({"attention_bias": True}, ("config.json", "attention_bias")),
        ({"num_hidden_layers": 6}, ("layers.5.",)),
        ({"intermediate_size": 64}, ("model.safetensors", "shape")),
    ):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(small_llama, tmp_path / "model")
        config = json.loads((small_llama / "config.json").read_text())
        (tmp_path / "model" / "config.json").chmod(0o644)
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}))
        refused(train(model=tmp_path / "model"), *parts)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(small_llama, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(train(model=tmp_path / "model"), "model.safetensors", "not a safetensors file")


def test_a_model_without_tokenizer_takes_any_data_that_fits(train, tmp_path: Path) -> None:
    """Ids beyond its vocabulary are refused still."""
    refused(train(model=tiny_llama(tmp_path / "model")), "--data-path", "512 ids", "256")


def test_optional_packages_that_are_missing(train, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    refused(
        train("--transformer-impl", "transformer_engine"),
        "--transformer-impl transformer_engine",
        "rmega[te]",
    )


def test_runs_that_are_not_there_or_are_there_already(
    program, train, small_llama, data, tmp_path: Path
) -> None:
    refused(train("--load", tmp_path / "nowhere"), "--load", "nowhere", "no checkpoint")
    flags = [*good_flags(small_llama, data), "--train-steps", 1]
    run = tmp_path / "done"
    assert program("examples/pretrain_reward.py", *flags, "--save", run)[0] == 0
    before = sorted((p.relative_to(run), p.stat().st_mtime_ns) for p in run.rglob("*"))

    def again(*more: object, source: object = None) -> tuple[int, str]:
        changed = [source if a is data and source else a for a in flags]
        result = program("examples/pretrain_reward.py", *changed, *more)
        assert sorted((p.relative_to(run), p.stat().st_mtime_ns) for p in run.rglob("*")) == before
        return result

    refused(again("--save", run), "--save", run, "holds a run already", "--load")
    refused(again("--load", run, "--seed", 1), "--seed 1", "42")
    refused(again("--load", run, "--global-batch-size", 8), "--global-batch-size 8", "4")
    refused(again("--load", run, "--no-use-distributed-optimizer"), "--use-distributed-optimizer")
    # The same number of comparisons, but other ones.
    rows = [{**row, "rejected": row["chosen"], "chosen": row["rejected"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        program(
            PREPROCESS,
            "--input",
            tmp_path / "rows.jsonl",
            "--tokenizer",
            small_llama,
            "--output-prefix",
            tmp_path / "swapped",
            "--workers",
            1,
        )[0]
        == 0
    )
    refused(again("--load", run, source=tmp_path / "swapped"), "--data-path", "other data")
    refused(again("--load", run, source=f"2={data}"), "--data-path", "other data")
    (tmp_path / "file").write_text("not a folder")
    refused(
        again("--save", tmp_path / "file"),
        f"--save {tmp_path / 'file'}: ",
        "is a file, not a folder",
    )
    refused(
        again("--save", tmp_path / "file" / "run"),
        f"--save {tmp_path / 'file' / 'run'}: ",
        "is a file, not a",
    )
    assert program("examples/pretrain_reward.py", *flags, "--save", tmp_path / "second")[0] == 0
    refused(
        again("--load", tmp_path / "second", "--save", run), f"--save {run}: holds a run already"
    )


def test_nothing_is_built_for_a_run_that_cannot_start(
    train, program, small_llama, data, tmp_path, monkeypatch
) -> None:
    """Folders and checkpoints are looked at before the model is, which takes minutes for a large
    one."""
    flags = [*good_flags(small_llama, data), "--train-steps", 1]
    assert program("examples/pretrain_reward.py", *flags, "--save", tmp_path / "done")[0] == 0

    from rmega.training import components as engine

    def build_model(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(engine, "build_model", build_model)
    for more, says in (
        (["--save", tmp_path / "done"], "holds a run already"),
        (["--save", tmp_path / "done" / "config.json"], "is a file, not a folder"),
        (["--load", tmp_path], "no checkpoint in it"),
        (["--load", tmp_path / "done", "--seed", 1], "--seed 1"),
        (
            ["--load", tmp_path / "done", "--no-use-distributed-optimizer"],
            "--use-distributed-optimizer",
        ),
    ):
        refused(program("examples/pretrain_reward.py", *flags, *more), says)
    shard = next((tmp_path / "done" / "iter_0000001").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(
        program("examples/pretrain_reward.py", *flags, "--load", tmp_path / "done"),
        "no healthy checkpoint",
        shard.name,
    )


def test_texts_longer_than_the_models_positions(train, small_llama, data, tmp_path, capsys) -> None:
    """Said in one line with counts; refused, with a flag that training has, where rotary scaling
    depends on them."""
    import dataclasses

    from rmega.data.indexed import open_preferences
    from rmega.models.geometry import RopeScaling
    from rmega.models.hf import read_geometry
    from rmega.training.preflight import check_positions

    dataset, (geometry, _) = open_preferences(data), read_geometry(small_llama)
    texts = [
        [len(c.prefix) + len(s) for s in c.suffixes]
        for c in (dataset.get(i) for i in range(len(dataset)))
    ]
    known = sorted({max(own) for own in texts})[-2]
    over = sum(max(own) > known for own in texts)
    assert 0 < over < len(texts)
    for kind in ("default", "linear", "llama3"):
        scaling = RopeScaling(rope_type=kind, factor=2.0, original_max_position_embeddings=16)
        for positions, said in (
            (known, f"{over} of {len(texts)} comparisons"),
            (max(map(max, texts)), ""),
        ):
            check_positions(
                "--data-path",
                dataset,
                dataclasses.replace(
                    geometry, rope_scaling=scaling, max_position_embeddings=positions
                ),
            )
            out = capsys.readouterr().out
            assert (
                out.count("\n") == bool(said)
                and said in out
                and (not said or f"--max-length {known}" in out)
            )
    shutil.copytree(small_llama, tmp_path / "model")
    config = json.loads((small_llama / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "model" / "config.json").chmod(0o644)
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": known})
    )
    longest = max(map(max, texts))
    for more in ((), ("--dry-run",)):
        refused(
            train(*more, model=tmp_path / "model"),
            f"--data-path {data}: has texts of {longest} tokens",
            "dynamic",
            f"--max-length {known}",
        )


# Export and scoring


def test_what_cannot_be_exported_or_scored(program, small_llama, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    convert = "tools/convert_to_hf.py"
    refused(
        program(convert, "--load", tmp_path / "nowhere", "--output", tmp_path / "out"),
        "--load",
        "nowhere",
    )
    refused(program(convert, "--load", tmp_path / "there", "--output", tmp_path / "out"), "there")
    assert files(tmp_path) == {"there"}


def test_a_batch_of_ties_has_no_pairs_and_does_no_harm(small_llama) -> None:
    """Not an error: comparisons without a preference give no loss and no gradient."""
    from rmega.config import LossArgs
    from rmega.data.packing import pack
    from rmega.training.loss import pair_loss
    from tests.tiny import random_comparisons

    ties = [type(c)(**{**vars(c), "scores": c.scores * 0}) for c in random_comparisons(3)]
    batch = pack(ties)
    rewards = torch.zeros(len(batch.pooled), requires_grad=True)
    loss, count, _ = pair_loss(LossArgs(), batch, rewards)
    loss.backward()
    assert float(loss.detach()) == 0 and int(count) == 0 and float(rewards.grad.abs().max()) == 0
