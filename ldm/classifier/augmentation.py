"""How training images are changed: mildly, or by torchvision's TrivialAugment or RandAugment; never by a flip.

What happens to an image depends on a key of its own alone, so that a resumed run computes what an unbroken one would.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide

from ldm.classifier.network import to_input

LIGHT = "light"
SHIFT = 0.15  # of the side, the farthest that the policies move an image


def augmented(images: np.ndarray, keys: Sequence[int], augmentation: str, device: torch.device) -> torch.Tensor:
    """uint8 (B, S, S) or (B, S, S, 3), changed as the ``augmentation`` of the JSON says: float (B, C, S, S) in [0, 1].

    ``keys``: a seed for each image.
    """
    if augmentation == LIGHT:
        return augment(to_input(images, device), light_draws(keys))
    policy = POLICIES[augmentation](interpolation=InterpolationMode.BILINEAR)
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, key in zip(images, keys, strict=True):
            torch.default_generator.manual_seed(key)
            changed.append(policy(torch.from_numpy(image if image.ndim == 3 else image[..., None]).movedim(-1, 0)))
    return torch.stack(changed).to(device).float().div_(255)


def light_draws(keys: Sequence[int]) -> np.ndarray:
    """(B, 6) uniform in [-1, 1], what ``augment`` does to each image."""
    return np.array([np.random.default_rng(key).uniform(-1, 1, 6) for key in keys])


def augment(images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Shift (up to 6 %), rotate (up to 8 degrees), scale (up to 6 %), change gain (12 %) and offset (5 %); no flips.

    ``images`` (B, C, S, S) in [0, 1]; ``draws`` (B, 6) uniform in [-1, 1].
    """
    change = torch.from_numpy(draws[:, 4:]).float().to(images.device)
    gain, offset = 1 + 0.12 * change[:, 0], 0.05 * change[:, 1]
    return (move(images, draws) * gain.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)).clamp_(0, 1)


def move(images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """The geometric part of ``augment``, which masks share. Edges are repeated, not blackened."""
    change = torch.from_numpy(draws).float().to(images.device)
    angle, scale = change[:, 0] * math.radians(8), 1 + 0.06 * change[:, 1]
    cos, sin, shift = torch.cos(angle) * scale, torch.sin(angle) * scale, 0.12 * change[:, 2:4]  # 2 = the full side
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def operations(bins: int, side: int) -> dict[str, tuple[torch.Tensor, bool]]:
    """Operations with the strengths that they may have, and whether in both directions, as torchvision lists them.

    Those of RandAugment that leave a grey medical image what it is: not Solarize, which makes bright lesions dark, not
    Posterize, which swallows faint ones, not Color. Shifts are smaller, so that the vertebra stays in the image.
    """
    none = torch.tensor(0.0)

    def up_to(strength: float) -> tuple[torch.Tensor, bool]:
        return torch.linspace(0.0, strength, bins), True

    moved = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": SHIFT * side, "TranslateY": SHIFT * side, "Rotate": 30.0}
    toned = {"Brightness": 0.9, "Contrast": 0.9, "Sharpness": 0.9}
    unsigned = dict.fromkeys(("Identity", "AutoContrast", "Equalize"), (none, False))
    return unsigned | {name: up_to(strength) for name, strength in (moved | toned).items()}


class Trivial(TrivialAugmentWide):
    """One of ``operations`` at a random strength (Müller and Hutter 2021). Images are uint8 (C, S, S)."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The image, changed."""
        self.side = image.shape[-1]
        return super().forward(image)

    def _augmentation_space(self, num_bins: int) -> dict[str, tuple[torch.Tensor, bool]]:
        return operations(num_bins, self.side)


class Rand(RandAugment):
    """Two of ``operations`` at 9 of 30 of their strength (Cubuk et al. 2020). Images are uint8 (C, S, S)."""

    def _augmentation_space(self, num_bins: int, image_size: Sequence[int]) -> dict[str, tuple[torch.Tensor, bool]]:
        return operations(num_bins, image_size[1])


POLICIES: dict[str, type[torch.nn.Module]] = {"trivial": Trivial, "rand": Rand}
