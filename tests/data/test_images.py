"""Reading any image, its depth, and writing."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.core.errors import FileError, MedSoftError
from ldm.data.images import composite, intensity_range_of, is_grey, read_image, read_labels, to_unit
from ldm.data.png import encode_png, write_png

FEW = settings(max_examples=30, deadline=None)


def pixels(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, depth: int, colour: int, raw: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: raw bytes as they would be after filtering."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ------------------------------------------------------------------------------------------------ reading, writing


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (1, 1), (1, 1, 3)])
def test_written_png_reads_back_equal_here_and_elsewhere(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    array = pixels(shape, dtype)
    write_png(tmp_path / "new" / "x.png", array, {"Comment": "synthetic", "Prompt": "“lesion” – größer"})
    found = read_image(tmp_path / "new" / "x.png")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)
    with Image.open(tmp_path / "new" / "x.png") as opened:
        assert opened.text == {"Comment": "synthetic", "Prompt": "“lesion” – größer"}
        if dtype == np.uint8:
            np.testing.assert_array_equal(np.asarray(opened), array)


def test_same_pixels_give_the_same_bytes() -> None:
    array = pixels((30, 40, 3))
    assert encode_png(array) == encode_png(np.asfortranarray(array))


@pytest.mark.parametrize("bad", [np.full((4, 4), np.nan), np.zeros((4, 4), np.float32), np.zeros((4, 4, 5), np.uint8)])
def test_writing_anything_but_pixels_is_refused_and_leaves_nothing(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(
        MedSoftError, match=r"x\.png: expected HxW or HxWx3 pixels of 8 or 16 bits, found float|uint8 of"
    ):
        write_png(tmp_path / "x.png", bad)
    assert not list(tmp_path.iterdir())


def test_writing_where_a_file_is_in_the_way_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedSoftError, match=r"file/x\.png: could not be written"):
        write_png(tmp_path / "file" / "x.png", pixels((4, 4)))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".png"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (6, 4), (10, 200, 30)).save(tmp_path / f"x{suffix}")
    found = read_image(tmp_path / f"x{suffix}")
    assert found.shape == (4, 6, 3)
    assert np.abs(found.astype(int) - (10, 200, 30)).max() < 6


def test_kind_is_told_from_content_not_from_the_name(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "x.png", format="JPEG")
    found = read_image(tmp_path / "x.png")
    assert found.shape == (4, 6, 3)
    assert found[0, 0, 0] > 150 > 100 > found[0, 0, 1]


def test_hidden_colour_under_alpha_zero_becomes_black_and_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[0, 0, 3], rgba[1, 1, 3] = 0, 7
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., 2:]).save(tmp_path / "la.png")
    expected = np.array([[0, 200], [200, 200]])
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), np.stack([expected] * 3, axis=-1))
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), expected)


def test_sixteen_bit_alpha_and_colour_keep_their_depth(tmp_path: Path) -> None:
    rows = [[(1000, 0), (40000, 65535)], [(300, 1), (65535, 65535)]]  # (grey, alpha)
    raw = b"".join(b"\0" + b"".join(struct.pack(">HH", *pixel) for pixel in row) for row in rows)
    (tmp_path / "la.png").write_bytes(png_of(2, 2, 16, 4, raw))
    found = read_image(tmp_path / "la.png")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, [[0, 40000], [300, 65535]])
    raw = b"\0" + struct.pack(">4H", 1000, 2000, 3000, 0) + struct.pack(">4H", 1000, 2000, 3000, 9)
    (tmp_path / "rgba.png").write_bytes(png_of(2, 1, 16, 6, raw))
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), [[[0, 0, 0], [1000, 2000, 3000]]])


def test_transparent_palette_entry_becomes_black(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), [[[0, 0, 0], [200, 100, 50]]])


def test_palette_becomes_grey_or_rgb_and_labels_are_its_indices(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpixel((1, 0), 1)
    image.putpalette([5, 5, 5, 90, 90, 90])
    image.save(tmp_path / "grey.png")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "colour.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), [[5, 90]])
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png"), [[[0, 0, 0], [128, 0, 0]]])
    np.testing.assert_array_equal(read_labels(tmp_path / "colour.png"), [[0, 1]])


def test_one_bit_becomes_0_and_255(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), [[255, 0]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    array = pixels((4, 6))
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected)
    Image.fromarray(array.astype(np.uint16)).save(tmp_path / "deep.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), expected)


def test_interlaced_png_is_read(tmp_path: Path) -> None:
    """A 2 x 2 picture interlaced by hand: its passes hold 1, 1 and 2 pixels."""
    raw = b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28"
    data = bytearray(png_of(2, 2, 8, 0, raw))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "x.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), [[10, 20], [30, 40]])


def test_is_grey() -> None:
    assert is_grey(pixels((3, 3)))
    assert is_grey(np.repeat(pixels((3, 3, 1)), 3, axis=2))
    assert not is_grey(pixels((3, 3, 3)))


# ------------------------------------------------------------------------------------------------ refused files

PNG = encode_png(pixels((16, 16)))
REFUSED = {
    "half of the file": (PNG[: len(PNG) // 2], r"truncated PNG \(\d+ bytes, its end is missing\)"),
    "end missing": (PNG[:-12], r"truncated PNG"),
    "flipped byte": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "wrong checksum in chunk IDAT"),
    "wrong checksum": (PNG[:-16] + b"\0\0\0\0" + PNG[-12:], "wrong checksum in chunk IDAT"),
    "too little data": (png_of(16, 16, 8, 0, bytes(17 * 4)), "damaged PNG: pixel data for 68 of 272 bytes"),
    "no pixels": (PNG[:33] + chunk(b"IEND", b""), "holds no pixel data"),
    "no header": (PNG[:8] + chunk(b"IDAT", b""), "does not begin with its header"),
    "no size": (png_of(0, 16, 8, 0, b""), "declares a size of 0 x 16"),
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"see the other folder\n", "this is a text file"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML or XML text"),
    "xml": (b"<svg></svg>", "HTML or XML text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer: run `git lfs pull`"),
    "gif": (b"GIF89a....", "a GIF image"),
    "dicom": (bytes(128) + b"DICM" + bytes(9), "a DICOM file"),
    "noise": (bytes(range(40)), "unknown content beginning with 00 01 02"),
    "bomb": (png_of(20000, 20000, 8, 0, bytes(1000)), "20000 x 20000 pixels, more than the limit of 80 megapixels"),
    "text bomb": (
        png_of(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))),
        "damaged PNG: it cannot be decoded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_is_refused_with_its_name_and_what_it_is(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(FileError, match=reason) as caught:
        read_image(tmp_path / "mask.png")
    assert str(caught.value).startswith(f"{tmp_path / 'mask.png'}: ")


def test_half_a_jpeg_a_stack_floats_and_a_jpeg_bomb_are_refused(tmp_path: Path) -> None:
    Image.fromarray(pixels((64, 64))).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match="damaged JPEG"):
        read_image(tmp_path / "x.jpg")
    size = data.index(b"\xff\xc0") + 5
    (tmp_path / "big.jpg").write_bytes(data[:size] + struct.pack(">HH", 60000, 60000) + data[size + 4 :])
    with pytest.raises(FileError, match="more pixels than the limit"):
        read_image(tmp_path / "big.jpg")
    pages = [Image.new("L", (4, 4)), Image.new("L", (4, 4))]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(FileError, match="holds several images; expected one"):
        read_image(tmp_path / "x.tif")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(FileError, match="32-bit floating-point samples"):
        read_image(tmp_path / "f.tif")


def test_missing_folder_and_dangling_link_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for path, reason in (
        (tmp_path / "gone.png", "does not exist"),
        (tmp_path / "link.png", "points to a file that does not exist"),
        (tmp_path, "expected an image file, found a folder"),
    ):
        with pytest.raises(FileError, match=reason):
            read_image(path)


@FEW
@given(position=st.integers(0, len(PNG) - 1), bit=st.integers(0, 7), cut=st.integers(0, len(PNG)))
def test_damage_anywhere_gives_the_documented_error_only(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    flipped = bytearray(PNG)
    flipped[position] ^= 1 << bit
    for data in (bytes(flipped), PNG[:cut] if cut < len(PNG) else b""):
        path.write_bytes(data)
        with pytest.raises(FileError):
            read_image(path)


def test_png_text_of_others_does_not_disturb(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 1000, zip=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels((4, 4))).save(buffer, "PNG", pnginfo=info)
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), pixels((4, 4)))


# ------------------------------------------------------------------------------------------------ depth


def test_window_is_the_whole_range_for_8_bit_and_percentiles_for_16() -> None:
    assert intensity_range_of(pixels((9, 9))) == (0.0, 255.0)
    deep = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    low, high = intensity_range_of(deep)
    assert low == pytest.approx(4.995)
    assert high == pytest.approx(np.percentile(np.arange(105, 1000), 99.9))
    assert intensity_range_of(deep, [100, 300]) == (100.0, 300.0)
    sparse = np.zeros((100, 100), np.uint16)
    sparse[0, 0] = 900
    assert intensity_range_of(sparse) == (0.0, 900.0)
    assert intensity_range_of(np.full((3, 3), 7, np.uint16)) == (7.0, 8.0)
    hidden = np.zeros((20, 50), bool)
    hidden[10:] = True
    assert intensity_range_of(deep, hidden=hidden) == intensity_range_of(deep[:10])
    assert intensity_range_of(deep, hidden=np.ones_like(hidden)) == intensity_range_of(deep)


def test_air_around_a_body_takes_no_share_in_the_range_of_16_bit_images() -> None:
    """A vertebra of 1,500 pixels in a CT slice that is mostly air: the range ended at its darker half before."""
    rng = np.random.default_rng(0)
    image = rng.normal(30, 15, (512, 512))
    image[150:360, 150:360] = rng.normal(1050, 40, (210, 210))  # soft tissue
    image[240:280, 240:280] = rng.uniform(1200, 1900, (40, 40))  # bone
    image = image.clip(0).astype(np.uint16)
    bone = image[240:280, 240:280]
    low, high = intensity_range_of(image)
    assert np.mean((bone < low) | (bone > high)) < 0.05
    assert np.mean(bone > np.percentile(image, 99.5)) > 0.5


def test_a_12_bit_image_is_neither_white_nor_black() -> None:
    unit = to_unit(np.linspace(100, 4000, 10000).reshape(100, 100).astype(np.uint16))
    assert unit.dtype == np.float32
    assert (unit.min(), unit.max()) == (0, 1)
    assert 0.45 < unit.mean() < 0.55


@FEW
@given(st.sampled_from([np.uint8, np.uint16]), st.integers(0, 1000))
def test_unit_and_back_is_exact_inside_the_window(dtype: type, seed: int) -> None:
    image = pixels((8, 9), dtype, seed)
    window = (0.0, float(np.iinfo(dtype).max))
    np.testing.assert_array_equal(from_unit(to_unit(image, window), window, dtype), image)


def from_unit(values: np.ndarray, window: tuple[float, float], dtype: type) -> np.ndarray:
    """The pixels of a composite that is generated everywhere."""
    other = np.arange(values.size).reshape(values.shape).astype(dtype)  # in colour, if the values are
    return composite(other, values, np.ones(values.shape[:2], np.float32), window)


def test_composite_rounds_clips_and_refuses_nan() -> None:
    np.testing.assert_array_equal(from_unit(np.array([[-1, 0.5, 2.0]]), (0, 255), np.uint8), [[0, 128, 255]])
    with pytest.raises(MedSoftError, match="NaN"):
        from_unit(np.array([[np.nan]]), (0, 255), np.uint8)


@FEW
@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from([(5, 7), (1, 9), (8, 8)]),
)
def test_composite_changes_nothing_outside_and_everything_inside(
    dtype: type, colour: bool, seed: int, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    image = pixels((*size, 3) if colour else size, dtype, seed)
    soft = np.where(rng.random(size) < 0.5, 0, rng.choice([1 / 255, 0.5, 1], size)).astype(np.float32)
    fresh = rng.random((*size, 3)).astype(np.float32)
    window = intensity_range_of(image)
    result = composite(image, fresh, soft, window)
    assert result.dtype == dtype
    assert result.shape == image.shape
    np.testing.assert_array_equal(result[soft == 0], image[soft == 0])
    wanted = fresh if colour else fresh.mean(axis=2)
    np.testing.assert_array_equal(result[soft == 1], from_unit(wanted, window, dtype)[soft == 1])
    weight = soft[..., None] if colour else soft
    blend = weight * from_unit(wanted, window, dtype).astype(float) + (1 - weight) * image
    assert np.abs(result - blend).max() <= 1


def test_composite_ignores_nan_outside_and_refuses_it_inside() -> None:
    image, soft, fresh = pixels((4, 4)), np.zeros((4, 4), np.float32), np.full((4, 4), np.nan)
    np.testing.assert_array_equal(composite(image, fresh, soft), image)
    soft[1, 1] = 1
    with pytest.raises(MedSoftError, match="not numbers"):
        composite(image, fresh, soft)


def test_composite_of_different_sizes_names_them() -> None:
    with pytest.raises(MedSoftError, match="image 5 x 4, generated 5 x 4 and mask 4 x 5"):
        composite(pixels((4, 5)), np.zeros((4, 5)), np.zeros((5, 4)))
