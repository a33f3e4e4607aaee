"""The run folder: names, tracker, abandoned trajectories, pruning.

RUN/iter_0000010               a finished checkpoint of the run's trajectory
RUN/iter_0000010.partial       one that is being written, or whose writing was cut short
RUN/iter_0000010.abandoned     one of a trajectory that the run left by resuming from an older one
RUN/latest_checkpointed_iteration.txt    the tracker: iteration of the newest finished checkpoint

A checkpoint is published in three steps: ``TRACKER.next`` announces it, the folder gets its name,
``TRACKER.next`` becomes the tracker. A folder newer than the tracker that ``TRACKER.next`` does not
announce is therefore no result of a crash: somebody went back, and it is not resumed from.

Nothing here knows what a checkpoint holds; ``rmega.checkpointing.checkpoint`` does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rmega.distributed import from_rank_0, gather, rank, spans_machines
from rmega.io import (
    free_name,
    json_checksum,
    one_line,
    publish,
    remove_folder,
    sync_folder,
    write_durably,
)

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
NEXT = f"{TRACKER}.next"
INFO = "rmega.json"
ABANDONED = ".abandoned"


def iteration_dir(run: Path | str, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return Path(run) / f"iter_{iteration:07d}"


def iteration_of(folder: Path | str) -> int | None:
    """The iteration that a folder's name gives; None for any other name, ``.partial`` and
    ``.abandoned`` included."""
    prefix, _, digits = Path(folder).name.partition("iter_")
    return int(digits) if not prefix and digits.isascii() and digits.isdigit() else None


def list_folders(run: Path | str) -> list[int]:
    """Iterations that have a folder, oldest first, whatever is in it."""
    return sorted(
        iteration
        for folder in Path(run).glob("iter_*")
        if (iteration := iteration_of(folder)) is not None and folder.is_dir()
    )


def list_iterations(run: Path | str) -> list[int]:
    """Iterations with a finished checkpoint folder, oldest first."""
    return [i for i in list_folders(run) if (iteration_dir(run, i) / INFO).is_file()]


def info_text(info: Mapping[str, Any]) -> str:
    """The text of ``rmega.json``, with a checksum of everything else in it."""
    rest = {key: value for key, value in info.items() if key != "checksum"}
    return json.dumps({**rest, "checksum": json_checksum(rest)}, ensure_ascii=False, indent=1)


def read_info(folder: Path | str) -> dict[str, Any]:
    """``rmega.json`` of a checkpoint. ValueError says what is wrong with a folder that has none of
    ours, or a damaged one."""
    path = Path(folder) / INFO
    if not path.is_file():
        raise ValueError(f"{folder}: not an rmega checkpoint ({INFO} is missing)")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format version {version}; this rmega reads version"
            f" {FORMAT_VERSION}"
        )
    recorded = info.pop("checksum", None)
    # Checkpoints of earlier versions have neither.
    if (recorded is not None or "rmega" in info) and recorded != json_checksum(info):
        raise ValueError(f"{path}: its content has changed (checksum)")
    return info


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def tracked_iteration(run: Path | str) -> int | None:
    """The iteration that the tracker names, or the newer one that was being published when a run
    ended; None where there is no readable tracker. The folder may be gone."""
    tracked, announced = (_read_number(Path(run) / name) for name in (TRACKER, NEXT))
    if (
        announced is not None
        and (tracked is None or announced > tracked)
        and (iteration_dir(run, announced) / INFO).is_file()
    ):
        return announced
    return tracked


def latest_iteration(run: Path | str) -> int | None:
    """The newest finished checkpoint of the run's trajectory, whatever its health: none newer than
    the tracker's. None where there is none."""
    tracked, iterations = tracked_iteration(run), list_iterations(run)
    if tracked is not None:
        iterations = [i for i in iterations if i <= tracked]
    return iterations[-1] if iterations else None


def announce(run: Path | str, iteration: int) -> None:
    """First step of publishing a checkpoint: from here on its folder counts as soon as it has its
    name."""
    write_durably(Path(run) / NEXT, f"{iteration}\n")


def publish_checkpoint(partial: Path, final: Path) -> None:
    """The remaining steps, for a folder whose files are durable and that was announced."""
    publish(partial, final)
    os.replace(final.parent / NEXT, final.parent / TRACKER)
    sync_folder(final.parent)


