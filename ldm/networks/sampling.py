"""Latents from noise, guided as ``SamplingConfig`` says: the one path of inference, training previews and benches."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.config import SamplingConfig
from ldm.diffusion.guidance import guided_steps, rescaled
from ldm.diffusion.samplers import SAMPLERS, SPACINGS, DifferentialMask, steps_left_out
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel


class GuidanceConditions(NamedTuple):
    """What steers the U-Net in a step without guidance, and in a step with it."""

    prompted: Conditioning  # B rows
    both: Conditioning  # 2 B rows: with the prompt, then without it (empty prompt, zero tokens)


def guidance_conditions(
    net: MedSoftModel,
    mask: Tensor,
    text: Tensor,
    empty_text: Tensor,
    semantic: Tensor,
    fixed_shapes: bool = False,
) -> GuidanceConditions:
    """The conditions of a whole sampling run, their keys and values computed once.

    mask: (B, 1, s, s) soft mask at latent size; text: (B, T, D_text); empty_text: (1, T, D_text), the states of the
    empty prompt; semantic: (B, M, D) tokens of the third attention. All of them get the type of ``text``. fixed_shapes:
    no shape depends on the mask's content, see ``UNet.precompute``; so it is on a GPU.
    """
    fixed_shapes = fixed_shapes or mask.device.type != "cpu"
    gate, semantic = mask.to(text.dtype), semantic.to(text.dtype)
    empty = empty_text.to(text.dtype).expand(len(text), -1, -1)
    return GuidanceConditions(
        net.unet.precompute(net.conditioning(gate, text, semantic), fixed_shapes),
        net.unet.precompute(
            net.conditioning(torch.cat([gate, gate]), torch.cat([text, empty]), semantic), fixed_shapes
        ),
    )


def latent_of(net: MedSoftModel, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled latent (B, 4, s, s), float32, of an image (B, 3, S, S) in [-1, 1]: the posterior's mode."""
    return net.scaled(net.encode(image.to(dtype, memory_format=torch.channels_last)).mean.float())


def sample_latent(
    net: MedSoftModel,
    sampling: SamplingConfig,
    noise: Tensor,
    mask: Tensor,
    masked: Tensor,
    original: Tensor | None,
    conditions: GuidanceConditions,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Scaled latents (B, 4, s, s), float32, from ``noise`` with the sampler and the guidance of ``sampling``.

    mask: (B, 1, s, s) soft mask at latent size; masked, original: scaled latents of the masked and of the whole image,
    the latter read only with ``sampling.differential``; step_noise(index): the noise of a step, needed for ``eta`` > 0;
    on_step(index, x) is called after each step. ``start``: the scaled latent that sampling begins with, noised for
    ``sampling.strength`` of the steps, which are the last ones; with 0 it is returned as it is, and with 1 it is not
    seen, as in diffusers' inpainting. Without it all steps are visited, whatever the strength. The latent stays
    float32; the U-Net gets the type of the conditions' text. The host never waits for the device, unless
    ``step_noise`` or ``on_step`` do.
    """
    dtype = conditions.prompted.text.dtype
    inputs = mask.to(dtype), masked.to(dtype)
    scale, alphas = sampling.guidance_scale, net.schedule.alphas_cumprod.tolist()
    guided = guided_steps(sampling.steps, sampling.guidance_interval) if scale != 1.0 else range(0)

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        condition = conditions.both if index in guided else conditions.prompted
        eps = net.denoise(x.to(dtype), x.new_full((1,), t, dtype=torch.long), *inputs, condition).float()
        if index not in guided:
            return eps
        prompted, plain = eps.chunk(2)
        eps = plain + scale * (prompted - plain)
        if not sampling.guidance_rescale:
            return eps
        return rescaled(eps, prompted, x, alphas[t], mask, sampling.guidance_rescale)

    differential = None
    if sampling.differential:
        if original is None:
            raise ValueError("sampling.differential needs the latent of the whole image")
        differential = DifferentialMask(mask, original, noise)
    times = SPACINGS[sampling.spacing](net.schedule.timesteps, sampling.steps)
    first, x = 0, noise
    if start is not None and sampling.strength < 1:
        first = steps_left_out(sampling.steps, sampling.strength)
        if first == sampling.steps:
            return start
        alpha = alphas[times[first]]
        x = alpha**0.5 * start + (1 - alpha) ** 0.5 * noise
    return SAMPLERS[sampling.sampler](
        predict, x, net.schedule, times, sampling.eta, differential, step_noise, on_step, first
    )
