"""Alignment of the U-Net's middle block with the true BiomedCLIP tokens (after REPA, Yu et al. 2025, and U-REPA, Tian
et al. 2025, whose loss between samples is left out). It is an option of training; drawing knows nothing of it."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import Architecture
from ldm.networks.msc import masked_cosine

NAME = "alignment"  # of the projection in the networks of a step, and of its weights in last.ckpt while a run goes on


class Projection(nn.Module):
    """From the middle block's features to tokens of BiomedCLIP's width on BiomedCLIP's grid.

    Projected first, enlarged then, as in U-REPA: the block has fewer cells than BiomedCLIP has patches.
    """

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.grid, width = sizes.biomedclip.grid, sizes.biomedclip.token_dim
        channels = sizes.unet.model_channels * sizes.unet.channel_mult[-1]
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, middle: Tensor) -> Tensor:
        """middle (B, C, h, w) -> (B, N, D)."""
        tokens = rearrange(self.layers(rearrange(middle, "b c h w -> b h w c")), "b h w d -> b d h w")
        enlarged = F.interpolate(tokens, (self.grid, self.grid), mode="bilinear", align_corners=False)
        return rearrange(enlarged, "b d h w -> b (h w) d")


def projection_for(sizes: Architecture, seed: int, device: torch.device) -> Projection:
    """A new projection, the same in every process; the random numbers of everything else stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = Projection(sizes)
    return made if device.type == "cpu" else made.to(device)  # fake tensors, on the CPU, cannot be moved


def projection_values(sizes: Architecture) -> int:
    """How many values a projection has."""
    with torch.device("meta"):
        return sum(value.numel() for value in Projection(sizes).parameters())


def alignment_loss(projected: Tensor, target: Tensor, soft: Tensor, mask_weight: float) -> Tensor:
    """1 - cosine of projected and true tokens (B, N, D), averaged over the patches with weights 1 + w s: (B,).

    s (B, N) is the soft patch value, w the ``mask_weight`` of the diffusion loss. REPA weighs all patches alike; here
    the visible ones show in the input what their tokens are, and only those of the lesion must come from a condition.
    """
    return 1 - masked_cosine(projected, target, 1 + mask_weight * soft)
