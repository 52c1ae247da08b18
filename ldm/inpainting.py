"""Condition, sample, decode, composite: lesions drawn into one batch of pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.attention import Conditioning
from ldm.config import Config
from ldm.dataset import Picture
from ldm.diffusion import named_generator, picture_noise
from ldm.encoders import BiomedClip
from ldm.images import composite, to_unit
from ldm.model import MedSoftModel, hidden_region, hide
from ldm.samplers import SAMPLERS, DifferentialMask, guided_steps

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What to draw: the picture's name for its noise (seed, sample_id, variant) and the sentence."""

    seed: int
    sample_id: str
    variant: int
    prompt: str


@dataclass(frozen=True, eq=False)
class Drawn:
    """One drawn picture.

    pixels: like the picture's original, composited, or None if the model produced NaN or infinity; generated: float32
    HxW(x3) in [0, 1], the same before compositing; fault: where the model produced the first value that is no number.
    """

    pixels: np.ndarray | None = None
    generated: np.ndarray | None = None
    fault: str | None = None


class Inpainter:
    """Draws with one model and one configuration (``config.sampling``)."""

    def __init__(self, net: MedSoftModel, clip: BiomedClip, config: Config, device: torch.device | str = "cpu") -> None:
        self.net, self.clip, self.config = net.to(device).eval(), clip.to(device), config
        self.device = torch.device(device)
        for part in (self.net.model, self.net.first_stage_model):  # convolutions are most of the work
            part.to(memory_format=torch.channels_last)
        self.net.unet.to(DTYPES[config.sampling.precision])
        self.net.first_stage_model.to(DTYPES[config.sampling.precision])

    @torch.inference_mode()
    def draw(self, pictures: Sequence[Picture], jobs: Sequence[Job]) -> list[Drawn]:
        """Native-size results. Outside the soft mask's support every pixel equals the original's."""
        image = torch.stack([picture.image for picture in pictures]).to(self.device)
        soft_mask = torch.stack([picture.mask for picture in pictures]).to(self.device)
        generated, faults = self.generate(image, soft_mask, jobs)  # (B, 3, S, S) in [-1, 1]
        results = []
        for picture, drawn, fault in zip(pictures, generated.cpu(), faults, strict=True):
            if fault is not None:
                results.append(Drawn(fault=fault))
                continue
            square = ((drawn + 1) / 2).permute(1, 2, 0).numpy()
            native = picture.window.backward(square, to_unit(picture.original, picture.levels))
            results.append(Drawn(composite(picture.original, native, picture.soft, picture.levels), native))
        return results

    def generate(self, image: Tensor, soft_mask: Tensor, jobs: Sequence[Job]) -> tuple[Tensor, list[str | None]]:
        """The model's square before compositing: image (B, 3, S, S), soft_mask (B, 1, S, S) -> (B, 3, S, S).

        With it, for each picture, None or where its first value that is no number appeared.
        """
        sampling, net = self.config.sampling, self.net
        mask = net.latent_mask(soft_mask)
        masked = self._latent(hide(image, soft_mask))
        with_prompt, both = self._conditions(image, soft_mask, mask, [job.prompt for job in jobs])
        shape = tuple(masked.shape[1:])
        noise = torch.stack([picture_noise(*_name(job), shape) for job in jobs]).to(self.device)
        guided = guided_steps(sampling.steps, tuple(sampling.guidance_interval))
        scale = sampling.guidance_scale
        dtype = DTYPES[sampling.precision]
        inputs = [each.to(dtype) for each in (mask, masked)]

        def predict(x: Tensor, t: int, index: int) -> Tensor:
            guide = scale != 1.0 and index in guided
            eps = net.denoise(
                x.to(dtype), torch.tensor([t], device=self.device), *inputs, both if guide else with_prompt
            ).float()
            if not guide:
                return eps
            prompted, plain = eps.chunk(2)
            return plain + scale * (prompted - plain)

        def step_noise(index: int) -> Tensor:
            drawn = [torch.randn(shape, generator=named_generator("step", index, *_name(job))) for job in jobs]
            return torch.stack(drawn).to(self.device)

        first_broken = torch.full((len(jobs),), -1, device=self.device)

        def watch(index: int, x: Tensor) -> None:
            broken = ~torch.isfinite(x).flatten(1).all(dim=1) & (first_broken < 0)
            first_broken[broken] = index

        differential = DifferentialMask(mask, self._latent(image), noise) if sampling.differential else None
        draw: Callable[..., Tensor] = SAMPLERS[sampling.sampler]
        latent = draw(predict, noise, net.schedule, sampling.steps, sampling.eta, differential, step_noise, watch)
        # The latent is looked at before decoding: that clamps, and would hide infinity as white.
        faults = [f"at sampling step {n + 1} of {sampling.steps}" if n >= 0 else None for n in first_broken.tolist()]
        decoded = net.decode(latent.to(dtype)).float()
        sound = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
        return decoded, [f or (None if ok else "while decoding") for f, ok in zip(faults, sound, strict=True)]

    def _latent(self, image: Tensor) -> Tensor:
        """Scaled latent (B, 4, s, s), float32: the posterior's mode."""
        inputs = image.to(DTYPES[self.config.sampling.precision], memory_format=torch.channels_last)
        return self.net.scaled(self.net.encode(inputs).mode.float())

    def _conditions(
        self, image: Tensor, soft_mask: Tensor, mask: Tensor, prompts: list[str]
    ) -> tuple[Conditioning, Conditioning]:
        """What steers the U-Net with the prompt alone, and with it and without it (empty prompt, zero tokens)."""
        net, dtype = self.net, DTYPES[self.config.sampling.precision]
        seen, seen_global = self.clip.encode_image(image, hidden_region(soft_mask))
        inside, _, _ = net.controller_tokens(seen, seen_global, self.clip.encode_text(prompts), soft_mask)
        semantic = net.semantic(seen, inside, soft_mask).to(dtype)
        text = net.cond_stage_model(prompts).to(dtype)
        empty = net.cond_stage_model([""]).expand(len(prompts), -1, -1).to(dtype)
        gate = mask.to(dtype)
        return (
            net.conditioning(gate, text, semantic, reuse=True),
            net.conditioning(torch.cat([gate, gate]), torch.cat([text, empty]), semantic, reuse=True),
        )


def _name(job: Job) -> tuple[int, str, int]:
    return job.seed, job.sample_id, job.variant
