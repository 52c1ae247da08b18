"""What the classifier sees of an image and of a lesion's mask: a small square, nothing stretched. No torch."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from ldm.classifier.config import SEGMENT
from ldm.core.errors import MedSoftError
from ldm.data.images import intensity_range_of, to_unit
from ldm.data.masks import TARGET_LABEL, extents, read_anatomy, read_mask, spacing_of
from ldm.data.samples import Sample

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"


class Squares:
    """Squares, or masks, by their places: (N, S, S), or (N, S, S, 3) in colour.

    They stay in the ``arrays`` that they come from, large ones in files: what is taken out of a set, repeated or put
    together is which row of which array each one is, ``rows`` (N, 2).
    """

    def __init__(self, arrays: Sequence[np.ndarray], rows: np.ndarray | None = None) -> None:
        """Without ``rows`` all of the arrays, one after the other."""
        self.arrays = list(arrays)
        every = [np.stack([np.full(len(array), k), np.arange(len(array))], 1) for k, array in enumerate(self.arrays)]
        self.rows = np.concatenate(every) if rows is None else rows

    @classmethod
    def joined(cls, parts: "Sequence[Squares]") -> "Squares":
        """Those of all ``parts``, of which there is at least one."""
        before = np.cumsum([0, *(len(part.arrays) for part in parts)])
        rows = [part.rows + np.array([first, 0]) for first, part in zip(before, parts, strict=False)]
        return cls([array for part in parts for array in part.arrays], np.concatenate(rows))

    def subset(self, places: Sequence[int]) -> "Squares":
        """Those at these places, in this order, repeated where a place is."""
        return Squares(self.arrays, self.rows[list(places)])

    @property
    def shape(self) -> tuple[int, ...]:
        """As that of one array of all of them."""
        return len(self.rows), *self.arrays[0].shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.arrays[number][row] for number, row in self.rows)

    def __getitem__(self, places: int | slice | np.ndarray) -> np.ndarray:
        """The one at a place, or a copy of those at several."""
        rows = self.rows[places]
        if rows.ndim == 1:
            return self.arrays[rows[0]][rows[1]]
        if len(self.arrays) == 1:
            return self.arrays[0][rows[:, 1]]
        found = np.empty((len(rows), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for number, array in enumerate(self.arrays):
            inside = rows[:, 0] == number
            found[inside] = array[rows[inside, 1]]
        return found


def square(pixels: np.ndarray, sample: Sample, size: int, channels: str, crop: float | None = None) -> np.ndarray:
    """What the classifier sees of a sample's image as read: uint8 (size, size), or (size, size, 3) with channels rgb.

    Nothing is stretched: the image, or the part that ``crop`` asks for (see ``vertebra_square``), is scaled until its
    longer side, in mm where the spacing is known, fits, and what remains of the square is black.
    """
    unit = to_unit(pixels, intensity_range_of(pixels, sample.meta.get("window")))
    if channels == "grey" and unit.ndim == 3:
        unit = unit @ LUMINANCE
    if channels == "rgb" and unit.ndim == 2:
        unit = np.repeat(unit[..., None], 3, axis=2)
    return _fitted(unit, sample, size, crop)


def lesion_square(shape: tuple[int, ...], sample: Sample, size: int, crop: float | None = None) -> np.ndarray:
    """The lesion's mask as ``square`` shows the image, which is of that ``shape``: bool (size, size), all False of a
    healthy sample. MedSoftError where the mask cannot be read, or where nothing of the lesion is in what is seen."""
    if sample.healthy:
        return np.zeros((size, size), bool)
    if sample.mask is None:
        raise MedSoftError(f"task {SEGMENT}: a diseased sample needs the mask of its lesion")
    seen = _fitted(read_mask(sample.mask, shape).hard.astype(np.float32), sample, size, crop) >= 128
    if not seen.any():
        raise MedSoftError(f"task {SEGMENT}: nothing of the lesion's mask is in what the network sees (crop, img_size)")
    return seen


def _fitted(unit: np.ndarray, sample: Sample, size: int, crop: float | None) -> np.ndarray:
    """An image or mask in [0, 1] as uint8 (size, size, ...): see ``square``."""
    spacing = spacing_of(sample.meta.get("spacing_mm") or 1.0)
    if crop is not None:
        unit = vertebra_square(unit, sample, spacing, crop)
    lengths = [count * mm for count, mm in zip(unit.shape, spacing, strict=False)]
    height, width = (max(1, round(size * length / max(lengths))) for length in lengths)
    if unit.shape[:2] != (height, width):
        unit = cv2.resize(unit, (width, height), interpolation=cv2.INTER_AREA)
    seen = np.zeros((size, size, *unit.shape[2:]), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    seen[top : top + height, left : left + width] = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return seen


def vertebra_square(image: np.ndarray, sample: Sample, spacing: tuple[float, float], context: float) -> np.ndarray:
    """The square (in mm) around the sample's vertebra, label 1 of its anatomy.png; black beyond the image.

    Its side is ``context`` times the vertebra's longer one. Healthy and diseased samples are cut alike: a lesion's mask
    is not looked at. MedSoftError where no vertebra is marked.
    """
    region = None if sample.anatomy is None else read_anatomy(sample.anatomy, image.shape) == TARGET_LABEL
    if region is None or not region.any():
        raise MedSoftError(f"crop {context:g}: no vertebra (label {TARGET_LABEL}) is marked in an anatomy.png")
    spans = extents(region)
    side = context * max((last - first) * mm for (first, last), mm in zip(spans, spacing, strict=True))
    parts, margins = [], []
    for (first, last), mm, length in zip(spans, spacing, image.shape, strict=False):
        count = max(1, round(side / mm))
        start = (first + last - count) // 2
        parts.append(slice(max(start, 0), max(min(start + count, length), 0)))
        margins.append((max(-start, 0), max(start + count - length, 0)))
    return np.pad(image[tuple(parts)], [*margins, (0, 0)][: image.ndim])
