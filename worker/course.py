"""The course of one training: how far it has come, and its clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from worker.schedule import Progress
from worker.spec import TrialSpec


class Course:
    """Training's progress so far. One that goes on from a checkpoint keeps the seconds and steps of the one before."""

    def __init__(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._step_seconds: list[float] = []
        self.progress = Progress()

    @property
    def fraction(self) -> float:
        """The share of the budget that is spent. From 1 on, training is over."""
        return self.progress.fraction(self._spec.budget)

    @property
    def last_step_seconds(self) -> float:
        return self._step_seconds[-1]

    def spent(self) -> tuple[int, int, float, float]:
        """Steps, tokens, seconds, and the median of a step's seconds."""
        progress = self.progress
        return progress.steps, progress.tokens, progress.seconds, median(self._step_seconds)

    def advance(self, seconds: float) -> Progress:
        """Take in a step that ended after so many seconds of training."""
        before = self.progress
        self._step_seconds.append(seconds - before.seconds)
        self.progress = Progress(before.steps + 1, seconds, before.tokens + self._spec.data.batch_tokens)
        return self.progress

    def state_dict(self) -> dict[str, Any]:
        # A tensor, since a million floats take seconds to be read one by one.
        return {
            "progress": asdict(self.progress),
            "step_seconds": torch.tensor(self._step_seconds, dtype=torch.float64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.progress = Progress(**state_dict["progress"])
        self._step_seconds = state_dict["step_seconds"].tolist()


class Stopwatch:
    """Seconds since it was made and `seconds` before it, without those spent inside `paused`."""

    def __init__(self, device: torch.device, clock: Callable[[], float], seconds: float) -> None:
        self._device, self._clock = device, clock
        self._start = self._now() - seconds

    def seconds(self) -> float:
        """Of a GPU, those of its host, which may be some steps ahead."""
        return self._clock() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = self._now()
        yield
        self._start += self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
