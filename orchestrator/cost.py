"""What an attempt costs: its seconds, those of its GPUs, and dollars."""

from collections.abc import Mapping
from dataclasses import dataclass

from worker.spec import GangConfig

QUEUE, IDLE, STORE = "queue", "idle", "store"
FREE = frozenset({QUEUE, STORE})
"""The phases that hold no GPU: its ranks are at another attempt, or at none."""


@dataclass(frozen=True)
class Cost:
    """Seconds of attempts; `gpu_seconds` are those of each GPU."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    dollars: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.gpu_seconds + other.gpu_seconds, self.dollars + other.dollars)


def cost_of(phase_seconds: Mapping[str, float], gang: GangConfig, gpu_hour_dollars: float) -> Cost:
    """What an attempt of this gang has cost, by its seconds in each phase."""
    seconds = sum(phase_seconds.values())
    gpu_seconds = held_seconds(phase_seconds) * (gang.ranks if gang.device == "gpu" else 0)
    return Cost(seconds, gpu_seconds, gpu_seconds * gpu_hour_dollars / 3600)


def held_seconds(phase_seconds: Mapping[str, float]) -> float:
    """Seconds in which an attempt held its GPUs."""
    return sum(seconds for phase, seconds in phase_seconds.items() if phase not in FREE)
