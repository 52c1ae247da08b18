"""Speed of inpainting, ours beside diffusers' StableDiffusionInpaintPipeline, on the same weights in the same run."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.bench.common import BenchOptions, diffusers_pipeline, measure_alternately, this_machine
from ldm.config import Config, SamplingConfig, load_config
from ldm.core.errors import require
from ldm.diffusion.guidance import guided_steps
from ldm.inference.inpainter import DTYPES, for_inference
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel, hide
from ldm.networks.sampling import GuidanceConditions, guidance_conditions, latent_of, sample_latent

log = logging.getLogger(__name__)

REFERENCE = {"sampler": "ddim", "steps": 50, "guidance_interval": (0.0, 1.0)}  # diffusers' default, with guidance
FAST = {"sampler": "dpmpp_2m", "steps": 20, "guidance_interval": (0.15, 1.0)}  # docs/inference.md says why


def main(options: BenchOptions) -> dict[str, Any]:
    """Measure and log one line per part: seconds of ours and of diffusers', and their ratio; returns the numbers."""
    require("diffusers", "test")
    config = load_config(options.config, [*options.overrides, f"sampling.precision={options.precision}"])
    device, where = this_machine()
    about = {
        "config": str(options.config),
        "device": where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "steps": options.steps,
    }
    log.info("%s", ", ".join(f"{key} {value}" for key, value in about.items()))
    with torch.inference_mode():
        return {**about, "measured": measure(config, device, options)}


def measure(config: Config, device: torch.device, options: BenchOptions) -> list[dict[str, Any]]:
    """Seconds of ours, of theirs and their ratio (above 1: ours is faster), one row per comparison."""
    torch.manual_seed(0)
    model = MedSoftModel(config.architecture, ["unet", "autoencoder"]).to(device).eval()
    pipeline = diffusers_pipeline(model)
    dtype = DTYPES[config.sampling.precision]
    for part in (pipeline.unet, pipeline.vae):
        part.to(dtype)
    for_inference(model, dtype)
    calls = Calls(model, pipeline, config.sampling, options.batch_size)
    rows: list[dict[str, Any]] = []

    def add(name: str, mine: float, other: float) -> tuple[float, float]:
        """Log and keep both seconds; returns them."""
        rows.append({"what": name, "ours_s": mine, "theirs_s": other, "ratio": other / mine})
        log.info("%-52s ours %.4f s, diffusers %.4f s, ratio %.2f", name, mine, other, other / mine)
        return mine, other

    def compare(name: str, ours: Callable, theirs: Callable, repeats: int = options.repeats, warm_up: int = 2) -> Any:
        """Measure two calls; returns their seconds."""
        return add(name, *measure_alternately(ours, theirs, repeats, device, warm_up))

    vae, image, noise = pipeline.vae, calls.image.to(dtype), calls.noise.to(dtype)
    guided = compare(
        "U-Net call with guidance", lambda: calls.ours(calls.both), lambda: calls.theirs(calls.empty, calls.text)
    )
    prompted = compare(
        "U-Net call with the prompt alone", lambda: calls.ours(calls.prompt_alone), lambda: calls.theirs(calls.text)
    )
    encoding = compare(
        "encoded image", lambda: latent_of(model, calls.image, dtype), lambda: vae.encode(image).latent_dist.mode()
    )
    scale = config.architecture.diffusion.latent_scale
    decoding = compare("decoded image", lambda: model.decode(noise), lambda: vae.decode(noise / scale).sample)
    if options.steps:
        plain = dataclasses.replace(config.sampling, **{**REFERENCE, "steps": options.steps})
        name, repeats = f"image, {options.steps} steps of DDIM with guidance", max(1, options.repeats // 4)
        compare(name, lambda: calls.our_image(plain), lambda: calls.their_image(options.steps), repeats, 1)
    steps, reference = FAST["steps"], REFERENCE["steps"]
    both = len(guided_steps(steps, FAST["guidance_interval"]))
    # Ours encodes the image and the masked image, diffusers the masked one alone.
    ends, other_ends = 2 * encoding[0] + decoding[0], encoding[1] + decoding[1]
    theirs = reference * guided[1] + other_ends
    add(f"{reference} steps of DDIM with guidance (sum of the calls)", reference * guided[0] + ends, theirs)
    fast = both * guided[0] + (steps - both) * prompted[0] + ends
    add(f"{steps} steps of 2M, {both} guided / {reference} of DDIM (sum of the calls)", fast, theirs)
    return rows


class Calls:
    """What is compared, ours and theirs, on random inputs of the model's sizes. Ours includes the third attention.

    The inputs are a batch of images with a round soft mask, latent noise, text and MSC tokens.
    """

    def __init__(self, model: MedSoftModel, pipeline: Any, sampling: SamplingConfig, batch: int) -> None:
        device = pipeline.unet.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        self.model, self.pipeline, self.sampling = model, pipeline, sampling
        self.dtype, sizes = DTYPES[sampling.precision], model.architecture
        size, latent = sizes.image_size, sizes.latent_size
        self.image = normal(3, size, size).clamp(-1, 1)
        axis = torch.linspace(-1, 1, size, device=device)
        far = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
        self.mask = (1.5 - 4 * far).clamp(0, 1).expand(batch, 1, size, size)  # 1 in the middle, soft border
        self.latent_mask, self.noise = model.latent_mask(self.mask), normal(4, latent, latent)
        self.text, self.empty = (normal(sizes.text_encoder.max_length, sizes.unet.context_dim) for _ in range(2))
        self.tokens = normal((sizes.biomedclip.grid // 2) ** 2, sizes.unet.semantic_dim)
        # A trained model is not silent; its third attention costs the same whatever its weights.
        self.prompt_alone, self.both = self.conditions()

    def conditions(self) -> GuidanceConditions:
        """What the U-Net is given with the prompt alone, and with guidance."""
        text = self.text.to(self.dtype)
        return guidance_conditions(self.model, self.latent_mask, text, self.empty[:1], self.tokens)

    def ours(self, conditioning: Conditioning) -> Tensor:
        """Our U-Net's noise, once."""
        t = torch.tensor([501], device=self.noise.device)
        noisy = self.noise.to(self.dtype)
        return self.model.denoise(noisy, t, self.latent_mask.to(self.dtype), noisy, conditioning)

    def theirs(self, *texts: Tensor) -> Tensor:
        """Diffusers' U-Net on all ``texts`` in one call."""
        x = torch.cat([self.noise, self.latent_mask, self.noise], dim=1).to(self.dtype)
        return self.pipeline.unet(torch.cat([x] * len(texts)), 501, torch.cat(texts).to(self.dtype)).sample

    def our_image(self, sampling: SamplingConfig) -> Tensor:
        """Image and mask to image, with the differential mask; text and MSC tokens are given, as theirs are."""
        original = latent_of(self.model, self.image, self.dtype)
        masked = latent_of(self.model, hide(self.image, self.mask), self.dtype)
        given = sampling, self.noise, self.latent_mask, masked, original, self.conditions()
        return self.model.decode(sample_latent(self.model, *given).to(self.dtype))

    def their_image(self, steps: int) -> Tensor:
        """The same with diffusers' pipeline."""
        return self.pipeline(
            image=(self.image + 1) / 2,
            mask_image=self.mask,
            prompt_embeds=self.text.to(self.dtype),
            negative_prompt_embeds=self.empty.to(self.dtype),
            latents=self.noise.to(self.dtype),
            height=self.image.shape[-2],
            width=self.image.shape[-1],
            num_inference_steps=steps,
            guidance_scale=self.sampling.guidance_scale,
            output_type="pt",
        ).images
