"""From samples to what the networks see. Training and inference prepare pictures with the same function."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm.annotations import Reject, Sample
from ldm.config import DataConfig, TrainingConfig
from ldm.diffusion import named_generator
from ldm.errors import MedSoftError
from ldm.files import content_id, named_seed
from ldm.images import Fit, Window, extents, read_image, to_unit, window_of
from ldm.masks import (
    DIAMETERS,
    TARGET_LABEL,
    Feather,
    Mask,
    lesion_shaped,
    read_anatomy,
    read_mask,
    region_for,
    soft_mask_for,
    soft_mask_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Picture:
    """A sample at native size and as the networks see it.

    original: HxW or HxWx3 pixels as in the file; levels: its (low, high) window to [0, 1]; hard: bool HxW lesion
    region; soft: float32 HxW soft mask; window: the square the model sees. image: (3, S, S) in [-1, 1]; mask: soft,
    (1, S, S) in [0, 1].
    """

    original: np.ndarray
    levels: tuple[float, float]
    hard: np.ndarray
    soft: np.ndarray
    window: Window
    image: Tensor
    mask: Tensor


def sample_identity(sample: Sample, content: Callable[[Path | None], str | None] = content_id) -> list:
    """Everything about a sample that decides what is learned from it or drawn on it, for a run's fingerprint.

    ``content`` gives a file's SHA-256, perhaps one that it remembers.
    """
    files = (sample.image, sample.mask, sample.soft_mask, sample.anatomy)
    extra = (sample.meta.get("window"), sample.meta.get("spacing_mm"))
    return [sample.sample_id, sample.prompt, sample.box, extra, [content(path) for path in files]]


def drawable(sample: Sample) -> str | None:
    """Why a lesion cannot be drawn on this sample, or None if it can (judged without opening a file)."""
    if not sample.healthy and sample.mask is None:
        return "a diseased sample without a mask"
    if sample.healthy and sample.anatomy is None and sample.mask is None and not any(sample.box):
        return "healthy, and neither anatomy.png nor a mask nor a box says where the vertebra is"
    return None


MOST_SHIFT = 0.125  # of a training crop, as a share of its side, in either direction


def prepare(
    sample: Sample, data: DataConfig, seed: int, variant: int, training: bool = False, diameter: float | None = None
) -> Picture:
    """Read one sample and bring it to the model's square.

    A diseased sample uses its own mask; in ``training``, its variants from 1 on are crops shifted by up to an eighth
    of their side. A healthy one gets a lesion-shaped mask inside its vertebra. Masks and shifts are functions of
    (seed, sample_id, variant) alone; ``diameter`` is the size of a healthy one's mask, within a tenth (see
    ``lesion_diameter``). Raises MedSoftError naming the sample's file when something is wrong with it.
    """
    reason = drawable(sample)
    if reason:
        raise MedSoftError(f"{sample.sample_id}: {reason}")
    original = read_image(sample.image)
    if sample.healthy:
        region = region_for(sample, original.shape)
        if region is None:
            raise MedSoftError(f"{sample.sample_id}: no vertebra is marked in {sample.anatomy or sample.mask}")
        sizes = (0.9 * diameter, 1.1 * diameter) if diameter else DIAMETERS
        drawn = lesion_shaped(region, named_seed("lesion-shaped", seed, sample.sample_id, variant), sizes)
        return fit_picture(sample, original, Mask(drawn.astype(np.float32)), data)
    own = read_mask(sample.mask, original.shape)
    if own.empty:
        raise MedSoftError(f"{sample.mask}: diseased, but the mask is empty")
    offset = (0.0, 0.0)
    if training and variant > 0:
        rng = np.random.default_rng(named_seed("crop", seed, sample.sample_id, variant))
        offset = tuple(rng.uniform(-MOST_SHIFT, MOST_SHIFT, 2))
    return fit_picture(sample, original, own, data, offset)


def lesion_diameter(sample: Sample) -> float | None:
    """Equivalent diameter of a sample's lesion, relative to the smaller side of its vertebra in ``anatomy.png``.

    None where no vertebra is marked or there is no lesion: only a vertebra tells the size of a lesion in other images.
    """
    if sample.anatomy is None or sample.mask is None:
        return None
    lesion = read_mask(sample.mask).hard
    vertebra = read_anatomy(sample.anatomy, lesion.shape) == TARGET_LABEL
    if not vertebra.any() or not lesion.any():
        return None
    smaller = min(last - first for first, last in extents(vertebra))
    return 2 * math.sqrt(np.count_nonzero(lesion) / math.pi) / smaller


def fit_picture(
    sample: Sample, original: np.ndarray, mask: Mask, data: DataConfig, offset: tuple[float, float] = (0.0, 0.0)
) -> Picture:
    """Put an image and the mask to draw in together; a diseased sample's ``soft_mask.png`` is used as it is.

    ``offset`` moves the crop (see ``Fit.window``).
    """
    feather = Feather(data.feather, data.feather_unit)
    if sample.soft_mask is not None and not sample.healthy:
        soft = soft_mask_of(sample, original.shape, feather)
    else:
        soft = soft_mask_for(mask, feather, sample.meta.get("spacing_mm"))
    window = Fit(data.fit, data.image_size, data.context).window(original.shape, soft, offset)
    levels = window_of(original, sample.meta.get("window"))
    seen = window.forward(to_unit(original, levels)) * 2 - 1
    seen = np.repeat(seen[..., None], 3, axis=2) if seen.ndim == 2 else seen  # the networks read RGB
    image = torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1)))
    return Picture(original, levels, mask.hard, soft, window, image, torch.from_numpy(window.forward_mask(soft))[None])


@dataclass(frozen=True)
class Item:
    """One picture to learn from: a sample, and which of its fixed masks (healthy) or crops (diseased)."""

    sample: Sample
    variant: int

    @property
    def name(self) -> str:
        """The item's name, unique in a data set."""
        return f"{self.sample.sample_id}#{self.variant}"


