"""Real lesions against synthetic ones: everything ``tool/evaluate.py`` measures but copies, from two lists of samples.

What is compared is the model's crop around each lesion (the YAML's ``data`` block), as the networks see it: a whole
synthetic image is its parent's but for the lesion.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import Tensor
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.core.errors import MedSoftError
from ldm.core.tables import RowFile, counted
from ldm.data.checks import FEWEST_PATIENTS
from ldm.data.images import pixel_digest, to_unit
from ldm.data.masks import equivalent_diameter, spacing_of
from ldm.data.preparation import PreparedSample, prepare
from ldm.data.samples import Reject, Sample
from ldm.evaluation import metrics
from ldm.evaluation.metrics import (
    BLOCK,
    NEIGHBOURS,
    crop_features,
    image_embeddings,
    likeness,
    mean_of,
    text_embeddings,
)
from ldm.networks.encoder import ImageTextEncoder
from ldm.reports.comparison import read_result

log = logging.getLogger(__name__)

BATCH = 64
CROP_SIDE = 192  # pixels of the crops that are kept
COPY_SIDE = 64  # pixels of the crops in which copies are looked for
FULLY = 0.999  # of a soft mask: the lesion without its feather, where a composite holds nothing of the original
FLAT = 0.5  # standard deviation in grey levels of 255, below which only rounding is left to compare
ROWS = {"crop": "uint8", "inside": "bool", "features": "float32", "alone": "float64", "embedding": "float64"}
RING = 5  # pixels around a lesion that its contrast is measured against
SSIM_REACH = 5  # half of SSIM's window


@dataclass(frozen=True, eq=False, slots=True)
class Lesion:
    """What is kept of a lesion: small images, native numbers and the encoder's vectors.

    Images and vectors are row ``place`` of the arrays ``rows``, which other lesions share; large ones lie in files:
    crop: uint8 grey, at most CROP_SIDE square, the model's crop; inside: bool of that size, the lesion without feather.
    features: CLS token of the crop; alone: the same of the lesion with everything around it hidden, of length 1;
    embedding: projected, of length 1.
    """

    sample: Sample
    digest: str  # SHA-256 of the image's pixels
    diameter: float  # equivalent, native pixels
    diameter_mm: float | None  # None where the spacing is unknown
    contrast: float | None  # mean inside minus mean of a ring around, of the image's grey range; None without a ring
    texture: float  # standard deviation inside
    rows: Mapping[str, np.ndarray]  # by the names of ROWS
    place: int

    @property
    def crop(self) -> np.ndarray:
        """The model's crop, uint8 grey."""
        return self.rows["crop"][self.place]

    @property
    def inside(self) -> np.ndarray:
        """Where in the crop the lesion is, bool."""
        return self.rows["inside"][self.place]

    @property
    def embedding(self) -> Tensor:
        """Of the crop, of length 1."""
        return torch.from_numpy(self.rows["embedding"][self.place])

    @property
    def small(self) -> tuple[np.ndarray, np.ndarray]:
        """crop and inside at COPY_SIDE or less, for comparing pixels."""
        side = min(COPY_SIDE, len(self.crop))
        mask = cv2.resize(self.inside.astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA) > 0
        return cv2.resize(self.crop, (side, side), interpolation=cv2.INTER_AREA).astype(float), mask

    @property
    def flat(self) -> bool:
        """Whether its pixels hardly differ (saturated, for instance), so that their correlation says nothing."""
        grey, mask = self.small
        return not mask.any() or float(grey[mask].std()) < FLAT


