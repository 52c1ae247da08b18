"""What is drawn inside phantom vertebral bodies: four kinds of lesion, and benign findings that resemble them.

All functions work in a body's own frame: ``u`` runs from the front (anterior, negative) to the back and ``v`` from
the upper endplate (negative) to the lower one, both zero in the body's middle; ``depth`` is the distance from the
body's surface, positive inside. Lengths are pixels of the default world (about 0.9 mm); ``scale`` says how many pixels
of the image one of them has. Grey values are those of the clean canvas: fat 0.15, soft tissue 0.3, spongy bone about
0.5, cortical bone 0.9.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

LESION_TYPES = ("osteolytic", "osteoblastic", "salt-and-pepper", "haemangioma")
SEVERITIES = ("subtle", "moderate", "severe")

# diameter, and how far the lesion's own grey value replaces the bone's
_DIAMETER = {"subtle": (12.0, 16.5), "moderate": (16.5, 21.0), "severe": (21.0, 26.0)}
_STRENGTH = {"subtle": (0.60, 0.74), "moderate": (0.80, 0.90), "severe": (0.94, 1.0)}


@dataclass(frozen=True)
class Body:
    """One vertebral body on the canvas; ``u``, ``v`` and ``depth`` are float32 HxW."""

    u: np.ndarray
    v: np.ndarray
    depth: np.ndarray
    half_width: float
    half_height: float
    scale: float

    def texture(self, rng: np.random.Generator, sigma: float, sigma_y: float = 0.0) -> np.ndarray:
        """``smooth_noise`` over the whole canvas, ``sigma`` a length as all others."""
        return smooth_noise(rng, self.u.shape, sigma * self.scale, sigma_y * self.scale)

    def part(self, rows: slice) -> "Body":
        """These rows alone."""
        return replace(self, u=self.u[rows], v=self.v[rows], depth=self.depth[rows])


class Lesion(NamedTuple):
    """A lesion before the scanner sees it.

    ``mask`` (bool HxW): what the annotator marks; ``change`` (float32 HxW): what to add to the canvas; ``extent`` (bool
    HxW): where the lesion is, beyond which ``change`` is exactly zero but for two pixels.
    """

    mask: np.ndarray
    change: np.ndarray
    extent: np.ndarray


def rows_of(region: np.ndarray) -> slice:
    """The rows from the first to the last in which ``region`` (bool HxW) holds anything."""
    found = np.flatnonzero(region.any(axis=1))
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float, sigma_y: float = 0.0) -> np.ndarray:
    """Gaussian noise blurred by ``sigma`` pixels (``sigma_y`` down the image, if given): float32 HxW, unit variance."""
    across, down = _kernel(sigma), _kernel(sigma_y or sigma)
    raw = rng.standard_normal(shape, dtype=np.float32)
    return cv2.sepFilter2D(raw, cv2.CV_32F, across, down, borderType=cv2.BORDER_REFLECT)


@lru_cache(maxsize=64)
def _kernel(sigma: float) -> np.ndarray:
    """A Gaussian with a sum of squares of one: it keeps the variance of white noise."""
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)
    return kernel / np.sqrt((kernel**2).sum())


def draw_lesion(rng: np.random.Generator, lesion_type: str, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """A lesion of one of LESION_TYPES inside ``body``: a blob of texture, marked exactly."""
    region = blob(rng, lesion_type, severity, body)
    strength = strength_of(rng, severity)
    return filled(region, strength, lesion_texture(rng, lesion_type, canvas, body) - canvas)


def filled(region: np.ndarray, strength: float, change: np.ndarray) -> Lesion:
    """``strength`` times ``change`` (HxW) in ``region`` (bool HxW), behind a border of two pixels; marked exactly."""
    blend = cv2.GaussianBlur(region.astype(np.float32), (5, 5), 0.9)  # reaches two pixels out and no further
    return Lesion(region, (blend * strength * change).astype(np.float32), region)


def strength_of(rng: np.random.Generator, severity: str) -> float:
    """How far a lesion's own grey values replace the bone's, in (0, 1]."""
    return rng.uniform(*_STRENGTH[severity])


def blob(rng: np.random.Generator, lesion_type: str, severity: str, body: Body, larger: float = 1.0) -> np.ndarray:
    """An irregular connected region at least a pixel inside the body, its diameter ``larger`` times that of others."""
    radius, stretch = rng.uniform(*_DIAMETER[severity]) / 2 * larger, rng.uniform(0.85, 1.2)
    radius_u = min(radius * stretch, body.half_width - 2)
    radius_v = min(radius / stretch, body.half_height - 2)
    free_u, free_v = body.half_width - 1.5 - radius_u, body.half_height - 1.5 - radius_v
    u, v = body.u - rng.uniform(-free_u, free_u), body.v - rng.uniform(-free_v, free_v)
    angle = np.arctan2(v / radius_v, u / radius_u)
    edge = np.ones_like(angle)
    for order in range(2, 6):
        edge = edge + rng.uniform(0.0, 0.22 / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    ragged = 0.14 if lesion_type == "osteolytic" else 0.07
    edge = edge + ragged * body.texture(rng, 1.4)
    return largest((np.hypot(u / radius_u, v / radius_v) < edge) & (body.depth > 1)) & (body.depth > 1)


def largest(region: np.ndarray) -> np.ndarray:
    """The largest connected part of ``region`` (bool HxW), holes of a pixel filled."""
    closed = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=4)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def lesion_texture(rng: np.random.Generator, lesion_type: str, canvas: np.ndarray, body: Body) -> np.ndarray:
    """The grey values of a fully developed lesion, float32 HxW. Nothing in it is finer than two pixels."""
    if lesion_type == "osteolytic":
        return 0.17 + 0.04 * body.texture(rng, 1.5)
    if lesion_type == "osteoblastic":
        return 0.90 + 0.06 * body.texture(rng, 1.6)
    level = float(canvas[body.depth > 3].mean())
    if lesion_type == "salt-and-pepper":
        grain = body.texture(rng, 1.6) - 0.5 * body.texture(rng, 4.0)
        return level + 0.40 * np.tanh(1.8 * grain)
    # haemangioma: fat between a few thick struts that run from endplate to endplate
    wave = body.u + 0.6 * body.texture(rng, 2.5, 7.0) + rng.uniform(0, 7)
    columns = np.cos(2 * np.pi * wave / rng.uniform(7.5, 9.5))
    return level - 0.03 + 0.37 * np.tanh(1.6 * columns)


def draw_benign(rng: np.random.Generator, canvas: np.ndarray, body: Body) -> None:
    """Draw what healthy bodies show and a hurried reader mistakes for a lesion; changes ``canvas`` in place."""
    whole, rows = body, rows_of(body.depth > -1)
    body, canvas = body.part(rows), canvas[rows]
    inside = np.clip(body.depth, 0, 1)
    slope_u, slope_v = rng.normal(0, 0.025), rng.normal(0, 0.025)
    canvas += inside * (slope_u * body.u / body.half_width + slope_v * body.v / body.half_height)  # density gradient
    if rng.random() < 0.80:
        _vessel(rng, canvas, body)
    if rng.random() < 0.45:
        _endplate_node(rng, canvas, body)
    if rng.random() < 0.45:
        _endplate_sclerosis(rng, canvas, body)
    if rng.random() < 0.40:  # bone island
        spot = _spot(rng, body, 0.7, (1.1, 2.4))
        canvas += inside * spot * np.clip(rng.uniform(0.75, 0.95) - canvas, 0, 1)
    for _ in range(rng.integers(0, 4)):  # fatty or denser marrow, without an edge
        canvas += inside * _spot(rng, body, 0.8, (3, 7)) * rng.uniform(-0.14, 0.11)
    if rng.random() < 0.3:  # thin bone: the upright trabeculae stand out in the whole body
        canvas += inside * rng.uniform(0.025, 0.055) * whole.texture(rng, 1.0, 5.0)[rows]


def _spot(rng: np.random.Generator, body: Body, reach: float, radii: tuple[float, float]) -> np.ndarray:
    """A blurred ellipse at most ``reach`` of the way from the body's middle to its walls."""
    u, v = rng.uniform(-reach, reach) * body.half_width, rng.uniform(-reach, reach) * body.half_height
    radius_u, radius_v = rng.uniform(*radii), rng.uniform(*radii)
    return np.exp(-0.5 * (((body.u - u) / radius_u) ** 2 + ((body.v - v) / radius_v) ** 2))


