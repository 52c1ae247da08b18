"""Does a synthetic lesion repeat a training lesion? Its nearest training lesions by features, then by pixels."""

import hashlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError
from ldm.core.tables import counted
from ldm.data.samples import Sample
from ldm.evaluation.lesions import Lesion, lesion_rows
from ldm.evaluation.metrics import BLOCK, correlation

log = logging.getLogger("evaluate")

CANDIDATES = 10  # nearest training lesions whose pixels are compared
REMEMBERED = 1024  # training lesions whose pixels are at hand for the next comparison
# Degrees and sizes in which a lesion's own source is tried.
TURNS, SCALES = range(-36, 37, 6), (0.8, 0.9, 1.0, 1.1, 1.25)
TURNED = 20  # pairs of training lesions that are turned likewise, to know what that makes of chance
REACH = 3  # pixels by which a lesion may have moved
UNCALIBRATED = 0.95  # threshold without two training patients to compare
ALIKE = 0.98  # correlation from which the lesions of two training patients can hardly be of two patients


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The training lesion that a lesion looks most like.

    ``correlation``: of their pixels, 1 where all pixels of the images or of the crops are equal; ``cosine``: of the
    features of the lesion alone and of the training lesion nearest in features, which may be another one than
    ``match``. Not ``comparable``: a flat lesion whose image equals no training image. ``source``: the correlation with
    the training lesion that was pasted, or whose mask it has, turned and scaled as fits best; None without one. Where
    that is higher, ``match`` is the source. ``as_it_lies``: the correlation of lesions that are not turned.
    """

    lesion: Lesion
    match: Lesion
    correlation: float
    cosine: float
    comparable: bool
    as_it_lies: float
    source: float | None = None


@dataclass(frozen=True)
class CopyCheck:
    """Nearest training lesions of every synthetic one, and the threshold from which it counts as a copy.

    ``source_threshold``: that of a correlation with the source, which is the best of many turns and sizes.
    """

    neighbours: list[Neighbour]
    threshold: float
    source_threshold: float
    closest_real: Neighbour | None  # the most alike lesions of two training patients
    nearer_than_real: float | None  # share nearer in features than 95 % of the held-out real ones; None without these
    without_patient: int  # training samples that name no patient

    @property
    def copies(self) -> list[Neighbour]:
        """Those at or above the threshold, most alike first."""
        return [each for each in self.ranked if self.is_copy(each)]

    def is_copy(self, each: Neighbour) -> bool:
        """Whether it reaches the threshold, of lesions as they lie or, turned, of those with their sources."""
        return reaches(each, self.threshold, self.source_threshold)

    @property
    def ranked(self) -> list[Neighbour]:
        """Most alike first."""
        return sorted(self.neighbours, key=lambda each: (-each.correlation, each.lesion.sample.sample_id))

    @property
    def not_comparable(self) -> int:
        """How many synthetic lesions are flat and equal no training image: nobody can tell whether they are copies."""
        return sum(not each.comparable for each in self.neighbours)

    @property
    def likeness_of_sources(self) -> dict[str, float]:
        """The median correlation of lesions with their sources: of those that were pasted, and of those that were not
        but have the mask of one."""
        kinds: dict[str, list[float]] = defaultdict(list)
        for each in self.neighbours:
            if each.source is not None:
                kinds["pasted" if _begun_from_a_lesion(each.lesion.sample) else "mask"].append(each.source)
        return {kind: float(np.median(values)) for kind, values in sorted(kinds.items())}

    def warnings(self) -> list[str]:
        """What a reader must know before trusting that there are no (other) copies."""
        found, closest = [], self.closest_real
        begun = [each for each in self.neighbours if _begun_from_a_lesion(each.lesion.sample)]
        if begun:
            likeness = self.likeness_of_sources.get("pasted")
            median = "none of their sources is in the training set" if likeness is None else f"median {likeness:.3f}"
            found.append(
                f"{counted(len(begun), 'synthetic lesion is', 'synthetic lesions are')}, or began as, a real lesion "
                "(copy_paste.py, --init paste or image with a strength below 1): that patient's lesion shines through "
                "by construction, whether or not it counts as a copy here (correlation with it: "
                f"{median}; copies from {self.source_threshold:.3f} on)."
            )
        if self.not_comparable:
            found.append(
                f"{counted(self.not_comparable, 'synthetic lesion is', 'synthetic lesions are')} flat (saturated, for "
                "instance): their pixels cannot be compared, and only an image that equals a training image is found "
                "to be a copy. Look at them."
            )
        if self.without_patient:
            nameless = counted(self.without_patient, "training sample has", "training samples have")
            found.append(
                f"{nameless} no patient_id of their own: slices of one patient count as those of several, which sets "
                f"the threshold for copies ({self.threshold:.3f}) too near to 1, and copies are missed. Give "
                "patient_id in meta.json."
            )
        elif closest and closest.correlation > ALIKE:
            pair = f"{closest.lesion.sample.sample_id} and {closest.match.sample.sample_id}"
            found.append(
                f"The lesions of the training samples {pair} are nearly the same (correlation "
                f"{closest.correlation:.3f}), though of two patients: the threshold for copies ({self.threshold:.3f}) "
                "is near to 1, and copies are missed. Are they one patient, or one of them a copy of the other?"
            )
        sources = sum(each.source is not None for each in self.neighbours)
        if sources and self.threshold <= (1 + ALIKE) / 2 < self.source_threshold:
            repeat = counted(sources, "synthetic lesion repeats its", "synthetic lesions repeat their")
            found.append(
                "Turned and scaled as fits best, lesions of two training patients are nearly the same (correlation "
                f"{2 * self.source_threshold - 1:.3f}): whether {repeat} source, turned, cannot be told (copies from "
                f"{self.source_threshold:.3f} on). Look at closest_pairs.png."
            )
        return found


def check_copies(
    synthetic: Sequence[Lesion], train: Sequence[Lesion], held_out: Sequence[Lesion] | None = None
) -> CopyCheck:
    """Compare every synthetic lesion with all training lesions: first features of the lesion alone, then pixels.

    The rest of a synthetic image is its parent's and says nothing, so only the lesion is looked at. A copy correlates
    more than halfway from the most alike lesions of two training patients to perfectly, or has all pixels of a training
    image, however flat. A lesion that was pasted, or has the mask of a training lesion, is compared with that one too,
    turned and scaled; so are, for the threshold of that, the TURNED pairs of training patients that are most alike as
    they lie: the best of 65 turns and sizes is higher than one, of lesions that have nothing to do with each other too.
    ``held_out``: real lesions the generator has not seen, which tell how near an honest one is.
    """
    found = nearest_of(synthetic, train, "copies")
    threshold, source_threshold, closest = copy_thresholds(train, any(each.source is not None for each in found))
    nearer = None
    if held_out is not None:
        usual = np.percentile([each.cosine for each in nearest_of(held_out, train, "held-out lesions")], 95)
        nearer = float(np.mean([each.cosine > usual for each in found]))
    without = sum(each.sample.patient_id == each.sample.sample_id for each in train)
    return CopyCheck(found, threshold, source_threshold, closest, nearer, without)


def copy_thresholds(train: Sequence[Lesion], turned: bool) -> tuple[float, float, Neighbour | None]:
    """From which correlations on lesions are copies, see ``reaches``, and the most alike lesions of two patients.

    Both are halfway from those to 1. Without ``turned`` the second one is the first.
    """
    between = nearest_of(train, train, "training lesions", of_other_patients=True)
    closest = max(between, key=lambda each: each.correlation, default=None)
    threshold = UNCALIBRATED if closest is None else (1 + closest.correlation) / 2
    if not turned:
        return threshold, threshold, closest
    alike = sorted(between, key=lambda each: -each.correlation)[:TURNED]
    highest = max((_turned_correlation(each.lesion, each.match) for each in alike), default=0.0)
    return threshold, max(threshold, (1 + highest) / 2), closest


def reaches(each: Neighbour, threshold: float, source_threshold: float) -> bool:
    """Whether a lesion is a copy: as it lies from ``threshold`` on, or, turned, with its source from the other one."""
    turned = each.source is not None and each.source >= source_threshold
    return turned or each.as_it_lies >= threshold


def nearest_of(
    lesions: Sequence[Lesion], train: Sequence[Lesion], name: str, of_other_patients: bool = False
) -> list[Neighbour]:
    """Of each lesion its nearest training lesion, with ``of_other_patients`` the nearest of another patient.

    That is for the training lesions themselves; then no lesion is compared with a source. One without any training
    lesion to compare with is left out.
    """
    by_pixels = defaultdict(list)
    for column, other in enumerate(train):
        for key in _pixel_keys(other):
            by_pixels[key].append(column)
    columns = {other.sample.sample_id: column for column, other in enumerate(train)}
    patients = np.unique([other.sample.patient_id for other in train], return_inverse=True)[1]
    every, pixels, found = np.arange(len(train)), lru_cache(REMEMBERED)(lambda column: train[column].small), []
    shown = tqdm(lesions, desc=name, leave=False, disable=None)
    for row, (lesion, cosines) in enumerate(zip(shown, _cosines(lesions, train), strict=True)):
        allowed = every[patients != patients[row]] if of_other_patients else every
        if not len(allowed):
            continue
        order = _nearest(cosines, allowed)
        nearest = float(cosines[order[0]])
        alike = {column for key in _pixel_keys(lesion) for column in by_pixels.get(key, ())}
        equal = [each for each in alike if not of_other_patients or patients[each] != patients[row]]
        if equal:
            found.append(Neighbour(lesion, train[min(equal)], 1.0, nearest, comparable=True, as_it_lies=1.0))
            continue
        own, mask = lesion.small
        scores = [correlation(own, mask, *pixels(column), REACH) for column in order]
        best = int(np.argmax(scores))
        parent = None if of_other_patients else _source_of(lesion.sample)
        source = None if parent is None else columns.get(parent)
        likeness = None if source is None else _turned_correlation(lesion, train[source])
        as_it_lies, match = scores[best], train[order[best]]
        if source is not None and likeness is not None and likeness > as_it_lies:
            match = train[source]
        highest = max(as_it_lies, likeness or 0.0)
        found.append(Neighbour(lesion, match, highest, nearest, not lesion.flat, as_it_lies, likeness))
    return found


def _cosines(lesions: Sequence[Lesion], train: Sequence[Lesion]) -> Iterator[np.ndarray]:
    """Of each lesion the cosines with all training lesions (M,); so many rows at once as the memory holds well."""
    own, others = lesion_rows(lesions, "alone"), lesion_rows(train, "alone").T
    for rows in own.split(max(1, BLOCK**2 // len(train))):
        yield from (rows @ others).numpy()


def _nearest(cosines: np.ndarray, allowed: np.ndarray) -> list[int]:
    """The CANDIDATES columns of the highest cosines among the ``allowed`` ones, the highest first."""
    distances = -cosines[allowed]
    if len(allowed) > CANDIDATES:
        near = np.flatnonzero(distances <= np.partition(distances, CANDIDATES - 1)[CANDIDATES - 1])
        allowed, distances = allowed[near], distances[near]
    return allowed[np.argsort(distances, kind="stable")][:CANDIDATES].tolist()


def _begun_from_a_lesion(sample: Sample) -> bool:
    """Whether a result is a pasted lesion, or sampling began with one or with the image itself."""
    begun = sample.meta.get("init") in ("paste", "image") and sample.meta.get("strength") != 1
    return begun or {"method", "pasted_from"} <= sample.meta.keys()


def _source_of(sample: Sample) -> str | None:
    """The sample_id of the lesion that a result was made from, or whose mask it has."""
    meta = sample.meta
    begun = sample.parent_id if meta.get("init") == "image" else None
    return meta.get("pasted_from") or begun or meta.get("mask_source")


def _turned_correlation(lesion: Lesion, source: Lesion) -> float:
    """``correlation`` of a lesion with its source, turned and scaled as fits best."""
    grey, mask = source.small
    rows, columns = np.nonzero(mask)
    if not len(rows) or lesion.flat:
        return 0.0
    centre, found, own = (float(columns.mean()), float(rows.mean())), 0.0, lesion.small
    for turn in TURNS:
        for scale in SCALES:
            matrix = cv2.getRotationMatrix2D(centre, turn, scale)
            both = grey, mask.astype(float)
            theirs, other = (
                cv2.warpAffine(each, matrix, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE) for each in both
            )
            found = max(found, correlation(*own, theirs, other >= 0.5, REACH))
    return found


def _pixel_keys(lesion: Lesion) -> tuple[str, bytes]:
    """Lesions that share one of these have the same image, or the same crop around the lesion, pixel by pixel."""
    return lesion.digest, hashlib.sha256(lesion.crop.tobytes()).digest()


def quarantine_copies(copies: Sequence[Neighbour], folder: Path) -> None:
    """Move the sample folders of copies from the synthetic ``folder`` to FOLDER_quarantine, under the same paths.

    ``folder`` may be a link, or lie behind one. Nothing is moved where a folder of that name is there already.
    """
    folder = Path(os.path.abspath(folder))
    target = folder.with_name(f"{folder.name}_quarantine")
    moves = [(each.lesion.sample.image.parent, each.lesion.sample.image.parent.relative_to(folder)) for each in copies]
    for _, name in moves:
        if os.path.lexists(target / name):
            raise MedSoftError(f"{target / name}: is there already; move it away, then run again")
    for source, name in moves:
        try:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target / name)
        except OSError as error:
            cause = error.strerror or error
            raise MedSoftError(f"{source}: could not be moved to {target / name} ({cause}); move it by hand") from error
    if copies:
        log.warning("%s moved to %s", counted(len(copies), "copy", "copies"), target)
