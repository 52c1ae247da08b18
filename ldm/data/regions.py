"""The regions that the files of a sample mark in its image: decoded once, compared, and what is doubtful of them.

No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ldm.core.errors import FileError, MedSoftError
from ldm.core.tables import counted
from ldm.data.images import ImageFile, ImageSource, intensity_range_of, open_image, read_labels
from ldm.data.masks import (
    MOSTLY,
    TARGET_LABEL,
    Mask,
    equivalent_diameter,
    looks_inverted,
    read_anatomy,
    read_mask,
    stray_parts,
)
from ldm.data.samples import Sample

STEMS = ("image", "mask", "soft_mask", "anatomy")  # of a sample folder's image files
READERS: dict[str, Callable[[ImageSource, tuple[int, ...]], Any]]
READERS = {"mask": read_mask, "soft_mask": partial(read_mask, soft=True), "anatomy": read_anatomy}
FAINT = 0.1  # of the intensity range
FAINT_NOTE = (
    "nearly all of its image lies within a tenth of its range (0 to 255, or its `window`): the networks see next to "
    "nothing of it"
)
POLARITY = "1 (white) is the lesion, 0 everything else"
ORIENTATION_NOTE = (
    "its image, mask and label map have different EXIF orientations: what was made on the stored pixels of another one "
    "lies elsewhere; look at the overlays of tool/doctor.py"
)
STRAY_NOTE = "its mask has a part that is tiny, or far from the largest one (stray pixels?), which makes the crop wider"
MOSTLY_NOTE = f"its mask marks most of the image or of its border: inverted? {POLARITY}"
EVERYWHERE_NOTE = "its soft mask is above 0 in most of the image, all of which will change: is its background 0?"
OUTLINE_NOTE = "its mask encloses nearly as much as it marks, or more: an outline that is not filled?"
BEYOND_NOTE = (
    "its soft mask marks, in full, what lies far outside its mask: what is inpainted is not what its mask says"
)
SHORT_NOTE = "its soft mask leaves part of its mask out: that part will not be inpainted"
NO_TARGET_NOTE = f"its label map does not say which vertebra the image is about (no label {TARGET_LABEL})"
TARGETS_NOTE = f"label {TARGET_LABEL} of its label map has several large parts: it is one vertebra, the others are 2"
OUTSIDE_NOTE = f"its mask lies outside label {TARGET_LABEL} of its label map: look at the overlays of tool/doctor.py"


class Note(NamedTuple):
    """What a person should know of a file: ``text`` is the same for every sample, ``detail`` has this one's numbers."""

    file: Path
    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text}{': ' * bool(self.detail)}{self.detail}"


class Regions(NamedTuple):
    """What the files of a sample mark in its image; ``fault`` is the first error in them, and what it concerns None."""

    mask: Mask | None
    soft_mask: Mask | None
    anatomy: np.ndarray | None
    files: dict[str, ImageFile]
    fault: FileError | None


class Decoded(NamedTuple):
    """What the files of a sample hold: its image's, the pixels of that (HxW or HxWx3), and its regions."""

    file: ImageFile
    image: np.ndarray
    regions: Regions


def read_regions(image: np.ndarray, sources: Mapping[str, ImageSource]) -> Regions:
    """Decode those files of ``sources`` (by their stems) that mark regions of ``image`` (HxW or HxWx3), each once."""
    found: dict[str, Any] = dict.fromkeys(STEMS[1:])
    files: dict[str, ImageFile] = {}
    fault = None
    for stem in [stem for stem in found if stem in sources]:
        try:
            files[stem] = open_image(sources[stem])
            found[stem] = READERS[stem](files[stem], image.shape)
        except FileError as error:
            fault = fault or error
    return Regions(**found, files=files, fault=fault)


