"""Noise schedule and diffusion loss (Stable Diffusion 1.x: scaled-linear betas, epsilon prediction)."""

import torch
from torch import Tensor

from ldm.config import DiffusionConfig


class NoiseSchedule:
    """The cumulative products of the forward process: ``alphas_cumprod`` (T,), float32 on the CPU.

    Betas are linear in their square root from ``beta_start`` to ``beta_end`` and computed in float32 (as in diffusers).
    """

    def __init__(self, cfg: DiffusionConfig) -> None:
        ends = cfg.beta_start**0.5, cfg.beta_end**0.5
        roots = torch.linspace(*ends, cfg.timesteps, dtype=torch.float32, device="cpu")
        self.alphas_cumprod = torch.cumprod(1.0 - roots.square(), dim=0)
        self.timesteps = cfg.timesteps
        self._beside_steps = self.alphas_cumprod  # a copy on their device: a training step does not wait for another

    def add_noise(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) z + sqrt(1 - a_t) e: latent and noise (B, C, h, w), integer t (B,)."""
        alpha = self._alpha(t).to(latent.dtype)[:, None, None, None]
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR of the time steps (B,), with SNR = a_t / (1 - a_t): the weight of a noise prediction's
        loss after Hang et al. 2023."""
        alpha = self._alpha(t)
        return (gamma * (1 - alpha) / alpha).clamp(max=1)

    def _alpha(self, t: Tensor) -> Tensor:
        """``alphas_cumprod`` of time steps, beside them."""
        if self._beside_steps.device != t.device:
            self._beside_steps = self.alphas_cumprod.to(t.device)
        return self._beside_steps[t]


def diffusion_loss(predicted: Tensor, noise: Tensor, soft_mask: Tensor, mask_weight: float) -> Tensor:
    """mean((1 + w m) err^2) / mean(1 + w m) for each sample; w = 0 is Stable Diffusion's own loss.

    predicted, noise: (B, C, h, w); soft_mask m: (B, 1, h, w) at latent size. Returns (B,).
    """
    weight = 1.0 + mask_weight * soft_mask.float()
    error = (predicted - noise).float().square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
    return (weight * error).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))


def loss_inside(predicted: Tensor, noise: Tensor, soft_mask: Tensor) -> Tensor:
    """sum(m err^2) / sum(m) for each sample: the error inside the mask alone. Shapes as in ``diffusion_loss``."""
    weight = soft_mask.float()
    error = (predicted - noise).float().square().mean(dim=1, keepdim=True)  # (B, 1, h, w)
    return (weight * error).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))
