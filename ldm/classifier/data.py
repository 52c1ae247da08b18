"""The sets of the classifier: small images, synthetic or repeated ones among them, leak guards. No torch."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.classifier.config import DUPLICATE_REAL, PRETRAIN, SEGMENT, ClassifierConfig
from ldm.classifier.square import Squares, lesion_square, square
from ldm.core.errors import MedSoftError, warn_of_first
from ldm.core.files import JSON_LINES, Contents, content_id, fingerprint, fingerprint_all, named_seed
from ldm.core.tables import RowFile, counted
from ldm.data.annotations import load_samples
from ldm.data.checks import (
    Row,
    Separation,
    check_disjoint,
    check_unseen,
    groups_of,
    groups_of_samples,
    sample_attributes,
    separations,
    trained_on,
)
from ldm.data.images import pixel_digest, read_image
from ldm.data.samples import Reject, Sample
from ldm.data.splits import output_paths, prepare_dataset
from ldm.reviews.choice import apply_review

log = logging.getLogger(__name__)

HEALTHY, DISEASED = "healthy", "diseased"


@dataclass
class ImageSet:
    """One set: ``images`` uint8 (N, S, S), or (N, S, S, 3) in colour; ``labels`` class names ("" = unknown);
    ``hashes`` of pixels; ``attributes``: see ``sample_attributes``; ``left_out``: how many were synthetic; ``masks`` of
    the lesions, bool (N, S, S), where the task is to find them."""

    name: str
    samples: list[Sample]
    images: Squares
    labels: list[str]
    hashes: list[str]
    attributes: list[dict[str, Any]]
    rejects: list[Reject]
    left_out: int = 0
    masks: Squares | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, kept: Sequence[int]) -> "ImageSet":
        """The samples at these positions, in this order, repeated where a position is."""
        return replace(
            self,
            samples=[self.samples[i] for i in kept],
            images=self.images.subset(kept),
            labels=[self.labels[i] for i in kept],
            hashes=[self.hashes[i] for i in kept],
            attributes=[self.attributes[i] for i in kept],
            masks=None if self.masks is None else self.masks.subset(kept),
        )

    @classmethod
    def joined(cls, name: str, parts: Sequence["ImageSet"]) -> "ImageSet":
        """The samples and the rejects of all ``parts``, of which there is at least one."""
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(
            name,
            samples=[sample for part in parts for sample in part.samples],
            images=Squares.joined([part.images for part in parts]),
            labels=[label for part in parts for label in part.labels],
            hashes=[digest for part in parts for digest in part.hashes],
            attributes=[each for part in parts for each in part.attributes],
            rejects=[reject for part in parts for reject in part.rejects],
            masks=Squares.joined(masks) if masks else None,
        )

    @property
    def diseased(self) -> list[int]:
        """Positions of the samples that are not healthy."""
        return [position for position, label in enumerate(self.labels) if label != HEALTHY]

    def fingerprint(self) -> str:
        """What this set holds: names, labels, patients, pixels, and what the network sees of them, in which `window`,
        `spacing_mm` and the label map have a part."""
        masks = [] if self.masks is None else [(pixel_digest(mask.astype(np.uint8)) for mask in self.masks)]
        rows = zip(self.samples, self.labels, self.hashes, map(pixel_digest, self.images), *masks, strict=True)
        return fingerprint_all([s.sample_id, s.patient_id, label, *digests] for s, label, *digests in rows)

    def counts(self) -> dict[str, int]:
        """Samples of each class, by its name."""
        return dict(sorted(Counter(self.labels).items()))


def load_images(
    name: str,
    source: str,
    size: int,
    task: str,
    channels: str = "grey",
    crop: float | None = None,
    need_label: bool = True,
    only_real: bool = False,
    folder: Path | None = None,
) -> ImageSet:
    """Read every sample of a dataset folder or annotation JSON as a ``size`` x ``size`` image, grey or rgb.

    ``crop``: the part around the vertebra, see ``vertebra_square``; None for the whole image. Samples that cannot be
    read, or that have no lesion type where ``task`` is "type" and ``need_label``, are listed in ``rejects`` and left
    out. With ``only_real`` synthetic ones are left out and counted. What is read lies on the disk of ``folder``, see
    ``RowFile``. Raises MedSoftError when the dataset is missing, nothing is left of it, or the disk is full.
    """
    require_source(name, source)
    samples, rejects = load_samples(Path(source))
    left_out = sum(sample.synthetic for sample in samples) if only_real else 0
    if left_out:
        samples = [sample for sample in samples if not sample.synthetic]
        said = counted(left_out, "synthetic sample is", "synthetic samples are")
        log.warning("%s: %s left out of this set of real ones; name their folder in `synthetic`", name, said)
    shape = (size, size, 3) if channels == "rgb" else (size, size)
    squares = RowFile(folder, shape, "uint8", len(samples), f"images of the {name} set")
    masks = RowFile(folder, shape[:2], "bool", len(samples), f"masks of the {name} set") if task == SEGMENT else None
    rows = []
    for sample in tqdm(samples, desc=f"reading {name}", leave=False, disable=None):
        label = label_of(sample, task)
        if need_label and not label:
            reason = "diseased, but its lesion_type is missing or healthy"
            rejects.append(Reject(sample.sample_id, sample.image.with_name("meta.json"), reason))
            continue
        try:
            pixels = read_image(sample.image)
            seen = square(pixels, sample, size, channels, crop)
            mask = lesion_square(pixels.shape, sample, size, crop) if masks else None
        except MedSoftError as error:
            rejects.append(Reject(sample.sample_id, sample.image, error.cause(sample.image)))
            continue
        squares.append(seen)
        if masks and mask is not None:
            masks.append(mask)
        rows.append((sample, label, pixel_digest(pixels), sample_attributes(sample, pixels)))
    warn_of_first(log, (f"{name}: {reject.sample_id} skipped: {reject.reason}" for reject in rejects))
    if not rows:
        first = f"; the first: {rejects[0].sample_id}: {rejects[0].reason}" if rejects else ""
        counts = f"{len(rejects)} rejected, {left_out} synthetic{first}"
        raise MedSoftError(f"{source}: the {name} set has no usable sample ({counts})")
    kept, labels, hashes, attributes = map(list, zip(*rows, strict=True))
    found = Squares([masks.array()]) if masks else None
    return ImageSet(name, kept, Squares([squares.array()]), labels, hashes, attributes, rejects, left_out, found)


def prepare_annotations(config: ClassifierConfig) -> list[Reject]:
    """Where the three annotation files are missing and their folder holds samples, write them; returns the rejects.

    That is ``ver_openImagesDatasets.py`` with its defaults, so the split is the one that command gives.
    """
    train = config.train_json or ""
    family = Path(re.sub(r"_train(?=\.jsonl?$)", "", train))
    paths = output_paths(family)
    named = {"train": train, "val": config.val_json, "test": config.test_json}
    if any(path is None or Path(path) != paths[name] or paths[name].exists() for name, path in named.items()):
        return []
    if family.parent == Path() or not any(family.parent.rglob("prompt.txt")):
        return []
    log.info("%s: no annotation files yet; making them from its samples", family.parent)
    return prepare_dataset(family.parent, family)


def require_source(name: str, source: str) -> None:
    """Raise MedSoftError, with what to put there, where the dataset that the key ``name`` names does not exist."""
    path = Path(source)
    if path.exists():
        return
    key = f"{name}_json" if name in ("train", "val", "test") else name
    if path.suffix.lower() not in (".json", JSON_LINES):
        raise MedSoftError(f"{path}: the folder that `{key}` names does not exist; point it elsewhere: --set {key}=...")
    family = path.with_name(re.sub("_(train|val|test)$", "", path.stem) + path.suffix)
    command = f"python ver_openImagesDatasets.py --root_dir {path.parent} --output_file {family}"
    raise MedSoftError(
        f"{path}: the annotation file that `{key}` names does not exist; put the data into {path.parent} (one "
        f"folder per image with image.png, mask.png, prompt.txt and, for the patient, meta.json) and make it with "
        f"`{command}`, or point it elsewhere: --set {key}=PATH (an annotation file or a dataset folder)"
    )


def label_of(sample: Sample, task: str) -> str:
    """The class of a sample: healthy, diseased or its lesion type; "" where the lesion type is not known."""
    if sample.healthy:
        return HEALTHY
    kind = (sample.lesion_type or "").strip()
    return DISEASED if task != "type" else "" if kind.lower() == HEALTHY else kind


def check_image_sets_disjoint(sets: Sequence[ImageSet]) -> None:
    """Raise MedSoftError, by name, when two sets share a patient or an identical image, or an image was inpainted into
    a sample of another set."""
    rows = [
        Row(images.name, sample.sample_id, sample.patient_id, digest)
        for images in sets
        for sample, digest in zip(images.samples, images.hashes, strict=True)
    ]
    check_disjoint(rows)
    owners = {row.sample_id: row.group for row in rows}
    known = {(row.group, row.sample_id) for row in rows}
    for images in sets:
        for sample in images.samples:
            parent = sample.parent_id
            if parent in owners and (images.name, parent) not in known:
                raise MedSoftError(
                    f"sample {sample.sample_id} of the {images.name} set was inpainted into {parent} of the "
                    f"{owners[parent]} set; an image belongs to its parent's side: move it there"
                )


class _HeldOut:
    """What tells that an image descends from a validation or test sample, or is one."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.ids = {s.sample_id: other.name for other in sets for s in other.samples}
        self.patients = {s.patient_id: other.name for other in sets for s in other.samples}
        self.hashes = {h: (o.name, s.sample_id) for o in sets for h, s in zip(o.hashes, o.samples, strict=True)}
        self.files = {content_id(s.image): (other.name, s.sample_id) for other in sets for s in other.samples}

    def fault(self, sample: Sample, digest: str, ours: bool) -> str | None:
        """Why a synthetic sample, its pixels' ``digest`` and perhaps of ``ours`` by its name, may not be trained on."""
        cure = "only children of training patients may be added: inpaint training samples"
        parent, patient = sample.parent_id or "", sample.patient_id
        side = self.patients.get(patient) or self.patients.get(parent) or self.ids.get(parent)
        if side and (patient in self.patients or not ours):
            return f"was inpainted into {parent or 'an unknown parent'}, patient {patient} in the {side} set; {cure}"
        if (made_from := str(sample.meta.get("parent_sha256") or "")) in self.files:
            name, other_id = self.files[made_from]
            return f"was inpainted into {other_id} of the {name} set, says the SHA-256 in its meta.json; {cure}"
        if digest in self.hashes:
            name, other_id = self.hashes[digest]
            return f"is pixel for pixel sample {other_id} of the {name} set"
        return None


