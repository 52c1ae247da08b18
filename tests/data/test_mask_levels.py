"""What the levels of a mask file mean: a hard mask, with noise or a rim or not, a soft one, or labels."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.core.errors import FileError
from ldm.data.masks import Mask, read_anatomy, read_mask, soften, stray_parts
from ldm.data.png import write_png

SIZE = 128


def disc(radius: float, row: int = 64, column: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.hypot(rows - row, columns - column) < radius


def blob(seed: int) -> np.ndarray:
    """A few irregular parts that cover a tenth of the image."""
    field = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((SIZE, SIZE)), (0, 0), 6)
    return field > np.quantile(field, 0.9)


def jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(levels: np.ndarray, factor: float, filter_: Image.Resampling) -> np.ndarray:
    side = round(SIZE * factor)
    return np.asarray(Image.fromarray(levels).resize((side, side), filter_))


def mask_of(folder: Path, levels: np.ndarray) -> Mask:
    write_png(folder / "mask.png", levels)
    return read_mask(folder / "mask.png")


FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX]
lesions = st.one_of(st.builds(disc, st.floats(4, 40), st.integers(45, 80)), st.builds(blob, st.integers(0, 999)))


@settings(max_examples=60, deadline=None)
@given(lesion=lesions, quality=st.integers(50, 98))
def test_compression_noise_leaves_a_mask_hard(
    tmp_path_factory: pytest.TempPathFactory, lesion: np.ndarray, quality: int
) -> None:
    found = mask_of(tmp_path_factory.getbasetemp(), jpeg(lesion.astype(np.uint8) * 255, quality))
    assert not found.soft
    wrong = np.count_nonzero(found.hard != lesion)
    assert (
        wrong <= 0.1 * np.count_nonzero(lesion ^ cv2.erode(lesion.astype(np.uint8), np.ones((3, 3))).astype(bool)) + 2
    )
    assert found.note is None or "compression noise" in found.note


@settings(max_examples=60, deadline=None)
@given(lesion=lesions, factor=st.floats(0.3, 2), filter_=st.sampled_from(FILTERS))
def test_a_resampled_edge_leaves_a_mask_hard(
    tmp_path_factory: pytest.TempPathFactory, lesion: np.ndarray, factor: float, filter_: Image.Resampling
) -> None:
    levels = resized(lesion.astype(np.uint8) * 255, factor, filter_)
    found = mask_of(tmp_path_factory.getbasetemp(), levels)
    assert not found.soft
    np.testing.assert_array_equal(found.hard, levels >= 0.5 * levels.max())


@settings(max_examples=60, deadline=None)
@given(lesion=lesions, feather=st.floats(6, 40), quality=st.one_of(st.none(), st.integers(60, 98)))
def test_a_wider_smooth_border_is_soft_already(
    tmp_path_factory: pytest.TempPathFactory, lesion: np.ndarray, feather: float, quality: int | None
) -> None:
    levels = np.rint(soften(lesion, feather if quality is None else feather + 4) * 255).astype(np.uint8)
    levels = levels if quality is None else jpeg(levels, quality)
    found = mask_of(tmp_path_factory.getbasetemp(), levels)
    assert found.soft
    np.testing.assert_allclose(found.values, levels / levels.max(), atol=0.5 / 255 + 1e-6)


LABELS = {
    "lesion 1, ignored 255": np.where(disc(14), 1, np.where(disc(16), 255, 0)),
    "small lesion 1, ignored 255": np.where(disc(1.2), 1, np.where(disc(40) & ~disc(30), 255, 0)),
    "two lesions": np.where(disc(8, 40), 100, np.where(disc(8, 90), 200, 0)),
    "three classes": np.where(disc(8), 170, np.where(disc(20), 85, np.where(disc(40), 255, 0))),
    "no background": np.where(disc(20), 200, 100),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_refused_with_their_levels(tmp_path: Path, name: str) -> None:
    levels = LABELS[name].astype(np.uint8)
    with pytest.raises(FileError, match="labels") as caught:
        mask_of(tmp_path, levels)
    for level in np.unique(levels[levels > 0]):
        assert str(level) in caught.value.reason


@pytest.mark.parametrize("change", [lambda a: jpeg(a, 90), lambda a: resized(a, 1.5, Image.Resampling.BILINEAR)])
def test_labels_are_refused_through_noise_and_resampling(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    levels = np.where(disc(18, 35), 100, np.where(disc(14, 90), 200, 0)).astype(np.uint8)
    with pytest.raises(FileError, match=r"among them 0, (99|100|101), "):
        mask_of(tmp_path, change(levels))


def test_a_soft_alpha_channel_is_a_soft_mask(tmp_path: Path) -> None:
    soft = np.rint(soften(disc(14), 20) * 255).astype(np.uint8)
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    flat = mask_of(tmp_path, soft)
    for layers in (np.dstack([white, soft]), np.dstack([white[..., :1], soft])):
        found = mask_of(tmp_path, layers)
        assert found.soft
        np.testing.assert_array_equal(found.values, flat.values)
    deep = np.dstack([np.full((SIZE, SIZE), 65535, np.uint16), soft.astype(np.uint16) * 257])
    np.testing.assert_array_equal(mask_of(tmp_path, deep).values, flat.values)


def test_shades_of_one_colour_are_one_mask(tmp_path: Path) -> None:
    lesion = disc(14).astype(np.uint8)
    red = np.dstack([lesion * 200, lesion * 40, lesion * 0])
    small = cv2.resize(red, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_LINEAR)
    found = mask_of(tmp_path, small)
    assert not found.soft
    np.testing.assert_array_equal(found.hard, small[..., 0] >= 100)


@pytest.mark.parametrize("levels", [[0, 255], [0, 18, 19, 20], [0, 85, 170], [0, 17, 34, 68], [0, 1, 5], [0, 1, 201]])
def test_label_maps_of_other_numbers_are_refused_with_them(tmp_path: Path, levels: list[int]) -> None:
    write_png(tmp_path / "anatomy.png", np.array([levels], np.uint8))
    named = ", ".join(map(str, levels))
    with pytest.raises(FileError, match=f"has the levels {named}; expected a label map of 0 background, 1 the vert"):
        read_anatomy(tmp_path / "anatomy.png", (1, len(levels)))


def test_a_two_bit_label_map_is_refused_where_its_numbers_are_scaled(tmp_path: Path) -> None:
    """Grey levels of 2 bits are scaled to 0, 85, 170, 255 when they are read; the numbers of a palette are not."""
    ihdr, rows = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0), zlib.compress(bytes([0, 0b00011011]))
    chunks = ((b"IHDR", ihdr), (b"IDAT", rows), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (tmp_path / "grey.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(FileError, match="has the levels 0, 85, 170, 255"):
        read_anatomy(tmp_path / "grey.png", (1, 4))
    image = Image.new("P", (4, 1))
    image.putpalette(list(range(12)))
    image.putdata([0, 1, 2, 3])
    image.save(tmp_path / "palette.png", bits=2)
    np.testing.assert_array_equal(read_anatomy(tmp_path / "palette.png", (1, 4)), [[0, 1, 2, 3]])


def test_stray_pixels_and_far_parts_are_named_and_near_ones_are_not() -> None:
    hard = np.zeros((1024, 1024), bool)
    hard[300:330, 400:430] = True
    assert stray_parts(hard) == []
    hard[300:320, 440:460] = True  # a second lesion beside it
    assert stray_parts(hard) == []
    hard[1000, 20] = True
    hard[335, 410] = True  # near, but a single pixel
    hard[700:720, 700:720] = True
    assert stray_parts(hard) == [(400, 700, 700), (1, 335, 410), (1, 1000, 20)]
