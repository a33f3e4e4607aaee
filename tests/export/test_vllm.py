"""Exports behind a real vLLM, started and asked as the export says: the rewards of tools/score.py.

RMEGA_VLLM names the program (the path of `vllm`, from an environment of its own); else the one on
PATH is taken. A build for processors is enough; docs/export.md says how to install one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
START_SECONDS = 900.0  # of a machine that is busy


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(command)
    assert program == "vllm"
    log = export.parent / "vllm.log"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{Path(VLLM).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [VLLM, *words, "--port", str(port), "--enforce-eager"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        yield port, code.replace("localhost:8000", f"127.0.0.1:{port}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(port: int, path: str, bodies: list[dict]) -> list[dict]:
    """The answers to requests that are all sent at once."""

    async def post(body: dict) -> dict:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        data = json.dumps({"model": "export", **body}).encode()
        head = f"POST {path} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert status.split()[1] == b"200", (path, body, rest)
        return json.loads(rest)

    async def all_of_them() -> list[dict]:
        return await asyncio.wait_for(asyncio.gather(*map(post, bodies)), 600)

    return asyncio.run(all_of_them())


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

    tokenizer = AutoTokenizer.from_pretrained(export)
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
                for a in ask(port, "/pooling", [{"input": i, "task": task} for i in ids])
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
                    got = ask(port, path, [{**body, **more} for body in bodies])
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
