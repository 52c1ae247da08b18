"""Speed of drawing, ours beside diffusers' StableDiffusionInpaintPipeline, on the same weights in the same run."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.bench.common import BenchOptions, diffusers_pipeline, measure_alternately, this_machine
from ldm.config import Architecture, Config, SamplingConfig, load_config
from ldm.core.errors import require
from ldm.diffusion.guidance import guided_steps
from ldm.inference.inpainter import DTYPES, for_inference
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel, hide
from ldm.networks.sampling import GuidanceConditions, guidance_conditions, latent_of, sample_latent

log = logging.getLogger(__name__)

REFERENCE = {"sampler": "ddim", "steps": 50, "guidance_interval": [0.0, 1.0]}  # diffusers' default, with guidance
FAST = {"sampler": "dpmpp_2m", "steps": 20, "guidance_interval": [0.15, 1.0]}  # docs/inference.md says why


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
    inputs = Inputs(config.architecture, device, options.batch_size)
    rows: list[dict[str, Any]] = []

    def add(name: str, mine: float, other: float) -> tuple[float, float]:
        rows.append({"what": name, "ours_s": mine, "theirs_s": other, "ratio": other / mine})
        log.info("%-52s ours %.4f s, diffusers %.4f s, ratio %.2f", name, mine, other, other / mine)
        return mine, other

    def compare(name: str, ours: Callable, theirs: Callable, repeats: int, warm_up: int = 2) -> tuple[float, float]:
        return add(name, *measure_alternately(ours, theirs, repeats, device, warm_up))

    calls = Calls(model, pipeline, inputs, config.sampling)
    theirs_guided = partial(calls.theirs, inputs.empty, inputs.text)
    guided = compare("U-Net call with guidance", partial(calls.ours, calls.both), theirs_guided, options.repeats)
    alone = partial(calls.ours, calls.prompt_alone), partial(calls.theirs, inputs.text)
    prompted = compare("U-Net call with the prompt alone", *alone, options.repeats)
    encoding = compare("encoded picture", calls.our_encoding, calls.their_encoding, options.repeats)
    decoding = compare("decoded picture", calls.our_decoding, calls.their_decoding, options.repeats)
    if options.steps:
        plain = dataclasses.replace(config.sampling, **{**REFERENCE, "steps": options.steps})
        name = f"picture, {options.steps} steps of DDIM with guidance"
        pictures = max(1, options.repeats // 4)
        compare(name, lambda: calls.our_picture(plain), lambda: calls.their_picture(options.steps), pictures, 1)
    steps, reference = FAST["steps"], REFERENCE["steps"]
    both = len(guided_steps(steps, FAST["guidance_interval"]))
    # Ours encodes the picture and the masked picture, diffusers the masked one alone.
    ends, other_ends = 2 * encoding[0] + decoding[0], encoding[1] + decoding[1]
    theirs = reference * guided[1] + other_ends
    add(f"{reference} steps of DDIM with guidance (sum of the calls)", reference * guided[0] + ends, theirs)
    fast = both * guided[0] + (steps - both) * prompted[0] + ends
    add(f"{steps} steps of 2M, {both} guided / {reference} of DDIM (sum of the calls)", fast, theirs)
    return rows


class Inputs:
    """Random inputs of the model's sizes: a batch of pictures with a round mask, text and MSC tokens."""

    def __init__(self, sizes: Architecture, device: torch.device, batch: int) -> None:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        size, latent = sizes.image_size, sizes.latent_size
        self.image = drawn(3, size, size).clamp(-1, 1)
        axis = torch.linspace(-1, 1, size, device=device)
        far = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
        self.mask = (1.5 - 4 * far).clamp(0, 1).expand(batch, 1, size, size)  # 1 in the middle, soft border
        self.noise = drawn(4, latent, latent)
        self.text = drawn(sizes.text_encoder.max_length, sizes.unet.context_dim)
        self.empty = drawn(sizes.text_encoder.max_length, sizes.unet.context_dim)
        self.tokens = drawn((sizes.biomedclip.grid // 2) ** 2, sizes.unet.semantic_dim)


class Calls:
    """What is compared, ours and theirs. Ours includes the third attention."""

    def __init__(self, model: MedSoftModel, pipeline: Any, inputs: Inputs, sampling: SamplingConfig) -> None:
        self.model, self.pipeline, self.inputs, self.sampling = model, pipeline, inputs, sampling
        self.dtype = DTYPES[sampling.precision]
        self.latent_mask = model.latent_mask(inputs.mask)
        # A trained model is not silent; its third attention costs the same whatever its weights.
        self.prompt_alone, self.both = self.conditions()

    def conditions(self) -> GuidanceConditions:
        given = self.inputs
        text = given.text.to(self.dtype)
        return guidance_conditions(self.model, self.latent_mask, text, given.empty[:1], given.tokens)

    def ours(self, conditioning: Conditioning) -> Tensor:
        given = self.inputs
        t = torch.tensor([501], device=given.noise.device)
        noisy = given.noise.to(self.dtype)
        return self.model.denoise(noisy, t, self.latent_mask.to(self.dtype), noisy, conditioning)

    def theirs(self, *texts: Tensor) -> Tensor:
        given = self.inputs
        x = torch.cat([given.noise, self.latent_mask, given.noise], dim=1).to(self.dtype)
        return self.pipeline.unet(torch.cat([x] * len(texts)), 501, torch.cat(texts).to(self.dtype)).sample

    def our_encoding(self) -> Tensor:
        return latent_of(self.model, self.inputs.image, self.dtype)

    def their_encoding(self) -> Tensor:
        return self.pipeline.vae.encode(self.inputs.image.to(self.dtype)).latent_dist.mode()

    def our_decoding(self) -> Tensor:
        return self.model.decode(self.inputs.noise.to(self.dtype))

    def their_decoding(self) -> Tensor:
        scale = self.model.architecture.diffusion.latent_scale
        return self.pipeline.vae.decode(self.inputs.noise.to(self.dtype) / scale).sample

    def our_picture(self, sampling: Any) -> Tensor:
        """Image and mask to picture, with the differential mask; text and MSC tokens are given, as theirs are."""
        given, model = self.inputs, self.model
        original = latent_of(model, given.image, self.dtype)
        masked = latent_of(model, hide(given.image, given.mask), self.dtype)
        conditions = self.conditions()
        latent = sample_latent(model, sampling, given.noise, self.latent_mask, masked, original, conditions)
        return model.decode(latent.to(self.dtype))

    def their_picture(self, steps: int) -> Tensor:
        given = self.inputs
        return self.pipeline(
            image=(given.image + 1) / 2,
            mask_image=given.mask,
            prompt_embeds=given.text.to(self.dtype),
            negative_prompt_embeds=given.empty.to(self.dtype),
            latents=given.noise.to(self.dtype),
            height=given.image.shape[-2],
            width=given.image.shape[-1],
            num_inference_steps=steps,
            guidance_scale=self.sampling.guidance_scale,
            output_type="pt",
        ).images
