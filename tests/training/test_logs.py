"""Log lines, rows of metrics.jsonl, and what a resumed run does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tqdm import tqdm

from rmega.distributed import log
from rmega.training.logs import COLUMNS, MetricsLog, duration, memory_mb, train_line
from tests.conftest import ROOT

ROW = {
    "lr": 3.958e-7,
    "eta": "2:59:41",
    "time": 0.7083,
    "data_time": 0.0016,
    "memory": 18024,
    "loss": 0.62877,
    "acc": 0.5,
    "chosen_score_mean": -0.01,
    "rejected_score_mean": 0.25,
    "grad_norm": 1.5,
    "num_samples": 640,
    "num_tokens": 65536,
    "shared": 0.25,
    "fill": 0.999,
    "pairs/s": 6.4,
}


def test_the_line_has_the_form_that_readers_know() -> None:
    line = train_line(10, 15230, ROW)
    assert line.startswith(
        "Iter(train) [   10/15230]  lr: 3.9580e-07  eta: 2:59:41  time: 0.7083  data_time: 0.0016  "
        "memory: 18024  loss: 0.6288  acc: 0.5000  chosen_score_mean: -0.0100"
    )
    names = [part.split(":")[0] for part in line.split("]  ")[1].split("  ")]
    assert names == [name for name in COLUMNS if name != "tie_threshold"]  # of rao_kupper alone
    assert "  tie_threshold: 0.6932  " in train_line(10, 15230, {**ROW, "tie_threshold": 0.69315})
    assert "grad_norm" not in train_line(
        10, 15230, {**ROW, "grad_norm": None}
    )  # an overflow has none


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (-3, "0:00:00"),
        (59.6, "0:01:00"),
        (10781, "2:59:41"),
        (86400, "1 day, 0:00:00"),
        (2 * 86400 + 61, "2 days, 0:01:01"),
    ],
)
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_there_at_once(tmp_path) -> None:
    log = MetricsLog(str(tmp_path / "run"))
    log.row("train", 1, {"loss": 0.5})
    assert rows(tmp_path / "run") == [
        {"type": "train", "step": 1, "loss": 0.5}
    ]  # before close: a killed run keeps it
    log.row("eval", 1, {"name": "held out", "accuracy": 0.75})
    log.close()
    assert rows(tmp_path / "run")[1] == {
        "type": "eval",
        "step": 1,
        "name": "held out",
        "accuracy": 0.75,
    }


def test_a_resumed_run_writes_no_step_twice(tmp_path) -> None:
    log = MetricsLog(str(tmp_path))
    for step in range(1, 6):
        log.row("train", step, {"loss": 1 / step})
    log.close()
    (tmp_path / "metrics.jsonl").open("a").write("\n")
    log = MetricsLog(str(tmp_path), resumed_at=3)
    log.row("train", 4, {"loss": 9.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def test_a_line_that_was_cut_by_a_crash(tmp_path) -> None:
    """The last line may be half written when the machine goes down; what was whole stays."""
    (tmp_path / "metrics.jsonl").write_text('{"type": "train", "step": 1}\n{"type": "train", "st')
    MetricsLog(str(tmp_path), resumed_at=1).close()
    assert rows(tmp_path) == [{"type": "train", "step": 1}]


def test_a_run_from_scratch_starts_an_empty_file(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"type": "train", "step": 1}\n')
    MetricsLog(str(tmp_path)).close()
    assert rows(tmp_path) == []


def test_without_a_folder_and_on_other_ranks_nothing_is_written(tmp_path, monkeypatch) -> None:
    MetricsLog(None).row("train", 1, {"loss": 1.0})
    monkeypatch.setenv("RANK", "1")
    log = MetricsLog(str(tmp_path / "run"), tensorboard="on", wandb_project="x")
    log.row("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_missing_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--tensorboard on: .*rmega\[track\]"):
        MetricsLog(str(tmp_path), tensorboard="on")
    with pytest.raises(ValueError, match=r"--wandb-project: .*rmega\[track\]"):
        MetricsLog(str(tmp_path), wandb_project="x")


def test_tensorboard_is_on_where_it_is_installed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsLog(str(tmp_path), tensorboard="auto").close()
    assert "tensorboard: off, " in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="needs tensorboard (pip install 'rmega[track]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    MetricsLog(str(tmp_path / "none"), tensorboard="off").close()
    assert not (tmp_path / "none" / "tensorboard").exists()
    MetricsLog(None, tensorboard="auto").close()  # no folder: nothing to write to
    with pytest.raises(ValueError, match="--tensorboard needs --save"):
        MetricsLog(None, tensorboard="on")
    for resumed_at, steps in (
        (None, (1, 2, 3)),
        (2, (3, 4)),
    ):  # stopped after 3, gone on from the checkpoint of 2
        log = MetricsLog(str(tmp_path / "run"), resumed_at=resumed_at, tensorboard="auto")
        for step in steps:
            log.row("train", step, {"loss": step + (0.5 if resumed_at else 0.0), "eta": "0:00:01"})
        log.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.5),
        (4, 4.5),
    ]


def test_trackers_get_the_numbers(tmp_path, monkeypatch) -> None:
    calls = []
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder, purge_step: types.SimpleNamespace(
        add_scalar=lambda *a: calls.append(a), close=lambda: calls.append("closed")
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kw: (
        calls.append((kw["id"], kw["resume"]))
        or types.SimpleNamespace(
            id="abc",
            log=lambda numbers, step: calls.append((numbers, step)),
            finish=lambda: calls.append("finished"),
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(str(tmp_path), tensorboard="on", wandb_project="x")
    log.row("eval", 7, {"name": "hh", "accuracy": 0.5})
    log.close()
    assert calls == [
        (None, None),
        ("eval/hh/accuracy", 0.5, 7),
        ({"eval/hh/accuracy": 0.5}, 7),
        "closed",
        "finished",
    ]
    MetricsLog(str(tmp_path), resumed_at=7, wandb_project="x").close()
    assert calls[5:] == [("abc", "allow"), "finished"]  # the same run goes on
    MetricsLog(str(tmp_path), wandb_project="x").close()
    assert calls[7] == (None, None)  # from scratch: another run


def test_a_tracker_that_fails_ends_no_training(tmp_path, monkeypatch, capsys) -> None:
    """A full disk or a lost connection: said once, then without it; metrics.jsonl tries again with
    the next row."""

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder, purge_step: types.SimpleNamespace(
        add_scalar=fails, close=fails
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kw: types.SimpleNamespace(
        id="abc", log=lambda numbers, step: None, finish=fails
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(str(tmp_path), tensorboard="auto", wandb_project="x")
    file = log._file
    with monkeypatch.context() as patch:
        patch.setattr(
            log, "_file", types.SimpleNamespace(write=file.write, flush=fails, close=file.close)
        )
        log.row("train", 1, {"loss": 0.5})
    log.row("train", 2, {"loss": 0.25})
    log.close()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in said] == [
        "metrics.jsonl",
        "tensorboard",
        "wandb",
    ]
    assert all("No space left" in line for line in said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_at_the_end(tmp_path, capsys) -> None:
    log = MetricsLog(str(tmp_path))
    log._file.close()
    log._file = open("/dev/full", "w")
    log.row("train", 1, {"loss": 0.5})
    log.close()
    assert "its last rows are lost" in capsys.readouterr().out


def test_wandb_offline(tmp_path) -> None:
    """The real package, without a network: in a process of its own, because it starts a service."""
    pytest.importorskip("wandb", reason="needs wandb (pip install 'rmega[track]')")
    code = (
        "import sys\nfrom rmega.training.logs import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], wandb_project='rm', config={'lr': 1e-5})\n"
        "log.row('train', 1, {'loss': 0.625})\nlog.close()"
    )
    env = {
        **os.environ,
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(ROOT),
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [record] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stem == f"run-{(tmp_path / 'run' / 'wandb_run_id').read_text().strip()}"
    written = record.read_bytes()
    assert b"train/loss" in written and b"0.625" in written


def test_a_line_does_not_tear_a_progress_bar(capsys) -> None:
    """tqdm writes nothing where stderr is no terminal; on one the bar is cleared before a line."""
    with tqdm(total=10, disable=None) as bar:
        bar.update(5)
        log("line")
    assert capsys.readouterr() == ("line\n", "")
    with tqdm(total=10, leave=False) as bar:
        bar.update(5)
        capsys.readouterr()
        log("line")
        out, err = capsys.readouterr()
    assert out == "line\n" and err.startswith("\r ") and "5/10" in err
    assert memory_mb() > 10


def test_numbers_that_are_none_are_null_in_the_metrics(tmp_path) -> None:
    """NaN is no JSON: other readers than Python's would refuse the file."""
    metrics = MetricsLog(str(tmp_path))
    nan, inf = float("nan"), float("inf")
    metrics.row("train", 1, {"loss": nan, "by": {"a": [inf, 1.0, (nan,)]}, "n": 3, "no": None})
    metrics.close()

    def refuse(text: str):
        raise AssertionError(text)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["by"] == {"a": [None, 1.0, [None]]} and row["n"] == 3
