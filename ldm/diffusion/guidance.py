"""Classifier-free guidance: at which steps it acts, and how its gain in contrast is taken back."""

import math
from collections.abc import Sequence

from torch import Tensor


def guided_steps(steps: int, interval: Sequence[float]) -> range:
    """The indices of the steps at which guidance acts: those whose share index / steps is in [from, to)."""
    first, last = interval
    return range(math.ceil(first * steps - 1e-9), math.ceil(last * steps - 1e-9))


def rescaled(guided: Tensor, prompted: Tensor, x: Tensor, alpha: float, mask: Tensor, share: float) -> Tensor:
    """Guided noise, changed so that guidance adds less contrast: eps (B, C, h, w), float32.

    Guidance also raises the standard deviation of the sample. The predicted x_0 is multiplied so that its deviation
    inside the soft ``mask`` (B, 1, h, w) goes back to that under the prompt alone, by ``share`` (1: wholly). Lin et al.
    2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 15 and 16, which rescale the whole
    prediction; here it is x_0 and the region that is inpainted.
    """
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    clean, plain = ((x - noise * eps) / signal for eps in (guided, prompted))
    factor = _deviation(plain, mask) / _deviation(clean, mask).clamp_min(1e-6)
    return (x - signal * clean * (1 + share * (factor - 1))) / noise


def _deviation(value: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation over channels and cells, weighted by the mask: (B, 1, 1, 1)."""
    weight = mask / (mask.sum((1, 2, 3), keepdim=True) * value.shape[1])
    mean = (weight * value).sum((1, 2, 3), keepdim=True)
    return (weight * (value - mean) ** 2).sum((1, 2, 3), keepdim=True).sqrt()
