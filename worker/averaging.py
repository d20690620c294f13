"""Averages of the weights over training: exponential (EMA) and of snapshots (SWA)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from worker.model import Model
from worker.spec import AveragingConfig


class Averages:
    """EMA: e ← d·e + (1 - d)·w after every step, from the initial weights. SWA: the mean of the snapshots so far.

    In fp32, beside the weights, of every parameter: gates of blends too, which one source copies instead.
    """

    def __init__(self, model: Model, config: AveragingConfig) -> None:
        self._config = config
        self._parameters = dict(model.named_parameters())
        self._ema = _copies(self._parameters.values()) if config.ema_decay else []
        self._swa: list[Tensor] = []
        self._snapshots = 0

    @torch.no_grad()
    def update(self, steps: int, multiplier: float) -> None:
        """Take in the weights after `steps` steps, the last of them at this learning-rate multiplier."""
        weights: list[Tensor] = [*self._parameters.values()]
        if self._ema:
            torch._foreach_lerp_(self._ema, weights, 1 - self._config.ema_decay)
        every = self._config.swa_every
        if every and steps % every == 0 and multiplier <= self._config.swa_from:
            self._snapshots += 1
            if self._swa:
                torch._foreach_lerp_(self._swa, weights, 1 / self._snapshots)
            else:
                self._swa = _copies(weights)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """By average, "ema" and "swa", a state dict. One that has no weights is left out: SWA before a snapshot."""
        averages = {"ema": self._ema, "swa": self._swa}
        return {name: dict(zip(self._parameters, each, strict=True)) for name, each in averages.items() if each}

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self._ema, "swa": self._swa, "snapshots": self._snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ema, self._swa = self._placed(state_dict["ema"]), self._placed(state_dict["swa"])
        self._snapshots = state_dict["snapshots"]

    def _placed(self, average: list[Tensor]) -> list[Tensor]:
        """An average, or none, where the parameters are."""
        return [tensor.to(beside.device) for tensor, beside in zip(average, self._parameters.values(), strict=False)]


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
