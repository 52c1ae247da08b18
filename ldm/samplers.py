"""DDIM sampling with the differential soft mask.

code        paper (Song et al., Denoising Diffusion Implicit Models)
----        ----
x           x_t
eps         epsilon_theta(x_t)
alpha       alpha_t (cumulative product; "alpha-bar" elsewhere)
sigma       sigma_t, equation 16, scaled by eta
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import NoiseSchedule


def leading_timesteps(total: int, steps: int) -> list[int]:
    """``steps`` time steps from noisy to clean, evenly spaced from the start, offset by one (SD 1.x's spacing)."""
    stride = total // steps
    return [index * stride + 1 for index in reversed(range(steps))]


@dataclass(frozen=True)
class DifferentialMask:
    """Keeps latent cells on the input's own diffusion path until their soft value says they may be drawn.

    soft: (B, 1, h, w) soft mask at latent size; original: (B, C, h, w) scaled mode of the unmasked input's latent;
    noise: (B, C, h, w) the picture's initial noise. A cell of value s is released at progress >= 1 - s; until then
    it is sqrt(alpha) * original + sqrt(1 - alpha) * noise.
    """

    soft: Tensor
    original: Tensor
    noise: Tensor

    def held(self, x: Tensor, alpha: float, progress: float) -> Tensor:
        """``x`` with the cells that are not yet released put back on the input's path."""
        path = alpha**0.5 * self.original + (1 - alpha) ** 0.5 * self.noise
        return torch.where(self.soft >= 1 - progress - 1e-6, x, path)


def ddim(
    predict: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    differential: DifferentialMask | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw latents from ``noise`` (B, C, h, w) with ``predict(x, t) -> eps``; returns latents of the same shape.

    Leading spacing with offset 1; the final alpha is alphas_cumprod[0]. ``eta`` > 0 needs ``step_noise(index)``, the
    standard normal noise of that step. ``on_step(index)`` is called after each step.
    """
    if eta > 0 and step_noise is None:
        raise ValueError("eta > 0 needs step_noise")
    alphas = schedule.alphas_cumprod.tolist()
    timesteps = leading_timesteps(schedule.timesteps, steps)
    x = noise
    for index, t in enumerate(timesteps):
        alpha = alphas[t]
        alpha_next = alphas[timesteps[index + 1]] if index + 1 < steps else alphas[0]
        if differential is not None:
            x = differential.held(x, alpha, index / steps)
        eps = predict(x, t)
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        x = alpha_next**0.5 * clean + (1 - alpha_next - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * step_noise(index)
        if on_step is not None:
            on_step(index)
    if differential is not None:
        # Cells that no step was allowed to draw end exactly on the input.
        x = torch.where(differential.soft >= 1 / steps - 1e-6, x, differential.original)
    return x
