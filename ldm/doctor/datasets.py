"""Data sets inspected before a training: every file, the splits, prompts, privacy. No torch.

Each check yields Findings; only the page of overlays is written.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError
from ldm.core.files import read_text
from ldm.core.tables import counted
from ldm.data.annotations import none_usable, read_samples
from ldm.data.checks import (
    annotation_rows,
    check_classes,
    check_unseen,
    doubtful_texts,
    groups_of_samples,
    leaks,
    looks_personal,
    near_leaks,
    personal_keys,
    separations,
    similar_prompts,
)
from ldm.data.regions import inpainting_obstacle
from ldm.data.samples import Reject, Sample, prompt_of, shown
from ldm.doctor.samples import DatasetInspection, Finding, inspected_folder, inspected_samples
from ldm.inference.prompts import contradiction, image_facts
from ldm.reports.overlays import OverlayPage

log = logging.getLogger(__name__)

ODD_PROMPT = "\ufffd"  # what is left of a character in another encoding
LONG_PROMPT = 300  # characters; the text encoder reads 75 tokens
# What findings of a level are called, one of them and several.
LEVELS = {
    "error": ("error", "errors"),
    "sample": ("sample that cannot be used", "samples that cannot be used"),
    "warning": ("warning", "warnings"),
}
HELD_OUT = {"val", "test"}
SHOWN = 20  # findings of one level
SHOWN_FAULTY = 300  # samples with a fault on the page of overlays, beside those that are there anyway


@dataclass
class InspectedSet:
    """A data set that was inspected: its samples, what cannot be used, and what the files of each sample show."""

    samples: list[Sample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    inspections: list[DatasetInspection] = field(default_factory=list)
    error: str | None = None  # why there is none
    listed: bool = True  # by an annotation file, whose prompts may be older than the samples' own


def log_findings(found: Sequence[Finding]) -> Counter[str]:
    """Log the first SHOWN findings of each level, then how many there are; returns these counts."""
    counts = Counter(finding.level for finding in found)
    for level, words in LEVELS.items():
        for finding in [finding for finding in found if finding.level == level][:SHOWN]:
            log.info("%s: %s: %s", level, finding.where, finding.text)
        if counts[level] > SHOWN:
            more = [f"more {word}" for word in words]
            log.info("... %s", counted(counts[level] - SHOWN, *more))
    log.info("%s", ", ".join(counted(counts[level], *words) for level, words in LEVELS.items()))
    return counts


def inspect_data(
    sets: Mapping[str, Path], workers: int | None, overlays: Path | None
) -> tuple[dict[str, InspectedSet], list[Finding]]:
    """Read the data sets (name -> dataset folder or annotation file) and decode every file of them once."""
    start = time.perf_counter()
    page = Pictures(overlays) if overlays else None
    found = {name: _inspect_set(name, path, workers, page) for name, path in sets.items()}
    seconds, count = time.perf_counter() - start, sum(len(each.samples) for each in found.values())
    faults = page.finish(count) if page else []
    words = (counted(count, "sample"), seconds, 60 * count / max(seconds, 1e-9))
    log.info("every file of %s decoded in %.1f s (%.0f samples a minute)", *words)
    return found, faults


def _inspect_set(name: str, path: Path, workers: int | None, page: "Pictures | None") -> InspectedSet:
    found, known = InspectedSet(listed=not path.is_dir()), dict[Any, Any]()
    try:
        if path.is_dir():
            pairs: Iterable[tuple[Any, Any]] = inspected_folder(path, workers, page is not None)
        else:
            samples, found.rejects = read_samples(path)
            inspections = inspected_samples(samples, workers, page is not None)
            bar = tqdm(inspections, f"looking at {name}", len(samples), unit=" samples", disable=None)
            pairs = zip(samples, bar, strict=True)
        for sample, inspection in pairs:
            if isinstance(sample, Reject):
                found.rejects.append(sample)
                continue
            found.samples.append(sample)
            found.inspections.append(_compact(sample, inspection, known))
            if page:
                page.add(sample, inspection)
        found.rejects.sort(key=lambda reject: (reject.sample_id, str(reject.file)))
        if not found.samples:
            raise none_usable(path, found.rejects)
    except MedSoftError as error:
        return InspectedSet(error=str(error))
    return found


def _compact(sample: Sample, inspection: DatasetInspection, known: dict[Any, Any]) -> DatasetInspection:
    """The inspection of ``sample`` without its tile; what other samples have too is kept once, in ``known``."""
    attributes = known.setdefault(tuple(inspection.attributes.items()), inspection.attributes)
    shape = known.setdefault(inspection.shape, inspection.shape)
    return replace(inspection, sample_id=sample.sample_id, attributes=attributes, shape=shape, tile=None)


class Pictures:
    """The page of overlays: samples evenly spread over each data set, and about as many more that have a fault."""

    def __init__(self, path: Path) -> None:
        self.path, self.page, self.more = path, OverlayPage(path), SHOWN_FAULTY
        self.error: MedSoftError | None = None

    def add(self, sample: Sample, inspection: DatasetInspection) -> None:
        """Show a sample that has been inspected, if there is room for it."""
        if inspection.tile is None or self.error or not (inspection.spread or self.more):
            return
        self.more -= not inspection.spread
        try:
            self.page.add(sample, inspection.tile)
        except MedSoftError as error:
            self.error = error

    def finish(self, total: int) -> list[Finding]:
        """Write the page of ``total`` samples; a finding where that cannot be."""
        try:
            if self.error:
                raise self.error
            if self.page.count:
                self.page.finish()
        except MedSoftError as error:
            return [Finding("warning", str(self.path), str(error))]
        if self.page.count:
            which = counted(self.page.count, "sample") + f" (of {total})" * (self.page.count < total)
            log.info("%s: look whether the outlines, of %s, lie where they belong", self.path, which)
        return []


def check_data(sets: Mapping[str, Path], found: Mapping[str, InspectedSet]) -> Iterator[Finding]:
    """What the files of the data sets (by name) have shown, each split, and what is between them."""
    rows = []
    for name, each in found.items():
        if each.error:
            yield Finding("error", name, each.error)
            continue
        samples, inspections = each.samples, each.inspections
        yield from (Finding("sample", str(reject.file), reject.reason) for reject in each.rejects)
        yield from (fault for inspection in inspections for fault in inspection.faults)
        yield from _doubts(name, samples, inspections)
        yield from _about(name, samples, inspections)
        yield from _repeated(name, inspections)
        digests = {inspection.sample_id: inspection.digest for inspection in inspections if inspection.digest}
        rows += annotation_rows(name, samples, digests)
    loaded = {name: each.samples for name, each in found.items() if not each.error}
    everyone = [sample for samples in loaded.values() for sample in samples]
    yield from (Finding("error", " and ".join(sets), leak) for leak in leaks(rows))
    yield from (Finding("warning", " and ".join(sets), leak) for leak in near_leaks(rows))
    if "train" in loaded:
        yield from seen_before(loaded, groups_of_samples("train", loaded["train"]), sets["train"])
    for name, samples in loaded.items():
        yield from check_prompts(samples, found[name].listed)
    for group in similar_prompts(everyone):
        some = " | ".join(map(repr, group[:4]))
        yield Finding("warning", "prompts", f"nearly the same, learned as different ones: {some}")
    yield from check_privacy(everyone)


def _doubts(name: str, samples: list[Sample], inspections: list[DatasetInspection]) -> Iterator[Finding]:
    """Texts that are probably meant otherwise, and notes of the reading that no inspection of pixels has repeated."""
    for what, members in doubtful_texts(samples):
        yield from (Finding("warning", name, f"{what}: {member}") for member in members)
    for sample, inspection in zip(samples, inspections, strict=True):
        said = [note for note in sample.notes if not any(note in fault.text for fault in inspection.faults)]
        yield from (Finding("warning", shown(sample.sample_id), note) for note in said)


def _about(name: str, samples: list[Sample], inspections: list[DatasetInspection]) -> Iterator[Finding]:
    """What can only be judged over a whole set."""
    if name == "train":
        try:
            check_classes(name, samples)
        except MedSoftError as error:
            yield Finding("error", name, str(error))
    yield from _obstacles(name, samples, inspections)
    if nameless := sum(sample.patient_id == sample.sample_id for sample in samples):
        said = f"{nameless} of {counted(len(samples), 'sample')} without patient_id in meta.json"
        text = f"{said}: each counts as a patient of its own"
        yield Finding("warning", name, f"{text}, so that slices of one patient may lie on both sides of a split")
    yield from _mixed(name, inspections)
    attributes = ((sample, each.attributes) for sample, each in zip(samples, inspections, strict=True))
    decoded = [pair for pair in attributes if pair[1]]
    for each in separations([sample for sample, _ in decoded], [attributes for _, attributes in decoded]):
        if each.suspicious:
            yield Finding("warning", name, each.warning)
    inverted = sum("inverted?" in fault.text for inspection in inspections for fault in inspection.faults)
    diseased = sum(not sample.healthy for sample in samples)
    if diseased and inverted > diseased / 2:
        yield Finding(
            "error", name, f"probably inverted: {inverted} of {counted(diseased, 'mask')}; 1 (white) must be the lesion"
        )


def _obstacles(name: str, samples: list[Sample], inspections: list[DatasetInspection]) -> Iterator[Finding]:
    """Healthy samples that cannot be inpainted."""
    pairs = zip(samples, inspections, strict=True)
    reasons = (inpainting_obstacle(sample, inspection.marked) for sample, inspection in pairs)
    obstacles = [(sample, why) for sample, why in zip(samples, reasons, strict=True) if sample.healthy and why]
    if obstacles:
        healthy, (first, reason) = sum(sample.healthy for sample in samples), obstacles[0]
        said = f"{len(obstacles)} of {counted(healthy, 'healthy sample')} cannot be inpainted"
        text = f"{said}, so training leaves out the same"
        yield Finding("warning", name, f"{text}; the first, {first.sample_id}: {reason}")


def _mixed(name: str, inspections: list[DatasetInspection]) -> Iterator[Finding]:
    """Depths and sizes that hardly go together."""
    depths = {inspection.depth for inspection in inspections if inspection.depth}
    if len(depths) > 1:
        yield Finding("warning", name, "8- and 16-bit images are mixed; check that `window` in meta.json fits")
    sizes = {inspection.shape[:2] for inspection in inspections if inspection.shape}
    small, large = min(sizes, key=np.prod, default=(1, 1)), max(sizes, key=np.prod, default=(1, 1))
    if np.prod(large) > 16 * np.prod(small):
        words = f"{small[1]} x {small[0]} to {large[1]} x {large[0]} pixels"
        yield Finding("warning", name, f"sizes from {words}: lesions differ in scale; see `fit` in the YAML")


def _repeated(name: str, inspections: list[DatasetInspection]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for inspection in inspections:
        twin = first.setdefault(inspection.digest, inspection.sample_id) if inspection.digest else inspection.sample_id
        if twin != inspection.sample_id:
            text = f"samples {twin} and {inspection.sample_id} are the same image, pixel for pixel"
            yield Finding("warning", name, text)


def check_privacy(samples: list[Sample]) -> Iterator[Finding]:
    """Names and keys that look like a person's or a date: results, reports and annotation files carry them along."""
    found: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        names = dict.fromkeys((*sample.sample_id.split("/"), sample.patient_id))
        for name in names:
            if kind := looks_personal(name):
                found.setdefault((f"looks like {kind}", f"look like {kind}"), []).append(name)
        for key in personal_keys(sample.meta):
            what = f"the key {key} in meta.json"
            found.setdefault((f"has {what}", f"have {what}"), []).append(sample.sample_id)
    for (one, many), owners in found.items():
        some = ", ".join(list(dict.fromkeys(owners))[:3])
        said = counted(len(owners), f"sample or id {one}", f"samples or ids {many}")
        text = f"{said} ({some}): results and reports carry that on; use codes instead"
        yield Finding("warning", "privacy", text)


def check_prompts(samples: list[Sample], listed: bool) -> Iterator[Finding]:
    """Empty, badly encoded and long prompts, and those that contradict their meta.json.

    ``listed``: they come from an annotation file; other ones than in the samples' ``prompt.txt`` are named.
    """
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
        if listed and os.path.isfile(file):
            try:
                if prompt_of(read_text(file)) != sample.prompt:
                    yield Finding("warning", str(file), "is not what the annotation file says; prepare the data again")
            except MedSoftError as error:
                yield Finding("warning", str(file), error.cause(file))


def seen_before(sets: Mapping[str, list[Sample]], groups: Sequence[dict[str, Any]], source: Path) -> Iterator[Finding]:
    """The held-out ones of the ``sets`` that meet the patients behind ``source``, which ``groups`` describe."""
    for name in sorted(HELD_OUT & set(sets)):
        try:
            check_unseen(name, sets[name], groups, source)
        except MedSoftError as error:
            yield Finding("error", name, str(error))
