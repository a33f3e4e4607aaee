"""Score two replies to one prompt with an exported reward model and nothing but transformers.

    python examples/score_with_transformers.py EXPORT

This file imports nothing of rmega: it is what a user of the exported folder writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

PROMPT = "My tomato seedlings are long and thin and fall over. What should I do?"
REPLIES = (
    (
        "They need more light. Put them in your brightest window or under a lamp, keep them a"
        " little cooler, and plant them deeper when you move them to bigger pots: the buried stem"
        " grows roots."
    ),
    "Wow, you cannot even keep a weed alive? Whatever, some people should stick to plastic plants.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score two replies to one prompt with an exported reward model."
    )
    parser.add_argument("folder", help="a folder written by tools/convert_to_hf.py")
    folder = parser.parse_args().folder
    if not Path(folder, "config.json").is_file():
        raise SystemExit(f"error: {folder}: not an exported model (there is no config.json in it)")

    # InternLM2's code comes with the folder; trust_remote_code lets transformers run it without
    # asking.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if config.architectures == ["InternLM2ForRewardModel"]:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()

    print(f"user:   {PROMPT}")
    for reply in REPLIES:
        chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": reply}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids[-1] != config.reward_token_id:  # not written by the chat template
            ids.append(config.reward_token_id)
        with torch.no_grad():
            reward = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        print(f"{reward:+.4f}  {reply}")


if __name__ == "__main__":
    main()
