"""TIFF files: what their directory says, and the pixels that Pillow reads wrongly or not at all. No torch.

Pillow takes 16-bit white-is-zero for black-is-zero, cuts 16-bit colour down to 8 bits, wraps signed bytes, and knows
neither 16-bit planes nor 16-bit grey with alpha nor big-endian BigTIFF, and takes colour maps of 8 bits for black. Such
files are read here: Pillow decompresses their strips or tiles under a new directory, which calls each row of pixels a
longer row of grey samples.
"""

import io
import re
import struct
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.core.errors import FileError
from ldm.data.png import MAX_PIXELS, check_size

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF's
_NAMES = {
    256: "width",
    257: "height",
    258: "bits",
    259: "compression",
    262: "photometric",
    266: "fill_order",
    273: "offsets",
    274: "orientation",
    277: "samples",
    278: "rows",
    279: "counts",
    284: "planar",
    317: "predictor",
    320: "colour_map",
    322: "tile_width",
    323: "tile_height",
    324: "offsets",
    325: "counts",
    338: "extra",
    339: "formats",
}
_FIELD_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of a tag's values, in struct's letters
_UNSIGNED, _SIGNED = 1, 2
_FORMATS = {_UNSIGNED: "unsigned", _SIGNED: "signed", 3: "floating-point"}
_UNCOMPRESSED, _JPEG = 1, 7
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
_LOSSY = (6, _JPEG, 34712, 50001)  # JPEG of two kinds, JPEG 2000, WebP
_WITHOUT_PREDICTOR = (1, 32773)  # there the tag means nothing
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
# What ImageJ and tifffile note where one directory stands for a stack whose other images lie behind the first.
_STACK = re.compile(rb'ImageJ=[^\0]*\nimages=(?!1\n)\d|\{"shape": [^\0]*"truncated": true')
_PREMULTIPLIED, _ALPHA = 1, 2  # kinds of extra samples; another one is not part of the image


@dataclass(frozen=True)
class TiffLayout:
    """One directory, by the names of the TIFF 6.0 specification; ``offsets`` and ``counts`` are of strips or tiles."""

    order: str  # of bytes, in struct's letters: "<" or ">"
    big: bool
    width: int = 0
    height: int = 0
    bits: tuple[int, ...] = (1,)
    formats: tuple[int, ...] = (1,)
    samples: int = 1
    photometric: int = -1
    compression: int = 1
    planar: int = 1
    predictor: int = 1
    fill_order: int = 1
    colour_map: tuple[int, ...] = ()
    orientation: int = 1
    extra: tuple[int, ...] = ()
    rows: int = 0  # of a strip
    tile_width: int = 0
    tile_height: int = 0
    offsets: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def colours(self) -> int:
        """Samples of a pixel without its extra ones."""
        return {_RGB: 3, _YCBCR: 3, _CMYK: 4}.get(self.photometric, 1)

    @property
    def piece_sizes(self) -> list[int]:
        """Bytes of each of the strips or tiles that the pixels fill, before they are compressed."""
        height = self.tile_height or min(self.rows or self.height, self.height)
        across = -(-self.width // self.tile_width) if self.tile_width else 1
        planes = self.samples if self.planar == 2 else 1
        row = -(-(self.tile_width or self.width) * self.bits[0] * self.samples // planes // 8)
        rows = [height if self.tile_width else min(height, self.height - top) for top in range(0, self.height, height)]
        return [count * row for count in rows for _ in range(across)] * planes

    @property
    def exact_in_pillow(self) -> bool:
        """Whether Pillow reads exactly what the file says."""
        known_order = (self.order, self.big) != (">", True)
        if not self._uniform or self.formats[0] != _UNSIGNED or self.planar != 1 or not known_order:
            return False
        if self.samples == 1:
            return self.bits[0] in (1, 2, 4, 8) and self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE)
        coloured = self.photometric in (_RGB, _CMYK) or (self.photometric, self.compression) == (_YCBCR, _JPEG)
        alpha = self.extra in ((_ALPHA,), (_PREMULTIPLIED,)) and self.photometric == _RGB
        whole = self.samples == self.colours + len(self.extra) and self.bits[0] == 8
        return whole and coloured and (alpha or not self.extra)

    @property
    def exact_here(self) -> bool:
        """Whether ``_stored_samples`` reads exactly what the file says."""
        readable = self.compression in _LOSSLESS and self.predictor in (1, 2) and self.fill_order == 1
        if not self._uniform or not readable or self.samples != self.colours + len(self.extra):
            return False
        if self.formats[0] == _UNSIGNED and self.bits[0] in (8, 16):
            colours = self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)
            return colours and self.extra.count(_ALPHA) < 2 and _PREMULTIPLIED not in self.extra
        integers = self.formats[0] in (_UNSIGNED, _SIGNED) and self.bits[0] in (8, 16, 32)
        return integers and (self.photometric, self.samples) == (_BLACK_IS_ZERO, 1)

    @property
    def _uniform(self) -> bool:
        """Whether all samples of a pixel have the same depth and format, and none is missing."""
        return len({*self.bits}) == len({*self.formats}) == 1 and self.samples >= self.colours

    def __str__(self) -> str:
        kind = _FORMATS.get(self.formats[0], "untyped or complex")
        return (
            f"{max(self.bits)}-bit {kind} samples, {self.samples} a pixel, extra samples {[*self.extra]}, photometric "
            f"interpretation {self.photometric}, compression {self.compression}, planar configuration {self.planar}"
        )


