"""The Medical Semantic Controller (MSC): from the BiomedCLIP tokens of an image whose lesion is hidden, a soft patch
mask and a prompt, it predicts the BiomedCLIP tokens that the image would have with the lesion of the prompt.

Tensor names: N patches, D the width of BiomedCLIP's tokens, W the controller's own width.

    soft          (B, N)     soft patch mask in [0, 1]: the maximum of the soft mask over each patch

What the controller reads is ``ControllerInputs``: a further input is one more field here, filled where features are
computed for training and where images are inpainted; whatever lies between hands the whole tuple on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import BiomedClipConfig, MSCConfig
from ldm.networks.attention import attend


class ControllerInputs(NamedTuple):
    """What the controller reads of a batch of B images."""

    context_tokens: Tensor  # (B, N, D) patch tokens of the masked image
    context_global: Tensor  # (B, D) its CLS token
    prompt_embedding: Tensor  # (B, D_t) projected BiomedCLIP text embedding
    mask: Tensor  # (B, 1, H, W) soft mask in [0, 1], 1 = lesion

    @classmethod
    def of(cls, features: Mapping[str, Any]) -> "ControllerInputs":
        """The fields of a batch of features that the controller reads."""
        return cls(*(features[name] for name in cls._fields))


def input_shapes(clip: BiomedClipConfig, batch: int, pixels: int) -> dict[str, tuple[int, ...]]:
    """The shape of each field of ``ControllerInputs`` for ``batch`` images of ``pixels`` x ``pixels``."""
    return {
        "context_tokens": (batch, clip.grid**2, clip.token_dim),
        "context_global": (batch, clip.token_dim),
        "prompt_embedding": (batch, clip.text_dim),
        "mask": (batch, 1, pixels, pixels),
    }


class MSCBlock(nn.Module):
    """Self-attention and feed-forward, each pre-norm and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, W) -> (B, L, W)."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        attended = attend(q, k, v)  # (B, heads, N + 2, W / heads)
        x = x + self.proj(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def _mlp(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))


class MedicalSemanticController(nn.Module):
    """[global | spatial + position + mask embedding | text] -> transformer -> predicted patch and global tokens.

    A soft patch value s mixes the two mask embeddings, (1 - s) * e0 + s * e1, so the controller sees how much of a
    patch is to be inpainted. At the default sizes it has about 170 million parameters.
    """

    def __init__(self, cfg: MSCConfig, clip: BiomedClipConfig) -> None:
        super().__init__()
        self.cfg, self.grid = cfg, clip.grid
        width = cfg.width
        self.global_in, self.spatial_in = _mlp(clip.token_dim, width), _mlp(clip.token_dim, width)
        self.text_in = _mlp(clip.text_dim, width)
        self.position = nn.Parameter(torch.zeros(clip.grid**2, width))
        self.mask_embedding = nn.Parameter(torch.zeros(2, width))  # e0: visible, e1: to be inpainted
        self.blocks = nn.ModuleList([MSCBlock(width, cfg.heads) for _ in range(cfg.layers)])
        self.norm = nn.LayerNorm(width)
        self.spatial_head = nn.Linear(width, clip.token_dim)
        self.global_head = nn.Linear(width, clip.token_dim)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.mask_embedding, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Residual branches start small, so that depth does not blow up the activations.
                depth = max(1, len(self.blocks))
                scale = (2 * depth) ** -0.5 if name.endswith((".proj", "mlp.2")) else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale if name.startswith("blocks") else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: ControllerInputs) -> tuple[Tensor, Tensor]:
        """Predicted patch tokens (B, N, D) and global token (B, D)."""
        soft = patch_mask(inputs.mask, self.grid)
        mixing = soft if self.cfg.soft_mask_mixing else soft >= 0.5
        mixing = mixing.unsqueeze(-1).to(self.mask_embedding.dtype)  # (B, N, 1)
        mask = torch.lerp(self.mask_embedding[0], self.mask_embedding[1], mixing)  # (B, N, W)
        spatial = self.spatial_in(inputs.context_tokens) + self.position + mask
        head, tail = self.global_in(inputs.context_global), self.text_in(inputs.prompt_embedding)
        x = torch.cat([head[:, None], spatial, tail[:, None]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)  # (B, 1 + N + 1, W)
        return self.spatial_head(x[:, 1:-1]), self.global_head(x[:, 0])


def patch_mask(soft_mask: Tensor, grid: int) -> Tensor:
    """Soft mask (B, 1, H, W) -> soft patch values (B, grid * grid): the maximum over each patch."""
    return F.adaptive_max_pool2d(soft_mask, (grid, grid)).flatten(1)


def semantic_tokens(context_tokens: Tensor, lesion_tokens: Tensor, soft: Tensor) -> Tensor:
    """The tokens handed to the U-Net, the same way in every stage and at inference.

    ``soft * lesion_tokens + (1 - soft) * context_tokens`` per patch, then average-pooled 2x2 on the patch grid.

    Both tokens: (B, N, D) with N a square of an even number; soft: (B, N) in [0, 1]. Returns (B, N / 4, D).
    """
    dtype = context_tokens.dtype  # the controller's own tokens are in half precision in training
    mixed = torch.lerp(context_tokens, lesion_tokens.to(dtype), soft.unsqueeze(-1).to(dtype))
    side = int(mixed.shape[1] ** 0.5)
    pooled = F.avg_pool2d(rearrange(mixed, "b (h w) d -> b d h w", h=side), 2)
    return rearrange(pooled, "b d h w -> b (h w) d")


def msc_loss(tokens: Tensor, target: Tensor, global_token: Tensor, global_target: Tensor, soft: Tensor) -> Tensor:
    """Squared error on the patches, weighted by s and divided by sum(s), mean over channels; plus the global token's.

    Dividing by the same weights that multiply keeps the loss of a one-patch lesion as large as that of a big one.
    Shapes as in the module docstring; every sample needs some s > 0. Returns one value per sample: (B,).
    """
    patch_error = (tokens - target).float().square().mean(dim=-1)  # (B, N)
    spatial = (patch_error * soft).sum(dim=1) / soft.sum(dim=1)
    return spatial + (global_token - global_target).float().square().mean(dim=-1)


def masked_cosine(tokens: Tensor, target: Tensor, soft: Tensor) -> Tensor:
    """Cosine similarity of predicted and true patch tokens, averaged over the patches with weight s: (B,)."""
    similarity = F.cosine_similarity(tokens.float(), target.float(), dim=-1)  # (B, N)
    return (similarity * soft).sum(dim=1) / soft.sum(dim=1)
