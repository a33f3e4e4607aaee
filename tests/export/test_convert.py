"""A checkpoint of any layout becomes a Hugging Face folder: the same bytes and rewards, and a
verification that catches one changed value."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmega.checkpointing import checkpoint, run_folder
from rmega.checkpointing.find import find_checkpoint
from rmega.export.average import read_part
from rmega.export.checkpoint_tensors import CheckpointTensors
from rmega.export.convert import convert, verify_only
from rmega.export.destination import RECIPE, UNVERIFIED
from rmega.export.rewards import rewards_of_parts, transformers_rewards
from rmega.export.write_weights import parse_size
from rmega.models import BACKBONES
from rmega.models.hf import load_hf
from rmega.models.weights import hf_shapes
from tests import clients
from tests.conftest import ROOT
from tests.dist import run_distributed
from tests.hf_fixtures import FAMILIES, SCALED, Stage, hf_config, hf_tensors, tiny, write_folder
from tests.runs import edit_info
from tests.tiny import InMemory, random_comparisons

REWARD, PAD = 3, 2
VOCAB = 256
BOTH = ("llama", "internlm2")  # the same mathematics under other names
FORMATS = {"llama": BOTH, "internlm2": BOTH, "mistral": ("mistral", "llama")}


def save_run(
    rank: int, world_size: int, text: str, folder: str, run: str, dtype: str, manifest: dict
) -> None:
    """Load a folder in a layout and save it as a run whose weights are exactly the folder's."""
    from rmega.models.hf import read_geometry
    from rmega.training import train
    from rmega.training.components import make_batcher
    from rmega.training.parity import Layout, build, layout_config

    config = layout_config(
        Layout.parse(text), hf_model=folder, steps=3, global_batch_size=8, max_tokens=260, lr=1e-3
    )
    wrapped, optimizer, scheduler, geometry, _ = build(config, getattr(torch, dtype))
    for group in (
        optimizer.param_groups
    ):  # a step of length 0, because an optimizer without state is not saved
        group["lr"] = 0.0
    batcher = make_batcher(config, InMemory(random_comparisons(8, seed=1)), geometry)
    documents = batcher.documents(0)
    train.train_step(wrapped, optimizer, batcher.packs(documents), config.loss, len(documents))
    verification = [
        {"prefix": c.prefix.tolist(), "suffixes": [s.tolist() for s in c.suffixes]}
        for c in random_comparisons(17, seed=2)
    ]
    info = {
        "config": config.as_dict(),
        "geometry": dataclasses.asdict(geometry),
        "hf_config": read_geometry(folder)[1],
        "base_model": folder,
        "manifest": manifest,
        "num_comparisons": 8,
        "dtype": dtype,
        "best": [0.5, 10],
        "reward_token_id": manifest.get("reward_token_id", REWARD),
        "pad_token_id": manifest.get("pad_token_id", PAD),
        "verification": verification,
    }
    checkpoint.save(
        run,
        state=checkpoint.RunState(10, 80),
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        info=info,
        hf_files=[f for f in Path(folder).iterdir() if f.suffix != ".safetensors"],
    )


def make_run(
    folder: Path, run: Path, text: str = "1", dtype: str = "float32", manifest: dict | None = None
) -> Path:
    from rmega.training.parity import Layout

    run_distributed(
        save_run, Layout.parse(text).world_size, text, str(folder), str(run), dtype, manifest or {}
    )
    return run


