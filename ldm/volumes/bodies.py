"""The body of a vertebra told from its arch, in label maps that hold both. NumPy and SciPy.

The label maps of CT tools hold the whole vertebra. A lesion is placed and measured in the body, so the arch (pedicles,
laminae, processes) is cut off, in millimetres and for each vertebra:

1. The front of the spinal canal at each height: of the label ``canal`` (canal or cord) where there is one; else of the
   hole that each vertebra has when it is seen from above, with straight lines from vertebra to vertebra.
2. What lies in front of it is the body with the stumps of the pedicles. Where no canal is found, the whole label.
3. An opening by a ball with half the radius of the largest ball that fits removes what is thinner than the body; of
   what is left the largest part counts, grown back by half of the ball's radius, so that corners are kept.

A label of which this leaves at least 85 % is taken for one of the body alone, and stays as it is. So do C1, which has
no body, and the sacrum. Where less than 25 % lies in front of the canal, the body is outside of the image. Where there
is no canal and less than 25 % is left, the label is kept, and that is said.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from ldm.volumes.labels import LEVELS

CELL = 1.5  # mm: the grid on which bodies are found; borders are those of the label
BODY_ONLY, TOO_LITTLE = 0.85, 0.25  # of the label's voxels
REACH = 20.0  # mm: how far a vertebra goes on beyond the image's edge
HOLE = 30.0  # mm2: a smaller hole is none of the canal
NOT_FOUND = "its label holds the arch too, which could not be told from the body: lesions placed in it may be larger"
OUTSIDE = "its body lies outside of the image: its label is hardly more than an arch"
NO_BODY = ("C1", "S1", "sacrum", "partial")


def bodies(
    values: np.ndarray, structures: Mapping[int, str], spacing: tuple[float, float, float]
) -> tuple[np.ndarray, dict[int, str]]:
    """The label map without the arches of its vertebrae, and what to say of a vertebra, by its number.

    values: (x, y, z) labels with axes to the left, posterior and the head; ``spacing`` in mm.
    """
    steps = [max(1, round(CELL / length)) for length in spacing]
    coarse = np.ascontiguousarray(values[tuple(slice(None, None, step) for step in steps)])
    cell = np.array([length * step for length, step in zip(spacing, steps, strict=True)])
    boxes = dict(enumerate(ndimage.find_objects(coarse), 1))
    vertebrae = [n for n, name in structures.items() if name in (*LEVELS, "vertebra") and boxes.get(n)]
    wanted = [n for n in vertebrae if structures[n] not in NO_BODY]
    canals = [n for n, name in structures.items() if name == "canal"]
    front = _canal_front(coarse, canals, {n: boxes[n] for n in wanted}, cell)
    result, notes = values.copy(), {}
    for number in wanted:
        place, kept = _body(coarse == number, boxes[number], front, cell)
        fine = tuple(slice(part.start * step, part.stop * step) for part, step in zip(place, steps, strict=True))
        for axis, step in enumerate(steps):
            kept = np.repeat(kept, step, axis)
        label = result[fine]
        body = kept[tuple(map(slice, label.shape))]
        own = values[fine] == number
        share = np.count_nonzero(own & body) / max(1, int(np.count_nonzero(own)))
        if share < TOO_LITTLE and not np.isfinite(front[boxes[number][2]]).all():
            notes[number] = NOT_FOUND
        elif share < TOO_LITTLE:
            label[own], notes[number] = 0, OUTSIDE
        elif share < BODY_ONLY:
            label[own & ~body] = 0
    return result, notes


def _canal_front(coarse: np.ndarray, canals: list[int], boxes: Mapping[int, tuple], cell: np.ndarray) -> np.ndarray:
    """The front of the canal (cells along y) at each height: of its label, else of the holes; NaN where unknown."""
    points = {}
    rows = np.isin(coarse, canals).any(axis=0) if canals else np.zeros(coarse.shape[1:], bool)  # (y, z)
    heights = np.flatnonzero(rows.any(axis=0))
    if len(heights):
        fronts = ndimage.median_filter(rows.argmax(axis=0)[heights], 7, mode="nearest")  # without stray voxels
        points = dict(zip(heights.tolist(), fronts.tolist(), strict=True))
    for number, box in boxes.items():
        label = coarse[box] == number
        height = box[2].start + float(np.average(np.arange(label.shape[2]), weights=label.sum(axis=(0, 1))))
        if points and min(heights, default=np.inf) <= height <= max(heights, default=-np.inf):
            continue
        shadow = label.any(axis=2)
        holes, _ = ndimage.label(ndimage.binary_fill_holes(shadow) & ~shadow)
        sizes = np.bincount(holes.ravel())[1:]
        if len(sizes) and sizes.max() * cell[0] * cell[1] >= HOLE:
            points[height] = box[1].start + float(np.flatnonzero((holes == 1 + sizes.argmax()).any(axis=0))[0])
    everywhere = np.arange(coarse.shape[2])
    if not points:
        return np.full(len(everywhere), np.nan)
    known = np.array(sorted(points))
    front = np.interp(everywhere, known, [points[height] for height in known.tolist()])
    beyond = np.maximum(known[0] - everywhere, everywhere - known[-1]) * cell[2]
    return np.where(beyond <= REACH, front, np.nan)


def _body(label: np.ndarray, box: tuple, front: np.ndarray, cell: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
    """Where the body lies: a box of cells, and the cells of the body in it, one cell wider than the label's."""
    place = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
    part = label[place].copy()
    part &= ~(place[1].start + np.arange(part.shape[1])[:, None] >= front[place[2]])
    if not part.any():
        return place, part
    # A vertebra that the image cuts off goes on outside: its edge is no thin place.
    margins = [
        (reach * (part.start == 0), reach * (part.stop > n))
        for reach, part, n in zip((math.ceil(REACH / length) for length in cell), place, label.shape, strict=True)
    ]
    padded = np.pad(part, margins, mode="edge")
    depth = ndimage.distance_transform_edt(padded, cell)
    inner = tuple(slice(first, first + n) for (first, _), n in zip(margins, part.shape, strict=True))
    radius = 0.5 * float(depth[inner].max())
    cores, number = ndimage.label(depth > radius)
    sizes = np.bincount(cores[inner].ravel(), minlength=number + 1)[1:]
    core = cores == 1 + sizes.argmax()
    near = ndimage.distance_transform_edt(~core, cell)[inner] <= 1.5 * radius
    return place, ndimage.binary_dilation(near & part, np.ones((3, 3, 3), bool))
