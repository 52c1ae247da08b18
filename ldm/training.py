"""One training stage: the LightningModule, its parameter groups, and the callbacks that keep the work."""

import csv
import io
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint import read_checkpoint
from ldm.config import Config
from ldm.dataset import EpochOrder, StageData
from ldm.diffusion import diffusion_loss
from ldm.encoders import BiomedClip
from ldm.errors import MedSoftError, UsageError
from ldm.files import atomic_file, remove_partials, write_text
from ldm.model import MedSoftModel
from ldm.msc import masked_cosine, msc_loss

log = logging.getLogger(__name__)

METRICS = ("epoch", "step", "train_loss", "val_loss", "val_cosine", "items_per_second")


class Stage(pl.LightningModule):
    """Trains the groups named in ``config.training.rates`` of a MedSoftModel on cached features.

    Its state is the model's own, under the checkpoint's names. What is not trained has no gradients.
    """

    def __init__(self, config: Config, net: MedSoftModel, about: dict[str, Any], empty_text: Tensor | None) -> None:
        super().__init__()
        self.config, self.net, self.about = config, net, about
        self.register_buffer("empty_text", empty_text, persistent=False)
        self.groups = net.groups(list(config.training.rates))
        for name, members in self.groups.items():
            if not members:
                raise UsageError(f"training.rates.{name}: no parameter of the parts {', '.join(net.parts)} is in it")
        net.requires_grad_(False)
        for members in self.groups.values():
            for parameter in members.values():
                parameter.requires_grad_(True)
        if "unet" in net.parts:
            net.unet.activation_checkpointing = config.training.activation_checkpointing

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state, strict=True, assign=assign)

    # ------------------------------------------------------------------------------------------------ losses

    def losses(self, batch: dict[str, Any], dropout: float) -> tuple[Tensor, Tensor | None]:
        """(loss of each sample (B,), cosine on masked patches (B,) or None) for a batch of StageData."""
        if self.config.training.objective == "msc":
            tokens, global_token, soft = self.net.controller_tokens(
                batch["seen"], batch["seen_global"], batch["clip_text"], batch["mask"]
            )
            loss = msc_loss(tokens, batch["true"], global_token, batch["true_global"], soft)
            return loss, masked_cosine(tokens.detach(), batch["true"], soft)
        deviation = torch.exp(0.5 * batch["latent_logvar"])
        latent = self.net.scaled(batch["latent_mean"] + deviation * batch["posterior_noise"])
        t = (batch["t"] * self.net.schedule.timesteps).long()
        noisy = self.net.schedule.add_noise(latent, batch["noise"], t)
        if self.config.training.inside == "true":
            inside = batch["true"]
        else:
            inside, _, _ = self.net.controller_tokens(
                batch["seen"], batch["seen_global"], batch["clip_text"], batch["mask"]
            )
        semantic = self.net.semantic(batch["seen"], inside, batch["mask"])
        kept = (batch["coin"] >= dropout).float()[:, None, None]  # one coin drops text and MSC tokens together
        text = torch.where(kept > 0, batch["text"], self.empty_text)
        mask = self.net.latent_mask(batch["mask"])
        predicted = self.net.predict_noise(noisy, t, mask, batch["masked_latent"], text, semantic * kept)
        return diffusion_loss(predicted, batch["noise"], mask, self.config.training.mask_weight), None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, _ = self.losses(batch, self.config.training.condition_dropout)
        loss = losses.mean()
        if not torch.isfinite(loss):
            wrong = [name for name, value in zip(batch["sample_id"], losses, strict=True) if not torch.isfinite(value)]
            raise MedSoftError(
                f"the loss became {loss.item()} at step {self.global_step} (samples {', '.join(wrong[:4])}); the last "
                "good checkpoint is kept. Lower training.rates, or look at these samples"
            )
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(losses), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses, cosine = self.losses(batch, dropout=0.0)
        self.log("val_loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        if cosine is not None:
            self.log("val_cosine", cosine.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        training = self.config.training
        groups = [
            {"params": list(members.values()), "lr": training.rates[name], "name": name}
            for name, members in self.groups.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
        total = max(1, self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
            if training.schedule == "cosine":
                return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            return warm

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the file says about itself: configuration, stage, step, origin."""
        checkpoint["medsoft"] = {**self.about, "step": self.global_step, "epoch": self.current_epoch}


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through our own safe reader and atomic writer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_file(path) as handle:
            torch.save(checkpoint, handle)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        found = read_checkpoint(path)
        return {**found.rest, "state_dict": found.state, "medsoft": found.about}

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Progress(pl.Callback):
    """One bar over all steps of the run, on the first process only."""

    bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=int(trainer.estimated_stepping_batches),
                initial=trainer.global_step,
                desc=f"training {pl_module.config.training.stage}",
                unit="step",
                mininterval=1,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            self.bar.set_postfix(epoch=trainer.current_epoch, loss=f"{float(outputs['loss']):.4f}", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()


class KeepWork(pl.Callback):
    """``last.ckpt`` at every epoch's end, every few minutes and on SIGTERM; one row of ``metrics.csv`` per epoch."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.seconds = folder, 60 * minutes
        self.path = folder / "last.ckpt"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            remove_partials(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning leaves that out when it resumes inside an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_start = self.saved = time.monotonic()
        self.seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self.seen += len(batch["sample_id"]) * trainer.world_size
        due = time.monotonic() - self.saved > self.seconds or trainer.received_sigterm
        # Between two optimizer steps of an accumulated batch there are gradients that no checkpoint holds.
        if due and (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self.save_inside_epoch(trainer, batch_idx + 1)

    def save(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``, unless the step just taken has broken the weights: then stop, and keep the old file."""
        for key, parameter in trainer.lightning_module.net.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise MedSoftError(
                    f"{key} holds NaN or infinite values after step {trainer.global_step}; the last good checkpoint is "
                    "kept. Lower training.rates, or set training.clip_norm"
                )
        trainer.save_checkpoint(self.path)
        self.saved = time.monotonic()

    def save_inside_epoch(self, trainer: pl.Trainer, batches: int) -> None:
        """Save with the batch that just ended counted as done: Lightning counts it only after this hook."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        kept = progress.current.completed, progress.total.completed
        progress.current.completed, progress.total.completed = batches, progress.total.processed
        self.save(trainer)
        progress.current.completed, progress.total.completed = kept

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "train_loss": values.get("train_loss_epoch", math.nan),
            "val_loss": values.get("val_loss", math.nan),
            "val_cosine": values.get("val_cosine", math.nan),
            "items_per_second": self.seen / (time.monotonic() - self.epoch_start),
        }
        if trainer.is_global_zero:
            append_metrics(self.folder / "metrics.csv", row)
            text = ", ".join(f"{key} {row[key]:.4f}" for key in METRICS[2:5] if not math.isnan(row[key]))
            tqdm.write(f"epoch {row['epoch']}, step {row['step']}: {text}")
        self.save(trainer)


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the CSV, replacing rows of that epoch or later ones (left by a run that was interrupted)."""
    rows = []
    if path.is_file():
        rows = [old for old in csv.DictReader(path.read_text().splitlines()) if int(old["epoch"]) < row["epoch"]]
    shown = {
        key: value if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"
        for key, value in row.items()
    }
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, shown])
    write_text(path, buffer.getvalue())


def quiet_lightning() -> None:
    """Keep Lightning's advertising and its remarks on our own, deliberate choices off the screen; warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
        for child in logging.root.manager.loggerDict:
            if child.startswith(name + "."):
                logging.getLogger(child).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*resuming from a checkpoint that ended before the epoch ended.*")


def prompt_features(prompts: set[str], net: MedSoftModel, clip: BiomedClip) -> dict[str, dict[str, Tensor]]:
    """Text states (``text``, with a text encoder) and BiomedCLIP embeddings (``clip_text``) of the distinct prompts."""
    found: dict[str, dict[str, Tensor]] = {}
    for prompt in sorted(prompts):
        found[prompt] = {"clip_text": clip.encode_text([prompt])[0].cpu()}
        if "text" in net.parts:
            with torch.no_grad():
                found[prompt]["text"] = net.cond_stage_model([prompt])[0].cpu()
    return found


def loader(data: StageData, config: Config, shuffle: bool, rank: int = 0, world: int = 1, start: int = 0) -> DataLoader:
    """Batches of one process; ``start`` samples of the first epoch have been seen already."""
    order = EpochOrder(data, config.training, shuffle, rank, world)
    order.start = start
    workers = config.training.workers
    return DataLoader(
        data,
        batch_size=max(1, config.training.batch_size // world),
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def resume_position(checkpoint_rest: dict[str, Any]) -> tuple[int, int]:
    """(epoch, batches of it already done) at which a Lightning checkpoint goes on."""
    loops = checkpoint_rest["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    if batches["is_last_batch"]:
        return loops["epoch_progress"]["current"]["processed"], 0
    return loops["epoch_progress"]["current"]["processed"], batches["current"]["completed"]
