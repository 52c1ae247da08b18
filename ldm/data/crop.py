"""How an image and its mask are brought to the model's square and back. NumPy and OpenCV; no torch."""

from dataclasses import dataclass

import cv2
import numpy as np

from ldm.config import FitMode
from ldm.core.errors import MedSoftError
from ldm.data.images import dimensions, match_channels
from ldm.data.masks import extents


@dataclass(frozen=True)
class Fit:
    """How an image and its mask are brought to the model's ``size`` x ``size`` square.

    ``crop``: a square around the lesion of at least ``context`` times its longest side, at native pixels where
    ``size`` native pixels suffice; ``pad``: the whole image in a square, its border repeated; ``resize``: the whole
    image stretched.
    """

    mode: FitMode = "crop"
    size: int = 512
    context: float = 2.0

    def crop_window(
        self, shape: tuple[int, ...], mask: np.ndarray | None = None, offset: tuple[float, float] = (0, 0)
    ) -> "CropWindow":
        """The part of an image of ``shape`` (H, W, ...) that the model sees, for a lesion ``mask`` (HxW in [0, 1]).

        Without a mask, or with an empty one, ``crop`` takes the whole image as ``pad`` does. ``offset`` (down, right)
        moves a crop by that share of its side, as far as the lesion and the image allow.
        """
        height, width = int(shape[0]), int(shape[1])
        if mask is not None and mask.shape != (height, width):
            raise MedSoftError(f"fit: the image has {width} x {height} pixels, the mask {dimensions(mask)}")
        if self.mode == "resize":
            return CropWindow(0, 0, height, width, self.size)
        longest = max(height, width)
        if self.mode == "pad" or mask is None or not (mask > 0).any():
            return CropWindow(-((longest - height) // 2), -((longest - width) // 2), longest, longest, self.size)
        support = extents(mask > 0)
        core = extents(mask >= 0.5) if (mask >= 0.5).any() else support
        wanted = max(
            int(np.ceil(self.context * max(last - first for first, last in core))),
            min(self.size, longest),
            *(last - first for first, last in support),
        )
        side = min(wanted, longest)
        top, left = (
            _start(side, length, c, s, round(share * side))
            for length, c, s, share in zip((height, width), core, support, offset, strict=True)
        )
        return CropWindow(top, left, side, side, self.size)


def _start(side: int, length: int, core: tuple[int, int], support: tuple[int, int], move: int) -> int:
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
