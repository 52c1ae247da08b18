"""Condition, sample, decode, composite: lesions drawn into one batch of pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.config import Config
from ldm.dataset import Picture
from ldm.diffusion import named_generator, picture_noise
from ldm.encoders import BiomedClip
from ldm.images import composite, to_unit
from ldm.model import MedSoftModel, hidden_region, hide
from ldm.samplers import DifferentialMask, ddim


@dataclass(frozen=True)
class Job:
    """What to draw: the picture's name for its noise (seed, sample_id, variant) and the sentence."""

    seed: int
    sample_id: str
    variant: int
    prompt: str


class Inpainter:
    """Draws with one model and one configuration (``config.sampling``)."""

    def __init__(self, net: MedSoftModel, clip: BiomedClip, config: Config, device: torch.device | str = "cpu") -> None:
        self.net, self.clip, self.config = net.to(device).eval(), clip.to(device), config
        self.device = torch.device(device)

    @torch.no_grad()
    def draw(
        self, pictures: Sequence[Picture], jobs: Sequence[Job], on_step: Callable[[int], None] | None = None
    ) -> list[np.ndarray | None]:
        """Native-size results, like each picture's original; None where the model produced NaN or infinity.

        Outside the soft mask's support every pixel equals the original's.
        """
        image = torch.stack([picture.image for picture in pictures]).to(self.device)
        soft_mask = torch.stack([picture.mask for picture in pictures]).to(self.device)
        generated = self.generate(image, soft_mask, jobs, on_step).cpu()  # (B, 3, S, S) in [-1, 1]
        results: list[np.ndarray | None] = []
        for picture, drawn in zip(pictures, generated, strict=True):
            if not torch.isfinite(drawn).all():
                results.append(None)
                continue
            square = ((drawn + 1) / 2).permute(1, 2, 0).numpy()
            native = picture.window.backward(square, to_unit(picture.original, picture.levels))
            results.append(composite(picture.original, native, picture.soft, picture.levels))
        return results

    def generate(
        self, image: Tensor, soft_mask: Tensor, jobs: Sequence[Job], on_step: Callable[[int], None] | None = None
    ) -> Tensor:
        """The model's square before compositing: image (B, 3, S, S), soft_mask (B, 1, S, S) -> (B, 3, S, S)."""
        sampling, net = self.config.sampling, self.net
        prompts = [job.prompt for job in jobs]
        mask = net.latent_mask(soft_mask)
        original = net.scaled(net.encode(image).mode)
        masked = net.scaled(net.encode(hide(image, soft_mask)).mode)
        seen, seen_global = self.clip.encode_image(image, hidden_region(soft_mask))
        inside, _, _ = net.controller_tokens(seen, seen_global, self.clip.encode_text(prompts), soft_mask)
        semantic = net.semantic(seen, inside, soft_mask)
        text = net.cond_stage_model(prompts)
        empty = net.cond_stage_model([""]).expand(len(prompts), -1, -1)
        noise = torch.stack(
            [picture_noise(job.seed, job.sample_id, job.variant, tuple(original.shape[1:])) for job in jobs]
        ).to(self.device)

        def step_noise(index: int) -> Tensor:
            drawn = [
                torch.randn(original.shape[1:], generator=named_generator("step", index, *_name(job))) for job in jobs
            ]
            return torch.stack(drawn).to(self.device)

        # Conditional and unconditional halves of one batch; the unconditional one has the empty prompt and zero tokens.
        both = {
            "mask": mask.repeat(2, 1, 1, 1),
            "masked_latent": masked.repeat(2, 1, 1, 1),
            "text": torch.cat([text, empty]),
            "semantic": torch.cat([semantic, torch.zeros_like(semantic)]),
        }
        count, scale = len(jobs), sampling.guidance_scale

        def predict(x: Tensor, t: int) -> Tensor:
            if scale == 1.0:
                times = torch.full((count,), t, device=self.device)
                return net.predict_noise(x, times, mask, masked, text, semantic)
            times = torch.full((2 * count,), t, device=self.device)
            with_prompt, without = net.predict_noise(x.repeat(2, 1, 1, 1), times, **both).chunk(2)
            return without + scale * (with_prompt - without)

        differential = DifferentialMask(mask, original, noise) if sampling.differential else None
        latent = ddim(predict, noise, net.schedule, sampling.steps, sampling.eta, differential, step_noise, on_step)
        broken = ~torch.isfinite(latent).flatten(1).all(dim=1)  # decoding clamps, and would hide it
        decoded = net.decode(latent)
        decoded[broken] = torch.nan
        return decoded


def _name(job: Job) -> tuple[int, str, int]:
    return job.seed, job.sample_id, job.variant
