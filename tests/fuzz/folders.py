"""Random damage to model folders, checkpoints and exports, before they are read.

    python -m tests.fuzz.folders --count 2000 --seed 0

Each input is a copy of a small healthy folder in which one thing is damaged: a file (cut short,
changed, emptied, gone, ...), a value of a JSON file, or a tensor. Reading it must give the healthy
result (the same weights, token ids and rewards), or an error of one line that names what is wrong,
or a result with a warning; never another traceback.

Checkpoints, runs and exports have checksums: no other result is allowed. A plain model folder has
none, so a changed value that leaves its files well-formed (a bit of a weight, rope_theta, a piece
of the vocabulary, the text of the chat template) cannot be told from a model that was published
like that. Those inputs are counted apart, as "undetectable"; all other damage must be noticed
there, too. A model that refuses every conversation, with the reason, counts as refused.

Prints the counts by input and by kind of damage; ends with 1 where there was a breach, whose folder
is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONVERSATIONS = [
    [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}],
    [
        {"role": "user", "content": "What is 2 and 2?\n"},
        {"role": "assistant", "content": "It is 4, <b>four</b>."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes, I am."},
    ],
]
TOKENS = [[[5, 9, 11, 3, 2], [5, 9, 40, 41, 2]], [[7, 8, 2]]]
UNREAD = ("README.md", "LICENSE", "LICENSE.txt", "generation_config.json")
"""Files that no reader of rewards looks at."""
WITHOUT_FORM = (".jinja", ".txt", ".model")
"""Endings of files in which every text, or most, is well-formed."""


@dataclasses.dataclass
class Result:
    """What a reader got."""

    weights: str
    rewards: list[float]
    ids: list[list[int]] | None
    warnings: list[str]

    def same(self, other: Result) -> bool:
        close = len(self.rewards) == len(other.rewards) and all(
            abs(a - b) <= 1e-6 * max(1.0, abs(b))
            for a, b in zip(self.rewards, other.rewards, strict=True)
        )
        return close and (self.weights, self.ids) == (other.weights, other.ids)


@dataclasses.dataclass
class Subject:
    """A healthy input: what is copied, what is read of the copy, and what that gives."""

    folder: Path
    read: Callable[[Path], Result]
    inside: str = ""
    """What is read, within the folder."""
    has_checksums: bool = False
    share: int = 1
    """How many of the inputs, relative to the others."""
    healthy: Result | None = None


class Breach(Exception):
    """What the head of this file promises does not hold."""


# ---- readers


def rewards_of(path: Path, *, has_tokenizer: bool = True) -> Result:
    """Weights, token ids and rewards, as scoring reads them from a folder of any kind."""
    from rmega.scoring.scorer import load_scorer

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        scorer = load_scorer(path, dtype="fp32", rules=None)
    digest = hashlib.sha256()
    for name, parameter in scorer.model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    rewards = [reward for item in scorer.score_tokens(TOKENS) for reward in item]
    ids = None
    messages = [line for line in output.getvalue().splitlines() if "warning" in line]
    if has_tokenizer:
        ids = [scorer.encode(conversation) for conversation in CONVERSATIONS]
        rewards += scorer.score_sequences(ids)
        assert scorer.tokenizer is not None
        messages += scorer.tokenizer.messages
    messages = [line.replace(str(path), "") for line in messages]  # every copy has another
    return Result(digest.hexdigest(), rewards, ids, messages)


def verified(path: Path) -> Result:
    """As `rewards_of`, of an export that ``--verify-only`` compares with its run beside it."""
    from rmega.export.convert import verify_only

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        code = verify_only(run=path.parent / "run", output=path)
    lines = [line for line in output.getvalue().splitlines() if "NOT VERIFIED" in line]
    assert bool(lines) == (code == 1), output.getvalue()
    return Result("verified" if code == 0 else "not verified", [], None, lines)


# ---- healthy folders


def make_subjects(folder: Path) -> dict[str, Subject]:
    """The healthy inputs by name, written under ``folder``."""
    subjects = {
        name: Subject(path, partial(rewards_of, has_tokenizer="without" not in name))
        for name, path in make_models(folder).items()
    }
    work = make_run_and_exports(folder)
    subjects |= {
        "run": Subject(work, rewards_of, "run", True, share=2),
        "checkpoint": Subject(work, rewards_of, "run/iter_0000004", True, share=2),
        "export": Subject(work, rewards_of, "export", True, share=2),
        "export with code": Subject(work, rewards_of, "export_internlm2", True),
        "export, --verify-only": Subject(work, verified, "export", True),
    }
    for subject in subjects.values():
        subject.healthy = subject.read(subject.folder / subject.inside)
        assert not subject.has_checksums or not any("NOT" in w for w in subject.healthy.warnings)
    return subjects


def make_models(folder: Path) -> dict[str, Path]:
    """Plain reward models of several families and layouts of files."""
    from tests.hf_fixtures import hf_config, hf_tensors, tiny, write_folder
    from tests.made_models import make_internlm2_of_the_hub, make_llama
    from tests.made_tokenizers import make_smollm2_tokenizer
    from tests.tiny import tiny_llama

    llama = make_llama(folder / "tokenizer")
    small: dict[str, Any] = {"layers": 2, "hidden": 32, "ffn": 48, "vocab": 512}
    models = {
        "llama": tiny_llama(folder / "llama", **small),
        "mistral in shards": tiny_llama(folder / "mistral", family="mistral", **small),
        "qwen2 in shards": tiny_llama(folder / "qwen2", family="qwen2", **{**small, "vocab": 1200}),
        "qwen3 without tokenizer, .bin": tiny_llama(folder / "qwen3", family="qwen3", **small),
    }
    for name in ("llama", "mistral in shards"):
        for file in llama.glob("tokenizer*"):
            shutil.copy(file, models[name])
    make_smollm2_tokenizer(models["qwen2 in shards"])
    for name in ("mistral in shards", "qwen2 in shards"):
        tensors = load_file(models[name] / "model.safetensors")
        (models[name] / "model.safetensors").unlink()
        config = json.loads((models[name] / "config.json").read_text())
        write_folder(models[name], config, tensors, shards=3)
    bin_folder = models["qwen3 without tokenizer, .bin"]
    torch.save(load_file(bin_folder / "model.safetensors"), bin_folder / "pytorch_model.bin")
    (bin_folder / "model.safetensors").unlink()

    hub = models["internlm2 of the hub"] = make_internlm2_of_the_hub(folder / "internlm2")
    vocab = json.loads((hub / "config.json").read_text())["vocab_size"]
    geometry = tiny("internlm2", num_layers=2, vocab_size=vocab, max_position_embeddings=512)
    config = hf_config(geometry, "InternLM2ForRewardModel", pad_token_id=2, num_labels=1)
    write_folder(hub, config, hf_tensors(geometry, head=True))
    return models


def make_run_and_exports(folder: Path) -> Path:
    """A folder with a run of four steps and two checkpoints, an export in shards and one with
    modeling code."""
    from rmega.export.convert import convert
    from tests import runs
    from tests.dist import run_distributed
    from tests.made_models import make_llama
    from tests.tiny import tiny_llama

    work = folder / "work"
    base = tiny_llama(folder / "base", layers=2, hidden=32, ffn=48, vocab=512, reward_head=False)
    for file in make_llama(folder / "base_tokenizer").glob("tokenizer*"):
        shutil.copy(file, base)
    data = runs.make_data(base, folder, count=24)
    argv = runs.flags(base, data, work / "run", steps=4, save_interval=2)
    assert run_distributed(runs.train, 1, argv) == [0]
    with contextlib.redirect_stdout(io.StringIO()):
        for name, options in (
            ("export", {"max_shard_size": "60KB"}),
            ("export_internlm2", {"family": "internlm2"}),
        ):
            assert convert(run=work / "run", output=work / name, **options) == 0
    return work


# ---- damage


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document; few of long lists and vocabularies."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items)[:40]:
        found.append((content, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


VALUES = (
    None, True, False, 0, -1, 1.5, "", "x", [], {}, [None], {"a": 1}, 10**30, float("nan"),
    float("inf"), "../config.json", [[]], "\ud800",
)  # fmt: skip


def another_value(path: Path, rng: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        where, key = rng.choice(places(content))
        where[key] = rng.choice(VALUES)

    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def another_number(path: Path, rng: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        numbers = [
            (where, key)
            for where, key in places(content)
            if isinstance(where[key], int | float) and not isinstance(where[key], bool)
        ]
        if numbers:
            where, key = rng.choice(numbers)
            where[key] = rng.choice([where[key] + 1, where[key] * 2, -where[key], 0, 10**12])

    change_json(path, change)


def field_gone(path: Path, rng: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        where, key = rng.choice(places(content))
        del where[key]

    change_json(path, change)


def key_twice(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    key, value = rng.choice(list(content.items())), rng.choice(VALUES)
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(f"{text[:-1]}, {json.dumps(key[0])}: {json.dumps(value)}}}", encoding="utf-8")


def not_an_object(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(["[]", "null", "1", '"x"', "[" * 5000, "NaN", "{}", "[{}]"]))


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def bytes_changed(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    for i in range(at, min(at + rng.randint(1, 20), len(content))):
        content[i] = rng.randrange(256)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def doubled(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


def emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def other_encoding(path: Path, rng: random.Random) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_bytes(rng.choice([text.encode("utf-16"), b"\xff\xfe\xfa" + text.encode()]))


def swapped(path: Path, rng: random.Random) -> None:
    """With another file of the folder that has other content."""
    others = [
        p
        for p in sorted(path.parent.iterdir())
        if p.is_file() and p != path and p.read_bytes() != path.read_bytes()
    ]
    if not others:
        return gone(path, rng)
    other = rng.choice(others)
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def edit_tensors(path: Path, rng: random.Random, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(
        {k: v.clone().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"}
    )


def tensor_damage(how: str) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = rng.choice(sorted(tensors))
            value = tensors[name]
            if how == "missing":
                del tensors[name]
            elif how == "too many":
                tensors[rng.choice(["extra.weight", f"{name}.bias", name + ".lora_A"])] = value
            elif how == "shape":
                shapes = [value[:-1], value.flatten()[None], value[None], value.repeat(2, 1)]
                tensors[name] = rng.choice(shapes).clone()
            elif how == "not finite":
                value.view(-1)[rng.randrange(value.numel())] = rng.choice([torch.nan, torch.inf])
            else:
                kinds = [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float16]
                tensors[name] = value.to(rng.choice(kinds))

        edit_tensors(path, rng, change)

    return damage


def wrong_shard(path: Path, rng: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        table = content["weight_map"]
        name = rng.choice(sorted(table))
        table[name] = rng.choice(
            [*sorted(set(table.values()) - {table[name]}), "none.safetensors", "config.json", "..",
             "/etc/passwd", "../x.safetensors", ""]
        )  # fmt: skip

    change_json(path, change)


Damage = Callable[[Path, random.Random], None]
FILE_DAMAGE: dict[str, Damage] = {
    "one bit flipped": flip,
    "some bytes changed": bytes_changed,
    "cut short": cut,
    "twice its content": doubled,
    "emptied": emptied,
    "gone": gone,
    "a folder in its place": folder_instead,
    "a link to itself": link_to_itself,
    "swapped with another file": swapped,
}
JSON_DAMAGE: dict[str, Damage] = {
    "another encoding": other_encoding,
    "JSON: a value of another type": another_value,
    "JSON: another number": another_number,
    "JSON: a field gone": field_gone,
    "JSON: a key twice": key_twice,
    "JSON: no object": not_an_object,
}
TENSOR_DAMAGE: dict[str, Damage] = {
    "a tensor missing": tensor_damage("missing"),
    "a tensor too many": tensor_damage("too many"),
    "a tensor of another shape": tensor_damage("shape"),
    "a weight that is not finite": tensor_damage("not finite"),
    "a tensor of another dtype": tensor_damage("dtype"),
}
INDEX_DAMAGE: dict[str, Damage] = {"a wrong shard in the index": wrong_shard}
ALL_DAMAGE = {**FILE_DAMAGE, **JSON_DAMAGE, **TENSOR_DAMAGE, **INDEX_DAMAGE}
ANOTHER_MODEL = {
    *("one bit flipped", "some bytes changed", "a tensor of another dtype"),
    *("JSON: a value of another type", "JSON: another number", "JSON: a field gone"),
}
"""Damage that may leave a plain model folder well-formed."""


def damages_for(path: Path) -> dict[str, Damage]:
    kinds = dict(FILE_DAMAGE)
    if path.suffix == ".json":
        kinds |= JSON_DAMAGE
    if path.suffix == ".safetensors":
        kinds |= TENSOR_DAMAGE
    if path.name.endswith(".index.json"):
        kinds |= INDEX_DAMAGE
    return kinds


# ---- the loop


def cases(subjects: dict[str, Subject], count: int, seed: int) -> Iterator[tuple[str, str, int]]:
    """(subject, kind of damage or "" for one that the file allows, number): kinds in turn."""
    names = [name for name, subject in subjects.items() for _ in range(subject.share)]
    kinds = list(ALL_DAMAGE)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        yield rng.choice(names), kinds[number % len(kinds)], number


def damage_one(subject: Subject, kind: str, work: Path, rng: random.Random) -> tuple[Path, str]:
    """Damage one file of a copy; (the file, the kind, which is another where no file allows it)."""
    root = work / subject.inside
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size]
    if root.name == "run" or "iter_" in root.name:
        # Most files of a run are the shards of its two checkpoints: the others get their turn, too.
        names = sorted({p.name for p in files})
        name = rng.choice(names)
        files = [p for p in files if p.name == name]
        fitting = [p for p in files if kind in damages_for(p)]
    else:
        fitting = [p for p in files if kind in damages_for(p)]
    if not fitting:
        file = rng.choice(files)
        kind = rng.choice(sorted(damages_for(file)))
    else:
        file = rng.choice(fitting)
    with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError):
        damages_for(file)[kind](file, rng)
    return file, kind


def outcome(subject: Subject, path: Path, file: Path, kind: str) -> str:
    """right, refused, warned or undetectable. Raises `Breach`."""
    from rmega.preferences.tokenizer import NotEncoded

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            result = subject.read(path)
    except NotEncoded:
        return "refused"  # as every row is, with its number
    except (ValueError, OSError) as error:
        text = str(error)
        if "\n" in text.strip() or str(path) not in text:
            raise Breach(f"not one line that names the folder: {text!r}") from error
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Breach(f"{type(error).__name__}: {str(error)[:300]}") from error
    assert subject.healthy is not None
    if result.same(subject.healthy):
        return "right"
    if set(result.warnings) - set(subject.healthy.warnings):
        return "warned"
    if not subject.has_checksums and (kind in ANOTHER_MODEL or file.suffix in WITHOUT_FORM):
        return "undetectable"
    raise Breach(f"another result without a warning: {result.warnings}")


def fuzz(count: int, seed: int, folder: Path) -> Counter[tuple[str, str, str]]:
    """(subject, kind, outcome) -> number of ``count`` damaged inputs. A breach is an outcome, too:
    it is printed, and its folder stays."""
    counts: Counter[tuple[str, str, str]] = Counter()
    subjects = make_subjects(folder / "healthy")
    for name, kind, number in cases(subjects, count, seed):
        rng = random.Random(f"{seed} {number} damage")
        subject, work = subjects[name], folder / f"case{number}"
        shutil.copytree(subject.folder, work)
        file, kind = damage_one(subject, kind, work, rng)
        try:
            result = outcome(subject, work / subject.inside, file, kind)
        except Breach as breach:
            result = BREACH
            print(f"{name}: {kind}: {file}: {breach}", file=sys.stderr, flush=True)
            if breach.__cause__ is not None:
                traceback.print_exception(breach.__cause__, limit=-4)
        else:
            shutil.rmtree(work)
        counts[name, kind, result] += 1
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{number + 1} of {count}")
    return counts


BREACH = "breach"
OUTCOMES = ("right", "refused", "warned", "undetectable")


def table(counts: Counter[tuple[str, str, str]], by: int) -> list[str]:
    """Lines of a Markdown table by subject (0) or by kind of damage (1)."""
    lines = [f"| {('input', 'damage')[by]} | inputs | {' | '.join(OUTCOMES)} |"]
    lines.append("|---|" + "---|" * (len(OUTCOMES) + 1))
    names = dict.fromkeys(key[by] for key in sorted(counts))
    for name in [*names, "all"]:
        row = [
            sum(n for key, n in counts.items() if key[2] == o and name in (key[by], "all"))
            for o in OUTCOMES
        ]
        lines.append(f"| {name} | {sum(row):,} | {' | '.join(f'{n:,}' for n in row)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="damaged inputs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder, start = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic()
    counts = fuzz(args.count, args.seed, folder)
    print("\n".join([*table(counts, 0), "", *table(counts, 1)]))
    print(f"\n{sum(counts.values()):,} inputs, {time.monotonic() - start:,.0f} s")
    breaches = sum(n for key, n in counts.items() if key[2] == BREACH)
    if breaches:
        print(f"{breaches} breaches; their folders: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
