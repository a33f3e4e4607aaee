"""Preference rows for tests, put together from sentences of the demonstration set: a file per
schema, with what real files have (several turns, system prompts, ties, ratings, Chinese, long
answers)."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Row = dict
Chat = list[dict]

FILES = {
    "messages.jsonl.gz": ("messages", 300),  # most of them with several turns
    "hh.jsonl.gz": ("hh", 200),  # whole conversations as text
    "argilla.jsonl.gz": ("argilla", 120),  # long answers; the prompt once more in each
    "strings.parquet": ("strings", 120),  # the same rows
    "sharegpt.json": ("sharegpt", 60),  # up to 13 messages, system prompts
    "zh.messages.jsonl": ("messages", 100),
    "zh.sharegpt.jsonl": ("sharegpt", 80),  # responses as strings
    "ranked.jsonl": ("ranked", 80),  # four responses, scores with ties
    "solutions.jsonl": ("ranked", 100),  # four responses, right (1) or wrong (0)
    "longer_is_worse.jsonl": ("messages", 100),  # in 73 of them
}
"""File -> (its schema, its rows)."""


@functools.cache
def demo_rows() -> tuple[Row, ...]:
    """The rows of the demonstration set, held-out ones last."""
    texts = (
        (ROOT / "examples" / "data" / f"demo.{part}.jsonl").read_text(encoding="utf-8")
        for part in ("train", "valid")
    )
    return tuple(json.loads(line) for text in texts for line in text.splitlines())


class Writer:
    """Draws questions and answers of a language, the same for the same seed."""

    def __init__(self, seed: int, lang: str = "en") -> None:
        self.random, self.lang = random.Random(seed), lang
        rows = [row for row in demo_rows() if row["lang"] == lang]
        self.questions = sorted(
            {m["content"] for row in rows for m in row["prompt"] if m["role"] == "user"}
        )
        self.systems = sorted(
            {m["content"] for row in demo_rows() for m in row["prompt"] if m["role"] == "system"}
        )
        ends = r"(?<=[。！？])" if lang == "zh" else r"(?<=[.!?])\s+"
        self.sentences = sorted(
            {s for row in rows for s in re.split(ends, row["chosen"][0]["content"]) if s}
        )

    def answer(self, least: int, most: int) -> str:
        """``least`` to ``most`` different sentences."""
        count = self.random.randint(least, most)
        return ("" if self.lang == "zh" else " ").join(self.random.sample(self.sentences, count))

    def prompt(self, turns: int, *, system: bool = False) -> Chat:
        """``turns`` questions with answers in between."""
        out = [message("system", self.random.choice(self.systems))] if system else []
        for turn in range(turns):
            out += [message("assistant", self.answer(1, 3))] if turn else []
            out.append(message("user", self.random.choice(self.questions)))
        return out


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def messages(count: int, *, seed: int = 0, lang: str = "en") -> list[Row]:
    """Pairs of message lists; seven of ten have two to four turns, one of ten a long answer."""
    w = Writer(seed, lang)
    rows = []
    for i in range(count):
        turns = w.random.randint(2, 4) if w.random.random() < 0.7 else 1
        prompt = w.prompt(turns, system=w.random.random() < 0.1)
        chosen, rejected = (w.answer(1, 14 if i % 10 == 0 else 4) for _ in range(2))
        rows.append(pair_row(f"made-{lang}-{seed}-{i}", prompt, chosen, rejected))
    return rows


def pair_row(name: str, prompt: Chat, chosen: str, rejected: str) -> Row:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: [message("assistant", text)] for side, text in sides.items()}
    return {"id": name, "prompt": prompt, **answers, "source": name.rsplit("-", 1)[0]}


def hh(count: int) -> list[Row]:
    """Whole conversations as text, with the marks of the original HH-RLHF files."""

    def text(chat: Chat) -> str:
        names = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in chat)

    w, rows = Writer(1), []
    for _ in range(count):
        prompt = w.prompt(w.random.randint(1, 4))
        answers = ([*prompt, message("assistant", w.answer(1, 4))] for _ in range(2))
        rows.append(dict(zip(("chosen", "rejected"), map(text, answers), strict=True)))
    return rows


def argilla(count: int) -> list[Row]:
    """The columns of UltraFeedback as argilla publishes it: one turn, answers of 12 to 30
    sentences, empty ratings; every sixth prompt brings a text of more than 2,000 characters."""
    w, rows = Writer(2), []
    for i in range(count):
        question = f"{w.random.choice(w.questions)} ({i})"
        if i % 6 == 5:
            question = f"{w.answer(40, 50)}\n{question}"
        sides = {
            f"{side}{end}": value
            for side in ("chosen", "rejected")
            for end, value in (
                ("", [message("user", question), message("assistant", w.answer(12, 30))]),
                ("-rating", None),
                ("-model", None),
            )
        }
        rows.append({"source": None, "prompt": question, **sides})
    return rows


def strings(count: int) -> list[Row]:
    """The same rows as strings."""
    sides = ("chosen", "rejected")
    return [
        {"prompt": row["prompt"], **{side: row[side][1]["content"] for side in sides}}
        for row in argilla(count)
    ]


def sharegpt(count: int, *, lang: str = "en", as_text: bool = False) -> list[Row]:
    """``conversations`` with ``from`` and ``value``; up to 13 messages, every third with a system
    prompt. ``as_text``: the responses are strings, one turn."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}

    def turn(m: dict) -> Row:
        return {"from": names[m["role"]], "value": m["content"]}

    w, rows = Writer(3, lang), []
    for i in range(count):
        prompt = w.prompt(1 if as_text else w.random.randint(1, 6), system=i % 3 == 0)
        sides = (message("assistant", w.answer(2, 6)) for _ in range(2))
        chosen, rejected = (m["content"] if as_text else turn(m) for m in sides)
        conversations = [turn(m) for m in prompt]
        rows.append({"conversations": conversations, "chosen": chosen, "rejected": rejected})
    return rows


