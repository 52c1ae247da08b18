"""How an image and its mask are brought to the model's square and back. NumPy and OpenCV; no torch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from ldm.config import CropUnit, DataConfig, FitMode
from ldm.core.errors import MedSoftError
from ldm.core.files import named_seed
from ldm.data.images import dimensions, match_channels
from ldm.data.masks import extents, spacing_of

MAX_SHIFT = 0.125  # of a training crop, as a share of its side, in either direction
MOST_DRAWS = 1000  # of a place that is not taken yet
MAX_WINDOW = 8192  # pixels of a side of a window in mm, unless the image itself is of that order

Span = tuple[int, int]  # (first, last + 1) along one axis, pixels


@dataclass(frozen=True)
class Fit:
    """How an image and its mask are brought to the model's ``size`` x ``size`` square.

    ``crop``: a square around the lesion, ``context`` times its longest side and at least ``min_crop`` pixels or mm of
    the native image, enlarged or reduced to ``size``; with ``mm_per_pixel`` above 0 a window of ``size`` *
    ``mm_per_pixel`` mm along each side instead, whatever the lesion's size. ``pad``: the whole image in a square, its
    border repeated; ``resize``: the whole image stretched.
    """

    mode: FitMode = "crop"
    size: int = 512
    context: float = 2.0
    min_crop: float = 64.0
    min_crop_unit: CropUnit = "pixels"
    mm_per_pixel: float = 0.0

    @classmethod
    def of(cls, data: DataConfig) -> "Fit":
        """The fit that a configuration asks for."""
        return cls(data.fit, data.image_size, data.context, data.min_crop, data.min_crop_unit, data.mm_per_pixel)

    def crop_window(
        self,
        shape: tuple[int, ...],
        mask: np.ndarray | None = None,
        spacing: Any = None,
        variant: int = 0,
        name: tuple[object, ...] = (),
    ) -> "CropWindow":
        """The part of an image of ``shape`` (H, W, ...) that the model sees, for a lesion ``mask`` (HxW in [0, 1]).

        Without a mask, or with an empty one, ``crop`` takes the whole image as ``pad`` does. ``spacing``: the sample's
        ``spacing_mm``, which lengths in mm need. ``variant`` 0 is centred on the lesion as far as the image allows;
        each other one begins elsewhere, up to MAX_SHIFT of the side away, where its number and ``name`` say, until all
        places are used up. Every window holds all of the mask. MedSoftError where the spacing is missing, or where a
        window in mm is smaller than the lesion or far larger than the image.
        """
        height, width = int(shape[0]), int(shape[1])
        if mask is not None and mask.shape != (height, width):
            raise MedSoftError(f"fit: the image has {width} x {height} pixels, the mask {dimensions(mask)}")
        if self.mode == "resize":
            return CropWindow(0, 0, height, width, self.size)
        longest = max(height, width)
        if self.mode == "pad" or mask is None or not (mask > 0).any():
            return CropWindow(-((longest - height) // 2), -((longest - width) // 2), longest, longest, self.size)
        axes = self._axes((height, width), *_spans(mask), spacing)
        top, left = _place(axes, variant, name)
        return CropWindow(top, left, axes[0].side, axes[1].side, self.size)

    def places(self, mask: np.ndarray, spacing: Any = None) -> int:
        """How many different windows ``crop_window`` has for a lesion ``mask`` (HxW in [0, 1]); errors as there."""
        if self.mode != "crop" or not (mask > 0).any():
            return 1
        return math.prod(map(_count, self._axes(mask.shape, *_spans(mask), spacing)))

    def _axes(
        self, shape: tuple[int, ...], core: Sequence[Span], support: Sequence[Span], spacing: Any
    ) -> list["_Axis"]:
        """Rows and columns of an image of ``shape``; ``core``: where the mask is 0.5 or more, ``support``: above 0."""
        sides = self._sides((shape[0], shape[1]), max(map(_length, core)), spacing)
        if not self.mm_per_pixel:
            sides = (max(*sides, *map(_length, support)),) * 2
        self._check_holds(sides, support, spacing)
        return [_Axis(*axis) for axis in zip(sides, shape, core, support, strict=True)]

    def _sides(self, shape: tuple[int, int], lesion: int, spacing: Any) -> tuple[int, int]:
        """The window's height and width in native pixels, for a lesion whose longest side has ``lesion`` pixels."""
        if self.mm_per_pixel:
            extent = self.size * self.mm_per_pixel
            height, width = (max(1, round(extent / mm)) for mm in self._spacing(spacing))
            if max(height, width) > max(MAX_WINDOW, 2 * max(shape)):
                raise MedSoftError(
                    f"data.mm_per_pixel={self.mm_per_pixel:g}: with spacing_mm {spacing} the window of {extent:g} mm "
                    f"would have {width} x {height} pixels of an image of {shape[1]} x {shape[0]}; correct the spacing "
                    "(mm, not another unit), or take a smaller data.mm_per_pixel"
                )
            return height, width
        least = self.min_crop
        if self.min_crop_unit == "mm":
            least /= min(self._spacing(spacing))  # as long in both directions
        side = min(max(math.ceil(self.context * lesion), math.ceil(least), 1), max(shape))
        return side, side

    def check_spacing(self, spacing: Any) -> None:
        """MedSoftError if this fit has a length in mm and ``spacing`` is None."""
        in_mm = "data.min_crop_unit=mm" if self.min_crop_unit == "mm" else None
        key = f"data.mm_per_pixel={self.mm_per_pixel:g}" if self.mm_per_pixel else in_mm
        if self.mode == "crop" and key and spacing is None:
            raise MedSoftError(
                f"{key}: the sample's meta.json has no spacing_mm; add it (mm between rows, mm between columns), or "
                "give lengths in pixels: data.mm_per_pixel=0 data.min_crop_unit=pixels"
            )

    def _spacing(self, spacing: Any) -> tuple[float, float]:
        self.check_spacing(spacing)
        return spacing_of(spacing)

    def _check_holds(self, sides: tuple[int, int], support: Sequence[Span], spacing: Any) -> None:
        """MedSoftError if a window of ``sides`` is smaller than the lesion with its soft border."""
        if all(_length(span) <= side for span, side in zip(support, sides, strict=True)):
            return
        found = [_length(span) * mm for span, mm in zip(support, spacing_of(spacing), strict=True)]
        needed = math.ceil(1000 * max(found) / self.size) / 1000
        raise MedSoftError(
            f"the lesion with its soft border has {found[1]:.1f} x {found[0]:.1f} mm, the window of "
            f"data.mm_per_pixel={self.mm_per_pixel:g} has {self.size * self.mm_per_pixel:.1f} mm; "
            f"data.mm_per_pixel={needed:g} is wide enough"
        )


