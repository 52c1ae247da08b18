"""Several processes that share one list of work, started by Lightning's own launcher (Fabric)."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ldm.core.devices import RANKS, is_first_process
from ldm.core.errors import UsageError, first_line
from ldm.core.tables import counted

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts the processes itself


def fabric_class() -> "type[Fabric]":
    """Lightning's Fabric. It asks for the version of torchmetrics, whose import takes longer than torch's: here it
    finds none."""
    hidden = not sys.modules.keys() & {"torchmetrics", "lightning_fabric"}
    if hidden:
        sys.modules["torchmetrics"] = None  # type: ignore[assignment]
    try:
        from lightning_fabric import Fabric
    finally:
        if hidden:
            del sys.modules["torchmetrics"]
    return Fabric


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


def check_tasks(devices: int | str, num_nodes: int) -> None:
    """UsageError unless as many tasks were started as ``devices`` on ``num_nodes`` need.

    ``devices``: a number, or what Fabric takes instead of one (auto, -1, a list of GPUs). torchrun and SLURM
    start one task for each device. More of them would all do the whole work, into the same folder; fewer would wait for
    those that never come. Without a launcher this process starts the others.
    """
    wanted, given = _number(devices), os.environ
    if wanted is None:
        return  # Fabric says what is wrong with it
    expected = wanted * num_nodes
    if "TORCHELASTIC_RUN_ID" in given:
        launcher, tasks, here = "torchrun --nproc_per_node", given["WORLD_SIZE"], given.get("LOCAL_WORLD_SIZE")
    elif "SLURM_NTASKS" in given and given.get("SLURM_JOB_NAME") not in INTERACTIVE:
        launcher, tasks, here = "srun --ntasks-per-node", given["SLURM_NTASKS"], given.get("SLURM_NTASKS_PER_NODE")
    elif "WORLD_SIZE" in given:  # a task that Lightning or somebody else has started
        launcher, tasks, here = "torchrun --nproc_per_node", given["WORLD_SIZE"], None
    else:
        launcher, tasks, here, expected = "", given.get("SLURM_STEP_NUM_TASKS", "1"), None, 1
    says = f"--devices says {wanted}" + (f" and --num_nodes {num_nodes}" if num_nodes > 1 else "")
    if int(tasks) != expected or (here and expected > 1 and int(here) != wanted):
        started = "1 task was" if tasks == "1" else f"{tasks} tasks were"
        each = min(int(here or tasks), int(tasks))
        nodes = int(tasks) // each
        fitting = f"--devices {each}" + (f" --num_nodes {nodes}" if nodes > 1 else "")
        cure = f"start {wanted} with {launcher}={wanted}, or give {fitting}" if launcher else "start one"
        raise UsageError(f"{started} started, {says}; {cure}")
    if launcher.startswith("srun") and expected > 1 and not here:
        raise UsageError(
            f"--ntasks={tasks} leaves open how many tasks a machine runs; give {launcher}={wanted} instead of it"
        )
    if wanted * num_nodes == 1 and not is_first_process():
        raise UsageError(f"this is one of several tasks ({', '.join(RANKS)}), {says}; start one, or more --devices")


def _number(devices: int | str) -> int | None:
    """How many devices of one machine these are; None for what is no number of devices."""
    text = str(devices)
    if text in ("auto", "-1"):
        return torch.cuda.device_count() or 1
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() and int(text) > 0 else None


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
        raise UsageError(f"--device {device}: {first_line(error)}") from error
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"--devices {devices}: this machine has {counted(torch.cuda.device_count(), 'GPU')}")
    if not several:
        return Processes(device=device)
    if ":" in device:
        raise UsageError(f"--device {device}: with several processes give cuda without a number")
    launcher = fabric_class()
    from lightning_fabric.strategies import DDPStrategy

    # A process that is done waits for the slowest one.
    strategy = DDPStrategy(timeout=timedelta(days=7))
    fabric = launcher(accelerator=kind, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    return Processes(fabric.global_rank, fabric.world_size, str(fabric.device))
