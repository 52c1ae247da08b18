"""Masks: hard and soft, read from files, feathered, or made in the shape of a lesion. NumPy and OpenCV; no torch.

A mask is float32 in [0, 1]; 1 is the lesion region, the part to be inpainted. Everywhere, always.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ldm.config import FeatherUnit
from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.data.images import is_grey, read_image, read_labels
from ldm.data.samples import Sample

TARGET_LABEL = 1  # in anatomy.png: the vertebral body the image is about
SIDES = ("left", "right", "top", "bottom")  # of the image
DIAMETERS = (0.35, 0.7)  # of lesion-shaped masks, relative to the smaller side of the vertebra
MIN_REGION = 4  # pixels: the smallest side of a region that a lesion-shaped mask fits into
_PROFILE_POINTS = 4097


@dataclass(frozen=True, eq=False)
class Mask:
    """values: float32 HxW in [0, 1]. soft: the file already holds intermediate values, so no feather is added."""

    values: np.ndarray
    soft: bool = False

    @property
    def hard(self) -> np.ndarray:
        """bool HxW: the lesion region, values >= 0.5."""
        return self.values >= 0.5

    @property
    def empty(self) -> bool:
        """True if no pixel is marked."""
        return not self.values.any()


def read_mask(path: str | Path, shape: tuple[int, ...] | None = None, soft: bool = False) -> Mask:
    """Read a mask file for an image of ``shape`` (H, W, ...).

    Two levels {0, v}: hard, v is the lesion (0/1, 0/255, a palette colour on black). More levels with a maximum of at
    least half the file's range: already soft, value / maximum, rounded to k/255, which is what a ``soft_mask.png`` can
    hold: a pixel is outside the mask here exactly if it is in the file of the result. Anything else is refused with a
    FileError that names the maximum; so is a size that differs from the image's. ``soft``: the file is a
    ``soft_mask.png``, soft even with two levels.
    """
    image = read_image(path)
    if shape is not None:
        _check_same_size(path, image, shape)
    levels = _grey_levels(path, image)
    present = np.unique(levels)
    top, highest = int(present[-1]), np.iinfo(levels.dtype).max
    if len(present) == 1 or (len(present) == 2 and present[0] == 0):  # one level: nothing, or everything, is marked
        return Mask((levels > 0).astype(np.float32), soft)
    if (soft or len(present) > 2) and top >= highest / 2:
        return Mask(np.rint(levels * (255.0 / top)).astype(np.float32) / 255, soft=True)
    raise FileError(
        path,
        f"{len(present)} levels with a maximum of {top}: neither a hard mask (two levels, one of them 0) nor a soft "
        f"one (a maximum of at least half of {highest}); save it as 0 and {highest}",
    )


def _check_same_size(path: str | Path, found: np.ndarray, shape: tuple[int, ...]) -> None:
    """FileError naming both sizes unless ``found`` has the height and width of the image."""
    if found.shape[:2] != tuple(shape[:2]):
        raise FileError(
            path,
            f"has {found.shape[1]} x {found.shape[0]} pixels, its image {shape[1]} x {shape[0]} "
            "(after EXIF orientation); export both at the same size",
        )


def _grey_levels(path: str | Path, image: np.ndarray) -> np.ndarray:
    """HxW levels of a mask image: grey as it is, one colour on black by its strongest channel."""
    if image.ndim == 2:
        return image
    if is_grey(image):
        return np.ascontiguousarray(image[..., 0])
    strongest = image.max(axis=2)
    colours = np.unique(image[strongest > 0].reshape(-1, 3), axis=0)
    if len(colours) > 1:
        raise FileError(
            path,
            f"a colour mask with {len(colours)} colours besides black (maximum {strongest.max()}); expected one: "
            "save the lesion alone",
        )
    return strongest


def read_anatomy(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """The label map HxW: 0 background, 1 target vertebra, 2 other vertebrae, 3 discs, 4 spinal canal."""
    labels = read_labels(path)
    _check_same_size(path, labels, shape)
    return labels


def extents(region: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, last + 1) of the rows and of the columns that a non-empty boolean region (HxW) occupies."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


@dataclass(frozen=True)
class Feather:
    """Width of the soft border: ``pixels``, a fraction of the lesion's equivalent ``diameter`` (default), or ``mm``."""

    amount: float = 0.25
    unit: FeatherUnit = "diameter"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise UsageError(f"feather.amount: expected a number of at least 0, found {self.amount}")

    def pixels(self, hard: np.ndarray, spacing: Any = None) -> float:
        """The width in pixels for this lesion. ``spacing``: mm per pixel, one number or two (their mean is used)."""
        if self.unit == "pixels":
            return float(self.amount)
        if self.unit == "diameter":
            return self.amount * equivalent_diameter(hard)
        if spacing is None:
            raise MedSoftError("feather in mm: the sample's meta.json has no spacing_mm; give the feather in pixels")
        return self.amount / float(np.mean(spacing))


