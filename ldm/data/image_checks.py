"""Cheap checks of an image file before a decoder sees it: existence, kind, PNG chunk checksums, size in pixels."""

import struct
import zlib
from pathlib import Path

from ldm.core.errors import FileError

MAX_PIXELS = 80_000_000  # refused from the header; below the number from which Pillow itself starts to warn

TAIL = 1024  # bytes at a file's end that are looked at
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IMAGE_MAGIC = {
    PNG_SIGNATURE: "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_OTHER_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP or other RIFF file",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive (NIfTI?)",
    b"\x93NUMPY": "a NumPy array",
}


def read_image_bytes(path: str | Path) -> tuple[bytes, str]:
    """The bytes of an image file and its kind ("PNG", "JPEG", "BMP", "TIFF"), told from the content, not the name.

    Raises FileError for a missing, unreadable, empty or truncated file, for one that is no image (saying what it is)
    and for a PNG with a damaged chunk or more than MAX_PIXELS pixels: all before any pixel is decoded.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            kind = detect_image_format(path, handle.read(512))
            handle.seek(0)
            data = handle.read()
    except FileNotFoundError as error:
        reason = "points to a file that does not exist" if path.is_symlink() else "does not exist"
        raise FileError(path, reason) from error
    except IsADirectoryError as error:
        raise FileError(path, "expected an image file, found a folder") from error
    except OSError as error:
        raise FileError(path, f"could not be read ({error.strerror or error})") from error
    if kind == "PNG":
        check_png(path, data)
    return data, kind


def check_ends(path: str | Path) -> None:
    """A quick look at an image file: FileError if it is missing or unreadable, if its first bytes are not those of an
    image, or if it is a PNG without its end. What lies between is seen when it is decoded."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            kind = detect_image_format(path, handle.read(512))
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - TAIL))
            ended = b"IEND" in handle.read()
    except OSError as error:
        raise FileError(path, f"could not be read ({error.strerror or error})") from error
    if kind == "PNG" and not ended:
        read_image_bytes(path)  # says what is wrong with it


def detect_image_format(path: Path, head: bytes) -> str:
    """The image format the first bytes of a file announce; FileError naming what the file is instead."""
    if not head:
        raise FileError(path, "the file is empty (0 bytes); copy it again")
    for magic, kind in _IMAGE_MAGIC.items():
        if head.startswith(magic):
            return kind
    raise FileError(path, f"not an image: {_describe(head)}; expected PNG, JPEG, BMP or TIFF")


def _describe(head: bytes) -> str:
    for magic, what in _OTHER_MAGIC.items():
        if head.startswith(magic):
            return f"this is {what}"
    if head[128:132] == b"DICM":
        return "this is a DICOM file: export it as PNG first"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "this is an HTML page (a failed download?)"
    if start.startswith(b"<"):
        return "this is XML or HTML text"
    text_bytes = set(range(32, 256)) | {7, 8, 9, 10, 12, 13, 27}
    if all(byte in text_bytes for byte in head):
        return "this is a text file"
    return f"unknown content beginning with {head[:8].hex(' ')}"


def check_size(path: str | Path, width: int, height: int) -> None:
    """FileError when an image declares no pixels or more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise FileError(path, f"declares a size of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise FileError(path, f"declares {width} x {height} pixels, more than the limit of {limit} megapixels")


def check_png(path: str | Path, data: bytes) -> None:
    """Walk the chunks of a PNG: FileError for truncation, a wrong checksum, too many pixels or too little pixel data.

    Pillow accepts a wrong checksum and short pixel data silently and other decoders crash on them, so none of them sees
    such a file.
    """
    view, position, pixel_parts = memoryview(data), len(PNG_SIGNATURE), []
    while True:
        if position + 8 > len(data):
            raise FileError(path, f"truncated PNG ({len(data)} of at least {position + 12} bytes); copy it again")
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            at_least = end if name == b"IEND" else end + 12
            raise FileError(path, f"truncated PNG ({len(data)} of at least {at_least} bytes); copy it again")
        (stored,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[position + 4 : end - 4]) != stored:
            shown = name.decode("ascii", "backslashreplace")
            raise FileError(path, f"damaged PNG: wrong checksum in chunk {shown} at byte {position}; copy it again")
        if position == len(PNG_SIGNATURE):
            if name != b"IHDR" or length != 13:
                raise FileError(path, "damaged PNG: it does not begin with its header chunk")
            check_size(path, *struct.unpack_from(">II", data, position + 8))
        if name == b"IDAT":
            pixel_parts.append(view[position + 8 : end - 4])
        if name == b"IEND":
            break
        position = end
    if not pixel_parts:
        raise FileError(path, "damaged PNG: it holds no pixel data")
    expected = _raw_length(data)
    found = _inflated_length(path, pixel_parts, expected)
    if found < expected:
        raise FileError(path, f"damaged PNG: pixel data for {found} of {expected} bytes; copy or export it again")


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


def _inflated_length(path: str | Path, parts: list[memoryview], enough: int) -> int:
    """Inflate in small pieces, keeping none, until ``enough`` bytes came out or the stream ends."""
    inflater, total = zlib.decompressobj(), 0
    try:
        for part in parts:
            waiting: bytes | memoryview = part
            while waiting and total < enough and not inflater.eof:
                total += len(inflater.decompress(waiting, 1 << 20))
                waiting = inflater.unconsumed_tail
    except zlib.error as error:
        raise FileError(path, f"damaged PNG: its pixel data cannot be inflated ({error}); copy it again") from error
    return total
