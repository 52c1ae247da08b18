"""The body of a vertebra told from its arch: on vertebrae whose bodies are known, tilted, thick-sliced, cut off."""

import numpy as np
import pytest

from ldm.volumes.bodies import NOT_FOUND, OUTSIDE, bodies

LEVELS = {31: "L1", 30: "L2", 29: "L3", 28: "L4"}
TILTS = {31: -12, 30: 0, 29: 12, 28: 25}  # degrees about the x axis, as in a lordosis
CANAL = 79


def spine(spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Labels with arches, pedicles, processes and a canal (axes to left, posterior, head), and the bodies alone."""
    extent = (100, 110, 130)  # mm
    axes = [np.arange(round(size / step)) * step for size, step in zip(extent, spacing, strict=True)]
    x, y, z = np.meshgrid(axes[0] - 50, axes[1] - 40, axes[2] - 65, indexing="ij")
    labels, only = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.uint8)
    for place, (number, tilt) in enumerate(TILTS.items()):
        angle, height = np.deg2rad(tilt), 48 - 32 * place
        back = -0.0006 * height**2  # the spine is curved
        v = (y - back) * np.cos(angle) + (z - height) * np.sin(angle)
        w = -(y - back) * np.sin(angle) + (z - height) * np.cos(angle)
        body = ((x / 22) ** 2 + (v / 16) ** 2 < 1) & (abs(w) < 13)
        pedicles = (abs(abs(x) - 14) < 4) & (v > 5) & (v < 28) & (abs(w - 4) < 6)
        laminae = (abs(x) < 18) & (abs(v - 34) < 4) & (abs(w) < 9)
        laminae |= (abs(abs(x) - 15) < 3.5) & (v > 20) & (v < 38) & (abs(w) < 8)
        spinous = (abs(x) < 3) & (v > 34) & (v < 58) & (abs(w + 4) < 7)
        transverse = (abs(abs(x) - 32) < 14) & (abs(v - 26) < 4) & (abs(w - 3) < 4)
        labels[pedicles | laminae | spinous | transverse | body] = number
        only[body] = number
        inside = (x / 9) ** 2 + ((v - 22.5) / 6) ** 2 < 1
        labels[inside & (abs(w) < 17) & (labels == 0)] = CANAL
    return labels, only


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def width(mask: np.ndarray, spacing: float) -> float:
    """Front to back, in mm."""
    places = np.flatnonzero(mask.any(axis=(0, 2)))
    return float(places[-1] - places[0] + 1) * spacing


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 0.7, 0.7), (0.9, 0.9, 2.5), (3.0, 3.0, 3.0)])
@pytest.mark.parametrize("canal", [True, False], ids=["canal", "no canal"])
def test_the_arch_is_cut_off(spacing: tuple[float, float, float], canal: bool) -> None:
    labels, only = spine(spacing)
    if not canal:
        labels[labels == CANAL] = 0
    found, notes = bodies(labels, LEVELS | ({CANAL: "canal"} if canal else {}), spacing)
    assert notes == {}
    for number in LEVELS:
        truth = only == number
        assert dice(found == number, truth) > 0.93, (
            number,
            dice(found == number, truth),
            dice(labels == number, truth),
        )
        assert width(labels == number, spacing[1]) > width(truth, spacing[1]) + 25
        assert width(found == number, spacing[1]) < width(truth, spacing[1]) + 7
    assert not (found[labels != found]).any()  # nothing is added or renumbered
    assert np.array_equal(found == CANAL, labels == CANAL)


def test_labels_of_bodies_alone_stay_as_they_are() -> None:
    _, only = spine((1.0, 1.0, 1.0))
    found, notes = bodies(only, LEVELS, (1.0, 1.0, 1.0))
    assert np.array_equal(found, only)
    assert notes == {}


def test_a_vertebra_that_the_image_cuts_off_keeps_its_body() -> None:
    labels, only = spine((1.0, 1.0, 1.0))
    half = slice(0, 25)  # of L4
    found, _ = bodies(labels[..., half], LEVELS | {CANAL: "canal"}, (1.0, 1.0, 1.0))
    assert dice(found == 28, only[..., half] == 28) > 0.93


def test_an_arch_alone_is_no_vertebra() -> None:
    labels, only = spine((1.0, 1.0, 1.0))
    labels[only == 30] = 0
    found, notes = bodies(labels, LEVELS | {CANAL: "canal"}, (1.0, 1.0, 1.0))
    assert notes == {30: OUTSIDE}
    assert not (found == 30).any()


def test_what_is_all_thin_is_kept_and_said() -> None:
    labels = np.zeros((12, 420, 12), np.uint8)
    labels[5:7, 10:410, 5:7] = 7  # a rod with one thick place
    labels[3:9, 10:16, 3:9] = 7
    found, notes = bodies(labels, {7: "L1"}, (2.0, 2.0, 2.0))
    assert notes == {7: NOT_FOUND}
    assert np.array_equal(found, labels)


def test_c1_and_the_sacrum_are_kept_whole() -> None:
    labels, _ = spine((2.0, 2.0, 2.0))
    found, notes = bodies(labels, {31: "C1", 28: "sacrum"}, (2.0, 2.0, 2.0))
    assert np.array_equal(found, labels)
    assert notes == {}
