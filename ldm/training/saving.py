"""The checkpoints of a run: ``last.ckpt`` to go on from, and the weights of the best epochs beside it."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint, write_checkpoint
from ldm.checkpoints.fitting import not_finite
from ldm.checkpoints.unfinished import NUMBER, POSITIVE, WHOLE, Unfinished
from ldm.core.errors import MedSoftError
from ldm.networks.weight_average import laid_as
from ldm.training.alignment import NAME as ALIGNMENT
from ldm.training.sharding import gathered, own_part
from ldm.training.stage import Stage
from ldm.training.steps import TrainingStep, of_everyone

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LAST = "last.ckpt"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the shape of their parameter
SCALER = {"scale": POSITIVE, "growth_factor": POSITIVE, "backoff_factor": POSITIVE, "growth_interval": WHOLE}
SCALER |= {"_growth_tracker": WHOLE}  # torch's, of the gradient scaler of 16-mixed
BEST = re.compile(r"best_epoch(\d+)_loss([-+.e\d]+)\.ckpt")


@dataclass
class Progress:
    """How far a run is: it goes on with batch ``batches`` of epoch ``epoch``, both counted from 0."""

    epoch: int = 0
    batches: int = 0
    step: int = 0  # optimizer steps taken
    loss_sum: float = 0.0  # over the items of this epoch
    items: int = 0

    def count(self, steps: Sequence[TrainingStep]) -> None:
        """Add the loss and the items of steps of this epoch."""
        self.loss_sum += sum(loss * items for step in steps for loss, items in step.batches)
        self.items += sum(items for step in steps for _, items in step.batches)

    def end_epoch(self) -> None:
        """The next epoch begins."""
        self.epoch, self.batches, self.loss_sum, self.items = self.epoch + 1, 0, 0.0, 0


@dataclass(frozen=True)
class RunState:
    """What an unfinished ``last.ckpt`` has to go on from, each entry checked against the stage that does."""

    progress: Progress
    weights: dict[str, Tensor]  # all that is trained
    average: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]  # AdamW's, by the number of the parameter
    scaler: dict[str, Any] | None

    @classmethod
    def of(cls, previous: Checkpoint, stage: Stage, batches: int) -> "RunState":
        """MedSoftError, naming file and entry, where one is missing, of another shape or type, or no number.

        ``stage``: before its weights are shared out; ``batches``: of an epoch. Tensors stay where they are, in memory
        mapped from the file.
        """
        saved = Unfinished(previous.path, previous.rest, ", ".join(restarts(previous.path.parent)))
        numbers = {item.name: NUMBER if item.name == "loss_sum" else WHOLE for item in fields(Progress)}
        progress = Progress(**saved.entry("progress", numbers))
        epochs = stage.training_config.max_epochs
        inside = progress.batches < batches and progress.epoch + (progress.batches > 0) <= epochs
        if not inside or progress.items < progress.batches:
            place = f"a place in {epochs} epochs of {batches} batches"
            saved.refuse(f"progress: expected {place}, found {asdict(progress)}")
        model = {key: value for key, value in stage.trained.items() if key not in stage.projection}
        there = {key: previous.state[key] for key in model if key in previous.state}
        weights = saved.fitting("state_dict", model, there) | (saved.entry(ALIGNMENT, stage.projection or None) or {})
        averaged = stage.trained if stage.training_config.ema_decay else None
        listed = previous.rest.get("optimizer_states")
        kept = listed[0] if isinstance(listed, list) and listed else None
        groups: dict[str | None, list[Tensor]] = {name: [*members.values()] for name, members in stage.groups.items()}
        moments = saved.moments("optimizer_states[0]", kept, groups)
        scaler = saved.entry("MixedPrecision", SCALER if "MixedPrecision" in previous.rest else None)
        return cls(progress, weights, saved.entry("average", averaged) or {}, moments, scaler)


class Checkpoints:
    """Writes the checkpoints of one run, and puts the stage and its optimizer where ``state`` says that it ended.

    All processes save together; the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        stage: Stage,
        metadata: dict[str, Any],
        fabric: "Fabric",
        precision: str,
        state: RunState | None,
        source: Checkpoint,
    ) -> None:
        """``metadata``: what every file says about itself, under ``medsoft``. ``state``: what to go on from, if any.

        ``source``: of it every file has what is frozen; FileError while writing where it was changed since it was read.
        Raises MedSoftError, in all processes, where they are told different things of the run.
        """
        self.folder, self.path, self.stage, self.fabric = folder, folder / LAST, stage, fabric
        self.metadata, self.training, self.source = metadata, stage.training_config, source
        # With a gradient scaler a fused step would hide the unscaled gradients.
        self.optimizer = stage.adamw(fused=precision != "16-mixed")
        self.scaler = torch.amp.GradScaler(stage.device.type, enabled=precision == "16-mixed")
        self.progress = Progress()
        if state:
            self._resume(state)
        told = of_everyone((metadata["inputs"], asdict(self.progress)))
        if told.count(told[0]) < len(told):
            steps = ", ".join(str(progress["step"]) for _, progress in told)
            raise MedSoftError(
                f"{self.path}: the processes of this run do not see the same files (they would go on after step "
                f"{steps}); --save_path, --ckpt and the data must lie on a disk that all machines share"
            )
        self.saved = time.monotonic()

    @torch.no_grad()
    def _resume(self, state: RunState) -> None:
        self.progress = state.progress
        for key, parameter in self.stage.trained.items():  # what is frozen is that of the first checkpoint already
            parameter.copy_(laid_as(parameter, state.weights[key]))
        self.stage.average.load(state.average)
        # The moments come in the memory layout of the device that saved them, and whole; copy them into this one's.
        # Nothing may stay that is mapped from the file: as long as it is, the disk keeps the file that is replaced.
        moments = {number: dict(kept, step=kept["step"].clone()) for number, kept in state.moments.items()}
        for number, parameter in enumerate(self.stage.trained.values()):
            if number in moments:
                moments[number] |= {name: laid_as(parameter, moments[number][name]) for name in MOMENTS}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)

    def due(self) -> bool:
        """True when ``training.save_every_minutes`` have passed since the last file."""
        return time.monotonic() - self.saved > 60 * self.training.save_every_minutes

    def save(self, epoch_ended: bool) -> None:
        """Write ``last.ckpt``, unless the step just taken has broken the weights: then stop, and keep the old file."""
        self._refuse_broken()
        optimizer = self.optimizer.state_dict()
        first = self.fabric.is_global_zero
        optimizer["state"] = {number: gathered(kept, first) for number, kept in optimizer["state"].items()}
        state = {"progress": asdict(self.progress), "optimizer_states": [optimizer]}
        if self.stage.projection:
            state[ALIGNMENT] = gathered(self.stage.projection, first)
        if self.stage.average.values:
            state["average"] = gathered(self.stage.average.values, first)
        if self.scaler.is_enabled():
            state["MixedPrecision"] = self.scaler.state_dict()
        self._write(self.path, self.progress.epoch - epoch_ended, state)
        self.fabric.barrier()
        self.saved = time.monotonic()
        if epoch_ended:
            self._drop_worse()

    def keep_if_best(self, loss: float) -> None:
        """Write this epoch's weights if their validation ``loss``, that of ``best_by``, is among the best so far."""
        if not self.training.keep_best or not math.isfinite(loss):
            return
        self._refuse_broken()
        mine = self.folder / f"best_epoch{self.progress.epoch:04d}_loss{loss:.6g}.ckpt"
        kept = best_files(self.folder, mine)
        # Left by a start that was stopped before last.ckpt knew of this epoch; its loss may have been another one.
        stale = [path for path in kept if path != mine and _epoch_of(path) >= self.progress.epoch]
        wanted = mine in [path for path in kept if path not in stale][: self.training.keep_best] and not mine.exists()
        if of_everyone(wanted)[0]:  # the first process knows what it has written and deleted
            self._write(mine, self.progress.epoch)
        if self.fabric.is_global_zero:
            for path in stale:
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The finished ``last.ckpt``: weights only (their moving average, if there is one), marked complete."""
        self.metadata["complete"] = True
        self._write(self.path, self.progress.epoch)
        self._drop_worse()
        self.fabric.barrier()

    def _refuse_broken(self) -> None:
        mine = not_finite({key: own_part(value) for key, value in self.stage.trained.items()})
        bad = [key for found in of_everyone(mine) for key in found]
        if bad:
            raise MedSoftError(
                f"{bad[0]} holds NaN or infinite values after step {self.progress.step}; the last good checkpoint is "
                "kept. Lower training.rates, or set training.clip_norm"
            )

    def _write(self, path: Path, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        """The weights with the ``state`` to go on from; without it their moving average, if there is one."""
        about = {**self.metadata, "step": self.progress.step, "epoch": epoch}
        if not state:
            about["averaged"] = bool(self.stage.average.values)
        first = self.fabric.is_global_zero
        with nullcontext() if state else self.stage.average.swapped():
            weights = self.stage.weights(first)
            if first:
                write_checkpoint(path, weights, about, self.source, **(state or {}))

    def _drop_worse(self) -> None:
        """Delete the weights of epochs that are no longer among the best."""
        if self.fabric.is_global_zero and self.training.keep_best:
            for path in best_files(self.folder)[self.training.keep_best :]:
                path.unlink(missing_ok=True)


def restarts(folder: Path) -> list[str]:
    """What to do where ``last.ckpt`` in a run's folder is of no use, the best first."""
    best = best_files(folder)
    first = [f"--ckpt {best[0]} and another --save_path start from the best kept weights"] if best else []
    return [*first, "--overwrite starts this run again"]


def best_files(folder: Path, *more: Path) -> list[Path]:
    """The weights of the best epochs in a run's folder, and ``more`` that may not be there yet, best first."""
    losses = {path: BEST.fullmatch(path.name) for path in (*folder.glob("best_*"), *more)}
    found = [(float(matched.group(2)), path.name, path) for path, matched in losses.items() if matched]
    return [path for *_, path in sorted(found)]


def _epoch_of(best: Path) -> int:
    matched = BEST.fullmatch(best.name)
    return int(matched.group(1)) if matched else -1