def equivalent_diameter(hard: np.ndarray) -> float:
    """Diameter in pixels of the disc that has the area of the lesion."""
    return 2.0 * math.sqrt(np.count_nonzero(hard) / math.pi)


def soften(hard: np.ndarray, feather: float) -> np.ndarray:
    """Soft mask (float32 HxW, levels k/255) of a hard one (bool HxW) with a border of ``feather`` = 2r pixels.

    The mask dilated by a disc of radius r and blurred with a Gaussian truncated at r, in closed form: the value is that
    blur's edge profile at the pixel's Euclidean distance from the mask. Unlike the two filters one after the other it
    is monotone at corners and between parts too. Exactly 1 on the mask, exactly 0 from ``feather`` on.
    """
    hard = hard.astype(bool)
    if feather <= 0 or not hard.any():
        return hard.astype(np.float32)
    reach = math.ceil(feather)
    near = tuple(slice(max(first - reach, 0), last + reach) for first, last in extents(hard))
    distance = cv2.distanceTransform((~hard[near]).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    knots = np.linspace(0.0, feather, _PROFILE_POINTS)
    levels = np.rint(255 * np.interp(distance.ravel(), knots, _edge_profile())).reshape(distance.shape)
    soft = np.zeros(hard.shape, np.float32)
    soft[near] = np.where(hard[near], 255, levels).astype(np.float32) / 255
    return soft


def _edge_profile() -> np.ndarray:
    """Falls from 1 to 0: the share of a Gaussian (sigma = r/2, truncated at r) that lies over the dilated mask."""
    positions = np.linspace(2.0, -2.0, _PROFILE_POINTS)  # (r - distance) / sigma
    cumulative = np.array([0.5 * (1.0 + math.erf(position / math.sqrt(2.0))) for position in positions])
    return (cumulative - cumulative[-1]) / (cumulative[0] - cumulative[-1])


def soft_mask_for(mask: Mask, feather: Feather, spacing: Any = None) -> np.ndarray:
    """The soft mask (float32 HxW) to inpaint with: a mask that is soft already as it is, a hard one feathered."""
    return mask.values if mask.soft else soften(mask.hard, feather.pixels(mask.hard, spacing))


def region_for(sample: Sample, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where a healthy sample may get a lesion (bool HxW), or None if nothing says where its vertebra is.

    The target vertebra of ``anatomy.png``, else the sample's own non-empty mask, else its box.
    """
    if sample.anatomy is not None:
        target = read_anatomy(sample.anatomy, shape) == TARGET_LABEL
        if target.any():
            return target
    if sample.mask is not None:
        own = read_mask(sample.mask, shape)
        if not own.empty:
            return own.hard
    region = box_region(sample.box, shape)
    return region if region.any() else None


def box_region(box: Sequence[float], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels (bool HxW) of a box [x, y, w, h] given as fractions of the image; empty if w or h is 0."""
    x, y, w, h = box
    height, width = shape[:2]
    region = np.zeros((height, width), bool)
    if w > 0 and h > 0:
        rows = slice(round(y * height), max(round((y + h) * height), round(y * height) + 1))
        columns = slice(round(x * width), max(round((x + w) * width), round(x * width) + 1))
        region[rows, columns] = True
    return region


def lesion_shaped(
    region: np.ndarray,
    seed: int,
    diameter: tuple[float, float] = DIAMETERS,
    side: str | None = None,
    irregularity: float | None = None,
) -> np.ndarray:
    """An irregular smooth blob inside ``region`` (both bool HxW): a pure function of the arguments.

    ``diameter``: its range, relative to the smaller side of the region's bounding box. ``side``: of SIDES, the half of
    that bounding box its centre lies in. ``irregularity``: 0 (an ellipse) to 1; by default it varies with the seed, as
    place, size, elongation and direction do. Raises MedSoftError if the region is too small to hold a lesion.
    """
    (top, bottom), (left, right) = extents(region) if region.any() else ((0, 0), (0, 0))
    if min(bottom - top, right - left) < MIN_REGION:
        raise MedSoftError(
            f"lesion-shaped mask: the region has {right - left} x {bottom - top} pixels, expected at least "
            f"{MIN_REGION} x {MIN_REGION}"
        )
    inner = np.pad(region[top:bottom, left:right].astype(np.uint8), 1)
    rng = np.random.default_rng(seed)
    radius = rng.uniform(*diameter) * min(inner.shape[0] - 2, inner.shape[1] - 2) / 2
    depth = cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if side is not None:
        depth = _half_of(depth, side)
    places = np.argwhere(depth >= min(0.75 * radius, 0.999 * depth.max()))
    row, column = places[rng.integers(len(places))]
    blob = _star_shape(inner.shape, (int(row), int(column)), radius, rng, irregularity) & (inner > 0)
    blob[row, column] = True
    _, parts = cv2.connectedComponents(blob.astype(np.uint8), connectivity=4)
    result = np.zeros(region.shape, bool)
    result[top:bottom, left:right] = (parts == parts[row, column])[1:-1, 1:-1]
    return result


def _half_of(depth: np.ndarray, side: str) -> np.ndarray:
    """``depth`` with zeros in the half opposite to ``side``; unchanged where nothing would be left."""
    rows, columns = (np.arange(length) + 0.5 - length / 2 for length in depth.shape)  # relative to the middle
    keep = {"left": columns <= 0, "right": columns >= 0, "top": rows[:, None] <= 0, "bottom": rows[:, None] >= 0}
    half = depth * keep[side]
    return half if half.any() else depth


def _star_shape(
    shape: tuple[int, int], centre: tuple[int, int], radius: float, rng: np.random.Generator, irregularity: float | None
) -> np.ndarray:
    """A star-shaped region: an ellipse whose radius is modulated by a few random harmonics; its area is near pi r^2."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    y, x = y - centre[0], x - centre[1]
    turn, stretch = rng.uniform(0, math.pi), math.sqrt(rng.uniform(1.0, 1.7))
    along = (math.cos(turn) * x + math.sin(turn) * y) / stretch
    across = (math.cos(turn) * y - math.sin(turn) * x) * stretch
    angle, reach = np.arctan2(across, along), np.ones(shape)
    random_roughness = rng.uniform(0.05, 0.4)  # taken from the generator even if unused: later numbers stay the same
    roughness = random_roughness if irregularity is None else 0.4 * irregularity
    for order in range(2, 7):
        reach += roughness / (order - 1) * rng.uniform(0.3, 1) * np.cos(order * angle + rng.uniform(0, 2 * math.pi))
    return np.hypot(along, across) <= radius * np.maximum(reach, 0.3)
