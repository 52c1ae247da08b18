"""Condition, sample, decode, composite: lesions inpainted in one batch of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import Config, SamplingConfig
from ldm.core.devices import kernel_layout
from ldm.data.images import composite, to_unit
from ldm.data.preparation import PreparedSample
from ldm.diffusion.noise import image_noise, step_noise
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel, hidden_region, hide
from ldm.networks.msc import ControllerInputs
from ldm.networks.opening import open_model
from ldm.networks.sampling import GuidanceConditions, guidance_conditions, latent_of, sample_latent

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What to inpaint: the names that decide its noise (seed, sample_id, variant) and the prompt."""

    seed: int
    sample_id: str
    variant: int
    prompt: str


@dataclass(frozen=True, eq=False)
class InpaintedImage:
    """One inpainted image.

    pixels: composited, of the original's size and type, or None if the model produced NaN or infinity; generated:
    float32 HxW(x3) in [0, 1], the same before compositing; error: where the first value that is no number appeared.
    """

    pixels: np.ndarray | None = None
    generated: np.ndarray | None = None
    error: str | None = None


class Inpainter:
    """Inpaints with one model and one way of sampling."""

    def __init__(
        self, net: MedSoftModel, encoder: ImageTextEncoder, sampling: SamplingConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.net, self.encoder, self.sampling = net.to(device).eval(), encoder.to(device), sampling
        self.device = torch.device(device)
        for_inference(self.net, DTYPES[sampling.precision])

    @torch.inference_mode()
    def inpaint(self, samples: Sequence[PreparedSample], jobs: Sequence[Job]) -> list[InpaintedImage]:
        """Native-size results. Outside the soft mask's support every pixel equals the original's."""
        image = torch.stack([sample.image for sample in samples]).to(self.device)
        soft_mask = torch.stack([sample.mask for sample in samples]).to(self.device)
        generated, errors = self.generate(image, soft_mask, jobs)  # (B, 3, S, S) in [-1, 1]
        results = []
        for sample, inside, error in zip(samples, generated.cpu(), errors, strict=True):
            if error is not None:
                results.append(InpaintedImage(error=error))
                continue
            square = ((inside + 1) / 2).permute(1, 2, 0).numpy()
            intensity_range = sample.intensity_range
            native = sample.crop_window.backward(square, to_unit(sample.original, intensity_range))
            pixels = composite(sample.original, native, sample.soft, intensity_range)
            results.append(InpaintedImage(pixels, native))
        return results

    def generate(self, image: Tensor, soft_mask: Tensor, jobs: Sequence[Job]) -> tuple[Tensor, list[str | None]]:
        """The model's square before compositing: image (B, 3, S, S), soft_mask (B, 1, S, S) -> (B, 3, S, S).

        With it, for each image, None or where its first value that is no number appeared.
        """
        sampling, net = self.sampling, self.net
        dtype = DTYPES[sampling.precision]
        mask = net.latent_mask(soft_mask)
        masked = latent_of(net, hide(image, soft_mask), dtype)
        original = latent_of(net, image, dtype) if sampling.differential else None
        conditions = self._conditions(image, soft_mask, mask, [job.prompt for job in jobs])
        names = [(job.seed, job.sample_id, job.variant) for job in jobs]
        noise = torch.stack([image_noise(*name, tuple(masked.shape[1:])) for name in names]).to(self.device)
        first_broken = torch.full((len(jobs),), -1, device=self.device)

        def watch(index: int, x: Tensor) -> None:
            broken = ~torch.isfinite(x).flatten(1).all(dim=1) & (first_broken < 0)
            first_broken.masked_fill_(broken, index)

        latent = sample_latent(
            *(net, sampling, noise, mask, masked, original, conditions),
            step_noise=lambda index: step_noise(index, names, noise),
            on_step=watch,
        )
        # The latent is looked at before decoding: that clamps, and would hide infinity as white.
        errors = [f"at sampling step {n + 1} of {sampling.steps}" if n >= 0 else None for n in first_broken.tolist()]
        decoded = net.decode(latent.to(dtype)).float()
        sound = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
        return decoded, [e or (None if ok else "while decoding") for e, ok in zip(errors, sound, strict=True)]

    def _conditions(self, image: Tensor, soft_mask: Tensor, mask: Tensor, prompts: list[str]) -> GuidanceConditions:
        net, dtype = self.net, DTYPES[self.sampling.precision]
        context, context_global = self.encoder.encode_image(image, hidden_region(soft_mask))
        lesion, _ = net.msc(ControllerInputs(context, context_global, self.encoder.encode_text(prompts), soft_mask))
        text, empty = net.cond_stage_model(prompts).to(dtype), net.cond_stage_model([""])
        return guidance_conditions(net, mask, text, empty, net.semantic(context, lesion, soft_mask))


def load_inpainter(ckpt: str | Path, config: Config, device: str) -> Inpainter:
    """The model of a final checkpoint with BiomedCLIP, checked against the configuration, ready to inpaint."""
    net, encoder = open_model(config, read_checkpoint(ckpt))
    return Inpainter(net, encoder, config.sampling, device)


def for_inference(net: MedSoftModel, dtype: torch.dtype) -> None:
    """U-Net and autoencoder in ``dtype`` and in the memory layout in which they are fastest."""
    net.unet.to(dtype=dtype, memory_format=kernel_layout(next(net.unet.parameters()).device, dtype))
    net.first_stage_model.to(dtype=dtype, memory_format=torch.channels_last)
