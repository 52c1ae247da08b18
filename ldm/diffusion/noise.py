"""Noise that depends on names, never on order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.core.devices import on_device
from ldm.core.files import named_seed

NOISE = 2  # which noise names stand for, in records of what was drawn or trained with it; 1: 32 bits of the seed


def named_generator(*names: object) -> np.random.Generator:
    """A generator seeded by the SHA-256 of ``names``: what it yields does not depend on order, batch or device.

    It is numpy's, which takes all bits of a seed; torch's generator of the CPU takes 32, so that among 80,000 images
    two would share their noise as likely as not.
    """
    return np.random.default_rng(named_seed(*names))


def normal(generator: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """The generator's next standard normal numbers, float32."""
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def image_noise(seed: int, sample_id: str, variant: int, shape: tuple[int, ...]) -> Tensor:
    """The initial noise of one image, standard normal of ``shape``, from (seed, sample_id, variant)."""
    return normal(named_generator("picture", seed, sample_id, variant), shape)


def step_noise(index: int, names: Sequence[tuple[int, str, int]], like: Tensor) -> Tensor:
    """The noise that step ``index`` adds to images named (seed, sample_id, variant): of shape and device of ``like``,
    one row for each image."""
    rows = [normal(named_generator("step", index, *name), like.shape[1:]) for name in names]
    return on_device(torch.stack(rows), like.device)
