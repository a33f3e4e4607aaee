"""Random walks of a run folder: save, crash, damage, go back, resume, prune, two runs at once.

    python -m tests.fuzz.run_folders --count 200 --seed 0

Each walk is a run of a stand-in for the model: two numbers that depend on every step taken, stored
and read as a checkpoint's tensors are. The lock, ``find``, the saver and ``prune`` are rmega's own.
A step of a walk is a process of its own, which can end at any operation on a file; on a power cut
also what was not yet durable (files without fsync, names whose folder was not synced) is lost.

After each step, the newest healthy state of the trajectory must be there and ``find`` must return
it, with the numbers that its steps give; so must as many older ones as ``--keep-last`` promises,
the best one, and every checkpoint that was set aside.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

STEPS_PER_WALK = (6, 14)


def advance(token: str, step: int, salt: int) -> str:
    """The numbers of a run after one more step: they tell every history from every other."""
    return hashlib.sha256(f"{token} {step} {salt}".encode()).hexdigest()[:12]


# ---- a session: what a training does with its run folder, in a process of its own


class Failing:
    """Ends this process at its n-th operation on a file of the run folder. ``power``: what is not
    durable at that moment is lost."""

    def __init__(self, run: Path, at: int, power: bool, seed: int) -> None:
        self.run, self.at, self.power = str(run), at, power
        self.rng = random.Random(seed)
        self.count = 0
        self.unsynced: set[str] = set()
        self.renames: list[tuple[str, str, bytes | None]] = []
        self.lock = threading.RLock()
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self.operation("fsync", (descriptor,))
            fsync(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.unsynced.discard(path)
            self.renames = [r for r in self.renames if os.path.dirname(r[1]) != path]

        os.fsync = synced
        sys.addaudithook(self.operation)

    def operation(self, event: str, args: tuple) -> None:
        if event not in ("open", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event != "fsync" and not self.concerns(args):
            return
        with self.lock:
            self.count += 1
            if self.count == self.at:
                if self.power:
                    self.lose()
                os._exit(9)
            if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                if not str(args[0]).endswith("run.lock"):
                    self.unsynced.add(str(args[0]))
            if event == "os.rename":
                source, target = str(args[0]), str(args[1])
                kept = None
                if os.path.isfile(target):
                    with open(os.open(target, os.O_RDONLY), "rb") as file:
                        kept = file.read()
                self.renames.append((source, target, kept))
                self.unsynced = {
                    target + path[len(source) :] if path.startswith(source) else path
                    for path in self.unsynced
                }

    def concerns(self, args: tuple) -> bool:
        """Paths of the run folder, and names in a folder that is open (shutil.rmtree)."""
        inside = isinstance(args[-1], int) and args[-1] >= 0 and isinstance(args[0], str)
        return any(isinstance(a, str | os.PathLike) and self.run in str(a) for a in args[:2]) or (
            inside and "/" not in args[0]
        )

    def lose(self) -> None:
        """What a power cut takes: the ends of files, and the last renames."""
        self.at = -1
        for path in self.unsynced:
            if os.path.isfile(path) and self.rng.random() < 0.7:
                os.truncate(path, self.rng.randint(0, os.path.getsize(path)))
        for source, target, kept in reversed(
            self.renames[self.rng.randint(0, len(self.renames)) :]
        ):
            if not os.path.exists(target) or os.path.exists(source):
                break
            os.rename(target, source)
            if kept is not None:
                Path(target).write_bytes(kept)


def session(run: Path, spec: dict[str, Any], report: Callable[..., None]) -> None:
    """Lock, find, resume, save as told. Reports what happens as it happens."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from rmega import distributed
    from rmega.checkpointing import lock, run_folder
    from rmega.checkpointing.checkpoint import RunState, Saver
    from rmega.checkpointing.find import find

    class Model:
        chained_optimizers = ()

        def content(self, token: str = "") -> dict[str, Any]:
            numbers = torch.tensor([int(token[i : i + 6] or "0", 16) for i in (0, 6)])
            return {"model": {"w": ShardedTensor.from_rank_offsets("w", numbers)}}

    class StandIn(Saver):
        def _content(self, state, wrapped, optimizer, scheduler):
            return wrapped.content(spec["token"])

    distributed.initialize()
    with lock.hold(run, spec["patience"]), contextlib.ExitStack() as stack:
        report("locked")
        stack.callback(report, "ending")
        run_folder.clean(run)
        found = find(spec["load"])
        iteration, token = 0, ""
        if found is not None:
            info = run_folder.read_info(found)
            iteration, spec["best"] = info["iteration"], info["best"]
            loaded = dist_checkpointing.load(Model().content(), str(found))
            (numbers,) = loaded["model"].values()
            token = "".join(f"{n:06x}" for n in numbers.tolist())
        report("found", iteration, token)
        if found is not None:
            run_folder.set_aside_newer(run, iteration)
        report("started", iteration, token)
        saver = StandIn(run, Model(), keep_last=spec["keep_last"])
        for due in spec["saves"]:
            iteration += 1
            token = advance(token, iteration, spec["salt"])
            if not due:
                continue
            spec["token"] = token
            best = iteration if due == "best" else spec["best"]
            spec["best"] = best
            report("saving", iteration, token, best)
            saver.start(
                state=RunState(iteration),
                wrapped=Model(),
                optimizer=None,
                scheduler=None,
                info={"token": token, "best": best},
                best=best,
            )
            saver.wait()
            report("saved", iteration, token)
            time.sleep(spec["pause"])


