"""Files as other programs write them: every depth, colour, layout and byte order that is accepted is read exactly."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.core.errors import FileError
from ldm.data.images import orientations_differ, read_image, read_labels, with_alpha

NONE, DEFLATE, PACKBITS = 1, 8, 32773


def tiff_bytes(
    samples: np.ndarray,
    photometric: int = 1,
    *,
    planar: int = 1,
    endian: str = "<",
    big: bool = False,
    counted: bool = True,
    colour_map: Sequence[int] = (),
    compression: int = NONE,
    predictor: int = 1,
    rows: int = 0,
    tile: int = 0,
    bits: int = 0,
    extra: tuple[int, ...] = (),
    **tags: int,
) -> bytes:
    """A TIFF file written here, from HxW or HxWxS samples; ``rows`` of a strip, or the side of a square ``tile``.

    ``bits`` below 8 packs grey samples; ``tags``: orientation, sample_format, fill_order. Not ``counted``: without the
    bytes of each strip.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    height, width, count = samples.shape
    depth = bits or 8 * samples.dtype.itemsize
    planes = [samples] if planar == 1 else [samples[..., k : k + 1] for k in range(count)]
    blocks = []
    for plane in planes:
        step = tile or rows or height
        for top in range(0, height, step):
            part = plane[top : top + step]
            for left in range(0, width, tile or width):
                block = part[:, left : left + (tile or width)]
                if tile:
                    block = np.pad(block, [(0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)])
                blocks.append(compressed(block, endian, compression, predictor, depth))
    values = {256: [width], 257: [height], 258: [depth] * count, 259: [compression], 262: [photometric]}
    values |= {277: [count], 284: [planar], 317: [predictor], 279: [len(block) for block in blocks], 273: []}
    values |= {278: [rows or height]} if not tile else {322: [tile], 323: [tile]}
    if tile:
        values[325], values[324] = values.pop(279), values.pop(273)
    numbers = {"fill_order": 266, "orientation": 274, "sample_format": 339}
    values |= {numbers[name]: [value] * (count if name == "sample_format" else 1) for name, value in tags.items()}
    values |= {338: list(extra)} if extra else {}
    values |= {320: list(colour_map)} if colour_map else {}
    if not counted:
        del values[325 if tile else 279]
    start = 16 if big else 8
    places = [start + sum(map(len, blocks[:k])) for k in range(len(blocks))]
    values[324 if tile else 273] = places
    body = b"".join(blocks)
    return header(endian, big, start + len(body)) + body + directory(values, endian, big, start + len(body))


def compressed(block: np.ndarray, endian: str, compression: int, predictor: int, depth: int) -> bytes:
    if predictor == 2:
        block = np.diff(block, axis=1, prepend=block.dtype.type(0))
    if depth < 8:
        spread = (block[..., 0, None] >> np.arange(depth - 1, -1, -1)) & 1
        lines = [line.tobytes() for line in np.packbits(spread.reshape(len(block), -1).astype(np.uint8), axis=1)]
    else:
        lines = [line.astype(line.dtype.newbyteorder(endian)).tobytes() for line in block]
    if compression == PACKBITS:
        runs = [line[k : k + 128] for line in lines for k in range(0, len(line), 128)]
        return b"".join(bytes([len(run) - 1]) + run for run in runs)
    return zlib.compress(b"".join(lines)) if compression == DEFLATE else b"".join(lines)


def header(endian: str, big: bool, start: int) -> bytes:
    order = b"II" if endian == "<" else b"MM"
    return order + (struct.pack(endian + "HHHQ", 43, 8, 0, start) if big else struct.pack(endian + "HI", 42, start))


def directory(values: dict[int, list[int]], endian: str, big: bool, start: int) -> bytes:
    pointer, count, entry, room = ("Q", "Q", "HHQ", 8) if big else ("I", "H", "HHI", 4)
    after = start + struct.calcsize(endian + count) + len(values) * struct.calcsize(endian + entry + pointer) + room
    entries, lists = struct.pack(endian + count, len(values)), b""
    for tag, numbers in sorted(values.items()):
        kind, letter = (4, "I") if tag in (256, 257, 273, 278, 279, 324, 325) else (3, "H")
        packed = struct.pack(f"{endian}{len(numbers)}{letter}", *numbers)
        entries += struct.pack(endian + entry, tag, kind, len(numbers))
        entries += (
            packed.ljust(room, b"\0") if len(packed) <= room else struct.pack(endian + pointer, after + len(lists))
        )
        lists += packed if len(packed) > room else b""
    return entries + struct.pack(endian + pointer, 0) + lists


