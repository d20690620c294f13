"""Where the ranks of a gang meet: torch's default process group, and the store that it starts from."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from worker.shape import FieldError
from worker.spec import GangConfig
from worker.world import backends

PATIENCE = timedelta(hours=2)
"""How long a collective waits. Ranks wait while rank 0 packs alone; hangs are the orchestrator's to notice."""
GRAPHS_A_JOB = 4
"""Those of both sides of late tying, each for whole micro-batches and for the rest of a batch."""


def prepare(gang: GangConfig, gpu: int = 0) -> None:
    """Give this process a rank's share of the machine: its threads, and one of the GPUs that the launcher shows it.

    Raises FieldError where it shows none.
    """
    torch.set_num_threads(_threads(gang))
    if gang.device == "gpu":
        if not torch.cuda.is_available():
            raise FieldError("gang.device", "gpu", "no CUDA device is available here; use cpu")
        torch.cuda.set_device(gpu)


def join(rank: int, gang: GangConfig, store: Store) -> None:
    """Join the gang's process group, as one of several ranks. Waits for the others."""
    device = torch.device("cuda" if gang.device == "gpu" else "cpu")
    dist.init_process_group(backends(device), store=store, rank=rank, world_size=gang.ranks, timeout=PATIENCE)


def leave() -> None:
    """Leave the process group, if it was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def release_memory() -> int:
    """Give back to the GPU what no tensor holds, and return the bytes that are still held."""
    _make_room_for_graphs()
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _make_room_for_graphs() -> None:
    """See that the next job can compile what it needs.

    A model of a shape seen before runs the graph that is there, at once. But a function has so many graphs at most, and
    a model that must be compiled whole fails with the next. What is on disk stays: a kernel is compiled once a node.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    counters = dynamo.utils.counters
    if counters["stats"]["unique_graphs"] + GRAPHS_A_JOB > dynamo.config.recompile_limit:
        dynamo.reset()
        counters.clear()


def file_store(path: str, ranks: int) -> FileStore:
    """A rendezvous for `ranks` ranks in a file that all of them see."""
    return FileStore(path, ranks)


def serve_store(ranks: int) -> TCPStore:
    """A rendezvous for `ranks` ranks on this machine, on a free port (its `port`), held by the process that called."""
    return TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)


def join_store(port: int, ranks: int) -> TCPStore:
    """The rendezvous that another process of this machine serves on `port`."""
    return TCPStore("127.0.0.1", port, ranks, is_master=False)


def follow_store(port: int, ranks: int) -> TCPStore:
    """The same over a connection of its own, which may wait long without holding up a process group."""
    return TCPStore("127.0.0.1", port, ranks, is_master=False, timeout=PATIENCE, wait_for_workers=False)


def tell(store: TCPStore, number: int, attempt_id: int) -> None:
    """Say, as rank 0, which attempt the gang's job of this number is."""
    store.set(_job(number), str(attempt_id))


def hear(store: TCPStore, number: int) -> int:
    """The attempt that rank 0 says. Waits for it; raises DistNetworkError where rank 0 is gone."""
    while True:
        try:
            return int(store.get(_job(number)))
        except dist.DistStoreError:  # rank 0 has had nothing to say for as long as the store waits
            continue


def _job(number: int) -> str:
    return f"caddie/job/{number}"


def _threads(gang: GangConfig) -> int:
    """Intra-op threads of a rank: one on CPUs, where a rank is placed as one core; a GPU rank's share of the host."""
    if gang.device == "cpu":
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // gang.ranks))
