"""Printed commands: what a shell reads is what was meant, whatever the folder is called."""

from __future__ import annotations

import ast
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rmega.export.model_card import base_card, write_card
from rmega.export.usage import client_duties, example_tolerance, usage

FOLDERS = [
    "runs/export",
    "runs/my export",
    'it\'s $HOME `ls` "quoted"; rm -rf *',
    "模型 奖励",
    "naïve",
    "-x",
    "~/export",
    "a\\b",
    "tab\\tname",
    "x" * 200,
    "runs/#1 & {best}!",
    "/",
    "'",
]


def recipe(**changes) -> dict:
    return {
        "architecture": "LlamaForSequenceClassification",
        "dtype": "float32",
        "base_model": "org/base",
        "iteration": 10,
        "comparisons_seen": 80,
        "reward_token_id": 3,
        "reward_token": "</s>",
        "pad_token_id": 2,
        "pad_token": "<pad>",
        "max_length": 512,
        "max_model_len": 512,
        "data": {},
        "config": {},
        "evaluation": [],
        "verification": None,
        "example": None,
        **changes,
    }


def name_of(words: list[str]) -> str:
    return words[words.index("--served-model-name") + 1]


@pytest.mark.parametrize(
    "architecture", ["LlamaForSequenceClassification", "InternLM2ForRewardModel"]
)
@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_survive_the_shell(folder: str, architecture: str) -> None:
    path = f"./{folder}" if folder.startswith("-") else folder
    ways = usage(recipe(architecture=architecture, dtype="bfloat16"), folder)
    assert [title for title, _, _ in ways] == ["transformers", "vLLM", "SGLang"]
    for title, command, code in ways:
        strings = {
            node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)
        }
        assert path in strings
        if title == "transformers":
            assert command == ""
            continue
        words = shlex.split(command)
        asked = subprocess.run(  # the shell itself, with the program replaced
            ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
        )
        assert asked.stdout.decode().split("\0")[:-1] == words
        assert words.count(path) == (2 if name_of(words) == path else 1)
        assert words.index(path) == words.index("serve" if title == "vLLM" else "--model-path") + 1
        name = name_of(words)
        assert len(name.split()) == 1 and name[0] not in "-."
        assert title != "vLLM" or name in strings
        length = "--max-model-len" if title == "vLLM" else "--context-length"
        assert words[words.index(length) + 1] == "512"
        assert words[words.index("--dtype") + 1] == "bfloat16"
        after = [word for word in words[words.index("--served-model-name") + 2 :]]
        assert all(word.startswith("--") or " " not in word or word[0] == "{" for word in after)
        assert ("--trust-remote-code" in words) == (architecture == "InternLM2ForRewardModel")


def test_the_example_has_a_tolerance_for_each_dtype() -> None:
    result = {"largest_reward": 2.0}
    tolerances = [
        example_tolerance(recipe(dtype=dtype, verification=result))
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert tolerances == sorted(tolerances) and tolerances[0] == pytest.approx(2e-4)
    assert example_tolerance(recipe()) is None
    assert any("SGLang" in duty for duty in client_duties(recipe()))


ROWS = [
    {
        "name": name,
        "step": step,
        "accuracy": accuracy,
        "accuracy_low": 0.1,
        "accuracy_high": 0.9,
        "num_pairs": 112,
    }
    for name, step, accuracy in (("hh", 0, 0.5), ("hh", 10, 0.75), ('a "set": 1', 10, 0.625))
]


def test_the_card_has_its_results_in_the_metadata(tmp_path: Path) -> None:
    base = tmp_path / "hf"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE\n---\n# Base\n"
    )
    write_card(tmp_path, "模型: x", recipe(evaluation=ROWS), base)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.base_model) == ("other", "my-license", "org/base")
    assert (data.model_name, data.tags) == ("模型: x", ["reward-model"])
    results = {result.dataset_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "hh": 0.75,
        'a "set": 1': 0.625,
    }
    assert results["hh"].metric_name == "Accuracy on 112 held-out pairs"
    assert "**Not verified**" in text and "| hh | 0 | 0.5000 |" in text


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: 'apache-2.0' # a comment\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("# no metadata\n", {}),
        ("", {}),
        ("---\n- a\n- list\n---\n", {}),
    ],
)
def test_license_of_the_base_model(card: str, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_card(tmp_path) == expected
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert base_card(tmp_path) == {}


@pytest.mark.parametrize("base", ["/folders/base", "./base", "modelscope:org/base", None, "a/b/c"])
def test_a_base_model_that_is_no_hub_name_stays_out_of_the_metadata(base, tmp_path) -> None:
    write_card(tmp_path, "x", recipe(base_model=base), tmp_path / "nothing")
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert "base_model" not in head and "license" not in head and "model-index" not in head
