"""What tool/doctor.py looks at before a training: every file of the data, the splits, the checkpoint, the installation,
disk and memory. Each check yields Findings; nothing is trained, and only the page of overlays is written."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion
from tqdm import tqdm

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.checkpoints.fitting import check_finite, check_preparation
from ldm.config import Config
from ldm.core.devices import resolve_precision
from ldm.core.errors import MedSoftError
from ldm.core.files import read_text
from ldm.data.annotations import load_samples, read_samples
from ldm.data.checks import (
    annotation_rows,
    check_classes,
    check_unseen,
    doubtful_texts,
    groups_of,
    groups_of_samples,
    leaks,
    looks_personal,
    near_leaks,
    personal_keys,
    sample_attributes,
    separations,
    similar_prompts,
)
from ldm.data.folders import ORIENTATION_NOTE, read_regions
from ldm.data.images import orientations_differ, pixel_digest, read_image
from ldm.data.preparation import inpainting_obstacle, scale_obstacle
from ldm.data.samples import Sample, prompt_of, shown
from ldm.features.names import item_counts, training_items
from ldm.inference.prompts import contradiction, image_facts
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_encoder, open_model
from ldm.reports.overlays import write_overlays
from ldm.training.estimates import check_disk, check_memory
from ldm.training.stage import training_groups

log = logging.getLogger(__name__)

ODD_PROMPT = "\ufffd"  # what is left of a character in another encoding
LONG_PROMPT = 300  # characters; the text encoder reads 75 tokens
FLOORS = {
    "torch": ("2.10", "a fault in safe loading"),
    "pytorch-lightning": ("2.6.6", "a security hole in loading checkpoints"),
}

LEVELS = {"error": "errors", "sample": "samples that cannot be used", "warning": "warnings"}
HELD_OUT = {"val", "test"}
SHOWN = 20  # findings of one level


@dataclass(frozen=True)
class Finding:
    """``level``: error (training would stop or learn something wrong), sample (one sample cannot be used), warning."""

    level: str
    where: str
    text: str


@dataclass(frozen=True)
class DatasetInspection:
    """What decoding one sample has shown: faults, and numbers for the statistics over the data set."""

    sample_id: str
    faults: tuple[Finding, ...]
    digest: str | None = None
    shape: tuple[int, ...] = ()
    depth: int = 0  # bits
    attributes: dict[str, float | str] = field(default_factory=dict)


def look(sample: Sample) -> DatasetInspection:
    """Decode all files of a sample."""
    try:
        image = read_image(sample.image)
    except MedSoftError as error:
        return DatasetInspection(sample.sample_id, (Finding("sample", str(sample.image), error.cause(sample.image)),))
    seen: dict[str, Any] = {"digest": pixel_digest(image), "shape": image.shape, "depth": 8 * image.dtype.itemsize}
    seen["attributes"] = sample_attributes(sample, image)
    faults: list[Finding] = []
    if image.min() == image.max():
        faults.append(Finding("warning", str(sample.image), f"every pixel is {image.min()}: an empty image"))
    try:
        marked = read_regions(image, sample.mask, sample.soft_mask, sample.anatomy, sample.healthy)
        faults += [Finding("warning", str(note.file), str(note)) for note in marked.notes]
        if orientations_differ(sample.files):
            faults.append(Finding("warning", str(sample.image), ORIENTATION_NOTE))
    except MedSoftError as error:
        faults.append(Finding("sample", str(sample.image.parent), str(error)))
    return DatasetInspection(sample.sample_id, tuple(faults), **seen)


def check_everything(
    sets: dict[str, Path],
    config: Config | None,
    ckpt: Path | None,
    save_path: Path,
    devices: int,
    workers: int | None,
    overlays: Path | None = None,
) -> Iterator[Finding]:
    """All checks of data sets (name -> dataset folder or annotation file), and of what ``config`` shall train on them.

    The quick ones come first. ``overlays``: the page to write of all samples with their outlines.
    """
    yield from check_installation()
    if config:
        misfits = list(check_checkpoint(config, ckpt, sets))
        yield from misfits
        if config.training.stage and not misfits:
            trained = {name: path for name, path in sets.items() if name != "test"}
            yield from check_disk_and_memory(config, trained, save_path, devices)
    yield from check_data(sets, workers, overlays)


def log_findings(found: Sequence[Finding]) -> Counter[str]:
    """Log the first SHOWN findings of each level, then how many there are; returns these counts."""
    counts = Counter(finding.level for finding in found)
    for level, words in LEVELS.items():
        for finding in [finding for finding in found if finding.level == level][:SHOWN]:
            log.info("%s: %s: %s", level, finding.where, finding.text)
        if counts[level] > SHOWN:
            log.info("... %d more %s", counts[level] - SHOWN, words)
    log.info("%s", ", ".join(f"{counts[level]} {words}" for level, words in LEVELS.items()))
    return counts


# ------------------------------------------------------------------------------------------------------- data


def check_data(sets: dict[str, Path], workers: int | None = None, overlays: Path | None = None) -> Iterator[Finding]:
    """Every file of the data sets (name -> dataset folder or annotation file), each split, and between them."""
    loaded: dict[str, list[Sample]] = {}
    rows, seconds = [], 0.0
    for name, path in sets.items():
        try:
            samples, rejects = read_samples(path)
        except MedSoftError as error:
            yield Finding("error", name, str(error))
            continue
        yield from (Finding("sample", str(reject.file), reject.reason) for reject in rejects)
        start = time.perf_counter()
        looks = _look_at(samples, name, workers)
        seconds += time.perf_counter() - start
        yield from (fault for seen in looks for fault in seen.faults)
        yield from _doubts(name, samples, looks)
        yield from _about(name, samples, looks)
        yield from _repeated(name, looks)
        rows += annotation_rows(name, samples, {seen.sample_id: seen.digest for seen in looks if seen.digest})
        loaded[name] = samples
    everyone = [sample for samples in loaded.values() for sample in samples]
    if overlays and everyone:
        try:
            count = write_overlays(overlays, everyone)
            log.info("%s: look whether the outlines of these %d samples lie where they belong", overlays, count)
        except MedSoftError as error:
            yield Finding("warning", str(overlays), str(error))
    words = (len(everyone), seconds, 60 * len(everyone) / max(seconds, 1e-9))
    log.info("every file of %d samples decoded in %.1f s (%.0f samples a minute)", *words)
    yield from (Finding("error", " and ".join(sets), leak) for leak in leaks(rows))
    yield from (Finding("warning", " and ".join(sets), leak) for leak in near_leaks(rows))
    if "train" in loaded:
        yield from _seen(loaded, groups_of_samples("train", loaded["train"]), sets["train"])
    yield from check_prompts(everyone)
    yield from check_privacy(everyone)


def _look_at(samples: list[Sample], name: str, workers: int | None) -> list[DatasetInspection]:
    count = workers or os.cpu_count() or 1
    bar = {"desc": f"looking at {name}", "total": len(samples), "unit": " samples", "disable": None}
    if count == 1 or len(samples) < 50:
        return list(tqdm(map(look, samples), **bar))
    with ProcessPoolExecutor(count) as pool:
        return list(tqdm(pool.map(look, samples, chunksize=16), **bar))


def _doubts(name: str, samples: list[Sample], looks: list[DatasetInspection]) -> Iterator[Finding]:
    """Texts that are probably meant otherwise, and notes of the reading that no look at the pixels has repeated."""
    for what, members in doubtful_texts(samples):
        yield from (Finding("warning", name, f"{what}: {member}") for member in members)
    for sample, seen in zip(samples, looks, strict=True):
        said = [note for note in sample.notes if not any(note in fault.text for fault in seen.faults)]
        yield from (Finding("warning", shown(sample.sample_id), note) for note in said)


def _about(name: str, samples: list[Sample], looks: list[DatasetInspection]) -> Iterator[Finding]:
    """What can only be judged over a whole set: classes, depths, sizes, polarity, where lesions may be inpainted."""
    if name == "train":
        try:
            check_classes(name, samples)
        except MedSoftError as error:
            yield Finding("error", name, str(error))
    obstacles = [(sample, reason) for sample in samples if sample.healthy and (reason := inpainting_obstacle(sample))]
    if obstacles:
        healthy, (first, reason) = sum(sample.healthy for sample in samples), obstacles[0]
        text = f"{len(obstacles)} of {healthy} healthy samples cannot be inpainted, so training leaves them out too"
        yield Finding("warning", name, f"{text}; the first, {first.sample_id}: {reason}")
    depths = {seen.depth for seen in looks if seen.depth}
    if len(depths) > 1:
        yield Finding("warning", name, "8- and 16-bit images are mixed; check that `window` in meta.json fits")
    sizes = {seen.shape[:2] for seen in looks if seen.shape}
    small, large = min(sizes, key=np.prod, default=(1, 1)), max(sizes, key=np.prod, default=(1, 1))
    if np.prod(large) > 16 * np.prod(small):
        words = f"{small[1]} x {small[0]} to {large[1]} x {large[0]} pixels"
        yield Finding("warning", name, f"sizes from {words}: lesions differ in scale; see `fit` in the YAML")
    decoded = [(sample, seen.attributes) for sample, seen in zip(samples, looks, strict=True) if seen.attributes]
    for each in separations([sample for sample, _ in decoded], [attributes for _, attributes in decoded]):
        if each.suspicious:
            yield Finding("warning", name, each.warning)
    inverted = sum("inverted?" in fault.text for seen in looks for fault in seen.faults)
    sick = sum(not sample.healthy for sample in samples)
    if sick and inverted > sick / 2:
        yield Finding("error", name, f"{inverted} of {sick} masks look inverted: 1 (white) must be the lesion")


def _repeated(name: str, looks: list[DatasetInspection]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for seen in looks:
        twin = first.setdefault(seen.digest, seen.sample_id) if seen.digest else seen.sample_id
        if twin != seen.sample_id:
            text = f"samples {twin} and {seen.sample_id} are the same image, pixel for pixel"
            yield Finding("warning", name, text)


def check_privacy(samples: list[Sample]) -> Iterator[Finding]:
    """Names and keys that look like a person's or a date: results, reports and annotation files carry them along."""
    found: dict[str, list[str]] = {}
    for sample in samples:
        names = dict.fromkeys((*sample.sample_id.split("/"), sample.patient_id))
        for name in names:
            if kind := looks_personal(name):
                found.setdefault(f"look like {kind}", []).append(name)
        for key in personal_keys(sample.meta):
            found.setdefault(f"have the key {key} in meta.json", []).append(sample.sample_id)
    for what, names in found.items():
        some = ", ".join(list(dict.fromkeys(names))[:3])
        text = f"{len(names)} samples or ids {what} ({some}): results and reports carry that on; use codes instead"
        yield Finding("warning", "privacy", text)


