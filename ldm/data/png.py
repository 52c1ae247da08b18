"""PNG files: written with 8 or 16 bits and text tags, and checked before a decoder sees them. No torch."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_file

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
MAX_PIXELS = 80_000_000  # refused from the header; below the number from which Pillow itself starts to warn
_COLOUR_TYPES = {(): 0, (3,): 2, (2,): 4, (4,): 6}  # PNG's, by the shape beyond height and width
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def write_png(path: str | Path, array: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write HxW or HxWx3 uint8 or uint16 pixels, or HxWx2 or HxWx4 with alpha, as PNG, atomically.

    ``text`` becomes PNG text tags. Anything else (float values, NaN, other shapes) is refused with a MedSoftError: a
    silent cast would draw black.
    """
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.shape[2:] not in _COLOUR_TYPES:
        raise MedSoftError(
            f"{path}: expected HxW or HxWx3 pixels of 8 or 16 bits, found {array.dtype} of shape {array.shape}"
        )
    encoded = encode_png(array, text)
    with atomic_file(path) as handle:
        handle.write(encoded)


def encode_png(array: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """PNG bytes of valid pixels: one filter ("sub") and zlib level 1, so the same pixels always give the same file."""
    height, width = array.shape[:2]
    depth = array.dtype.itemsize
    step = depth * (array.shape[2] if array.ndim == 3 else 1)  # bytes per pixel
    raw = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder(">")).view(np.uint8).reshape(height, width * step)
    rows = np.empty((height, 1 + width * step), np.uint8)
    rows[:, 0] = 1
    rows[:, 1 : 1 + step] = raw[:, :step]
    np.subtract(raw[:, step:], raw[:, :-step], out=rows[:, 1 + step :])
    header = struct.pack(">IIBBBBB", width, height, 8 * depth, _COLOUR_TYPES[array.shape[2:]], 0, 0, 0)
    chunks = [_chunk(b"IHDR", header)]
    chunks += [_text_chunk(key, value) for key, value in (text or {}).items()]
    chunks += [_chunk(b"IDAT", zlib.compress(rows.data, 1)), _chunk(b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _text_chunk(key: str, value: str) -> bytes:
    keyword = key.encode("latin-1")
    if not 1 <= len(keyword) <= 79 or b"\0" in keyword:
        raise MedSoftError(f"PNG text tag {key!r}: expected a name of 1 to 79 characters")
    value = value.replace("\0", " ")
    try:
        return _chunk(b"tEXt", keyword + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", keyword + b"\0\0\0\0\0" + value.encode("utf-8"))


def check_size(path: str | Path, width: int, height: int) -> None:
    """FileError when an image declares no pixels or more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise FileError(path, f"declares a size of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise FileError(path, f"declares {width} x {height} pixels, more than the limit of {limit} megapixels")


def check_png(path: str | Path, data: bytes) -> set[bytes]:
    """The names of a PNG's chunks; FileError for one that is truncated, damaged or too large, or short of pixel data.

    Pillow accepts a damaged end and short pixel data silently, on which other decoders crash: both are looked for here,
    as are checksums.
    """
    if len(data) >= 16 and data[8:16] != b"\0\0\0\rIHDR":
        raise FileError(path, "damaged PNG: it does not begin with its header chunk")
    if len(data) < len(PNG_SIGNATURE) + 25 or PNG_END not in data:
        raise FileError(path, f"truncated PNG ({len(data)} bytes, its end is missing); copy it again")
    check_size(path, *struct.unpack_from(">II", data, 16))  # Pillow itself would only warn, or say less
    pixels, names = _pixel_chunks(path, data)
    found = _inflated_length(path, pixels, expected := _raw_length(data))
    if found < expected:
        raise FileError(path, f"damaged PNG: pixel data for {found} of {expected} bytes; copy or export it again")
    return names


def _pixel_chunks(path: str | Path, data: bytes) -> tuple[list[memoryview], set[bytes]]:
    """The compressed pixel data, and the names of all chunks.

    FileError for a chunk that is cut, misnamed or has a wrong checksum, or if none holds pixels.
    """
    view, place, name = memoryview(data), len(PNG_SIGNATURE), b""
    found: list[memoryview] = []
    names: set[bytes] = set()
    while name != b"IEND":
        before = name
        length, name = struct.unpack_from(">I4s", data, place) if place + 12 <= len(data) else (len(data), b"")
        end = place + 12 + length
        if end > len(data) or not name.isalpha():
            raise FileError(path, f"damaged PNG: broken chunk at byte {place}; copy it again")
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise FileError(path, f"damaged PNG: wrong checksum in chunk {name.decode()}; copy it again")
        if name == b"IDAT" and (not found or before == name):  # decoders stop at the first other chunk
            found.append(view[place + 8 : end - 4])
        names.add(name)
        place = end
    if not found:
        raise FileError(path, "damaged PNG: it holds no pixel data")
    return found, names


def _raw_length(data: bytes) -> int:
    """How many bytes the inflated pixel data of a PNG must have, by its header."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    total = 0
    for x, y, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total


def _inflated_length(path: str | Path, pieces: Sequence[memoryview], enough: int) -> int:
    """Inflate the pixel data in small parts, keeping none, until ``enough`` bytes came out or the stream ends."""
    stream, total, part = zlib.decompressobj(), 0, 1 << 20
    try:
        for piece in pieces:
            left: memoryview | bytes = piece
            found = part
            while total < enough and not stream.eof and (left or found == part):
                found = len(stream.decompress(left, part))
                left, total = stream.unconsumed_tail, total + found
    except zlib.error as error:
        raise FileError(path, f"damaged PNG: its pixel data cannot be inflated ({error}); copy it again") from error
    return total
