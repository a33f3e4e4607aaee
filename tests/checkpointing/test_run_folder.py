"""Which checkpoints a run keeps, which one it resumes from, and who may write to its folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from rmega.checkpointing import lock, run_folder
from rmega.checkpointing.find import damage, find
from rmega.io import fingerprint


def make(run: Path, *iterations: int) -> None:
    """Checkpoints as a run leaves them, with two small files each."""
    for i in iterations:
        folder = run_folder.iteration_dir(run, i)
        partial = folder.with_name(folder.name + ".partial")
        (partial / "hf").mkdir(parents=True)
        for name in (".metadata", "hf/config.json"):
            (partial / name).write_text(f"{name} of {i}")
        files = {name: fingerprint(partial / name) for name in (".metadata", "hf/config.json")}
        (partial / "rmega.json").write_text(
            run_folder.info_text({"format_version": 1, "iteration": i, "files": files})
        )
        run_folder.announce(run, i)
        run_folder.publish_checkpoint(partial, folder)


def spoil(run: Path, *iterations: int) -> None:
    for i in iterations:
        (run_folder.iteration_dir(run, i) / ".metadata").write_text(f".metadata_of {i}")


def names(run: Path) -> set[str]:
    return {p.name for p in run.glob("iter_*")}


def pruned(run: Path, keep_last: int, best: int | None = None) -> list[int]:
    """What a save of the newest iteration removes, as the saver calls it."""
    *others, newest = run_folder.list_iterations(run)
    folder = run_folder.iteration_dir(run, newest)
    hidden = run / "newest"
    os.replace(folder, hidden)  # the others are chosen before the newest is there
    chosen = run_folder.to_verify(run, keep_last, damaged=(), best=best)
    os.replace(hidden, folder)
    found = {i: damage(run_folder.iteration_dir(run, i)) for i in chosen}
    return run_folder.prune(
        run,
        keep_last,
        verified={newest, *found},
        damaged={i: problem for i, problem in found.items() if problem},
        best=best,
    )


def test_the_last_ones_and_the_best_are_kept(tmp_path) -> None:
    make(tmp_path, 2, 4, 6, 8)
    assert pruned(tmp_path, 2, best=2) == [4] and run_folder.list_iterations(tmp_path) == [2, 6, 8]
    assert pruned(tmp_path, 0) == [] and pruned(tmp_path, 5) == []


def test_a_damaged_checkpoint_does_not_count(tmp_path) -> None:
    """Nothing healthy is removed for it; once enough healthy ones are there, it goes first."""
    make(tmp_path, 2, 4, 6)
    spoil(tmp_path, 4)
    assert pruned(tmp_path, 2) == []
    make(tmp_path, 8)
    spoil(tmp_path, 2)  # older than those that count: removed with the rest
    removed = pruned(tmp_path, 2)
    assert sorted(removed) == [2, 4] and find(tmp_path) == tmp_path / "iter_0000008"
    make(tmp_path, 10)
    spoil(tmp_path, 8)
    assert pruned(tmp_path, 1, best=8)[0] == 8  # a damaged best one is not kept


def test_an_unverified_checkpoint_among_the_newest_stays(tmp_path) -> None:
    make(tmp_path, 2, 4, 6)
    assert run_folder.prune(tmp_path, 1, verified={4}, damaged={}) == [2]
    assert run_folder.list_iterations(tmp_path) == [4, 6]


def test_going_back_sets_newer_checkpoints_aside(tmp_path, capsys) -> None:
    make(tmp_path, 2, 4, 6, 8)
    (tmp_path / "metrics.jsonl").write_text("rows\n")
    line = run_folder.set_aside_newer(tmp_path, 4)
    assert "iter_0000006.abandoned, iter_0000008.abandoned" in line
    assert find(tmp_path) == tmp_path / "iter_0000004"
    assert "warning" not in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.abandoned").read_text() == "rows\n"
    assert run_folder.set_aside_newer(tmp_path, 4) is None
    make(tmp_path, 6)
    assert pruned(tmp_path, 1) == [2, 4]
    run_folder.set_aside_newer(tmp_path, 2)  # 6 again: both stay, under two names
    assert names(tmp_path) == {
        f"iter_000000{x}" for x in ("6.abandoned", "6.abandoned-2", "8.abandoned")
    }
    for name in names(tmp_path):  # to be read when they are named
        assert find(tmp_path / name) == tmp_path / name


def test_a_tracker_decides_what_belongs_to_the_run(tmp_path, capsys) -> None:
    """Going back that was cut short, or by hand as in Megatron-LM: the newer ones are left out
    with a warning."""
    make(tmp_path, 2, 4, 6)
    (tmp_path / run_folder.TRACKER).write_text("4\n")
    assert find(tmp_path) == tmp_path / "iter_0000004"
    said = capsys.readouterr().out
    assert (
        "warning: " in said
        and "names iteration 4: newer checkpoints are left out (iter_0000006)" in said
    )


def test_a_crash_between_folder_and_tracker_loses_nothing(tmp_path, capsys) -> None:
    make(tmp_path, 2, 4)
    (tmp_path / run_folder.TRACKER).write_text("2\n")
    (tmp_path / run_folder.NEXT).write_text("4\n")
    assert find(tmp_path) == tmp_path / "iter_0000004"
    assert "warning" not in capsys.readouterr().out


def test_a_tracker_that_names_a_missing_folder(tmp_path, capsys) -> None:
    """Never the trajectory that was left, silently."""
    make(tmp_path, 2, 6, 8)
    (tmp_path / run_folder.TRACKER).write_text("4\n")
    assert find(tmp_path) == tmp_path / "iter_0000002"
    assert (
        "names iteration 4, which is gone; an older checkpoint is taken" in capsys.readouterr().out
    )
    run_folder.remove_folder(tmp_path / "iter_0000002")
    with pytest.raises(
        ValueError,
        match="names iteration 4, which is gone, and only checkpoints .*iter_0000006, iter_0000008"
        ".*; name one: --load .*iter_0000008",
    ):
        find(tmp_path)
    for i in (6, 8):
        run_folder.remove_folder(run_folder.iteration_dir(tmp_path, i))
    with pytest.raises(ValueError, match="which is gone; remove that file to start"):
        find(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "hf/config.json", "rmega.json"])
def test_one_bit_of_any_file_is_noticed_outside_a_process_group(file, tmp_path) -> None:
    make(tmp_path, 2, 4)
    path = tmp_path / "iter_0000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damage(tmp_path / "iter_0000004")
    assert find(tmp_path) == tmp_path / "iter_0000002"


@pytest.mark.parametrize(
    "files",
    [
        [],
        "x",
        {"a": 1},
        {"a": ["b", 2]},
        {},
        {".metadata": [1, 2], "../up": [1, 2]},
        {".metadata": None},
    ],
)
def test_a_list_of_files_that_is_none(files, tmp_path) -> None:
    make(tmp_path, 2)
    info = tmp_path / "iter_0000002" / "rmega.json"
    info.write_text(run_folder.info_text({"format_version": 1, "files": files}))
    assert str(tmp_path) in damage(tmp_path / "iter_0000002")
    with pytest.raises(ValueError, match="no healthy checkpoint in it"):
        find(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"format_version": 1}' * 2, "[" * 100_000]
)
def test_an_info_file_that_is_none(text, tmp_path) -> None:
    make(tmp_path, 2)
    (tmp_path / "iter_0000002" / "rmega.json").write_text(text)
    with pytest.raises(ValueError, match="no healthy checkpoint in it"):
        find(tmp_path)


def test_a_checkpoint_without_its_info_file_is_damaged(tmp_path, capsys) -> None:
    make(tmp_path, 2, 4)
    (tmp_path / "iter_0000004" / "rmega.json").unlink()
    assert find(tmp_path) == tmp_path / "iter_0000002"
    assert "damaged checkpoint left out" in capsys.readouterr().out
    assert "iter_0000004.abandoned" in run_folder.set_aside_newer(tmp_path, 2)


def test_what_was_cut_short_is_cleaned_up(tmp_path) -> None:
    make(tmp_path, 2, 4)
    (tmp_path / "iter_0000006.partial").mkdir()
    (tmp_path / "iter_0000004").rename(tmp_path / "iter_0000004.old")  # between two renames
    (tmp_path / "iter_0000002.old").mkdir()
    (tmp_path / "iter_0000000.removing").mkdir()
    run_folder.clean(tmp_path)
    assert names(tmp_path) == {"iter_0000002", "iter_0000004"}


# The lock


def held(run: str, ready, seconds: float) -> None:
    one = lock.RunLock(run)
    one.acquire()
    ready.set()
    time.sleep(seconds)
    one.release()


def holder(run: Path, seconds: float) -> multiprocessing.Process:
    """A process that holds the lock of a run folder."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=held, args=(str(run), ready, seconds))
    process.start()
    assert ready.wait(60)
    return process


