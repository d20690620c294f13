"""What a warm process holds between jobs, and the floor that it should come back to after each. Torch-free."""

import ctypes
import re
from pathlib import Path

MEBIBYTE = 2**20
WARMING_JOBS = 2
"""The first job loads what is loaded on demand, and the second what caches and threads keep. Measured on a CPU: 223 MiB
after the first real trial, 224 after the sixth, and 224 after two hundred of fourteen recipes."""
HOST_TOLERANCE_BYTES = 256 * MEBIBYTE
HOST_TOLERANCE = 0.25
"""As a share of the floor. What may stay beside the floor: graphs of the compiler, 10 MiB each for four layers, another
dataset's tokens, a library that only one recipe needs, an artifact that nobody has fetched yet."""
STORING_BYTES = 1024 * MEBIBYTE
"""More while an artifact is being written: zstd at level 22 takes 394 MiB for 17 million symbols, and the weights are
there twice, to be compared."""
DEVICE_TOLERANCE_BYTES = 64 * MEBIBYTE
"""Tensors are counted to the byte; what may come later are the workspaces of cuBLAS, 32 MiB each on Hopper."""


class Floor:
    """The level of this process's memory once it is warm, and by how much the last job has left it exceeded."""

    def __init__(self) -> None:
        self.excess = ""
        """What is held above the floor, in words; empty while that is within tolerance."""
        self._jobs = 0
        self._host: int | None = None
        self._device = 0

    def job_ended(self, device_bytes: int, *, storing: bool = False) -> None:
        """Take the level after a job has released what it held, when tensors hold so much of this process's GPU.

        `storing` says that an artifact is still being written, whose memory stays until it is.
        """
        self._jobs += 1
        if self._jobs < WARMING_JOBS:
            return
        if self._jobs == WARMING_JOBS:
            trim()
            self._host, self._device = host_bytes(), device_bytes
        self.excess = self._host_excess(storing) or _above("GPU", device_bytes, self._device, DEVICE_TOLERANCE_BYTES)

    def _host_excess(self, storing: bool) -> str:
        if self._host is None:
            return ""
        tolerance = max(HOST_TOLERANCE_BYTES, int(HOST_TOLERANCE * self._host)) + STORING_BYTES * storing
        if not _above("host", host_bytes() or 0, self._host, tolerance):
            return ""
        trim()  # on suspicion only: it takes 3 to 90 ms, as long as a whole change of trials may
        return _above("host", host_bytes() or 0, self._host, tolerance)


def host_bytes() -> int | None:
    """What this process alone holds of the host's memory, swapped out or not; None where the system does not tell.

    Anonymous memory: files that are mapped, as shards are, belong to the page cache and go when they must.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    kilobytes = [int(count) for count in re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+) kB$", status, re.MULTILINE)]
    return 1024 * sum(kilobytes) if kilobytes else None


def trim() -> None:
    """Give back to the system what malloc keeps for reuse, where it can (glibc): up to twice the floor otherwise."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _above(what: str, held: int, floor: int, tolerance: int) -> str:
    if held <= floor + tolerance:
        return ""
    return f"it keeps {(held - floor) // MEBIBYTE} MiB of {what} memory above its floor of {floor // MEBIBYTE} MiB"
