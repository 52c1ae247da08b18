"""What the worlds draw beside or instead of blobs with a crisp edge: ramped edges, kinds with a place and a form of
their own, and signs of a disease in other vertebrae. Frames, lengths and grey values are those of ``lesions``.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ldm.data.masks import extents
from ldm.phantom.lesions import (
    LESION_TYPES,
    Body,
    Lesion,
    blob,
    draw_lesion,
    filled,
    largest,
    lesion_texture,
    strength_of,
)

RAMP = (0.1, 0.6)  # width of a ramped lesion's edge, a share of its diameter at half height
MARKED_LEVELS = (0.1, 0.9)  # of the ramp, at which the annotator sees the border
SLOPPY = 2.0  # pixels that the annotator's line wanders from it at most
BOXES = 0.2  # share of lesions that are marked with a box
_LARGER = 1.2  # the outermost border of a ramped lesion, which all of its edge lies within
_FEWEST = 12  # pixels of a mask; fewer, and the annotator would not have seen it

SHAPES = ("osteolytic", "wedge fracture", "endplate erosion", "diffuse infiltration")
_LOST = {"subtle": (0.16, 0.24), "moderate": (0.26, 0.38), "severe": (0.40, 0.58)}  # of a body's height, at its front
_ERODED = {"subtle": (3.5, 5.5), "moderate": (5.5, 8.5), "severe": (8.5, 12.5)}  # depth below the endplate

# What is further from a body's middle than both together is in no crop around a lesion of it: half the side of the
# model's crop with what a blur carries into it, and how near to the body's wall the middle of a lesion may lie.
_HALF_CROP, _NEAREST = 34.0, 7.5


def draw_ramped(rng: np.random.Generator, lesion_type: str, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """A lesion whose edge is a ramp of RAMP of its diameter, and what an annotator marks of it.

    The ramp begins at the outermost border of a blob and rises inwards, so it lies within the body.
    """
    extent = blob(rng, lesion_type, severity, body, _LARGER)
    share = rng.uniform(*RAMP)
    width = 2 * np.sqrt(extent.sum() / np.pi) * share / (1 + share)  # the diameter at half height is smaller by it
    ramp = np.clip((_inside(extent) - 0.5) / width, 0, 1)
    ramp = cv2.GaussianBlur((ramp * ramp * (3 - 2 * ramp)).astype(np.float32), (5, 5), 0.9) * extent
    change = strength_of(rng, severity) * ramp * (lesion_texture(rng, lesion_type, canvas, body) - canvas)
    return Lesion(_annotated(rng, ramp, body), change.astype(np.float32), extent)


def _annotated(rng: np.random.Generator, ramp: np.ndarray, body: Body) -> np.ndarray:
    """The region (bool HxW) where ``ramp`` is above a random level, its border sloppy; or a box around it."""
    region = ramp > rng.uniform(*MARKED_LEVELS) * ramp.max()
    wander = SLOPPY * np.tanh(body.texture(rng, 3.0))
    moved = _inside(region) - _inside(~region) + wander > 0
    boxed, moves = rng.random() < BOXES, rng.integers(-2, 3, 4)
    if boxed:
        moved = np.zeros_like(region)
        top, bottom, left, right = np.ravel(extents(region)) + moves
        moved[max(top, 0) : bottom, max(left, 0) : right] = True
    elif moved.any():
        _, labels, stats, _ = cv2.connectedComponentsWithStats(moved.astype(np.uint8), connectivity=4)
        moved = labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return moved if moved.sum() >= _FEWEST else region


def _inside(region: np.ndarray) -> np.ndarray:
    """How far each pixel of ``region`` is from the nearest one outside; 0 outside."""
    return cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def draw_shaped(rng: np.random.Generator, lesion_type: str, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """A lesion of one of SHAPES: a blob, or a kind that has its own place in the body and its own form."""
    if lesion_type in LESION_TYPES:
        return draw_lesion(rng, lesion_type, severity, canvas, body)
    return _SHAPED[lesion_type](rng, severity, canvas, body)


def _wedge_fracture(rng: np.random.Generator, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """The front of the upper endplate has sunk in: disc and soft tissue where bone was, crushed bone below.

    The mask covers the lost part and the new endplate with the bone pressed together below it.
    """
    lost = rng.uniform(*_LOST[severity]) * 2 * body.half_height
    hinge = rng.uniform(0.1, 0.7) * body.half_width
    slope = np.clip((hinge - body.u) / (hinge + body.half_width), 0, 1.1)
    sunk = lost * slope**1.2 + 0.5 * body.texture(rng, 2.5) * (slope > 0)
    below = body.v - (sunk - body.half_height)  # the new endplate
    gone = np.clip(0.5 - below, 0, 1)
    tissue = rng.uniform(0.31, 0.37) + 0.015 * body.texture(rng, 1.6)
    plate = np.exp(-(((below - 1.2) / 1.2) ** 2)) * rng.uniform(0.7, 0.95)
    crushed = np.exp(-((np.clip(below, 0, None) / rng.uniform(3.0, 5.0)) ** 2)) * rng.uniform(0.25, 0.55)
    bone = canvas + np.clip(plate + crushed, 0, 1) * np.clip(rng.uniform(0.78, 0.9) - canvas, 0, 1)
    region = (below < 4.5) & (slope > 0.03) & (body.depth > -1.2)
    return filled(largest(region), 1.0, gone * tissue + (1 - gone) * bone - canvas)


def _endplate_erosion(rng: np.random.Generator, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """Part of an endplate is eaten away, with a scalloped border and a rim of denser bone."""
    side = 1 if rng.random() < 0.5 else -1
    middle, half = rng.uniform(-0.35, 0.35) * body.half_width, rng.uniform(0.45, 0.8) * body.half_width
    profile = np.sqrt(np.clip(1 - ((body.u - middle) / half) ** 2, 0, 1))
    reach = rng.uniform(*_ERODED[severity]) * profile * np.clip(1 + 0.3 * body.texture(rng, 2.0), 0.3, 1.6)
    into = reach - (body.half_height - side * body.v)  # positive where the bone is gone
    gone = np.clip(into + 0.5, 0, 1)
    tissue = rng.uniform(0.22, 0.32) + 0.03 * body.texture(rng, 1.5)
    rim = np.exp(-(((into + 1.4) / 1.3) ** 2)) * rng.uniform(0.3, 0.8) * np.clip(0.85 - canvas, 0, 1)
    region = (into > -2.5) & (profile > 0) & (body.depth > -1.2)
    change = gone * (tissue - canvas) + (1 - gone) * rim
    return filled(largest(region), strength_of(rng, severity), change)


def _diffuse_infiltration(rng: np.random.Generator, severity: str, canvas: np.ndarray, body: Body) -> Lesion:
    """The whole body is riddled with small holes, up to its shell."""
    region = body.depth > 1.2 + 0.4 * body.texture(rng, 2.0)
    level = float(canvas[body.depth > 3].mean())
    holes = 1 / (1 + np.exp(-4 * (body.texture(rng, 1.5) - rng.uniform(0.1, 0.6))))
    marrow = level - 0.03 + 0.02 * body.texture(rng, 1.0)
    change = marrow + holes * (rng.uniform(0.12, 0.2) - marrow) - canvas
    return filled(largest(region), strength_of(rng, severity), change)


_SHAPED: dict[str, Callable[[np.random.Generator, str, np.ndarray, Body], Lesion]] = {
    "wedge fracture": _wedge_fracture,
    "endplate erosion": _endplate_erosion,
    "diffuse infiltration": _diffuse_infiltration,
}


def draw_signs(
    rng: np.random.Generator,
    lesion_type: str,
    canvas: np.ndarray,
    bodies: Sequence[Body],
    away: tuple[np.ndarray, np.ndarray],
    tilt: float,
) -> None:
    """Draw the disease in the bodies around the middle one, where no crop around a lesion of it reaches; in place.

    ``away``: how far each pixel is from the target's middle, across and down (float32 HxW); ``tilt``: the target's
    angle in radians.
    """
    target = len(bodies) // 2
    own = bodies[target]
    room = [max(half - _NEAREST, 0.5) for half in (own.half_width, own.half_height)]
    sine, cosine = abs(np.sin(tilt)), np.cos(tilt)
    across, down = room[0] * cosine + room[1] * sine, room[1] * cosine + room[0] * sine
    beyond = np.maximum(np.abs(away[0]) - across, np.abs(away[1]) - down) - _HALF_CROP
    seen = np.clip(beyond / (3 + np.tanh(own.texture(rng, 4.0))), 0, 1)
    strength = rng.uniform(0.85, 1.0)
    for number, body in enumerate(bodies):
        part = np.clip(body.depth - 1, 0, 1) * seen
        if number != target and (body.depth > 3).any() and (part > 0).any():
            canvas += part * strength * (lesion_texture(rng, lesion_type, canvas, body) - canvas)
