"""The records of a training run: steps.csv, metrics.csv, TensorBoard, experiment trackers and the progress bar."""

import importlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.config import GROUPS, config_from_dict
from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.core.files import fingerprint, sync
from ldm.core.schema import identity
from ldm.core.tables import csv_lines, read_whole_lines, write_csv
from ldm.training.saving import Progress
from ldm.training.steps import TrainingStep

log = logging.getLogger(__name__)

LOSSES = ("train_loss", "val_loss", "val_cosine", "val_lesion_loss", "val_lesion_cosine")
METRICS = ("epoch", "step", *LOSSES, "items_per_second")
PROJECT = "medsoft"  # of the experiment trackers, unless their own environment variable names one
STEPS = ("epoch", "step", "loss", *(f"lr_{g}" for g in GROUPS), *(f"grad_norm_{g}" for g in GROUPS), "items_per_second")


def check_loggers(names: Sequence[str]) -> None:
    """UsageError for an experiment tracker that is not installed; nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"training.loggers: {name} is not installed; `pip install {name}`, or leave it out of training.loggers"
            )


class Wandb:
    """A run in Weights & Biases or in trackio, whose functions are the same. A resumed run goes on in its own run."""

    def __init__(self, name: str, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        self.module: Any = importlib.import_module(name)
        place: dict[str, Any] = {}
        if name == "wandb":  # which else sends what is printed, the command line with its paths, and the machine's name
            silent = self.module.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
            place = {"id": key, "dir": str(folder), "settings": silent}
        project = os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT
        title = folder.name if name == "wandb" else f"{folder.name}-{key}"  # by which trackio knows a run again
        self.module.init(project=project, name=title, config=dict(settings), resume="allow", **place)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class MLflow:
    """A run in MLflow; each start of the command is one of its own, and all starts of a run have its tag."""

    def __init__(self, name: str, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        self.module: Any = importlib.import_module(name)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self.module.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self.module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        unsaid = {"mlflow.user": "unknown", "mlflow.source.name": "ver_train.py"}  # else login and script's path
        self.module.start_run(run_name=folder.name, tags={"medsoft.run": key, **unsaid})
        flat = {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}
        self.module.log_params({name: str(value)[:250] for name, value in flat.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.module.end_run()


class Trackers:
    """The experiment trackers of ``training.loggers``, told what TensorBoard is told in numbers: no image, no path.

    One that fails is dropped with a warning, for the CSV files have all the numbers.
    """

    def __init__(self, names: Sequence[str], folder: Path, metadata: Mapping[str, Any]) -> None:
        """``metadata``: what the run's checkpoints say of themselves; its settings are told, and name the run."""
        self.names, self.folder = names, folder
        self.settings = identity(config_from_dict(metadata["config"], str(folder)), "weights") if names else {}
        self.key = fingerprint([self.settings, metadata.get("inputs")])[:16]
        self.open_ones: dict[str, Wandb | MLflow] = {}

    def open(self) -> None:
        """Begin the runs, or go on with them."""
        for name in self.names:
            with self._dropped(name):
                self.open_ones[name] = (MLflow if name == "mlflow" else Wandb)(
                    name, self.folder, self.key, self.settings
                )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, of optimizer step ``step``."""
        for name, tracker in list(self.open_ones.items()):
            with self._dropped(name):
                tracker.log(values, step)

    def close(self) -> None:
        """No more numbers."""
        for name, tracker in list(self.open_ones.items()):
            with self._dropped(name):
                tracker.close()

    @contextmanager
    def _dropped(self, name: str) -> Iterator[None]:
        """Whatever the block raises, a warning says so, and the tracker ``name`` is told no more."""
        try:
            yield
        except Exception as error:  # of a package that is none of ours
            text = "warning: training.loggers: %s failed (%s); the run goes on without it"
            log.warning(text, name, first_line(error))
            self.open_ones.pop(name, None)


class Records:
    """One row of ``steps.csv`` per optimizer step and one of ``metrics.csv`` per epoch, both also for TensorBoard.

    Only the first process writes; elsewhere all calls do nothing. ``step`` counts optimizer steps from 1; loss is the
    mean over the global batch. A resumed run drops the rows beyond the checkpoint it starts from, so each step stands
    there once.
    """

    def __init__(self, folder: Path, stage: str, writes: bool, trackers: Trackers) -> None:
        self.folder, self.stage, self.writes, self.trackers = folder, stage, writes, trackers
        self.bar: tqdm | None = None

    def open(self, step: int, steps_in_all: int) -> None:
        """Training goes on after optimizer step ``step``."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        # Before anything is opened: a table that is of no use is refused.
        _rows_until(self.folder / "metrics.csv", "epoch", 0)
        kept = _rows_until(self.folder / "steps.csv", "step", step)
        if len(kept) < step:
            text = "warning: %s: has rows of %d of the %d steps that were taken; the others are lost"
            log.warning(text, self.folder / "steps.csv", len(kept), step)
        self.trackers.open()
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
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
                self._write(step, items / elapsed, self.bar)
            self.bar.update(steps[-1].step - self.bar.n)

    def _write(self, step: TrainingStep, items_per_second: float, bar: tqdm) -> None:
        loss = sum(loss for loss, _ in step.batches) / len(step.batches)
        row = {"epoch": step.epoch, "step": step.step, "loss": loss}
        row |= {f"lr_{name}": value for name, value in step.learning_rates.items()}
        row |= {f"grad_norm_{name}": value for name, value in step.grad_norms.items()}
        row["items_per_second"] = items_per_second
        with self._writing():
            self.rows.write(csv_lines([{key: repr(value) for key, value in row.items()}], STEPS))
            self.rows.flush()
        self._tell({f"train/{name}": row[name] for name in STEPS[2:] if name in row}, step.step)
        bar.set_postfix(epoch=step.epoch, loss=f"{loss:.4f}", refresh=False)

    def keep(self) -> None:
        """Have the disk keep the rows so far: after a power cut ``last.ckpt`` must not know of steps they lack."""
        if self.bar is not None:
            with self._writing():
                sync(self.rows.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An OSError in the block becomes a MedSoftError."""
        try:
            yield
        except OSError as error:
            raise MedSoftError(
                f"{self.folder / 'steps.csv'}: could not be written ({error.strerror or error}); the last checkpoint "
                "is kept, and the same command goes on from there"
            ) from error

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
        self._tell({f"epoch/{name}": row[name] for name in LOSSES if not math.isnan(row[name])}, progress.step)
        self.board.flush()
        text = ", ".join(f"{key} {row[key]:.4f}" for key in LOSSES if not math.isnan(row[key]))
        tqdm.write(f"epoch {row['epoch']}, step {row['step']}: {text}")

    def _tell(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.trackers.log(values, step)

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
            self.trackers.close()


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the CSV, replacing rows of that epoch or later ones (left by a run that was interrupted)."""
    rows = _rows_until(path, "epoch", int(row["epoch"]) - 1)
    shown = {
        key: str(value) if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"
        for key, value in row.items()
    }
    write_csv(path, [*rows, shown], METRICS)


def _rows_until(path: Path, column: str, last: int) -> list[dict[str, str]]:
    """The rows of a table that an earlier start has written, down to ``last`` in ``column``.

    MedSoftError for a file in which that is no number: it is another one, or somebody has changed it.
    """
    try:
        return [row for row in read_whole_lines(path) if int(row[column]) <= last]
    except (KeyError, TypeError, ValueError) as error:
        expected = f"rows as this command writes them, with a whole number under {column}"
        raise MedSoftError(
            f"{path}: expected {expected}, found others; move it away, then run the same command"
        ) from error
