"""Masks from files, soft masks, lesion-shaped masks."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.config import DataConfig
from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.data.folders import read_sample
from ldm.data.masks import (
    Feather,
    Mask,
    equivalent_diameter,
    lesion_shaped,
    read_anatomy,
    read_mask,
    region_for,
    soft_mask_for,
    soften,
)
from ldm.data.png import write_png
from ldm.data.preparation import prepare

FEW = settings(max_examples=30, deadline=None)


@st.composite
def hard_masks(draw: st.DrawFn) -> np.ndarray:
    """One to three rectangles or single pixels in a small image."""
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    hard = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        hard[top : top + draw(st.integers(1, 8)), left : left + draw(st.integers(1, 8))] = True
    return hard


def distance_to(hard: np.ndarray) -> np.ndarray:
    """Euclidean distance to the nearest pixel of the mask, by brute force."""
    points = np.argwhere(hard)
    grid = np.stack(np.indices(hard.shape), axis=-1)[:, :, None]
    return np.sqrt(((grid - points) ** 2).sum(axis=-1)).min(axis=-1)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("value", [1, 38, 255])
def test_two_levels_are_a_hard_mask_whatever_the_upper_one_is(tmp_path: Path, value: int) -> None:
    array = np.zeros((4, 5), np.uint8)
    array[1, 2] = value
    write_png(tmp_path / "mask.png", array)
    mask = read_mask(tmp_path / "mask.png", (4, 5, 3))
    assert not mask.soft
    assert mask.values.dtype == np.float32
    np.testing.assert_array_equal(mask.values, array > 0)
    np.testing.assert_array_equal(mask.hard, array > 0)


def test_palette_label_one_bit_16_bit_rgb_and_full_masks_are_hard(tmp_path: Path) -> None:
    region = np.zeros((4, 5), bool)
    region[1:3, 2] = True
    palette = Image.fromarray(region.astype(np.uint8))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(region).save(tmp_path / "bit.png")
    write_png(tmp_path / "deep.png", region.astype(np.uint16) * 1000)
    write_png(tmp_path / "rgb.png", np.stack([region.astype(np.uint8) * 255] * 3, axis=-1))
    for name in ("palette", "bit", "deep", "rgb"):
        mask = read_mask(tmp_path / f"{name}.png", region.shape)
        assert not mask.soft
        np.testing.assert_array_equal(mask.values, region)
    write_png(tmp_path / "full.png", np.full((4, 5), 255, np.uint8))
    assert read_mask(tmp_path / "full.png").hard.all()


def test_more_levels_are_soft_and_used_as_they_are(tmp_path: Path) -> None:
    array = np.array([[0, 0, 0, 20, 64, 100, 128, 170, 200]], np.uint8)
    write_png(tmp_path / "mask.png", array)
    mask = read_mask(tmp_path / "mask.png", (1, 9))
    assert mask.soft
    np.testing.assert_allclose(mask.values, np.rint(array / 200 * 255) / 255, rtol=1e-6)
    np.testing.assert_array_equal(soft_mask_for(mask, Feather(9, "pixels")), mask.values)


def test_deep_soft_mask_is_what_its_8_bit_file_will_say(tmp_path: Path) -> None:
    array = np.array([[0, 100, 128, 129, 30000, 65535]], np.uint16)  # 128 / 65535 is just below half a level of 255
    write_png(tmp_path / "mask.png", array)
    values = read_mask(tmp_path / "mask.png", (1, 6), soft=True).values
    np.testing.assert_array_equal(values, np.array([[0, 0, 0, 1, 117, 255]], np.float32) / 255)
    write_png(tmp_path / "again.png", np.rint(values * 255).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(tmp_path / "again.png", (1, 6), soft=True).values, values)


def test_empty_mask_is_read_and_says_so(tmp_path: Path) -> None:
    write_png(tmp_path / "mask.png", np.zeros((4, 5), np.uint8))
    mask = read_mask(tmp_path / "mask.png", (4, 5))
    assert mask.empty
    assert not mask.soft


@pytest.mark.parametrize(
    ("levels", "reason"),
    [([0, 1, 2, 3], "4 levels with a maximum of 3"), ([0, 60, 127], "maximum of 127"), ([100, 200], "maximum of 200")],
)
def test_anything_else_is_refused_naming_the_maximum(tmp_path: Path, levels: list[int], reason: str) -> None:
    write_png(tmp_path / "mask.png", np.array([levels], np.uint8))
    with pytest.raises(FileError, match=rf"mask\.png: .*{reason}"):
        read_mask(tmp_path / "mask.png")


def test_mask_of_several_colours_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "mask.png", np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0]]], np.uint8))
    with pytest.raises(FileError, match="2 colours besides black"):
        read_mask(tmp_path / "mask.png")


def test_mask_and_anatomy_of_another_size_are_refused_with_both_sizes(tmp_path: Path) -> None:
    write_png(tmp_path / "mask.png", np.zeros((4, 5), np.uint8))
    for read in (read_mask, read_anatomy):
        with pytest.raises(FileError, match="has 5 x 4 pixels, its image 4 x 5"):
            read(tmp_path / "mask.png", (5, 4))


def test_unrotated_mask_of_a_rotated_image_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4)).save(tmp_path / "image.png", exif=exif)
    write_png(tmp_path / "mask.png", np.zeros((4, 8), np.uint8))
    from ldm.data.images import read_image

    with pytest.raises(FileError, match="has 8 x 4 pixels, its image 4 x 8"):
        read_mask(tmp_path / "mask.png", read_image(tmp_path / "image.png").shape)


# ------------------------------------------------------------------------------------------------ soft masks


@FEW
@given(hard_masks(), st.floats(0.1, 15))
def test_soft_mask_is_one_inside_zero_beyond_and_falls_with_distance(hard: np.ndarray, feather: float) -> None:
    soft = soften(hard, feather)
    distance = distance_to(hard)
    assert soft.dtype == np.float32
    assert (soft[hard] == 1).all()
    assert (soft[distance >= feather] == 0).all()
    order = np.argsort(distance, axis=None)
    assert (np.diff(soft.ravel()[order]) <= 0).all()
    levels = soft * np.float32(255)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


@FEW
@given(hard_masks(), st.floats(0.1, 15))
def test_soft_mask_survives_its_file_exactly(
    tmp_path_factory: pytest.TempPathFactory, hard: np.ndarray, feather: float
) -> None:
    soft = soften(hard, feather)
    path = tmp_path_factory.getbasetemp() / "soft.png"
    write_png(path, np.rint(soft * 255).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(path, hard.shape, soft=True).values, soft)


def test_border_of_a_straight_edge_is_dilation_then_truncated_blur() -> None:
    hard = np.zeros((9, 120), bool)
    hard[:, :40] = True
    r = 12
    offsets = np.arange(-r, r + 1)
    kernel = np.exp(-0.5 * (offsets / (r / 2)) ** 2)
    dilated = (np.arange(120) < 40 + r).astype(float)
    expected = np.convolve(dilated, kernel / kernel.sum(), mode="same")
    assert np.abs(soften(hard, 2 * r)[4, 20:100] - expected[20:100]).max() < 0.05
    assert soften(hard, 2 * r)[4, 39 + r] == pytest.approx(0.5, abs=0.01)


def test_without_feather_or_lesion_the_mask_stays_as_it_is() -> None:
    hard = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(soften(hard, 0), hard)
    np.testing.assert_array_equal(soften(np.zeros((3, 3), bool), 4), np.zeros((3, 3)))


def test_feather_units() -> None:
    hard = np.zeros((50, 50), bool)
    cv2_disc = np.hypot(*np.mgrid[-25:25, -25:25]) <= 10
    hard |= cv2_disc
    assert equivalent_diameter(hard) == pytest.approx(20, rel=0.03)
    assert Feather(7, "pixels").pixels(hard) == (7, 7)
    assert Feather().pixels(hard) == pytest.approx((5, 5), rel=0.03)
    assert Feather(3, "mm").pixels(hard, 0.5) == (6, 6)
    assert Feather(3, "mm").pixels(hard, [0.4, 0.6]) == pytest.approx((7.5, 5))
    with pytest.raises(MedSoftError, match="spacing_mm"):
        Feather(3, "mm").pixels(hard)


@pytest.mark.parametrize("spacing", [(2.0, 0.977), (0.6, 3.0)])
def test_feather_in_mm_is_as_wide_in_every_direction(spacing: tuple[float, float]) -> None:
    hard = np.zeros((41, 61), bool)
    hard[18:23, 25:36] = True
    soft = soft_mask_for(Mask(hard.astype(np.float32)), Feather(6, "mm"), list(spacing))
    marked = np.argwhere(hard)
    gaps = (np.stack(np.mgrid[:41, :61], axis=-1)[:, :, None] - marked) * spacing  # mm, to every pixel of the lesion
    distance = np.hypot(gaps[..., 0], gaps[..., 1]).min(axis=2)
    assert (soft[distance >= 6] == 0).all()
    assert (soft[distance < 5.5] > 0).all()
    order = np.argsort(distance, axis=None, kind="stable")
    assert (np.diff(soft.ravel()[order]) <= 0).all()
    at_half = soft[(distance > 2.9) & (distance < 3.1)]
    assert ((at_half > 0.4) & (at_half < 0.6)).all()


@pytest.mark.parametrize(("amount", "unit"), [(-1, "pixels"), (math.nan, "mm")])
def test_impossible_feather_is_refused(amount: float, unit: str) -> None:
    with pytest.raises(UsageError, match=r"feather\."):
        Feather(amount, unit)


def test_soft_mask_of_a_sample_prefers_its_own_file(tmp_path: Path, write_sample: Callable[..., Path]) -> None:
    ramp = np.zeros((20, 24), np.uint8)
    ramp[5, 8:12] = (64, 128, 255, 128)
    own = read_sample("a", write_sample(tmp_path / "a", soft_mask=ramp))
    np.testing.assert_allclose(prepare(own, DataConfig(), 0, 0).soft, ramp / 255, rtol=1e-6)
    made = read_sample("b", write_sample(tmp_path / "b", meta={"spacing_mm": 2.0}))
    hard = read_mask(made.mask).hard
    feathered = prepare(made, DataConfig(feather=12, feather_unit="mm"), 0, 0).soft
    np.testing.assert_array_equal(feathered, soften(hard, 6))
    healthy = read_sample("c", write_sample(tmp_path / "c", prompt="healthy", mask=None))
    with pytest.raises(MedSoftError, match="c: healthy, and its vertebra is not known"):
        prepare(healthy, DataConfig(), 0, 0)


# ------------------------------------------------------------------------------------------------ drawn masks


@FEW
@given(hard_masks(), st.integers(0, 2**63 - 1))
def test_lesion_shaped_is_inside_connected_and_a_function_of_the_seed(region: np.ndarray, seed: int) -> None:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if min(np.ptp(rows), np.ptp(columns)) < 3:
        with pytest.raises(MedSoftError, match="expected at least 4 x 4"):
            lesion_shaped(region, seed)
        return
    blob = lesion_shaped(region, seed)
    assert blob.any()
    assert not (blob & ~region).any()
    assert cv2.connectedComponents(blob.astype(np.uint8), connectivity=4)[0] == 2
    np.testing.assert_array_equal(blob, lesion_shaped(region, seed))


def test_lesion_shaped_masks_vary_in_size_place_and_shape() -> None:
    region = np.hypot(*np.mgrid[-30:30, -40:40]) < 29
    blobs = [lesion_shaped(region, seed) for seed in range(40)]
    sizes = np.array([equivalent_diameter(blob) for blob in blobs])
    assert sizes.min() > 0.25 * 57
    assert sizes.max() < 0.8 * 57
    assert np.ptp(sizes) > 10
    centres = np.array([np.argwhere(blob).mean(axis=0) for blob in blobs])
    assert (centres.std(axis=0) > 3).all()
    outlines = [cv2.findContours(b.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0][0] for b in blobs]
    solidity = [cv2.contourArea(o) / cv2.contourArea(cv2.convexHull(o)) for o in outlines]
    assert min(solidity) < 0.92 < 0.96 < max(solidity)


def test_lesion_shaped_refuses_an_empty_region() -> None:
    with pytest.raises(MedSoftError, match="0 x 0 pixels"):
        lesion_shaped(np.zeros((9, 9), bool), 1)


def test_region_is_the_target_vertebra_else_the_own_mask_else_the_box(
    tmp_path: Path, write_sample: Callable[..., Path]
) -> None:
    anatomy = np.zeros((20, 24), np.uint8)
    anatomy[2:9, 3:9], anatomy[12:19, 3:9] = 1, 2
    folder = write_sample(tmp_path / "a", prompt="healthy", anatomy=anatomy)
    sample = read_sample("a", folder)
    np.testing.assert_array_equal(region_for(sample, (20, 24)), anatomy == 1)
    write_png(folder / "anatomy.png", np.full((20, 24), 2, np.uint8))
    own = read_mask(folder / "mask.png").hard
    np.testing.assert_array_equal(region_for(sample, (20, 24)), own)
    boxed = replace(sample, anatomy=None, mask=None)
    np.testing.assert_array_equal(region_for(boxed, (20, 24)), own)  # the mask is a rectangle: its box is itself
    nowhere = replace(boxed, box=(0.0, 0.0, 0.0, 0.0))
    assert region_for(nowhere, (20, 24)) is None


def test_mask_threshold_is_one_half() -> None:
    mask = Mask(np.array([[0.49, 0.5, 1.0]], np.float32), soft=True)
    np.testing.assert_array_equal(mask.hard, [[False, True, True]])
