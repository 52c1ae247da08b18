"""Speed of inpainting, ours beside diffusers' StableDiffusionInpaintPipeline, on the same weights in the same run."""

import copy
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bench.batches import batch_sizes
from ldm.bench.common import BenchOptions, diffusers_pipeline, measure_alternately, this_machine
from ldm.config import Architecture, Config, SamplingConfig, load_config
from ldm.core.devices import peak_memory
from ldm.core.errors import UsageError, require
from ldm.diffusion.guidance import guided_steps
from ldm.inference.inpainter import DTYPES, compile_networks, for_inference
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel, hide
from ldm.networks.sampling import GuidanceConditions, guidance_conditions, latent_of, sample_latent

log = logging.getLogger(__name__)

# Diffusers' default with guidance, and the default of models/*.yaml; docs/sampling.md says why.
REFERENCE: dict[str, Any] = {
    "sampler": "ddim",
    "spacing": "leading",
    "steps": 50,
    "guidance_interval": [0, 1],
    "eta": 0,
}
FAST: dict[str, Any] = {"sampler": "dpmpp_2m", "spacing": "fitted", "steps": 6, "guidance_interval": [0, 1]}
SHORT = {"ddim": "DDIM", "dpmpp_2m": "2M"}


def main(options: BenchOptions) -> dict[str, Any]:
    """Measure and log one line per part: seconds of ours and of diffusers', and their ratio; returns the numbers."""
    require("diffusers", "test")
    config = configuration(options)
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
        measured = measure(config.architecture, config.sampling, device, options)
    return {**about, "measured": measured, "drawing": measure_drawing(device, options)}


def configuration(options: BenchOptions) -> Config:
    """The YAML with the overrides of the command line, in the precision that is measured.

    UsageError for a U-Net that diffusers does not have.
    """
    config = load_config(options.config, [*options.overrides, f"sampling.precision={options.precision}"])
    if config.unet.thumbnail:
        raise UsageError("unet.thumbnail: expected false, as diffusers has no U-Net with a thumbnail, found true")
    return config


