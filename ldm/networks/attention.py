"""Attention of the U-Net: SD 1.5's transformer block with a third, soft-mask-gated attention.

Tensor names used throughout: ``x`` features, ``text`` (B, 77, D_text) text-encoder states, ``semantic``
(B, N, D_sem) tokens of the Medical Semantic Controller, ``gate`` (B, H*W, 1) the soft mask at this resolution.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass
class Conditioning:
    """What steers the U-Net besides the time step.

    text:      (B, T, D_text) text-encoder states.
    semantic:  (B', N, D_sem) tokens for the third attention of the first B' <= B images; the others have zero tokens,
               for which that attention's output is its bias. None leaves the third attention out altogether.
    soft_mask: (B, 1, h, w) soft mask at latent size, 1 = to be inpainted; None leaves the third attention ungated.

    ``UNet.precompute`` adds what stays the same in all the steps of a sampling run.
    """

    text: Tensor
    semantic: Tensor | None = None
    soft_mask: Tensor | None = None
    _gates: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _open: dict[int, Tensor] = field(default_factory=dict)  # by the number of tokens, of which some are closed
    _kept: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def gate(self, height: int, width: int) -> Tensor | None:
        """The soft mask brought to (height, width) by maximum, so that the smallest lesion survives: (B, h*w, 1)."""
        if self.soft_mask is None:
            return None
        if (height, width) not in self._gates:
            pooled = F.adaptive_max_pool2d(self.soft_mask, (height, width))
            self._gates[height, width] = rearrange(pooled, "b 1 h w -> b (h w) 1")
        return self._gates[height, width]

    def keep_keys_values(self, attention: "CrossAttention", tokens: Tensor) -> None:
        """Compute the keys and values of ``tokens`` (B, N, D) in ``attention`` now, for all calls that follow."""
        self._kept[attention] = attention.keys_values(tokens)

    def keep_open(self, height: int, width: int) -> None:
        """Find out, for all calls that follow, at which of the (height, width) cells any image's gate is open.

        The host waits for the device to tell it, and shapes then depend on the mask.
        """
        gate = self.gate(height, width)
        if gate is None:
            return
        found = (gate > 0).any(dim=2).any(dim=0).nonzero()[:, 0]
        if len(found) < gate.shape[1]:
            self._open[gate.shape[1]] = found

    def open(self, tokens: int) -> Tensor | slice:
        """Index of those of ``tokens`` cells at which the third attention acts: what ``keep_open`` found, else all."""
        return self._open.get(tokens, slice(None))

    def keys_values(self, attention: "CrossAttention", tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, heads, N, d) each, of ``tokens`` (B, N, D): those that are kept, if any are."""
        kept = self._kept.get(attention)
        return attention.keys_values(tokens) if kept is None else kept

    def spread(self, x: Tensor) -> Tensor:
        """``x`` with one row per row of the text, (B, ...): images whose rows were equal so far are repeated."""
        return x if len(x) == len(self.text) else torch.cat([x] * (len(self.text) // len(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: q (B, heads, L, d), k and v (B, heads, N, d) -> (B, heads, L, d).

    For heads of at most 32 channels a CPU's bfloat16 kernel takes up to five times as long for the backward pass as the
    float32 one (torch 2.14, with AMX): there the arithmetic is float32.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] <= 32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention with SD's parameter names; self-attention when no context is given."""

    def __init__(self, dim: int, context_dim: int, heads: int, zero_output: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        out = nn.Linear(dim, dim)
        self.to_out = nn.Sequential(out, nn.Dropout(0.0))
        if zero_output:
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, N, context_dim) -> keys and values, (B, heads, N, dim / heads) each."""
        return self._by_head(self.to_k(context)), self._by_head(self.to_v(context))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, L, dim), keys and values of a context or None (x itself) -> (B, L, dim)."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        out = attend(self._by_head(self.to_q(x)), k, v)  # (B, heads, L, dim / heads)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _by_head(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)


class GEGLU(nn.Module):
    """Linear layer whose second half gates the first through GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, soft-mask-gated semantic attention, text attention, feed-forward (all pre-norm, residual).

    ``attn3`` and ``norm4`` are new to SD 1.5. attn3's output projection starts at zero, so a freshly converted block
    computes exactly what SD's block computes. The gate multiplies attn3's whole output, bias included: where the soft
    mask is 0 the semantic tokens cannot act.

    ``x`` may have fewer rows than the text: rows that differ only in their text and tokens (with and without prompt)
    are the same up to the first attention that reads either, and are computed once up to there.
    """

    def __init__(self, dim: int, heads: int, text_dim: int, semantic_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.attn2 = CrossAttention(dim, text_dim, heads)
        self.attn3 = CrossAttention(dim, semantic_dim, heads, zero_output=True)
        layers = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))
        self.ff = nn.Sequential(OrderedDict(net=layers))
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, x: Tensor, cond: Conditioning, gate: Tensor | None) -> Tensor:
        """x (B, L, dim), gate (B, L, 1) or None for an open one -> (B, L, dim), one row per row of the text."""
        x = x + self.attn1(self.norm1(x))
        x = self._third(x, cond, gate)  # one row per row of the text from here on
        x = x + self.attn2(self.norm2(x), cond.keys_values(self.attn2, cond.text))
        return x + self.ff(self.norm3(x))

    def _third(self, x: Tensor, cond: Conditioning, gate: Tensor | None) -> Tensor:
        """``x`` plus the gated third attention, with one row per row of the text."""
        if cond.semantic is None:
            return cond.spread(x)
        steered, cells = len(cond.semantic), cond.open(x.shape[1])
        out = self.attn3(self.norm4(x[:steered, cells]), cond.keys_values(self.attn3, cond.semantic))
        if steered < len(cond.text):
            # Zero tokens have zero values (no bias there), so what comes out is the output projection's bias.
            bias = cast(nn.Linear, self.attn3.to_out[0]).bias
            rest = bias.expand(len(cond.text) - steered, *out.shape[1:])
            out = torch.cat([out, rest])
        if gate is not None:
            out = gate[:, cells].to(out.dtype) * out
        x = cond.spread(x)
        if isinstance(cells, slice):
            return x + out
        x[:, cells] += out  # no gradients here, and x is this block's own
        return x


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map, with 1x1 convolutions on both sides (SD 1.x layout)."""

    def __init__(self, channels: int, heads: int, text_dim: int, semantic_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, text_dim, semantic_dim)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        gate = cond.gate(height, width)
        # Contiguous, because each layer norm of the block would copy strided tokens again: 2 to 5 % of a call on CPU.
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c").contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, cond, gate)
        out = rearrange(tokens, "b (h w) c -> b c h w", h=height)  # channels last in memory, without a copy
        return cond.spread(x) + self.proj_out(out)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of time steps, cosines first (SD's order): (B,) -> (B, dim), float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
