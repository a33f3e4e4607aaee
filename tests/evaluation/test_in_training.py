"""Evaluations of a training: the probes on token ids, files and lines of a run, the same result
in any layout."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rmega.commands.evaluate import EvaluateArgs, main
from rmega.data.batching import Batcher
from rmega.data.indexed import StoredComparison, open_preferences
from rmega.evaluation import files
from rmega.evaluation.in_training import Evaluations
from rmega.evaluation.probes import NUM_PROBED, pick
from rmega.evaluation.results import ScoredComparison, evaluate, stored_items, to_json
from rmega.evaluation.token_probes import (
    View,
    blanked,
    probe_stored,
    reversed_responses,
    wrong_prompts,
)
from tests import runs
from tests.dist import run_distributed
from tests.made_rows import write_lines
from tests.report.test_report import check
from tests.tiny import InMemory, random_comparisons

STEPS = 4


# ---- the forms, and what they show of a model


def comparison(prefix: list[int], *suffixes: list[int]) -> StoredComparison:
    return StoredComparison(
        prefix=np.array(prefix, np.int32),
        suffixes=[np.array(s, np.int32) for s in suffixes],
        scores=np.arange(len(suffixes), 0, -1, dtype=np.float32),
        graded=False,
        source="s",
    )


def ids(comparisons) -> list[tuple[list[int], list[list[int]]]]:
    return [(c.prefix.tolist(), [s.tolist() for s in c.suffixes]) for c in comparisons]


def test_blanked_responses_are_one_and_end_as_all_do():
    """Every text ends with 8 9; a suffix of one id has room for the reward token alone."""
    got = blanked(
        [comparison([1, 2, 3], [5, 6, 8, 9], [7, 8, 9]), comparison([1, 4, 8], [9], [6, 8, 9])]
    )
    assert ids(got) == [([1, 2, 3], [[8, 9]] * 2), ([1, 4, 8], [[9]] * 2)]


def test_reversed_responses_keep_their_scores():
    (got,) = reversed_responses([comparison([1], [2, 9], [3, 9], [4, 9])])
    assert ids([got]) == [([1], [[4, 9], [3, 9], [2, 9]])] and got.scores.tolist() == [1, 2, 3]


def test_wrong_prompts_stay_within_texts_and_packs():
    """A prompt that is too long for the other's responses loses its oldest tokens, but not what all
    begin with."""
    short, long = comparison([1, 2], [5, 6, 7, 9], [8, 9]), comparison([1, 3, 4, 5, 6], [7, 9], [9])
    got, cut = wrong_prompts([short, long], max_tokens=100)
    assert (
        ids(got) == [([1, 5, 6], [[5, 6, 7, 9], [8, 9]]), ([1, 2], [[7, 9], [9]])] and cut == 1
    )  # longest: 7 tokens
    got, cut = wrong_prompts([short, long], max_tokens=8)  # 2 of them beside 6 of the responses
    assert ids(got)[0][0] == [1, 6] and cut == 1
    rows = random_comparisons(60)
    longest = max(len(c.prefix) + len(s) for c in rows for s in c.suffixes)
    for share in (True, False):
        got, cut = wrong_prompts(rows, max_tokens=70, share_prefix=share)
        assert 0 < cut < len(rows)
        for own, other, after in zip(rows, got, [*rows[1:], rows[0]], strict=True):
            assert all((a == b).all() for a, b in zip(own.suffixes, other.suffixes, strict=True))
            assert len(other.prefix) <= len(after.prefix)
            assert max(len(other.prefix) + len(s) for s in other.suffixes) <= longest
            sizes = [
                (len(c.prefix) if share else len(c.prefix) * len(c.suffixes))
                + sum(map(len, c.suffixes))
                for c in (own, other)
            ]
            assert sizes[1] <= max(70, sizes[0])


def test_a_view_makes_the_packs_of_a_dataset():
    rows = random_comparisons(30)
    options = dict(global_batch_size=8, max_tokens=200, seed=1, num_ranks=2)
    for rank in (0, 1):
        ours, theirs = (Batcher(kind(rows), rank=rank, **options) for kind in (View, InMemory))
        assert ours.num_responses == theirs.num_responses
        for one, other in zip(ours.sweep(), theirs.sweep(), strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a.tokens, b.tokens) and torch.equal(a.responses, b.responses)


def by_tokens(view) -> np.ndarray:
    """A model that reads all ids of a text, and nothing else."""
    return np.array(
        [
            np.sin(np.concatenate([c.prefix, s]).sum() * 1.7)
            for c in map(view.get, range(len(view)))
            for s in c.suffixes
        ]
    )


def by_place(view) -> np.ndarray:
    """A model that prefers whatever stands first."""
    return np.array(
        [-float(i) for c in map(view.get, range(len(view))) for i in range(len(c.suffixes))]
    )


def by_response(view) -> np.ndarray:
    """A model that never looks at the prompt."""
    return np.array([float(s.sum()) for c in map(view.get, range(len(view))) for s in c.suffixes])


def probed(score, count: int = 40) -> dict:
    dataset = InMemory(random_comparisons(60))
    items = stored_items(dataset, score(dataset))
    return evaluate(items, probes=probe_stored(dataset, items, score, count, max_tokens=10_000))


def test_probes_pass_an_honest_model_and_catch_a_dishonest_one():
    honest = probed(by_tokens)
    assert honest["swap"]["changed_share"] == 0 and honest["swap"]["max_difference"] == 0
    assert honest["prompt"]["blank_accuracy"] == 0.5
    assert honest["swap"]["num_comparisons"] == honest["prompt"]["num_comparisons"] == 40
    assert honest["swap"]["rescored_accuracy"] == pytest.approx(
        1 - honest["prompt"]["own_accuracy"]
    )
    cheat = probed(by_place)
    assert cheat["swap"]["changed_share"] == 1 and cheat["prompt"]["blank_accuracy"] == 1
    assert {v["about"] for v in cheat["findings"] if v["level"] == "bad"} >= {"swap", "prompt only"}
    blind = probed(by_response)["prompt"]
    assert blind["shuffled_accuracy"] == blind["own_accuracy"] != 0.5
    assert honest["prompt"]["shuffled_accuracy"] != honest["prompt"]["own_accuracy"]
    assert (
        "num_comparisons"
        not in evaluate(
            stored_items(InMemory([]), np.zeros(0)),
            probes=probe_stored(InMemory([]), [], by_tokens, 9, max_tokens=9),
        )["swap"]
    )


def test_the_number_of_probes_is_that_of_the_tool():
    from rmega.cli import parse_args
    from rmega.config import TrainArgs, TrainingConfig

    assert EvaluateArgs(data=[]).probes == NUM_PROBED == 16 and TrainArgs().eval_probes == "last"
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        parse_args(TrainingConfig, ["--help"])
    assert f"Score {NUM_PROBED} comparisons" in " ".join(said.getvalue().replace("│", " ").split())


# ---- files


def test_names_of_folders():
    """Plain names stay; no name leaves the folder, none meets another, whatever the file system
    makes of case."""
    names = ["hh", "a/b", "a%2Fb", "..", ".", "", "~", "HH", "ä b", "x" * 400, "x" * 401, "\udcff"]
    got = files.folder_names(names)
    assert got["a/b"] == "a%2Fb" and files.folder_names(["HH"]) == {"HH": "HH"}
    assert len({folder.casefold() for folder in got.values()}) == len(names)
    for folder in got.values():
        assert (
            folder
            and "/" not in folder
            and not folder.startswith(".")
            and len(folder) < 200
            and folder.isascii()
        )


class Set(InMemory):
    prefix, manifest = (
        "runs/data/valid",
        {
            "split": None,
            "input": {"files": [{"schema": "messages"}], "rejected": {"tie": 3, "overlong": 1}},
        },
    )


def noted(
    run: Path, name: str, steps: dict[int, dict], last: int = 99, resumed_at: int | None = None
) -> str:
    """What the evaluations of a run print, one of ``steps`` after the other."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluations = Evaluations(str(run), {name: Set([])}, probes="last", resumed_at=resumed_at)
        for step, result in steps.items():
            evaluations.note(name, step, result, last=step == last)
    return said.getvalue()