class Comparisons:
    """What ours and theirs take, (seconds, seconds of all cores) each, and their ratios (above 1: ours is faster)."""

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.repeats, self.device = repeats, device
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, mine: np.ndarray, other: np.ndarray) -> None:
        """Log and keep one comparison."""
        seconds, ratios = (float(mine[0]), float(other[0])), (other / mine).tolist()
        row = {"what": name, "ours_s": seconds[0], "theirs_s": seconds[1], "ratio": ratios[0]}
        cores = ""
        if self.device.type == "cpu":
            row["ratio_of_core_time"], cores = ratios[1], f" ({ratios[1]:.2f} in core time)"
        self.rows.append(row)
        log.info("%-52s ours %.4f s, diffusers %.4f s, ratio %.2f%s", name, *seconds, ratios[0], cores)

    def calls(self, name: str, ours: Callable, theirs: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Measure two calls; returns what ``measure_alternately`` says of them."""
        mine, other = measure_alternately((ours, theirs), self.repeats, self.device)
        self.add(name, mine, other)
        return mine, other

    def images(self, ours: Mapping[str, Callable], theirs: Callable) -> None:
        """Measure whole images, by name, against one of theirs. Every kind of call in them should be warm.

        Theirs is measured once, beside all of ours: on a CPU it takes minutes.
        """
        repeats = max(1, self.repeats // 4)
        *mine, other = measure_alternately([*ours.values(), theirs], repeats, self.device, warm_up=0)
        for name, taken in zip(ours, mine, strict=True):
            self.add(name, taken, other)


def measure(
    architecture: Architecture, sampling: SamplingConfig, device: torch.device, options: BenchOptions
) -> list[dict[str, Any]]:
    """The rows of ``Comparisons``: single calls, whole images if ``options.steps`` says so, and sums of the calls."""
    torch.manual_seed(0)
    model = MedSoftModel(architecture, ["unet", "autoencoder"]).to(device).eval()
    pipeline = diffusers_pipeline(model)
    dtype = DTYPES[sampling.precision]
    for part in (pipeline.unet, pipeline.vae):
        part.to(dtype)
    for_inference(model, dtype)
    calls, compared = Calls(model, options.batch_size, pipeline), Comparisons(options.repeats, device)
    conditions = calls.conditions(sampling)
    vae, image, noise = pipeline.vae, calls.image.to(dtype), calls.noise.to(dtype)
    guided = compared.calls(
        "U-Net call with guidance", lambda: calls.ours(conditions.both), lambda: calls.theirs(calls.empty, calls.text)
    )
    prompted = compared.calls(
        "U-Net call with the prompt alone", lambda: calls.ours(conditions.prompted), lambda: calls.theirs(calls.text)
    )
    encoding = compared.calls(
        "encoded image", lambda: latent_of(model, calls.image, dtype), lambda: vae.encode(image).latent_dist.mode()
    )
    scale = architecture.diffusion.latent_scale
    decoding = compared.calls("decoded image", lambda: model.decode(noise), lambda: vae.decode(noise / scale).sample)
    fast, given, reference = dataclasses.replace(sampling, **FAST), options.steps, REFERENCE["steps"]
    both = len(guided_steps(fast.steps, fast.guidance_interval))
    name = f"{fast.steps} steps of {SHORT[fast.sampler]}, {both} guided / {reference} of DDIM"
    if given:
        plain = dataclasses.replace(sampling, **REFERENCE | {"steps": given})
        pairs = {f"image, {given} steps of DDIM with guidance": functools.partial(calls.our_image, plain)}
        if given == reference:
            pairs[f"image, {name}"] = functools.partial(calls.our_image, fast)
        compared.images(pairs, functools.partial(calls.their_image, given, sampling.guidance_scale))
    # Ours encodes the image and the masked image, diffusers the masked one alone.
    ends, other_ends = 2 * encoding[0] + decoding[0], encoding[1] + decoding[1]
    theirs = reference * guided[1] + other_ends
    ours = reference * guided[0] + ends
    compared.add(f"{reference} steps of DDIM with guidance (sum of the calls)", ours, theirs)
    ours = both * guided[0] + (fast.steps - both) * prompted[0] + ends
    compared.add(f"{name} (sum of the calls)", ours, theirs)
    return compared.rows


def measure_drawing(device: torch.device, options: BenchOptions) -> list[dict[str, Any]]:
    """A row of ``drawing`` for each of the batch sizes asked for: fast and with 50 steps of DDIM, plain and, if asked
    for, compiled."""
    rows = []
    for batch in batch_sizes(options.sizes) if options.sizes else []:
        for settings in (FAST, REFERENCE):
            for compiled in (False, True)[: 1 + options.compile]:
                config = configuration(options)
                config.sampling = dataclasses.replace(config.sampling, **settings, compile=compiled)
                row = drawing(config, device, batch, max(1, options.repeats // 4))
                rows.append(row)
                median = statistics.median(row["seconds"])
                message = "batch %d, %d steps of %s%s: first %.2f s, then %.3f s, %.2f images/s, within %d grey levels"
                about = batch, row["steps"], row["sampler"], ", compiled" if compiled else ""
                log.info(message, *about, row["first"], median, row["images_per_s"], row["difference"])
    return rows


def drawing(
    config: Config, device: torch.device, batch: int, repeats: int, compare: bool = True, warm_up: int = 1
) -> dict[str, Any]:
    """Seconds that ``config.sampling`` needs for a batch, from images and masks to images; random weights.

    Encoding, sampling and decoding are measured; text and MSC tokens are given. Returns ``first``, the seconds of the
    first batch, which compiles; ``seconds`` of each of the ``repeats`` that follow ``warm_up`` more; ``images_per_s``
    by their median; ``memory``, the peak in bytes; ``difference``, the largest difference in grey levels to the same
    two images in float32, uncompiled (None without ``compare``).
    """
    torch.manual_seed(0)
    sampling = config.sampling
    with device:
        model = MedSoftModel(config.architecture, ["unet", "autoencoder"]).eval()
    wake(model)
    calls = Calls(model, batch)
    with torch.inference_mode():
        reference = None
        if compare:
            for_inference(model, torch.float32)
            plain = dataclasses.replace(sampling, precision="32-true", compile=False)
            torch.set_float32_matmul_precision("highest")
            reference = levels(calls.first(2).our_image(plain))
        torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # as the inpainter does
        for_inference(model, DTYPES[sampling.precision])
        if sampling.compile:
            compile_networks(model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times: list[float] = []
        for _ in range(1 + warm_up + repeats):
            start = time.perf_counter()
            made = levels(calls.our_image(sampling))  # on the host, which waits for a GPU
            times.append(time.perf_counter() - start)
    seconds = times[1 + warm_up :]
    return {
        **{name: getattr(sampling, name) for name in ("sampler", "spacing", "steps", "precision", "compile")},
        "batch": batch,
        "first": times[0],
        "seconds": seconds,
        "images_per_s": batch / statistics.median(seconds),
        "memory": peak_memory(device),
        "difference": int((made[:2] - reference).abs().max()) if reference is not None else None,
    }


def levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as grey levels from 0 to 255 on the CPU, int16."""
    return ((images.float() + 1) * 127.5).round().to(torch.int16).cpu()


def wake(model: MedSoftModel) -> None:
    """Give weights that start at zero small random values: else whole layers would be silent, and differ in nothing."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


class Calls:
    """What is measured, on random inputs of the model's sizes. Ours includes the third attention.

    The inputs are a batch of images with a round soft mask, latent noise, text and MSC tokens. ``pipeline`` is
    diffusers', if ours is compared with it.
    """

    def __init__(self, model: MedSoftModel, batch: int, pipeline: Any = None) -> None:
        device = next(model.parameters()).device

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        self.model, self.pipeline, sizes = model, pipeline, model.architecture
        size, latent = sizes.image_size, sizes.latent_size
        self.image = normal(3, size, size).clamp(-1, 1)
        axis = torch.linspace(-1, 1, size, device=device)
        far = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
        self.mask = (1.5 - 4 * far).clamp(0, 1).expand(batch, 1, size, size)  # 1 in the middle, soft border
        self.latent_mask, self.noise = model.latent_mask(self.mask), normal(4, latent, latent)
        self.text, self.empty = (normal(sizes.text_encoder.max_length, sizes.unet.context_dim) for _ in range(2))
        self.tokens = normal((sizes.biomedclip.grid // 2) ** 2, sizes.unet.semantic_dim)

    def first(self, count: int) -> "Calls":
        """The same for the first ``count`` images."""
        fewer = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(fewer, name, value[:count])
        return fewer

    def conditions(self, sampling: SamplingConfig) -> GuidanceConditions:
        """What the U-Net is given with the prompt alone, and with guidance."""
        given = self.latent_mask, self.text.to(DTYPES[sampling.precision]), self.empty[:1], self.tokens
        return guidance_conditions(self.model, *given, fixed_shapes=sampling.compile)

    def ours(self, conditioning: Conditioning) -> Tensor:
        """Our U-Net's noise, once."""
        t = torch.tensor([501], device=self.noise.device)
        noisy, mask = (each.to(conditioning.text.dtype) for each in (self.noise, self.latent_mask))
        return self.model.denoise(noisy, t, mask, noisy, conditioning)

    def theirs(self, *texts: Tensor) -> Tensor:
        """Diffusers' U-Net on all ``texts`` in one call."""
        dtype = self.pipeline.unet.dtype
        x = torch.cat([self.noise, self.latent_mask, self.noise], dim=1).to(dtype)
        return self.pipeline.unet(torch.cat([x] * len(texts)), 501, torch.cat(texts).to(dtype)).sample

    def our_image(self, sampling: SamplingConfig) -> Tensor:
        """Image and mask to image, with the differential mask; text and MSC tokens are given, as theirs are."""
        dtype = DTYPES[sampling.precision]
        original = latent_of(self.model, self.image, dtype)
        masked = latent_of(self.model, hide(self.image, self.mask), dtype)
        given = sampling, self.noise, self.latent_mask, masked, original, self.conditions(sampling)
        return self.model.decode(sample_latent(self.model, *given).to(dtype))

    def their_image(self, steps: int, guidance_scale: float) -> Tensor:
        """The same with diffusers' pipeline."""
        dtype = self.pipeline.unet.dtype
        return self.pipeline(
            image=(self.image + 1) / 2,
            mask_image=self.mask,
            prompt_embeds=self.text.to(dtype),
            negative_prompt_embeds=self.empty.to(dtype),
            latents=self.noise.to(dtype),
            height=self.image.shape[-2],
            width=self.image.shape[-1],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