def check_children(synthetic: ImageSet, train: ImageSet, held_out: Sequence[ImageSet]) -> None:
    """Raise MedSoftError for a synthetic set of which an image descends from, or equals, a validation or test sample,
    and for one without any child of a training sample: nobody could tell whose children its images are.

    A parent is known by its SHA-256, its name and its patient. A name that occurs on both sides (two roots with equal
    folder names) is decided by the patient.
    """
    own_ids, own_patients = {s.sample_id for s in train.samples}, {s.patient_id for s in train.samples}
    others, strangers = _HeldOut(held_out), []
    for sample, digest in zip(synthetic.samples, synthetic.hashes, strict=True):
        ours = sample.parent_id in own_ids and sample.patient_id in own_patients
        if fault := others.fault(sample, digest, ours):
            raise MedSoftError(f"synthetic sample {sample.sample_id} {fault}")
        if not ours:
            strangers.append(sample)
    if len(strangers) == len(synthetic):
        first = strangers[0]
        raise MedSoftError(
            f"{synthetic.name}: none of its {len(synthetic)} samples was inpainted into a sample of the training set "
            f"(the first, {first.sample_id}: parent {first.parent_id}, patient {first.patient_id}; training has for "
            f"instance {train.samples[0].sample_id}, patient {train.samples[0].patient_id}); it belongs to another "
            "dataset or an earlier split: inpaint the samples of train_json"
        )
    if strangers:
        counts = synthetic.name, len(strangers), len(synthetic), strangers[0].sample_id
        log.warning("%s: %d of %d samples name no parent in the training set (the first: %s)", *counts)


