"""What an image becomes for the model: the crop around a lesion, and how much of the crop the lesion fills."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.config import DataConfig
from ldm.core.errors import MedSoftError
from ldm.core.tables import markdown_table
from ldm.core.threads import thread_pool
from ldm.data.annotations import load_samples
from ldm.data.crop import Fit
from ldm.data.masks import Mask, spacing_of
from ldm.data.preparation import PreparedSample, fit_sample, prepare
from ldm.data.samples import Reject, Sample
from ldm.networks.msc import patch_mask

log = logging.getLogger("crop_table")


@dataclass(frozen=True)
class Geometry:
    """An image of ``shape`` (H, W) with an elliptic lesion of ``lesion`` (rows, columns) pixels in its middle."""

    name: str
    shape: tuple[int, int]
    spacing: tuple[float, float]  # mm between rows, mm between columns
    lesion: tuple[int, int]

    def sample(self) -> tuple[Sample, np.ndarray, Mask]:
        """The sample, its black image and its hard mask."""
        rows, columns = (np.arange(length) - (length - 1) / 2 for length in self.shape)
        half_rows, half_columns = self.lesion[0] / 2, self.lesion[1] / 2
        hard = np.hypot(rows[:, None] / half_rows, columns[None] / half_columns) < 1
        meta = {"spacing_mm": list(self.spacing)}
        sample = Sample(self.name, Path("image.png"), None, "lesion", (0.0,) * 4, self.name, meta=meta)
        return sample, np.zeros(self.shape, np.uint8), Mask(hard.astype(np.float32))


GEOMETRIES = (
    *(Geometry("CT", (512, 512), (0.7, 0.7), (side, side)) for side in (12, 20, 40, 80)),
    Geometry("radiograph", (1024, 512), (0.3, 0.3), (60, 60)),
    Geometry("MR", (256, 256), (1.1, 1.1), (14, 14)),
    Geometry("sagittal CT, thick rows", (160, 512), (2.5, 0.7), (8, 28)),
    Geometry("large CT", (2048, 2048), (0.2, 0.2), (100, 100)),
    Geometry("phantom", (128, 120), (0.85, 0.85), (24, 20)),
)


class Grids(NamedTuple):
    """Cells along each side of the model's square: BiomedCLIP's patches, and those of the latent."""

    patches: int
    latent: int


@dataclass(frozen=True)
class CropFacts:
    """What the model sees of one sample; patches and cells count where the soft mask is at least 0.5 in a part of them.

    side, mm: height and width of the window in native pixels and in mm; scale: model pixels a native pixel, rows and
    columns; share: of the window that the hard lesion fills; pixel_mm: of a model pixel; crops: distinct ones.
    """

    shape: tuple[int, int]
    lesion: tuple[int, int]
    side: tuple[int, int]
    mm: tuple[float, float] | None
    scale: tuple[float, float]
    share: float
    patches: int
    cells: int
    pixel_mm: tuple[float, float] | None
    crops: int


def crop_facts(sample: Sample, prepared: PreparedSample, data: DataConfig, grids: Grids) -> CropFacts:
    """What the model sees of a prepared sample."""
    window, size, spacing = prepared.crop_window, data.image_size, sample.meta.get("spacing_mm")
    fit, name = Fit.of(data), (0, sample.sample_id)
    variants = 1 if sample.healthy else data.diseased_crops
    crops = {fit.crop_window(prepared.soft.shape, prepared.soft, spacing, each, name) for each in range(variants)}
    patches, cells = (int((patch_mask(prepared.mask[None], grid) >= 0.5).sum()) for grid in grids)
    sides = window.height, window.width
    mm = None
    if spacing is not None:
        mm = sides[0] * spacing_of(spacing)[0], sides[1] * spacing_of(spacing)[1]
    lesion = (int(prepared.hard.any(axis=1).sum()), int(prepared.hard.any(axis=0).sum()))
    return CropFacts(
        shape=(prepared.soft.shape[0], prepared.soft.shape[1]),
        lesion=lesion,
        side=sides,
        mm=mm,
        scale=(size / sides[0], size / sides[1]),
        share=float(np.count_nonzero(prepared.hard)) / (sides[0] * sides[1]),
        patches=patches,
        cells=cells,
        pixel_mm=(mm[0] / size, mm[1] / size) if mm else None,
        crops=len(crops),
    )


def geometry_facts(geometry: Geometry, data: DataConfig, grids: Grids) -> CropFacts:
    """What the model sees of a geometry."""
    sample, image, mask = geometry.sample()
    return crop_facts(sample, fit_sample(sample, image, mask, data), data, grids)


COLUMNS = (
    *("image", "lesion", "crop", "crop in mm", "enlarged", "lesion's share of the crop"),
    *("BiomedCLIP patches", "latent cells", "mm a model pixel", "distinct crops"),
)


def geometry_table(data: DataConfig, grids: Grids) -> str:
    """The Markdown table of GEOMETRIES. Lengths are width x height, in pixels where no unit stands."""
    rows = []
    for geometry in GEOMETRIES:
        try:
            facts = _cells(geometry_facts(geometry, data, grids))
        except MedSoftError as error:
            facts = ["-", "-", str(error), *["-"] * 6]
        rows.append([f"{geometry.name}, {_both(geometry.shape)}", *facts[1:]])
    return markdown_table(COLUMNS, rows)


QUANTILES = {"smallest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "largest": 1.0}


def data_table(path: Path, data: DataConfig, grids: Grids, most: int) -> tuple[str, list[Reject]]:
    """The Markdown table of quantiles over the samples of a dataset folder or annotation file, and what was rejected.

    At most ``most`` samples, evenly spread over the file. Quantiles are taken in each column by itself. A healthy
    sample has the first of its lesion-shaped masks.
    """
    samples, rejects = load_samples(path)
    chosen = [samples[index * len(samples) // most] for index in range(most)] if len(samples) > most else samples

    def look(sample: Sample) -> CropFacts | Reject:
        """What the crop of a sample is like, or why there is none."""
        try:
            return crop_facts(sample, prepare(sample, data, 0, 0, training=True), data, grids)
        except MedSoftError as error:
            return Reject(sample.sample_id, sample.image, error.cause(sample.image))

    with thread_pool() as pool:
        looks = list(pool.map(look, chosen))
    rejects = [*rejects, *(each for each in looks if isinstance(each, Reject))]
    found = [each for each in looks if isinstance(each, CropFacts)]
    if not found:
        first = f"; the first, {rejects[0]}" if rejects else ""
        raise MedSoftError(f"{path}: none of its samples can be cropped{first}")
    log.info("%s: %d of %d samples looked at", path, len(chosen), len(samples))
    columns = {item.name: [getattr(each, item.name) for each in found] for item in dataclasses.fields(CropFacts)}
    rows = []
    for name, level in QUANTILES.items():
        quantiles = {key: _quantile(values, level) for key, values in columns.items()}
        rows.append([name, *_cells(CropFacts(**quantiles))])
    return markdown_table(("", *COLUMNS), rows), rejects


def _quantile(values: Sequence[Any], level: float) -> Any:
    """The value at ``level`` in sorted order, of pairs by the larger one; None where no sample has it."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    known.sort(key=lambda value: (max(value), *value) if isinstance(value, tuple) else value)
    return known[round(level * (len(known) - 1))]


def _cells(facts: CropFacts) -> list[str]:
    return [
        _both(facts.shape),
        _both(facts.lesion),
        _both(facts.side),
        _both(facts.mm, ".0f") if facts.mm else "-",
        _both(facts.scale, ".2f"),
        f"{100 * facts.share:.1f} %",
        str(facts.patches),
        str(facts.cells),
        _both(facts.pixel_mm, ".3f") if facts.pixel_mm else "-",
        str(facts.crops),
    ]


def _both(pair: tuple[float, float], style: str = "d") -> str:
    """(rows, columns) as width x height, or one number where both are shown alike."""
    height, width = (format(value, style) for value in pair)
    return width if width == height and style != "d" else f"{width} x {height}"
