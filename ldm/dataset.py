"""From samples to what the networks see. Training and inference prepare pictures with the same function."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm.annotations import Reject, Sample
from ldm.config import DataConfig, TrainingConfig
from ldm.diffusion import named_generator
from ldm.errors import MedSoftError
from ldm.files import content_id, named_seed
from ldm.images import Fit, Window, read_image, to_unit, window_of
from ldm.masks import Feather, Mask, lesion_shaped, read_mask, region_for, soft_mask_for, soft_mask_of

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


def sample_identity(sample: Sample) -> list:
    """Everything about a sample that decides what is learned from it or drawn on it, for a run's fingerprint."""
    files = (sample.image, sample.mask, sample.soft_mask, sample.anatomy)
    extra = (sample.meta.get("window"), sample.meta.get("spacing_mm"))
    return [sample.sample_id, sample.prompt, sample.box, extra, [content_id(path) for path in files]]


def drawable(sample: Sample) -> str | None:
    """Why a lesion cannot be drawn on this sample, or None if it can (judged without opening a file)."""
    if not sample.healthy and sample.mask is None:
        return "a diseased sample without a mask"
    if sample.healthy and sample.anatomy is None and sample.mask is None and not any(sample.box):
        return "healthy, and neither anatomy.png nor a mask nor a box says where the vertebra is"
    return None


MOST_SHIFT = 0.125  # of a training crop, as a share of its side, in either direction


def prepare(sample: Sample, data: DataConfig, seed: int, variant: int, training: bool = False) -> Picture:
    """Read one sample and bring it to the model's square.

    A diseased sample uses its own mask; in ``training``, its variants from 1 on are crops shifted by up to an eighth
    of their side. A healthy one gets a lesion-shaped mask inside its vertebra. Masks and shifts are functions of
    (seed, sample_id, variant) alone. Raises MedSoftError naming the sample's file when something is wrong with it.
    """
    reason = drawable(sample)
    if reason:
        raise MedSoftError(f"{sample.sample_id}: {reason}")
    original = read_image(sample.image)
    if sample.healthy:
        region = region_for(sample, original.shape)
        if region is None:
            raise MedSoftError(f"{sample.sample_id}: no vertebra is marked in {sample.anatomy or sample.mask}")
        drawn = lesion_shaped(region, named_seed("lesion-shaped", seed, sample.sample_id, variant))
        return fit_picture(sample, original, Mask(drawn.astype(np.float32)), data)
    own = read_mask(sample.mask, original.shape)
    if own.empty:
        raise MedSoftError(f"{sample.mask}: diseased, but the mask is empty")
    offset = (0.0, 0.0)
    if training and variant > 0:
        rng = np.random.default_rng(named_seed("crop", seed, sample.sample_id, variant))
        offset = tuple(rng.uniform(-MOST_SHIFT, MOST_SHIFT, 2))
    return fit_picture(sample, original, own, data, offset)


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
            rejects.append(Reject(sample.sample_id, str(sample.image), reason))
        else:
            variants = data.healthy_masks if sample.healthy else data.diseased_crops
            items += [Item(sample, variant) for variant in range(variants)]
    return items, rejects


class StageData(Dataset):
    """Cached features of the items, with the random numbers of each use of each item.

    Indexed by (epoch, sample number, repeat); time step, noise, posterior sample, drop-out coin and the choice among a
    sample's masks or crops are functions of (seed, epoch, sample_id, repeat). ``fixed`` ignores the epoch, so that a
    validation number changes only with the model.
    """

    def __init__(self, items, features, prompts: dict[str, dict[str, Tensor]], training: TrainingConfig, fixed: bool):
        self.features, self.prompts, self.training, self.fixed = features, prompts, training, fixed
        self.by_sample: dict[str, list[Item]] = {}
        for item in items:
            self.by_sample.setdefault(item.sample.sample_id, []).append(item)
        self.sample_ids = sorted(self.by_sample)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def diseased(self, number: int) -> bool:
        """Whether sample ``number`` shows a lesion."""
        return not self.by_sample[self.sample_ids[number]][0].sample.healthy

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        epoch, number, repeat = key
        sample_id = self.sample_ids[number]
        use = ("val", 0, repeat) if self.fixed else ("train", epoch, repeat)
        generator = named_generator(self.training.seed, *use, sample_id)
        choices = self.by_sample[sample_id]
        item = choices[int(torch.randint(len(choices), (), generator=generator))]
        found = {**self.features.load(item), **self.prompts[item.sample.prompt]}
        if "latent_mean" in found:
            shape = found["latent_mean"].shape
            found["posterior_noise"] = torch.randn(shape, generator=generator)
            found["noise"] = torch.randn(shape, generator=generator)
            found["t"] = torch.rand((), generator=generator)  # share of the schedule
            found["coin"] = torch.rand((), generator=generator)
        return {**found, "sample_id": sample_id}


class EpochOrder(Sampler):
    """(epoch, sample number, repeat) of one epoch, shuffled by (seed, epoch); shards keep the global batch the same.

    ``balance`` repeats the rarer of healthy and diseased until both are equally frequent. ``start`` skips what an
    interrupted epoch has already seen (in samples of this process), once.
    """

    def __init__(self, data: StageData, training: TrainingConfig, shuffle: bool, rank: int = 0, world: int = 1) -> None:
        self.uses = [(number, 0) for number in range(len(data))]
        if training.balance and shuffle:
            classes = [[n for n in range(len(data)) if data.diseased(n) is kind] for kind in (True, False)]
            most = max(len(members) for members in classes)
            self.uses = [
                (members[place % len(members)], place // len(members))
                for members in classes
                if members
                for place in range(most)
            ]
        self.seed, self.shuffle, self.rank, self.world = training.seed, shuffle, rank, world
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.uses) // self.world)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = list(range(len(self.uses)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=named_generator("order", self.seed, self.epoch)).tolist()
        order += order[: len(self) * self.world - len(order)]  # every process has the same number
        mine, self.start = order[self.rank :: self.world][self.start :], 0
        for place in mine:
            yield (self.epoch, *self.uses[place])