def withdraw(run: Path | str) -> None:
    """Take back what ``announce`` wrote, after a checkpoint could not be written."""
    Path(run, NEXT).unlink(missing_ok=True)


def set_aside_newer(run: Path | str, iteration: int) -> str | None:
    """Make ``iteration`` the newest checkpoint of a run that is about to train from it; the line
    for the log where that sets others aside.

    Newer checkpoints are renamed to ``iter_N.abandoned``, with a copy of the metrics up to then:
    nothing removes them, and nothing resumes from them unless they are named. Called by one
    process, which holds the run's lock.
    """
    run = Path(run)
    newer = [i for i in list_folders(run) if i > iteration]
    if not newer:
        return None
    # First, because a crash between the renames must not lead back to a newer one.
    write_durably(run / TRACKER, f"{iteration}\n")
    withdraw(run)
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, free_name(run / f"metrics.jsonl{ABANDONED}"))
    names = []
    for i in reversed(newer):
        folder = iteration_dir(run, i)
        aside = free_name(folder.with_name(folder.name + ABANDONED))
        os.replace(folder, aside)
        names.insert(0, aside.name)
    sync_folder(run)
    return (
        f"set aside in {run}: {', '.join(names)} (newer than iteration {iteration}, from which this"
        " run continues; remove them when they are no longer needed)"
    )


def clean(run: Path | str) -> None:
    """Remove what a save or a removal that was cut short has left behind. Called by one process,
    which holds the run's lock."""
    run = Path(run)
    for folder in run.glob("iter_*.old"):
        whole = folder.with_suffix("")
        if not whole.exists():
            os.replace(folder, whole)  # cut short between two renames
    for ending in ("partial", "old", "removing"):
        for folder in run.glob(f"iter_*.{ending}"):
            shutil.rmtree(folder, ignore_errors=True)


def prune(
    run: Path | str,
    keep_last: int,
    *,
    verified: Collection[int],
    damaged: Mapping[int, str],
    best: int | None = None,
) -> list[int]:
    """Remove old checkpoints once ``keep_last`` newer ones are known to be healthy; the iterations
    that were removed.

    Only ``verified`` iterations count, so that a damaged checkpoint never takes the place of a
    healthy one; ``damaged`` ones go first. ``best`` stays unless it is damaged, and so does a newer
    checkpoint whose health is not known. Called by one process, which holds the run's lock.
    """
    present = list_iterations(run)
    kept = [i for i in present if i in verified and i not in damaged][-keep_last:]
    if keep_last < 1 or len(kept) < keep_last:
        return []
    doomed = [i for i in present if i in damaged]
    doomed += [i for i in present if i < kept[0] and i not in damaged and i != best]
    for i in doomed:
        remove_folder(iteration_dir(run, i))
    return doomed


def to_verify(
    run: Path | str, keep_last: int, *, damaged: Collection[int], best: int | None = None
) -> list[int]:
    """The checkpoints whose health decides what ``prune`` may remove when the next one has been
    written; none where it will remove nothing. ``damaged``: those that are known to be."""
    present = [i for i in list_iterations(run) if i not in damaged]
    if keep_last < 1 or len(present) < keep_last:
        return []
    return sorted({*present[len(present) - keep_last + 1 :], *({best} & {*present})})


def check_shared(run: Path | str, patience: float = 30.0) -> None:
    """ValueError on every rank where ranks on other machines do not see the folder that rank 0
    makes. Waits up to ``patience`` seconds for a network file system to show it."""
    if not spans_machines():
        return
    mark = Path(run, from_rank_0(lambda: f".seen-by-all-{uuid.uuid4().hex}"))
    if rank() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    end = time.monotonic() + patience

    def is_seen() -> bool:  # by the listing: some network file systems cache that a file is absent
        return mark.parent.is_dir() and mark.name in os.listdir(mark.parent)

    while not (seen := is_seen()) and time.monotonic() < end:
        time.sleep(0.2)
    without = gather(None if seen else f"rank {rank()} on {socket.gethostname()}")
    if rank() == 0:
        mark.unlink()
    if any(without):
        raise ValueError(
            f"--save {run}: {', '.join(filter(None, without))} cannot see there what rank 0 on"
            " another machine wrote; it must be on storage that all machines share"
        )
