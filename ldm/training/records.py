"""The records of a training run: steps.csv, metrics.csv, TensorBoard and the progress bar."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.config import GROUPS
from ldm.core.errors import MedSoftError
from ldm.core.tables import csv_lines, read_whole_lines, write_csv
from ldm.training.saving import Progress
from ldm.training.steps import TrainingStep

log = logging.getLogger(__name__)

LOSSES = ("train_loss", "val_loss", "val_cosine", "val_lesion_loss", "val_lesion_cosine")
METRICS = ("epoch", "step", *LOSSES, "items_per_second")
STEPS = ("epoch", "step", "loss", *(f"lr_{g}" for g in GROUPS), *(f"grad_norm_{g}" for g in GROUPS), "items_per_second")


class Records:
    """One row of ``steps.csv`` per optimizer step and one of ``metrics.csv`` per epoch, both also for TensorBoard.

    Only the first process writes; elsewhere all calls do nothing. ``step`` counts optimizer steps from 1; loss is the
    mean over the global batch. A resumed run drops the rows beyond the checkpoint it starts from, so each step stands
    there once.
    """

    def __init__(self, folder: Path, stage: str, writes: bool) -> None:
        self.folder, self.stage, self.writes = folder, stage, writes
        self.bar: tqdm | None = None

    def open(self, step: int, steps_in_all: int) -> None:
        """Training goes on after optimizer step ``step``."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
        kept = [row for row in read_whole_lines(self.folder / "steps.csv") if int(row["step"]) <= step]
        write_csv(self.folder / "steps.csv", kept, STEPS)
        self.rows = open(self.folder / "steps.csv", "a", encoding="utf-8")  # noqa: SIM115 (closed when training ends)
        self.bar = tqdm(total=steps_in_all, initial=step, desc=f"training {self.stage}", unit="step", mininterval=1)

    def start_epoch(self) -> None:
        """The clock of this epoch's items per second starts."""
        self.clock = self.epoch_clock = time.monotonic()
        self.timed_items = 0

    def add(self, steps: Sequence[TrainingStep]) -> None:
        """Write down steps that followed each other."""
        items = sum(count for step in steps for _, count in step.batches)
        elapsed, self.clock = time.monotonic() - self.clock, time.monotonic()
        self.timed_items += items
        if self.bar is not None:
            for step in steps:
                self._write(step, items / elapsed)
            self.bar.update(steps[-1].step - self.bar.n)

    def _write(self, step: TrainingStep, items_per_second: float) -> None:
        loss = sum(loss for loss, _ in step.batches) / len(step.batches)
        row = {"epoch": step.epoch, "step": step.step, "loss": loss}
        row |= {f"lr_{name}": value for name, value in step.learning_rates.items()}
        row |= {f"grad_norm_{name}": value for name, value in step.grad_norms.items()}
        row["items_per_second"] = items_per_second
        try:
            self.rows.write(csv_lines([{key: repr(value) for key, value in row.items()}], STEPS))
            self.rows.flush()
        except OSError as error:
            raise MedSoftError(
                f"{self.folder / 'steps.csv'}: could not be written ({error.strerror or error}); the last checkpoint "
                "is kept, and the same command goes on from there"
            ) from error
        for name in STEPS[2:]:
            if name in row:
                self.board.add_scalar(f"train/{name}", row[name], step.step)
        self.bar.set_postfix(epoch=step.epoch, loss=f"{loss:.4f}", refresh=False)

    def end_epoch(self, progress: Progress, validated: Mapping[str, float]) -> None:
        """The epoch's row in ``metrics.csv``; ``validated``: what ``Training.validate`` found."""
        if self.bar is None:
            return
        row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": progress.loss_sum / progress.items,
            **validated,
            "items_per_second": self.timed_items / (time.monotonic() - self.epoch_clock),
        }
        append_metrics(self.folder / "metrics.csv", row)
        for name in LOSSES:
            if not math.isnan(row[name]):
                self.board.add_scalar(f"epoch/{name}", row[name], progress.step)
        self.board.flush()
        text = ", ".join(f"{key} {row[key]:.4f}" for key in LOSSES if not math.isnan(row[key]))
        tqdm.write(f"epoch {row['epoch']}, step {row['step']}: {text}")

    def add_preview(self, image: np.ndarray, step: int) -> None:
        """``image``: HxWx3 uint8, shown in TensorBoard."""
        self.board.add_image("pictures", image, step, dataformats="HWC")

    def close(self) -> None:
        """No more rows."""
        if self.bar is not None:
            self.bar.close()
            with suppress(OSError):  # a full disk has been reported
                self.rows.close()
            self.board.close()


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the CSV, replacing rows of that epoch or later ones (left by a run that was interrupted)."""
    rows = [old for old in read_whole_lines(path) if int(old["epoch"]) < row["epoch"]]
    shown = {
        key: str(value) if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"
        for key, value in row.items()
    }
    write_csv(path, [*rows, shown], METRICS)