def region_notes(image: np.ndarray, regions: Regions, healthy: bool) -> list[Note]:
    """What a person should know of the regions of ``image``; FileError for what is certainly a mistake.

    ``healthy``: the mask is the vertebra's, not a lesion's.
    """
    if regions.fault:
        raise regions.fault
    own, soft, labels = regions[:3]
    mask, soft_mask, anatomy = (regions.files[stem].path if stem in regions.files else None for stem in STEMS[1:])
    notes = []
    for path, each in ((mask, own), (soft_mask, soft)):
        if path is None or each is None:
            continue
        if each.empty and not healthy:
            name = path.stem.lower().replace("_", " ")
            raise FileError(path, f"the {name} is empty (all zero), but the prompt names a lesion")
        if path == mask and looks_inverted(each.hard, whole=not healthy):
            reason = f"marks the whole border and {each.hard.mean():.0%} of the image: inverted? {POLARITY}"
            raise FileError(path, reason)
        # Where a flat lesion was inpainted into flat tissue, the image does rise and fall with its soft mask.
        of_mask = path == soft_mask and own is not None and own.hard.any() and (each.values[own.hard] == 1).all()
        if each.soft and not of_mask and _is_picture_of(image, each.values):
            raise FileError(path, f"looks like the image itself; expected a mask: {POLARITY}")
        if each.note:
            notes.append(Note(path, each.note))
        if each.soft and np.count_nonzero(each.values) > MOSTLY * each.values.size:
            notes.append(Note(path, EVERYWHERE_NOTE))
    if mask and own and not healthy:
        notes += _lesion_notes(mask, own.hard)
    if soft_mask and soft and own and not own.empty:
        notes += _soft_mask_notes(soft_mask, soft.values, own.hard, healthy)
    if anatomy and labels is not None:
        notes += _anatomy_notes(anatomy, labels == TARGET_LABEL, own)
    return notes


def _is_picture_of(image: np.ndarray, values: np.ndarray) -> bool:
    """Whether the values of a mask (HxW) rise and fall with the levels of its image: a copy, or one cut to the lesion.

    A lesion may resemble its own soft mask, but not that well.
    """
    levels = image if image.ndim == 2 else image.mean(axis=2)
    for region, least in ((np.ones(values.shape, bool), 0.9), (values > 0, 0.97)):
        there, marked = levels[region].astype(float), values[region].astype(float)
        if len(marked) > 20 and np.ptp(there) and np.ptp(marked) and abs(np.corrcoef(there, marked)[0, 1]) > least:
            return True
    return False


def _lesion_notes(path: Path, hard: np.ndarray) -> list[Note]:
    edge = np.concatenate([hard[0], hard[-1], hard[:, 0], hard[:, -1]]).mean()
    notes = [Note(path, MOSTLY_NOTE, f"{hard.mean():.0%}")] if max(edge, hard.mean()) > MOSTLY else []
    outlines, _ = cv2.findContours(hard.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(hard.shape, np.uint8), outlines, -1, 1, cv2.FILLED)
    if np.count_nonzero(filled) > 1.8 * np.count_nonzero(hard):
        notes.append(Note(path, OUTLINE_NOTE))
    parts = [
        f"{counted(pixels, 'pixel')} from row {row}, column {column} on"
        for pixels, row, column in stray_parts(hard)[:3]
    ]
    return notes + [Note(path, STRAY_NOTE, part) for part in parts]