def check_prompts(samples: list[Sample]) -> Iterator[Finding]:
    """Empty, badly encoded, long and nearly equal prompts, and those that contradict their meta.json."""
    for sample in samples:
        file = sample.image.parent / "prompt.txt"
        if wrong := contradiction(sample.prompt, image_facts(sample)):
            yield Finding("warning", str(file), f"contradicts meta.json: {wrong}; correct one of them")
        if not sample.prompt.strip():
            yield Finding("sample", str(file), "the prompt is empty")
        if ODD_PROMPT in sample.prompt or any(ord(char) < 32 and char not in "\t\n\r" for char in sample.prompt):
            yield Finding("warning", str(file), f"odd characters, saved in another encoding? {sample.prompt[:60]!r}")
        if len(sample.prompt) > LONG_PROMPT:
            text = f"{len(sample.prompt)} characters: the text encoder reads 75 tokens only"
            yield Finding("warning", str(file), text)
        if file.is_file():
            try:
                if prompt_of(read_text(file)) != sample.prompt:
                    yield Finding("warning", str(file), "is not what the annotation file says; prepare the data again")
            except MedSoftError as error:
                yield Finding("warning", str(file), error.cause(file))
    for group in similar_prompts(samples):
        some = " | ".join(map(repr, group[:4]))
        yield Finding("warning", "prompts", f"nearly the same, learned as different ones: {some}")


