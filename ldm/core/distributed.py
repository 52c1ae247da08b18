"""Several processes that share one list of work, started by Lightning's own launcher (Fabric)."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ldm.core.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all: its number, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def share(self, value: T) -> T:
        """The first process's ``value``, in every process."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, in the order of their numbers."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


def start_processes(device: str, devices: int, num_nodes: int) -> Processes:
    """One process per device on every node; more than one are started by Lightning (or found: torchrun, SLURM).

    ``device``: auto, cpu, cuda or cuda:N. Raises UsageError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    several = devices * num_nodes > 1
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    if not several:
        return Processes(device=device)
    if ":" in device:
        raise UsageError(f"--device {device}: with several processes give cuda without a number")
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    # A process that is done waits for the slowest one.
    strategy = DDPStrategy(timeout=timedelta(days=7))
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    return Processes(fabric.global_rank, fabric.world_size, str(fabric.device))
