"""The KL autoencoder of Stable Diffusion 1.x; its parameters have the checkpoint's names (``first_stage_model.``)."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import AutoencoderConfig
from ldm.networks.unet import upsample


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over unscaled latents: ``mean``, which is its mode too, and ``logvar``, each (B, 4, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with ``noise`` standard normal of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a residual."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels, its projections stored as 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2]).contiguous())


def middle(channels: int) -> nn.Sequential:
    """Residual block, attention, residual block at the lowest resolution: (B, C, h, w) -> (B, C, h, w)."""
    first, attention, last = ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attention, block_2=last))


def level(channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    """The residual blocks of one resolution, (B, C, H, W) -> (B, C_out, H, W); the way to the next may be added."""
    before = [channels, *[out_channels] * (blocks - 1)]
    return nn.Sequential(OrderedDict(block=nn.Sequential(*(ResnetBlock(width, out_channels) for width in before))))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> moments (B, 2 * latent channels, H / f, W / f)."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths = [cfg.channels * mult for mult in cfg.channel_mult]
        self.conv_in = nn.Conv2d(cfg.in_channels, cfg.channels, 3, padding=1)
        self.down = nn.Sequential()
        for index, (before, width) in enumerate(zip([cfg.channels, *widths], widths, strict=False)):
            made = level(before, width, cfg.num_res_blocks)
            if index < len(widths) - 1:  # SD pads on the right and at the bottom only
                half = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
                made.add_module("downsample", nn.Sequential(half))
            self.down.append(made)
        self.mid = middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> mean and log-variance before ``quant_conv``."""
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent (B, 4, h, w) -> image (B, 3, h * f, w * f). ``up[0]`` is the highest resolution, as in SD."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths = [cfg.channels * mult for mult in cfg.channel_mult]
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()
        for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            made = level(before, width, cfg.num_res_blocks + 1)
            if index > 0:
                made.add_module("upsample", upsample(width))
            self.up.append(made)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], cfg.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w) after ``post_quant_conv`` -> image (B, 3, h * f, w * f), about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for each in reversed(self.up):
            x = each(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Images in [-1, 1] to latents and back. The latent scale is not applied here: ``ldm.networks.model`` does that."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, image: Tensor) -> Posterior:
        """image (B, 3, H, W) in [-1, 1] -> Posterior of (B, 4, H / f, W / f); log-variance clamped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, 4, h, w), unscaled -> image (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent))