def reward_folder(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **changes
) -> Path:
    geometry = tiny(family, **{"num_layers": 4, "vocab_size": VOCAB, **changes})
    architecture = BACKBONES[family].architecture
    return write_folder(
        folder,
        hf_config(geometry, architecture, id2label={"0": "r"}),
        hf_tensors(geometry, head=True, dtype=dtype),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: reward_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    """A run of each family, cut over two tensor ranks and two stages."""
    root = tmp_path_factory.mktemp("runs")
    return {family: make_run(folder, root / family, "tp2,pp2") for family, folder in bases.items()}


@pytest.fixture(scope="module")
def outputs(runs, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Each family in each format that can express it, verified."""
    root = tmp_path_factory.mktemp("outputs")
    out = {}
    for family, run in runs.items():
        for form in FORMATS.get(family, (family,)):
            out[family, form] = root / f"{family}-as-{form}"
            assert convert(run=run, output=out[family, form], family=form) == 0
            assert not (out[family, form] / UNVERIFIED).exists()
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("1", "bfloat16"),
        ("tp2", "float32"),
        ("tp2,sp,dp2", "bfloat16"),
        ("pp2,vpp2", "float32"),
        ("tp4,pad", "float32"),
        ("dp2", "float32"),
    ],
)
def test_round_trip_is_bit_identical(family, text, dtype, tmp_path) -> None:
    folder = reward_folder(tmp_path / "hf", family, dtype=getattr(torch, dtype))
    run = make_run(folder, tmp_path / "run", text, dtype)
    assert convert(run=run, output=tmp_path / "out", verify=False, max_shard_size="30KB") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert same(weights(tmp_path / "out"), weights(folder))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(folder).keys()


def test_round_trip_of_every_family(bases, outputs) -> None:
    for family, folder in bases.items():
        assert same(weights(outputs[family, family]), weights(folder))


def test_internlm2_to_llama_and_back(bases, outputs, tmp_path) -> None:
    run = make_run(outputs["internlm2", "llama"], tmp_path / "run", "tp2")
    assert convert(run=run, output=tmp_path / "back", family="internlm2") == 0
    assert same(weights(tmp_path / "back"), weights(bases["internlm2"]))


def test_same_rewards_in_both_formats(outputs) -> None:
    recipes = {key: json.loads((folder / RECIPE).read_text()) for key, folder in outputs.items()}
    for family, forms in FORMATS.items():
        a, b = (recipes[family, form]["verification"] for form in forms)
        assert a["passed"] and a["responses"] >= 34 and a["comparisons"] == 17
        assert a["largest_reward"] == b["largest_reward"] > 0.1


def test_going_on_from_an_export(outputs) -> None:
    for (_, form), folder in outputs.items():
        from rmega.models.hf import read_geometry

        geometry, _ = read_geometry(folder)
        stage = Stage(geometry)
        assert (
            load_hf(stage, folder, geometry, tp_rank=0, tp_size=1) == "head from model.safetensors"
        )
        head = weights(folder)[BACKBONES[form].names.head]
        assert (
            torch.equal(stage.names["reward_head.weight"].detach(), head) and head.abs().max() > 0
        )


def interpreters() -> list[str]:
    """This Python, and others with other releases of transformers: RMEGA_OTHER_PYTHONS, divided by
    colons."""
    return [sys.executable, *filter(None, os.environ.get("RMEGA_OTHER_PYTHONS", "").split(":"))]


def version_of(python: str) -> tuple[int, ...]:
    """The release of transformers that a Python has."""
    code = "import importlib.metadata as m; print(m.version('transformers'))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, answer.stdout.strip().split(".")[:2]))


def check_load(
    python: str,
    folders: list[Path],
    sequences: list[list[int]],
    pad: int,
    conversation: list | None = None,
) -> list[dict]:
    """What a Python without rmega answers for each folder."""
    shared = {"sequences": sequences, "pad": pad, "conversation": conversation}
    return clients.ask(python, [{"folder": str(folder), **shared} for folder in folders])


def in_process(root: Path, sequences: list[list[int]]) -> list[list[float]]:
    """Rewards by transformers from ``root``/llama and ``root``/internlm2, alone and in padded
    batches."""
    return [
        one_side
        for form in BOTH
        for size in (1, 8)
        for one_side in transformers_rewards(
            root / form, tiny(form), sequences, PAD, batch_size=size
        ).tolist()
    ]


def close(ours: list[float], theirs: list[float], tolerance: float = 1e-4) -> None:
    a, b = torch.tensor(ours), torch.tensor(theirs)
    assert (a - b).abs().max() <= tolerance * a.abs().max(), (a - b).abs().max()


@pytest.mark.parametrize("python", interpreters())
def test_plain_transformers_gives_the_training_rewards(python, runs, outputs, tmp_path) -> None:
    """Batch sizes 1 and 8, mixed lengths, padding on both sides, nothing of rmega on the path."""
    comparisons = random_comparisons(12, seed=5)
    items = [[[*c.prefix.tolist(), *s.tolist()] for s in c.suffixes] for c in comparisons]
    sequences = [ids for item in items for ids in item]
    known = {
        (family, form): outputs[family, form]
        for family in runs
        for form in FORMATS.get(family, (family,))
        if form != "qwen3" or version_of(python) >= (4, 51)
    }
    expected = {
        family: rewards_of_parts([read_part(run)], items, ["float32"])[0].tolist()
        for family, run in runs.items()
    }
    answers = check_load(python, list(known.values()), sequences, PAD)
    for (family, _), answer in zip(known, answers, strict=True):
        for rewards in answer["rewards"].values():
            close(expected[family], rewards)


@pytest.mark.parametrize("scaling", SCALED, ids=lambda s: s.rope_type)
def test_rope_scaling_survives(scaling, tmp_path) -> None:
    folder = reward_folder(
        tmp_path / "hf", "llama", rope_scaling=scaling, rope_theta=5e4, max_position_embeddings=128
    )
    run = make_run(folder, tmp_path / "run")
    for form in BOTH:
        assert convert(run=run, output=tmp_path / form, family=form) == 0
    sequences = [
        [*c.prefix.tolist(), *c.suffixes[0].tolist()] for c in random_comparisons(9, seed=5)
    ]
    answers = in_process(tmp_path, sequences)
    for python in interpreters()[1:]:
        for answer in check_load(python, [tmp_path / f for f in BOTH], sequences, PAD):
            answers += answer["rewards"].values()
    for answer in answers:
        close(answers[0], answer)


@pytest.mark.parametrize("source", ["small_llama", "internlm2_tokenizer"])
def test_tokenizer_template_and_pad_token(source, request, tmp_path) -> None:
    """Two kinds of tokenizers: a client of the written folder makes the ids of the training, in
    every transformers."""
    from rmega.data.fingerprint import is_tokenizer_of
    from rmega.preferences.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.load(request.getfixturevalue(source))
    family = "llama" if source == "small_llama" else "internlm2"
    folder = reward_folder(tmp_path / "hf", family, vocab_size=tokenizer.vocab_size)
    for file in request.getfixturevalue(source).iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    run = make_run(folder, tmp_path / "run", manifest=tokenizer.manifest())
    assert convert(run=run, output=tmp_path / "out") == 0
    recipe = json.loads((tmp_path / "out" / RECIPE).read_text())
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(
        str(tmp_path / "out")
    )  # also for training on from it, on the same data
    assert is_tokenizer_of(exported, tokenizer.manifest())
    assert not is_tokenizer_of(
        exported, {**tokenizer.manifest(), "tokenizer_fingerprint": "0123456789abcdef"}
    )
    chat = [
        {"role": "user", "content": "Was ist 2 + 2?\n\tSay  it twice: 你好！"},
        {"role": "assistant", "content": "4, 4."},
    ]
    ids = tokenizer.encode_conversation(chat)
    if source == "internlm2_tokenizer":
        reward_token_id = tokenizer.vocab_size - 17  # 92527 of 92544 in the published one
        assert (recipe["reward_token_id"], recipe["reward_token"]) == (
            reward_token_id,
            "[UNUSED_TOKEN_130]",
        ) and ids[-1] == reward_token_id
    assert recipe["pad_token_id"] != recipe["reward_token_id"]
    for python in interpreters():
        (answer,) = check_load(python, [tmp_path / "out"], [ids], recipe["pad_token_id"], chat)
        appended = [] if recipe["template_writes_reward_token"] else [recipe["reward_token_id"]]
        assert recipe["template_writes_reward_token"] == (family == "llama")
        assert [*answer["ids"], *appended] == ids and answer["pad"] == recipe["pad_token_id"]
        if family == "internlm2":
            close(answer["chat"][:1], answer["rewards"]["1right"])
            close(answer["chat"][:1], answer["chat"][1:2])
        else:
            close([answer["pipeline"]], answer["rewards"]["1right"])
    example = [sys.executable, "examples/score_with_transformers.py", str(tmp_path / "out")]
    done = subprocess.run(
        example, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 0 and len(done.stdout.splitlines()) == 3 and "y/N" not in done.stdout
    ), done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(recipe["example"]["token_ids"]) in card and "tolerance 1e-04" in card
    assert ("Apache License" if family == "internlm2" else "MIT License") in card


def test_a_pad_token_that_ends_every_turn_is_replaced(
    internlm2_tokenizer, tmp_path, capsys
) -> None:
    """transformers 4 would read the reward before the first <|im_end|>, in the middle of the
    conversation."""
    from rmega.preferences.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.load(internlm2_tokenizer)
    folder = reward_folder(tmp_path / "hf", "llama", vocab_size=tokenizer.vocab_size)
    for file in internlm2_tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    end = tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    run = make_run(folder, tmp_path / "run", manifest={**tokenizer.manifest(), "pad_token_id": end})
    assert convert(run=run, output=tmp_path / "out") == 0
    assert f"because id {end} occurs in texts" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "out" / RECIPE).read_text())
    ids = recipe["example"]["token_ids"]
    assert end in ids and recipe["pad_token_id"] not in ids
    for python in interpreters():
        (answer,) = check_load(
            python,
            [tmp_path / "out"],
            [ids, ids[:5] + ids[-1:]],
            recipe["pad_token_id"],
            recipe["example"]["messages"],
        )
        assert answer["pad"] == recipe["pad_token_id"]
        for rewards in answer["rewards"].values():
            close([recipe["example"]["reward"]], rewards[:1])


def test_causal_llama_as_internlm2(small_llama, tmp_path) -> None:
    """A language model with tied embeddings, re-laid out as InternLM2: the rewards are those of the
    Llama."""
    run = make_run(small_llama, tmp_path / "run", "tp2")
    for form in BOTH:
        assert convert(run=run, output=tmp_path / form, family=form) == 0
    answers = in_process(tmp_path, [list(range(5, 60 + i)) for i in range(9)])
    assert max(map(abs, answers[0])) > 0.01
    for answer in answers:
        close(answers[0], answer)


@pytest.mark.parametrize("tensor", ["score.weight", "model.embed_tokens.weight"])
def test_one_changed_value_fails_the_verification(tensor, runs, outputs, tmp_path, capsys) -> None:
    """Also a value that no comparison of the verification reads: the last row of the embedding."""
    folder = tmp_path / "out"
    shutil.copytree(outputs["llama", "llama"], folder)
    assert verify_only(run=runs["llama"], output=folder) == 0
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][-1, -1] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify_only(run=runs["llama"], output=folder) == 1
    assert tensor in (folder / UNVERIFIED).read_text()
    assert "NOT VERIFIED" in capsys.readouterr().out
    assert "DO NOT AGREE" in (folder / "README.md").read_text()


def test_rounding_is_named_and_verified(runs, tmp_path, capsys) -> None:
    assert convert(run=runs["internlm2"], output=tmp_path / "out", dtype="bfloat16") == 0
    assert "rounding the weights to bfloat16 moves a reward by" in capsys.readouterr().out
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_few_comparisons_verify_nothing(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    path = run / "iter_0000010" / "rmega.json"
    info = json.loads(path.read_text())
    edit_info(path.parent, verification=info["verification"][:3])
    assert convert(run=run, output=tmp_path / "out") == 1
    assert "at least 16" in (tmp_path / "out" / UNVERIFIED).read_text()


def test_output_is_not_overwritten(runs, outputs, tmp_path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs["llama", "llama"], folder)
    with pytest.raises(ValueError, match="exists already; --force"):
        convert(run=runs["llama"], output=folder)
    with pytest.raises(ValueError, match="a verified export; --no-verify does not replace it"):
        convert(run=runs["llama"], output=folder, force=True, verify=False)
    old = (folder / "model.safetensors").stat().st_ino
    assert convert(run=runs["llama"], output=folder, force=True) == 0
    assert (folder / "model.safetensors").stat().st_ino != old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.md, not written by the export; --force"):
        convert(run=runs["llama"], output=folder, force=True)
    (folder / "notes.md").unlink()
    (folder / RECIPE).unlink()
    with pytest.raises(ValueError, match="holds no reward_recipe.json"):
        convert(run=runs["llama"], output=folder, force=True)
    assert (folder / "model.safetensors").exists()


def test_a_verified_export_stays_where_its_successor_fails(runs, outputs, tmp_path, capsys) -> None:
    folder, run = tmp_path / "out", tmp_path / "run"
    shutil.copytree(outputs["llama", "llama"], folder)
    shutil.copytree(runs["llama"], run)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    info = json.loads((run / "iter_0000010" / "rmega.json").read_text())
    change(run / "iter_0000010", verification=info["verification"][:3])
    assert convert(run=run, output=folder, force=True) == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (tmp_path / "out.unverified" / UNVERIFIED).exists()
    assert f"The older export stays: {folder}" in capsys.readouterr().out
    shutil.copytree(outputs["llama", "llama"], tmp_path / "other")
    assert convert(run=run, output=tmp_path / "out.unverified", force=True) == 1
    assert convert(run=run, output=tmp_path / "out.unverified", force=True, verify=False) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        "out",
        "out.unverified",
        "run",
    ]


@pytest.mark.parametrize("where", ["run", "checkpoint", "inside", "base", "above", "link"])
def test_force_never_replaces_a_run_or_its_base_model(where, bases, runs, tmp_path) -> None:
    """It used to: a run folder holds a config.json, and all its checkpoints went with it."""
    home = tmp_path / "home"
    run, base = home / "run", home / "base"
    shutil.copytree(runs["llama"], run)
    shutil.copytree(bases["llama"], base)
    (run / "config.json").write_text("{}")
    change(run / "iter_0000010", base_model=str(base))
    (tmp_path / "link").symlink_to(run)
    output = {
        "run": run,
        "checkpoint": run / "iter_0000010",
        "inside": run / "export",
        "base": base,
        "above": home,
        "link": tmp_path / "link",
    }[where]
    before = sorted(tmp_path.rglob("*"))
    for load in (run, run / "iter_0000010"):
        with pytest.raises(ValueError, match=r"--output .*: (is|holds|lies in) "):
            convert(run=load, output=output, force=True)
    assert before == sorted(tmp_path.rglob("*"))


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        convert(run=runs["llama"], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: change(d, format_version=99), "checkpoint format version 99; this rmega reads"),
        (
            lambda d: (change(d, files=None), (d / ".metadata").unlink()),
            "not a readable checkpoint",
        ),
        (lambda d: next(d.glob("__0_*.distcp")).unlink(), "damaged .*No such file"),
        (lambda d: flip(next(d.glob("__0_*.distcp"))), "damaged .*has changed"),
        (lambda d: flip(d / "hf" / "config.json"), "damaged .*has changed"),
        (lambda d: cut(next(d.glob("__0_*.distcp"))), "damaged .*bytes instead of"),
        (
            lambda d: (change(d, files=None), next(d.glob("__0_*.distcp")).unlink()),
            "missing; the checkpoint is not compl",
        ),
        (lambda d: (change(d, files=None), cut(next(d.glob("__0_*.distcp")), 9)), "broken at"),
        (lambda d: change(d, pad_token_id=REWARD), "pad_token_id and reward_token_id are both"),
    ],
)
def test_a_checkpoint_that_cannot_be_read(spoil, message, runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    spoil(run / "iter_0000010")
    with pytest.raises(ValueError, match=message) as error:
        convert(run=run, output=tmp_path / "out")
    assert (
        "\n" not in str(error.value)
        and not (tmp_path / "out").exists()
        and len(list(tmp_path.iterdir())) == 1
    )


def change(folder: Path, **fields) -> None:
    edit_info(folder, **fields)


def flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path, share: int = 2) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // share])


def test_padding_that_is_not_zero_is_refused(runs) -> None:
    source = CheckpointTensors(runs["llama"] / "iter_0000010")
    table = BACKBONES["llama"].weight_table(tiny("llama", num_layers=4, vocab_size=VOCAB - 1))
    with pytest.raises(ValueError, match="not zero where it was padded"):
        list(source.rows(table[0]))
    table = BACKBONES["llama"].weight_table(tiny("llama", num_layers=5, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="layers.4.* is not in the checkpoint"):
        list(source.rows(next(rule for rule in table if ".4." in rule.name)))


def test_which_checkpoint(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    shutil.copytree(run / "iter_0000010", run / "iter_0000020")
    (run / run_folder.TRACKER).write_text("20\n")
    assert find_checkpoint(run, "latest").name == find_checkpoint(run, "20").name == "iter_0000020"
    assert (
        find_checkpoint(run, "best").name
        == find_checkpoint(run / "iter_0000010", "latest").name
        == "iter_0000010"
    )
    for iteration, message in (("30", r"not among .*\(10, 20\)"), ("last", "not among")):
        with pytest.raises(ValueError, match=message):
            find_checkpoint(run, iteration)
    (run / run_folder.TRACKER).write_text("10\n")  # the run went back: 20 is not its own any more
    assert (
        find_checkpoint(run, "latest").name == find_checkpoint(run, "best").name == "iter_0000010"
    )
    (run / run_folder.TRACKER).write_text("5\n")
    for iteration in ("latest", "best"):
        with pytest.raises(
            ValueError, match="names iteration 5, which is gone.*--iteration .10, 20"
        ):
            find_checkpoint(run, iteration)
    with pytest.raises(ValueError, match="--load .*no such folder"):
        find_checkpoint(tmp_path / "nothing", "latest")
    with pytest.raises(ValueError, match="no checkpoint in it"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize(
    "plan,planned",
    [
        ({"train_steps": 23}, 23),
        ({"train_steps": 10}, 10),
        ({}, None),
        ({"train_epochs": 2.0, "global_batch_size": 8}, 92),
    ],
)
def test_an_export_of_a_run_that_goes_on_says_so(plan, planned, runs, tmp_path, capsys) -> None:
    """Step 10 of a run: named where more steps are planned, by number or by epochs (368
    comparisons)."""
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    edit_info(run / "iter_0000010", num_comparisons=368, config={"train": plan})
    assert convert(run=run, output=tmp_path / "out", verify=False) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    said = f"note: {run / 'iter_0000010'} is step 10 of the {planned} that the run is planned for"
    assert notes == ([said] if planned and planned > 10 else [])


def test_sizes() -> None:
    assert [parse_size(t) for t in ("5GB", "500 MB", "2GiB", "7", "1.5KB")] == [
        5 * 10**9,
        5 * 10**8,
        2**31,
        7,
        1500,
    ]
    for text in ("5 apples", "", "-1GB", "0"):
        with pytest.raises(ValueError, match="--max-shard-size"):
            parse_size(text)


def test_the_tool_on_the_command_line(runs, tmp_path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "convert_to_hf.py"
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1]), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    answer = subprocess.run(
        [sys.executable, str(tool), "--load", str(runs["internlm2"]), "--output", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    for words in (
        "\nverified\n",
        f"vllm serve {out}",
        "sglang serve --model-path",
        "get_score",
        "Append the reward token, id 3",
    ):
        assert words in answer.stdout
    answer = subprocess.run(
        [sys.executable, str(tool), "--load", str(runs["internlm2"]), "--output", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (
        answer.returncode == 2
        and answer.stderr.startswith("error: --output")
        and answer.stderr.count("\n") == 1
    )


def test_every_shape_of_the_table_is_written_once() -> None:
    for family, backbone in BACKBONES.items():
        shapes = hf_shapes(backbone.weight_table(tiny(family)))
        assert sum(torch.Size(s).numel() for s in shapes.values()) == sum(
            torch.Size(rule.shape).numel() for rule in backbone.weight_table(tiny(family))
        )
