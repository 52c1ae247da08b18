"""Masks, soft masks and label maps of a sample, alone and against each other: what is refused, and what is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ldm.core.errors import FileError
from ldm.data import regions
from ldm.data.folders import read_sample
from ldm.data.masks import read_anatomy, soften
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.phantom.spines import render_phantom

SIZE = 96
Write = Callable[..., Path]


def disc(radius: float, row: int = 48, column: int = 48) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.hypot(rows - row, columns - column) < radius


def spine() -> np.ndarray:
    """A label map: three bodies of which the middle one is the target, discs, and a canal."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[:, 66:76] = 4
    for top, label in ((4, 2), (36, 1), (68, 2)):
        labels[top : top + 24, 24:64] = label
        labels[top + 25 : top + 31, 26:62] = 3
    return labels


def sample(folder: Path, write_sample: Write, **given: Any) -> Sample:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    regions = ("mask", "soft_mask", "anatomy")
    arrays = {
        key: value.astype(np.uint8) * np.uint8(255) if np.asarray(value).dtype == np.bool_ else value
        for key, value in given.items()
        if key in regions
    }
    texts = {key: value for key, value in given.items() if key not in regions}
    return read_sample("s", write_sample(folder, image=image, **{"mask": disc(10) * np.uint8(255), **arrays}, **texts))


def test_a_sound_sample_has_no_notes(tmp_path: Path, write_sample: Write) -> None:
    soft = np.rint(255 * soften(disc(10), 8)).astype(np.uint8)
    assert sample(tmp_path / "a", write_sample, soft_mask=soft, anatomy=spine()).notes == ()
    assert sample(tmp_path / "b", write_sample, prompt="healthy", mask=spine() == 1, anatomy=spine()).notes == ()


# ------------------------------------------------------------------------------------------------ polarity


def test_a_mask_that_marks_all_around_is_refused_as_inverted(tmp_path: Path, write_sample: Write) -> None:
    with pytest.raises(FileError, match=r"mask\.png: marks the whole border and 97% of the image: inverted\?"):
        sample(tmp_path / "a", write_sample, mask=~disc(10))
    with pytest.raises(FileError, match=r"mask\.png: marks the whole border and 97% of the image: inverted\?"):
        sample(tmp_path / "b", write_sample, prompt="healthy", mask=~disc(10))
    with pytest.raises(FileError, match="and 100% of the image"):
        sample(tmp_path / "c", write_sample, mask=np.ones((SIZE, SIZE), bool))
    assert sample(tmp_path / "d", write_sample, prompt="healthy", mask=np.ones((SIZE, SIZE), bool)).notes == ()


@pytest.mark.parametrize("mask", [~disc(20, 48, 0), disc(44)])
def test_a_mask_that_marks_most_is_named(tmp_path: Path, write_sample: Write, mask: np.ndarray) -> None:
    assert regions.MOSTLY_NOTE in sample(tmp_path, write_sample, mask=mask).notes


@pytest.mark.parametrize("mask", [disc(20) & ~disc(18), np.indices((SIZE, SIZE)).sum(axis=0) % 2 == 0])
def test_an_outline_or_a_dithered_picture_is_named(tmp_path: Path, write_sample: Write, mask: np.ndarray) -> None:
    assert regions.OUTLINE_NOTE in sample(tmp_path, write_sample, mask=mask).notes


def test_an_image_that_is_cut_to_the_lesion_is_no_mask(tmp_path: Path, write_sample: Write) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((SIZE, SIZE)), (0, 0), 3)
    image = np.rint(np.interp(noise, [noise.min(), noise.max()], [60, 255])).astype(np.uint8)
    cut = np.where(disc(20), image, 0).astype(np.uint8)
    for number, name in enumerate(("mask", "soft_mask")):
        files = {"image": image, "mask": disc(20) * np.uint8(255), name: cut}
        with pytest.raises(FileError, match="looks like the image itself"):
            read_sample("s", write_sample(tmp_path / str(number), **files))


