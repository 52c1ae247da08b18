"""The U-Net of Stable Diffusion 1.5 (openai layout, inpainting input), with the third attention of attention.py.

Parameter names equal those under ``model.diffusion_model.`` in ``sd-v1-5-inpainting.ckpt``, plus ``attn3`` and
``norm4`` in each transformer block.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import UNetConfig
from ldm.networks.attention import Conditioning, SpatialTransformer, TransformerBlock, timestep_embedding


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them."""

    def __init__(self, channels: int, out_channels: int, emb_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), time embedding emb (B, D) -> (B, C_out, H, W)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]  # (B, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)


def upsample(channels: int) -> nn.Sequential:
    """x (B, C, H, W) -> (B, C, 2 H, 2 W): nearest neighbours, then a 3x3 convolution."""
    doubled, conv = nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(doubled=doubled, conv=conv))


class StemWithThumbnail(nn.Conv2d):
    """The first convolution, and a second one of what is given beside its own channels.

    The second one begins as any new layer does: zero, it would hardly be heard after a few hundred steps.
    """

    def __init__(self, channels: int, out_channels: int, more: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        self.thumbnail = nn.Conv2d(more, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels + more, H, W) -> (B, C_out, H, W)."""
        return super().forward(x[:, : self.in_channels]) + self.thumbnail(x[:, self.in_channels :])


class UNetBlock(nn.Sequential):
    """A row of layers, each called with what it needs: (x), (x, emb) or (x, conditioning)."""

    def forward(self, x: Tensor, emb: Tensor, cond: Conditioning) -> Tensor:  # type: ignore[override]
        """x (B, C, H, W), time embedding (B, D) or (1, D) -> x of the last layer."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, cond)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise in a latent.

    Call with ``x`` (B, 9, h, w) = [noisy latent, mask, masked-image latent], integer ``timesteps`` (B,), or (1,) for
    all, and a Conditioning of B rows; returns (B, 4, h, w). h and w must be divisible by 2 ** (levels - 1). With
    ``unet.thumbnail`` x is (B, 13, h, w): the latent of the whole image, its lesion hidden, comes last.

    With ``timesteps`` (1,) the Conditioning may have k B rows: k conditions for each image, of which the layers
    before the first one that reads them are computed once. Returns (k B, 4, h, w).
    """

    def __init__(self, cfg: UNetConfig, tokens: int = 0) -> None:
        """``tokens``: how many the learned table has, with ``third_attention: table``."""
        super().__init__()
        self.model_channels, self.levels = cfg.model_channels, len(cfg.channel_mult)
        self.activation_checkpointing = False
        emb_dim = 4 * cfg.model_channels
        self.time_embed = nn.Sequential(nn.Linear(cfg.model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        widths = [cfg.model_channels * mult for mult in cfg.channel_mult]

        def layers(channels: int, out_channels: int, attend: bool) -> list[nn.Module]:
            made: list[nn.Module] = [ResBlock(channels, out_channels, emb_dim)]
            if attend:
                made.append(SpatialTransformer(out_channels, cfg.num_heads, cfg.context_dim, cfg.semantic_dim))
            return made

        channels = cfg.model_channels
        stem = (
            StemWithThumbnail(cfg.in_channels, channels, cfg.out_channels)
            if cfg.thumbnail
            else nn.Conv2d(cfg.in_channels, channels, 3, padding=1)
        )
        self.input_blocks = nn.ModuleList([UNetBlock(stem)])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(UNetBlock(*layers(channels, width, level in cfg.attention_levels)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                halved = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
                self.input_blocks.append(UNetBlock(nn.Sequential(OrderedDict(op=halved))))
                skips.append(channels)
        self.middle_block = UNetBlock(*layers(channels, channels, True), ResBlock(channels, channels, emb_dim))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(cfg.num_res_blocks + 1):
                made = layers(channels + skips.pop(), width, level in cfg.attention_levels)
                channels = width
                if level > 0 and index == cfg.num_res_blocks:
                    made.append(upsample(channels))
                self.output_blocks.append(UNetBlock(*made))
        if cfg.third_attention == "table":
            self.attn3_table = nn.Parameter(torch.randn(tokens, cfg.semantic_dim))  # as large as tokens after a norm
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, cfg.out_channels, 3, padding=1)
        )

    def precompute(self, cond: Conditioning, fixed_shapes: bool) -> Conditioning:
        """``cond`` with what is the same in every step of a sampling run: gates, keys and values. Without gradients.

        The third attention then leaves out the cells at which every gate is closed, unless ``fixed_shapes``: then
        no shape depends on the mask's content, the host does not wait for the device, a compiled U-Net fits all masks.
        """
        for block in self.modules():
            if isinstance(block, TransformerBlock):
                cond.keep_keys_values(block.attn2, cond.text)
                if cond.semantic is not None:
                    cond.keep_keys_values(block.attn3, cond.semantic)
        if cond.soft_mask is not None:
            height, width = cond.soft_mask.shape[-2:]
            for level in range(self.levels):
                cond.gate(height >> level, width >> level)
                if not fixed_shapes:
                    cond.keep_open(height >> level, width >> level)
        return cond

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor, cond: Conditioning) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, cond, use_reentrant=False)
        return block(x, emb, cond)

    def forward(
        self, x: Tensor, timesteps: Tensor, cond: Conditioning, with_middle: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, 9 or 13, h, w), timesteps (B,) or (1,) -> predicted noise (B, 4, h, w); see the class.

        ``with_middle``: and the features that leave the middle block, (B, C, h / k, w / k) with k = 2 ** (levels - 1).
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))  # (B, 4 * channels)
        skips = []
        for block in self.input_blocks:
            x = self._run(block, x, emb, cond)
            skips.append(x)
        x = middle = self._run(self.middle_block, x, emb, cond)
        for block in self.output_blocks:
            x = self._run(block, torch.cat([x, cond.spread(skips.pop())], dim=1), emb, cond)
        return (self.out(x), middle) if with_middle else self.out(x)
