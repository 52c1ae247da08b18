"""Pictures of fixed validation items, drawn now and then while a stage trains: pictures/epoch_0004.png."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate

from ldm.core.files import remove_partials
from ldm.data.png import write_png
from ldm.diffusion.noise import image_noise
from ldm.diffusion.samplers import ddim
from ldm.training.dataset import StageData
from ldm.training.records import Records
from ldm.training.stage import Stage

TIMES = 3  # in a run, besides the last epoch


class PreviewCallback(pl.Callback):
    """Draws the same items with the same noise each time; a row is the original, what is hidden, and the result."""

    def __init__(self, folder: Path, records: Records) -> None:
        self.folder, self.records = folder / "pictures", records

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        if trainer.is_global_zero:
            remove_partials(self.folder)
        self.data: StageData = trainer.val_dataloaders.dataset
        self.numbers = fixed_items(self.data, pl_module.config.training.pictures)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Stage) -> None:
        epoch, epochs = trainer.current_epoch, trainer.max_epochs
        if not trainer.is_global_zero or ((epoch + 1) % max(1, epochs // TIMES) and epoch + 1 < epochs):
            return
        with trainer.precision_plugin.forward_context(), pl_module.averaged(), pl_module.uncompiled():
            rows = self._draw(pl_module)
        picture = (rows.clamp(-1, 1).add(1).mul(127.5).round()).to(torch.uint8).cpu().numpy()
        write_png(self.folder / f"epoch_{epoch:04d}.png", np.ascontiguousarray(picture))
        self.records.add_picture(picture, trainer.global_step)

    @torch.no_grad()
    def _draw(self, stage: Stage) -> Tensor:
        """(items * S, 3 * S, 3) in about [-1, 1]."""
        net, sampling = stage.net, stage.config.sampling
        batch = default_collate([self.data[0, number, 0, 1.0] for number in self.numbers])
        batch = {key: value.to(stage.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        mask, masked, semantic = net.latent_mask(batch["mask"]), batch["masked_latent"], stage.semantic(batch)
        shape = tuple(masked.shape[1:])
        noise = torch.stack([image_noise(0, name, 0, shape) for name in batch["sample_id"]]).to(stage.device)
        empty = stage.empty_text.expand(len(noise), -1, -1)

        def predict(x: Tensor, t: int, index: int) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            drawn = net.predict_noise(x, times, mask, masked, batch["text"], semantic)
            blank = net.predict_noise(x, times, mask, masked, empty, torch.zeros_like(semantic))
            return blank + sampling.guidance_scale * (drawn - blank)

        latent = ddim(predict, noise, net.schedule, sampling.steps)
        columns = [net.decode(value) for value in (net.scaled(batch["latent_mean"]), masked, latent)]
        return rearrange(torch.stack(columns).float(), "k b c h w -> (b h) (k w) c")


def fixed_items(data: StageData, count: int) -> Sequence[int]:
    """``count`` of the diseased samples (of all, without any), evenly spaced in the order of their names."""
    numbers = [number for number in range(len(data)) if not data.sample(number).healthy] or range(len(data))
    return [numbers[place * len(numbers) // min(count, len(numbers))] for place in range(min(count, len(numbers)))]
