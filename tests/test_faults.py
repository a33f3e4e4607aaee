"""What clusters do to a run: killed ranks, a full disk, damaged files, a node that vanishes; counted at the end.

The short form of each is in the default suite; ``RMEGA_LONG=1`` runs all ranks, and 20 signals.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest

from tests import runs
from tests.dist import run_distributed

LONG = os.environ.get("RMEGA_LONG") == "1"
STEPS = 6
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if COUNTS:
        print("\nfault" + " " * 35 + "survived")
        for what, count in COUNTS.items():
            print(f"{what:<40}{count:>8}")


@pytest.fixture(scope="module")
def data(shared_dir, stories260k, tmp_path_factory):
    return runs.make_data(shared_dir, stories260k, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(stories260k, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert run_distributed(runs.train, 2, runs.flags(stories260k, data, run, steps=STEPS, dp=2)) == [0, 0]
    return run / f"iter_{STEPS:07d}"


def killed(rank: int, world_size: int, argv: list[str], where: str, victim: int) -> int:
    """A run whose rank ``victim`` ends by SIGKILL in its tenth forward pass, or half way in its second file."""
    import rmega.snapshot as snapshot
    import rmega.train as engine

    if rank == victim:
        if where == "forward":
            original, left = engine.pair_loss, [10]

            def pair_loss(*args):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args)

            engine.pair_loss = pair_loss
        else:
            write_item, left = snapshot._write_item, [0]
            original_write, files = snapshot.SnapshotWriter.write, [0]

            def write(self):
                files[0] += 1
                left[0] = max(1, len(self.items) // 2) if files[0] == 2 else 0
                if files[0] == 2 and not self.items:
                    os.kill(os.getpid(), signal.SIGKILL)
                original_write(self)

            def _write_item(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write_item(*args, **kwargs)

            snapshot.SnapshotWriter.write, snapshot._write_item = write, _write_item
    return runs.train(rank, world_size, argv)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", ["forward", "save", "asynchronous save"])
def test_kill_9(where, victim, stories260k, data, unbroken, tmp_path):
    if not LONG and (where, victim) not in [("forward", 1), ("asynchronous save", 0)]:
        pytest.skip("RMEGA_LONG=1 runs it")
    run = tmp_path / "run"
    argv = runs.flags(stories260k, data, run, steps=STEPS, dp=2, save_interval=2)
    with pytest.raises(RuntimeError, match="died|failed"):
        run_distributed(killed, 2, argv + (["--no-async-save"] if where == "save" else []), where, victim)
    assert (run / "iter_0000002").is_dir()
    if where != "forward":
        assert not (run / "iter_0000004").exists() and (run / "iter_0000004.partial").exists()
    assert run_distributed(runs.train, 2, argv) == [0, 0]
    runs.assert_same(run / f"iter_{STEPS:07d}", unbroken)
    assert not list(run.glob("*.partial"))
    COUNTS[f"kill -9 during {where}"] += 1


@pytest.mark.skipif(not LONG, reason="RMEGA_LONG=1 runs it; the short form is in test_run.py")
def test_twenty_signals(stories260k, data, unbroken, tmp_path):
    rng = random.Random(0)
    for number in range(20):
        run, after = tmp_path / f"run{number}", rng.randint(1, STEPS - 1)
        argv = runs.flags(stories260k, data, run, steps=STEPS, dp=2)
        assert run_distributed(runs.train, 2, argv, {after: ("SIGTERM", rng.randrange(2))}) == [75, 75]
        assert run_distributed(runs.train, 2, argv) == [0, 0]
        runs.assert_same(run / f"iter_{STEPS:07d}", unbroken)
        COUNTS["SIGTERM at a random step"] += 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB, of which a checkpoint takes about 4."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True,
                          text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_full_disk(small_disk, stories260k, data, unbroken):
    """The saves that do not fit are said and training goes on; the last one is an error; what was there is good."""
    from rmega import run_folder

    run = small_disk / "run"
    argv = runs.flags(stories260k, data, run, steps=STEPS, dp=2, save_interval=1)
    with pytest.raises(RuntimeError, match="OSError: .*iter_0000006: checkpoint not written; earlier ones"):
        run_distributed(runs.train, 2, argv)
    kept = run_folder.list_iterations(run)
    assert kept and kept[-1] < STEPS and all(run_folder.damage(run_folder.iteration_dir(run, i)) is None for i in kept)
    assert not list(run.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run_distributed(runs.train, 2, argv) == [0, 0]
    runs.assert_same(run / f"iter_{STEPS:07d}", unbroken)
    COUNTS["full disk"] += 1


def test_a_damaged_shard(stories260k, data, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = runs.flags(stories260k, data, run, steps=STEPS, dp=2, save_interval=2)
    assert run_distributed(runs.train, 2, argv) == [0, 0]
    shutil.rmtree(run / "iter_0000006")
    (run / "latest_checkpointed_iteration.txt").write_text("4\n")
    shard = next((run / "iter_0000004").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    assert run_distributed(runs.train, 2, argv) == [0, 0]  # goes on from step 2
    runs.assert_same(run / "iter_0000004", run / "iter_0000004")
    runs.assert_same(run / f"iter_{STEPS:07d}", unbroken)
    COUNTS["one bit of a shard changed"] += 1


def test_a_killed_rank_takes_the_others_down(stories260k, data, tmp_path):
    """Under the launcher: rank 1 is killed from outside; all is over within a minute, and the last line says why."""
    process = runs.start(2, runs.flags(stories260k, data, tmp_path / "run", steps=10_000, dp=2))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Iter(train)"):
            break
    else:
        pytest.fail("".join(lines))
    (victim,) = [int(p) for p in os.listdir("/proc") if p.isdigit() and _is_rank(p, process.pid, "1")]
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    out, _ = process.communicate(timeout=90)
    assert time.monotonic() - begun < 60
    assert process.returncode == 128 + 9
    assert out.splitlines()[-1] == "launch: rank 1 failed first: was ended by signal 9 (SIGKILL)"
    assert "Traceback" not in out
    COUNTS["a rank killed: others down in a minute"] += 1


def _is_rank(pid: str, parent: int, rank: str) -> bool:
    try:
        status = open(f"/proc/{pid}/status").read()
        environment = open(f"/proc/{pid}/environ").read().split("\0")
    except OSError:
        return False
    return f"PPid:\t{parent}\n" in status and f"RANK={rank}" in environment


@pytest.fixture
def two_nodes():
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    names = [f"rmega{os.getpid() % 10000}{x}" for x in "ab"]
    commands = [f"ip netns add {n}" for n in names]
    commands += [f"ip link add {names[0]}v netns {names[0]} type veth peer name {names[1]}v netns {names[1]}"]
    for i, n in enumerate(names):
        commands += [f"ip -n {n} addr add 10.77.0.{i + 1}/24 dev {n}v", f"ip -n {n} link set {n}v up",
                     f"ip -n {n} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {command}: {done.stderr.strip()}")
        yield names
    finally:
        for n in names:
            subprocess.run(["ip", "netns", "del", n], capture_output=True)


@pytest.mark.skipif(not LONG, reason="RMEGA_LONG=1 runs it")
def test_a_node_that_vanishes(two_nodes, stories260k, data, tmp_path):
    """The cable is cut between two launchers of one rank each: both end, and each side says what it lost."""
    processes = []
    for i, name in enumerate(two_nodes):
        argv = [*"--nnodes 2 --nproc-per-node 1 --rdzv-backend static --master-addr 10.77.0.1".split(),
                *f"--master-port 29555 --node-rank {i}".split(),
                str(runs.ROOT / "examples" / "pretrain_reward.py"),
                *runs.flags(stories260k, data, tmp_path / "run", steps=10_000, dp=2, distributed_timeout_minutes=0.2)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT),
                       "GLOO_SOCKET_IFNAME": f"{name}v"}
        for gone in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(gone, None)
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", name, os.sys.executable, str(runs.ROOT / "tools" / "launch.py"), *argv],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for line in processes[0].stdout:
        if line.startswith("Iter(train)"):
            break
    subprocess.run(["ip", "-n", two_nodes[1], "link", "set", f"{two_nodes[1]}v", "down"], check=True)
    begun = time.monotonic()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode not in (0, 75)
        assert "error: rank" in out and ("no answer from another rank" in out or "lost the connection" in out), out
    assert time.monotonic() - begun < 60 + 12
    COUNTS["a node vanished"] += 1