def of_bias(strong: bool) -> dict:
    """A result whose rewards are lengths, or the length's cube root with the right sign for the
    labels."""
    rng = np.random.default_rng(1)
    return evaluate(
        [
            ScoredComparison(
                rewards=np.array(n if strong else rng.normal([1.0, 0.0]), float),
                scores=np.array([1.0, 0.0]),
                lengths=n,
            )
            for n in rng.integers(1, 90, (200, 2))
        ],
        length_unit="tokens",
    )


def test_a_new_length_bias_is_said_once(tmp_path):
    fair, biased = of_bias(False), of_bias(True)
    said = noted(tmp_path, "a/b", {0: fair, 1: biased, 2: biased, 3: fair, 4: biased})
    assert said.count("[!!] a/b: Strong length bias, towards longer") == 2 and said.count("\n") == 2
    assert noted(tmp_path, "a/b", {5: biased}, resumed_at=4) == ""  # known from the file of step 4
    assert (
        noted(tmp_path, "a/b", {4: biased}, resumed_at=3).count("\n") == 1
    )  # after step 3 there was none
    said = noted(tmp_path, "a/b", {6: biased}, last=6, resumed_at=4)
    assert (
        said.count("\n") == len(biased["findings"])
        and "[!!] a/b: Strong" in said
        and "[!]  a/b: " in said
    )


