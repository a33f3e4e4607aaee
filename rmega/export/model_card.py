"""The text that goes with an export: how to get the same rewards elsewhere, and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept_comparisons(count: int, held_out: int) -> str:
    """What an export was verified with: "16 held-out comparisons", "16 comparisons (4 held out, 12 of the
    training set)"."""
    if held_out == count:
        return f"{count} held-out comparisons"
    return f"{count} comparisons ({held_out} held out, {count - held_out} of the training set)"


def usage(recipe: dict[str, Any], folder: str) -> list[tuple[str, str, str]]:
    """(title, shell command or "", Python code) for each way to score with the folder; to be pasted
    as they are."""
    reward, name = recipe["reward_token_id"], Path(folder).name
    remote = recipe["architecture"] == "InternLM2ForRewardModel"
    trust = " --trust-remote-code" if remote else ""
    messages = (recipe.get("example") or {}).get("messages") or [
        {"role": "user", "content": "..."},
        {"role": "assistant", "content": "..."},
    ]
    chat = (
        "chat = [" + ",\n        ".join(json.dumps(m, ensure_ascii=False) for m in messages) + "]"
    )
    load = (
        ("AutoModel", ", trust_remote_code=True")
        if remote
        else ("AutoModelForSequenceClassification", "")
    )
    encode = """text = tokenizer.apply_chat_template(chat, tokenize=False)
ids = tokenizer.encode(text, add_special_tokens=False)"""
    if reward is not None:
        encode += f"""
if ids[-1] != {reward}:
    ids.append({reward})"""
    score = (
        "print(model.get_score(tokenizer, chat))"
        if remote
        else f"""{encode}
with torch.no_grad():
    print(model(torch.tensor([ids])).logits[0, 0].item())"""
    )
    plain = f"""import torch
from transformers import {load[0]}, AutoTokenizer

model = {load[0]}.from_pretrained("{folder}"{load[1]}).eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}"{load[1]})
{chat}
{score}"""
    client = f"""import requests
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{load[1]})
{chat}
{encode}
"""
    # vLLM gives InternLM2's reward model as one value per token; the last one is the reward.
    task, read = ("token_classify", "[-1]") if remote else ("classify", "")
    vllm = f"""{client}answer = requests.post("http://localhost:8000/pooling",
                       json={{"model": "{name}", "input": ids, "task": "{task}"}}).json()
print(answer["data"][0]["data"]{read}[0])"""
    sglang = f"""{client}answer = requests.post("http://localhost:30000/classify", json={{"input_ids": [ids]}}).json()
print(answer[0]["embedding"][0])"""
    return [
        ("transformers", "", plain),
        (
            "vLLM",
            (
                f"vllm serve {folder} --served-model-name {name} --runner pooling{trust} "
                "--pooler-config '{\"use_activation\": false}'"
            ),
            vllm,
        ),
        (
            "SGLang",
            (
                f"python3 -m sglang.launch_server --model-path {folder} --is-embedding{trust}"
                " --port 30000"
            ),
            sglang,
        ),
    ]


def client_duties(recipe: dict[str, Any]) -> list[str]:
    """What a client must do itself, whatever serves the model; a sentence each."""
    token = f" ({recipe['reward_token']})" if recipe.get("reward_token") else ""
    limit = (
        f" The model was trained on at most {recipe['max_length']} tokens."
        if recipe.get("max_length")
        else ""
    )
    return [
        (
            "Render the chat template of tokenizer_config.json without a generation prompt, and"
            " tokenize the text without adding special tokens (the template writes the beginning of"
            " the text; a second one changes the reward)."
        ),
        (
            "Append nothing: the reward is read at the last token of the text. Send ids, not text."
            if recipe["reward_token_id"] is None
            else f"Append the reward token, id {recipe['reward_token_id']}{token}, unless the ids"
            " end with it already. Send ids, not text."
        ),
        (
            f"Pad batches with id {recipe['pad_token_id']}; use no softmax or sigmoid on the"
            f" value.{limit}"
        ),
        "Break up control-token text such as <|im_end|> in user content before tokenizing.",
    ]


