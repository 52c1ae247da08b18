"""The records of a training run: steps.csv, metrics.csv, TensorBoard and the progress bar."""

import csv
import io
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from tqdm import tqdm

from ldm.config import GROUPS
from ldm.core.errors import MedSoftError
from ldm.core.files import write_text
from ldm.training.stage import Stage, TrainingStep

log = logging.getLogger(__name__)

METRICS = ("epoch", "step", "train_loss", "val_loss", "val_cosine", "items_per_second")
STEPS = ("epoch", "step", "loss", *(f"lr_{g}" for g in GROUPS), *(f"grad_norm_{g}" for g in GROUPS), "items_per_second")


class Records(pl.Callback):
    """One row of ``steps.csv`` per optimizer step and one of ``metrics.csv`` per epoch, both also for TensorBoard.

    Written by the first process only. ``step`` counts optimizer steps from 1; loss is the mean over the global batch.
    A resumed run drops the rows beyond the checkpoint it starts from, so each step stands there once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loss_sum, self.items = 0.0, 0  # of this epoch, also of its part before an interruption
        self.bar: tqdm | None = None
        self.board: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self.loss_sum, "items": self.items}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum, self.items = state_dict["loss_sum"], state_dict["items"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        self.step = trainer.global_step
        self.clock = self.epoch_clock = time.monotonic()
        self.timed_items = 0
        if not trainer.is_global_zero:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
        kept = [row for row in read_rows(self.folder / "steps.csv") if int(row["step"]) <= self.step]
        write_rows(self.folder / "steps.csv", STEPS, kept)
        self.rows = open(self.folder / "steps.csv", "a", encoding="utf-8")  # noqa: SIM115 (closed when training ends)
        self.bar = tqdm(
            total=int(trainer.estimated_stepping_batches),
            initial=self.step,
            desc=f"training {pl_module.config.training.stage}",
            unit="step",
            mininterval=1,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        """Not called by Lightning when a run goes on inside an epoch."""
        self.loss_sum, self.items, self.timed_items = 0.0, 0, 0
        self.epoch_clock = self.clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        pl_module.update_average()
        if trainer.is_last_batch or pl_module.save_agreed or pl_module.stop_agreed:  # a checkpoint may follow
            pl_module.read(0)
        self._record(pl_module)

    def _record(self, pl_module: Stage) -> None:
        """Write down the steps whose numbers have been read."""
        steps, pl_module.steps = pl_module.steps, []
        if not steps:
            return
        items = sum(count for step in steps for _, count in step.batches)
        elapsed, self.clock = time.monotonic() - self.clock, time.monotonic()
        for step in steps:
            self.loss_sum += sum(loss * count for loss, count in step.batches)
        self.items += items
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
            self.rows.write(as_csv(STEPS, [{key: repr(value) for key, value in row.items()}]))
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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        if self.bar is None:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "train_loss": self.loss_sum / self.items,
            "val_loss": values.get("val_loss", math.nan),
            "val_cosine": values.get("val_cosine", math.nan),
            "items_per_second": self.timed_items / (time.monotonic() - self.epoch_clock),
        }
        append_metrics(self.folder / "metrics.csv", row)
        for name in METRICS[2:5]:
            if not math.isnan(row[name]):
                self.board.add_scalar(f"epoch/{name}", row[name], trainer.global_step)
        self.board.flush()
        text = ", ".join(f"{key} {row[key]:.4f}" for key in METRICS[2:5] if not math.isnan(row[key]))
        tqdm.write(f"epoch {row['epoch']}, step {row['step']}: {text}")

    def add_picture(self, picture: np.ndarray, step: int) -> None:
        """``picture``: HxWx3 uint8, shown in TensorBoard."""
        self.board.add_image("pictures", picture, step, dataformats="HWC")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Stage, exception: BaseException) -> None:
        with suppress(MedSoftError):  # a full disk has been reported
            self._record(pl_module)  # up to the step that went wrong
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            with suppress(OSError):  # a full disk has been reported
                self.rows.close()
            self.board.close()


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the CSV, replacing rows of that epoch or later ones (left by a run that was interrupted)."""
    rows = [old for old in read_rows(path) if int(old["epoch"]) < row["epoch"]]
    shown = {
        key: str(value) if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"
        for key, value in row.items()
    }
    write_rows(path, METRICS, [*rows, shown])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV; a last line that a crash cut short is left out. Empty if there is no such file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def write_rows(path: Path, names: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write a CSV with its header, atomically."""
    write_text(path, ",".join(names) + "\n" + as_csv(names, rows))


def as_csv(names: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """Lines of a CSV without its header; what a row does not have stays empty."""
    buffer = io.StringIO()
    csv.DictWriter(buffer, names, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