def test_files_hold_the_whole_result_and_stale_ones_go(tmp_path):
    fair = of_bias(False)
    noted(tmp_path, "..", {0: fair, 10: fair, 20: fair})
    folder = tmp_path / "evaluations" / "%2E."
    assert sorted(p.name for p in folder.iterdir()) == [f"step_00000{n}0.json" for n in (0, 1, 2)]
    whole = json.loads((folder / "step_0000010.json").read_text())
    assert whole | {"sets": 0} == {
        "format_version": 2,
        "subject": str(tmp_path),
        "step": 10,
        "sets": 0,
    }
    assert whole["sets"][".."] == to_json(fair) | {
        "data": "runs/data/valid",
        "schema": "messages",
        "notes": {},
        "left_out": {"tie": 3, "overlong": 1},
    }
    assert list(files.read_evaluations(tmp_path)[".."]) == [0, 10, 20]
    (folder / "step_0000005.json.partial").write_text("{")
    noted(tmp_path, "..", {}, resumed_at=10)
    assert sorted(p.name for p in folder.iterdir()) == ["step_0000000.json", "step_0000010.json"]
    (folder / "step_0000010.json").write_text('{"format_version": 7, "step": 10, "sets": {}}')
    with pytest.raises(ValueError, match="step_0000010.json: format version 7"):
        files.read_evaluations(tmp_path)
    (folder / "step_0000010.json").write_text("[]")
    with pytest.raises(ValueError, match="step_0000010.json: not an evaluation"):
        files.read_evaluations(tmp_path)
    assert "step_0000010.json: not an evaluation of a run; training continues" in noted(
        tmp_path, "..", {}, resumed_at=10
    )
    noted(tmp_path, "..", {})  # from scratch
    assert not folder.exists() and files.read_evaluations(tmp_path) == {}


# ---- whole runs


@pytest.fixture(scope="module")
def data(preference_files, small_llama, tmp_path_factory) -> dict[str, Path]:
    """Prefixes of comparisons, with the rows that they were made of beside them
    (PREFIX.jsonl). Short ones: a row that is too long is cut for all its responses together when
    it is stored, for each alone when it is scored.
    """
    from rmega.preferences.preprocess import PreprocessArgs, preprocess

    out = {}
    for name, file, count in (
        ("pairs", "messages.jsonl.gz", 50),
        ("ranked", "solutions.jsonl", 12),
    ):
        prefix = tmp_path_factory.mktemp("data") / name
        with (gzip.open if file.endswith(".gz") else open)(
            preference_files / file, "rt", encoding="utf-8"
        ) as lines:
            short = (line for line in lines if len(line) < (1200 if name == "pairs" else 2400))
            rows = [json.loads(line) for line in itertools.islice(short, count)]
        if name == "pairs":
            rows = [row | {"source": f"source {i % 3}"} for i, row in enumerate(rows)]
        write_lines(prefix.with_suffix(".jsonl"), rows)
        with contextlib.redirect_stdout(io.StringIO()):
            preprocess(
                PreprocessArgs(
                    input=(f"{prefix}.jsonl",),
                    tokenizer=str(small_llama),
                    output_prefix=str(prefix),
                    max_length=1024,
                )
            )
        assert not open_preferences(prefix).manifest["input"]["notes"]
        out[name] = prefix
    return out


def flags(model, data, run, **more) -> list[str]:
    return [
        *runs.flags(model, data["pairs"], run, **{"steps": STEPS, "tensorboard": "off", **more}),
        "--valid-data-path",
        str(data["pairs"]),
        f"gsm/8k={data['ranked']}",
    ]


