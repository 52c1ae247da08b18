"""Whether a stage can be trained: its checkpoint, its encoder, the patients it was trained on, disk and memory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.checkpoints.fitting import check_finite, check_preparation
from ldm.config import Config
from ldm.core.devices import resolve_precision
from ldm.core.errors import MedSoftError
from ldm.data.checks import groups_of
from ldm.data.preparation import without_scale
from ldm.data.samples import Sample
from ldm.doctor.datasets import seen_before
from ldm.doctor.samples import Finding
from ldm.features.names import item_counts, training_items
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_encoder, open_model
from ldm.training.dataset import check_donors
from ldm.training.estimates import check_disk, check_memory
from ldm.training.stage import training_groups

log = logging.getLogger(__name__)


def check_stage(
    config: Config, ckpt: Path | None, sets: Mapping[str, list[Sample]], save_path: Path, devices: int
) -> Iterator[Finding]:
    """What would stop the stage that ``config`` describes from being trained on the ``sets`` of samples (by name)."""
    misfits = list(check_checkpoint(config, ckpt, sets))
    yield from misfits
    if config.training.stage and config.data.healthy_masks_from == "carry":
        yield from check_masks(sets)
    if config.training.stage and not misfits:
        trained = [samples for name, samples in sets.items() if name != "test"]
        yield from check_disk_and_memory(config, trained, save_path, devices)


def check_masks(sets: Mapping[str, list[Sample]]) -> Iterator[Finding]:
    """Whether the samples to train on have masks that can be carried over to healthy ones."""
    for name in {"train", "data"} & set(sets):
        try:
            check_donors(name, [sample for sample in sets[name] if not sample.healthy])
        except MedSoftError as error:
            yield Finding("error", name, str(error))


def check_checkpoint(config: Config, ckpt: Path | None, sets: Mapping[str, list[Sample]]) -> Iterator[Finding]:
    """Whether the checkpoint and the BiomedCLIP folder fit the configuration, and held-out ``sets`` the checkpoint."""
    try:
        with torch.device("meta"):
            net = MedSoftModel(config.architecture, config.training.builds)
        if config.training.stage:
            training_groups(net, config.training)
        source = read_checkpoint(ckpt) if ckpt else None
        if source:
            check_finite(source.state, source.path)
            check_preparation(source, config)
        if source and config.training.builds:
            open_model(config, source, config.training.builds)
        elif config.training.builds:
            open_encoder(config.biomedclip)
    except MedSoftError as error:
        yield Finding("error", str(ckpt or config.biomedclip.path), str(error))
        return
    if not source:
        return
    try:
        groups = groups_of(source.metadata, source.path)
    except MedSoftError as error:
        yield Finding("error", str(ckpt), str(error))
    else:
        yield from seen_before(sets, groups, source.path)


def check_disk_and_memory(
    config: Config, sets: Sequence[list[Sample]], save_path: Path, devices: int
) -> Iterator[Finding]:
    """Items of the stage, samples that a scale in mm leaves out, free disk and memory against what the stage takes."""
    items, training = [], config.training
    for samples in sets:
        unscaled = without_scale(samples, config.data)
        yield from (Finding("sample", str(reject.file), reject.reason) for reject in unscaled)
        left_out = {reject.sample_id for reject in unscaled}
        scaled = [sample for sample in samples if sample.sample_id not in left_out]
        items += training_items(scaled, config.data)[0]
    log.info("to learn from and to validate on: %s", item_counts(items))
    try:
        if lack := check_disk(save_path, config.architecture, training, items):
            yield Finding("warning", str(save_path), lack)
    except MedSoftError as error:
        yield Finding("error", str(save_path), str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = resolve_precision(training.precision) == "bf16-mixed"
    try:
        if lack := check_memory(config.architecture, training, devices, device, half):
            yield Finding("warning", device.type, lack)
    except MedSoftError as error:
        yield Finding("error", device.type, str(error))
