"""Programs of others score an export as they are: RewardBench, the reward models of TRL's trainers,
and, behind tools/serve.py, OpenRLHF's agent and verl's reward loop. Each has an environment of its
own, whose interpreter a variable names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.serve import started
from tests.conftest import ROOT
from tests.exports import make_export
from tests.made_rows import messages, write_lines

pytestmark = pytest.mark.slow
REWARD_BENCH, TRL, OPENRLHF, VERL = (
    os.environ.get(f"RMEGA_{name}") for name in ("REWARD_BENCH", "TRL", "OPENRLHF", "VERL")
)

# RewardBench asks for a GPU by name; without one its inputs stay where they are.
RUN_REWARD_BENCH = """
import sys
import torch
from transformers import BatchEncoding
if not torch.cuda.is_available():
    BatchEncoding.to = lambda self, device: self
from rewardbench.rewardbench import Args, rewardbench
rewardbench(Args(model=sys.argv[1], dataset=sys.argv[2], load_json=True, not_quantized=True,
                 torch_dtype="float32", max_length=1024, output_dir="results/", save_all=True))
"""
# What GRPO and RLOO compute from completions with a reward model named by its folder.
RUN_TRL = """
import json, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
policy, reward_model, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
prompts, completions = [r["prompt"] for r in rows], [r["completion"] for r in rows]
args = GRPOConfig(output_dir="out", report_to="none", use_cpu=True, bf16=False,
                  model_init_kwargs={"dtype": "float32"}, num_generations=2,
                  per_device_train_batch_size=2)
trainer = GRPOTrainer(model=policy, reward_funcs=reward_model, args=args,
                      train_dataset=Dataset.from_dict({"prompt": prompts}))
inputs = [{"prompt": p} for p in prompts]
rewards = trainer._calculate_rewards(inputs, prompts, completions, [[1] for _ in rows])
json.dump(rewards[:, 0].tolist(), open("rewards.json", "w"))
"""
# A rollout ends with the end-of-turn token, and OpenRLHF sends the text of its tokens.
RUN_OPENRLHF = """
import asyncio, json, sys
from openrlhf.utils.agent import SingleTurnAgentExecutor
url, texts = sys.argv[1], json.load(open(sys.argv[2]))
agent = SingleTurnAgentExecutor([url + "/get_reward", url + "/get_reward"])
shards = asyncio.run(agent._fetch_rewards_via_http(texts, [""] * len(texts), [""] * len(texts)))
json.dump([r for shard in shards for r in shard["rewards"]], open("rewards.json", "w"))
"""
# verl's worker without Ray, its tokenizers loaded as it loads them.
RUN_VERL = """
import asyncio, json, sys
import numpy as np, torch
from omegaconf import OmegaConf
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.protocol import DataProto
from verl.utils import hf_tokenizer
address, model, engine, rows = *sys.argv[1:4], json.load(open(sys.argv[4]))
worker = RewardLoopWorker.__new__(RewardLoopWorker)
worker.config = OmegaConf.create({"reward": {"reward_model": {
    "rollout": {"name": engine}, "model_path": model}}})
worker.reward_router_address = address
worker.input_tokenizer = worker.reward_model_tokenizer = hf_tokenizer(model)
async def main():
    out = []
    for prompt, response in rows:
        text = response + worker.input_tokenizer.eos_token
        ids = worker.input_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        raw = np.empty(1, dtype=object)
        raw[0] = prompt
        data = DataProto.from_dict(
            tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
            non_tensors={"raw_prompt": raw})
        out.append((await worker.compute_score_disrm(data))["reward_score"])
    return out
json.dump(asyncio.run(main()), open("rewards.json", "w"))
"""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def export(request, tmp_path_factory) -> Path:
    return make_export(tmp_path_factory.mktemp(request.param), request.param)


def scored(export: Path, chats: list[list[dict]], folder: Path) -> list[float]:
    """By tools/score.py."""
    write_lines(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    words = [sys.executable, ROOT / "tools" / "score.py", "--model", export, "--dtype", "fp32"]
    words += ["--input", folder / "chats.jsonl", "--output", folder / "rewards.jsonl", "--force"]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = (folder / "rewards.jsonl").read_text().splitlines()
    return [json.loads(line)["reward"] for line in lines]


def close(client: str, got: list[float], expected: list[float]) -> None:
    difference = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    print(f"{client}: largest difference {difference:.2g}")
    assert difference < 1e-4


def run(python: str, code: str, *words: object, cwd: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.skipif(REWARD_BENCH is None, reason="RMEGA_REWARD_BENCH names no interpreter with it")
def test_reward_bench(export: Path, tmp_path: Path) -> None:
    rows = [
        {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
        for row in messages(12, seed=5)
    ]
    rows = [
        {**row, "prompt": row["chosen"][:-1]} for row in rows if row["chosen"][0]["role"] == "user"
    ]
    write_lines(tmp_path / "pairs.jsonl", rows)
    run(REWARD_BENCH, RUN_REWARD_BENCH, export, tmp_path / "pairs.jsonl", cwd=tmp_path)
    [path] = [*tmp_path.rglob("*_outputs.jsonl"), *export.parent.rglob("*_outputs.jsonl")]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    for side in ("chosen", "rejected"):
        expected = scored(export, [row[side] for row in rows], tmp_path)
        got = [line[f"scores_{side}"] for line in lines]
        close(f"RewardBench, {side}", got, expected)


@pytest.mark.skipif(TRL is None, reason="RMEGA_TRL names no interpreter with it")
def test_trl(export: Path, tmp_path: Path) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in messages(12, seed=6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = export.parent / "base"
    run(TRL, RUN_TRL, base, export, tmp_path / "rows.json", cwd=tmp_path)
    got = json.loads((tmp_path / "rewards.json").read_text())
    expected = scored(export, [r["prompt"] + r["completion"] for r in rows], tmp_path)
    close("TRL", got, expected)


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[str]:
    """Address of tools/serve.py."""
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", str(export)]
    log, env = export.parent / "serve.log", {"PYTHONPATH": str(ROOT)}
    with started([*command, "--dtype", "fp32"], log, env) as port:
        yield f"127.0.0.1:{port}"


@pytest.mark.skipif(OPENRLHF is None, reason="RMEGA_OPENRLHF names no interpreter with it")
def test_openrlhf(export: Path, server: str, tmp_path: Path) -> None:
    chats = [[*row["prompt"], *row["chosen"]] for row in messages(13, seed=7)]
    tokenizer = AutoTokenizer.from_pretrained(export)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run(OPENRLHF, RUN_OPENRLHF, f"http://{server}", tmp_path / "texts.json", cwd=tmp_path)
    got = json.loads((tmp_path / "rewards.json").read_text())
    close("OpenRLHF", got, scored(export, chats, tmp_path))


@pytest.mark.skipif(VERL is None, reason="RMEGA_VERL names no interpreter with it")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verl(export: Path, server: str, tmp_path: Path, engine: str) -> None:
    rows = [(row["prompt"], row["chosen"][0]["content"]) for row in messages(12, seed=8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run(VERL, RUN_VERL, server, export, engine, tmp_path / "rows.json", cwd=tmp_path)
    got = json.loads((tmp_path / "rewards.json").read_text())
    chats = [[*prompt, {"role": "assistant", "content": response}] for prompt, response in rows]
    close(f"verl, {engine}", got, scored(export, chats, tmp_path))
