"""A lesion's mask carried over from one vertebra to another. NumPy and OpenCV; no torch."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from ldm.core.errors import MedSoftError
from ldm.core.files import named_seed
from ldm.data.images import read_image
from ldm.data.masks import TARGET_LABEL, extents, read_anatomy, read_mask, region_for, soften, spacing_of
from ldm.data.samples import Sample
from ldm.transfer.frames import Frame, Jitter, frame_of, map_between, warped

Found = TypeVar("Found")
DONORS = 256  # lesions that are kept in memory
DRAWS = 8  # of a jitter, before the mask is carried over without one
LEAST_SOURCE = 0.25  # share of the source's lesion in its own vertebra; below, the vertebra does not say where it is
LEAST_INSIDE = 0.6  # of the source's share inside that the target has to have as well


class NotCarried(MedSoftError):
    """Why a mask cannot be carried over, in words that can stand for themselves in a count."""


@dataclass(frozen=True, eq=False)
class Donor:
    """The lesion that is carried over, all HxW.

    hard: bool, not empty; soft: float32 in [0, 1], where the sample has a soft mask of its own; body: bool, its
    vertebra, None where there is no anatomy.png.
    """

    sample: Sample
    hard: np.ndarray
    soft: np.ndarray | None
    body: np.ndarray | None

    @cached_property
    def image(self) -> np.ndarray:
        """Its pixels, HxW or HxWx3, read when they are wanted."""
        return read_image(self.sample.image)

    @property
    def pivot(self) -> tuple[float, float]:
        """The middle of its lesion, (x, y)."""
        rows, columns = np.nonzero(self.hard)
        return float(columns.mean()), float(rows.mean())


@dataclass(frozen=True, eq=False)
class CarriedMask:
    """A mask in the target's image, all HxW.

    hard: bool; soft: float32, or None where the source's was hard and a border is to be made; matrix: 2x3, from the
    source's pixels (x, y) to the target's. only_form: where place and size do not follow from the two vertebrae, why,
    and what the size follows from.
    """

    hard: np.ndarray
    soft: np.ndarray | None
    matrix: np.ndarray
    only_form: str | None = None


def read_donor(sample: Sample) -> Donor:
    """The lesion of a diseased sample.

    Raises FileError for a file that cannot be read, NotCarried for a sample that marks no lesion.
    """
    if sample.mask is None:
        raise NotCarried("the prompt's sample has no mask")
    mask = read_mask(sample.mask)
    if not mask.hard.any():
        raise NotCarried("the mask of the prompt's sample is empty")
    shape = mask.values.shape
    soft = mask.values if mask.soft else None
    if sample.soft_mask is not None:
        soft = read_mask(sample.soft_mask, shape, soft=True).values
    body = read_anatomy(sample.anatomy, shape) == TARGET_LABEL if sample.anatomy is not None else None
    return Donor(sample, mask.hard, soft, body)


def by_files(read: Callable[[Sample], Found], most: int | None) -> Callable[[Sample], Found]:
    """``read`` that remembers what it found last of ``most`` samples (None: of all), in any thread.

    By all of a sample's files: several lesions of one image have masks of their own.
    """
    samples: dict[tuple[Path | None, ...], Sample] = {}
    known = functools.lru_cache(most)(lambda files: read(samples[files]))

    def found(sample: Sample) -> Found:
        samples[sample.files] = sample
        return known(sample.files)

    return found


class Donors:
    """``read_donor``, with those read last kept in memory, since many images share one; for any thread."""

    def __init__(self) -> None:
        self._read = by_files(read_donor, DONORS)

    def __call__(self, sample: Sample) -> Donor:
        """The lesion of a diseased sample; raises what ``read_donor`` does."""
        return self._read(sample)

    def carry(self, donor: Sample, target: Sample, shape: tuple[int, ...], seed: int, variant: int) -> CarriedMask:
        """The lesion of ``donor`` in the vertebra of ``target``, whose image has ``shape``; raises as ``carry`` too.

        Its jitter is a function of (seed, name of the target, variant).
        """
        own_seed = named_seed("carried", seed, target.sample_id, variant)
        return carry(self(donor), region_for(target, shape), shape, own_seed, target.meta.get("spacing_mm"))


def carry(
    donor: Donor, target: np.ndarray | None, shape: tuple[int, ...], seed: int, spacing: Any = None
) -> CarriedMask:
    """The donor's mask in the vertebra ``target`` (bool HxW) of an image of ``shape`` (H, W, ...).

    It lies there as it lay in its own vertebra, but for a small jitter by ``seed``; of as many draws as it takes, the
    first that keeps enough of it inside counts. The share of it that lies outside the vertebra is at most the
    source's: of what is beyond, that is cut off which is furthest away. Where the donor has no anatomy.png, the mask
    keeps its form and size, in mm if ``spacing`` (the image's ``spacing_mm``) and the donor's are known, and lies
    anywhere in the vertebra. NotCarried where a label map or the image marks no vertebra, or too little of the mask
    would lie inside.
    """
    if donor.body is not None and not donor.body.any():
        raise NotCarried("the prompt's sample marks no vertebra")
    if target is None or not target.any():
        raise NotCarried("the image marks no vertebra")
    if donor.body is None:
        return _by_form(donor, target, shape, seed, spacing)
    share = float((donor.hard & donor.body).sum() / donor.hard.sum())
    if share < LEAST_SOURCE:
        raise NotCarried("the lesion of the prompt's sample lies outside its vertebra")
    try:
        frames = frame_of(donor.body), frame_of(target)
    except MedSoftError as error:
        raise NotCarried(str(error)) from error
    rng = np.random.default_rng(seed)
    for jitter in [*(Jitter.drawn(rng) for _ in range(DRAWS)), Jitter()]:
        found = _brought(donor, map_between(*frames, donor.pivot, jitter), shape)
        area = donor.hard.sum() * abs(np.linalg.det(found.matrix[:, :2]))  # also what the image's border cuts off
        if (found.hard & target).sum() >= LEAST_INSIDE * share * area and (found.hard & target).any():
            return _inside(found, target, share)
    raise NotCarried("too little of the lesion would lie inside the image's vertebra")


def map_by_shape(donor: Donor, mask: np.ndarray) -> np.ndarray:
    """2x3 map of the donor's pixels (x, y) that brings its lesion's bounding box onto that of a mask (bool HxW)."""
    return map_between(_box(donor.hard), _box(mask), donor.pivot)


def _box(mask: np.ndarray) -> Frame:
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return Frame((x + (width - 1) / 2, y + (height - 1) / 2), 0.0, (width, height))


def _by_form(donor: Donor, target: np.ndarray, shape: tuple[int, ...], seed: int, spacing: Any) -> CarriedMask:
    """The donor's mask at its own size, turned by a small jitter, where all of it, or most, lies inside ``target``."""
    rng = np.random.default_rng(seed)
    turn = Jitter.drawn(rng).turn
    linear, size = _own_size(donor, shape, spacing, turn)
    corners = np.array(_box(donor.hard).extents) @ np.abs(linear).T  # of the turned and scaled mask's bounding box
    reach = 2 * math.ceil(max(corners)) + 3
    alone = np.column_stack([linear, reach // 2 - linear @ donor.pivot])  # the pivot in the middle of a square
    form = _brought(donor, alone, (reach, reach)).hard
    (top, bottom), (left, right) = extents(target)
    inside = cv2.filter2D(
        target[top:bottom, left:right].astype(np.float64), -1, form.astype(np.float64), borderType=cv2.BORDER_CONSTANT
    )
    inside = np.rint(inside)  # by the pixel in which the pivot lies: how many pixels of the mask lie in the target
    if not form.any() or inside.max() < LEAST_INSIDE * form.sum():
        raise NotCarried("too little of the lesion would lie inside the image's vertebra")
    places = np.argwhere(inside == inside.max())
    row, column = places[rng.integers(len(places))]
    middle = np.array([left + column, top + row])
    found = _inside(_brought(donor, np.column_stack([linear, middle - linear @ donor.pivot]), shape), target, 1.0)
    reason = f"the prompt's sample has no anatomy.png: only its lesion's form is carried over, {size}"
    return replace(found, only_form=reason)


def _own_size(donor: Donor, shape: tuple[int, ...], spacing: Any, turn: float) -> tuple[np.ndarray, str]:
    """2x2: how (x, y) lengths in the donor's image become those in one of ``shape``, turned; and by what, in words."""
    own = donor.sample.meta.get("spacing_mm")
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    if own is None or spacing is None:
        scale = math.sqrt(shape[0] * shape[1] / donor.hard.size)
        return scale * turned, "as large as it was relative to its image"
    to_mm, from_mm = (np.diag(spacing_of(each)[::-1]) for each in (own, spacing))
    return np.linalg.inv(from_mm) @ turned @ to_mm, "as large as it was in mm"


def _brought(donor: Donor, matrix: np.ndarray, shape: tuple[int, ...]) -> CarriedMask:
    """The donor's masks brought by a 2x3 map into an image of ``shape``."""
    hard = warped(donor.hard.astype(np.float32), matrix, shape, cv2.BORDER_CONSTANT) >= 0.5
    if donor.soft is None:
        return CarriedMask(hard, None, matrix)
    soft = warped(donor.soft, matrix, shape, cv2.BORDER_CONSTANT)
    soft[hard] = soft[hard].clip(donor.soft[donor.hard].min())  # 1, as a rule, to the lesion's very edge
    return CarriedMask(hard, np.rint(255 * soft).astype(np.float32) / 255, matrix)  # as a soft_mask.png holds it


def _inside(found: CarriedMask, target: np.ndarray, share: float) -> CarriedMask:
    """``found`` with no larger part outside ``target`` (bool HxW) than 1 - ``share``; its soft mask is cut likewise."""
    inside = int((found.hard & target).sum())
    allowed = int(inside * (1 - share) / share + 1e-6)
    beyond = found.hard & ~target
    if beyond.sum() <= allowed:
        return found
    away = cv2.distanceTransform((~target).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rows, columns = np.nonzero(beyond)
    cut = np.argsort(away[rows, columns], kind="stable")[allowed:]
    hard = found.hard.copy()
    hard[rows[cut], columns[cut]] = False
    if found.soft is None:
        return replace(found, hard=hard)
    lesion_away = cv2.distanceTransform((~found.hard).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    border = float(lesion_away[found.soft > 0].max())  # the width of its soft border
    return replace(found, hard=hard, soft=np.minimum(found.soft, soften(hard, border)))
