"""Which checkpoint to read: the newest healthy one of a run, or the one named.

Health is what ``rmega.json`` records of every other file: its size and crc32. zlib computes that at
several GB/s, so every reader checks it.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from rmega.checkpointing.run_folder import (
    ABANDONED,
    INFO,
    TRACKER,
    iteration_dir,
    iteration_of,
    latest_iteration,
    list_folders,
    list_iterations,
    read_info,
    tracked_iteration,
)
from rmega.distributed import first_problem, from_rank_0, log, own_share
from rmega.hub import export_damage
from rmega.io import fingerprint


def damage(folder: Path | str, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, or None: files that are missing, truncated or
    changed, a folder of another program or format version.

    Reads every file. ``share`` (i, n) reads each n-th one, for n ranks.
    """
    folder = Path(folder)
    try:
        files = read_info(folder).get("files")
    except ValueError as error:
        return str(error)
    if files is None:
        return None  # written by a version without checksums
    try:
        recorded = [(str(name), int(size), int(crc)) for name, (size, crc) in files.items()]
    except (AttributeError, TypeError, ValueError):
        return f"{folder / INFO}: its list of files cannot be read"
    if ".metadata" not in files:
        return f"{folder / INFO}: its list of files is not complete"
    for name, size, crc in recorded[share[0] :: share[1]]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{folder / INFO}: {name} is not a file of this folder"
        try:
            actual = fingerprint(folder / name)
        except (OSError, ValueError) as error:
            return f"{folder / name}: {getattr(error, 'strerror', None) or error}"
        if actual[0] != size:
            return f"{folder / name}: {actual[0]:,} bytes instead of {size:,}"
        if actual[1] != crc:
            return f"{folder / name}: its content has changed (checksum)"
    return None


def _damage_together(folder: Path) -> str | None:
    """``damage`` with the files divided among the ranks; every rank gets the first answer."""
    return first_problem(damage(folder, share=own_share()))


def check_exports(flag: str, *folders: Path | None) -> None:
    """ValueError where a model folder is an export that has changed since it was written. The ranks
    of a process group, all of which call it, share the reading."""
    for folder in filter(None, folders):
        if problem := first_problem(export_damage(folder, share=own_share())):
            raise ValueError(f"{flag} {problem}")


def find(load_dir: Path | str, flag: str = "--load", purpose: str = "resuming from") -> Path | None:
    """The newest healthy checkpoint of a run folder, or the checkpoint folder itself; None where a
    run has none yet.

    Called by every rank; in a process group the ranks divide the files among them. A damaged
    newest checkpoint is reported and the one before it taken; the line that names the one of a run
    begins with ``purpose``. Checkpoints that a run left by going back to an older one (newer than
    the tracker's) are never taken. Raises ValueError where nothing healthy is left, where the
    folder belongs to another program, and where a damaged checkpoint was itself named.
    """
    path = Path(load_dir)
    if from_rank_0(lambda: _is_checkpoint(path)):
        if (problem := _damage_together(path)) is None:
            return path
        other = _newest_healthy(path.parent, but=iteration_of(path))
        raise ValueError(
            f"{flag} {path}: damaged ({problem}); "
            + (
                f"the newest healthy checkpoint is {other}"
                if other
                else "there is no other healthy one"
            )
        )
    tracked, folders, finished = from_rank_0(
        lambda: (tracked_iteration(path), list_folders(path), list_iterations(path))
    )
    if folders and not finished:
        raise ValueError(
            f"{flag} {path}: holds checkpoints of another program (no {INFO} in"
            f" {iteration_dir(path, folders[0])})"
        )
    candidates, left = _split(path, flag, tracked, folders)
    problems = []
    for iteration in candidates:
        folder = iteration_dir(path, iteration)
        if problem := _damage_together(folder):
            problems.append(problem)
            continue
        for problem in problems:
            log(f"warning: damaged checkpoint left out: {problem}")
        if left:
            log(
                f"warning: {path / TRACKER} names iteration {tracked}: newer checkpoints are left"
                f" out ({', '.join(left)})"
            )
        log(f"{purpose} {folder}")
        return folder
    if problems:
        raise ValueError(f"{flag} {path}: no healthy checkpoint in it ({'; '.join(problems)})")
    return None


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint itself (of any health) and not the folder of a run."""
    name = path.name.partition(ABANDONED)[0]
    return (path / INFO).is_file() or (iteration_of(name) is not None and path.is_dir())


def _split(
    path: Path, flag: str, tracked: int | None, folders: list[int]
) -> tuple[list[int], list[str]]:
    """(iterations to try, newest first; names of the newer ones that the run has left). Reports a
    tracker that names a folder which is gone."""
    if tracked is None:
        if folders and from_rank_0((path / TRACKER).is_file):
            log(f"warning: {path / TRACKER} cannot be read: the newest checkpoint is taken")
        return folders[::-1], []
    candidates = [i for i in reversed(folders) if i <= tracked]
    left = [iteration_dir(path, i).name for i in folders if i > tracked]
    if tracked not in folders:
        where = f"{path / TRACKER} names iteration {tracked}, which is gone"
        if left and not candidates:
            raise ValueError(
                f"{flag} {path}: {where}, and only checkpoints are left that the run had turned"
                f" away from ({', '.join(left)}); name one: {flag} {path / left[-1]}"
            )
        if not candidates:
            raise ValueError(
                f"{flag} {path}: {where}; remove that file to start from the beginning"
            )
        log(f"warning: {where}; an older checkpoint is taken")
    return candidates, left


def _newest_healthy(run: Path, but: int | None) -> Path | None:
    for iteration in reversed(from_rank_0(lambda: list_iterations(run))):
        if iteration != but and _damage_together(iteration_dir(run, iteration)) is None:
            return iteration_dir(run, iteration)
    return None


def find_checkpoint(run: Path, iteration: str, flag: str = "--load ") -> Path:
    """The folder of one checkpoint of a run: ``latest``, ``best`` or a number; ``run`` may be that
    folder itself. Errors name it after ``flag``."""
    if (run / INFO).is_file():
        if iteration != "latest":
            raise ValueError(
                f"--iteration {iteration}: {run} is a single checkpoint; give --load the run folder"
            )
        return run
    if not run.is_dir():
        raise ValueError(f"{flag}{run}: no such folder")
    iterations, latest = list_iterations(run), latest_iteration(run)
    if not iterations:
        raise ValueError(f"{flag}{run}: no checkpoint in it (folders iter_NNNNNNN with {INFO})")
    if latest is None and not iteration.isdigit():
        raise ValueError(
            f"{flag}{run}: {TRACKER} names iteration {tracked_iteration(run)}, which is gone, and"
            f" only newer checkpoints are there, which the run has left; name one with --iteration"
            f" ({', '.join(map(str, iterations))})"
        )
    if iteration == "latest":
        return iteration_dir(run, latest)
    if iteration == "best":
        best = read_info(iteration_dir(run, latest)).get("best")
        if not best:
            raise ValueError(
                f"--iteration best: {run} was trained without a held-out set (--valid-data-path)"
            )
        if best[1] not in iterations:
            raise ValueError(
                f"--iteration best: the best evaluation was at step {best[1]}, where no checkpoint"
                f" was kept (there are {', '.join(map(str, iterations))}); save at each evaluation"
                " to have it"
            )
        return iteration_dir(run, best[1])
    if not iteration.isdigit() or int(iteration) not in iterations:
        raise ValueError(
            f"--iteration {iteration}: not among the checkpoints of {run}"
            f" ({', '.join(map(str, iterations))})"
        )
    return iteration_dir(run, int(iteration))
