"""Previews of fixed validation items while a stage trains: pictures/epoch_0004.png."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate

from ldm.config import SamplingConfig
from ldm.core.files import remove_partials
from ldm.data.png import write_png
from ldm.diffusion.noise import image_noise, step_noise
from ldm.networks.sampling import guidance_conditions, sample_latent
from ldm.training.dataset import Batch, StageData
from ldm.training.objectives import semantic_tokens_of
from ldm.training.records import Records
from ldm.training.saving import Progress
from ldm.training.sharding import all_gathered
from ldm.training.stage import Stage

TIMES = 3  # in a run, besides the last epoch
SEED = 0  # the same noise in every run


class Previews:
    """Inpaints the same items with the same noise each time, with the sampler and the guidance of the YAML.

    They are diseased, if any is. A row of the image shows the original, what the network sees of it, and the result.
    """

    def __init__(self, folder: Path, stage: Stage, sampling: SamplingConfig, data: StageData, records: Records) -> None:
        self.folder, self.stage, self.sampling = folder / "pictures", stage, sampling
        self.data, self.records = data, records
        shown = [number for number in range(len(data)) if not data.sample(number).healthy] or range(len(data))
        count = min(stage.training_config.pictures, len(shown))  # evenly spaced in the order of their names
        self.numbers = [shown[place * len(shown) // count] for place in range(count)]
        remove_partials(self.folder)

    def file(self, progress: Progress) -> Path:
        """Where the previews of the epoch that has ended belong."""
        return self.folder / f"epoch_{progress.epoch - 1:04d}.png"

    def due(self, epochs: int, progress: Progress) -> bool:
        """Between two epochs: whether previews are wanted (now and then, and after the last one), and not there yet."""
        wanted = progress.epoch % max(1, epochs // TIMES) == 0 or progress.epoch == epochs
        return bool(progress.epoch) and wanted and not self.file(progress).exists()

    def make(self, progress: Progress, autocast: AbstractContextManager) -> None:
        """Inpaint the items; the process that keeps records writes them."""
        with autocast, self.stage.average.swapped(), all_gathered(self.stage.net), self.stage.uncompiled():
            rows = self.rows()
        if self.records.writes:
            image = (rows.clamp(-1, 1).add(1).mul(127.5).round()).to(torch.uint8).cpu().numpy()
            write_png(self.file(progress), np.ascontiguousarray(image))
            self.records.add_preview(image, progress.step)

    @torch.no_grad()
    def rows(self) -> Tensor:
        """(items * S, 3 * S, 3) in about [-1, 1]."""
        from lightning_fabric.utilities import move_data_to_device

        net, device = self.stage.net, self.stage.device
        items = default_collate([self.data[0, number, 0, 1.0] for number in self.numbers])
        batch: Batch = move_data_to_device(items, device)
        names = [(SEED, sample_id, 0) for sample_id in batch["sample_id"]]
        mask, masked = net.latent_mask(batch["mask"]), batch["masked_latent"]
        semantic = semantic_tokens_of(net, batch, self.stage.training_config.inside)
        original = net.scaled(batch["latent_mean"])  # the posterior's mode
        noise = torch.stack([image_noise(*name, tuple(original.shape[1:])) for name in names]).to(device)
        latent = sample_latent(
            *(net, self.sampling, noise, mask, masked, original),
            guidance_conditions(net, mask, batch["text"], self.stage.empty_text, semantic),
            lambda index: step_noise(index, names, noise),
        )
        columns = [net.decode(value) for value in (original, masked[:, : original.shape[1]], latent)]
        return rearrange(torch.stack(columns).float(), "k b c h w -> (b h) (k w) c")
