"""What clusters do to a run: killed ranks, a full disk, damaged files, a node that vanishes;
counted in a table.

One of each is in the default suite, all ranks and 20 signals with the slow tests.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import runs
from tests.dist import run_distributed

STEPS = 6
SAME = "resuming gives the unbroken run's weights and optimizer state, bit for bit"
DOWN = "all ranks end within a minute; the last line names the first rank's reason"
LAYOUTS = {"dp2": {"dp": 2}, "tp2,pp2": {"tp": 2, "pp": 2, "num_layers_in_first_pipeline_stage": 3}}
RANKS = {"dp2": 2, "tp2,pp2": 4}
QUICK = [("a forward pass", "dp2", 1), ("an asynchronous save", "dp2", 0)]


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(small_llama, data, tmp_path_factory):
    """The last checkpoint of a run that nothing disturbed, by layout."""
    made: dict[str, Path] = {}

    def of(layout: str = "dp2") -> Path:
        if layout not in made:
            run = tmp_path_factory.mktemp("unbroken") / "run"
            argv = runs.flags(small_llama, data, run, steps=STEPS, **LAYOUTS[layout])
            assert run_distributed(runs.train, RANKS[layout], argv) == [0] * RANKS[layout]
            made[layout] = run / f"iter_{STEPS:07d}"
        return made[layout]

    return of


def killed(rank: int, world_size: int, argv: list[str], where: str, victim: int) -> int:
    """A run whose rank ``victim`` ends by SIGKILL in a forward pass of step 5, or half way in its
    second file."""
    import rmega.checkpointing.snapshot as snapshot
    import rmega.training.train as engine

    if rank == victim:
        if where == "a forward pass":
            step, forward, count = engine.train_step, engine._forward_train, [0]

            def train_step(*args):
                count[0] += 1
                return step(*args)

            def _forward_train(*args):
                if count[0] == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return forward(*args)

            engine.train_step, engine._forward_train = train_step, _forward_train
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


@pytest.mark.parametrize(
    "where,layout,victim",
    [
        pytest.param(
            where,
            layout,
            victim,
            marks=[] if (where, layout, victim) in QUICK else pytest.mark.slow,
        )
        for layout in LAYOUTS
        for where in ("a forward pass", "a save", "an asynchronous save")
        for victim in range(RANKS[layout])
    ],
)
def test_kill_9(where, layout, victim, small_llama, data, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = runs.flags(small_llama, data, run, steps=STEPS, save_interval=2, **LAYOUTS[layout])
    with runs.fault(f"kill -9 during {where}, each rank of dp2 and of tp2,pp2", SAME):
        with pytest.raises(RuntimeError, match="died|failed"):
            run_distributed(
                killed,
                RANKS[layout],
                argv + (["--no-async-save"] if where == "a save" else []),
                where,
                victim,
            )
        assert (run / "iter_0000002").is_dir()
        if where != "a forward pass":
            assert not (run / "iter_0000004").exists() and (run / "iter_0000004.partial").exists()
        assert run_distributed(runs.train, RANKS[layout], argv) == [0] * RANKS[layout]
        runs.assert_same(run / f"iter_{STEPS:07d}", unbroken(layout))
        assert not list(run.glob("*.partial"))


@pytest.mark.slow
def test_twenty_signals(small_llama, data, unbroken, tmp_path):
    rng = random.Random(0)
    for number in range(20):
        run, after = tmp_path / f"run{number}", rng.randint(1, STEPS - 1)
        often = [None, 1, 2][number % 3]  # or while an earlier checkpoint is still being written
        argv = runs.flags(small_llama, data, run, steps=STEPS, dp=2, save_interval=often)
        with runs.fault("SIGTERM at a random step, to one of two ranks", SAME):
            assert run_distributed(runs.train, 2, argv, {after: ("SIGTERM", rng.randrange(2))}) == [
                75,
                75,
            ]
            assert run_distributed(runs.train, 2, argv) == [0, 0]
            runs.assert_same(run / f"iter_{STEPS:07d}", unbroken())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB, of which a checkpoint takes about 4."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_full_disk(small_disk, small_llama, data, unbroken):
    """The saves that do not fit are said and training continues; the last one is an error; what was
    there is good."""
    from rmega.checkpointing import run_folder
    from rmega.checkpointing.find import damage

    run = small_disk / "run"
    argv = runs.flags(small_llama, data, run, steps=STEPS, dp=2, save_interval=1)
    with runs.fault(
        "a disk that fills during a save", f"earlier checkpoints stay whole; with more room, {SAME}"
    ):
        with pytest.raises(
            RuntimeError, match="OSError: .*iter_0000006: checkpoint not written; earlier ones"
        ):
            run_distributed(runs.train, 2, argv)
        kept = run_folder.list_iterations(run)
        assert kept and kept[-1] < STEPS
        assert all(damage(run_folder.iteration_dir(run, i)) is None for i in kept)
        assert not list(run.glob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        assert run_distributed(runs.train, 2, argv) == [0, 0]
        runs.assert_same(run / f"iter_{STEPS:07d}", unbroken())


@pytest.mark.parametrize(
    "how",
    [
        "one bit changed",
        pytest.param("cut short", marks=pytest.mark.slow),
        pytest.param("gone", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_shard(how, small_llama, data, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = runs.flags(small_llama, data, run, steps=STEPS, dp=2, save_interval=2)
    with runs.fault(
        "a shard of the newest checkpoint changed in one bit, cut short, or gone",
        f"it is named before the model is built, the checkpoint before it is taken, and {SAME}",
    ):
        assert run_distributed(runs.train, 2, argv) == [0, 0]
        shutil.rmtree(run / "iter_0000006")
        (run / "latest_checkpointed_iteration.txt").write_text("4\n")
        shard = next((run / "iter_0000004").glob("*.distcp"))
        content = bytearray(shard.read_bytes())
        if how == "one bit changed":
            content[len(content) // 3] ^= 4
        else:
            del content[len(content) // 2 :]
        shard.unlink()
        if how != "gone":
            shard.write_bytes(content)
        (code, said), (other, nothing) = run_distributed(runs.train_and_say, 2, argv)
        assert (code, other, nothing) == (0, 0, "")
        assert f"warning: damaged checkpoint left out: {shard}" in said
        assert f"resuming from {run / 'iter_0000002'}" in said
        assert said.index("damaged checkpoint") < said.index("\nmodel: ")
        runs.assert_same(run / f"iter_{STEPS:07d}", unbroken())


def wait_for_a_step(process: subprocess.Popen) -> None:
    """Read what a run says up to its first line of training."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Iter(train)"):
            return
    pytest.fail("".join(lines))