def read_bytes(folder: Path, data: bytes, name: str = "image.tif") -> np.ndarray:
    (folder / name).write_bytes(data)
    return read_image(folder / name)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By Pillow's names for the same eight orientations."""
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    if method is None:
        return pixels
    places = np.arange(pixels.shape[0] * pixels.shape[1], dtype=np.int32).reshape(pixels.shape[:2])
    turned = np.asarray(Image.fromarray(places).transpose(method))
    return pixels.reshape(-1, *pixels.shape[2:])[turned]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_tiff_is_read_exactly_or_refused_as_unsupported(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another depth, size or value, and never `damaged`: all these files are sound."""
    draw = data.draw
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    photometric = draw(st.sampled_from([0, 1, 2]))
    extra = draw(st.sampled_from([(), (2,), (0,), (0, 2), (2, 0), (1,)]))
    colours = 3 if photometric == 2 else 1
    tile = draw(st.sampled_from([0, 0, 16]))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), colours + len(extra))
    stored = np.random.default_rng(draw(st.integers(0, 99))).integers(0, np.iinfo(dtype).max + 1, shape, dtype)
    stored[::3, :, -1] = 0
    alphas = [stored[..., colours + k] for k, kind in enumerate(extra) if kind]
    assume(all(alpha.any() for alpha in alphas))  # what is transparent everywhere is refused
    orientation = draw(st.integers(1, 8))
    content = tiff_bytes(
        stored,
        photometric,
        planar=draw(st.sampled_from([1, 2])),
        endian=draw(st.sampled_from("<>")),
        big=draw(st.booleans()),
        compression=(compression := draw(st.sampled_from([NONE, DEFLATE, PACKBITS]))),
        predictor=draw(st.sampled_from([1, 2])) if compression == DEFLATE else 1,
        rows=draw(st.integers(0, 9)) if not tile else 0,
        tile=tile,
        extra=extra,
        orientation=orientation,
    )
    expected = stored[..., :colours]
    if photometric == 0:
        expected = np.iinfo(dtype).max - expected
    path = tmp_path_factory.getbasetemp() / "any.tif"
    path.write_bytes(content)
    try:
        found = read_image(path)
    except FileError as error:
        assert "is not supported" in error.reason  # noqa: PT017
        assert 1 in extra
        return
    assume(1 not in extra)
    if 2 in extra:
        alpha = stored[..., colours + extra.index(2)]
        layers = with_alpha(found, path, np.zeros(found.shape[:2], bool))
        np.testing.assert_array_equal(layers[..., -1], upright(alpha, orientation))
        expected = np.where(alpha[..., None] == 0, dtype(0), expected)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, upright(expected.squeeze(2) if colours == 1 else expected, orientation))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_depths_are_scaled_to_8_bits(tmp_path: Path, bits: int, photometric: int) -> None:
    top = 2**bits - 1
    stored = np.random.default_rng(bits).integers(0, top + 1, (5, 11), dtype=np.uint8)
    found = read_bytes(tmp_path, tiff_bytes(stored, photometric, bits=bits))
    np.testing.assert_array_equal(found, (stored if photometric else top - stored) * (255 // top))


@pytest.mark.parametrize("scale", [1, 256, 257])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("grey", [False, True])
def test_a_colour_map_of_8_or_16_bits_is_read_exactly(tmp_path: Path, bits: int, scale: int, grey: bool) -> None:
    """Its numbers have 16 bits; where none is above 255, another program wrote 8."""
    rng = np.random.default_rng(bits)
    colours = rng.integers(0, 256, (2**bits, 3))
    colours[:, 1:] = colours[:, :1] if grey else colours[:, 1:]
    stored = rng.integers(0, 2**bits, (5, 11), dtype=np.uint8)
    colour_map = (colours * scale).T.ravel().tolist()
    content = tiff_bytes(stored, 3, bits=bits, colour_map=colour_map, orientation=6)
    expected = upright(colours[stored], 6)
    np.testing.assert_array_equal(read_bytes(tmp_path, content), expected[..., 0] if grey else expected)
    (tmp_path / "anatomy.tif").write_bytes(content)
    np.testing.assert_array_equal(read_labels(tmp_path / "anatomy.tif"), upright(stored, 6))


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_uncompressed_strips_need_no_byte_counts(tmp_path: Path, dtype: type, planar: int, tile: int) -> None:
    """Whoever wrote the file left out what follows from its size; cut off, it is damaged nevertheless."""
    stored = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (21, 19, 3), dtype=dtype)
    for rows in (0, 4):
        content = tiff_bytes(stored, 2, planar=planar, rows=rows, tile=tile, counted=False)
        np.testing.assert_array_equal(read_bytes(tmp_path, content), stored)
    small = np.eye(5, 11, dtype=np.uint8)
    np.testing.assert_array_equal(read_bytes(tmp_path, tiff_bytes(small, bits=1, counted=False)), small * 255)


@pytest.mark.parametrize("colour", [False, True])
def test_tiff_files_of_opencv_are_read_as_opencv_reads_them(tmp_path: Path, colour: bool) -> None:
    """LZW with a predictor, written and read by another library."""
    pixels = np.random.default_rng(0).integers(0, 65536, (37, 53, 3) if colour else (37, 53), dtype=np.uint16)
    for compression in (1, 5, 8, 32946):
        content = cv2.imencode(".tif", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, compression])[1].tobytes()
        np.testing.assert_array_equal(read_bytes(tmp_path, content), pixels[..., ::-1] if colour else pixels)


@pytest.mark.parametrize(("dtype", "low"), [(np.int8, 0), (np.int16, 0), (np.int32, 0), (np.uint32, 0)])
def test_other_integers_are_read_where_they_fit(tmp_path: Path, dtype: type, low: int) -> None:
    values = np.array([[0, 1, 127], [5, 100, 90]], dtype) * (1 if dtype is np.int8 else 256)
    sample_format = 1 if np.iinfo(dtype).min == 0 else 2
    for endian in "<>":
        found = read_bytes(tmp_path, tiff_bytes(values, endian=endian, sample_format=sample_format))
        assert found.dtype == (np.uint8 if dtype is np.int8 else np.uint16)
        np.testing.assert_array_equal(found, values)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
NOT_READ = {
    "negative": (
        tiff_bytes(GREY.view(np.int8) - np.int8(5), sample_format=2),
        "values from -5 to 6; expected 8- or 16",
    ),
    "negative 16": (tiff_bytes(GREY.astype(np.int16) - 1000, sample_format=2), "values from -1000 to -989"),
    "above 16 bits": (tiff_bytes(GREY.astype(np.uint32) * 65536), "values from 0 to 720896"),
    "float32": (tiff_bytes(GREY.astype(np.float32), sample_format=3), "not supported .32-bit floating-point samples"),
    "float64": (tiff_bytes(GREY.astype(np.float64), sample_format=3), "not supported .64-bit floating-point samples"),
    "64-bit": (tiff_bytes(GREY.astype(np.uint64)), "not supported .64-bit unsigned samples"),
    "CIELab": (tiff_bytes(np.stack([GREY] * 3, axis=-1), 8), "photometric interpretation 8"),
    "CMYK in planes": (tiff_bytes(np.stack([GREY] * 4, axis=-1), 5, planar=2), "planar configuration 2"),
    "16-bit CMYK": (
        tiff_bytes(np.stack([GREY.astype(np.uint16)] * 4, axis=-1), 5),
        "16-bit unsigned samples, 4 a pixel",
    ),
    "another compression": (tiff_bytes(GREY.astype(np.uint16), compression=34712)[:-1] + b"\0", "compression 34712"),
    "compressed and not counted": (
        tiff_bytes(GREY, compression=PACKBITS, counted=False),
        "its compressed strips have no StripByteCounts",
    ),
    "not counted and cut off": (
        tiff_bytes(GREY, counted=False).replace(
            struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, 999)
        ),
        "damaged TIFF: its [0-9]+ bytes end before its pixel data",
    ),
    "no colour map": (tiff_bytes(GREY, 3), "damaged TIFF: its colour map has 0 entries, expected 768"),
    "cut off": (tiff_bytes(GREY)[:20], "damaged TIFF: its directory cannot be read"),
    "no pixels": (
        tiff_bytes(GREY).replace(struct.pack("<HHII", 279, 4, 1, 12), struct.pack("<HHII", 279, 4, 1, 9999)),
        "damaged TIFF: its [0-9]+ bytes end before its pixel data",
    ),
    "short strip": (tiff_bytes(GREY.astype(np.uint16), compression=DEFLATE).replace(b"x\x9c", b"\0\0"), "damaged TIFF"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_a_tiff_file_is_refused_for_is_true(tmp_path: Path, name: str) -> None:
    content, reason = NOT_READ[name]
    with pytest.raises(FileError, match=reason) as caught:
        read_bytes(tmp_path, content)
    assert ("damaged" in caught.value.reason) == ("damaged" in reason)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 300), value=st.integers(0, 255), cut=st.integers(8, 300))
def test_a_changed_or_cut_tiff_file_gives_an_image_or_the_documented_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: int
) -> None:
    content = bytearray(tiff_bytes(np.arange(60, dtype=np.uint16).reshape(5, 6, 2) * 999, 0, extra=(2,), predictor=2))
    content[place % len(content)] = value
    for data in (bytes(content), bytes(content[:cut])):
        try:
            found = read_bytes(tmp_path_factory.getbasetemp(), data)
        except FileError:
            continue
        assert found.dtype in (np.uint8, np.uint16)


def png_bytes(stored: np.ndarray, bits: int, chunks: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG file written here, from HxW (grey) or HxWx3 samples of ``bits``, with more ``chunks`` before the pixels."""
    height, width = stored.shape[:2]
    rows = stored.reshape(height, -1)
    if bits < 8:
        rows = np.packbits((rows[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1), axis=1)
    rows = rows.astype(">u2" if bits == 16 else np.uint8)
    ihdr = struct.pack(">IIBBBBB", width, height, bits, 0 if stored.ndim == 2 else 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    whole = [(b"IHDR", ihdr), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in whole)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_png_is_hidden(tmp_path: Path, bits: int, colour: bool) -> None:
    if colour and bits < 8:
        pytest.skip("PNG has no such colour images")
    top = 2**bits - 1
    stored = np.array([[0, 1, top // 2, top]]) if not colour else np.array([[[0, 1, 2], [1, 1, top], [top, 5, 0]]])
    level = stored[0, 1]
    found = read_bytes(tmp_path, png_bytes(stored, bits, [(b"tRNS", struct.pack(f">{level.size}H", *level.flat))]))
    hidden = (stored == level).all(axis=2, keepdims=True) if colour else stored == level
    np.testing.assert_array_equal(found, np.where(hidden, 0, stored) * max(1, 255 // top))


def test_an_image_that_is_transparent_everywhere_is_refused(tmp_path: Path) -> None:
    """Programs that know no transparency leave 0 in a fourth byte, and the image would be read as black."""
    for name in ("image.png", "image.tif"):
        Image.fromarray(np.dstack([GREY, GREY, GREY, GREY * 0])).save(tmp_path / name)
        with pytest.raises(FileError, match=r"all of it is transparent .alpha 0 everywhere."):
            read_image(tmp_path / name)


EMPTY_EXIF = (b"", b"Exif\0\0", bytes(40), b"MM\0*\0\0\0\x08\0\0\0\0\0\0")  # the last: a directory of no entry


@pytest.mark.parametrize("block", EMPTY_EXIF)
def test_an_emptied_exif_block_turns_nothing(tmp_path: Path, block: bytes) -> None:
    """As programs leave it that take out what identifies a patient."""
    np.testing.assert_array_equal(read_bytes(tmp_path, png_bytes(GREY, 8, [(b"eXIf", block)]), "image.png"), GREY)
    (tmp_path / "plain.png").write_bytes(png_bytes(GREY, 8))
    assert not orientations_differ([tmp_path / "image.png", tmp_path / "plain.png"])


def test_an_exif_block_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG", exif=b"Exif\0\0no directory")
    for content in (png_bytes(GREY, 8, [(b"eXIf", b"no directory")]), buffer.getvalue()):
        with pytest.raises(FileError, match=r"its EXIF block cannot be read .*nothing says how it is turned") as caught:
            read_bytes(tmp_path, content)
        assert "damaged" not in caught.value.reason


def test_only_exif_turns_an_image(tmp_path: Path) -> None:
    """Another program's notes (XMP) may name a turn that the pixels have behind them, and most viewers ignore it."""
    note = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
    np.testing.assert_array_equal(read_bytes(tmp_path, png_bytes(GREY, 8, [(b"iTXt", note)]), "image.png"), GREY)


def test_sound_jpeg_and_bmp_files_of_other_kinds_are_not_called_damaged(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG")
    content = buffer.getvalue()
    frame = content.index(b"\xff\xc0")
    twelve = content[: frame + 4] + b"\x0c" + content[frame + 5 :]
    lossless = content.replace(b"\xff\xc0", b"\xff\xc3")
    for name, data, reason in (
        ("image.jpg", twelve, "coding process 0, 12 bits a sample"),
        ("image.jpg", lossless, "coding process 3, 8 bits a sample"),
        ("image.bmp", b"BM" + bytes(12) + struct.pack("<I", 77) + bytes(80), "kind of BMP file is not supported"),
        ("image.jpg", content[: len(content) // 2], "damaged JPEG"),
    ):
        with pytest.raises(FileError, match=reason) as caught:
            read_bytes(tmp_path, data, name)
        assert ("damaged" in caught.value.reason) == ("damaged" in reason)


def test_a_full_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image.Image) -> None:
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(FileError, match=r"there is too little memory for what it says it holds \(MemoryError\)"):
        read_image(tmp_path / "a.bmp")


def test_an_animation_is_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(GREY + 1)]
    pages[0].save(tmp_path / "image.png", save_all=True, append_images=pages[1:])
    with pytest.raises(FileError, match="holds several images"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("note", "stack"),
    [
        (b"ImageJ=1.53t\nimages=30\nslices=30\n\0", True),
        (b"ImageJ=1.53t\nimages=1\nmode=grayscale\n\0", False),
        (b"ImageJ=1.53t\nunit=mm\n\0", False),
        (b'{"shape": [30, 3, 4], "truncated": true}\0', True),
        (b'{"shape": [3, 4]}\0', False),
    ],
)
def test_a_stack_under_one_directory_is_refused(tmp_path: Path, note: bytes, stack: bool) -> None:
    """The other images lie behind the first, and only a note says so."""
    content = tiff_bytes(GREY) + note
    if stack:
        with pytest.raises(FileError, match="holds several images"):
            read_bytes(tmp_path, content)
    else:
        np.testing.assert_array_equal(read_bytes(tmp_path, content), GREY)


def test_a_tiff_file_that_names_too_few_strips_is_damaged(tmp_path: Path) -> None:
    content = tiff_bytes(GREY.astype(np.uint16)).replace(
        struct.pack("<HHII", 278, 4, 1, 3), struct.pack("<HHII", 278, 4, 1, 2)
    )
    with pytest.raises(FileError, match="damaged TIFF: 1 of 2 strips or tiles are named"):
        read_bytes(tmp_path, content)


def test_an_undeclared_extra_sample_of_a_tiff_file_is_refused(tmp_path: Path) -> None:
    """As OpenCV writes a colour image with alpha."""
    content = cv2.imencode(".tif", np.full((5, 6, 4), 200, np.uint8))[1].tobytes()
    with pytest.raises(FileError, match=r"not supported .*4 a pixel, extra samples \[\]"):
        read_bytes(tmp_path, content)


def test_a_label_map_as_jpeg_is_refused(tmp_path: Path) -> None:
    (tmp_path / "anatomy.jpg").write_bytes(cv2.imencode(".jpg", np.eye(16, dtype=np.uint8))[1].tobytes())
    with pytest.raises(FileError, match=r"a label map as JPEG, whose compression changes labels; export it as PNG"):
        read_labels(tmp_path / "anatomy.jpg")


def test_labels_of_a_16_bit_tiff_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "anatomy.tif").write_bytes(tiff_bytes(GREY.astype(np.uint16) * 100, endian=">"))
    np.testing.assert_array_equal(read_labels(tmp_path / "anatomy.tif"), GREY.astype(int) * 100)


def bmp_bytes(pixels: np.ndarray, palette: np.ndarray | None = None, top_down: bool = False) -> bytes:
    """A BMP file written here, from HxW indices into a palette (Nx3), or HxWx3 colours of 8 bits."""
    height, width = pixels.shape[:2]
    bits = 8 if pixels.ndim == 2 else 24
    rows = pixels if bits == 8 else pixels[..., ::-1]
    lines = [row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in (rows if top_down else rows[::-1])]
    table = b"" if palette is None else b"".join(bytes([b, g, r, 0]) for r, g, b in palette.tolist())
    start, body = 54 + len(table), b"".join(lines)
    signed = -height if top_down else height
    info = struct.pack("<IiiHHIIiiII", 40, width, signed, 1, bits, 0, len(body), 0, 0, len(table) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + table + body


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    kind=st.sampled_from(["grey palette", "palette", "colour"]),
    top_down=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_bmp_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, kind: str, top_down: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    palette = None
    if kind == "colour":
        pixels = expected = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        palette[:, 1:] = palette[:, :1] if kind == "grey palette" else palette[:, 1:]
        pixels = rng.integers(0, 256, (height, width), dtype=np.uint8)
        expected = palette[pixels]
    found = read_bytes(tmp_path_factory.getbasetemp(), bmp_bytes(pixels, palette, top_down), "image.bmp")
    if kind == "grey palette":
        np.testing.assert_array_equal(found, expected[..., 0])
    else:
        assume(not (expected == expected[..., :1]).all())
        np.testing.assert_array_equal(found, expected)