def write_card(folder: Path, recipe: dict[str, Any], base: Path) -> None:
    """``README.md`` of the export. ``base`` is the folder with the base model's own files (for its
    license)."""
    verification, license_name = recipe.get("verification"), base_license(base)
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags:",
        "- reward-model",
    ]
    if license_name and " " not in license_name:
        head.append(f"license: {license_name}")
    if _hub_name(recipe.get("base_model")):
        head.append(f"base_model: {recipe['base_model']}")
    lines = [
        *head,
        "---",
        "",
        f"# {folder.name}",
        "",
        (
            f"A reward model ({recipe['architecture']}, {recipe['dtype']}): it reads a conversation"
            " and gives one number, higher for a better last reply. Differences between replies to"
            " one prompt are what it was trained on; the number by itself has no unit."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| base model | {recipe.get('base_model')} |",
        (
            "| license of the base model |"
            f" {license_name or 'not stated in its folder: see its page'} |"
        ),
        (
            f"| trained for | {recipe['iteration']} steps, {_count(recipe.get('comparisons_seen'))}"
            " comparisons |"
        ),
        f"| reward token | {recipe['reward_token_id']} {_code(recipe.get('reward_token'))} |",
        f"| pad token | {recipe['pad_token_id']} {_code(recipe.get('pad_token'))} |",
        "",
    ]
    lines += ["## Verification", ""]
    if verification is None:
        lines += [
            (
                "**Not verified**: the rewards of this folder have not been compared with those of"
                " the training."
            ),
            "",
        ]
    else:
        verdict = "agree" if verification["passed"] else "**DO NOT AGREE: do not use this folder**"
        lines += [
            (
                f"{verification['responses']} responses of"
                f" {kept_comparisons(verification['comparisons'], verification['held_out'])}, scored by the"
                f" training code and by plain transformers {verification['transformers']} from this"
                f" folder: they {verdict} (largest difference {verification['largest_difference']:.3g} on"
                f" rewards up to {verification['largest_reward']:.3g}, that is"
                f" {verification['relative_difference']:.2g}; tolerance {verification['tolerance']:.0e})."
                f" {verification['weights']}"
            ),
            "",
        ]
    if recipe["evaluation"]:
        lines += [
            "## Evaluation on held-out pairs",
            "",
            "| set | step | accuracy | 95 % interval | pairs |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.get('name')} | {row.get('step')} | {row['accuracy']:.4f} |"
            f" {row['accuracy_low']:.4f} to {row['accuracy_high']:.4f} | {row['num_pairs']} |"
            for row in recipe["evaluation"]
        ]
        lines.append("")
    lines += [
        "## Use",
        "",
        *(f"{i}. {duty}" for i, duty in enumerate(client_duties(recipe), 1)),
        "",
    ]
    for title, command, code in usage(recipe, f"./{folder.name}"):
        shell = ["```bash", command, "```", ""] if command else []
        lines += [f"### {title}", "", *shell, "```python", code, "```", ""]
    if example := recipe.get("example"):
        reward = (
            "" if example.get("reward") is None else f", and its reward is {example['reward']:.5f}"
        )
        lines += [
            f"To check a client: the conversation above must become exactly these ids{reward}.",
            "",
            "```",
            str(example["token_ids"]),
            "```",
            "",
        ]
    config = recipe.get("config") or {}
    lines += [
        "## Training",
        "",
        *_data_lines(recipe["data"]),
        "",
        "```json",
        json.dumps(
            {key: config.get(key) for key in ("loss", "optimizer", "train", "parallel")},
            ensure_ascii=False,
            indent=1,
        ),
        "```",
        "",
        "All of it, with the data's manifest, is in `reward_recipe.json`.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def base_license(base: Path) -> str | None:
    """The license that the base model's own card states (its front matter), or the first line of
    its LICENSE file."""
    readme = base / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        if text.startswith("---"):
            for line in text[3:].split("\n---", 1)[0].splitlines():
                if line.startswith("license:"):
                    return line.partition(":")[2].strip().strip("'\"") or None
    for file in sorted(base.glob("LICENSE*")) if base.is_dir() else ():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                return line.strip()
    return None


def _hub_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith((".", "/"))
        and ":" not in name
    )


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "an unknown number of"


def _code(text: Any) -> str:
    return f"`{text}`" if text else ""


def _data_lines(data: dict[str, Any]) -> list[str]:
    """The manifest of the data as a list, its short values only."""
    short = {
        key: value
        for key, value in data.items()
        if isinstance(value, (str, int, float, bool)) and len(str(value)) < 100
    }
    return [f"- {key}: {value}" for key, value in short.items()] or ["- no manifest"]