def test_a_soft_inverted_mask_is_refused(tmp_path: Path, write_sample: Write) -> None:
    levels = 255 - np.rint(255 * soften(disc(20), 16)).astype(np.uint8)
    with pytest.raises(FileError, match=r"inverted|hardly anywhere"):
        sample(tmp_path, write_sample, mask=levels)


# ------------------------------------------------------------------------------------------------ soft_mask.png


def test_a_soft_mask_of_another_place_is_refused(tmp_path: Path, write_sample: Write) -> None:
    soft = np.rint(255 * soften(disc(10, 20, 20), 8)).astype(np.uint8)
    with pytest.raises(FileError, match=r"soft_mask\.png: lies elsewhere than the mask beside it"):
        sample(tmp_path, write_sample, soft_mask=soft)


@pytest.mark.parametrize(
    ("lesion", "note"),
    [
        (disc(10) | disc(8, 80, 80), regions.BEYOND_NOTE),
        (disc(30), regions.BEYOND_NOTE),
        (disc(4, 48, 42), regions.SHORT_NOTE),
        (~disc(30, 0, 0), regions.BEYOND_NOTE),
    ],
)
def test_a_soft_mask_that_does_not_fit_its_mask_is_named(
    tmp_path: Path, write_sample: Write, lesion: np.ndarray, note: str
) -> None:
    soft = np.rint(255 * soften(lesion, 4)).astype(np.uint8)
    assert note in sample(tmp_path, write_sample, soft_mask=soft).notes


@pytest.mark.parametrize("feather", [0, 1, 6, 20, 60])
def test_any_feather_fits_its_mask(tmp_path: Path, write_sample: Write, feather: float) -> None:
    for number, lesion in enumerate((disc(1), disc(5), disc(10) & disc(10, 40, 40), disc(2) | disc(3, 60, 60))):
        soft = np.rint(255 * soften(lesion, feather)).astype(np.uint8)
        said = set(sample(tmp_path / str(number), write_sample, mask=lesion, soft_mask=soft).notes)
        assert said <= {regions.EVERYWHERE_NOTE, regions.STRAY_NOTE}


def test_a_soft_mask_that_is_nowhere_0_is_named(tmp_path: Path, write_sample: Write) -> None:
    levels = np.maximum(np.rint(255 * soften(disc(14), 16)).astype(np.uint8), np.where(disc(60), 3, 0).astype(np.uint8))
    assert regions.EVERYWHERE_NOTE in sample(tmp_path / "a", write_sample, mask=levels).notes
    assert regions.EVERYWHERE_NOTE in sample(tmp_path / "b", write_sample, soft_mask=levels).notes


# ------------------------------------------------------------------------------------------------ anatomy.png


def read(folder: Path, image: Image.Image, name: str = "anatomy.png", **options: Any) -> np.ndarray:
    image.save(folder / name, **options)
    return read_anatomy(folder / name, (SIZE, SIZE))


def palette_image(indices: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(colours)
    return image


def test_label_maps_of_any_sound_kind_are_read_alike(tmp_path: Path) -> None:
    labels = spine()
    opaque = np.full((SIZE, SIZE, 1), 255, np.uint8)
    images = {
        "grey.png": Image.fromarray(labels),
        "rgb.png": Image.fromarray(labels[..., None].repeat(3, axis=2)),
        "alpha.png": Image.fromarray(np.concatenate([labels[..., None].repeat(3, axis=2), opaque], axis=2)),
        "colours.png": palette_image(labels, [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0]),
        "black.png": palette_image(labels, [0, 0, 0] * 5),
        "scaled.png": palette_image(labels, [grey for k in range(5) for grey in [60 * k] * 3]),
        "deep.png": Image.fromarray(labels.astype(np.uint16)),
        "grey.tif": Image.fromarray(labels),
        "grey.bmp": Image.fromarray(labels),
    }
    for name, image in images.items():
        np.testing.assert_array_equal(read(tmp_path, image, name), labels, err_msg=name)


def test_a_palette_in_another_order_is_refused(tmp_path: Path) -> None:
    """Programs that make files smaller turn grey levels into a palette, and number it as they like."""
    order = np.array([3, 0, 1, 4, 2], np.uint8)  # the index of each label
    for scale in (1, 60):
        shades = [grey for index in range(5) for grey in [scale * int(np.flatnonzero(order == index)[0])] * 3]
        with pytest.raises(FileError, match="its palette has grey levels in another order than its indices"):
            read(tmp_path, palette_image(order[spine()], shades))


def test_a_label_map_in_a_tiff_with_jpeg_inside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="a label map as JPEG"):
        read(tmp_path, Image.fromarray(spine()), "anatomy.tif", compression="jpeg")


