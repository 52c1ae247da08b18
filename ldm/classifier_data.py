"""What the classifier is told (its JSON) and what it sees (grey squares in memory), with the leak guards. No torch."""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import types
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm import dataset_checks
from ldm.annotations import Reject, Sample, load_samples
from ldm.dataset_checks import Row
from ldm.errors import MedSoftError, UsageError
from ldm.files import fingerprint, named_seed, read_json

log = logging.getLogger(__name__)

HEALTHY, DISEASED = "healthy", "diseased"
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"


@dataclass(frozen=True)
class ClassifierConfig:
    """One classifier run. Field names are the JSON's keys; relative paths start at the working directory."""

    img_size: int = 224  # side of the square the classifier sees, pixels
    Batch_Size: int = 32
    EPOCHS: int = 50
    GPU: str | list[int] | list[str] = ""  # device ids; "" or [] = a GPU if there is one, "cpu" = none
    dataset: str = "dataset"  # name in titles, and of the output folder where output_dir is null
    train: bool = True  # false: only test and predict, with the saved classifier
    test_epoch: int | None = None  # null = the epoch chosen on validation, n = epoch n
    save_epoch: int = 0  # keep the weights of every n-th epoch; 0 = of the tested epoch only
    train_json: str | None = None  # annotation JSON or dataset folder
    val_json: str | None = None
    test_json: str | None = None
    synthetic: list[str] = field(default_factory=list)  # result folders of dataset_infer.py
    ratio: float | None = None  # synthetic images per real diseased training image; null = all of them
    output_dir: str | None = None  # null = classifier_results/<dataset>
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.05
    model: str = "resnet18"  # any timm model
    pretrained: str | None = None  # local weight file (safetensors, or a torch file of plain tensors)
    task: str = "binary"  # binary = healthy / diseased, type = healthy / each lesion type
    predict: list[str] = field(default_factory=list)  # dataset folders or JSONs to predict
    overwrite: bool = False

    @property
    def output(self) -> Path:
        """The folder that receives everything."""
        return Path(self.output_dir) if self.output_dir else Path("classifier_results") / self.dataset


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ClassifierConfig:
    """Read a classifier JSON, then ``key=value`` overrides (values in JSON; what is not JSON is text).

    Raises UsageError naming file and key for an unknown key, a wrong type or a value out of range.
    """
    values = read_json(path, "classifier configuration")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object with keys such as img_size, found {type(values).__name__}")
    sources = dict.fromkeys(values, str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: not understood; write --set key=value, for instance --set EPOCHS=5")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
        sources[key] = f"--set {text}"
    return config_from_dict(values, sources, str(path))


def config_from_dict(values: dict[str, Any], sources: dict[str, str] | None = None, default: str = "config") -> Any:
    """A checked ClassifierConfig; ``sources`` says where each key came from, for the messages."""
    sources = sources or {}
    kinds = {item.name: item.type for item in dataclasses.fields(ClassifierConfig)}
    for key, value in values.items():
        source = sources.get(key, default)
        if key not in kinds:
            by_lower = {name.lower(): name for name in kinds}
            near = difflib.get_close_matches(key.lower(), by_lower, n=1)
            hint = f"did you mean {by_lower[near[0]]}?" if near else f"known keys: {', '.join(kinds)}"
            raise UsageError(f"{source}: unknown key {key}; {hint}")
        if not _fits(value, kinds[key]):
            raise UsageError(f"{source}: {key} must be {_expected(kinds[key])}, found {json.dumps(value)}")
    config = ClassifierConfig(**values)
    _check_ranges(config, sources, default)
    return config


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # exact: true is not a number here


def _expected(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list of {'texts' if typing.get_args(kind)[0] is str else 'whole numbers'}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names[kind]


def _check_ranges(config: ClassifierConfig, sources: dict[str, str], default: str) -> None:
    least = 2 if config.train else 1  # batch normalisation cannot be trained on one image
    rules = [
        ("img_size", 8 <= config.img_size <= 4096, "8 to 4096"),
        ("Batch_Size", config.Batch_Size >= least, f"at least {least}{' for training' if config.train else ''}"),
        ("EPOCHS", config.EPOCHS >= 1, "at least 1"),
        ("save_epoch", config.save_epoch >= 0, "0 or more"),
        ("ratio", config.ratio is None or config.ratio >= 0, "0 or more, or null"),
        ("lr", config.lr > 0, "above 0"),
        ("weight_decay", config.weight_decay >= 0, "0 or more"),
        ("task", config.task in ("binary", "type"), '"binary" or "type"'),
        ("dataset", config.dataset.strip() not in ("", ".", "..") and "/" not in config.dataset, "a plain name"),
        ("test_epoch", config.test_epoch is None or config.test_epoch >= 1, "null or at least 1"),
    ]
    if config.train:
        inside = config.test_epoch is None or config.test_epoch <= config.EPOCHS
        rules.append(("test_epoch", inside, f"at most EPOCHS, which is {config.EPOCHS}"))
        rules += [
            (key, getattr(config, key) is not None, "the path of a dataset") for key in ("train_json", "val_json")
        ]
    for key, holds, expected in rules:
        if not holds:
            source = sources.get(key, default)
            raise UsageError(f"{source}: {key} must be {expected}, found {json.dumps(getattr(config, key))}")


# --- images -----------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """One set in memory: ``images`` uint8 (N, S, S); ``labels`` class names ("" = unknown); ``hashes`` of pixels."""

    name: str
    samples: list[Sample]
    images: np.ndarray
    labels: list[str]
    hashes: list[str]
    rejects: list[Reject]

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, kept: Sequence[int]) -> "ImageSet":
        """The samples at these positions, in this order."""
        picked = [[values[i] for i in kept] for values in (self.samples, self.labels, self.hashes)]
        return ImageSet(self.name, picked[0], self.images[list(kept)], picked[1], picked[2], self.rejects)

    def fingerprint(self) -> str:
        """What this set holds: names, labels, patients and pixels."""
        rows = [
            [s.sample_id, s.patient_id, c, h] for s, c, h in zip(self.samples, self.labels, self.hashes, strict=True)
        ]
        return fingerprint(rows)

    def counts(self) -> dict[str, int]:
        """Samples per class."""
        return dict(sorted(Counter(self.labels).items()))


def load_images(name: str, source: str, size: int, task: str, need_label: bool = True) -> ImageSet:
    """Read every sample of a dataset folder or annotation JSON as a ``size`` x ``size`` grey picture.

    Samples that cannot be read, or that have no lesion type where ``task`` is "type" and ``need_label``, are listed
    in ``rejects`` and left out. Raises MedSoftError when the dataset is missing or nothing is left of it.
    """
    from tqdm import tqdm

    _require(name, source)
    samples, rejects = load_samples(Path(source))
    kept, images, labels, hashes = [], [], [], []
    for sample in tqdm(samples, desc=f"reading {name}", leave=False, disable=None):
        label = label_of(sample, task)
        if need_label and not label:
            rejects.append(
                Reject(sample.sample_id, sample.image.with_name("meta.json"), "diseased, but no lesion_type is given")
            )
            continue
        try:
            picture, digest = grey_square(sample, size)
        except MedSoftError as error:
            rejects.append(Reject(sample.sample_id, sample.image, getattr(error, "reason", str(error))))
            continue
        kept.append(sample)
        images.append(picture)
        labels.append(label)
        hashes.append(digest)
    for reject in rejects:
        log.warning("%s: %s skipped: %s", name, reject.sample_id, reject.reason)
    if not kept:
        first = f"; the first: {rejects[0].sample_id}: {rejects[0].reason}" if rejects else ""
        raise MedSoftError(f"{source}: the {name} set has no usable sample ({len(rejects)} rejected{first})")
    return ImageSet(name, kept, np.stack(images), labels, hashes, rejects)


def _require(name: str, source: str) -> None:
    path = Path(source)
    if path.exists():
        return
    key = f"{name}_json" if name in ("train", "val", "test") else name
    if path.suffix.lower() != ".json":
        raise MedSoftError(f"{path}: the folder that `{key}` names does not exist; point it elsewhere: --set {key}=...")
    stem = path.stem
    for ending in ("_train", "_val", "_test"):
        stem = stem.removesuffix(ending)
    command = (
        f"python ver_openImagesDatasets.py --root_dir {path.parent} --output_file {path.with_name(stem + '.json')}"
    )
    raise MedSoftError(
        f"{path}: the annotation file that `{key}` names does not exist; put the data into {path.parent} (one "
        f"folder per image with image.png, mask.png, prompt.txt and, for the patient, meta.json) and make it with "
        f"`{command}`, or point it elsewhere: --set {key}=PATH (an annotation JSON or a dataset folder)"
    )


def label_of(sample: Sample, task: str) -> str:
    """The class of a sample: healthy, diseased or its lesion type; "" where the lesion type is not known."""
    if sample.healthy:
        return HEALTHY
    return DISEASED if task == "binary" else (sample.lesion_type or "").strip()


def grey_square(sample: Sample, size: int) -> tuple[np.ndarray, str]:
    """The picture the classifier sees, uint8 (size, size), and the SHA-256 of the file's decoded pixels."""
    import cv2

    from ldm.images import read_image, to_unit, window_of

    pixels = read_image(sample.image)
    head = f"{pixels.shape}{pixels.dtype}".encode()
    digest = hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()
    grey = to_unit(pixels, window_of(pixels, sample.meta.get("window")))
    if grey.ndim == 3:
        grey = grey @ LUMINANCE
    if grey.shape != (size, size):
        grey = cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA)
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8), digest