def test_a_killed_rank_takes_the_others_down(small_llama, data, tmp_path):
    """Under the launcher: rank 1 is killed from outside; all is over within a minute, and the last
    line says why."""
    with runs.fault("kill -9 of a rank from outside, under tools/launch.py", DOWN):
        process = runs.start(2, runs.flags(small_llama, data, tmp_path / "run", steps=10_000, dp=2))
        wait_for_a_step(process)
        (victim,) = [
            int(p) for p in os.listdir("/proc") if p.isdigit() and _is_rank(p, process.pid, "1")
        ]
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=90)
        assert time.monotonic() - begun < 60
        assert process.returncode == 128 + 9
        assert (
            out.splitlines()[-1] == "launch: rank 1 failed first: was ended by signal 9 (SIGKILL)"
        )
        assert "Traceback" not in out


def _is_rank(pid: str, parent: int, rank: str) -> bool:
    try:
        status = open(f"/proc/{pid}/status").read()
        environment = open(f"/proc/{pid}/environ").read().split("\0")
    except OSError:
        return False
    return f"PPid:\t{parent}\n" in status and f"RANK={rank}" in environment


SPOILT = """
import os, sys, time
import rmega.checkpointing.snapshot, rmega.training.train
from examples.pretrain_reward import main
from rmega.training.stopping import run_ranks
{spoil}
sys.exit(run_ranks(main))
"""


def spoilt_program(folder: Path, spoil: str) -> Path:
    """The training program with something broken in it."""
    (folder / "program.py").write_text(SPOILT.format(spoil=spoil))
    return folder / "program.py"


