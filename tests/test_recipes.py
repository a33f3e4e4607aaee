"""Every recipe runs to its export at a tiny scale; links and programs that the documents name
exist.

The commands in the documents: tests/test_documents.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,data,variables,flags",
    [
        ("internlm2_1.8b_ultrafeedback", "argilla.jsonl.gz", {}, []),
        (
            "ranked",
            "solutions.jsonl",
            {"VALID_FRACTION": "0.05"},
            ["--eval-interval", "1", "--save-interval", "1"],
        ),
        ("llama3_8b", "messages.jsonl.gz", {"NPROC": "2", "TP": "2"}, []),
        (
            "llama3.1_8b_rewardbench2",
            "messages.jsonl.gz",
            {"NPROC": "2", "TP": "2", "SEEDS": "1", "EVAL_DATA": "examples/data/demo.valid.jsonl"},
            [],
        ),
        ("qwen3_8b", "messages.jsonl.gz", {"TP": "1"}, []),
        (
            "long_context",
            "longer_is_worse.jsonl",
            {"NPROC": "1", "TP": "1", "MAX_LENGTH": "512", "VALID_FRACTION": "0.05"},
            [],
        ),
    ],
)
def test_recipe(name, data, variables, flags, small_llama, preference_files, tmp_path):
    env = {
        **os.environ,
        "MODEL": str(small_llama),
        "DATA": str(preference_files / data),
        "OUT": str(tmp_path / "o"),
        "NPROC": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    # The last --train-epochs and --global-batch-size on a command line win.
    done = subprocess.run(
        [
            "bash",
            str(ROOT / f"examples/recipes/{name}.sh"),
            "--train-epochs",
            "0.02",
            "--global-batch-size",
            "8",
            "--precision",
            "fp32",
            *flags,
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "o" / "export" / "config.json").is_file()
    assert not (tmp_path / "o" / "export" / "UNVERIFIED").exists()


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "examples/recipes").glob("[!c]*.sh")), ids=lambda p: p.stem
)
def test_variables_reach_a_recipe(recipe, tmp_path):
    """What is given as MODEL and DATA arrives as it is; without DATA a recipe has its own or names
    what it needs."""
    echo = tmp_path / "python"  # in place of Python: prints its arguments
    echo.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    echo.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(echo), "OUT": str(tmp_path / "o")}
    given = {"MODEL": "org/a model", "DATA": "rows {1}.jsonl"}
    done = subprocess.run(
        ["bash", str(recipe), "--seed", "7"], env={**env, **given}, capture_output=True, text=True
    )
    printed = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    for flag, value in (
        ("--input", given["DATA"]),
        ("--tokenizer", given["MODEL"]),
        ("--hf-model", given["MODEL"]),
        ("--output-prefix", str(tmp_path / "o/data/train")),
        ("--seed", "7"),
        ("--load", str(tmp_path / "o/run")),
    ):
        assert printed[printed.index(flag) + 1] == value
    alone = subprocess.run(["bash", str(recipe)], env=env, capture_output=True, text=True)
    assert (alone.returncode == 0) == ("DATA:-" in recipe.read_text()), alone.stderr
    assert alone.returncode == 0 or "DATA: a file or hub name" in alone.stderr


@pytest.mark.parametrize(
    "flags, present, absent",
    [
        (["--train-steps", "4"], "--train-steps 4", "--train-epochs"),
        (["--train-steps=4"], "--train-steps=4", "--train-epochs"),
        (["--train-steps", "4", "--train-epochs", "0.5"], "--train-epochs 0.5", "--train-steps"),
        (["--tp", "1"], "--tp 1", "--sp"),
        (["--tp", "2"], "--sp", "--train-steps"),
    ],
)
def test_what_is_given_replaces_a_recipes_own(flags, present, absent, tmp_path):
    """Flags that exclude each other: the one on the command line counts."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$*"\n')
    echo.chmod(0o755)
    env = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(echo),
        "OUT": str(tmp_path / "o"),
        "MODEL": "m",
        "DATA": "d",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples/recipes/llama3_8b.sh"), *flags],
        env=env,
        capture_output=True,
        text=True,
    )
    (printed,) = [line for line in done.stdout.splitlines() if "pretrain_reward.py" in line]
    assert (
        present in printed
        and absent not in printed
        and "--save-interval 100 --keep-last 2" in printed
    ), done.stderr


