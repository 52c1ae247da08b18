"""The checkpoints of a run: ``last.ckpt`` to go on from, and the weights of the best epochs beside it."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.checkpoints.checkpoint import Checkpoint, write_checkpoint
from ldm.checkpoints.fitting import not_finite
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


class Checkpoints:
    """Writes the checkpoints of one run, and puts the stage and its optimizer where ``previous`` ended.

    All processes save together; the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        stage: Stage,
        metadata: dict[str, Any],
        fabric: "Fabric",
        precision: str,
        previous: Checkpoint | None,
    ) -> None:
        """``metadata``: what every file says about itself, under ``medsoft``."""
        self.folder, self.path, self.stage, self.fabric = folder, folder / LAST, stage, fabric
        self.metadata, self.training = metadata, stage.training_config
        # With a gradient scaler a fused step would hide the unscaled gradients.
        self.optimizer = stage.adamw(fused=precision != "16-mixed")
        self.scaler = torch.amp.GradScaler(stage.device.type, enabled=precision == "16-mixed")
        self.progress = Progress()
        if previous:
            self._resume(previous)
        self.saved = time.monotonic()

    def _resume(self, previous: Checkpoint) -> None:
        self.progress = Progress(**previous.rest["progress"])
        saved = {**previous.state, **previous.rest.get(ALIGNMENT, {})}
        with torch.no_grad():  # what is frozen is that of the first checkpoint already
            for key, parameter in self.stage.trained.items():
                parameter.copy_(laid_as(parameter, saved[key]))
        self.stage.average.load(previous.rest.get("average") or {})
        kept = previous.rest["optimizer_states"][0]
        # The moments come in the memory layout of the device that saved them, and whole; copy them into this one's.
        for number, parameter in enumerate(self.stage.trained.values()):
            moments = kept["state"].get(number, {})
            moments |= {name: laid_as(parameter, moments[name]) for name in MOMENTS if name in moments}
        self.optimizer.load_state_dict(kept)
        if scaler := previous.rest.get("MixedPrecision"):
            self.scaler.load_state_dict(scaler)

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
        wanted = mine in best_files(self.folder, mine)[: self.training.keep_best] and not mine.exists()
        if of_everyone(wanted)[0]:  # the first process knows what it has written and deleted
            self._write(mine, self.progress.epoch)

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
                write_checkpoint(path, weights, about, **(state or {}))

    def _drop_worse(self) -> None:
        """Delete the weights of epochs that are no longer among the best."""
        if self.fabric.is_global_zero and self.training.keep_best:
            for path in best_files(self.folder)[self.training.keep_best :]:
                path.unlink(missing_ok=True)


def best_files(folder: Path, *more: Path) -> list[Path]:
    """The weights of the best epochs in a run's folder, and ``more`` that may not be there yet, best first."""
    losses = {path: BEST.fullmatch(path.name) for path in (*folder.glob("best_*"), *more)}
    found = [(float(matched.group(2)), path.name, path) for path, matched in losses.items() if matched]
    return [path for *_, path in sorted(found)]