class _Axis(NamedTuple):
    """Rows or columns: the window's and the image's pixels, and where the mask is 0.5 or more, and above 0."""

    side: int
    length: int
    core: Span
    support: Span


def _length(span: Span) -> int:
    return span[1] - span[0]


def _spans(mask: np.ndarray) -> tuple[Sequence[Span], Sequence[Span]]:
    """Of rows and of columns, where ``mask`` is 0.5 or more (where it is above 0, if it never is) and above 0."""
    support = extents(mask > 0)
    return extents(mask >= 0.5) if (mask >= 0.5).any() else support, support


def _ends(axis: _Axis) -> tuple[int, int]:
    """The first and the last place where a window can begin along an axis."""
    reach = math.ceil(MAX_SHIFT * axis.side + 0.5) - 1  # the furthest that a move can be rounded to
    return _start(*axis, -reach), _start(*axis, reach)


def _count(axis: _Axis) -> int:
    first, last = _ends(axis)
    return last - first + 1


def _place(axes: Sequence[_Axis], variant: int, name: tuple[object, ...]) -> tuple[int, int]:
    """Top and left of window number ``variant``; ``axes``: of rows and of columns.

    Every number up to ``variant`` draws a place that no number before it has, while there is one.
    """

    def place(moves: Sequence[float]) -> tuple[int, int]:
        top, left = (_start(*axis, round(move)) for axis, move in zip(axes, moves, strict=True))
        return top, left

    (top, bottom), (left, right) = map(_ends, axes)
    places, taken = (bottom - top + 1) * (right - left + 1), {place((0, 0)): None}
    for number in range(1, variant % places + 1):
        rng = np.random.default_rng(named_seed("crop", *name, number))
        for _ in range(MOST_DRAWS):
            moves = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
            taken[place([move * axis.side for move, axis in zip(moves, axes, strict=True)])] = None
            if len(taken) > number:
                break
        else:  # only the longest moves lead to what is left
            every = itertools.product(range(top, bottom + 1), range(left, right + 1))
            taken[next(each for each in every if each not in taken)] = None
    return list(taken)[-1]