def read_lesions(
    samples: Sequence[Sample], data: DataConfig, encoder: ImageTextEncoder, folder: Path, name: str
) -> tuple[list[Lesion], list[Reject]]:
    """The diseased samples among ``samples``; those that cannot be read come back as rejects.

    Their images and vectors lie on the disk of ``folder``, see ``RowFile``.
    """
    found: list[Lesion] = []
    rejects, waiting = [], []
    diseased = [sample for sample in samples if not sample.healthy]
    files: dict[str, RowFile] = {}
    rows: dict[str, np.ndarray] = {}  # filled when all are written
    for number, sample in enumerate(tqdm(diseased, desc=f"reading {name}", leave=False, disable=None), start=1):
        try:
            waiting.append((sample, prepare(sample, data, 0, 0)))
        except MedSoftError as error:
            rejects.append(Reject(sample.sample_id, sample.image, str(error)))
        if waiting and (len(waiting) == BATCH or number == len(diseased)):
            batch, waiting = lesions_of(waiting, encoder), []
            for each, values in batch[0].rows.items():
                if each not in files:
                    what = f"{each} of the {name} lesions"
                    files[each] = RowFile(folder, values.shape[1:], ROWS[each], len(diseased), what)
                files[each].append(values)
            found += [replace(lesion, rows=rows, place=len(found) + lesion.place) for lesion in batch]
    rows |= {each: file.array() for each, file in files.items()}
    return found, rejects


def lesions_of(read: Sequence[tuple[Sample, PreparedSample]], encoder: ImageTextEncoder) -> list[Lesion]:
    """What is kept of samples that have been read; some BATCH of them at a time."""
    images = torch.stack([image.image for _, image in read])
    masks = torch.stack([image.mask for _, image in read])
    side = min(CROP_SIDE, images.shape[-1])
    grey = F.interpolate(images.mean(dim=1, keepdim=True), size=(side, side), mode="area")
    crops = ((grey + 1) * 127.5).round().clamp(0, 255).byte().squeeze(1).numpy()
    inside = (F.adaptive_max_pool2d(masks, side) >= FULLY).squeeze(1).numpy()
    alone = F.normalize(crop_features(encoder, images, masks < FULLY), dim=1)
    features, embeddings = crop_features(encoder, images).float(), image_embeddings(encoder, images)
    values = (crops, inside, features.numpy(), alone.numpy(), embeddings.numpy())
    rows = dict(zip(ROWS, values, strict=True))
    return [
        Lesion(sample, pixel_digest(image.original), *_native_numbers(sample, image), rows, place)
        for place, (sample, image) in enumerate(read)
    ]


def _native_numbers(sample: Sample, image: PreparedSample) -> tuple[float, float | None, float | None, float]:
    """Diameter in pixels and in mm, contrast and texture of a lesion at native size."""
    grey = grey_of(image)
    ring, inside = ring_around(image.hard), grey[image.hard]
    contrast = float(inside.mean() - grey[ring].mean()) if ring.any() else None
    diameter, spacing = equivalent_diameter(image.hard), sample.meta.get("spacing_mm")
    in_mm = diameter * math.sqrt(math.prod(spacing_of(spacing))) if spacing else None
    return diameter, in_mm, contrast, float(inside.std())


def grey_of(image: PreparedSample) -> np.ndarray:
    """The image at native size, grey: float32 HxW in [0, 1]."""
    unit = to_unit(image.original, image.intensity_range)
    return unit if unit.ndim == 2 else unit.mean(axis=2)


def ring_around(region: np.ndarray) -> np.ndarray:
    """What lies at most RING pixels outside of a region: bool HxW, like the region."""
    ring: np.ndarray = (cv2.dilate(region.astype(np.uint8), np.ones((2 * RING + 1,) * 2, np.uint8)) > 0) & ~region
    return ring


def lesion_rows(lesions: Sequence[Lesion], name: str) -> Tensor:
    """One of the lesions' vectors (N, D): not copied where they are all lesions that have been read together."""
    rows = lesions[0].rows
    if len(lesions) == len(rows[name]) and all(x.rows is rows and x.place == k for k, x in enumerate(lesions)):
        return torch.from_numpy(rows[name])
    return torch.from_numpy(np.stack([lesion.rows[name][lesion.place] for lesion in lesions]))


