"""The numbers of optimizer steps, on their way from the device to the records.

A GPU must not wait for the host between two steps. So the numbers of a step are packed into one tensor, copied without
waiting, and read while the next step is computed. On a CPU they are read before the weights change.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldm.core.devices import on_host
from ldm.core.errors import MedSoftError
from ldm.training.sharding import own_part

log = logging.getLogger(__name__)

T = TypeVar("T")

MOVED_BY = 10  # optimizer steps after which every trained tensor should have moved
MOVED_AT_LEAST = 3  # steps to judge by in a shorter run: behind a layer of zeros gradients begin with the second
SAMPLED = 64  # values of each tensor that are compared to see whether it has moved


class StepStats(NamedTuple):
    """The numbers of one optimizer step, summed over the processes."""

    batches: Tensor  # (batches, 4), a row: mean losses, items, requests to stop, requests to save
    norms: Tensor  # (groups,) of the gradients of each group
    total_norm: Tensor  # () of all gradients

    def pack(self) -> Tensor:
        """One tensor (4 * batches + groups + 1,), float64, so that one copy brings all of it to the host."""
        return torch.cat([self.batches.flatten(), self.norms, self.total_norm[None]]).double()

    @classmethod
    def unpack(cls, packed: Tensor, groups: int) -> "StepStats":
        """What ``pack`` of a step with so many ``groups`` returned."""
        return cls(packed[: -groups - 1].view(-1, 4), packed[-groups - 1 : -1], packed[-1])


@dataclass(eq=False)
class TrainingStep:
    """An optimizer step. The last two entries come with its numbers, later than the others."""

    step: int  # counted from 1
    epoch: int
    learning_rates: dict[str, float]
    own: list[tuple[list[str], Tensor]]  # this process's (sample ids, losses), for each batch of the step
    packed: Callable[[], Tensor]  # waits for the copy of StepStats.pack()
    batches: list[tuple[float, int]] = field(default_factory=list)  # of the global batches: (mean loss, items)
    grad_norms: dict[str, float] = field(default_factory=dict)


class StepQueue:
    """Steps in the order in which they were taken. The host reads their numbers later.

    All processes read the same sums, so they agree on what one of them requests: ``stop_requested`` and
    ``save_requested`` are true in all of them after the same step.
    """

    def __init__(self, groups: Iterable[str], world_size: int, scaled: bool) -> None:
        """``scaled``: a gradient scaler skips steps with gradients that are not finite."""
        self.groups, self.world_size, self.scaled = list(groups), world_size, scaled
        self.batches: list[tuple[list[str], Tensor, Tensor]] = []  # since the last step: (ids, losses, summed row)
        self.pending: deque[TrainingStep] = deque()
        self.done: list[TrainingStep] = []  # read, and not yet taken
        self.stop_requested = self.save_requested = False

    def add_batch(self, sample_ids: list[str], losses: Tensor, row: Tensor) -> None:
        """A batch of the step to come: this process's samples, and a row of StepStats.batches."""
        self.batches.append((sample_ids, losses.detach(), row))

    def close_step(
        self, step: int, epoch: int, learning_rates: dict[str, float], norms: Mapping[str, Tensor], total: Tensor
    ) -> None:
        """The batches since the last call make up ``step``."""
        stats = StepStats(torch.stack([row for *_, row in self.batches]), torch.stack([*norms.values()]), total)
        own = [(ids, losses) for ids, losses, _ in self.batches]
        self.pending.append(TrainingStep(step, epoch, learning_rates, own, on_host(stats.pack())))
        self.batches = []

    def read(self, behind: int = 0) -> None:
        """Read the numbers of all steps but the last ``behind``; MedSoftError where one is not finite."""
        while len(self.pending) > behind:
            step = self.pending.popleft()
            stats = StepStats.unpack(step.packed(), len(self.groups))
            for loss, items, stop, save in stats.batches.tolist():
                step.batches.append((loss / self.world_size, int(items)))
                self.stop_requested |= stop > 0
                self.save_requested |= save > 0
            step.grad_norms = dict(zip(self.groups, stats.norms.tolist(), strict=True))
            self._refuse_not_finite(step, float(stats.total_norm))
            self.done.append(step)

    def take(self) -> list[TrainingStep]:
        """The steps that were read since the last call."""
        done, self.done = self.done, []
        return done

    def _refuse_not_finite(self, step: TrainingStep, norm: float) -> None:
        """MedSoftError if a loss of the global batches or the ``norm`` of all gradients is not finite."""
        wrong = next((loss for loss, _ in step.batches if not math.isfinite(loss)), None)
        if wrong is not None:
            each = [(name, value) for ids, found in step.own for name, value in zip(ids, found, strict=True)]
            what, ids = f"the loss became {wrong}", [name for name, value in each if not torch.isfinite(value)]
        elif not math.isfinite(norm) and not self.scaled:
            what, ids = f"a gradient became {norm}", [name for ids, _ in step.own for name in ids]
        else:
            return
        shown = [name for share in of_everyone(ids) for name in share][:4]
        raise MedSoftError(
            f"{what} in step {step.step} (samples {', '.join(shown)}); the last good checkpoint is kept. "
            "Lower training.rates, or look at these samples"
        )


def of_everyone(value: T) -> list[T]:
    """The ``value`` that each process calls this with."""
    if not torch.distributed.is_initialized():
        return [value]
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, value)
    return shares


class MovementWatch:
    """Warns once, after the first steps, of trained tensors that had no gradient or whose values have not moved."""

    def __init__(self, groups: Mapping[str, Mapping[str, nn.Parameter]], first_step: int) -> None:
        self.groups, self.first = groups, first_step
        self.trained = {key: value for members in groups.values() for key, value in members.items()}
        self.silent = set(self.trained)
        self.before: dict[str, Tensor] | None = {key: _sampled(value) for key, value in self.trained.items()}

    def look_at_gradients(self) -> None:
        """Before an optimizer step."""
        if self.before is not None:
            grads = {key: self.trained[key].grad for key in self.silent}
            self.silent = {key for key, grad in grads.items() if grad is None or not own_part(grad).any()}

    def look_at_weights(self, step: int, last: bool = False) -> None:
        """After optimizer step ``step``, the ``last`` one of the run or not."""
        if self.before is None or step - self.first < (MOVED_AT_LEAST if last else MOVED_BY):
            return
        still = {key for key, old in self.before.items() if torch.equal(old, _sampled(self.trained[key]))}
        self.before = None
        # A process may hold an empty part of a tensor that is shared out: what counts is what all of them say.
        silent, still = (set.intersection(*of_everyone(keys)) for keys in (self.silent, still))
        for name, members in self.groups.items():
            for what, keys in (("had no gradient", silent), ("have not moved", still)):
                found = [key for key in members if key in keys]
                if found:
                    log.warning(
                        "warning: %s: %d of %d trained tensors %s in the first %d steps, for instance %s",
                        *(name, len(found), len(members), what, step - self.first, found[0]),
                    )


def _sampled(value: Tensor) -> Tensor:
    flat = own_part(value.detach()).flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()
