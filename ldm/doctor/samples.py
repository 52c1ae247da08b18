"""One sample of a data set looked at completely: its faults, numbers for the statistics, and its picture. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ldm.core.errors import MedSoftError
from ldm.core.threads import side_by_side
from ldm.data.checks import sample_attributes
from ldm.data.folders import mask_box, scan_each
from ldm.data.images import open_image, orientations_differ, pixel_digest, read_image
from ldm.data.masks import TARGET_LABEL
from ldm.data.regions import ORIENTATION_NOTE, Decoded, Regions, read_regions, region_notes
from ldm.data.samples import Reject, Sample
from ldm.reports.overlays import outlined

Box = tuple[float, float, float, float]  # x, y, w, h as fractions of the image
BOX_FAULT = (
    "reaches beyond the box that the annotation gives it: the mask has changed since, or the box is of something else; "
    "prepare the data again"
)
SHOWN = 300  # samples of a data set on the page, evenly spread: a fault of one in 100 is there in 95 % of cases


@dataclass(frozen=True)
class Finding:
    """``level``: error (training would stop or learn something wrong), sample (one sample cannot be used), warning."""

    level: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class DatasetInspection:
    """What decoding one sample has shown: faults, and numbers for the statistics over the data set.

    ``marked``: whether its mask or label map says where its vertebra is, as far as they can be read. ``spread``:
    whether it is one of those of which there is a picture anyway. ``tile``: its picture (see ``overlay``), if it is
    one of these or has a fault.
    """

    sample_id: str
    faults: tuple[Finding, ...]
    digest: str | None = None
    shape: tuple[int, ...] = ()
    depth: int = 0  # bits
    attributes: dict[str, float | str] = field(default_factory=dict)
    marked: bool = True
    spread: bool = True
    tile: np.ndarray | None = None


def inspected_folder(
    root: Path, workers: int | None, pictured: bool
) -> Iterator[tuple[Sample | Reject, DatasetInspection | None]]:
    """Every sample folder below ``root`` with what its files show; see ``scan_each``."""
    yield from scan_each(root, partial(_inspected, pictured), workers)


def inspected_samples(samples: Sequence[Sample], workers: int | None, pictured: bool) -> Iterator[DatasetInspection]:
    """What the files of each sample show, in their order; many samples are looked at by several processes."""
    yield from side_by_side(partial(_inspect, pictured, len(samples)), list(enumerate(samples)), workers)


def _inspect(pictured: bool, total: int, numbered: tuple[int, Sample]) -> DatasetInspection:
    """Decode every file of a sample, each once."""
    number, sample = numbered
    try:
        file = open_image(sample.image)
        image = read_image(file)
    except MedSoftError as error:
        return DatasetInspection(sample.sample_id, (Finding("sample", str(sample.image), error.cause(sample.image)),))
    sources = {"mask": sample.mask, "soft_mask": sample.soft_mask, "anatomy": sample.anatomy}
    regions = read_regions(image, {stem: path for stem, path in sources.items() if path})
    inspection = _inspected(pictured, sample, Decoded(file, image, regions), number, total)
    if regions.mask is None or sample.healthy or _covers(sample.box, mask_box(regions.mask), image.shape):
        return inspection
    return replace(inspection, faults=(*inspection.faults, Finding("warning", str(sample.mask), BOX_FAULT)))


def _covers(box: Box, of_mask: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box that an annotation gives holds that of its mask, up to a pixel; of zeros, either says nothing."""
    if not any(box) or not any(of_mask):
        return True
    pairs = zip(box[:2], box[2:], of_mask[:2], of_mask[2:], shape[1::-1], strict=True)
    ends = [(length * a, length * (a + b), length * c, length * (c + d)) for a, b, c, d, length in pairs]
    return all(first <= low + 1.01 and last >= high - 1.01 for first, last, low, high in ends)


def _inspected(pictured: bool, sample: Sample, decoded: Decoded, number: int, total: int) -> DatasetInspection:
    image, regions = decoded.image, decoded.regions
    faults: list[Finding] = []
    if image.min() == image.max():
        faults.append(Finding("warning", str(sample.image), f"every pixel is {image.min()}: an empty image"))
    try:
        notes = region_notes(image, regions, sample.healthy)
        faults += [Finding("warning", str(note.file), str(note)) for note in notes]
        if orientations_differ([decoded.file, *regions.files.values()]):
            faults.append(Finding("warning", str(sample.image), ORIENTATION_NOTE))
    except MedSoftError as error:
        faults.append(Finding("sample", str(sample.image.parent), str(error)))
    target = regions.anatomy is not None and bool((regions.anatomy == TARGET_LABEL).any())
    spread = number * SHOWN // total != (number - 1) * SHOWN // total
    return DatasetInspection(
        sample.sample_id,
        tuple(faults),
        pixel_digest(image),
        image.shape,
        8 * image.dtype.itemsize,
        sample_attributes(sample, image),
        marked=target or regions.fault is not None or (regions.mask is not None and not regions.mask.empty),
        spread=spread,
        tile=_tile(sample, image, regions) if pictured and (spread or faults) else None,
    )


def _tile(sample: Sample, image: np.ndarray, regions: Regions) -> np.ndarray | None:
    if (sample.mask and regions.mask is None) or (sample.anatomy and regions.anatomy is None):
        return None
    try:
        return outlined(sample, image, regions.mask, regions.anatomy)
    except MedSoftError:
        return None  # a finding by itself
