"""Condition, sample, decode, composite: lesions inpainted in one batch of images, perhaps with compiled networks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import PREFIXES, Checkpoint, read_checkpoint
from ldm.config import Architecture, Config, SamplingConfig
from ldm.core.devices import all_memory, kernel_layout, on_device, on_host, out_of_memory
from ldm.core.errors import MedSoftError, first_line
from ldm.data.images import composite, to_unit
from ldm.data.preparation import PreparedSample, whole_pictures
from ldm.diffusion.noise import image_noise, step_noise
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel, skeleton
from ldm.networks.msc import ControllerInputs
from ldm.networks.opening import open_model
from ldm.networks.sampling import guidance_conditions, latent_of, sample_latent

log = logging.getLogger(__name__)

BACKEND = "inductor"  # of torch.compile
MIB = 2**20
OnStep = Callable[[int], object]
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
    float32 HxW(x3) in [0, 1], the same before compositing; error: what went wrong, and where it was seen first.
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
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions: docs/inference.md has what that changes
        if sampling.compile:
            compile_networks(self.net)
        self._rows = 0  # of the largest batch so far

    def inpaint(
        self, samples: Sequence[PreparedSample], jobs: Sequence[Job], on_step: OnStep | None = None
    ) -> list[InpaintedImage]:
        """Native-size results. Outside the soft mask's support every pixel equals the original's. See ``begin``."""
        return [finish() for finish in self.begin(samples, jobs, on_step)]

    def draw(self, sample: PreparedSample, jobs: Sequence[Job], on_step: OnStep | None = None) -> list[np.ndarray]:
        """One batch: the composited pixels of one image with the lesion of each job. See ``begin`` for ``on_step``.

        MedSoftError where the model gives values that are no numbers.
        """
        found = self.inpaint([sample] * len(jobs), jobs, on_step)
        for job, result in zip(jobs, found, strict=True):
            if result.error:
                raise MedSoftError(f"{job.sample_id}: {result.error}")
        return [result.pixels for result in found if result.pixels is not None]

    @torch.inference_mode()
    def begin(
        self, samples: Sequence[PreparedSample], jobs: Sequence[Job], on_step: OnStep | None = None
    ) -> list[Callable[[], InpaintedImage]]:
        """``inpaint`` in two halves: this one hands a batch to the device, and does not wait until a GPU has drawn it.

        Where prompts are encoded it waits until the batch before is drawn: transformers reads the values of BERT's
        padding mask. What comes back waits for this batch and composites, one call for each image, in any thread.
        ``on_step``: told after each sampling step how many are done, for which a GPU is waited for; what it raises ends
        the drawing.
        """
        self._rows = max(self._rows, len(samples))
        # Compiled networks know the largest batch: a smaller one is filled up, which changes no other image's noise.
        rows = self._rows if self.sampling.compile else len(samples)
        filled, names = ([*given, *[given[-1]] * (rows - len(given))] for given in (samples, jobs))
        image = on_device(torch.stack([sample.image for sample in filled]), self.device)
        soft_mask = on_device(torch.stack([sample.mask for sample in filled]), self.device)
        whole = whole_pictures(filled, self.device) if self.net.architecture.sees_whole else None
        pasted = None
        if self.sampling.init == "paste":
            pasted = on_device(torch.stack([_with_pasted_lesion(sample) for sample in filled]), self.device)
        generated, broken = self._generate(image, soft_mask, names, whole, pasted, on_step)  # (B, 3, S, S) in [-1, 1]
        generated_there, broken_there = on_host(generated), on_host(broken)

        def finish(row: int, sample: PreparedSample) -> InpaintedImage:
            error = self._error(int(broken_there()[row]))
            return InpaintedImage(error=error) if error else composited(sample, generated_there()[row])

        return [partial(finish, row, sample) for row, sample in enumerate(samples)]

    def _generate(
        self,
        image: Tensor,
        soft_mask: Tensor,
        jobs: Sequence[Job],
        whole: tuple[Tensor, Tensor] | None = None,
        pasted: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The model's squares before compositing: image (B, 3, S, S), soft_mask (B, 1, S, S) -> (B, 3, S, S).

        And a number for each image: of the step at which the first value that is no number appeared, -1 where none did,
        the number of steps where it was the decoder's. ``whole``: see ``condition``; ``pasted``: like ``image``, with
        the lesion that ``sampling.init`` paste begins with.
        """
        sampling, net = self.sampling, self.net
        dtype = DTYPES[sampling.precision]
        mask = net.latent_mask(soft_mask)
        encode = partial(latent_of, net, dtype=dtype)
        masked = net.surroundings(encode, image, soft_mask, whole)
        original = encode(image) if sampling.differential or sampling.init == "image" else None
        start = original if sampling.init == "image" else None if pasted is None else encode(pasted)
        text, semantic = self.condition(image, soft_mask, [job.prompt for job in jobs], whole)
        conditions = guidance_conditions(
            net, mask, text.to(dtype), self.empty_text, semantic, fixed_shapes=sampling.compile
        )
        names = [(job.seed, job.sample_id, job.variant) for job in jobs]
        shape = net.architecture.autoencoder.latent_channels, *mask.shape[2:]
        noise = torch.stack([image_noise(*name, shape) for name in names])
        noise = on_device(noise, self.device)
        first_broken = torch.full((len(jobs),), -1, device=self.device)

        def watch(index: int, x: Tensor) -> None:
            """Note, on the device, the first step at which an image's values are no numbers."""
            broken = ~torch.isfinite(x).flatten(1).all(dim=1) & (first_broken < 0)
            first_broken.masked_fill_(broken, index)

        def after_step(index: int, x: Tensor) -> None:
            """What ``sample_latent`` calls after each step, with the latent (B, 4, h, w) as it is then."""
            watch(index, x)
            if on_step is not None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                on_step(index + 1)

        latent = sample_latent(
            *(net, sampling, noise, mask, masked, original, conditions),
            step_noise=lambda index: step_noise(index, names, noise),
            on_step=after_step,
            start=start,
        )
        # The latent was looked at before decoding: that clamps, and would hide infinity as white.
        decoded = net.decode(latent.to(dtype)).float()
        watch(sampling.steps, decoded)
        return decoded, first_broken

    def _error(self, broken: int) -> str | None:
        if broken < 0:
            return None
        steps = self.sampling.steps
        where = f"at sampling step {broken + 1} of {steps}" if broken < steps else "while decoding"
        return f"values that are not numbers (NaN or infinity) appeared {where}"

    @cached_property
    def empty_text(self) -> Tensor:
        """The states of the empty prompt (1, T, D), the same for every batch."""
        return self.net.cond_stage_model([""])

    def condition(
        self, image: Tensor, soft_mask: Tensor, prompts: list[str], whole: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text states (B, T, D_text) and tokens of the third attention (B, M, D).

        ``whole``: the whole images and their masks, for an architecture that ``sees_whole``.
        """
        net = self.net
        context, context_global = net.context_features(self.encoder, image, soft_mask, whole)
        lesion = context  # a learned table needs none
        if "msc" in net.parts:
            inputs = ControllerInputs(context, context_global, self.encoder.encode_text(prompts), soft_mask)
            lesion, _ = net.msc(inputs)
        return net.cond_stage_model(prompts), net.semantic(context, lesion, soft_mask)


def _with_pasted_lesion(sample: PreparedSample) -> Tensor:
    """(3, S, S) in [-1, 1]: what sampling begins with where a lesion was pasted."""
    if sample.pasted is None:
        raise MedSoftError("sampling.init=paste needs images with a pasted lesion, as dataset_infer.py makes them")
    return sample.as_seen(sample.pasted)


def composited(sample: PreparedSample, inside: Tensor) -> InpaintedImage:
    """The sample's original with the model's square, (3, S, S) in [-1, 1] on the CPU, in its soft mask."""
    square = ((inside + 1) / 2).permute(1, 2, 0).numpy()
    native = sample.crop_window.backward(square, to_unit(sample.original, sample.intensity_range))
    return InpaintedImage(composite(sample.original, native, sample.soft, sample.intensity_range), native)


def load_inpainter(ckpt: str | Path | Checkpoint, config: Config, device: str) -> Inpainter:
    """The model of a final checkpoint, a file or what was read of it, with BiomedCLIP, checked against the
    configuration, ready to inpaint.

    MedSoftError, before anything is built, for a GPU on which not even the networks have room.
    """
    check_memory(config.architecture, config.sampling, torch.device(device))
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else read_checkpoint(ckpt)
    net, encoder = open_model(config, checkpoint)
    return Inpainter(net, encoder, config.sampling, device)


def check_memory(architecture: Architecture, sampling: SamplingConfig, device: torch.device) -> None:
    """MedSoftError for a GPU that is too small for the weights alone, BiomedCLIP's and the images not counted."""
    half = (PREFIXES["unet"], PREFIXES["autoencoder"]) if sampling.precision == "bf16-true" else ()
    weights = skeleton(architecture).items()
    needed = sum(value.numel() * (2 if key.startswith(half) else 4) for key, value in weights)
    there = all_memory(device)
    if needed > there:
        cure = "a device with more memory" if half else "--precision bf16-true or a device with more memory"
        sizes = f"the networks take {needed / MIB:.1f} MiB, the whole device has {there / MIB:.1f} MiB"
        raise MedSoftError(f"{device}: {sizes}; {cure} helps")


def for_inference(net: MedSoftModel, dtype: torch.dtype) -> None:
    """U-Net and autoencoder in ``dtype`` and in the memory layout in which they are fastest."""
    layout = kernel_layout(next(net.unet.parameters()).device, dtype)
    net.unet.to(dtype=dtype).to(memory_format=layout)
    net.first_stage_model.to(dtype=dtype).to(memory_format=torch.channels_last)


class CompiledForward:
    """The forward of a network, compiled at the first call with inputs of a shape; it returns one tensor.

    On a GPU its kernels are recorded as a CUDA graph too (torch's ``reduce-overhead``), so that a call costs the host
    next to nothing; what is returned is a copy, since the next call writes over the graph's own output.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        device = next(network.parameters()).device
        self.name, self.plain, self.on_gpu = name, network.forward, device.type == "cuda"
        mode = "reduce-overhead" if self.on_gpu and BACKEND == "inductor" else None
        compiled = torch.compile(network.forward, dynamic=False, fullgraph=True, backend=BACKEND, mode=mode)
        self.compiled: Callable[..., Tensor] | None = compiled

    def __call__(self, *inputs: Any) -> Tensor:
        if self.compiled is None:
            return self.plain(*inputs)
        try:
            if not self.on_gpu:
                return self.compiled(*inputs)
            torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(*inputs).clone()
        except Exception as error:  # compilers fail in many ways, and each may be overcome by doing without
            if out_of_memory(error):
                raise
            self.compiled = None
            error = getattr(error, "inner_exception", error)  # torch's own says only that a backend failed
            message = "warning: %s cannot be compiled (%s: %s); the run goes on with it uncompiled"
            log.warning(message, self.name, type(error).__name__, first_line(error))
            return self.plain(*inputs)


def compile_networks(net: MedSoftModel) -> None:
    """Let U-Net and autoencoder compile themselves at their first calls; names and weights stay as they are.

    The whole U-Net is one graph: few of its blocks are equal, so that compiling them one by one saves nothing and makes
    calls slower (docs/inference.md), and the host would have some sixty calls to make in each step.
    """
    coder = net.first_stage_model
    networks: dict[str, nn.Module] = {"the U-Net": net.unet, "the encoder": coder.encoder, "the decoder": coder.decoder}
    for name, network in networks.items():
        network.forward = CompiledForward(name, network)
