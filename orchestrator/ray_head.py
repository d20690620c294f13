"""`python -m orchestrator.ray_head RANKS`: a Ray on this machine, for as long as somebody holds its standard input.

It outlives the orchestrators that connect to it, and so do their gangs. Ray's own command line starts the same, and a
server for remote clients, on a fixed port, besides.
"""

import argparse
import os
import select
import signal
import sys
from types import FrameType

from ray._private.node import Node
from ray._private.parameter import RayParams

from orchestrator.ray_folder import RayFolder

OBJECT_STORE_BYTES = 80 * 1024**2
"""Of a local Ray. Only artifacts travel through it."""
LOOK_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Start Ray, print its address on a line once it is ready, and end it with everything that runs on it: 0 after
    SIGTERM, SIGINT or the end of standard input, 1 once a part of it has died."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.ray_head", description=__doc__)
    parser.add_argument("ranks", type=int, help="ranks that may train side by side")
    ranks = parser.parse_args(arguments).ranks
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.chdir("/")  # Ray puts the folder that we stand in on its workers' path
    folder = RayFolder()
    try:
        return _hold(ranks, folder)
    finally:
        folder.remove()


def _hold(ranks: int, folder: RayFolder) -> int:
    parameters = RayParams(
        num_cpus=ranks,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(folder.path),
        include_dashboard=False,
        no_monitor=True,  # it asks clouds for nodes
        include_log_monitor=False,  # type: ignore[arg-type]  # it copies what workers print to drivers
    )
    # Its processes are killed by the kernel should this thread die without a chance to end them: `spawn_reaper`.
    node = Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    try:
        print(node.address, flush=True)
        while not (dead := node.dead_processes()):  # type: ignore[no-untyped-call]
            if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:  # never written to: its end
                return 0
        print(f"Ray has lost its {', '.join(name for name, _ in dead)}", file=sys.stderr)
        return 1
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


def _exit(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