def pick_synthetic(
    config: ClassifierConfig, train: ImageSet, held_out: Sequence[ImageSet]
) -> tuple[ImageSet | None, dict[str, Any] | None]:
    """The synthetic diseased images that join the training set: ``ratio`` per real diseased one, seeded.

    Which ones is a function of the seed and their names only. Healthy samples in the folders are left out, and so are
    those that ``review`` rejects: then the second value is what it says (``ldm.reviews.choice``).
    """
    sizes = (config.img_size, config.task, config.channels, config.crop)
    parts = [load_images(f"synthetic {each}", each, *sizes, folder=config.output) for each in config.synthetic]
    if not parts:
        return None, None
    for part in parts:
        check_children(part, train, held_out)
    pool = ImageSet.joined("synthetic", parts)
    choice = apply_review(config.review, pool.samples, Contents()) if config.review else None
    diseased = pool.diseased
    if len(diseased) < len(pool):
        said = counted(len(pool) - len(diseased), "healthy sample is", "healthy samples are")
        log.info("%s left out of the synthetic folders", said)
    if choice:
        diseased = [place for place in diseased if pool.samples[place].image not in choice.rejected]
    if config.ratio is not None:
        wanted = round(config.ratio * len(train.diseased))
        if wanted > len(diseased):
            there = counted(len(diseased), "exists", "exist")
            text = "ratio %g asks for %s, %s: all are used"
            log.warning(text, config.ratio, counted(wanted, "synthetic image"), there)
        diseased = sorted(_shuffled(config.seed, "synthetic", pool, diseased)[:wanted])
    return pool.subset(diseased), choice.record if choice else None


