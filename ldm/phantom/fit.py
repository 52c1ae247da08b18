"""The one training loop of the small world's networks."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Loss = tuple[Tensor, Tensor]  # what is minimised, and another number of the same batch for the log


def fit(
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterable[Batch],
    step: Callable[[Batch], Loss],
    steps: int,
    rate: float,
    *,
    decay: float = 0.0,
    warmup: float = 0.05,
    clip: float | None = 1.0,
) -> Iterator[Loss]:
    """Minimise ``step(batch)`` over ``steps`` batches: AdamW, one cycle up to the learning rate ``rate`` and down.

    ``warmup``: share of the steps in which the rate rises. ``clip``: largest norm of the gradient, None for no limit.
    Yields what ``step`` has returned after each update, so that the caller can average, limit or log.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
    for batch in batches:
        loss, figure = step(batch)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        yield loss.detach(), figure.detach()