def read_tiff(path: Path, data: bytes, indices: bool) -> tuple[np.ndarray, int] | None:
    """The pixels of a TIFF file and its orientation tag; None for a file that Pillow reads exactly.

    ``indices``: those of a palette are wanted, not its colours.

    HxW, HxWx2 (grey, alpha), HxWx3 or HxWx4, uint8 or uint16, black is zero, not yet turned upright. FileError for
    several images, for a sound file of a kind that is not supported (saying which), and for a damaged one.
    """
    try:
        layout, several = _directory(data)
    except struct.error as error:
        raise FileError(path, "damaged TIFF: its directory cannot be read; copy or export it again") from error
    if several or _STACK.search(data):
        raise FileError(path, "holds several images; expected one")
    check_size(path, layout.width, layout.height)
    if not (layout.exact_in_pillow or layout.exact_here):
        raise FileError(path, f"this kind of TIFF file is not supported ({layout}); export it as 8- or 16-bit PNG")
    sizes = layout.piece_sizes
    if layout.compression == _UNCOMPRESSED:  # there the counts say nothing new, and may be missing
        counts = tuple(map(max, zip_longest(sizes, layout.counts[: len(sizes)], fillvalue=0)))
        layout = replace(layout, counts=counts)
    ends = [offset + count for offset, count in zip(layout.offsets, layout.counts, strict=False)]
    if layout.offsets and not layout.counts:
        raise FileError(path, "its compressed strips have no StripByteCounts, so they cannot be found; export it again")
    if len(ends) < len(sizes):
        raise FileError(path, f"damaged TIFF: {len(ends)} of {len(sizes)} strips or tiles are named; export it again")
    if max(ends) > len(data):
        raise FileError(path, f"damaged TIFF: its {len(data)} bytes end before its pixel data; copy it again")
    if layout.photometric == _PALETTE and len(layout.colour_map) != 3 * 2 ** layout.bits[0]:
        entries = f"{len(layout.colour_map)} entries, expected {3 * 2 ** layout.bits[0]}"
        raise FileError(path, f"damaged TIFF: its colour map has {entries}; export it again")
    if layout.colour_map and max(layout.colour_map) <= 255 and not indices:
        return _coloured(data, layout), 1
    if layout.exact_in_pillow:
        return None
    if layout.width * layout.height * layout.samples > MAX_PIXELS:
        raise FileError(path, f"a TIFF file of this kind with more than {MAX_PIXELS:,} samples; export it as PNG")
    return _black_is_zero(path, layout, _stored_samples(data, layout)), layout.orientation


def tiff_orientation(data: bytes) -> int:
    """The orientation tag of a TIFF file that can be read: 1 (upright) to 8."""
    return _directory(data)[0].orientation


def tiff_is_lossy(data: bytes) -> bool:
    """Whether the pixels of a TIFF file that can be read are compressed with loss."""
    return _directory(data)[0].compression in _LOSSY


def _directory(data: bytes) -> tuple[TiffLayout, bool]:
    """The first directory, and whether another one follows; struct.error if the file ends before they do."""
    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    pointer, entries, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")

    def read(kinds: str, place: int) -> tuple[int, ...]:
        return struct.unpack_from(order + kinds, data, place)

    (place,) = read(pointer, 8 if big else 4)
    (count,) = read(entries, place)
    place += struct.calcsize(order + entries)
    room = struct.calcsize(order + pointer)
    found: dict[str, Any] = {}
    for _ in range(count):
        tag, kind, length = read(entry, place)
        place += struct.calcsize(order + entry)
        if tag in _NAMES and kind in _FIELD_TYPES and length:
            values = f"{length}{_FIELD_TYPES[kind]}"
            (start,) = (place,) if struct.calcsize(order + values) <= room else read(pointer, place)
            name = _NAMES[tag]
            several = name in ("bits", "formats", "extra", "offsets", "counts", "colour_map")
            found[name] = read(values, start) if several else read(values, start)[0]
        place += room
    return TiffLayout(order, big, **found), read(pointer, place) != (0,)


