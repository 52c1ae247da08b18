"""Masks: hard and soft, read from files, feathered, or made in the shape of a lesion. NumPy and OpenCV; no torch.

A mask is float32 in [0, 1]; 1 is the lesion region, the part to be inpainted. Everywhere, always.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ldm.config import FeatherUnit
from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.data.images import (
    ImageSource,
    has_palette,
    humps_of,
    is_grey,
    is_lossy,
    open_image,
    read_image,
    read_labels,
    read_layers,
)
from ldm.data.samples import Sample

TARGET_LABEL = 1  # in anatomy.png: the vertebral body the image is about
LABELS = {0: "background", TARGET_LABEL: "the vertebra", 2: "other vertebrae", 3: "discs", 4: "spinal canal"}
SIDES = ("left", "right", "top", "bottom")  # of the image
DIAMETERS = (0.35, 0.7)  # of lesion-shaped masks, relative to the smaller side of the vertebra
RIM, NOISY_RIM = (0.1, 0.9), (0.25, 0.75)  # of the maximum: what counts as a transition, without and with noise
RIM_WIDTH = 2  # pixels: a transition up to this wide is a resampled edge, a wider one a soft border
MAX_LABELS = 16  # a file with more levels is noisy or soft
MIN_REGION = 4  # pixels: the smallest side of a region that a lesion-shaped mask fits into
_PROFILE_POINTS = 4097
MOST_BORDER = 0.6  # share of the image that the border of a soft mask takes at most
MAX_HUMPS = 10  # of a soft mask: parts that stay below its maximum
MOSTLY = 0.5  # share of the image or of its border: more than that is hardly a lesion

NOISE_NOTE = "its mask has compression noise or a rim from resampling: it is read as hard, cut at half of its maximum"
PARTS_NOTE = (
    "its mask has compression noise or a rim from resampling, and small parts with levels of their own (a second "
    "label? stray pixels?): it is read as hard, cut at half of its maximum"
)


@dataclass(frozen=True, eq=False)
class Mask:
    """values: float32 HxW in [0, 1]. soft: the file already holds intermediate values, so no feather is added.

    note: what was done to the file's levels, for a person.
    """

    values: np.ndarray
    soft: bool = False
    note: str | None = None

    @cached_property
    def hard(self) -> np.ndarray:
        """bool HxW: the lesion region, values >= 0.5."""
        return self.values >= 0.5

    @property
    def empty(self) -> bool:
        """True if no pixel is marked."""
        return not self.values.any()


def read_mask(source: ImageSource, shape: tuple[int, ...] | None = None, soft: bool = False) -> Mask:
    """Read a mask file for an image of ``shape`` (H, W, ...).

    What the levels are decides how they are read (see docs/data.md). Two levels {0, v} are hard. So are more of them
    where every transition is at most two pixels wide (compression noise, a rim from resampling): cut at half of the
    maximum. A wider smooth transition is soft already: value / maximum, rounded to k/255, which is what a
    ``soft_mask.png`` can hold: a pixel is outside the mask here exactly if it is in the file of the result. An alpha
    channel is multiplied in. Everything else, and a size that differs from the image's, is refused with a FileError
    that names the levels: labels, pictures, ramps, a maximum below half of the range. ``soft``: the file is a
    ``soft_mask.png``, soft whatever its levels are, unless it is a picture.
    """
    file = open_image(source)
    path, layers, lossy = file.path, read_layers(file), is_lossy(file)
    if shape is not None:
        _check_same_size(path, layers, shape)
    levels = _grey_levels(path, layers, lossy)
    present = np.flatnonzero(np.bincount(levels.ravel()))  # ascending; twice as fast as to sort the levels
    top = int(present[-1])
    span = 255 if top <= 255 else 65535  # files of 16 bits often hold 8
    if lossy and 0 < top < span / 2:
        raise _unclear(path, present, span, f"reaches half of {span}: a JPEG loses smaller numbers, save it as PNG")
    if len(present) == 1 or (len(present) == 2 and present[0] == 0):  # one: nothing, or everything, is marked
        cut = lossy and not is_grey(layers)
        return Mask((levels > 0).astype(np.float32), soft and not cut, NOISE_NOTE if cut else None)
    unit = levels / np.float32(top)
    if not soft:
        labels = _labels_of_few(levels, unit, present) if len(present) <= MAX_LABELS else _labels_of_many(levels, unit)
        if labels:
            raise _unclear(path, np.array([0, *labels, top]), span, "has no flat levels between", len(present))
        if present[0] > RIM[0] * top:
            raise _unclear(path, present, span, "is 0 where there is no lesion")
        if top < span / 2 and len(present) <= MAX_LABELS:  # small numbers are labels
            raise _unclear(path, present, span, f"reaches at least half of {span}")
        if note := _note_if_hard(unit):
            return Mask((unit >= 0.5).astype(np.float32), note=note)
        if len(present) <= 3:  # a second label that is too thin for a 3 x 3 area: no smooth transition
            raise _unclear(path, present, span, "has more levels between")
    if top < span / 2:
        raise _unclear(path, present, span, f"reaches at least half of {span}")
    humps, between = humps_of(unit), np.count_nonzero((unit > RIM[0]) & (unit < RIM[1]))
    if between > MOST_BORDER * unit.size and (humps > 2 or not soft):
        raise _unclear(path, present, span, "is 0 in most places: most of this one lies between, as of a ramp")
    if humps > MAX_HUMPS:
        raise _unclear(path, present, span, "rises from 0 to few parts: this one goes up and down, as an image does")
    return Mask(np.rint(unit * 255).astype(np.float32) / 255, soft=True)


def _unclear(path: str | Path, present: np.ndarray, span: int, soft_one: str, count: int | None = None) -> FileError:
    """The refusal of a mask with the levels ``present``; ``soft_one``: what a soft mask would be."""
    named = sorted({int(present[0]), *present[: 4 if count is None else None].tolist(), int(present[-1])})
    return FileError(
        path,
        f"{count or len(present)} levels with a maximum of {present[-1]} (among them {', '.join(map(str, named))}): "
        f"neither a hard mask (0 and one other level) nor a soft one (which {soft_one}); of labels, save the lesion's "
        f"alone, as {span}",
    )


def _labels_of_few(levels: np.ndarray, unit: np.ndarray, present: np.ndarray) -> list[int]:
    """Of few levels those between 0 and the maximum that fill areas, as labels do: of 3 x 3 pixels, even 1 beside 255.

    A rim or a soft border has none of them.
    """
    kernel = np.ones((3, 3), np.uint8)
    flat = (cv2.erode(levels, kernel) == cv2.dilate(levels, kernel)) & (levels > 0) & (unit < 1)
    inner = levels[flat]
    certain = len(inner) > 4 or bool((flat & (unit > RIM[0]) & (unit < RIM[1])).any())  # not ripples of resampling
    tiny = present[1:-1][present[1:-1] < RIM[0] * present[-1]] if len(present) == 3 else []
    return np.unique(inner if certain else tiny).tolist()


def _labels_of_many(levels: np.ndarray, unit: np.ndarray) -> list[int]:
    """Of many levels those that fill most of what lies between.

    With compression noise those of nearly constant areas between RIM, if two levels hold most of these areas: a wide
    smooth border has more of them.
    """
    smooth, window = cv2.medianBlur(np.rint(unit * 255).astype(np.uint8), 5), np.ones((5, 5), np.uint8)
    flat = cv2.dilate(smooth, window) - cv2.erode(smooth, window) <= 4
    between = (smooth > 51) & (smooth < 255 * RIM[1])  # the far ends of a wide border are flat too
    counts = np.bincount(smooth[flat & between] // 16, minlength=16)
    most = np.sort(np.argsort(-counts, kind="stable")[:2])
    constant = (cv2.erode(levels, window) == cv2.dilate(levels, window)) & between
    if np.count_nonzero(constant) <= 0.3 * np.count_nonzero(between) and (
        counts.sum() <= 0.12 * np.count_nonzero(between) or counts[most].sum() <= 0.6 * counts.sum()
    ):
        return []
    return [int(np.median(levels[flat & between & (smooth // 16 == k)])) for k in most if counts[k]]


def _note_if_hard(unit: np.ndarray) -> str | None:
    """What to say of a mask (HxW in [0, 1]) whose transitions are at most two pixels wide; None for another one.

    Between RIM every pixel of such a transition is near both sides. Noise reaches further; where the low values ripple,
    which those of a smooth border do not, only the transition between NOISY_RIM counts. A few pixels that are not near
    both sides are a part of its own.
    """
    low = (unit > 0.01) & (unit < NOISY_RIM[0])
    neighbours = cv2.dilate(unit, np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8))
    ripples = np.count_nonzero(low & (unit > neighbours)) > 0.02 * np.count_nonzero(low)
    hard = (unit >= 0.5).astype(np.uint8)
    edge = np.count_nonzero(hard - cv2.erode(hard, np.ones((3, 3), np.uint8)))
    for limits in (RIM, NOISY_RIM) if ripples else (RIM,):
        wide = _in_wide_transitions(unit, *limits)
        counted = np.count_nonzero(wide & ~_slivers(unit, *limits)) if wide.any() else 0
        if (unit >= limits[1]).any() and counted <= 0.25 * edge:
            return PARTS_NOTE if wide.any() else NOISE_NOTE
    return None


def _in_wide_transitions(unit: np.ndarray, low: float, high: float) -> np.ndarray:
    """The pixels (bool HxW) between ``low`` and ``high`` that lie in transitions wider than RIM_WIDTH."""
    sides = (unit > low, unit < high)  # the distance is to the pixels where this is false
    to_sides = [cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in sides]
    wide: np.ndarray = sides[0] & sides[1] & (to_sides[0] + to_sides[1] > RIM_WIDTH + 1.5)
    return wide


def _slivers(unit: np.ndarray, low: float, high: float) -> np.ndarray:
    """The parts above ``low`` (bool HxW) that are nowhere ``high`` and nowhere far from what surrounds them.

    Resampling leaves them of parts that were thinner than a pixel.
    """
    above = (unit > low).astype(np.uint8)
    depth = cv2.distanceTransform(above, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    parts = cv2.connectedComponents(above, connectivity=8)[1]
    found: np.ndarray = (above > 0) & ~np.isin(parts, parts[(unit >= high) | (depth > RIM_WIDTH)])
    return found


def _check_same_size(path: str | Path, found: np.ndarray, shape: tuple[int, ...]) -> None:
    """FileError naming both sizes unless ``found`` has the height and width of the image."""
    if found.shape[:2] != tuple(shape[:2]):
        raise FileError(
            path,
            f"has {found.shape[1]} x {found.shape[0]} pixels, its image {shape[1]} x {shape[0]} "
            "(after EXIF orientation); export both at the same size",
        )


def _grey_levels(path: str | Path, layers: np.ndarray, lossy: bool) -> np.ndarray:
    """HxW levels of a mask image: grey as it is, shades of one colour by its strongest channel; times its alpha."""
    if layers.ndim == 2:
        return layers
    if layers.shape[2] in (2, 4):
        highest = np.iinfo(layers.dtype).max
        share = layers[..., -1:] / np.float64(highest)
        colours = np.rint(layers[..., :-1] * share).astype(layers.dtype)
        return _grey_levels(path, colours[..., 0] if colours.shape[2] == 1 else colours, lossy)
    if is_grey(layers):
        return np.ascontiguousarray(layers[..., 0])
    strongest = layers.max(axis=2)
    typical = np.median(strongest[strongest >= strongest.max() / 2])
    colour = layers[np.unravel_index(strongest.argmax(), strongest.shape)] / np.float64(strongest.max())
    if lossy:
        bright = np.median(layers[strongest >= 0.75 * typical], axis=0)
        colour = bright / bright.max()
    other = np.abs(layers - strongest[..., None] * colour).max(axis=2) / typical  # than shades of this colour
    if lossy:  # colours are blurred over two pixels, so nothing is known of a soft border: cut at half
        several = cv2.erode((other > 0.25).astype(np.uint8), np.ones((5, 5), np.uint8)).any()
        strongest = (strongest >= typical / 2).astype(np.uint8) * np.uint8(255)
    else:
        several = (other > 0.02).any()
    if several:
        count = len(np.unique(layers[strongest > 0].reshape(-1, 3), axis=0))
        reason = f"a colour mask with {count} colours besides black (maximum {layers.max()}); expected one"
        raise FileError(path, f"{reason}: save the lesion alone")
    return strongest


def read_anatomy(source: ImageSource, shape: tuple[int, ...]) -> np.ndarray:
    """The label map HxW: 0 background, 1 target vertebra, 2 other vertebrae, 3 discs, 4 spinal canal.

    FileError naming the levels for any other ones (another numbering, a map saved as 0 and 255, or in 2 or 4 bits,
    which are scaled when they are read), for several without 0 or with label 1 all around an unmarked middle, and
    for one that was resized with interpolation, which puts label 1 between 0 and 2.
    """
    file = open_image(source)
    path, labels = file.path, read_labels(file)
    _check_same_size(path, labels, shape)
    present = np.unique(labels).tolist()
    shown = ", ".join(map(str, present[:8])) + (", ..." if len(present) > 8 else "")
    meaning = ", ".join(f"{number} {name}" for number, name in LABELS.items())
    if present[-1] > max(LABELS):
        raise FileError(path, f"has the levels {shown}; expected a label map of {meaning}: renumber it, with 8 bits")
    if len(present) > 1 and present[0] > 0:
        raise FileError(
            path, f"has the levels {shown}, no 0; expected a label map of {meaning}: is it numbered from 1?"
        )
    if looks_inverted(labels == TARGET_LABEL, whole=False):
        raise FileError(path, f"label {TARGET_LABEL} lies all around the image; expected a label map of {meaning}")
    shades = read_image(file) if has_palette(file) else labels
    if is_grey(shades) and _other_order(labels, shades if shades.ndim == 2 else shades[..., 0]):
        raise FileError(path, "its palette has grey levels in another order than its indices; save it as grey levels")
    if _interpolated(labels):
        reason = "has labels in between along the borders of others: it was resized with interpolation; use nearest"
        raise FileError(path, reason)
    return labels


def _other_order(labels: np.ndarray, shades: np.ndarray) -> bool:
    """Whether the grey levels that a palette shows could be other labels than its indices (both HxW)."""
    numbers, places = np.unique(labels, return_index=True)
    shown = shades.ravel()[places].astype(int)
    small = shown.max() <= numbers.max() and (shown != numbers).any()
    return bool(shown.any() and (small or (np.diff(shown) < 0).any()))


def _interpolated(labels: np.ndarray) -> bool:
    """Whether most jumps of a label map (HxW) by two or more pass through a label in between."""
    low, high = (change(labels, np.ones((3, 3), np.uint8)) for change in (cv2.erode, cv2.dilate))
    jumps = cv2.subtract(high, low) >= 2
    between = jumps & (labels > low) & (labels < high)
    passed = cv2.dilate(between.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return bool(np.count_nonzero(jumps) >= 300 and np.count_nonzero(jumps & passed) > 0.45 * np.count_nonzero(jumps))


def looks_inverted(region: np.ndarray, whole: bool) -> bool:
    """Whether a region (bool HxW) is the outside of something: the image's whole border and more than half of it.

    ``whole``: also if nothing is left out.
    """
    inner = region[1:-1, 1:-1]
    around = np.count_nonzero(region) - np.count_nonzero(inner) == region.size - inner.size
    return around and region.mean() > MOSTLY and (whole or not region.all())


def stray_parts(hard: np.ndarray) -> list[tuple[int, int, int]]:
    """(pixels, row, column) of the parts of a lesion (bool HxW) that are probably no lesion, largest first.

    Beside its largest part: those of at most 2 pixels or a two-hundredth of it, and those further away than twice its
    equivalent diameter. They make the crop wider, and so the lesion smaller for the model.
    """
    count, parts, stats, _ = cv2.connectedComponentsWithStats(hard.astype(np.uint8), connectivity=8)
    if count <= 2:
        return []
    areas = stats[1:, cv2.CC_STAT_AREA]
    main = int(areas.argmax())
    away = cv2.distanceTransform((parts != main + 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    gaps = np.full(count, np.inf)
    np.minimum.at(gaps, parts[hard], away[hard])
    far = gaps[1:] > 2 * equivalent_diameter(parts == main + 1)
    strange = [k for k in np.argsort(-areas) if k != main and (far[k] or areas[k] <= max(2, areas[main] / 200))]
    tops, lefts = stats[1:, cv2.CC_STAT_TOP], stats[1:, cv2.CC_STAT_LEFT]
    return [(int(areas[k]), int(tops[k]), int(lefts[k])) for k in strange]


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

    def check_spacing(self, spacing: Any) -> None:
        """MedSoftError if this feather is in mm and ``spacing`` is None."""
        if self.unit == "mm" and spacing is None:
            raise MedSoftError("feather in mm: the sample's meta.json has no spacing_mm; give the feather in pixels")

    def pixels(self, hard: np.ndarray, spacing: Any = None) -> tuple[float, float]:
        """The width for this lesion (bool HxW), in rows and in columns.

        ``spacing``: mm per pixel, one number or [between rows, between columns]; needed for a feather in mm only.
        """
        if self.unit != "mm":
            width = self.amount if self.unit == "pixels" else self.amount * equivalent_diameter(hard)
            return float(width), float(width)
        self.check_spacing(spacing)
        rows, columns = spacing_of(spacing)
        return self.amount / rows, self.amount / columns


def spacing_of(spacing: float | Sequence[float]) -> tuple[float, float]:
    """(mm between rows, mm between columns) of a ``spacing_mm``, which is one number or two."""
    both = list(spacing) if isinstance(spacing, Sequence) else [spacing]
    return float(both[0]), float(both[-1])


def equivalent_diameter(hard: np.ndarray) -> float:
    """Diameter in pixels of the disc that has the area of the lesion ``hard`` (bool HxW)."""
    return 2.0 * math.sqrt(np.count_nonzero(hard) / math.pi)


def soften(hard: np.ndarray, feather: float | tuple[float, float]) -> np.ndarray:
    """Soft mask (float32 HxW, levels k/255) of a hard one (bool HxW) with a border of ``feather`` = 2r pixels.

    ``feather``: one width, or that in rows and that in columns, where pixels are not square.

    The mask dilated by a disc of radius r and blurred with a Gaussian truncated at r, in closed form: the value is that
    blur's edge profile at the pixel's Euclidean distance from the mask. Unlike the two filters one after the other it
    is monotone at corners and between parts too. Exactly 1 on the mask, exactly 0 from ``feather`` on.
    """
    hard = hard.astype(bool)
    rows, columns = feather if isinstance(feather, tuple) else (feather, feather)
    if min(rows, columns) <= 0 or not hard.any():
        return hard.astype(np.float32)
    reach = math.ceil(max(rows, columns))
    near = tuple(slice(max(first - reach, 0), last + reach) for first, last in extents(hard))
    if rows == columns:
        distance = cv2.distanceTransform((~hard[near]).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    else:  # in columns, of which a row counts as many as its width says
        from scipy.ndimage import distance_transform_edt

        distance = distance_transform_edt(~hard[near], sampling=(columns / rows, 1.0))
    knots = np.linspace(0.0, columns, _PROFILE_POINTS)
    levels = np.rint(255 * np.interp(distance.ravel(), knots, _edge_profile())).reshape(distance.shape)
    soft = np.zeros(hard.shape, np.float32)
    soft[near] = np.where(hard[near], 255, levels).astype(np.float32) / 255
    return soft


@cache
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
