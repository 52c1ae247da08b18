"""Noise that depends on names, never on order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.core.files import named_seed


def named_generator(*names: object) -> torch.Generator:
    """A CPU generator seeded by the SHA-256 of ``names``: what it yields does not depend on order, batch or device."""
    return torch.Generator().manual_seed(named_seed(*names))


def image_noise(seed: int, sample_id: str, variant: int, shape: tuple[int, ...]) -> Tensor:
    """The initial noise of one image, standard normal of ``shape``, from (seed, sample_id, variant)."""
    return torch.randn(shape, generator=named_generator("picture", seed, sample_id, variant))


def step_noise(index: int, names: Sequence[tuple[int, str, int]], like: Tensor) -> Tensor:
    """The noise that step ``index`` adds to images named (seed, sample_id, variant): of shape and device of ``like``,
    one row for each image."""
    rows = [torch.randn(like.shape[1:], generator=named_generator("step", index, *name)) for name in names]
    return torch.stack(rows).to(like.device)