@pytest.fixture(scope="module")
def single(data, small_llama, tmp_path_factory) -> tuple[Path, str]:
    """(run folder, what it printed) of one rank with probes at each of its three evaluations."""
    run = tmp_path_factory.mktemp("single") / "run"
    ((code, said),) = run_distributed(
        runs.train_and_say,
        1,
        flags(small_llama, data, run, eval_interval=2, save_interval=2, eval_probes="every"),
    )
    assert code == 0
    return run, said


def close(ours, theirs, tolerance: float, where: str = "") -> None:
    """Two JSON values are alike, numbers to ``tolerance``, absolute below 1 and relative above."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            close(ours[key], theirs[key], tolerance, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            close(a, b, tolerance, f"{where}[{i}]")
    elif isinstance(theirs, float) and not isinstance(ours, bool) and ours is not None:
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), where
    else:
        assert ours == theirs, where


def without_words(result: dict) -> dict:
    """A result without its sentences, whose digits may round either way; their levels stay."""
    return {**inverted(result), "findings": [[v["about"], v["level"]] for v in result["findings"]]}


def inverted(result: dict) -> dict:
    """A temperature is fitted as its inverse, whose lower bound may lie near 0: the inverse is
    compared."""
    inverse = {
        key: value and 1 / value
        for key, value in result["calibration"].items()
        if key in ("temperature", "low", "high")
    }
    return {**result, "calibration": result["calibration"] | inverse}


@pytest.mark.parametrize(
    "layout",
    [{"dp": 2}, {"tp": 2, "sp": True}, {"pp": 2, "num_layers_in_first_pipeline_stage": 3}],
    ids=["dp2", "tp2,sp", "pp2"],
)
def test_every_layout_evaluates_as_one_rank(layout, single, data, small_llama, tmp_path):
    argv = flags(
        small_llama, data, tmp_path / "run", load=single[0], **layout
    )  # trained already: it only evaluates
    assert run_distributed(runs.train, 2, argv) == [0, 0]
    ours, alone = files.read_evaluations(tmp_path / "run"), files.read_evaluations(single[0])
    assert ours.keys() == alone.keys() == {"pairs", "gsm/8k"}
    for name, steps in ours.items():
        assert list(steps) == [STEPS] and list(alone[name]) == [0, 2, STEPS]
        assert steps[STEPS]["prompt"]["blank_accuracy"] == 0.5
        close(without_words(steps[STEPS]), without_words(alone[name][STEPS]), 1e-5, name)


def test_it_says_what_the_tool_says_of_the_same_rows(single, data, tmp_path):
    """tools/evaluate.py reads the rows as text and scores them with the checkpoint on its own."""
    run, _ = single
    main(
        EvaluateArgs(
            model=str(run),
            data=[f"{data['pairs']}.jsonl", f"{data['ranked']}.jsonl"],
            json=str(tmp_path / "out.json"),
        )
    )
    theirs = json.loads((tmp_path / "out.json").read_text())["sets"]
    ours = files.read_evaluations(run)
    for mine, own in (("pairs", "pairs"), ("gsm/8k", "ranked")):
        evaluated, tool = inverted(ours[mine][STEPS]), inverted(theirs[own])
        assert evaluated.keys() == tool.keys() | {"reward_mean", "reward_std"}
        assert evaluated["length_unit"] == "tokens"
        assert (evaluated["schema"], evaluated["left_out"]) == (tool["schema"], tool["left_out"])
        for part in (
            "num_comparisons",
            "num_pairs",
            "num_ties",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "mean_margin",
            "chosen_score_mean",
            "calibration",
            "by_source",
            "by_margin",
            "ranked",
        ):
            close(evaluated[part], tool[part], 1e-4, part)
        assert evaluated["swap"].keys() == tool["swap"].keys()
        assert evaluated["prompt"].keys() == tool["prompt"].keys() | {"num_cut_prompts"}
        for part in ("num_comparisons", "blank_accuracy", "own_accuracy"):
            close(evaluated["prompt"][part], tool["prompt"][part], 1e-4, part)
    assert (
        len(ours["pairs"][STEPS]["by_source"]) == 3
        and ours["gsm/8k"][STEPS]["ranked"]["num_prompts"] > 5
    )


def test_it_says_what_the_export_does_in_transformers(single, data, tmp_path):
    from tests.training.test_train_cli import tool

    run, _ = single
    assert (
        tool(
            "convert_to_hf.py",
            "--load",
            str(run),
            "--output",
            str(tmp_path / "hf"),
            "--dtype",
            "float32",
        )
        == 0
    )
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    def score(texts) -> np.ndarray:
        with torch.no_grad():
            return np.array(
                [
                    float(model(torch.from_numpy(t.astype(np.int64))[None]).logits[0, 0])
                    for t in texts
                ]
            )

    dataset = open_preferences(data["pairs"])
    rows = [dataset.get(i) for i in range(len(dataset))]
    rewards = score([np.concatenate([c.prefix, s]) for c in rows for s in c.suffixes])
    want = evaluate(stored_items(dataset, rewards), length_unit="tokens")
    ours = files.read_evaluations(run)["pairs"][STEPS]
    for part in ("accuracy", "mean_margin", "calibration", "by_source", "length"):
        close(ours[part], to_json(want[part]), 1e-4, part)
    probed = pick(rows, NUM_PROBED)
    wrong, cut = wrong_prompts(probed, max_tokens=512)
    assert ours["prompt"]["num_cut_prompts"] == cut
    rewards = score([np.concatenate([c.prefix, s]) for c in wrong for s in c.suffixes])
    shuffled = evaluate(stored_items(View(probed), rewards), length_unit="tokens")
    assert ours["prompt"]["shuffled_accuracy"] == pytest.approx(shuffled["accuracy"], abs=1e-4)


def test_the_log_and_the_flat_list(single):
    """At the end a sentence per finding and set; the rows of metrics.jsonl keep their short
    list."""
    run, said = single
    lines = said.splitlines()
    last = files.read_evaluations(run)["pairs"][STEPS]
    for findings in last["findings"]:
        assert sum(line.endswith(f" pairs: {findings['text']}") for line in lines) == 1
    probes = [line for line in lines if line.startswith("[ok] ") and "reverse order" in line]
    assert len(probes) == 2  # of both sets, at the last evaluation alone
    after = lines[[i for i, line in enumerate(lines) if line.startswith("Iter(val) [4/4]")][0] + 1]
    assert after.startswith("[") and "pairs: The chosen response gets" in after
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    flat = next(
        row
        for row in rows
        if row["type"] == "eval" and row["step"] == STEPS and row["name"] == "pairs"
    )
    assert flat["accuracy"] == last["accuracy"] and flat["reward_std"] == last["reward_std"]
    assert "findings" not in flat and all(not isinstance(v, (dict, list)) for v in flat.values())
    assert math.isclose(flat["ece"], last["calibration"]["ece"])


def partial(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    """A run whose rewards depend on the place of a response in its pack."""
    import rmega.training.train as engine

    original = engine._rewards_of

    def rewards_of(batch, rewards, non_loss_data=True):
        numbers, values = original(batch, rewards, non_loss_data)
        return numbers, values - 1.0 * torch.arange(len(values))

    engine._rewards_of = rewards_of
    try:
        return runs.train_and_say(rank, world_size, argv)
    finally:
        engine._rewards_of = original


def test_a_run_that_depends_on_the_order_is_caught(data, small_llama, tmp_path):
    """The probe scores anew, through the packs of the training; "off" leaves it away, "last" keeps
    it for the end."""
    argv = flags(small_llama, data, tmp_path / "run", steps=2, eval_interval=1)
    ((_, said),) = run_distributed(partial, 1, argv)
    evaluated = files.read_evaluations(tmp_path / "run")["pairs"]
    assert (
        evaluated[2]["swap"]["changed_share"] > 0.2
        and evaluated[2]["prompt"]["blank_accuracy"] == 1
    )
    assert "[!!] pairs: Scored again with the responses in reverse order" in said
    assert (
        "changed_share" not in evaluated[0]["swap"] and "changed_share" not in evaluated[1]["swap"]
    )
    argv = flags(small_llama, data, tmp_path / "off", steps=1, eval_probes="off")
    assert run_distributed(runs.train, 1, argv) == [0]
    assert "changed_share" not in files.read_evaluations(tmp_path / "off")["pairs"][1]["swap"]


def test_after_a_resume(single, data, small_llama, tmp_path):
    """Evaluations of later steps are gone, those before stay; the last line tells both times, where
    it can."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(single[0], run)
    shutil.rmtree(run / "iter_0000004")
    (run / "latest_checkpointed_iteration.txt").write_text("2\n")
    before = {
        path: path.read_bytes() for path in (run / "evaluations").glob("*/step_000000[02].json")
    }
    for path in (run / "evaluations").glob("*/step_0000004.json"):
        path.rename(path.with_name("step_0000003.json"))  # of another interval
    info = run / "iter_0000002" / "rmega.json"
    noted_seconds = json.loads(info.read_text())["train_seconds"]
    assert 0 < noted_seconds < 60
    runs.edit_info(info.parent, train_seconds=4000.0)
    argv = flags(small_llama, data, run, eval_interval=2)
    ((code, said),) = run_distributed(runs.train_and_say, 1, argv)
    assert (
        code == 0
        and len(before) == 4
        and all(path.read_bytes() == text for path, text in before.items())
    )
    assert {path.name for path in (run / "evaluations").glob("*/*")} == {
        f"step_000000{n}.json" for n in (0, 2, 4)
    }
    done = said.splitlines()[-1]
    assert (
        done.startswith("done: 4 steps, 24 comparisons, 0:00:")
        and " since the resume at step 2, 1:06:" in done
    )
    assert (
        done.endswith(" in all")
        and json.loads((run / "iter_0000004" / "rmega.json").read_text())["train_seconds"] > 4000
    )
    assert " since " not in single[1].splitlines()[-1]
    # a checkpoint of a version that did not note the time, and whose last evaluation was lost
    metrics = run / "metrics.jsonl"
    metrics.write_text(
        "".join(
            f"{line}\n" for line in metrics.read_text().splitlines() if json.loads(line)["step"] < 4
        )
    )
    runs.edit_info(run / "iter_0000004", drop="train_seconds")
    ((_, said),) = run_distributed(runs.train_and_say, 1, argv)
    assert said.splitlines()[-1].endswith(" since the resume at step 4")


