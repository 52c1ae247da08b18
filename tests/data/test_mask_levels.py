"""What the levels of a mask file mean: a hard mask, with noise or a rim or not, a soft one, or labels."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
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
@example(lesion=blob(65), factor=0.3125, filter_=Image.Resampling.BILINEAR)  # with parts thinner than a pixel
def test_a_resampled_edge_leaves_a_mask_hard(
    tmp_path_factory: pytest.TempPathFactory, lesion: np.ndarray, factor: float, filter_: Image.Resampling
) -> None:
    levels = resized(lesion.astype(np.uint8) * 255, factor, filter_)
    found = mask_of(tmp_path_factory.getbasetemp(), levels)
    assert not found.soft
    np.testing.assert_array_equal(found.hard, levels >= 0.5 * levels.max())


@settings(max_examples=60, deadline=None)
@given(
    case=st.one_of(
        st.tuples(st.builds(disc, st.floats(4, 40), st.integers(45, 80)), st.floats(6, 40)),
        st.tuples(st.builds(blob, st.integers(0, 999)), st.floats(6, 18)),  # parts everywhere: wider ones leave no 0
    ),
    quality=st.one_of(st.none(), st.integers(60, 98)),
)
def test_a_wider_smooth_border_is_soft_already(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[np.ndarray, float], quality: int | None
) -> None:
    lesion, feather = case
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


@pytest.mark.parametrize("quality", [75, 85, 95, 100])
@pytest.mark.parametrize("name", ["mask.jpg", "mask.tif"])
def test_small_numbers_that_jpeg_has_lost_are_refused(tmp_path: Path, quality: int, name: str) -> None:
    options = {"compression": "jpeg"} if name == "mask.tif" else {}
    Image.fromarray(blob(3).astype(np.uint8)).save(tmp_path / name, quality=quality, **options)
    if not np.asarray(Image.open(tmp_path / name)).any():
        assert read_mask(tmp_path / name).empty
        return
    with pytest.raises(FileError, match="a JPEG loses smaller numbers, save it as PNG"):
        read_mask(tmp_path / name)


@pytest.mark.parametrize("level", [1, 100, 200])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", [(64, 64), (20, 90), (64, 90)])  # in the lesion, away from it, at its edge
@pytest.mark.parametrize("noisy", [False, True])
def test_a_small_second_label_is_named(
    tmp_path: Path, level: int, side: int, place: tuple[int, int], noisy: bool
) -> None:
    levels = np.where(disc(28), 255, 0).astype(np.uint8)
    if noisy:  # a resampled edge, of many levels
        large = cv2.resize(levels, (333, 333), interpolation=cv2.INTER_NEAREST)
        levels = cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    levels[place[0] : place[0] + side, place[1] : place[1] + side] = level
    if noisy and (level == 1 or side == 1 or place == (64, 90)):
        return  # cannot be told from noise, or from the rim
    refused = None
    try:
        found = mask_of(tmp_path, levels)
    except FileError as error:
        refused = error.reason
    if refused:
        assert str(level) in refused
    elif place != (64, 90) or side > 3:
        assert found.note is not None
        assert "a second label" in found.note


@pytest.mark.parametrize("top", [255, 1000, 4095, 65535])
def test_a_resampled_edge_is_hard_whatever_depth_the_file_has(tmp_path: Path, top: int) -> None:
    levels = resized(disc(30).astype(np.uint8) * 255, 0.7, Image.Resampling.BILINEAR)
    found = mask_of(tmp_path, np.rint(levels * (top / 255)).astype(np.uint16))
    assert not found.soft
    np.testing.assert_array_equal(found.hard, levels >= 128)


@settings(max_examples=40, deadline=None)
@example(lesion=blob(83), colour=(255, 255, 0), quality=83)
@given(
    lesion=lesions,
    colour=st.sampled_from([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (200, 30, 60), (255, 128, 0)]),
    quality=st.integers(75, 98),
)
def test_one_colour_on_black_is_a_hard_mask_in_jpeg_too(
    tmp_path_factory: pytest.TempPathFactory, lesion: np.ndarray, colour: tuple[int, int, int], quality: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "colour.jpg"
    Image.fromarray(lesion[..., None] * np.array(colour, np.uint8)).save(path, quality=quality)
    found = read_mask(path)
    assert not found.soft
    edge = lesion ^ cv2.erode(lesion.astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert np.count_nonzero(found.hard != lesion) <= 0.7 * np.count_nonzero(edge) + 2


@pytest.mark.parametrize("quality", [75, 90])
@pytest.mark.parametrize("second", [(0, 255, 0), (255, 128, 0), (255, 255, 255)])
def test_two_colours_are_refused_in_jpeg_too(tmp_path: Path, quality: int, second: tuple[int, int, int]) -> None:
    colours = disc(20, 40)[..., None] * np.array([255, 0, 0], np.uint8)
    colours = colours + disc(8, 100)[..., None] * np.array(second, np.uint8)
    Image.fromarray(colours).save(tmp_path / "mask.jpg", quality=quality)
    with pytest.raises(FileError, match="colours besides black"):
        read_mask(tmp_path / "mask.jpg")


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


@pytest.mark.parametrize("level", [64, 128])
def test_a_thin_label_around_a_lesion_is_never_a_soft_border(tmp_path: Path, level: int) -> None:
    """A ring of "uncertain" or "ignore", 2 pixels wide and more at its corners, into which no 3 x 3 area fits."""
    lesion = disc(20).astype(np.uint8)
    ring = level * cv2.dilate(lesion, np.ones((5, 5), np.uint8))
    with pytest.raises(FileError, match=f"3 levels with a maximum of 255 .among them 0, {level}, 255"):
        mask_of(tmp_path, np.where(lesion, 255, ring).astype(np.uint8))
