"""Pasted lesions: their pixels, their contrast, 16 bits, and gradients blended as cv2.seamlessClone does."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from test_carrying import BODY, LESION, SHAPE

from ldm.data.masks import soften
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.transfer.carrying import Donor
from ldm.transfer.pasting import paste

IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


def spine(seed: int) -> np.ndarray:
    """Levels HxW, float: a bright body with texture on a dark ground."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 30, SHAPE), (0, 0), 1.5)
    return np.clip(60 + 70 * BODY + noise, 5, 220)


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """A donor whose image is written with the dtype that is asked for: a dark lesion with a bright middle."""

    def made(dtype: type = np.uint8, factor: float = 1.0) -> Donor:
        levels = spine(1)
        levels[LESION] = 25 + 0.2 * levels[LESION]
        write_png(tmp_path / "image.png", np.rint(levels * factor).astype(dtype))
        sample = Sample("s", tmp_path / "image.png", Path("m"), "lesion", (0, 0, 0, 0), "p")
        return Donor(sample, LESION, None, BODY)

    return made


def test_pasted_onto_its_own_image_a_lesion_stays_as_it_is(source: Any) -> None:
    donor = source()
    healthy = np.rint(spine(1)).astype(np.uint8)
    made = paste(donor, healthy, BODY, LESION.astype(np.float32), IDENTITY)
    assert np.abs(made - donor.image)[LESION].max() < 3  # the body's level is measured with and without the lesion
    assert np.array_equal(made[~LESION], healthy[~LESION])


@pytest.mark.parametrize(("dtype", "gain", "offset"), [(np.uint8, 0.5, 40), (np.uint16, 120, 3000)])
def test_contrast_becomes_that_of_the_image(source: Any, dtype: type, gain: float, offset: float) -> None:
    """8 bits into 16 too: the levels are the image's own, far beyond 255."""
    healthy = np.rint(spine(1) * gain + offset).astype(dtype)
    donor = source()
    made = paste(donor, healthy, BODY, LESION.astype(np.float32), IDENTITY)
    wanted = donor.image.astype(float) * gain + offset
    assert np.abs(made - wanted)[LESION].max() < 0.05 * gain * 255
    assert made[LESION].mean() < healthy[LESION].mean() - 40 * gain


def test_colour_follows_the_image(source: Any) -> None:
    healthy = np.repeat(np.rint(spine(2)).astype(np.uint8)[..., None], 3, axis=2)
    made = paste(source(), healthy, None, soften(LESION, 4.0), IDENTITY)
    assert made.shape == healthy.shape
    assert np.array_equal(made[..., 0], made[..., 2])


def test_poisson_meets_the_image_at_the_border_and_agrees_with_opencv(source: Any) -> None:
    donor, healthy = source(), np.rint(spine(2)).astype(np.uint8)
    inside = cv2.dilate(LESION.astype(np.uint8), np.ones((15, 15), np.uint8))  # OpenCV leaves three pixels of it out
    ours = paste(donor, healthy, BODY, inside.astype(np.float32), IDENTITY, "poisson")
    assert np.array_equal(ours[inside == 0], healthy[inside == 0])
    grey = [np.repeat(image[..., None], 3, axis=2) for image in (donor.image, healthy)]
    x, y, width, height = cv2.boundingRect(inside)
    centre = (x + width // 2, y + height // 2)
    theirs = cv2.seamlessClone(*grey, inside * 255, centre, cv2.NORMAL_CLONE)[..., 0].astype(float)
    core = cv2.erode(inside, np.ones((7, 7), np.uint8)) > 0
    assert np.corrcoef(ours[core], theirs[core])[0, 1] > 0.97
    assert np.abs(ours[core] - theirs[core]).mean() < 8

    def jump(image: np.ndarray) -> float:
        step = np.abs(np.diff(image, axis=1))
        return float(step[np.diff(inside.astype(int), axis=1) != 0].mean())

    bright = np.clip(healthy.astype(float) + 60, 0, 255).astype(np.uint8)  # a healthy image of other levels
    blended = paste(donor, bright, None, inside.astype(np.float32), IDENTITY, "poisson")
    assert jump(blended) < 1.5 * jump(bright.astype(float))