@pytest.mark.parametrize("filter_", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("factor", [0.5, 0.7, 0.8, 1.3, 2.0, 3.7])
def test_an_interpolated_label_map_is_refused(tmp_path: Path, filter_: Image.Resampling, factor: float) -> None:
    """Between 0 and 2 lies 1, the target."""
    for index in range(4):
        labels = Image.fromarray(render_phantom(0, index, None).anatomy)
        size = (round(labels.width * factor), round(labels.height * factor))
        labels.resize(size, filter_).save(tmp_path / "anatomy.png")
        with pytest.raises(FileError, match=r"resized with interpolation|has the levels"):
            read_anatomy(tmp_path / "anatomy.png", size[::-1])
        labels.resize(size, Image.Resampling.NEAREST).save(tmp_path / "anatomy.png")
        assert read_anatomy(tmp_path / "anatomy.png", size[::-1]).max() == 4


def test_a_label_map_numbered_from_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"has the levels 1, 2, no 0; .* numbered from 1\?"):
        read(tmp_path, Image.fromarray(np.where(spine() == 1, 2, 1).astype(np.uint8)))


def test_an_inverted_label_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="label 1 lies all around the image"):
        read(tmp_path, Image.fromarray((spine() != 1).astype(np.uint8)))


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (np.where(spine() == 1, 2, spine()), regions.NO_TARGET_NOTE),
        (np.where(spine() == 2, 1, spine()), regions.TARGETS_NOTE),
        (np.roll(spine(), 32, axis=0), regions.OUTSIDE_NOTE),
    ],
)
def test_a_strange_label_map_is_named(tmp_path: Path, write_sample: Write, labels: np.ndarray, note: str) -> None:
    assert note in sample(tmp_path, write_sample, anatomy=labels.astype(np.uint8)).notes


def test_a_mirrored_label_map_whose_target_misses_the_lesion_is_named(tmp_path: Path, write_sample: Write) -> None:
    labels = np.ascontiguousarray(np.where(disc(14, 48, 30), 1, 0).astype(np.uint8)[:, ::-1])
    found = sample(tmp_path, write_sample, mask=disc(8, 48, 28), anatomy=labels)
    assert found.notes == (regions.OUTSIDE_NOTE,)


def test_masks_in_one_bit_files_keep_their_polarity(tmp_path: Path, write_sample: Write) -> None:
    lesion, image = disc(10), np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    for number, options in enumerate(({"compression": "group4"}, {"compression": None}, {"tiffinfo": {262: 0}})):
        folder = write_sample(tmp_path / str(number), image=image, mask=None)
        Image.fromarray(lesion).save(folder / "mask.tif", **options)
        found = read_sample("s", folder)
        assert found.notes == ()
        assert np.isclose(found.box[2], 19 / SIZE)
    write_png(tmp_path / "0" / "image.png", np.zeros((SIZE, SIZE + 1), np.uint8))
    with pytest.raises(FileError, match="has 96 x 96 pixels, its image 97 x 96"):
        read_sample("s", tmp_path / "0")
