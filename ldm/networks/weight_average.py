"""The exponential moving average of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARM_UP = 10  # steps: the average follows closely at first, when it holds the starting weights


class WeightAverage:
    """Follows ``weights`` with ``average = d * average + (1 - d) * weights``, d = min(decay, step / (10 + step)).

    With a decay of 0 there is no average: ``values`` is empty, and ``swapped`` shows the weights as they are.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.values = {key: value.detach().clone() for key, value in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer step ``step``, counted from 1."""
        if self.values:
            decay = min(self.decay, step / (WARM_UP + step))
            torch._foreach_lerp_(list(self.values.values()), list(self.weights.values()), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The block sees the average, if there is one, in the place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for key, value in self.values.items():
            parameter = self.weights[key]
            parameter.data, self.values[key] = value, parameter.data

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over stored ``values``, on the device and in the memory layout of the weights."""
        self.values = {key: laid_as(self.weights[key], values[key]) for key in self.values}


def laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` on the device and in the memory layout of ``parameter``."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
