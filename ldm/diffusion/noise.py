"""Noise that depends on names, never on order."""

import torch
from torch import Tensor

from ldm.core.files import named_seed


def named_generator(*names: object) -> torch.Generator:
    """A CPU generator seeded by the SHA-256 of ``names``: what it yields does not depend on order, batch or device."""
    return torch.Generator().manual_seed(named_seed(*names))


def image_noise(seed: int, sample_id: str, variant: int, shape: tuple[int, ...]) -> Tensor:
    """The initial noise of one picture, standard normal of ``shape``, from (seed, sample_id, variant)."""
    return torch.randn(shape, generator=named_generator("picture", seed, sample_id, variant))