def training_items(samples: Sequence[Sample], data: DataConfig) -> tuple[list[Item], list[Reject]]:
    """Every mask or crop of every sample that can be drawn on, and the samples that cannot, with the reason."""
    items, rejects = [], []
    for sample in samples:
        reason = drawable(sample)
        if reason:
            rejects.append(Reject(sample.sample_id, sample.image, reason))
        else:
            variants = data.healthy_masks if sample.healthy else data.diseased_crops
            items += [Item(sample, variant) for variant in range(variants)]
    return items, rejects


class StageData(Dataset):
    """Cached features of the items, with the random numbers of each use of each item.

    Indexed by (epoch, sample number, repeat, weight); time step, noise, posterior sample, drop-out coin and the choice
    among a sample's masks or crops are functions of (seed, epoch, sample_id, repeat). ``fixed`` ignores the epoch, so
    that a validation number changes only with the model, and spreads a sample's ``val_draws`` repeats evenly over the
    schedule and over its masks or crops. ``weight`` is handed on (see EpochOrder).
    """

    def __init__(self, items: Sequence[Item], features: Any, training: TrainingConfig, fixed: bool) -> None:
        self.features, self.training, self.fixed = features, training, fixed
        self.by_sample: dict[str, list[Item]] = {}
        for item in items:
            self.by_sample.setdefault(item.sample.sample_id, []).append(item)
        self.sample_ids = sorted(self.by_sample)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def sample(self, number: int) -> Sample:
        """Sample ``number``."""
        return self.by_sample[self.sample_ids[number]][0].sample

    def __getitem__(self, key: tuple[int, int, int, float]) -> dict:
        epoch, number, repeat, weight = key
        sample_id = self.sample_ids[number]
        use = ("val", 0, repeat) if self.fixed else ("train", epoch, repeat)
        generator = named_generator(self.training.seed, *use, sample_id)
        choices = self.by_sample[sample_id]
        chosen = int(torch.randint(len(choices), (), generator=generator))
        item = choices[repeat % len(choices) if self.fixed else chosen]
        found = self.features.load(item)
        if "latent_mean" in found:
            shape = found["latent_mean"].shape
            found["posterior_noise"] = torch.randn(shape, generator=generator)
            found["noise"] = torch.randn(shape, generator=generator)
            t = torch.rand((), generator=generator)  # share of the schedule
            found["t"] = (repeat + t) / self.training.val_draws if self.fixed else t
            found["coin"] = torch.rand((), generator=generator)
        return {**found, "sample_id": sample_id, "weight": torch.tensor(weight)}


class EpochOrder(Sampler):
    """(epoch, sample number, repeat, weight) of one epoch, shuffled by (seed, epoch); a process takes its share.

    The global batch is the same however many processes share it. Where they cannot share the last one equally, a
    sample is repeated with weight 0 and the others weigh so much that the mean over all processes is the mean over the
    batch; else every weight is 1. ``start`` skips what an interrupted epoch has already seen (in samples of this
    process), once. Balancing (see ``balanced_uses``) concerns the shuffled order only, ``val_draws`` the other one.
    """

    def __init__(self, data: StageData, training: TrainingConfig, shuffle: bool, rank: int = 0, world: int = 1) -> None:
        self.data, self.training, self.shuffle = data, training, shuffle
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0
        self.count = len(self._uses())

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.world)

    def _uses(self) -> list[tuple[int, int]]:
        if self.training.balance and self.shuffle:
            return balanced_uses(self.data, self.training, self.epoch)
        draws = 1 if self.shuffle else self.training.val_draws
        return [(number, draw) for number in range(len(self.data)) for draw in range(draws)]

    def __iter__(self) -> Iterator[tuple[int, int, int, float]]:
        uses = self._uses()
        order = list(range(self.count))
        if self.shuffle:
            generator = named_generator("order", self.training.seed, self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        first, self.start = self.start, 0
        batch = self.training.batch_size
        for place in range(self.rank + first * self.world, len(self) * self.world, self.world):
            real = min(batch, self.count - place // batch * batch)  # samples of this global batch
            share = self.world * -(-real // self.world) / real
            weight = share if place < self.count else 0.0
            yield (self.epoch, *uses[order[place % self.count]], weight)


def balanced_uses(data: StageData, training: TrainingConfig, epoch: int) -> list[tuple[int, int]]:
    """(sample number, repeat) of an epoch in which every group is as frequent as the others.

    ``training.balance_by`` class: the rarer of healthy and diseased is repeated until both are equally frequent, so
    nobody is left out. prompt: every distinct sentence gets the same share of an epoch as long as the data set; a rare
    one is repeated, of a frequent one other members come in every epoch.
    """
    groups: dict[Any, list[int]] = {}
    for number in range(len(data)):
        sample = data.sample(number)
        groups.setdefault(sample.healthy if training.balance_by == "class" else sample.prompt, []).append(number)
    members = [groups[key] for key in sorted(groups)]
    if training.balance_by == "class":
        most = max(len(group) for group in members)
        return [(group[place % len(group)], place // len(group)) for group in members for place in range(most)]
    uses = []
    for place, group in enumerate(members):
        # What is left over after equal shares goes to other groups in every epoch.
        quota = len(data) // len(members) + ((place - epoch) % len(members) < len(data) % len(members))
        mixed = torch.randperm(len(group), generator=named_generator("group", training.seed, epoch, place)).tolist()
        uses += [(group[mixed[turn % len(group)]], turn // len(group)) for turn in range(quota)]
    return uses