def _soft_mask_notes(path: Path, soft: np.ndarray, hard: np.ndarray, healthy: bool) -> list[Note]:
    """What does not fit between a soft mask (HxW in [0, 1]) and the mask beside it (bool HxW)."""
    if not healthy and not (hard & (soft >= 0.5)).any():
        raise FileError(path, "lies elsewhere than the mask beside it: none of the mask's pixels is 0.5 or more here")
    notes = []
    away = cv2.distanceTransform((~hard).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    reach = max(2.0, equivalent_diameter(hard) / 2)
    if ((soft >= 0.995) & (away > reach)).any():
        notes.append(Note(path, BEYOND_NOTE))
    if not healthy and np.count_nonzero(soft[hard] == 0) > 0.1 * np.count_nonzero(hard):
        notes.append(Note(path, SHORT_NOTE))
    return notes


def _anatomy_notes(path: Path, target: np.ndarray, own: Mask | None) -> list[Note]:
    """What is strange about the target vertebra (bool HxW), alone and beside the sample's mask."""
    if not target.any():
        return [Note(path, NO_TARGET_NOTE)]
    areas = np.sort(cv2.connectedComponentsWithStats(target.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA])
    notes = [Note(path, TARGETS_NOTE)] if len(areas) > 1 and areas[-2] > areas[-1] / 2 else []
    if own and own.hard.any() and np.count_nonzero(own.hard & target) < 0.1 * np.count_nonzero(own.hard):
        notes.append(Note(path, OUTSIDE_NOTE))
    return notes


def intensity_notes(image: np.ndarray, window: Any, regions: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What the intensity range does to an image and its ``regions`` (bool HxW); MedSoftError if it misses the image."""
    low, high = intensity_range_of(image, window, regions.get("lesion"))
    if _spread(image) < FAINT * (high - low):
        yield FAINT_NOTE
    if image.dtype == np.uint8:
        if window is not None:
            yield "its image has 8 bits, which are used as they are: `window` in its meta.json is not"
        return
    levels = np.atleast_3d(image)
    inside = np.any((levels > low) & (levels < high), axis=2)
    for name, region in regions.items():
        if region.any() and inside[region].mean() < 0.5:
            yield f"more than half of its {name} lies outside its `window` and is black or white for the model"


def _spread(image: np.ndarray) -> float:
    """The difference of the 99.5th and the 0.5th percentile of the levels of an image."""
    if image.dtype != np.uint8:
        return float(np.subtract(*np.percentile(image, (99.5, 0.5))))
    counts = cv2.calcHist([image.ravel()], [0], None, [256], [0, 256]).ravel().astype(np.int64).cumsum()
    places = (image.size - 1) * np.array([0.005, 0.995])
    low, high = (np.searchsorted(counts, places.astype(int) + more, side="right") for more in (0, 1))
    return float(np.subtract(*(low + (high - low) * (places % 1))[::-1]))


Recall = Callable[[str, Sequence[Path | None], Callable[[], int]], int]  # as ldm.features.known.KnownFiles.recall


def computed(what: str, files: Sequence[Path | None], compute: Callable[[], int]) -> int:
    """A Recall that remembers nothing."""
    return compute()


def inpainting_obstacle(sample: Sample, marked: bool | None = None, recall: Recall = computed) -> str | None:
    """Why this sample cannot be inpainted, or None if it can.

    Of a healthy one without a box the label map and the mask are read, and must mark something: a black mask is sound,
    but says of no place where a lesion may be. A file that cannot be read is no obstacle here; whoever uses it says so.
    ``marked``: whether they do, where that is known already; ``recall`` may remember it.
    """
    if not sample.healthy:
        return None if sample.mask else "a diseased sample without a mask"
    if any(sample.box):
        return None
    if marked is None:
        try:
            marked = bool(recall("marks", (sample.anatomy, sample.mask), lambda: _marks(sample)))
        except MedSoftError:
            marked = True
    if marked:
        return None
    files = " and ".join(path.name for path in (sample.anatomy, sample.mask) if path)
    reason = f"nothing is marked in {files}" if files else "neither anatomy.png nor a mask nor a box says where it is"
    return f"healthy, and its vertebra is not known: {reason}"


def _marks(sample: Sample) -> bool:
    """Whether the label map or the mask marks something. MedSoftError if one that is looked at cannot be read."""
    if sample.anatomy and (read_labels(sample.anatomy) == TARGET_LABEL).any():
        return True
    return sample.mask is not None and not read_mask(sample.mask).empty
