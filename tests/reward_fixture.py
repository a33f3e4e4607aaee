"""A small reward model folder and what plain transformers computes with it, for the tests of
scoring and serving."""

from __future__ import annotations

from pathlib import Path

import torch


def make_reward_model(source: Path, folder: Path) -> Path:
    """``small_llama`` with a reward head, as transformers saves it, its reward token recorded."""
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(str(source), num_labels=1)
    model.config.reward_token_id = model.config.eos_token_id
    head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.score.weight.copy_(0.3 * head)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(folder))
    return folder


class Reference:
    """Rewards by transformers alone: the default template, one conversation at a time, read at the
    last token."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, LlamaForSequenceClassification

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = LlamaForSequenceClassification.from_pretrained(str(folder)).eval()

    def text(self, messages: list[dict]) -> str:
        turns = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return f"{self.tokenizer.bos_token}{turns}"

    @torch.no_grad()
    def reward(self, conversation: list[dict] | str) -> float:
        text = conversation if isinstance(conversation, str) else self.text(conversation)
        ids = self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        hidden = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(self.model.score(hidden))


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
