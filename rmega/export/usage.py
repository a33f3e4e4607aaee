"""Commands and code that reproduce the rewards elsewhere, printed and put into the card.

Commands are printed for a shell: every argument is quoted where it has to be.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

EXAMPLE_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""How far a served reward may be from the one that was computed in fp32, relative to the largest
reward of the verification, by the dtype that it is served in. Measured on random models of 2 to 24
layers, with the weights rounded on both sides: 1.3e-2 in bf16."""


def served_name(folder: str) -> str:
    """One word without special characters, from the last part of a path."""
    name = re.sub(r"[^\w.-]+", "-", folder.rstrip("/").rpartition("/")[2]).strip("-.")
    return name or "reward-model"


def usage(recipe: dict[str, Any], folder: str) -> list[tuple[str, str, str]]:
    """(title, shell command or "", Python code) for each way to score with the folder, to be pasted
    as they are."""
    if folder.startswith("-"):
        folder = f"./{folder}"
    reward, name, path = recipe["reward_token_id"], served_name(folder), repr(folder)
    remote = recipe["architecture"] == "InternLM2ForRewardModel"
    trust = " --trust-remote-code" if remote else ""
    messages = (recipe.get("example") or {}).get("messages") or [
        {"role": "user", "content": "..."},
        {"role": "assistant", "content": "..."},
    ]
    chat = (
        "chat = [" + ",\n        ".join(json.dumps(m, ensure_ascii=False) for m in messages) + "]"
    )
    kind, options = (
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
    elif recipe.get("template_ends_with_pad_token"):
        encode += f"""
while ids[-1] == {recipe["pad_token_id"]}:
    ids.pop()"""
    score = (
        "print(model.get_score(tokenizer, chat))"
        if remote
        else f"""{encode}
with torch.no_grad():
    print(model(torch.tensor([ids])).logits[0, 0].item())"""
    )
    if recipe.get("adapter_of"):
        base = repr(recipe["adapter_of"])
        on_base = f"""import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({base}, num_labels=1,
                                                          torch_dtype=torch.float32)
base.config.pad_token_id = {recipe["pad_token_id"]}
model = PeftModel.from_pretrained(base, {path}).eval()
tokenizer = AutoTokenizer.from_pretrained({path})
{chat}
{score}"""
        return [("transformers and peft", "", on_base)]
    plain = f"""import torch
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained({path}, torch_dtype=torch.{recipe["dtype"]}{options}).eval()
tokenizer = AutoTokenizer.from_pretrained({path}{options})
{chat}
{score}"""
    client = f"""import requests
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({path}{options})
{chat}
{encode}
"""
    # vLLM gives InternLM2's reward model as one value per token; the last one is the reward.
    task, read = ("token_classify", "[-1]") if remote else ("classify", "")
    vllm = f"""{client}answer = requests.post("http://localhost:8000/pooling",
                       json={{"model": {json.dumps(name)}, "input": ids, "task": "{task}"}}).json()
print(answer["data"][0]["data"]{read}[0])"""
    sglang = f"""{client}answer = requests.post("http://localhost:30000/classify",
                       json={{"input_ids": [ids]}}).json()
print(answer[0]["embedding"][0])"""
    model, served, length = shlex.quote(folder), shlex.quote(name), recipe["max_model_len"]
    # Without --dtype, float32 folders are served in half precision; without a length, scaled rotary
    # embeddings admit texts longer than the model was trained on.
    return [
        ("transformers", "", plain),
        (
            "vLLM",
            (
                f"vllm serve {model} --served-model-name {served} --runner pooling{trust}"
                f" --dtype {recipe['dtype']} --max-model-len {length}"
                " --pooler-config '{\"use_activation\": false}'"
            ),
            vllm,
        ),
        (
            "SGLang",
            (
                f"sglang serve --model-path {model} --served-model-name {served} --is-embedding"
                f"{trust} --dtype {recipe['dtype']} --context-length {length} --port 30000"
            ),
            sglang,
        ),
    ]


def client_duties(recipe: dict[str, Any]) -> list[str]:
    """What a client must do itself, whatever serves the model; a sentence each."""
    token = f" ({recipe['reward_token']})" if recipe.get("reward_token") else ""
    if recipe.get("template_ends_with_pad_token"):
        pad = f"{recipe['pad_token_id']} ({recipe.get('pad_token')})"
        append = (
            f"Leave out the pad token, id {pad}, at the end of the ids: the reward is read at the"
            " token before it, where transformers reads it in either case."
        )
    elif recipe["reward_token_id"] is None:
        append = "Append nothing: the reward is read at the last token of the text."
    elif recipe.get("template_writes_reward_token"):
        append = (
            f"Append nothing: the template ends with the reward token, id"
            f" {recipe['reward_token_id']}{token}. Text rendered otherwise needs it."
        )
    else:
        append = (
            f"Append the reward token, id {recipe['reward_token_id']}{token}, unless the ids end"
            " with it already. Send ids, not text."
        )
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
        append,
        (
            f"Pad batches with id {recipe['pad_token_id']}; use no softmax or sigmoid on the"
            f" value.{limit}"
        ),
        "Break up control-token text such as <|im_end|> in user content before tokenizing.",
        (
            f"Serve in {recipe['dtype']}, the dtype of the weights. Other dtypes, and engines that"
            " compute the head in it (SGLang), change rewards by its rounding."
        ),
    ]


def example_tolerance(recipe: dict[str, Any]) -> float | None:
    """How far the reward of the recipe's example may be off where the folder is served in its
    dtype; None where it was not verified."""
    verification = recipe.get("verification")
    if not verification:
        return None
    return EXAMPLE_TOLERANCE[recipe["dtype"]] * max(verification["largest_reward"], 1e-3)