def test_an_error_of_one_rank_is_one_traceback(small_llama, data, tmp_path):
    """Rank 1 raises in a step: its traceback alone, its reason in the last line, the exit code of
    the program."""
    program = spoilt_program(
        tmp_path,
        """
original, steps = rmega.training.train.train_step, []
def train_step(*args):
    steps.append(0)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        raise RuntimeError("the cat sat on the keyboard")
    return original(*args)
rmega.training.train.train_step = train_step""",
    )
    with runs.fault("an error inside one rank, under tools/launch.py", DOWN):
        process = runs.start(
            2, runs.flags(small_llama, data, tmp_path / "run", steps=10_000, dp=2), program=program
        )
        wait_for_a_step(process)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=90)
        assert time.monotonic() - begun < 60
        assert process.returncode == 1
        assert out.splitlines()[-1].startswith("launch: rank 1 failed first: error: rank 1 on ")
        assert out.splitlines()[-1].endswith("RuntimeError: the cat sat on the keyboard")
        assert out.count("Traceback") == 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_second_interrupt_aborts(ranks, small_llama, data, tmp_path):
    """SIGINT begins a save that takes an hour here; a second one ends the run at once and leaves no
    checkpoint."""
    program = spoilt_program(
        tmp_path,
        "rmega.checkpointing.snapshot.SnapshotWriter.write = lambda self: time.sleep(3600)",
    )
    process = runs.start(
        ranks,
        runs.flags(small_llama, data, tmp_path / "run", steps=10_000),
        program=program,
        launcher="launch" if ranks > 1 else "python",
    )
    with runs.fault(
        "SIGINT twice, the second during the save",
        "the run ends at once and leaves no half checkpoint",
    ):
        wait_for_a_step(process)
        process.send_signal(signal.SIGINT)
        for line in process.stdout:
            if line.startswith("stopping after step "):
                break
        time.sleep(
            2.0
        )  # two within a moment are one: a launcher passes on what the terminal sent already
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
        assert process.returncode == 130 and "Traceback" not in out and "interrupted" in out, out
        assert not [f for f in (tmp_path / "run").glob("iter_*") if not f.suffix]


@pytest.fixture
def two_nodes():
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    names = [f"rmega{os.getpid() % 10000}{x}" for x in "ab"]
    commands = [f"ip netns add {n}" for n in names]
    commands += [
        f"ip link add {names[0]}v netns {names[0]} type veth peer name {names[1]}v netns {names[1]}"
    ]
    for i, n in enumerate(names):
        commands += [
            f"ip -n {n} addr add 10.77.0.{i + 1}/24 dev {n}v",
            f"ip -n {n} link set {n}v up",
            f"ip -n {n} link set lo up",
        ]
    if not shutil.which("ip"):
        pytest.skip("no program ip here (Debian: iproute2)")
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {command}: {done.stderr.strip()}")
        yield names
    finally:
        for n in names:
            subprocess.run(["ip", "netns", "del", n], capture_output=True)


def on_two_nodes(nodes: list[str], argv: list[str]) -> list[subprocess.Popen]:
    """A run with a launcher and one rank on each node."""
    processes = []
    for i, name in enumerate(nodes):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(runs.ROOT),
            "GLOO_SOCKET_IFNAME": f"{name}v",
        }
        for gone in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(gone, None)
        processes.append(
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    os.sys.executable,
                    str(runs.ROOT / "tools" / "launch.py"),
                    *"--nnodes 2 --nproc-per-node 1 --rdzv-backend static".split(),
                    *"--master-addr 10.77.0.1".split(),
                    *f"--master-port 29555 --node-rank {i}".split(),
                    str(runs.ROOT / "examples" / "pretrain_reward.py"),
                    *argv,
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_node_that_vanishes(layout, two_nodes, small_llama, data, unbroken, tmp_path):
    """The cable between two launchers of one rank each is cut: both end and say what they lost;
    with the cable back the run goes on."""
    run = tmp_path / "run"
    flags = dict(
        save_interval=2,
        distributed_timeout_minutes=0.2,
        **(
            LAYOUTS["dp2"]
            if layout == "dp2"
            else {"pp": 2, "num_layers_in_first_pipeline_stage": 3}
        ),
    )
    with runs.fault(
        "a node vanishes: the cable between two launchers is cut (dp2, pp2)",
        "both sides end within a minute and say so; with the cable back the run resumes",
    ):
        processes = on_two_nodes(
            two_nodes, runs.flags(small_llama, data, run, steps=10_000, **flags)
        )
        for line in processes[0].stdout:
            if line.startswith("saved "):
                break
        subprocess.run(
            ["ip", "-n", two_nodes[1], "link", "set", f"{two_nodes[1]}v", "down"], check=True
        )
        begun = time.monotonic()
        for process in processes:
            out, _ = process.communicate(timeout=120)
            assert process.returncode not in (0, 75)
            assert "error: rank" in out and (
                "no answer from another rank" in out or "lost the connection" in out
            ), out
        assert time.monotonic() - begun < 60
        subprocess.run(
            ["ip", "-n", two_nodes[1], "link", "set", f"{two_nodes[1]}v", "up"], check=True
        )
        done = max(int(f.name[5:]) for f in run.glob("iter_*") if not f.suffix)
        processes = on_two_nodes(
            two_nodes, runs.flags(small_llama, data, run, steps=done + 3, **flags)
        )
        outs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outs
        assert f"done: {done + 3} steps" in outs[0] and "resuming from" in outs[0]
