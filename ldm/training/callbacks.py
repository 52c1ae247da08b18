"""What happens around the training steps: checkpoints that are never lost, and an early warning.

The records of the steps are in records.py, the pictures in pictures.py.
"""

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.checkpoints.files import save_pickle
from ldm.checkpoints.fitting import not_finite
from ldm.core.cli import TERMINATED, Terminated
from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file, remove_partials
from ldm.training.stage import Stage

log = logging.getLogger(__name__)

BEST = re.compile(r"best_epoch(\d+)_loss(.+)\.ckpt")
MOVED_BY = 10  # optimizer steps after which every trained tensor should have moved
MOVED_AT_LEAST = 3  # steps to judge by in a shorter run: behind a layer of zeros gradients begin with the second
SAMPLED = 64  # values of each tensor that are compared to see whether it has moved


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through our own safe reader and atomic writer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Weights are written as plain tensors of the CPU, whatever device trains and however it lays them."""
        weights = {key: value.cpu().contiguous() for key, value in checkpoint["state_dict"].items()}
        checkpoint = {**checkpoint, "state_dict": weights}
        with atomic_file(path) as handle:
            save_pickle(checkpoint, handle)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        found = read_checkpoint(path)
        return {**found.rest, "state_dict": found.state, "medsoft": found.about}

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class KeepWork(pl.Callback):
    """``last.ckpt`` at every epoch's end, every few minutes and on SIGTERM; the weights of the best epochs beside it.

    All processes save together, so they also agree when: what one wants is told to all by the next training step.
    """

    def __init__(self, folder: Path, minutes: float, keep_best: int) -> None:
        self.folder, self.seconds, self.keep_best = folder, 60 * minutes, keep_best
        self.path = folder / "last.ckpt"
        self.stopping = False

    def setup(self, trainer: pl.Trainer, pl_module: Stage, stage: str) -> None:
        if trainer.is_global_zero:
            remove_partials(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        self.saved = time.monotonic()

        def asked(signum: int, frame: Any) -> None:
            pl_module.stop_asked = True

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, asked)  # Lightning's own handler exchanges messages inside a signal
        # Which it asks the other processes about before each batch, and waits for their devices.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Stage, batch: Any, batch_idx: int) -> None:
        pl_module.save_asked = trainer.is_global_zero and time.monotonic() - self.saved > self.seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.stopping |= pl_module.stop_agreed
        due = pl_module.save_agreed or self.stopping
        # Between two optimizer steps of an accumulated batch there are gradients that no checkpoint holds.
        if due and (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self._save_inside_epoch(trainer, batch_idx + 1)
            self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        """Killed at any moment, the best weights of the epochs that ``last.ckpt`` has finished lie beside it."""
        loss = float(trainer.callback_metrics.get("val_loss", math.nan))
        if trainer.is_global_zero and self.keep_best and math.isfinite(loss):
            self._refuse_broken(trainer)
            self._keep_if_best(pl_module, trainer.current_epoch, loss)
        self.save(trainer)
        self._drop_worse(trainer)
        self.stopping |= bool(pl_module.summed(torch.tensor([float(pl_module.stop_asked)], device=pl_module.device))[0])
        self._stop()

    def _stop(self) -> None:
        if self.stopping:
            log.info("asked to stop: %s is saved; the same command goes on from there", self.path)
            raise Terminated(TERMINATED)

    def save(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``, unless the step just taken has broken the weights: then stop, and keep the old file."""
        self._refuse_broken(trainer)
        trainer.save_checkpoint(self.path)
        self.saved, trainer.lightning_module.save_agreed = time.monotonic(), False

    def _refuse_broken(self, trainer: pl.Trainer) -> None:
        bad = not_finite(trainer.lightning_module.trained)
        if bad:
            raise MedSoftError(
                f"{bad[0]} holds NaN or infinite values after step {trainer.global_step}; the last good checkpoint is "
                "kept. Lower training.rates, or set training.clip_norm"
            )

    def _save_inside_epoch(self, trainer: pl.Trainer, batches: int) -> None:
        """Save with the batch that just ended counted as done: Lightning counts it only after this hook."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        kept = progress.current.completed, progress.total.completed
        progress.current.completed, progress.total.completed = batches, progress.total.processed
        self.save(trainer)
        progress.current.completed, progress.total.completed = kept

    def finish(self, trainer: pl.Trainer) -> None:
        """The finished ``last.ckpt``: weights only (their moving average, if there is one), marked complete."""
        stage = trainer.lightning_module
        stage.about["complete"] = True
        if trainer.is_global_zero:
            self._write_weights(self.path, stage, trainer.global_step, trainer.current_epoch)
        self._drop_worse(trainer)
        trainer.strategy.barrier()

    def _write_weights(self, path: Path, stage: Stage, step: int, epoch: int) -> None:
        about = {**stage.about, "step": step, "epoch": epoch, "averaged": stage.average is not None}
        with stage.averaged():
            AtomicCheckpointIO().save_checkpoint({"state_dict": stage.state_dict(), "medsoft": about}, path)

    def _keep_if_best(self, stage: Stage, epoch: int, loss: float) -> None:
        """Write this epoch's weights if they are among the best so far."""
        mine = self.folder / f"best_epoch{epoch:04d}_loss{loss:.6g}.ckpt"
        if mine in _best_first({*best_files(self.folder), mine})[: self.keep_best] and not mine.exists():
            self._write_weights(mine, stage, stage.global_step, epoch)

    def _drop_worse(self, trainer: pl.Trainer) -> None:
        """Delete the weights of epochs that are no longer among the best."""
        if trainer.is_global_zero and self.keep_best:
            for path in best_files(self.folder)[self.keep_best :]:
                path.unlink(missing_ok=True)


def _best_loss(path: Path) -> float | None:
    matched = BEST.fullmatch(path.name)
    return float(matched.group(2)) if matched else None


def _best_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (_best_loss(path), path.name))


def best_files(folder: Path) -> list[Path]:
    """The weights of the best epochs in a run's folder, best first."""
    return _best_first(path for path in folder.glob("best_*") if _best_loss(path) is not None)


class WatchMovement(pl.Callback):
    """Warns once, after the first steps, of trained tensors that had no gradient or whose values have not moved."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        self.first = trainer.global_step
        self.silent = set(pl_module.trained)
        self.before: dict[str, Tensor] | None = {key: _sampled(value) for key, value in pl_module.trained.items()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Stage, optimizer: Any) -> None:
        if self.before is not None:
            still = {key for key in self.silent if pl_module.trained[key].grad is None}
            still |= {key for key in self.silent - still if not pl_module.trained[key].grad.any()}
            self.silent = still

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self.first >= MOVED_BY:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        if trainer.global_step - self.first >= MOVED_AT_LEAST:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, stage: Stage) -> None:
        if self.before is None:
            return
        still = {key for key, old in self.before.items() if torch.equal(old, _sampled(stage.trained[key]))}
        self.before = None
        for name, members in stage.groups.items():
            for what, keys in (("had no gradient", self.silent), ("have not moved", still)):
                found = [key for key in members if key in keys]
                if found:
                    log.warning(
                        "warning: %s: %d of %d trained tensors %s in the first %d steps, for instance %s",
                        *(name, len(found), len(members), what, trainer.global_step - self.first, found[0]),
                    )


def _sampled(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()
