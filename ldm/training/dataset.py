"""From the annotation files to batches: the items to learn from, the random numbers of each use of an item, the order
of an epoch."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.config import Config, DataConfig, TrainingConfig
from ldm.core.errors import MedSoftError, warn_of_first
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import (
    annotation_rows,
    check_classes,
    check_disjoint,
    check_rejected,
    damaged_files,
    warn_of_similar_prompts,
)
from ldm.data.preparation import sample_identity, without_scale
from ldm.data.samples import Reject, Sample
from ldm.diffusion.noise import named_generator, normal
from ldm.features.known import KnownFiles
from ldm.features.names import Item, item_counts, training_items, with_donors
from ldm.features.store import FeatureStore
from ldm.transfer.carrying import read_donor

log = logging.getLogger("ver_train")

SETS = {"train": "training", "val": "validation"}
SHOWN_REJECTS = 5


@dataclass
class TrainingInputs:
    """Training and validation items after the fast checks, and what was left out."""

    items: dict[str, list[Item]] = field(default_factory=dict)  # train, val
    unreadable: list[Reject] = field(default_factory=list)  # counts against training.max_rejected
    undrawable: list[Reject] = field(default_factory=list)  # sound, but nothing says where a lesion would be
    total: int = 0  # samples that the annotation files name
    known: KnownFiles = field(default_factory=KnownFiles)  # what was found of the files of all samples
    identities: list = field(default_factory=list)  # (set, identity of a sample), all that decides what is learned
    trained_on: list = field(default_factory=list)  # what the run's files say of their patients (data.checks)

    @property
    def digests(self) -> Mapping[Path | None, str]:
        """SHA-256 of every file of the items, and of samples that were left out."""
        return self.known.digests

    @property
    def rejects(self) -> list[Reject]:
        """Everything that was left out, for whatever reason."""
        return [*self.unreadable, *self.undrawable]

    @property
    def all_items(self) -> list[Item]:
        """Items to train on, then those to validate on."""
        return [*self.items["train"], *self.items["val"]]

    def samples(self, name: str) -> list[Sample]:
        """The samples of a set, each once."""
        return list({item.sample.sample_id: item.sample for item in self.items[name]}.values())

    def leave_out(self, damaged: list[Reject], allowed: float) -> None:
        """Drop the samples that turned out to be unreadable; MedSoftError if they are too many."""
        damaged = list(dict.fromkeys(damaged))  # a healthy sample has several items
        log_skipped(damaged)
        self.unreadable = list(dict.fromkeys([*self.unreadable, *damaged]))
        check_rejected(self.unreadable, self.total, allowed)
        gone = {str(reject.file) for reject in damaged}
        for name, members in self.items.items():
            self.items[name] = [item for item in members if str(item.sample.image) not in gone]
        if not all(self.items.values()):
            raise MedSoftError("nothing left to train or validate on; every sample was skipped (see above)")


def read_training_inputs(paths: Mapping[str, Path], config: Config, cache: Path | None = None) -> TrainingInputs:
    """The items of the annotation files (or dataset folders) ``train`` and ``val``, each file hashed once.

    A file that has not changed since the last run that kept its features in ``cache`` is not: see KnownFiles. Raises
    MedSoftError for damaged data, for more rejects than ``training.max_rejected`` allows, for sets without lesions, and
    for patients or images that are in both sets.
    """
    inputs, allowed = TrainingInputs(known=KnownFiles(cache)), config.training.max_rejected
    for name, path in paths.items():
        _read_set(inputs, name, path, config.data)
    check_rejected(inputs.unreadable, inputs.total, allowed)
    check_classes(str(paths["train"]), inputs.samples("train"))
    warn_of_similar_prompts(inputs.samples("train"))
    used = [sample for name in paths for sample in inputs.samples(name)]
    lost = [(sample, path) for sample in used for path in sample.files if path and path not in inputs.digests]
    reason = "could not be read any more"
    inputs.leave_out([Reject(sample.sample_id, sample.image, f"{path}: {reason}") for sample, path in lost], allowed)
    if config.training.best_by == "val_lesion_loss" and all(sample.healthy for sample in inputs.samples("val")):
        raise MedSoftError(
            f"{paths['val']}: training.best_by=val_lesion_loss needs diseased samples to validate on, found none; add "
            "some, or choose the best epoch by training.best_by=val_loss"
        )
    if config.data.healthy_masks_from == "carry":
        _give_donors(inputs, paths["train"])
    rows = []
    for name in paths:
        members = inputs.samples(name)
        inputs.identities += [(name, sample_identity(sample, inputs.digests.get)) for sample in members]
        digests = {sample.sample_id: inputs.digests[sample.image] for sample in members}
        rows += annotation_rows(SETS[name], members, digests)
    check_disjoint(rows)
    return inputs


def _give_donors(inputs: TrainingInputs, path: Path) -> None:
    """Healthy items, those to validate on too, get diseased training samples as donors of their masks."""
    diseased = [sample for sample in inputs.samples("train") if not sample.healthy]
    check_donors(path, diseased)
    inputs.items = {name: with_donors(items, diseased) for name, items in inputs.items.items()}


def check_donors(source: Path | str, diseased: Sequence[Sample]) -> None:
    """MedSoftError where none of the ``diseased`` samples of ``source`` has a mask that can be carried over."""
    if not any(_can_give(sample) for sample in diseased):
        raise MedSoftError(
            f"{source}: data.healthy_masks_from=carry needs diseased samples with a mask, and label 1 in their "
            f"anatomy.png if they have one; none of {len(diseased)} does; give data.healthy_masks_from=blob"
        )


def _can_give(sample: Sample) -> bool:
    try:
        body = read_donor(sample).body
    except MedSoftError:
        return False
    return body is None or bool(body.any())


def _read_set(inputs: TrainingInputs, name: str, path: Path, data: DataConfig) -> None:
    samples, missing = load_samples(path)
    damaged = damaged_files(samples)
    inputs.total += len(samples) + len(missing)
    names = {reject.sample_id for reject in damaged}
    samples = [sample for sample in samples if sample.sample_id not in names]
    inputs.known.read(samples)
    unscaled = without_scale(samples, data, inputs.known.recall)
    damaged += unscaled
    names = {reject.sample_id for reject in unscaled}
    scaled = [sample for sample in samples if sample.sample_id not in names]
    items, undrawable = training_items(scaled, data, inputs.known.recall)
    if not items:
        rejects = [*undrawable, *damaged, *missing]
        first = f"; the first, {rejects[0].sample_id}: {rejects[0].reason}" if rejects else ""
        raise MedSoftError(f"{path}: no sample can be used for training ({len(rejects)} read{first})")
    inputs.items[name] = items
    used = inputs.samples(name)
    diseased = sum(not sample.healthy for sample in used)
    patients = counted(len({sample.patient_id for sample in used}), "patient")
    healthy = counted(len(used) - diseased, "healthy sample")
    log.info("%s: %d diseased and %s of %s (%s)", name, diseased, healthy, patients, path)
    log.info("%s: %s", name, item_counts(items))
    if name == "val" and (made := sum(sample.synthetic for sample in used)):
        log.warning(
            "warning: val: %d of %d samples are synthetic; the best epoch is chosen on them too", made, len(used)
        )
    log_skipped([*missing, *damaged, *undrawable])
    if undrawable:
        log.warning(
            "%s: %s cannot be inpainted; left out, which is no damage", name, counted(len(undrawable), "sample")
        )
    inputs.unreadable += [*missing, *damaged]
    inputs.undrawable += undrawable


def log_skipped(rejects: list[Reject]) -> None:
    """One line for each of the first ``rejects``, and how many more there are."""
    warn_of_first(log, (f"skipped {reject}" for reject in rejects), shown=SHOWN_REJECTS)


class Batch(TypedDict, total=False):
    """What a stage reads of B items: the features of FeatureStore, and the random numbers of this use of each item.

    A stage has the entries that its modules give; ``sample_id``, ``mask`` and ``weight`` are always there.
    """

    sample_id: list[str]
    weight: Tensor  # (B,) see EpochOrder; 0 for a sample that only fills up a share
    mask: Tensor  # (B, 1, S, S) soft mask
    context_tokens: Tensor  # (B, N, D) BiomedCLIP tokens of the image whose lesion is hidden
    context_global: Tensor  # (B, D)
    target_tokens: Tensor  # (B, N, D) of the whole image
    target_global: Tensor  # (B, D)
    prompt_embedding: Tensor  # (B, D_t)
    text: Tensor  # (B, 77, D_text) states of the text encoder
    latent_mean: Tensor  # (B, 4, s, s) moments of the unscaled latent
    latent_logvar: Tensor
    masked_latent: Tensor  # (B, 4, s, s) scaled mode of the masked image's latent; see MedSoftModel.surroundings
    posterior_noise: Tensor  # (B, 4, s, s)
    noise: Tensor  # (B, 4, s, s)
    t: Tensor  # (B,) time step as a share of the schedule, [0, 1)
    coin: Tensor  # (B,) of the guidance drop-out, [0, 1)
    diseased: Tensor  # (B,) bool


class StageData(Dataset):
    """Cached features of the items, with the random numbers of each use of each item.

    Indexed by (epoch, sample number, repeat, weight); time step, noise, posterior sample, drop-out coin and the choice
    among a sample's masks or crops are functions of (seed, epoch, sample_id, repeat). ``fixed`` ignores the epoch, so
    that a validation number changes only with the model, and spreads a sample's ``val_draws`` repeats evenly over the
    schedule and over its masks or crops. ``weight`` is handed on (see EpochOrder). An item has the entries of a Batch,
    without their first dimension.
    """

    def __init__(self, items: Sequence[Item], features: FeatureStore, training: TrainingConfig, fixed: bool) -> None:
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

    def __getitem__(self, key: tuple[int, int, int, float]) -> dict[str, Tensor | str]:
        epoch, number, repeat, weight = key
        sample_id = self.sample_ids[number]
        use = ("val", 0, repeat) if self.fixed else ("train", epoch, repeat)
        generator = named_generator(self.training.seed, *use, sample_id)
        choices = self.by_sample[sample_id]
        chosen = int(generator.integers(len(choices)))
        item = choices[repeat % len(choices) if self.fixed else chosen]
        found = self.features.load(item)
        if "latent_mean" in found:
            shape = found["latent_mean"].shape
            found["posterior_noise"] = normal(generator, shape)
            found["noise"] = normal(generator, shape)
            t, coin = torch.from_numpy(generator.random(2, dtype=np.float32))  # t: share of the schedule
            found["t"] = (repeat + t) / self.training.val_draws if self.fixed else t
            found["coin"] = coin
        diseased = torch.tensor(not item.sample.healthy)
        return {**found, "sample_id": sample_id, "weight": torch.tensor(weight), "diseased": diseased}


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
            order = named_generator("order", self.training.seed, self.epoch).permutation(self.count).tolist()
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
        mixed = named_generator("group", training.seed, epoch, place).permutation(len(group)).tolist()
        uses += [(group[mixed[turn % len(group)]], turn // len(group)) for turn in range(quota)]
    return uses


class Loader(DataLoader):
    """Batches of one process, in an order that is told the epoch."""

    sampler: EpochOrder


def loader(
    data: StageData, training: TrainingConfig, shuffle: bool, rank: int = 0, world: int = 1, start: int = 0
) -> Loader:
    """Batches of one process; ``start`` samples of the first epoch have been seen already."""
    order = EpochOrder(data, training, shuffle, rank, world)
    order.start = start
    workers = training.workers
    if workers < 0:  # a GPU would wait while its own process reads
        workers = 2 if torch.cuda.is_available() else 0
    return Loader(
        data,
        batch_size=training.batch_size // world,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        persistent_workers=workers > 0 and shuffle,  # those of validation are gone while training goes on
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    """A cluster signals every process of a job; the one that trains decides what happens, and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
