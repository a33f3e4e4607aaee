"""No hang: every process group has the timeout of --distributed-timeout-minutes, and a rank that
stops answering ends the run with one error, wherever it stops."""

from __future__ import annotations

import time

import pytest

from tests import runs
from tests.dist import run_distributed

SECONDS = 5
DP2, PP2 = {"dp": 2}, {"pp": 2, "num_layers_in_first_pipeline_stage": 3}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(small_llama, tmp_path_factory):
    return runs.make_data(small_llama, tmp_path_factory.mktemp("data"))


def groups(rank: int, world_size: int, argv: list[str]) -> dict[str, float]:
    """Timeout in seconds of every process group that a run has when its steps begin."""
    import torch
    import torch.distributed as dist

    from rmega.cli import parse_args
    from rmega.config import TrainingConfig
    from rmega.training import start
    from rmega.training.checkpointer import Checkpointer
    from rmega.training.logs import TimeSpent

    config = parse_args(TrainingConfig, argv)
    run = start.prepare(config, start.join(config))
    start.write_config(run)
    Checkpointer(run, start.build(run), TimeSpent(run.info, run.resumed_at))
    return {
        f"{number} {group.group_desc} {dist.get_process_group_ranks(group)}": (
            group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        )
        for number, group in enumerate(dist.distributed_c10d._world.pg_map)
    }


@pytest.mark.parametrize(
    "layout", [{"dp": 2}, {"tp": 2, "pp": 2, "num_layers_in_first_pipeline_stage": 3}]
)
def test_every_group_has_the_timeout(layout, small_llama, data, tmp_path):
    ranks = 4 if "tp" in layout else 2
    argv = runs.flags(
        small_llama, data, tmp_path / "run", distributed_timeout_minutes=1.5, **layout
    )
    for seen in run_distributed(groups, ranks, argv):
        assert len(seen) > 10
        assert {name: seconds for name, seconds in seen.items() if seconds != 90} == {}


def stuck(rank: int, world_size: int, argv: list[str], where: str) -> int:
    """A run whose last rank stops answering in a forward pass, in an evaluation, or while it writes
    a checkpoint."""
    import rmega.checkpointing.snapshot as snapshot
    import rmega.training.run  # noqa: F401  (before the ranks wait for each other)
    import rmega.training.train as engine

    def sleep(*args, **kwargs):
        time.sleep(60)

    if rank == world_size - 1:
        if where == "step":
            engine.pair_loss = sleep
        elif where == "evaluation":
            engine._rewards_of = sleep
        else:
            snapshot.SnapshotWriter.write = sleep
    return runs.train(rank, world_size, argv)


@pytest.mark.parametrize(
    "where,layout",
    [
        ("step", DP2),
        ("step", PP2),
        ("save", DP2),
        pytest.param("save", PP2, marks=SLOW),
        pytest.param("evaluation", DP2, marks=SLOW),
        pytest.param("evaluation", PP2, marks=SLOW),
    ],
)
def test_a_rank_that_stops_answering_ends_the_run(where, layout, small_llama, data, tmp_path):
    argv = runs.flags(
        small_llama,
        data,
        tmp_path / "run",
        steps=4,
        save_interval=2,
        valid_data_path=data,
        distributed_timeout_minutes=SECONDS / 60,
        **layout,
    )
    begun = time.monotonic()
    with pytest.raises(
        RuntimeError, match=f"rank 0 of 2 failed:(.|\n)*Timed out waiting {1000 * SECONDS}ms"
    ):
        run_distributed(stuck, 2, argv, where)
    assert time.monotonic() - begun < 45
    assert not list((tmp_path / "run").glob("iter_*[0-9]"))
