"""Does a synthetic lesion repeat a training lesion? Its nearest training lesions by features, then by pixels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError
from ldm.evaluation.lesions import Lesion, lesion_rows
from ldm.evaluation.metrics import correlation

log = logging.getLogger("evaluate")

CANDIDATES = 10  # nearest training lesions whose pixels are compared
REACH = 3  # pixels by which a lesion may have moved
UNCALIBRATED = 0.95  # threshold without two training patients to compare


@dataclass(frozen=True)
class Neighbour:
    """The training lesion that a lesion looks most like.

    ``correlation``: of their pixels; ``cosine``: of the features of the lesion alone and of the training lesion nearest
    in features, which may be another one than ``match``.
    """

    lesion: Lesion
    match: Lesion
    correlation: float
    cosine: float


@dataclass(frozen=True)
class CopyCheck:
    """Nearest training lesions of every synthetic one, and the threshold from which it counts as a copy."""

    neighbours: list[Neighbour]
    threshold: float
    closest_real: float | None  # highest correlation between lesions of two training patients
    nearer_than_real: float | None  # share nearer in features than 95 % of the held-out real ones; None without these

    @property
    def copies(self) -> list[Neighbour]:
        """Those at or above the threshold, most alike first."""
        return [each for each in self.ranked if each.correlation >= self.threshold]

    @property
    def ranked(self) -> list[Neighbour]:
        """Most alike first."""
        return sorted(self.neighbours, key=lambda each: (-each.correlation, each.lesion.sample.sample_id))


def check_copies(
    synthetic: Sequence[Lesion], train: Sequence[Lesion], held_out: Sequence[Lesion] | None = None
) -> CopyCheck:
    """Compare every synthetic lesion with all training lesions: first features of the lesion alone, then pixels.

    The rest of a synthetic image is its parent's and says nothing, so only the lesion is looked at. A copy correlates
    more than halfway from the most alike lesions of two training patients to perfectly. ``held_out``: real lesions the
    generator has not seen, which tell how near an honest one is.
    """
    between = _nearest(train, train, "training lesions")
    found = _nearest(synthetic, train, "copies")
    closest = max((each.correlation for each in between), default=None)
    threshold = UNCALIBRATED if closest is None else (1 + closest) / 2
    if held_out is None:
        return CopyCheck(found, threshold, closest, None)
    usual = np.percentile([each.cosine for each in _nearest(held_out, train, "held-out lesions")], 95)
    return CopyCheck(found, threshold, closest, float(np.mean([each.cosine > usual for each in found])))


def _nearest(lesions: Sequence[Lesion], train: Sequence[Lesion], name: str) -> list[Neighbour]:
    """Of each lesion its nearest training lesion; a training lesion's own patient does not count."""
    same = lesions is train
    cosines, found = lesion_rows(lesions, "alone") @ lesion_rows(train, "alone").T, []
    for row, lesion in enumerate(tqdm(lesions, desc=name, leave=False, disable=None)):
        patient = lesion.sample.patient_id if same else None
        allowed = [column for column, other in enumerate(train) if other.sample.patient_id != patient]
        if not allowed:
            continue
        order = sorted(allowed, key=lambda column: -float(cosines[row, column]))[:CANDIDATES]
        grey, mask = lesion.small
        scores = [correlation(grey, mask, *train[column].small, REACH) for column in order]
        best = int(np.argmax(scores))
        found.append(Neighbour(lesion, train[order[best]], scores[best], float(cosines[row, order[0]])))
    return found


def quarantine_copies(copies: Sequence[Neighbour], folder: Path) -> None:
    """Move the sample folders of copies from the synthetic ``folder`` to FOLDER_quarantine, under the same paths."""
    target = folder.with_name(f"{folder.name}_quarantine")
    for each in copies:
        sample_folder = each.lesion.sample.image.parent
        goal = target / sample_folder.relative_to(folder.resolve())
        if goal.exists():
            raise MedSoftError(f"{goal}: is there already; move it away, then run again")
        goal.parent.mkdir(parents=True, exist_ok=True)
        sample_folder.rename(goal)
    if copies:
        log.warning("%d copies moved to %s", len(copies), target)