def printed_by(script: str, tmp_path: Path, *flags: str, **variables: str) -> list[str]:
    """The command lines of a script in examples/, with an echo in place of Python."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$*"\n')
    echo.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / f"examples/{script}.sh"), *flags],
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": str(echo),
            "OUT": str(tmp_path / "o"),
            "DATA": "d",
            **variables,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_seeds_are_trained_one_by_one_and_joined(tmp_path):
    recipe = "recipes/llama3.1_8b_rewardbench2"
    lines = printed_by(recipe, tmp_path, "--lr", "1e-5", SEEDS="4 5")
    out = tmp_path / "o"
    trainings = [line for line in lines if "pretrain_reward.py" in line]
    for seed, line in zip((4, 5), trainings, strict=True):
        assert f"--seed {seed} --lr 1e-5" in line and f"--save {out}/seed{seed}/run" in line
        assert (out / f"seed{seed}/data").resolve() == out / "data"
    assert sum("preprocess_pref.py" in line for line in lines) == 1
    assert lines[-1].endswith(f"--join {out}/seed4/evaluation.json {out}/seed5/evaluation.json")
    (line,) = [
        line
        for line in printed_by(recipe, tmp_path, "--seed=7", SEEDS="4 5")
        if "pretrain_reward.py" in line
    ]
    assert line.endswith("--seed 7 --seed=7 --train-epochs 1") and f"--save {out}/run" in line


@pytest.mark.parametrize("flags,dp", [([], 2), (["--tp", "2"], 4), (["--tp=2", "--pp=2"], 2)])
def test_a_dry_run_of_a_recipe_starts_nothing(flags, dp, tmp_path):
    lines = printed_by("recipes/llama3_8b", tmp_path, "--dry-run", *flags)
    assert "preprocess_pref.py" in lines[0] and len(lines) == 2
    assert "launch.py" not in lines[1] and f"--dp {dp} " in lines[1] and "--dry-run" in lines[1]


def test_the_study_of_losses_differs_in_the_loss_alone(tmp_path):
    for loss in ("ranking", "scaled"):
        for seed in (1, 2):
            folder = tmp_path / f"o/{loss}/seed{seed}/run/evaluations/valid"
            folder.mkdir(parents=True)
            for step in (0, 20, 100):
                (folder / f"step_{step:07d}.json").touch()
    variables = {"SEEDS": "1 2", "LOSSES": "ranking scaled"}
    lines = printed_by("studies/losses", tmp_path, "--train-steps", "3", **variables)
    trainings = [line.split() for line in lines if "pretrain_reward.py" in line]
    assert len(trainings) == 4 and all(t[-2:] == ["--train-steps", "3"] for t in trainings)
    ranking, scaled = ([w for w in t if "seed1" not in w] for t in (trainings[0], trainings[2]))
    assert [w for w in scaled if w not in ranking] == ["--scale-by-rating"]
    (joined,) = [line for line in lines if "--join" in line and "/scaled/" in line]
    assert joined.split()[-2:] == [
        f"{tmp_path}/o/scaled/seed{seed}/run/evaluations/valid/step_0000100.json" for seed in (1, 2)
    ]


SCRIPTS = [ROOT / "examples" / "quickstart.sh", *sorted((ROOT / "examples").glob("*/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_of_scripts_exist(script: Path) -> None:
    """The rest of a command line that starts a program of rmega names only flags it has."""
    from rmega import cli
    from rmega.commands import evaluate, export, score
    from rmega.config import TrainingConfig
    from rmega.preferences.preprocess import PreprocessArgs

    programs = {
        "preprocess_pref": PreprocessArgs,
        "pretrain_reward": TrainingConfig,
        "convert_to_hf": export.Args,
        "evaluate": evaluate.EvaluateArgs,
        "score": score.ScoreArgs,
    }
    # examples/quickstart.sh preprocesses with a function of that name.
    starts = rf"(?:examples|tools)/({'|'.join(programs)})\.py|^ +(preprocess) "
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        for match in re.finditer(starts, line):
            known = cli._flags(programs[match[1] or "preprocess_pref"])
            for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", line[match.end() :]):
                assert flag in known, f"{script.name}: {line.strip()}: {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_what_documents_name_exists(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for program in re.findall(r"\b((?:tools|examples|benchmarks|tests)/[\w./-]+\.(?:py|sh))", text):
        assert (ROOT / program).is_file(), f"{document.name} names {program}"
