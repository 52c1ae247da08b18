"""The frame of a vertebra, and the affine map from one vertebra to another. NumPy and OpenCV; no torch."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from ldm.core.errors import MedSoftError
from ldm.data.masks import MIN_REGION


@dataclass(frozen=True, eq=False)
class Frame:
    """Where a region of an image lies, in native pixels, (x, y) with y pointing down.

    centre: of the smallest rectangle around the region; angle: by which its first axis is turned against the image's
    rows, radians, -pi/4 to pi/4; extents: the rectangle's lengths along its first and second axis.
    """

    centre: tuple[float, float]
    angle: float
    extents: tuple[float, float]

    @property
    def axes(self) -> np.ndarray:
        """2x2: the half-lengths as column vectors, from the centre to the middle of two sides."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([[cos, -sin], [sin, cos]]) * np.array(self.extents) / 2


def frame_of(region: np.ndarray) -> Frame:
    """The frame of the largest part of a region (bool HxW); MedSoftError if its shorter side is under MIN_REGION.

    The rectangle of the smallest area has sides along the endplates and the walls of a vertebral body. Principal axes
    would not do: of a body that is as high as it is wide they point anywhere.
    """
    count, parts, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count < 2:
        raise MedSoftError("no vertebra is marked")
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    rows, columns = np.nonzero(parts == largest)
    # The corners of the pixels, so that one pixel is one wide.
    ends = np.concatenate([np.stack([columns + dx, rows + dy], 1) for dx in (-0.5, 0.5) for dy in (-0.5, 0.5)])
    centre, lengths, degrees = cv2.minAreaRect(ends.astype(np.float32))
    quarter = round(degrees / 90)
    angle = math.radians(degrees - 90 * quarter)
    first, second = lengths if quarter % 2 == 0 else lengths[::-1]
    if min(first, second) < MIN_REGION:
        raise MedSoftError(f"a vertebra is smaller than {MIN_REGION} x {MIN_REGION} pixels")
    return Frame((float(centre[0]), float(centre[1])), angle, (float(first), float(second)))


@dataclass(frozen=True)
class Jitter:
    """How a lesion that is carried over differs from where, how large and how turned it was.

    shift: shares of the target's extents; turn: radians; scale: of its size.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0
    scale: float = 1.0

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Jitter":
        """Small: up to 5 % of the vertebra away, turned by up to 12 degrees, 0.9 to 1.1 times as large."""
        shift = rng.uniform(-0.05, 0.05, 2)
        turn, scale = rng.uniform(-math.pi / 15, math.pi / 15), rng.uniform(0.9, 1.1)
        return cls((float(shift[0]), float(shift[1])), float(turn), float(scale))


def map_between(source: Frame, target: Frame, pivot: tuple[float, float], jitter: Jitter | None = None) -> np.ndarray:
    """2x3 affine map of pixels (x, y) of the source's image to the target's: its rectangle onto the other's.

    Lengths follow the vertebrae and not ``spacing_mm``: a lesion that fills half of one fills half of the other, as the
    sentence about it says. ``jitter`` turns and scales around the image of ``pivot``, a point of the source's image.
    """
    jitter = jitter or Jitter()
    linear = target.axes @ np.linalg.inv(source.axes)
    middle = np.array(target.centre) + linear @ (np.array(pivot) - source.centre)
    middle = middle + 2 * target.axes @ np.array(jitter.shift)
    cos, sin = math.cos(jitter.turn) * jitter.scale, math.sin(jitter.turn) * jitter.scale
    linear = np.array([[cos, -sin], [sin, cos]]) @ linear
    return np.column_stack([linear, middle - linear @ np.array(pivot)])


def warped(image: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], border: int) -> np.ndarray:
    """An image (HxW or HxWx3, float32) brought by a 2x3 map into one of ``shape`` (H, W, ...), float32.

    Where the map makes it smaller it is smoothed first, so that what several pixels held is averaged. ``border``: what
    OpenCV takes for pixels beyond the image, BORDER_CONSTANT for 0.
    """
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 0.9:
        image = cv2.GaussianBlur(image, (0, 0), 0.5 * math.sqrt(1 / scale**2 - 1), borderType=cv2.BORDER_REPLICATE)
    return cv2.warpAffine(
        image.astype(np.float32), matrix, (shape[1], shape[0]), flags=cv2.INTER_LINEAR, borderMode=border
    )