# --- leak guards ------------------------------------------------------------------------------------------------


def check_disjoint(sets: Sequence[ImageSet]) -> None:
    """Raise MedSoftError, by name, when two sets share a patient or an identical picture."""
    rows = [
        Row(images.name, sample.sample_id, sample.patient_id, digest)
        for images in sets
        for sample, digest in zip(images.samples, images.hashes, strict=True)
    ]
    dataset_checks.check_disjoint(rows)


def check_children(synthetic: ImageSet, train: ImageSet, held_out: Sequence[ImageSet]) -> None:
    """Raise MedSoftError when a synthetic picture descends from, or equals, a validation or test sample.

    A parent name that occurs on both sides (two roots with equal folder names) is decided by the patient.
    """
    own_ids, own_patients = {s.sample_id for s in train.samples}, {s.patient_id for s in train.samples}
    held_ids = {s.sample_id: other.name for other in held_out for s in other.samples}
    held_patients = {s.patient_id: other.name for other in held_out for s in other.samples}
    held_hashes = {h: (o.name, s.sample_id) for o in held_out for h, s in zip(o.hashes, o.samples, strict=True)}
    strangers = 0
    for sample, digest in zip(synthetic.samples, synthetic.hashes, strict=True):
        parent, patient = sample.parent_id, sample.patient_id
        ours = parent in own_ids and patient in own_patients
        side = held_patients.get(patient) or held_patients.get(parent) or held_ids.get(parent)
        if side and (patient in held_patients or not ours):
            raise MedSoftError(
                f"synthetic sample {sample.sample_id} was drawn on {parent or 'an unknown parent'}, patient {patient} "
                f"in the {side} set; only children of training patients may be added: draw on training samples"
            )
        if digest in held_hashes:
            raise MedSoftError(
                f"synthetic sample {sample.sample_id} is pixel for pixel sample {held_hashes[digest][1]} of the "
                f"{held_hashes[digest][0]} set; remove it"
            )
        strangers += not ours
    if strangers:
        log.warning("%d of %d synthetic samples name no parent in the training set", strangers, len(synthetic))


