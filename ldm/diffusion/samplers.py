"""DDIM and DPM-Solver++(2M) with the differential soft mask: plain functions that share a signature.

code          DDIM (Song et al.)                      DPM-Solver++ (Lu et al.)
----          ------------------                      ------------------------
x             x_t                                     x_t
eps           epsilon_theta(x_t)                      epsilon_theta(x_t)
alpha         alpha_t (cumulative product)            alpha_t squared
clean         predicted x_0                           x_theta(x_t, t)
sigma         sigma_t, equation 16, scaled by eta
lambda_       -                                       half the logarithm of the signal-to-noise ratio

Both visit the time steps they are given, from noisy to clean: those of ``SPACINGS``, or any others. From ``first`` on:
those before it are left out where sampling begins with an image, noised to that time step (SDEdit, Meng et al.).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, int, int], Tensor]  # (x, t, index of the step) -> eps
OnStep = Callable[[int, Tensor], None]


def leading(total: int, steps: int) -> list[int]:
    """Evenly spaced from the clean end, offset by one (Stable Diffusion 1.x): the noisiest steps are left out."""
    stride = total // steps
    return [index * stride + 1 for index in reversed(range(steps))]


def trailing(total: int, steps: int) -> list[int]:
    """Evenly spaced from the noisy end, where the initial noise belongs (Lin et al. 2024, table 2)."""
    ends = np.arange(total, 0, -total / steps)[:steps]  # which rounding may make one longer
    return [int(end) - 1 for end in ends.round()]


def polynomial(total: int, steps: int) -> list[int]:
    """The noisiest time step times (k / steps) ** 1.5: denser towards the clean end.

    Between trailing (exponent 1) and the quadratic steps of Song et al. 2021 (2): docs/sampling.md has figures.
    """
    return _by_power(total, steps, lambda share: 1.5)


def fitted(total: int, steps: int) -> list[int]:
    """As ``polynomial``, its exponent 1.9 at the clean end and falling to 1.2: almost even where it is noisy.

    The two numbers were fitted to time steps that a search found best for 4 and 5 steps: docs/sampling.md.
    """
    return _by_power(total, steps, lambda share: 1.9 - 0.7 * share)


def _by_power(total: int, steps: int, exponent: Callable[[float], float]) -> list[int]:
    """The noisiest time step times share ** exponent(share), with the shares k / steps.

    Where rounding would visit a time step twice, the noisier visit moves on to the next one.
    """
    times: list[int] = []
    for k in range(1, steps + 1):
        share = k / steps
        times.append(max(round((total - 1) * share ** exponent(share)), times[-1] + 1 if times else 0))
    return times[::-1]


# ``steps`` of the ``total`` time steps of a schedule, from noisy to clean; the first two as diffusers' ones.
SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "leading": leading,
    "trailing": trailing,
    "polynomial": polynomial,
    "fitted": fitted,
}


def steps_left_out(steps: int, strength: float) -> int:
    """How many of ``steps`` are left out for a start noised to the share ``strength``; as in diffusers' pipelines.

    That share of the steps, rounded down, is visited: the last ones.
    """
    return max(steps - min(int(steps * strength), steps), 0)


def time_passed(timesteps: Sequence[int], index: int) -> float:
    """The share of the time from the first step to the end that has passed when step ``index`` begins: 0 to below 1.

    The last step counts as long as the others are on average. Evenly spaced steps give index / steps.
    """
    if index == 0:
        return 0.0
    steps = len(timesteps)
    return (timesteps[0] - timesteps[index]) * (steps - 1) / ((timesteps[0] - timesteps[-1]) * steps)


@dataclass(frozen=True)
class DifferentialMask:
    """Keeps latent cells on the input's own diffusion path until their soft value says they may be inpainted.

    soft: (B, 1, h, w) soft mask at latent size; original: (B, C, h, w) scaled mode of the unmasked input's latent;
    noise: (B, C, h, w) the image's initial noise. A cell of value s is released at progress >= 1 - s; until then
    it is sqrt(alpha) * original + sqrt(1 - alpha) * noise.
    """

    soft: Tensor
    original: Tensor
    noise: Tensor

    def released(self, progress: float) -> Tensor:
        """bool (B, 1, h, w): the cells that may be inpainted at this progress (0 = first step)."""
        return self.soft >= 1 - progress - 1e-6

    def held(self, x: Tensor, alpha: float, progress: float) -> Tensor:
        """``x`` (B, C, h, w) with the cells that are not yet released put back on the input's path."""
        path = alpha**0.5 * self.original + (1 - alpha) ** 0.5 * self.noise
        return torch.where(self.released(progress), x, path)

    def finished(self, x: Tensor, progress: float) -> Tensor:
        """``x`` (B, C, h, w) with the cells that no step up to ``progress``, the last one's, could inpaint put on the
        input."""
        return torch.where(self.released(progress), x, self.original)