# ------------------------------------------------------------------------------------------------------- machine


def check_installation() -> Iterator[Finding]:
    """torch and torchvision that do not fit each other, releases with known faults."""
    versions: dict[str, str] = {}
    for package in ("torch", "torchvision", "pytorch-lightning", "open_clip_torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("error", package, "is not installed: python -m pip install -r requirements.txt")
    yield from check_versions(versions)
    try:
        import torchvision.ops  # here: where it is broken, that is a finding

        torchvision.ops.nms  # noqa: B018 (missing where the builds do not fit)
    except Exception as error:  # whatever a broken installation raises
        yield Finding("error", "torchvision", f"cannot be used with this torch ({error}); install both in one command")


def check_versions(versions: dict[str, str]) -> Iterator[Finding]:
    """Findings about the installed ``versions`` (package -> version, such as 2.14.1+cu130)."""
    for package, (floor, why) in FLOORS.items():
        if package in versions and TorchVersion(versions[package]) < floor:
            yield Finding("error", package, f"{versions[package]}: releases before {floor} have {why}; update")
    ours, vision = versions.get("torch", ""), versions.get("torchvision", "")
    if len({text.partition("+")[2] for text in (ours, vision) if "+" in text}) > 1:
        yield Finding("error", "torchvision", f"built for {vision}, torch for {ours}; install both together")


def check_checkpoint(config: Config, ckpt: Path | None, sets: dict[str, Path]) -> Iterator[Finding]:
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
    held_out = {}
    for name in HELD_OUT & set(sets):
        with suppress(MedSoftError):  # which is said where the data is looked at
            held_out[name] = load_samples(sets[name])[0]
    try:
        groups = groups_of(source.metadata, source.path)
    except MedSoftError as error:
        yield Finding("error", str(ckpt), str(error))
    else:
        yield from _seen(held_out, groups, source.path)


def _seen(sets: Mapping[str, list[Sample]], groups: Sequence[dict[str, Any]], source: Path) -> Iterator[Finding]:
    """The held-out ones of the ``sets`` that meet the patients behind ``source``, which ``groups`` describe."""
    for name in sorted(HELD_OUT & set(sets)):
        try:
            check_unseen(name, sets[name], groups, source)
        except MedSoftError as error:
            yield Finding("error", name, str(error))


def check_disk_and_memory(config: Config, sets: dict[str, Path], save_path: Path, devices: int) -> Iterator[Finding]:
    """Items that the stage has, samples that lack a scale, free disk and memory against what the stage will take."""
    items, training = [], config.training
    for path in sets.values():
        with suppress(MedSoftError):  # which is said where the data is looked at
            samples = load_samples(path)[0]
            obstacles = [scale_obstacle(sample, config.data) for sample in samples]
            yield from (Finding("sample", str(s.image), why) for s, why in zip(samples, obstacles, strict=True) if why)
            scaled = [sample for sample, why in zip(samples, obstacles, strict=True) if not why]
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