def set_distances(real: Sequence[Lesion], synthetic: Sequence[Lesion]) -> dict[str, Any]:
    """Frechet, kernel, density and coverage, and what two halves of the real ones differ by.

    Each with an interval, unless one of the sets is of fewer than FEWEST_PATIENTS patients.
    """
    first, second = lesion_rows(real, "features"), lesion_rows(synthetic, "features")
    fewest = min(len({lesion.sample.patient_id for lesion in lesions}) for lesions in (real, synthetic))
    measures: dict[str, metrics.Measure] = {"frechet": metrics.frechet_distance, "kernel": metrics.kernel_distance}
    if len(real) > 2 * (NEIGHBOURS + 1):
        measures |= {"density": metrics.density, "coverage": metrics.coverage}
    found: dict[str, Any] = {}
    for name, measure in tqdm(measures.items(), desc="distances", leave=False, disable=None):
        estimate = metrics.by_halves(measure, first, second)
        if fewest < FEWEST_PATIENTS:
            estimate["low"] = estimate["high"] = None
        if name != "kernel" and estimate["low"] is not None:
            estimate["low"] = max(estimate["low"], 0.0)
        if name == "coverage" and estimate["high"] is not None:
            estimate["high"] = min(estimate["high"], 1.0)
        found[name] = {**estimate, "between_halves_of_real": metrics.between_halves(measure, first)}
    return found


def small_sample_warnings(real: int, synthetic: int, dimensions: int) -> list[str]:
    """Warnings about sets that are too small for what is measured; ``dimensions``: of the encoder's features."""
    warnings, fewest = [], min(real, synthetic)
    if fewest <= dimensions:
        warnings.append(
            f"The Frechet distance is that of {counted(fewest, 'image')} in {dimensions} dimensions: their covariance "
            "is singular, and the number depends on how many they are more than on what they show. Compare it only "
            f"with one of as many images; more than {dimensions} in each set are needed for more."
        )
    if fewest < 50:
        warnings.append(
            f"{counted(fewest, 'image')} in the smaller set: kernel distance, density and coverage are rough."
        )
    if real <= 2 * (NEIGHBOURS + 1):
        needed = f"Density and coverage need more than {2 * (NEIGHBOURS + 1)} real images"
        warnings.append(f"{needed}, {real} were given: not measured.")
    return warnings


def parent_likeness(synthetic: Sequence[Lesion]) -> dict[str, Any]:
    """SSIM and PSNR against the parent, outside the soft mask and on the lesion. PSNR: where pixels differ at all.

    Outside: so far from the soft mask that SSIM's window does not reach it.
    """
    found: dict[str, dict[str, tuple[list[float], list[str]]]] = {
        name: {measure: ([], []) for measure in ("ssim", "psnr")} for name in ("outside", "inside")
    }
    unchanged, orphans, faults = 0, 0, []
    for lesion in tqdm(synthetic, desc="parents", leave=False, disable=None):
        try:
            image = read_result(lesion.sample)
        except MedSoftError as error:
            if isinstance(lesion.sample.meta.get("parent_image"), str) and lesion.sample.soft_mask is not None:
                faults.append(error)
            orphans += 1
            continue
        original, result = (x if x.ndim == 2 else x.mean(axis=2) for x in image.shown())
        near = cv2.dilate((image.soft > 0).astype(np.uint8), np.ones((2 * SSIM_REACH + 1,) * 2, np.uint8)) > 0
        unchanged += image.changed_outside == 0
        for name, region in (("outside", ~near), ("inside", image.soft >= 0.5)):
            for measure, value in zip(("ssim", "psnr"), likeness(original, result, region) or (), strict=False):
                if np.isfinite(value):
                    values, patients = found[name][measure]
                    values.append(value)
                    patients.append(lesion.sample.patient_id)
    if faults:
        text = "warning: %d of %d results are not compared with their parents; the first: %s"
        log.warning(text, len(faults), len(synthetic), faults[0])
    compared = len(synthetic) - orphans
    summary: dict[str, Any] = {"compared": compared, "without_parent": orphans}
    summary |= {name: {key: mean_of(*each) for key, each in measures.items()} for name, measures in found.items()}
    summary["outside"]["unchanged_pictures"] = unchanged / compared if compared else None
    return summary