def pick_synthetic(config: ClassifierConfig, train: ImageSet, held_out: Sequence[ImageSet]) -> ImageSet | None:
    """The synthetic diseased pictures that join the training set: ``ratio`` per real diseased one, seeded.

    Which ones is a function of the seed and their names only. Healthy samples in the folders are left out.
    """
    parts = [load_images(f"synthetic {folder}", folder, config.img_size, config.task) for folder in config.synthetic]
    if not parts:
        return None
    pool = ImageSet(
        "synthetic",
        [sample for part in parts for sample in part.samples],
        np.concatenate([part.images for part in parts]),
        [label for part in parts for label in part.labels],
        [digest for part in parts for digest in part.hashes],
        [reject for part in parts for reject in part.rejects],
    )
    check_children(pool, train, held_out)
    diseased = [i for i, label in enumerate(pool.labels) if label != HEALTHY]
    if len(diseased) < len(pool):
        log.info("%d healthy samples in the synthetic folders are left out", len(pool) - len(diseased))
    if config.ratio is not None:
        wanted = round(config.ratio * sum(label != HEALTHY for label in train.labels))
        if wanted > len(diseased):
            log.warning(
                "ratio %g asks for %d synthetic images, %d exist: all are used", config.ratio, wanted, len(diseased)
            )
        names = {i: (pool.samples[i].sample_id, pool.hashes[i]) for i in diseased}
        diseased = sorted(sorted(diseased, key=lambda i: named_seed(config.seed, "synthetic", *names[i]))[:wanted])
    return pool.subset(diseased)


@dataclass
class Data:
    """Everything one training run reads; ``synthetic`` is part of training only."""

    train: ImageSet
    val: ImageSet
    test: ImageSet | None
    synthetic: ImageSet | None
    classes: list[str]

    @property
    def rejects(self) -> list[tuple[str, Reject]]:
        """(set, reject) of everything that was skipped."""
        sets = [images for images in (self.train, self.val, self.test, self.synthetic) if images is not None]
        return [(images.name, reject) for images in sets for reject in images.rejects]

    def fingerprint(self) -> str:
        """What the weights depend on (not the test set)."""
        parts = [self.train.fingerprint(), self.val.fingerprint()]
        return fingerprint([*parts, self.synthetic.fingerprint() if self.synthetic else None, self.classes])


def load_data(config: ClassifierConfig) -> Data:
    """Read, check and label all sets of a training run; raises MedSoftError for leaks and for missing classes."""
    sources = {"train": config.train_json, "val": config.val_json, "test": config.test_json}
    for name, source in sources.items():
        if source:
            _require(name, source)
    for folder in config.synthetic:
        _require("synthetic", folder)
    loaded = {n: load_images(n, s, config.img_size, config.task) for n, s in sources.items() if s}
    train, val, test = loaded["train"], loaded["val"], loaded.get("test")
    held_out = [images for images in (val, test) if images is not None]
    check_disjoint([train, *held_out])
    synthetic = pick_synthetic(config, train, held_out)
    classes = class_names(config, train)
    for images in [*held_out, *([synthetic] if synthetic else [])]:
        for sample, label in zip(images.samples, images.labels, strict=True):
            if label not in classes:
                raise MedSoftError(
                    f"{images.name} sample {sample.sample_id} has lesion type {label}, which the real training set "
                    f"does not have (classes: {', '.join(classes)}); add such samples to training or remove it"
                )
    return Data(train, val, test, synthetic, classes)


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