def pick_duplicates(seed: int, ratio: float, train: ImageSet) -> ImageSet:
    """Real diseased training images again, as many as ``ratio`` asks for: each equally often, the rest by seed."""
    order = _shuffled(seed, "duplicate", train, train.diseased)
    rounds, rest = divmod(round(ratio * len(order)), len(order))
    return replace(train.subset([*order * rounds, *order[:rest]]), name="duplicates", rejects=[])


def _shuffled(seed: int, purpose: str, images: ImageSet, positions: Sequence[int]) -> list[int]:
    """``positions`` in an order that depends on the seed and the samples' names and pixels only."""
    keys = {i: named_seed(seed, purpose, images.samples[i].sample_id, images.hashes[i]) for i in positions}
    return sorted(positions, key=keys.__getitem__)


@dataclass
class ClassifierData:
    """Everything one training run reads; ``synthetic`` and ``duplicates`` (of real ones) are for training only."""

    train: ImageSet
    val: ImageSet
    test: ImageSet | None
    synthetic: ImageSet | None
    duplicates: ImageSet | None
    classes: list[str]
    earlier: list[dict[str, Any]] = field(default_factory=list)  # patients behind what it starts from (data.checks)
    review: dict[str, Any] | None = None  # what ``apply_review`` says of the synthetic images

    @property
    def trained_on(self) -> list[dict[str, Any]]:
        """Salted digests of the patients that the weights have learned from, whatever image shows them."""
        learned = [*self.train.samples, *(self.synthetic.samples if self.synthetic else [])]
        return trained_on("classifier", (sample.patient_id for sample in learned), self.earlier)

    @property
    def sets(self) -> list[ImageSet]:
        """All that there are, those for training first."""
        return [s for s in (self.train, self.synthetic, self.duplicates, self.val, self.test) if s is not None]

    @property
    def real_sets(self) -> dict[str, ImageSet]:
        """Training, validation and, if there is one, test set by name."""
        return {images.name: images for images in (self.train, self.val, self.test) if images is not None}

    @property
    def rejects(self) -> list[tuple[str, Reject]]:
        """(set, reject) of everything that was skipped."""
        return [(images.name, reject) for images in self.sets for reject in images.rejects]

    def fingerprint(self) -> str:
        """What the weights depend on (not the test set)."""
        return fingerprint([*(s.fingerprint() for s in self.sets if s is not self.test), self.classes])