def text_agreement(encoder: ImageTextEncoder, lesions: Sequence[Lesion]) -> dict[str, Any] | None:
    """Cosine of each crop with its own prompt and, on average, with others'; how often its own is the closer one.

    Others': prompts with other words and, where both are known, of another lesion type. None without any such pair.
    """
    type_of = {lesion.sample.prompt: lesion.sample.lesion_type for lesion in lesions}
    column = {prompt: place for place, prompt in enumerate(type_of)}
    number = {kind: place for place, kind in enumerate(dict.fromkeys(filter(None, type_of.values())), start=1)}
    kinds = torch.tensor([number.get(kind or "", 0) for kind in type_of.values()])  # 0: unknown
    vectors, embeddings = text_embeddings(encoder, list(type_of)), lesion_rows(lesions, "embedding")
    numbers: dict[str, list[float]] = {name: [] for name in ("own", "others", "difference", "own_is_closer")}
    patients, at_once = [], max(1, BLOCK**2 // len(column))
    for start in range(0, len(lesions), at_once):
        part = [lesion.sample for lesion in lesions[start : start + at_once]]
        cosines = embeddings[start : start + at_once] @ vectors.T  # (N, T)
        columns = torch.tensor([column[sample.prompt] for sample in part])
        own_kinds = torch.tensor([number.get(sample.lesion_type or "", 0) for sample in part])[:, None]
        comparable = torch.arange(len(column)) != columns[:, None]
        comparable &= (own_kinds == 0) | (own_kinds != kinds)
        kept = comparable.any(dim=1)
        own = cosines[torch.arange(len(part)), columns][kept]
        other, weights = cosines[kept], comparable[kept].double()
        mean_other = (other * weights).sum(dim=1) / weights.sum(dim=1)
        wins = ((own[:, None] > other) * weights).sum(dim=1) / weights.sum(dim=1)
        patients += [sample.patient_id for sample, keep in zip(part, kept.tolist(), strict=True) if keep]
        for found, more in zip(numbers.values(), (own, mean_other, own - mean_other, wins), strict=True):
            found += more.tolist()
    return {name: mean_of(found, patients) for name, found in numbers.items()} if patients else None


MEASURES = {
    "diameter": "equivalent diameter, pixels",
    "diameter_mm": "equivalent diameter, mm",
    "contrast": "contrast: inside minus ring, of the grey range",
    "texture": "standard deviation inside, of the grey range",
}


def distributions(real: Sequence[Lesion], synthetic: Sequence[Lesion]) -> dict[str, Any]:
    """Quartiles of size, contrast and texture in both sets, and the Wasserstein-1 distance between them.

    The size in mm of those lesions whose spacing is known; without it where one of the sets has none of them.
    """
    found = {}
    for name in MEASURES:
        both = [known_values(lesions, name) for lesions in (real, synthetic)]
        if not all(map(len, both)):
            continue
        quartiles = [[float(q) for q in np.percentile(values, (25, 50, 75))] for values in both]
        found[name] = {
            "real_quartiles": quartiles[0],
            "synthetic_quartiles": quartiles[1],
            "wasserstein": float(wasserstein_distance(*both)),
        }
    return found


def known_values(lesions: Sequence[Lesion], measure: str) -> np.ndarray:
    """One of ``MEASURES`` of the lesions of which it is known."""
    return np.array([value for lesion in lesions if (value := getattr(lesion, measure)) is not None])
