"""What an attempt trains on, and how fast that does a fixed piece of work: what makes its timing comparable."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from worker.report import Hardware
from worker.world import World

PIECES = 9  # the probe is the median of these
PRODUCTS = 8  # matrix products of a piece, which takes about 2 ms on an H100 and 0.4 ms on a core
GPU_WIDTH, CPU_WIDTH = 4096, 128
NVML_CLOCK_SM = 1

Result = TypeVar("Result")


def observed(world: World, work: Callable[[], Result]) -> tuple[Result, Hardware]:
    """What the work returns, and the hardware that it ran on, probed before and after it. Every rank takes part.

    The probes draw no random number and leave nothing behind: the work computes what it would have without them.
    """
    before = _probe(world.device)
    result = work()
    after = _probe(world.device)
    device = _gpu() if world.device.type == "cuda" else _processor()
    clocks = _by_rank(world, device.clock_mhz or 0.0)
    return result, Hardware(
        device=device.model, node=platform.node(), node_devices=device.of_node, ranks=world.ranks,
        clocks_mhz=clocks if all(clocks) else (), clock_limit_mhz=device.limit_mhz,
        torch=str(torch.__version__), cuda=torch.version.cuda if world.device.type == "cuda" else None,
        probe_seconds=_by_rank(world, before), probe_after_seconds=_by_rank(world, after),
    )  # fmt: skip


def _probe(device: torch.device) -> float:
    """Seconds of a piece of work that is the same for every spec: square matrix products in training's own dtype."""
    on_gpu = device.type == "cuda"
    width, dtype = (GPU_WIDTH, torch.bfloat16) if on_gpu else (CPU_WIDTH, torch.float32)
    own = torch.Generator(device).manual_seed(0)  # training's random numbers stay where they were
    matrix = torch.randn(width, width, generator=own, device=device).to(dtype)
    product = torch.empty_like(matrix)

    def piece() -> float:
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(matrix, matrix, out=product)
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    piece()  # the first one waits for what was queued before, and loads what it needs
    return median(piece() for _ in range(PIECES))


def _by_rank(world: World, value: float) -> tuple[float, ...]:
    """Every rank's value, on every rank."""
    return world.total(*(value if rank == world.rank else 0.0 for rank in range(world.ranks)))


class _Device(NamedTuple):
    """A rank's device: its model, how many of them its node has, and its clock now and at most, where that is known."""

    model: str
    of_node: int
    clock_mhz: float | None
    limit_mhz: float | None


def _processor() -> _Device:
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())  # of the first core
    except OSError:  # not Linux
        pass
    try:
        limit_khz = float(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text())
    except OSError:  # a virtual machine's host does not say
        limit_khz = 0.0
    model = facts.get("model name") or platform.processor() or platform.machine()
    return _Device(model, os.cpu_count() or 1, float(facts.get("cpu MHz", 0)) or None, limit_khz / 1000 or None)


def _gpu() -> _Device:
    """The current GPU. The driver's own library says what torch asks another package for, and shows the whole node."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    handle, count, clock, limit = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        refused = (
            nvml.nvmlInit_v2(),
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)),
            nvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}".encode(), ctypes.byref(handle)),
            nvml.nvmlDeviceGetClockInfo(handle, NVML_CLOCK_SM, ctypes.byref(clock)),
            nvml.nvmlDeviceGetMaxClockInfo(handle, NVML_CLOCK_SM, ctypes.byref(limit)),
            nvml.nvmlShutdown(),
        )
    except (OSError, AttributeError):  # no such library, or one without these functions
        return _Device(found.name, torch.cuda.device_count(), None, None)
    if any(refused):
        return _Device(found.name, torch.cuda.device_count(), None, None)
    return _Device(found.name, count.value, float(clock.value), float(limit.value))
