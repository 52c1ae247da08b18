"""The vertebrae of a label map: one number each, in the order that a spine has."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage

from ldm.core.errors import MedSoftError
from ldm.volumes.labels import LEVELS, PRESETS, fits_preset
from ldm.volumes.volume import Volume, orient

TALLEST = 120.0  # mm from head to feet: no vertebra with its processes is as tall


def separated(values: np.ndarray, structures: Mapping[int, str], grid: Volume) -> tuple[np.ndarray, dict[int, str]]:
    """One label for all vertebrae as one number for each of its parts, from the head down.

    Parts smaller than a third of the largest, such as a spinous process that is separate in thick slices, or a vertebra
    that the image cuts off, become ``partial``.
    """
    semantic = [number for number, name in structures.items() if name == "vertebra"]
    if len(semantic) != 1:
        return values, dict(structures)
    parts, number = ndimage.label(values == semantic[0], np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    heights = [
        float((grid.affine[:3, :3] @ place)[2])
        for place in ndimage.center_of_mass(parts > 0, parts, range(1, number + 1))
    ]
    first = max(structures) + 1
    structures = {n: name for n, name in structures.items() if n != semantic[0]}
    values = np.where(values == semantic[0], 0, values).astype(np.uint8 if first + number < 256 else np.int32)
    for rank, part in enumerate(np.argsort(heights)[::-1].tolist()):
        values[parts == part + 1] = first + rank
        structures[first + rank] = "vertebra" if 3 * sizes[part] >= sizes.max() else "partial"
    return values, structures


def check_order(path: Path, values: np.ndarray, structures: Mapping[int, str], grid: Volume) -> tuple[str, ...]:
    """What is strange in the order of the levels from head to feet, in sentences.

    MedSoftError where most of the order is reversed, with the preset that fits, and for a vertebra that is too tall.
    """
    oriented = orient(Volume(values, grid.affine))
    boxes = ndimage.find_objects(oriented.values)
    heights = {}
    for number, name in structures.items():
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is None or name not in (*LEVELS, "vertebra"):
            continue
        tall = (box[2].stop - box[2].start) * oriented.spacing[2]
        if tall > TALLEST:
            raise MedSoftError(
                f"{path}: {number} ({name}) reaches over {tall:.0f} mm from head to feet, which no vertebra does; if "
                f'it is one label for all vertebrae, give --map with {{"{number}": "vertebra"}}; if those touch in the '
                "label map, separate them first"
            )
        weights = (oriented.values[box] == number).sum(axis=(0, 1))
        heights[number] = box[2].start + float(np.average(np.arange(len(weights)), weights=weights))
    pairs, reversed_ = _reversed_pairs(
        {number: name for number, name in structures.items() if number in heights}, heights
    )
    if 2 * len(reversed_) > pairs:
        upper, lower = reversed_[0]
        fits = [
            each
            for each in PRESETS
            if fits_preset(heights, each)
            and not _reversed_pairs({n: PRESETS[each].numbers[n] for n in heights}, heights)[1]
        ]
        advice = (
            f"its numbers fit --preset {' or '.join(fits)}" if fits else "is it the right numbering (--preset, --map)?"
        )
        raise MedSoftError(f"{path}: {lower} lies nearer to the head than {upper}, which no spine has; {advice}")
    return tuple(f"{lower} lies nearer to the head than {upper} in the labels" for upper, lower in reversed_)


def _reversed_pairs(names: Mapping[int, str], heights: Mapping[int, float]) -> tuple[int, list[tuple[str, str]]]:
    """How many pairs of neighbouring levels there are, and those whose lower one lies nearer to the head."""
    found = sorted((LEVELS.index(name), heights[number]) for number, name in names.items() if name in LEVELS)
    pairs = list(pairwise(found))
    return len(pairs), [(LEVELS[a], LEVELS[b]) for (a, high), (b, low) in pairs if low > high]
