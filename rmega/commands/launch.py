"""torchrun with signals and exit codes that propagate.

    python tools/launch.py --nproc-per-node 2 examples/pretrain_reward.py --tp 2 ...

torchrun ends its ranks 30 seconds after a SIGTERM, ends itself on SIGUSR1, and exits with 1
whatever the exit codes of its ranks. Here SIGTERM, SIGUSR1 and SIGINT are only passed on to the
ranks, which save and exit in their own time (on Linux; elsewhere signals are not passed on). The
exit code is that of the rank that ended first: 0, 2 for an error that the user can fix, 75 for
"saved, start me again", 1 for any other error, 130 after a second SIGINT. OMP_NUM_THREADS, if it is
not set, becomes each rank's share of the cores.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from rmega.cli import num_cores, run_tool


def children(process: int) -> list[int]:
    """Processes that ``process`` started."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def cli() -> int:
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        text = f"{__doc__}\nFlags before the program are those of torchrun: torchrun --help"
        return run_tool(print, text)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, get_args_parser, run

    parser = get_args_parser()
    parser.prog = "tools/launch.py"
    args = parser.parse_args()
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun would set it to 1
        ranks = determine_local_world_size(args.nproc_per_node)
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cores() // ranks))

    def pass_on(number: int, frame) -> None:
        if number == signal.SIGINT and os.isatty(0):
            return  # the terminal has sent it to the ranks already
        for child in children(os.getpid()):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                pass

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == 75:
            print("launch: stopped early with everything saved (exit code 75)", file=sys.stderr)
            return 75
        message = (
            failure.message
            if isinstance(failure.message, str)
            else failure.message.get("message", "")
        )
        own = message if message.startswith("error: ") else ""
        how = (
            f"was ended by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"left with exit code {code}"
        )
        print(f"launch: rank {rank} failed first: {own or how}", file=sys.stderr)
        return code if code > 0 else 128 - code
    return 0
