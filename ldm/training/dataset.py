"""From samples to what the networks see. Training and inference prepare pictures with the same function."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ldm.config import DataConfig, TrainingConfig
from ldm.data.preparation import drawable
from ldm.data.samples import Reject, Sample
from ldm.diffusion.noise import named_generator

log = logging.getLogger(__name__)


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
