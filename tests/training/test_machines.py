"""Two machines: network and host names of their own, one file system. Needs root and Linux network
namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dist import run_distributed
from tests.runs import flags, make_data, train_and_say

ADDRESS = "10.77.{}.{}"


def possible() -> str:
    """Why not, or ""."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        return "making network namespaces takes root, ip, unshare and mount"
    name = f"rmega{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this machine does not let network namespaces be made"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """start(i, command, env=..., hide=folder) -> Popen on machine i; each knows its own name as a
    loopback address, as many distributions set it up, and that of the other as an address of the
    network between them.
    """
    if why := possible():
        pytest.skip(why)
    folder, key = tmp_path_factory.mktemp("machines"), uuid.uuid4().hex[:6]
    names, net = [f"rmega{key}{i}" for i in range(2)], int(key[:2], 16)

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for i, name in enumerate(names):
            ip("netns", "add", name)
            other = ADDRESS.format(net, 2 - i)
            (folder / f"hosts{i}").write_text(
                f"127.0.0.1 localhost\n127.0.1.1 node{i}\n{other} node{1 - i}\n"
            )
        (folder / "nsswitch").write_text("hosts: files\n")  # no server of names: no waiting for one
        ip(
            "link",
            "add",
            f"rm{key}0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            f"rm{key}1",
            "netns",
            names[1],
        )
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", ADDRESS.format(net, i + 1) + "/24", "dev", f"rm{key}{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"rm{key}{i}", "up")

        def start(i: int, command: list[str], hide: Path | None = None) -> subprocess.Popen:
            inside = f"mount --bind {folder}/hosts{i} /etc/hosts && hostname node{i} && "
            if Path("/etc/nsswitch.conf").exists():
                inside += f"mount --bind {folder}/nsswitch /etc/nsswitch.conf && "
            inside += f"mount -t tmpfs none {hide} && " if hide else ""
            env = {
                k: v
                for k, v in os.environ.items()
                if k not in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR")
            }
            return subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    names[i],
                    "unshare",
                    "--mount",
                    "--uts",
                    "bash",
                    "-c",
                    inside + 'exec "$@"',
                    "bash",
                    *command,
                ],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

        yield start
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def data(small_llama: Path, tmp_path_factory) -> str:
    return make_data(small_llama, tmp_path_factory.mktemp("data"), count=40)


TORCHRUN = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1".split()
RANK = "env RANK={i} LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 MASTER_ADDR=node0".split()

# A network file system has a second to show a file, not half a minute.
IMPATIENT = """
import runpy, sys
from rmega.checkpointing import run_folder
run_folder.check_shared.__defaults__ = (1.0,)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def run_on_both(
    machines, argv: list[str], launch: list[str], hide: Path | None = None
) -> list[tuple[int, str]]:
    """(exit code, output) of what ``launch`` starts on each machine, ``{i}`` its number."""
    program = ["examples/pretrain_reward.py", *argv]
    started = [
        machines(
            i, [word.replace("{i}", str(i)) for word in launch] + program, hide=hide if i else None
        )
        for i in range(2)
    ]
    try:
        out = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, out, strict=True)]


def rows(run: Path) -> list[tuple]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        (row["loss"], row["grad_norm"], row["chosen_score_mean"])
        for row in lines
        if row["type"] == "train"
    ]


@pytest.mark.parametrize(
    "launch",
    [
        # as examples/slurm/run.sh does it
        [*TORCHRUN, *"--rdzv-backend c10d --rdzv-endpoint node0:29472 --rdzv-id 7".split()],
        pytest.param(
            [*TORCHRUN, *"--node-rank {i} --master-addr node0 --master-port 29471".split()],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["c10d", "static"],
)
def test_two_machines_are_two_processes(machines, data, small_llama, tmp_path, launch):
    run, alone = tmp_path / "run", tmp_path / "alone"
    both = run_on_both(machines, flags(small_llama, data, run, steps=4, tp=2), launch)
    assert [code for code, _ in both] == [0, 0], both[0][1] + both[1][1]
    assert "network: gloo goes over rm" in both[0][1]
    (code, said), _ = run_distributed(
        train_and_say, 2, flags(small_llama, data, alone, steps=4, tp=2)
    )
    assert code == 0 and "network:" not in said
    assert len(rows(run)) == 4 and rows(run) == rows(alone)
    assert (run / "iter_0000004" / "rmega.json").is_file()


def test_a_run_folder_that_is_not_shared_is_refused(machines, data, small_llama, tmp_path):
    """The ranks alone: a launcher would wait for the other's agent before it ends."""
    (tmp_path / "local").mkdir()
    both = run_on_both(
        machines,
        flags(small_llama, data, tmp_path / "local" / "run", steps=2, tp=2),
        [*RANK, "MASTER_PORT=29473", sys.executable, "-c", IMPATIENT],
        hide=tmp_path / "local",
    )
    assert all(code for code, _ in both)
    assert "rank 1 on node1 cannot see there what rank 0 on another machine wrote" in both[0][1]
    assert 'Traceback (most recent call last):\n  File "' not in both[0][1]
    assert not [p for p in (tmp_path / "local").rglob("*") if p.is_file()]  # no mark is left


def test_interface_towards():
    from rmega.distributed import interface_towards

    assert interface_towards("127.0.0.1") != "lo"
    assert interface_towards("no.such.host.invalid") == interface_towards("192.0.2.1")