def test_a_disk_error_does_not_end_the_run(data, small_llama, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluations").write_text("in the way")
    ((code, said),) = run_distributed(runs.train_and_say, 1, flags(small_llama, data, run, steps=1))
    assert code == 0 and "done: 1 steps" in said and (run / "iter_0000001").is_dir()
    warnings = [
        line for line in said.splitlines() if line.startswith(f"warning: {run}/evaluations/")
    ]
    assert len(warnings) == 4 and all(line.endswith("; training continues") for line in warnings)


def test_the_page_of_a_run(single, tmp_path):
    pytest.importorskip("matplotlib")
    from rmega.report.training import write_run_report

    run, _ = single
    got = check(write_run_report(run, tmp_path / "page.html"))
    ours = files.read_evaluations(run)
    for name in ours:
        last = ours[name][STEPS]
        assert f"Held out: {name}" in got.text and f"{last['num_pairs']:,} pairs of" in got.text
        for findings in last["findings"]:
            assert findings["text"].replace(" %", "\u00a0%") in got.text
    for title in (
        "Is it as sure as it should be?",
        "Accuracy by which is the longer",
        "Length gap over the steps",
        "Calibration error over the steps",
        "Accuracy by source",
        "How these numbers are made",
    ):
        assert title in got.text, title
    graded = bool(ours["gsm/8k"][STEPS]["by_margin"])
    assert (
        "Accuracy by margin of the ratings" in got.text
    ) == graded and "best-of-N accuracy" in got.text
    assert got.ids.count("held-out-0") == got.ids.count("held-out-1") == 1
    first = (tmp_path / "page.html").read_bytes()
    assert write_run_report(run, tmp_path / "page.html").read_bytes() == first


def test_sections_of_odd_sets():
    """Nothing to evaluate, one evaluation, one side of the lengths empty, ratings: each has its
    section."""
    pytest.importorskip("matplotlib")
    from rmega.report import held_out

    def evaluated(lengths, scores=(1.0, 0.0), **more) -> dict:
        items = [
            ScoredComparison(
                rewards=np.array([i % 3, 1.0]),
                scores=np.array(scores),
                lengths=np.array(lengths),
                **more,
            )
            for i in range(9)
        ]
        return {
            **json.loads(json.dumps(to_json(evaluate(items, length_unit="tokens")))),
            "data": "d",
        }

    graded = evaluated((5, 9), scores=(4.0, 1.0), graded=True)
    text = held_out.sections(
        {
            "none": {0: evaluated((1, 2), scores=(1.0, 1.0))},
            "<b>": {0: graded, 5: graded},
            "one": {3: evaluated((7, 2))},
        },
        order=["one", "gone"],
    )
    assert (
        text.index("Held out: one")
        < text.index("Held out: none")
        < text.index("Held out: &lt;b&gt;")
    )
    assert (
        text.count("Accuracy by margin of the ratings") == 1
        and text.count("Calibration error over the steps") == 1
    )
    assert (
        "No pair to evaluate" in text and "Length gap over" not in text
    )  # the gap of one side is not known
    assert held_out.sections({}) == ""