def ranked(count: int, *, right_or_wrong: bool = False) -> list[Row]:
    """A prompt with four responses and their scores, among them ties; a row whose responses all
    have one score now and then."""
    w, rows = Writer(4 + right_or_wrong), []
    for i in range(count):
        scores = [
            w.random.choice((0, 1) if right_or_wrong else (0.25, 0.5, 0.5, 1)) for _ in "abcd"
        ]
        if right_or_wrong:
            prompt = [message("user", f"{w.random.choice(w.questions)} ({i})")]
        else:  # a document to read first
            prompt = [
                message("user", f"Title: {i}\n{w.answer(8, 20)}\n{w.random.choice(w.questions)}")
            ]
        responses = [{"content": w.answer(1, 5), "score": score} for score in scores]
        rows.append({"id": f"ranked-{i}", "prompt": prompt, "responses": responses})
    return rows


def longer_is_worse(count: int) -> list[Row]:
    """Pairs whose chosen response is the longer one in 27 of 100."""
    w, rows = Writer(6), []
    for i in range(count):
        prompt = [message("user", f"{w.random.choice(w.questions)} ({i})")]
        short, long = sorted((w.answer(1, 2), w.answer(3, 5)), key=len)
        chosen, rejected = (long, short) if i * 37 % 100 < 27 else (short, long)
        rows.append(pair_row(f"length-{i}", prompt, chosen, rejected))
    return rows


def write_rows(folder: Path) -> Path:
    """All ``FILES``."""
    import pyarrow
    import pyarrow.parquet

    makers = {
        "messages.jsonl.gz": messages,
        "hh.jsonl.gz": hh,
        "argilla.jsonl.gz": argilla,
        "strings.parquet": strings,
        "sharegpt.json": sharegpt,
        "zh.messages.jsonl": functools.partial(messages, lang="zh"),
        "zh.sharegpt.jsonl": functools.partial(sharegpt, lang="zh", as_text=True),
        "ranked.jsonl": ranked,
        "solutions.jsonl": functools.partial(ranked, right_or_wrong=True),
        "longer_is_worse.jsonl": longer_is_worse,
    }
    for name, (_, count) in FILES.items():
        rows = makers[name](count)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        else:
            write_lines(folder / name, rows)
    return folder


def write_lines(path: Path, rows: list[Row]) -> None:
    """JSON lines, compressed where the name ends with .gz."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, 1, mtime=0) if path.suffix == ".gz" else text)