def _stored_samples(data: bytes, layout: TiffLayout) -> np.ndarray:
    """HxWxS samples as they are stored, in unsigned integers of the file's depth."""
    planes = layout.samples if layout.planar == 2 else 1
    across, strips = layout.samples // planes, len(layout.offsets) // planes
    found = []
    for plane in range(planes):
        part = slice(plane * strips, (plane + 1) * strips)
        rows = _as_grey(data, layout, across, layout.offsets[part], layout.counts[part])
        samples = rows.reshape(layout.height, layout.width, across)
        if layout.predictor == 2 and layout.compression not in _WITHOUT_PREDICTOR:
            # Differences from the left neighbour, within a tile.
            for left in range(0, layout.width, layout.tile_width or layout.width):
                tile = samples[:, left : left + (layout.tile_width or layout.width)]
                np.cumsum(tile, axis=1, dtype=tile.dtype, out=tile)
        found.append(samples)
    return np.concatenate(found, axis=2)


def _coloured(data: bytes, layout: TiffLayout) -> np.ndarray:
    """A palette image, HxW or HxWx3, whose colour map has 8 bits: none of its numbers, which have 16, is above 255.

    Pillow has turned it upright.
    """
    with Image.open(io.BytesIO(data), formats=["TIFF"]) as opened:
        opened.info.pop("xmp", None)
        colours = np.array(layout.colour_map, np.uint8).reshape(3, -1).T[np.asarray(opened)]
    return colours[..., 0] if (colours == colours[..., :1]).all() else colours


def _as_grey(
    data: bytes, layout: TiffLayout, across: int, offsets: tuple[int, ...], counts: tuple[int, ...]
) -> np.ndarray:
    """H x (W * across) samples: the strips or tiles of one plane, read under a directory that calls them grey."""
    bits, order = layout.bits[0], layout.order
    signed = _SIGNED if bits == 32 else _UNSIGNED  # Pillow's 32-bit integers are signed
    numbers = {256: layout.width * across, 257: layout.height, 258: bits, 259: layout.compression, 262: _BLACK_IS_ZERO}
    numbers |= {277: 1, 339: signed}
    if layout.tile_width:
        numbers |= {322: layout.tile_width * across, 323: layout.tile_height}
    else:
        numbers |= {278: layout.rows or layout.height}
    tags: dict[int, tuple[int, ...]] = {tag: (number,) for tag, number in numbers.items()}
    tags |= {324: offsets, 325: counts} if layout.tile_width else {273: offsets, 279: counts}
    entries, lists, start = b"", b"", len(data)
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        place = struct.pack(order + "I", start + 2 + 12 * len(tags) + 4 + len(lists))
        entries += struct.pack(order + "HHI", tag, 4, len(values)) + (packed if len(values) == 1 else place)
        lists += packed if len(values) > 1 else b""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", start)
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4) + lists
    with Image.open(io.BytesIO(head + data[8:] + directory), formats=["TIFF"]) as opened:
        return np.asarray(opened).astype(f"u{bits // 8}")


def _black_is_zero(path: Path, layout: TiffLayout, samples: np.ndarray) -> np.ndarray:
    """The image in stored ``samples`` (HxWxS): white-is-zero inverted, extra samples other than alpha left out."""
    if layout.formats[0] == _SIGNED or layout.bits[0] == 32:
        values = samples[..., 0]
        if layout.formats[0] == _SIGNED:
            values = values.view(f"i{layout.bits[0] // 8}")
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise FileError(
                path, f"values from {low} to {high}; expected 8- or 16-bit unsigned ones, export it as such"
            )
        return values.astype(np.uint8 if layout.bits[0] == 8 else np.uint16)
    image = samples[..., : layout.colours]
    if layout.photometric == _WHITE_IS_ZERO:
        image = np.iinfo(image.dtype).max - image
    if _ALPHA in layout.extra:
        alpha = layout.colours + layout.extra.index(_ALPHA)
        return np.concatenate([image, samples[..., alpha : alpha + 1]], axis=2)
    return image[..., 0] if layout.colours == 1 else image