def load_data(config: ClassifierConfig) -> ClassifierData:
    """Read, check and label all sets of a training run; raises MedSoftError for leaks and for missing classes."""
    named = {"train": config.train_json, "val": config.val_json, "test": config.test_json}
    sources = {name: source for name, source in named.items() if source}  # training has at least the first two
    repeated = config.ratio if config.use_synthetic == DUPLICATE_REAL else None
    added = [("synthetic", folder) for folder in config.synthetic] if repeated is None else []
    for name, source in [*sources.items(), *added]:
        require_source(name, source)
    sizes = (config.img_size, config.task, config.channels, config.crop)
    sets = {n: load_images(n, s, *sizes, only_real=True, folder=config.output) for n, s in sources.items()}
    train, val, test = sets["train"], sets["val"], sets.get("test")
    held_out = [images for images in (val, test) if images is not None]
    check_image_sets_disjoint([train, *held_out])
    classes = class_names(config, train)
    synthetic, review = pick_synthetic(config, train, held_out) if repeated is None else (None, None)
    if config.use_synthetic == PRETRAIN and not synthetic:
        raise MedSoftError(
            f"use_synthetic pretrain needs synthetic diseased images, found none in {', '.join(config.synthetic)} at "
            f"ratio {config.ratio}; generate some, or raise ratio"
        )
    earlier = pretrained_on(config.pretrained)
    for images in held_out:
        check_unseen(f"{images.name}_json", images.samples, earlier, config.pretrained)
    for learned in (train, *([synthetic] if synthetic else [])):
        behind = groups_of_samples(learned.name, learned.samples)
        for images in held_out:
            check_unseen(f"{images.name}_json", images.samples, behind, f"the {learned.name} set")
        earlier = trained_on("", (), earlier, behind)
    duplicates = None if repeated is None else pick_duplicates(config.seed, repeated, train)
    data = ClassifierData(train, val, test, synthetic, duplicates, classes, earlier, review)
    for images in data.sets:
        for sample, label in zip(images.samples, images.labels, strict=True):
            if label not in classes:
                raise MedSoftError(
                    f"{images.name} sample {sample.sample_id} has lesion type {label}, which the real training set "
                    f"does not have (classes: {', '.join(classes)}); add such samples to training or remove it"
                )
    return data


def class_separations(images: ImageSet) -> list[Separation]:
    """What tells healthy from diseased samples of a set besides their lesions; a warning for what is suspicious."""
    found = separations(images.samples, images.attributes)
    for each in found:
        if each.suspicious:
            log.warning("%s: %s", images.name, each.warning)
    return found


def pretrained_on(weights: str | None) -> list[dict[str, Any]]:
    """The patients behind the file that ``pretrained`` names, if a classifier of ours lies there; else nobody."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights or "", "np") as handle:
            about = json.loads((handle.metadata() or {}).get("classifier", "null"))
    except (SafetensorError, OSError, ValueError):
        return []  # not such a file; whether it holds weights is seen where they are read
    return groups_of(about, weights) if isinstance(about, dict) else []


def class_names(config: ClassifierConfig, train: ImageSet) -> list[str]:
    """``healthy`` first, then ``diseased`` or the lesion types by name; all must occur in the real training set."""
    counts = train.counts()
    if HEALTHY not in counts or len(counts) < 2:
        raise MedSoftError(
            f"{config.train_json}: training needs healthy and diseased samples, found {counts}; a healthy sample's "
            "prompt.txt says `healthy`"
        )
    for label, count in counts.items():
        if count == 1:
            log.warning("train: only one sample of class %s", label)
    return [HEALTHY, *(label for label in counts if label != HEALTHY)]
