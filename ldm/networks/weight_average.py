"""The exponential moving average of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class WeightAverage:
    """Follows ``weights`` with ``average = d * average + (1 - d) * weights``, d = min(decay, step / (warm_up + step)).

    The average starts as a copy of the weights. ``warm_up``, in steps: it follows closely at first, while it still
    holds the starting weights. With a decay of 0 there is no average: ``values`` is empty, and ``swapped`` shows the
    weights as they are.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float, warm_up: int = 10) -> None:
        self.weights, self.decay, self.warm_up = weights, decay, warm_up
        self.values = {key: value.detach().clone() for key, value in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer step ``step``, counted from 1; step 0 takes them over as they are."""
        if self.values:
            decay = min(self.decay, step / max(1, self.warm_up + step))
            torch._foreach_lerp_(list(self.values.values()), list(self.weights.values()), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The block sees the average, if there is one, in the place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, value in self.values.items():  # the contents: others hold on to the memory in which weights lie
            kept = self.weights[key].detach().clone()
            self.weights[key].copy_(value)
            value.copy_(kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over stored ``values``, on the device and in the memory layout of the weights."""
        self.values = {key: laid_as(self.weights[key], values[key]) for key in self.values}


def laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` on the device and in the memory layout of ``parameter``; of one that is shared out among
    processes, this process's part."""
    if isinstance(parameter, DTensor):
        shares = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), *shares, src_data_rank=None)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
