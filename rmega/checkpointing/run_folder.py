"""The folders of a run: their names, which checkpoints are whole, and which one to go on from.

Nothing here knows what a checkpoint holds; ``rmega.checkpointing.checkpoint`` does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rmega.distributed import log, rank, spans_machines, world_size
from rmega.io import fingerprint

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
INFO = "rmega.json"


def iteration_dir(run: Path | str, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return Path(run) / f"iter_{iteration:07d}"


def list_iterations(run: Path | str) -> list[int]:
    """Iterations with a complete checkpoint folder, oldest first."""
    found = []
    for folder in Path(run).glob("iter_*"):
        digits = folder.name.removeprefix("iter_")
        if digits.isdigit() and (folder / INFO).is_file():
            found.append(int(digits))
    return sorted(found)


def latest_iteration(run: Path | str) -> int | None:
    """The newest checkpoint that was finished: the tracker's, or the newest whole folder where the
    tracker is gone."""
    tracker = Path(run) / TRACKER
    if tracker.is_file() and (text := tracker.read_text().strip()).isdigit():
        if (iteration_dir(run, int(text)) / INFO).is_file():
            return int(text)
    iterations = list_iterations(run)
    return iterations[-1] if iterations else None


def check_shared(run: Path | str, patience: float = 30.0) -> None:
    """ValueError on every rank where ranks on other machines do not see the folder that rank 0
    makes. Waits up to ``patience`` seconds for a network file system to show it."""
    if not spans_machines():
        return
    mark: list[str | None] = [None]
    if rank() == 0:
        mark[0] = f".seen-by-all-{uuid.uuid4().hex}"
        Path(run).mkdir(parents=True, exist_ok=True)
        Path(run, mark[0]).touch()
    dist.broadcast_object_list(mark, src=0)
    end = time.monotonic() + patience
    while (
        not (seen := mark[0] in (os.listdir(run) if os.path.isdir(run) else ()))
        and time.monotonic() < end
    ):
        time.sleep(0.2)
    without: list[str | None] = [None] * world_size()
    dist.all_gather_object(without, None if seen else f"rank {rank()} on {socket.gethostname()}")
    if rank() == 0:
        Path(run, mark[0]).unlink()
    if any(without):
        raise ValueError(
            f"--save {run}: {', '.join(filter(None, without))} cannot see there what rank 0 on"
            " another machine wrote; it must be on storage that all machines share"
        )


def read_info(folder: Path | str) -> dict[str, Any]:
    """``rmega.json`` of a checkpoint. ValueError names what is wrong with a folder that is not one
    of ours."""
    path = Path(folder) / INFO
    if not path.is_file():
        raise ValueError(f"{folder}: not an rmega checkpoint ({INFO} is missing)")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken ({error})") from None
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format version {version}; this rmega reads version"
            f" {FORMAT_VERSION}"
        )
    return info


def prune(run: Path | str, keep_last: int, best: int | None = None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints; ``best`` stays. Called by every rank;
    rank 0 acts."""
    if rank() == 0 and keep_last > 0:
        for iteration in list_iterations(run)[:-keep_last]:
            if iteration != best:
                shutil.rmtree(iteration_dir(run, iteration), ignore_errors=True)
    dist.barrier()


def damage(
    folder: Path | str, *, share: tuple[int, int] = (0, 1), checksums: bool = True
) -> str | None:
    """What is wrong with a checkpoint folder, or None: missing, truncated or changed files,
    foreign, other version.

    Reads every file for its checksum, or only looks at sizes. ``share`` (i, n) reads each n-th
    file, for n ranks.
    """
    folder = Path(folder)
    try:
        files = read_info(folder).get("files", {})
    except ValueError as error:
        return str(error)
    for name, (size, crc) in list(files.items())[share[0] :: share[1]]:
        try:
            found = (
                fingerprint(folder / name) if checksums else [(folder / name).stat().st_size, crc]
            )
        except OSError as error:
            return f"{folder / name}: {error.strerror or error}"
        if found[0] != size:
            return f"{folder / name}: {found[0]:,} bytes instead of {size:,}"
        if found[1] != crc:
            return f"{folder / name}: its content has changed (checksum)"
    return None


def _damage_together(folder: Path) -> str | None:
    """``damage`` with the files shared out over the ranks; every rank gets the first answer."""
    if not dist.is_initialized():
        return damage(folder, checksums=False)
    answers: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, damage(folder, share=(rank(), dist.get_world_size())))
    return next((answer for answer in answers if answer), None)


def find(load_dir: Path | str, flag: str = "--load", purpose: str = "going on from") -> Path | None:
    """The newest good checkpoint of a run folder, or the checkpoint folder itself; None where a run
    has none yet.

    Called by every rank. In a process group checksums are read, outside only sizes are looked at. A
    damaged newest checkpoint is said and the one before it taken; the line that names the one of a
    run begins with ``purpose``. Raises ValueError where all are damaged, where the folder belongs
    to another program, and where a damaged checkpoint was named itself (then the newest good one is
    offered).
    """
    path = Path(load_dir)
    folders: list[Any] = [None]
    if rank() == 0:
        folders = [_candidates(path)]
    if dist.is_initialized():
        dist.broadcast_object_list(folders, src=0)
    elif folders[0] is None:
        folders = [_candidates(path)]
    named, candidates = folders[0]
    foreign = [] if named or candidates else [f for f in path.glob("iter_*") if not f.suffix]
    if foreign:
        raise ValueError(
            f"{flag} {path}: holds checkpoints of another program (no {INFO} in {foreign[0]})"
        )
    problems = []
    for number in candidates:
        folder = path if named else iteration_dir(path, number)
        problem = _damage_together(folder)
        if problem is None:
            for said in problems:
                log(f"warning: damaged checkpoint left out: {said}")
            if not named:
                log(f"{purpose} {folder}")
            return folder
        problems.append(problem)
        if named:
            good = _newest_good(path.parent, but=number)
            raise ValueError(
                f"{flag} {path}: damaged ({problem})"
                + (
                    f"; the newest good checkpoint is {good}"
                    if good
                    else "; there is no other good one"
                )
            )
    if problems:
        raise ValueError(f"{flag} {path}: no good checkpoint in it ({'; '.join(problems)})")
    return None


def _candidates(path: Path) -> tuple[bool, list[int]]:
    """(whether ``path`` is itself a checkpoint, iterations to try, newest first and none newer than
    the tracker's)."""
    digits = path.name.removeprefix("iter_")
    if (path / INFO).is_file() or (path.name != digits and digits.isdigit() and path.is_dir()):
        return True, [int(digits) if digits.isdigit() else -1]
    newest = latest_iteration(path)
    return False, (
        [] if newest is None else [i for i in reversed(list_iterations(path)) if i <= newest]
    )


def _newest_good(run: Path, but: int) -> Path | None:
    for iteration in reversed(list_iterations(run)):
        if iteration != but and _damage_together(iteration_dir(run, iteration)) is None:
            return iteration_dir(run, iteration)
    return None


def clean(run: Path | str) -> None:
    """Remove what a save that was cut short has left behind. Called by every rank; rank 0 acts."""
    if rank() == 0:
        for ending in ("partial", "old"):
            for folder in Path(run).glob(f"iter_*.{ending}"):
                whole = folder.with_suffix("")
                if ending == "old" and not whole.exists():
                    os.replace(folder, whole)  # cut short between two renames
                else:
                    shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