def test_a_second_run_is_told_who_holds_the_folder(tmp_path) -> None:
    other = holder(tmp_path, 60)
    try:
        begun = time.monotonic()
        with pytest.raises(
            ValueError, match=f"--save {tmp_path}: in use by another run .process {other.pid} on "
        ):
            lock.RunLock(tmp_path, patience=0.5).acquire()
        assert time.monotonic() - begun < 5
    finally:
        other.kill()
        other.join()
    begun = time.monotonic()
    lock.RunLock(tmp_path, patience=5).acquire()  # the kernel knows that it is gone
    assert time.monotonic() - begun < 2


def test_a_second_run_waits_for_the_first_to_end(tmp_path, capsys) -> None:
    other = holder(tmp_path / "run", 2)
    second = lock.RunLock(tmp_path / "run", patience=30)
    assert second.acquire(0.1) is False and second.acquire()
    other.join()
    assert capsys.readouterr().out.count("waiting for another run in") == 1
    second.release()
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_suspended_process_keeps_its_lock(tmp_path) -> None:
    other = holder(tmp_path, 60)
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="in use by another run"):
        lock.RunLock(tmp_path, patience=0.5).acquire()
    other.kill()
    other.join()


@pytest.mark.parametrize("supported", [True, False])
def test_a_lock_of_another_machine_is_stale_when_nobody_renews_it(
    supported, tmp_path, monkeypatch
) -> None:
    """Where the kernel's lock does not reach other machines, or there is none."""
    monkeypatch.setattr(lock, "STALE", 1.0)
    if not supported:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "x")))
    entry = {"host": "elsewhere", "pid": 1, "start": "5", "since": "2026-01-01", "slurm_job": "77"}
    (tmp_path / lock.NAME).write_text(json.dumps(entry))
    begun = time.monotonic()
    with pytest.raises(ValueError, match="process 1 on elsewhere, since 2026-01-01, Slurm job 77"):
        lock.RunLock(tmp_path, patience=0.3).acquire()
    one = lock.RunLock(tmp_path, patience=10)
    assert one.acquire() and time.monotonic() - begun >= 1
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    if not supported:  # a second one of this machine goes by the process
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
            lock.RunLock(tmp_path, patience=0.3).acquire()
    one.release()


def test_a_lock_that_is_renewed_holds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "STALE", 1.0)
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    one = lock.RunLock(tmp_path, patience=3)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="on elsewhere"):
        while True:
            os.utime(path)
            one.acquire(0.3)
    assert time.monotonic() - begun >= 2.9


def test_a_folder_that_nobody_used_goes_again(tmp_path) -> None:
    one = lock.RunLock(tmp_path / "a" / "b")
    one.acquire()
    one.release()
    assert not (tmp_path / "a").exists()
    one = lock.RunLock(tmp_path / "a" / "b")
    one.acquire()
    (tmp_path / "a" / "b" / "config.json").touch()
    one.release()
    assert names(tmp_path / "a") == set() and (tmp_path / "a" / "b" / "config.json").exists()
