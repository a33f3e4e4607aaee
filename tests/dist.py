"""Run a function on several gloo ranks from a test: ``run_distributed(fn, world_size, *args)``.

The worker processes stay alive between calls; a call that fails or takes too long ends them, and
the next call starts fresh ones. They are forked from a process that has imported torch and
Megatron-Core, which costs seconds, and done nothing else. They see no GPU, whatever the machine
has, unless a call asks for it (``gpus=True``).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import time
import traceback

context = multiprocessing.get_context("forkserver")
# torch's optimizers import its compiler when the first of them is made.
context.set_forkserver_preload(["rmega.training.run", "rmega.scoring.scorer", "torch._dynamo"])
_workers: dict[bool, list[tuple]] = {False: [], True: []}  # without and with GPUs


def _serve(pipe, gpus: bool, environment: dict[str, str]) -> None:
    os.environ.clear()  # it was that of the test which started the fork server
    os.environ.update(environment)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything starts CUDA, which reads it once
    import torch

    torch.set_num_threads(1)
    from rmega import distributed

    gc.freeze()  # the modules: the collections below pass over them
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        rank, world_size, port, module, name, args = job
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 starts none: the test's process has one
        )
        try:
            fn = getattr(importlib.import_module(module), name)
            pipe.send(("ok", fn(rank, world_size, *args)))
        except BaseException:  # the test's own process reports it
            pipe.send(("error", traceback.format_exc()))
        finally:
            distributed.finish()
            # Models hold groups in cycles, and each group has a thread that wakes every 10 ms.
            gc.collect()


def _stop() -> None:
    for workers in _workers.values():
        for process, pipe in workers:
            process.kill()
            pipe.close()
        workers.clear()


atexit.register(_stop)


def run_distributed(fn, world_size: int, *args, timeout: float = 240.0, gpus: bool = False) -> list:
    """Call the module-level ``fn(rank, world_size, *args)`` on ``world_size`` processes; their
    results in rank order.

    Raises RuntimeError with the first failing rank's traceback, or after ``timeout`` seconds.
    """
    from torch.distributed import TCPStore

    workers = _workers[gpus]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    while len(workers) < world_size:
        pipe, far_end = context.Pipe()
        process = context.Process(target=_serve, args=(far_end, gpus, environment))
        process.start()
        far_end.close()
        workers.append((process, pipe))
    # A rank that looked for a store before rank 0 had started it would wait a second.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(world_size):
        workers[rank][1].send((rank, world_size, store.port, fn.__module__, fn.__qualname__, args))
    results: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    while len(results) < world_size:
        for rank in range(world_size):
            _, pipe = workers[rank]
            if rank in results:
                continue
            if pipe.poll(0.02):
                try:
                    status, value = pipe.recv()
                except EOFError:
                    _stop()
                    raise RuntimeError(f"rank {rank} of {world_size} died") from None
                if status == "error":
                    _stop()
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
        if time.monotonic() > deadline:
            _stop()
            raise RuntimeError(
                f"no answer from ranks {sorted(set(range(world_size)) - set(results))} of"
                f" {world_size} after {timeout} s"
            )
    return [results[rank] for rank in range(world_size)]