def ddim(
    predict: Predict,
    noise: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    eta: float = 0.0,
    differential: DifferentialMask | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
) -> Tensor:
    """Sample latents from ``noise`` (B, C, h, w) with ``predict(x, t, index) -> eps``; returns the same shape.

    ``timesteps``: the time steps to visit, falling, of which ``first`` are left out: ``noise`` is then a latent noised
    to the next one. An index counts all of them, and so does the differential mask's time: what is left out counts as
    passed. The final alpha is alphas_cumprod[0]. ``eta`` > 0 needs ``step_noise(index)``, the standard normal noise of
    that step. ``on_step(index, x)`` is called after each step.
    """
    if eta > 0 and step_noise is None:
        raise ValueError("eta > 0 needs step_noise")
    alphas, steps = schedule.alphas_cumprod.tolist(), len(timesteps)
    x = noise
    for index in range(first, steps):
        t = timesteps[index]
        alpha, progress = alphas[t], time_passed(timesteps, index)
        alpha_next = alphas[timesteps[index + 1]] if index + 1 < steps else alphas[0]
        if differential is not None:
            x = differential.held(x, alpha, progress)
        eps = predict(x, t, index)
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        x = alpha_next**0.5 * clean + (1 - alpha_next - sigma**2) ** 0.5 * eps
        if step_noise is not None and sigma > 0:
            x = x + sigma * step_noise(index)
        if on_step is not None:
            on_step(index, x)
    return x if differential is None else differential.finished(x, progress)


def dpmpp_2m(
    predict: Predict,
    noise: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    eta: float = 0.0,
    differential: DifferentialMask | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
) -> Tensor:
    """DPM-Solver++(2M), midpoint, as ``ddim``: second order from the second step on, first order in the last.

    The last step ends on the predicted clean latent. In the history a cell that is still held is the input's own
    latent. It is deterministic: ``eta`` other than 0 is refused.
    """
    if eta != 0:
        raise ValueError("DPM-Solver++(2M) is deterministic: eta has to be 0")
    alphas, steps = schedule.alphas_cumprod.tolist(), len(timesteps)
    x, before, lambda_before = noise, None, 0.0
    for index in range(first, steps):
        t = timesteps[index]
        alpha, progress = alphas[t], time_passed(timesteps, index)
        lambda_ = _half_log_ratio(alpha)
        if differential is not None:
            x = differential.held(x, alpha, progress)
        eps = predict(x, t, index)
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        if differential is not None:
            clean = torch.where(differential.released(progress), clean, differential.original)
        if index + 1 == steps:
            x = clean
        else:
            alpha_next = alphas[timesteps[index + 1]]
            h = _half_log_ratio(alpha_next) - lambda_
            target = clean
            if before is not None:
                ratio = (lambda_ - lambda_before) / h
                target = clean + (clean - before) / (2 * ratio)
            x = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * x - alpha_next**0.5 * math.expm1(-h) * target
        before, lambda_before = clean, lambda_
        if on_step is not None:
            on_step(index, x)
    return x if differential is None else differential.finished(x, progress)


def _half_log_ratio(alpha: float) -> float:
    return 0.5 * math.log(alpha / (1 - alpha))


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