def fork(run: Path, spec: dict[str, Any]) -> tuple[int, Path]:
    """Start a session; (process, the file that it reports to)."""
    reports = Path(tempfile.mkstemp(prefix="reports", dir=run.parent)[1])
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process, reports
    code = 1
    try:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        descriptor = os.open(reports, os.O_WRONLY | os.O_APPEND)

        def report(*what: Any) -> None:
            os.write(descriptor, (json.dumps([time.monotonic(), *what]) + "\n").encode())

        if spec["crash_at"]:
            Failing(run, spec["crash_at"], spec["power"], spec["salt"])
        with redirect_stdout(io.StringIO()):
            try:
                session(run, spec, report)
                code = 0
            except ValueError as error:
                report("refused", str(error))
                code = 2
    except BaseException as error:
        import traceback

        report("failed", traceback.format_exc(), repr(error))
    finally:
        os._exit(code)


# ---- the walk


class Walk:
    """One run folder, and what must be in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.run = folder / "run"
        self.keep_last = self.rng.choice([0, 1, 1, 2, 2, 3])
        self.healthy: dict[int, str] = {}
        """Of the trajectory: iteration -> numbers; what was pruned stays until it is missed."""
        self.damaged: set[int] = set()
        self.best: int | None = None
        self.aside: dict[str, str] = {}
        self.maybe: list[tuple[int, str]] = []
        """States that may be the newest, too, because a session ended at a moment of its own."""
        self.best_of: dict[tuple[int, str], int | None] = {}
        self.history: list[str] = []
        self.counts: Counter[str] = Counter()

    def go(self) -> None:
        """Walk; AssertionError, with the history, where something is lost."""
        try:
            self.session("start")
            for _ in range(self.rng.randint(*STEPS_PER_WALK)):
                action = self.rng.choice(
                    ["resume"] * 3 + ["crash"] * 4 + ["damage"] * 3 + ["rewind"] * 2 + ["two"]
                )
                self.counts[action] += 1
                getattr(self, action)()
                if not self.healthy and self.damaged:
                    self.nothing_is_left()
                    break
        except AssertionError as error:
            raise AssertionError("\n".join([*self.history, str(error)])) from error

    # actions

    def resume(self) -> None:
        self.session("resume")

    def crash(self) -> None:
        self.session("crash", crash_at=self.rng.randint(1, 160), power=self.rng.random() < 0.5)

    def rewind(self) -> None:
        """Resume from an older checkpoint, also while that is cut short."""
        there = [i for i in self.on_disk() if i in self.healthy or i in self.damaged]
        if there:
            chosen = self.rng.choice(there)
            crash = self.rng.random() < 0.4
            self.session(
                f"rewind to {chosen}",
                load=self.folder(chosen),
                crash_at=self.rng.randint(1, 60) if crash else 0,
            )

    def two(self) -> None:
        """Two sessions at once; one may be killed at any moment."""
        specs = [self.spec(pause=0.02) for _ in range(2)]
        if self.rng.random() < 0.5:
            specs[0]["crash_at"] = self.rng.randint(1, 160)
        self.watch("two", [fork(self.run, spec) for spec in specs], specs)

    def damage(self) -> None:
        there = sorted(set(self.on_disk()) & {*self.healthy})
        if not there:
            return
        iteration = there[-1] if self.rng.random() < 0.6 else self.rng.choice(there)
        if iteration == max(self.healthy) and len(self.healthy) == 1:
            return  # with nothing else left there is nothing to find
        folder = self.folder(iteration)
        how = self.rng.choice(["bit", "cut", "file", "folder"])
        if how == "folder":
            shutil.rmtree(folder)
        else:
            files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
            file = self.rng.choice(sorted(files))
            content = bytearray(file.read_bytes())
            if how == "file":
                file.unlink()
            elif how == "cut":
                file.write_bytes(content[: self.rng.randrange(len(content))])
            else:
                content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
                file.write_bytes(content)
            self.damaged.add(iteration)
        self.history.append(f"damage {iteration}: {how}")
        del self.healthy[iteration]
        self.check()

    def session(self, name: str, **fields: Any) -> None:
        spec = self.spec(**fields)
        self.watch(name, [fork(self.run, spec)], [spec])

    def spec(self, **fields: Any) -> dict[str, Any]:
        saves = [
            self.rng.choice([False, True, True, "best"]) for _ in range(self.rng.randint(1, 5))
        ]
        return {
            "load": self.run,
            "saves": saves,
            "salt": self.rng.randrange(1 << 30),
            "keep_last": self.keep_last,
            "best": None,
            "patience": 60.0,
            "pause": 0.0,
            "crash_at": 0,
            "power": False,
            **fields,
        }

    # what must hold

    def watch(self, name: str, children: list[tuple[int, Path]], specs: list[dict]) -> None:
        """Wait for sessions, and follow what they did in the order in which they did it."""
        events = []
        for number, (process, reports) in enumerate(children):
            _, status = os.waitpid(process, 0)
            lines = [json.loads(line) for line in reports.read_text().splitlines()]
            reports.unlink()
            end = (lines[-1][0] if lines else 0.0, "ended", os.waitstatus_to_exitcode(status))
            events += [(line[0], number, line[1:]) for line in lines]
            events.append((end[0], number, list(end[1:])))
        events.sort(key=lambda e: e[0])
        self.history.append(
            f"{name} (keep {self.keep_last}): "
            + "; ".join(f"{number}:{' '.join(map(str, what))}" for _, number, what in events)
        )
        before = {i: t for i, t in self.healthy.items() if i in self.on_disk()}
        owner, pending, completed = None, {}, True
        for _, number, what in events:
            kind, *values = what
            assert kind != "failed", values[0]
            if kind == "refused":
                assert self.refusal_is_right(specs[number], values[0]), values[0]
            elif kind == "locked":
                assert owner is None, "two sessions held the lock"
                owner = number
            elif kind == "found":
                self.found(specs[number], *values)
                pending[number] = (values[0], "rewind")
            elif kind == "started":
                pending.pop(number)
                self.start_from(*values)
            elif kind == "saving":
                pending[number] = values
            elif kind == "saved":
                self.best = pending.pop(number)[2]
                self.saved(*values)
            elif kind == "ending":
                owner = None
            elif kind == "ended":
                owner = None if owner == number else owner
                completed &= values[0] == 0
                if number in pending:
                    self.cut_short(pending.pop(number))
        self.check(before if completed else None)

    def refusal_is_right(self, spec: dict[str, Any], message: str) -> bool:
        if spec["load"] != self.run:
            return int(spec["load"].name[5:]) in self.damaged and "damaged" in message
        return not self.healthy and ("no healthy checkpoint" in message or "is gone" in message)

    def found(self, spec: dict[str, Any], iteration: int, token: str) -> None:
        if spec["load"] != self.run:
            assert self.healthy.get(iteration) == token, f"{iteration} was read as {token}"
            return
        self.settle(iteration, token)

    def settle(self, iteration: int, token: str) -> None:
        """``iteration`` is what a reader finds: it must be the newest healthy one."""
        expected = [(max(self.healthy), self.healthy[max(self.healthy)])] if self.healthy else []
        allowed = [*self.maybe, *(expected or [(0, "")])]
        assert (iteration, token) in allowed, f"found {iteration} {token}, not one of {allowed}"
        if (iteration, token) in self.maybe:
            self.start_from(iteration, token)
            # It was finished, and older ones removed with the best one that it was given.
            self.best = self.best_of.get((iteration, token), self.best)
            if iteration:
                self.healthy[iteration] = token
        self.maybe = []

    def start_from(self, iteration: int, token: str) -> None:
        self.maybe = []
        self.healthy = {i: t for i, t in self.healthy.items() if i <= iteration}
        self.damaged = {i for i in self.damaged if i <= iteration}
        if self.best is not None and self.best > iteration:
            self.best = None

    def saved(self, iteration: int, token: str) -> None:
        self.healthy[iteration] = token
        self.damaged.discard(iteration)

    def cut_short(self, what: Any) -> None:
        iteration, token = what[:2]
        if token == "rewind":
            if self.healthy and iteration in self.healthy:
                self.maybe.append((iteration, self.healthy[iteration]))
        else:
            self.maybe.append((iteration, token))
            self.best_of[iteration, token] = what[2]

    def check(self, before: dict[int, str] | None = None) -> None:
        """Look at the folder as a reader does. ``before``: what was there before sessions that
        came to their ends."""
        from rmega.checkpointing.find import find
        from rmega.checkpointing.run_folder import read_info

        for name, token in self.aside.items():
            assert read_info(self.run / name)["token"] == token, f"{name} has changed"
        for folder in self.run.glob("*.abandoned*"):
            if (folder / "rmega.json").is_file() and folder.is_dir():
                try:
                    self.aside.setdefault(folder.name, read_info(folder)["token"])
                except ValueError:
                    pass  # was damaged before
        if not self.healthy and self.damaged:
            return
        with redirect_stdout(io.StringIO()):
            try:
                newest = find(self.run) if self.run.is_dir() else None
            except ValueError as error:
                raise AssertionError(f"nothing is found: {error}") from error
        if newest is None:
            self.settle(0, "")
        else:
            info = read_info(newest)
            self.settle(info["iteration"], info["token"])
        there = self.verified()
        wanted = sorted(self.healthy)[-self.keep_last :] if self.keep_last else [*self.healthy]
        for i in [*wanted, *([self.best] if self.best in self.healthy else [])]:
            assert there.get(i) == self.healthy[i], f"{i} is not there any more"
        if before is not None:
            gone = [i for i in before if i in self.healthy and i not in there]
            stay = [i for i in self.damaged if self.folder(i).is_dir()]
            assert not gone or not stay, f"{gone} were removed while damaged ones stay: {stay}"
        self.healthy = {i: t for i, t in self.healthy.items() if i in there}
        self.damaged = {i for i in self.damaged if self.folder(i).is_dir()}

    def verified(self) -> dict[int, str]:
        from rmega.checkpointing.find import damage
        from rmega.checkpointing.run_folder import read_info

        folders = {i: self.folder(i) for i in self.on_disk()}
        return {i: read_info(f)["token"] for i, f in folders.items() if damage(f) is None}

    def nothing_is_left(self) -> None:
        """All checkpoints are damaged: that is an error, not a start from the beginning."""
        from rmega.checkpointing.find import find

        with redirect_stdout(io.StringIO()):
            try:
                found = find(self.run)
            except ValueError:
                return
        raise AssertionError(f"every checkpoint is damaged, and {found} is found")

    def on_disk(self) -> list[int]:
        from rmega.checkpointing.run_folder import list_folders

        return list_folders(self.run)

    def folder(self, iteration: int) -> Path:
        from rmega.checkpointing.run_folder import iteration_dir

        return iteration_dir(self.run, iteration)


def walk(seed: int) -> Walk:
    """One random walk in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="walk")).resolve()
    try:
        one = Walk(folder, seed)
        one.go()
        return one
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Import what the sessions need, so that each of them starts at once."""
    from rmega import distributed

    distributed.quiet_megatron()
    import rmega.checkpointing.checkpoint
    import rmega.checkpointing.lock
    from rmega.megatron import cpu

    cpu.install()
    assert rmega.checkpointing.checkpoint and rmega.checkpointing.lock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare()
    counts: Counter[str] = Counter()
    lost = 0
    for seed in range(args.seed, args.seed + args.count):
        try:
            counts.update(walk(seed).counts)
        except AssertionError as error:
            lost += 1
            print(f"walk {seed}: LOST\n{error}\n", flush=True)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{seed - args.seed + 1} of {args.count}")
    actions = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{args.count} walks ({actions}): {lost} lost a state")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
