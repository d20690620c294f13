"""Matrix products with stored weights: the one place that sees what enters each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Observer = Callable[[Tensor, Tensor], None]

_observers: list[Observer] = []  # a stack; a context variable would break full-graph compilation


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """While it is open, observer(weight, x) is called for each stored matrix that x (..., fan_in) is multiplied with.

    Once per product: several times in one forward pass for a matrix that several virtual layers share. In eager mode;
    not for threads.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def observe(x: Tensor, *weights: Tensor) -> None:
    """Tell whoever observes that x enters a product with each of the weights."""
    for observer in _observers:
        for weight in weights:
            observer(weight, x)


def project(x: Tensor, *weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """x · Wᵀ in x's dtype, W the weights one below the other, its rows in the order of `rows` where that is given."""
    observe(x, *weights)
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    if rows is not None:
        stacked = stacked.index_select(0, rows)  # not the product's columns, which are more
    return F.linear(x, stacked.to(x.dtype))