def _start(side: int, length: int, core: Span, support: Span, move: int = 0) -> int:
    """Where a window of ``side`` begins along one axis: centred on core, moved, holding support, inside if it fits."""
    if side >= length:
        return -((side - length) // 2)
    start = (core[0] + core[1] - side) // 2 + move
    start = min(max(start, support[1] - side), support[0])
    return min(max(start, 0), length - side)


@dataclass(frozen=True)
class CropWindow:
    """A rectangle of native pixels (it may reach beyond the image, where the border is repeated) and the model size."""

    top: int
    left: int
    height: int
    width: int
    size: int

    def forward(self, image: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
        """HxW(x3) -> size x size(x3), float32: area average down, cubic up (never beyond the values present).

        ``hidden`` (bool HxW): pixels that no other one of the result may depend on, although cubic interpolation
        reaches two pixels around. Where ``forward_mask(hidden)`` is 0 the result is that of the image with the nearest
        visible pixels in their place.
        """
        cut = self._cut(image).astype(np.float32)
        whole = _resized(cut, self.size, self.size)
        if hidden is None or self.size <= min(self.height, self.width):  # an area average reaches no further
            return whole
        filled = _resized(_with_nearest(cut, ~self._cut(hidden)), self.size, self.size)
        inside = self.forward_mask(hidden) > 0
        return np.where(inside if whole.ndim == 2 else inside[..., None], whole, filled)

    def forward_mask(self, mask: np.ndarray) -> np.ndarray:
        """HxW in [0, 1] (or bool) -> size x size float32; each pixel is the maximum of what it covers.

        So no lesion is lost, however small. Beyond the image the border is repeated, as in ``forward``: what is hidden
        at the border stays hidden beyond it.
        """
        cut = self._cut(mask).astype(np.float32)
        return _max_resized(_max_resized(cut, self.size).T, self.size).T.copy()

    def backward(self, values: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        """size x size(x3) float values -> a float32 copy of ``canvas`` (HxW or HxWx3) with the window's part replaced.

        Pixel exact both ways when no scaling is needed; the number of channels follows the canvas.
        """
        result = canvas.astype(np.float32)
        native = _resized(match_channels(values, canvas).astype(np.float32), self.height, self.width)
        rows, columns = self.top + np.arange(self.height), self.left + np.arange(self.width)
        below, right = (rows >= 0) & (rows < canvas.shape[0]), (columns >= 0) & (columns < canvas.shape[1])
        result[np.ix_(rows[below], columns[right])] = native[np.ix_(below, right)]
        return result

    def _cut(self, image: np.ndarray) -> np.ndarray:
        rows = np.clip(np.arange(self.top, self.top + self.height), 0, image.shape[0] - 1)
        columns = np.clip(np.arange(self.left, self.left + self.width), 0, image.shape[1] - 1)
        return image[rows[:, None], columns]


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Float image to height x width, one axis after the other: area average down, cubic up."""
    low, high = image.min(), image.max()
    for rows, columns in ((height, image.shape[1]), (height, width)):
        if (rows, columns) != image.shape[:2]:
            smaller = rows < image.shape[0] or columns < image.shape[1]
            rule = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
            image = cv2.resize(image, (columns, rows), interpolation=rule)
    return np.clip(image, low, high)


def _with_nearest(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """``image`` with the nearest visible pixel in place of each other one; mid-grey, 0.5, if none is visible."""
    if not visible.any():
        return np.full_like(image, 0.5)
    _, nearest = cv2.distanceTransformWithLabels(
        (~visible).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros((int(nearest.max()) + 1, *image.shape[2:]), image.dtype)
    values[nearest[visible]] = image[visible]
    return values[nearest]


def _max_resized(mask: np.ndarray, size: int) -> np.ndarray:
    """Bring the first axis to ``size``: each output row is the maximum of all input rows it overlaps."""
    length = mask.shape[0]
    if length == size:
        return mask
    steps = np.arange(size)
    first = steps * length // size
    last = -(-(steps + 1) * length // size) - 1
    result = mask[first]
    for offset in range(1, int((last - first).max()) + 1):
        np.maximum(result, mask[np.minimum(first + offset, last)], out=result)
    return result
