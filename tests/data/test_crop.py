"""The part of an image that the model sees: its side, its places, enlarged or reduced, and back."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.core.errors import MedSoftError
from ldm.data.crop import CropWindow, Fit
from ldm.data.masks import Feather, Mask, extents, soft_mask_for

FEW = settings(max_examples=30, deadline=None)


def disc(shape: tuple[int, int], row: int, column: int, diameter: float) -> np.ndarray:
    """The soft mask of a disc with the default feather."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    hard = np.hypot(y - row, x - column) < diameter / 2
    return soft_mask_for(Mask(hard.astype(np.float32)), Feather())


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Fit]:
    """An image, a mask with one soft rectangle, and a fit."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    mask = np.zeros((height, width), np.float32)
    mask[top:bottom, left:right] = draw(st.sampled_from([0.3, 1.0]))
    mask[(top + bottom) // 2, (left + right) // 2] = 1
    mode, least = draw(st.sampled_from(["crop", "pad", "resize"])), draw(st.sampled_from([0.0, 3.5, 64.0]))
    fit = Fit(mode, draw(st.integers(4, 24)), draw(st.sampled_from([1.0, 2.0])), least)
    return np.random.default_rng(height * 41 + width).random((height, width)).astype(np.float32), mask, fit


@FEW
@given(scenes())
def test_window_holds_the_whole_support_and_returns_to_its_place(scene: tuple[np.ndarray, np.ndarray, Fit]) -> None:
    image, mask, fit = scene
    window = fit.crop_window(image.shape, mask)
    rows, columns = np.nonzero(mask)
    assert window.top <= rows.min()
    assert rows.max() < window.top + window.height
    assert window.left <= columns.min()
    assert columns.max() < window.left + window.width
    small = window.forward(image)
    assert small.shape == (fit.size, fit.size)
    assert small.dtype == np.float32
    assert image.min() <= small.min()
    assert small.max() <= image.max()
    back = window.backward(np.full((fit.size, fit.size), 9.0), image)
    assert (back[mask > 0] == 9).all()
    assert ((back == 9) | (back == image)).all()


@FEW
@given(scenes())
def test_no_lesion_is_lost_at_any_size(scene: tuple[np.ndarray, np.ndarray, Fit]) -> None:
    image, mask, fit = scene
    window = fit.crop_window(image.shape, mask)
    small = window.forward_mask(mask)
    assert small.shape == (fit.size, fit.size)
    assert small.max() == mask.max() == 1
    np.testing.assert_array_equal(small >= 0.5, window.forward_mask(mask >= 0.5) > 0)
    dot = np.zeros_like(mask)
    dot[np.unravel_index(mask.argmax(), mask.shape)] = 1
    assert window.forward_mask(dot).max() == 1


@FEW
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 99), st.booleans())
def test_native_crop_is_pixel_exact_both_ways(height: int, width: int, seed: int, colour: bool) -> None:
    image = np.random.default_rng(seed).random((height, width, 3) if colour else (height, width)).astype(np.float32)
    mask = np.zeros((height, width), np.float32)
    mask[seed % height, seed % width] = 1
    window = Fit("crop", 8, min_crop=8).crop_window(image.shape, mask)
    assert window.height == window.width == window.size == 8
    assert min(window.top, window.left) >= 0
    small = window.forward(image)
    rows, columns = slice(window.top, window.top + 8), slice(window.left, window.left + 8)
    np.testing.assert_array_equal(small, image[rows, columns])
    small[...] = 2
    assert image.max() < 2  # a copy
    np.testing.assert_array_equal(window.backward(window.forward(image), image), image)
    np.testing.assert_array_equal(window.forward_mask(mask), mask[rows, columns])


def test_crop_is_centred_on_the_lesion_with_context_and_stays_inside() -> None:
    mask = np.zeros((200, 300), np.float32)
    mask[90:110, 100:130] = 1
    assert Fit("crop", 32, 2.0, min_crop=32).crop_window(mask.shape, mask) == CropWindow(70, 85, 60, 60, 32)
    mask = np.zeros((200, 300), np.float32)
    mask[0:20, 290:300] = 1
    assert Fit("crop", 32, 2.0, min_crop=32).crop_window(mask.shape, mask) == CropWindow(0, 260, 40, 40, 32)


def test_crop_moves_off_the_lesion_to_hold_a_one_sided_support() -> None:
    mask = np.zeros((200, 300), np.float32)
    mask[100:110, 100:110] = 1
    mask[100:110, 110:130] = 0.2
    assert Fit("crop", 32, 1.0, min_crop=32).crop_window(mask.shape, mask) == CropWindow(89, 98, 32, 32, 32)


def test_pad_repeats_the_border_and_resize_stretches() -> None:
    image = np.arange(8, dtype=np.float32).reshape(2, 4)
    padded = Fit("pad", 4).crop_window(image.shape).forward(image)
    np.testing.assert_array_equal(padded, image[[0, 0, 1, 1]])
    assert Fit("resize", 4).crop_window(image.shape) == CropWindow(0, 0, 2, 4, 4)
    assert Fit("crop", 4).crop_window(image.shape, np.zeros((2, 4))) == Fit("pad", 4).crop_window(image.shape)


def test_channels_follow_the_canvas() -> None:
    window = Fit("pad", 4).crop_window((4, 4))
    colour = np.stack([np.zeros((4, 4)), np.ones((4, 4)), np.full((4, 4), 0.5)], axis=-1)
    np.testing.assert_allclose(window.backward(colour, np.zeros((4, 4))), 0.5)
    assert window.backward(np.ones((4, 4)), np.zeros((4, 4, 3))).shape == (4, 4, 3)


def test_smooth_image_survives_the_way_there_and_back() -> None:
    y, x = np.mgrid[:60, :90] / 90
    image = (0.5 + 0.4 * np.sin(3 * x) * np.cos(2 * y)).astype(np.float32)
    for mode in ("pad", "resize"):
        window = Fit(mode, 48).crop_window(image.shape)
        assert np.abs(window.backward(window.forward(image), image) - image).max() < 0.02


def test_sizes_that_do_not_match_are_refused() -> None:
    with pytest.raises(MedSoftError, match="the image has 5 x 4 pixels, the mask 4 x 5"):
        Fit().crop_window((4, 5), np.zeros((5, 4)))


# ------------------------------------------------------------------------------------------------ the side


@pytest.mark.parametrize(
    ("fit", "spacing", "expected"),
    [
        (Fit(min_crop=64), None, (64, 64)),  # twice the lesion is less
        (Fit(min_crop=0), None, (26, 26)),  # twice 13: the disc of 12 pixels with half of its feather
        (Fit(min_crop=512), None, (512, 512)),  # as crops were when the model's side was their lower bound
        (Fit(min_crop=900), None, (512, 512)),  # no wider than the image
        (Fit(context=10, min_crop=64), None, (130, 130)),
        (Fit(min_crop=20, min_crop_unit="mm"), [0.5, 0.4], (50, 50)),  # 20 mm in both directions
        (Fit(min_crop=20, min_crop_unit="mm"), 0.5, (40, 40)),
        (Fit(mm_per_pixel=0.1), 0.4, (128, 128)),  # 51.2 mm
        (Fit(mm_per_pixel=0.1), [0.8, 0.4], (64, 128)),  # rectangular in pixels, square in mm
        (Fit(mm_per_pixel=1.0), 0.5, (1024, 1024)),  # wider than the image: the scale is what was asked for
    ],
)
def test_side_of_a_crop(fit: Fit, spacing: float | list[float] | None, expected: tuple[int, int]) -> None:
    soft = disc((512, 512), 200, 300, 12)
    window = fit.crop_window(soft.shape, soft, spacing)
    assert (window.height, window.width) == expected
    assert fit.crop_window(soft.shape, soft, spacing, variant=3).height == window.height


@pytest.mark.parametrize(
    ("fit", "key"),
    [(Fit(mm_per_pixel=0.2), r"data\.mm_per_pixel=0\.2"), (Fit(min_crop_unit="mm"), r"data\.min_crop_unit=mm")],
)
def test_lengths_in_mm_need_a_spacing(fit: Fit, key: str) -> None:
    soft = disc((64, 64), 30, 30, 12)
    with pytest.raises(MedSoftError, match=f"^{key}: the sample's meta.json has no spacing_mm; add it .*=pixels$"):
        fit.crop_window(soft.shape, soft)


def test_lesion_larger_than_a_window_in_mm_is_refused_with_what_is_wide_enough() -> None:
    soft = disc((400, 400), 200, 200, 120)
    expected = (
        r"with its soft border has 88\.5 x 177\.0 mm, the window of data\.mm_per_pixel=0\.3 has 153\.6 mm; "
        r"data\.mm_per_pixel=0\.346 is wide"
    )
    with pytest.raises(MedSoftError, match=expected):
        Fit(mm_per_pixel=0.3).crop_window(soft.shape, soft, [1.0, 0.5])
    window = Fit(mm_per_pixel=0.346).crop_window(soft.shape, soft, [1.0, 0.5])
    assert (window.height, window.width) == (177, 354)


def test_a_window_far_wider_than_its_image_is_refused_before_it_takes_any_memory() -> None:
    """A spacing in metres would ask for a window of 262 gigabytes."""
    soft = disc((512, 512), 200, 300, 12)
    expected = r"^data\.mm_per_pixel=0\.5: with spacing_mm 0\.001 .*256000 x 256000 pixels of an image of 512 x 512"
    with pytest.raises(MedSoftError, match=expected):
        Fit(mm_per_pixel=0.5).crop_window(soft.shape, soft, 0.001)
    assert Fit(mm_per_pixel=0.5).crop_window(soft.shape, soft, 0.04).height == 6400


def test_a_window_in_mm_shows_a_disc_in_mm_as_a_disc() -> None:
    y, x = np.mgrid[:300, :400]
    hard = np.hypot((y - 150) * 0.9, (x - 200) * 0.3) < 20  # 40 mm wide, 44 x 133 pixels
    seen = Fit(size=256, mm_per_pixel=0.5).crop_window(hard.shape, hard, [0.9, 0.3]).forward_mask(hard)
    (top, bottom), (left, right) = extents(seen > 0)
    assert abs((bottom - top) - 80) <= 3
    assert abs((right - left) - 80) <= 3


# ------------------------------------------------------------------------------------------------ the places


def test_places_that_only_the_longest_moves_reach_are_found_at_once() -> None:
    """Of two places along each axis the second one needs a move of 99.5 pixels of at most 99.6: one draw in 1,600."""
    mask = np.zeros((900, 900), np.float32)
    mask[295:305, 295:305] = 1
    began = time.process_time()
    windows = {Fit(min_crop=797).crop_window(mask.shape, mask, variant=variant) for variant in range(4)}
    assert {(window.top, window.left) for window in windows} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert time.process_time() - began < 10  # was minutes


@FEW
@given(
    st.tuples(st.integers(8, 80), st.integers(8, 80)),
    st.sampled_from([4.0, 16.0, 40.0, 70.0]),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.integers(1, 30),
    st.integers(0, 99),
)
def test_crops_of_a_lesion_differ_while_there_are_places(
    shape: tuple[int, int], least: float, context: float, diameter: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    soft = disc(shape, int(rng.integers(shape[0])), int(rng.integers(shape[1])), diameter)
    fit = Fit("crop", 32, context, least)
    crops = [fit.crop_window(shape, soft, variant=variant, name=(seed,)) for variant in range(9)]
    assert crops[0] == fit.crop_window(shape, soft)
    assert crops == [fit.crop_window(shape, soft, variant=variant, name=(seed,)) for variant in range(9)]
    (top, bottom), (left, right) = extents(soft > 0)
    for crop in crops:
        assert (crop.height, crop.width) == (crops[0].height, crops[0].width)
        assert crop.top <= top <= bottom <= crop.top + crop.height
        assert crop.left <= left <= right <= crop.left + crop.width
    distinct = len(set(crops))
    assert len(set(crops[:distinct])) == distinct  # the first ones, so that fewer crops are the first ones too
    assert distinct == min(fit.places(soft), 9)
    first, longest = crops[0], max(bottom - top, right - left)
    ends = (shape[0] - first.top - first.height, shape[1] - first.left - first.width)
    if first.height >= max(16, 2 * longest) and min(first.top, first.left, *ends) >= 2:
        assert distinct == 9


def test_a_window_that_is_as_large_as_the_image_has_one_place() -> None:
    soft = disc((512, 512), 200, 300, 12)
    for fit in (Fit(context=50), Fit(min_crop=512)):
        assert fit.places(soft) == 1
        assert len({fit.crop_window(soft.shape, soft, variant=variant) for variant in range(4)}) == 1
    assert len({Fit().crop_window(soft.shape, soft, variant=variant) for variant in range(4)}) == 4
    assert Fit().places(soft) > 4


def test_a_lesion_in_a_corner_keeps_the_window_there() -> None:
    soft = disc((512, 512), 3, 508, 12)
    assert Fit().places(soft) == 1
    assert len({Fit().crop_window(soft.shape, soft, variant=variant) for variant in range(4)}) == 1


# ------------------------------------------------------------------------------------------------ enlarged


@FEW
@given(st.integers(20, 70), st.integers(64, 160), st.integers(0, 99))
def test_an_enlarged_crop_comes_back_where_the_soft_mask_is_0_and_nearly_inside(
    side: int, size: int, seed: int
) -> None:
    """What the model returns unchanged is the image again: the composite's inside has no step that enlarging made."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :120] / 120
    image = (0.5 + 0.3 * np.sin(9 * x + seed) * np.cos(7 * y)).astype(np.float32)
    soft = disc(image.shape, int(rng.integers(120)), int(rng.integers(120)), 12)
    window = Fit("crop", size, 1.0, side).crop_window(image.shape, soft)
    back = window.backward(window.forward(image), image)
    assert np.abs(back - image).max() < 0.02
    drawn = soft * window.backward(np.ones((size, size)), image) + (1 - soft) * image
    np.testing.assert_array_equal(drawn[soft == 0], image[soft == 0])
    np.testing.assert_array_equal(drawn[soft == 1], 1)
