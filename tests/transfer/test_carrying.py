"""Vertebra frames, masks carried over by them, and what is refused."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ldm.data.samples import Sample
from ldm.transfer.carrying import CarriedMask, Donor, NotCarried, carry, read_donor
from ldm.transfer.frames import Jitter, frame_of, map_between

SHAPE = (120, 140)


def rectangle(centre: tuple[float, float], size: tuple[float, float], degrees: float) -> np.ndarray:
    """bool HxW: a turned rectangle, ``centre`` and ``size`` as (x, y)."""
    corners = cv2.boxPoints((centre, size, degrees))
    return cv2.fillPoly(np.zeros(SHAPE, np.uint8), [np.rint(corners).astype(np.int32)], 1) > 0


def donor(hard: np.ndarray, body: np.ndarray | None, soft: np.ndarray | None = None, spacing: Any = None) -> Donor:
    meta = {} if spacing is None else {"spacing_mm": spacing}
    return Donor(Sample("s", Path("s"), Path("m"), "lesion", (0, 0, 0, 0), "p", meta=meta), hard, soft, body)


BODY, TARGET = rectangle((60, 50), (60, 40), 0), rectangle((80, 70), (44, 30), 20)
LESION = rectangle((75, 42), (16, 10), 0)


@pytest.mark.parametrize("degrees", [-30, 0, 12, 40])
def test_frame_of_a_turned_rectangle(degrees: float) -> None:
    found = frame_of(rectangle((70, 60), (50, 30), degrees))
    assert found.centre == pytest.approx((70, 60), abs=0.7)
    assert math.degrees(found.angle) == pytest.approx(degrees, abs=1.5)
    assert found.extents == pytest.approx((51, 31), abs=2.5)  # and steps along a turned border


def test_frame_is_that_of_the_largest_part() -> None:
    stray = BODY.copy()
    stray[110:114, 120:124] = True
    assert frame_of(stray).centre == frame_of(BODY).centre


def test_map_brings_one_vertebra_onto_the_other() -> None:
    matrix = map_between(frame_of(BODY), frame_of(TARGET), (60, 50))
    brought = cv2.warpAffine(BODY.astype(np.uint8), matrix, SHAPE[::-1]) > 0
    assert (brought & TARGET).sum() / (brought | TARGET).sum() > 0.93
    jittered = map_between(frame_of(BODY), frame_of(TARGET), (75, 42), Jitter((0.1, 0), 0.2, 1.1))
    moved = jittered @ (75, 42, 1) - matrix @ (75, 42, 1)
    assert np.hypot(*moved) == pytest.approx(0.1 * frame_of(TARGET).extents[0])
    assert np.linalg.det(jittered[:, :2]) == pytest.approx(1.21 * np.linalg.det(matrix[:, :2]))


def carried(given: Donor, target: np.ndarray | None = TARGET, seed: int = 0) -> CarriedMask:
    return carry(given, target, SHAPE, seed)


def test_lesion_lies_where_it_lay_in_its_vertebra() -> None:
    """As large, in the same quarter, and inside for every seed; the seed alone decides where exactly."""
    made = [carried(donor(LESION, BODY), seed=seed).hard for seed in range(30)]
    share = LESION.sum() / BODY.sum()
    for hard in made:
        assert not (hard & ~TARGET).any()
        assert 0.65 * share < hard.sum() / TARGET.sum() < 1.35 * share
        rows, columns = np.nonzero(hard)
        back = cv2.invertAffineTransform(map_between(frame_of(BODY), frame_of(TARGET), (75, 42)))
        assert back @ (columns.mean(), rows.mean(), 1) == pytest.approx((75, 42), abs=4.5)
    assert len({hard.tobytes() for hard in made}) > 20
    assert np.array_equal(made[3], carried(donor(LESION, BODY), seed=3).hard)


def test_no_more_lies_outside_than_did_in_the_source() -> None:
    half_out = rectangle((90, 50), (16, 10), 0)
    outside = (half_out & ~BODY).sum() / half_out.sum()
    assert 0.3 < outside < 0.6
    for seed in range(20):
        hard = carried(donor(half_out, BODY), seed=seed).hard
        assert 0 < (hard & ~TARGET).sum() <= outside * hard.sum() + 1


def test_soft_mask_is_brought_over_and_cut_with_the_hard_one() -> None:
    wide = rectangle((60, 50), (56, 36), 0)
    soft = np.maximum(cv2.GaussianBlur(wide.astype(np.float32), (0, 0), 2), wide)
    made = carried(donor(wide, BODY, soft), rectangle((80, 70), (30, 26), 45))
    assert made.soft is not None
    assert made.soft.dtype == np.float32
    assert (made.soft[made.hard] == 1).all()
    assert np.array_equal(np.rint(made.soft * 255).astype(np.float32) / 255, made.soft)
    near = cv2.dilate(made.hard.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    assert not made.soft[~near].any()
    assert ((made.soft > 0) & ~made.hard).any()


WEDGE = cv2.fillPoly(np.zeros(SHAPE, np.uint8), [np.array([[20, 90], [36, 90], [36, 98]])], 1) > 0  # no blob at all


def angle_of(hard: np.ndarray) -> float:
    """The direction of the first principal axis, degrees in 0 to 180."""
    rows, columns = np.nonzero(hard)
    _, axes = np.linalg.eigh(np.cov(columns, rows))
    return math.degrees(math.atan2(axes[1, 1], axes[0, 1])) % 180


def test_without_a_label_map_the_form_is_carried_over_and_lies_anywhere_in_the_vertebra() -> None:
    made = [carried(donor(WEDGE, None), seed=seed) for seed in range(30)]
    for each in made:
        assert not (each.hard & ~TARGET).any()
        assert each.hard.sum() == pytest.approx(WEDGE.sum(), rel=0.15)
        assert (angle_of(each.hard) - angle_of(WEDGE) + 90) % 180 - 90 == pytest.approx(0, abs=17)
        assert each.only_form is not None
        assert "no anatomy.png" in each.only_form
        assert "as large as it was relative to its image" in each.only_form
        brought = cv2.warpAffine(WEDGE.astype(np.float32), each.matrix, SHAPE[::-1]) >= 0.5
        assert (brought & each.hard).sum() > 0.9 * each.hard.sum()
        assert brought.sum() == each.hard.sum()  # there is room for all of it, so nothing is cut off
    rows = [float(np.nonzero(each.hard)[0].mean()) for each in made]
    assert max(rows) - min(rows) > 10
    assert np.ptp([(angle_of(each.hard) - angle_of(WEDGE) + 90) % 180 for each in made]) > 10
    assert np.array_equal(made[3].hard, carried(donor(WEDGE, None), seed=3).hard)
    assert carried(donor(LESION, BODY)).only_form is None


@pytest.mark.parametrize(
    ("own", "other", "height", "width"),
    [([0.5, 1.0], 1.0, 0.5, 1), (1.0, [2.0, 1.0], 0.5, 1), (None, 1.0, 1, 1), (1.0, None, 1, 1)],
)
def test_its_size_is_that_in_mm_where_both_are_known(own: Any, other: Any, height: float, width: float) -> None:
    lesion = rectangle((30, 100), (16, 16), 0)
    found = carry(donor(lesion, None, None, own), BODY, SHAPE, 5, other)
    assert found.hard.sum() == pytest.approx(height * width * lesion.sum(), rel=0.15)
    (_, _, wide, high) = cv2.boundingRect(found.hard.astype(np.uint8))
    assert high / wide == pytest.approx(height / width, abs=0.3)
    assert ("in mm" in str(found.only_form)) == (own is not None and other is not None)


def test_images_of_other_sizes_are_taken_to_show_as_much() -> None:
    target = np.kron(TARGET, np.ones((2, 2))) > 0
    made = carry(donor(LESION, None), target, target.shape, 0).hard
    assert made.sum() == pytest.approx(4 * LESION.sum(), rel=0.1)


def test_a_form_larger_than_the_vertebra_is_cut_with_its_soft_border() -> None:
    wide = rectangle((60, 50), (46, 32), 20)
    soft = np.maximum(cv2.GaussianBlur(wide.astype(np.float32), (0, 0), 2), wide)
    made = carried(donor(wide, None, soft))
    assert not (made.hard & ~TARGET).any()
    assert made.hard.sum() > 0.8 * TARGET.sum()
    assert made.soft is not None
    assert (made.soft[made.hard] == 1).all()
    assert made.only_form


ELSEWHERE = rectangle((20, 100), (9, 9), 0)
HOLLOW = TARGET & ~rectangle((80, 70), (34, 22), 20)
REFUSED = {
    "the prompt's sample marks no vertebra": (donor(LESION, np.zeros_like(BODY)), TARGET),
    "the image marks no vertebra": (donor(LESION, BODY), None),
    "the lesion of the prompt's sample lies outside its vertebra": (
        donor(ELSEWHERE, BODY),
        TARGET,
    ),
    "a vertebra is smaller than 4 x 4 pixels": (donor(LESION, BODY), rectangle((50, 50), (30, 1), 0)),
    "too little of the lesion would lie inside the image's vertebra": (donor(LESION, BODY), HOLLOW),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_carried_is_refused_by_reason(reason: str) -> None:
    given, target = REFUSED[reason]
    with pytest.raises(NotCarried, match=reason):
        carried(given, target)


def test_a_form_far_too_large_is_refused() -> None:
    with pytest.raises(NotCarried, match="too little of the lesion would lie inside the image's vertebra"):
        carried(donor(rectangle((60, 50), (100, 80), 0), None))


def test_sample_without_a_mask_has_nothing_to_carry() -> None:
    with pytest.raises(NotCarried, match="the prompt's sample has no mask"):
        read_donor(Sample("s", Path("s"), None, "lesion", (0, 0, 0, 0), "p"))