def _vessel(rng: np.random.Generator, canvas: np.ndarray, body: Body) -> None:
    """The basivertebral vein: a dark wedge that opens at the middle of the back wall."""
    reach = rng.uniform(0.3, 1.0) * body.half_width
    along = (body.half_width - body.u) / reach  # 0 at the back wall, 1 at the tip
    width = rng.uniform(1.5, 4.5) * np.clip(1 - along, 0, 1) + 0.6
    wedge = np.exp(-(((body.v - rng.normal(0, 1)) / width) ** 2)) * np.clip(3 * (1 - along), 0, 1)
    target = rng.uniform(0.2, 0.3)
    canvas += np.clip(body.depth + 0.5, 0, 1) * rng.uniform(0.5, 0.95) * wedge * (target - canvas)


def _endplate_node(rng: np.random.Generator, canvas: np.ndarray, body: Body) -> None:
    """Schmorl's node: disc material in a notch of an endplate, with a bright rim."""
    side, radius = (1 if rng.random() < 0.5 else -1), rng.uniform(3.0, 6.5)
    du = body.u - rng.uniform(-0.5, 0.5) * body.half_width
    dv = body.v - side * (body.half_height - rng.uniform(0, 1.5))
    distance = np.hypot(du / rng.uniform(1.0, 1.5), dv) - radius
    inside = np.clip(body.depth + 1, 0, 1)
    strength = rng.uniform(0.6, 1.0)
    rim = np.exp(-(((distance - 1.0) / 1.1) ** 2)) * np.clip(body.depth, 0, 1)
    canvas += strength * rim * np.clip(0.78 - canvas, 0, 1)
    canvas += strength * inside * np.clip(0.5 - distance, 0, 1) * (rng.uniform(0.3, 0.38) - canvas)


def _endplate_sclerosis(rng: np.random.Generator, canvas: np.ndarray, body: Body) -> None:
    """A bright band along part of one endplate, as in a worn disc."""
    side = 1 if rng.random() < 0.5 else -1
    from_plate = body.half_height - side * body.v
    band = np.exp(-((np.clip(from_plate, 0, None) / rng.uniform(2.5, 6.5)) ** 2))
    part = np.exp(-(((body.u - rng.uniform(-0.8, 0.8) * body.half_width) / rng.uniform(7, 16)) ** 2))
    canvas += np.clip(body.depth, 0, 1) * rng.uniform(0.5, 0.95) * band * part * np.clip(0.85 - canvas, 0, 1)
