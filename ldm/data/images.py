"""Read any image safely, its range of intensities, the composite and its border. NumPy, OpenCV and Pillow; no torch.

Pixels are HxW (grey) or HxWx3 (RGB), uint8 or uint16, as in the file. "Unit" images are float32 in [0, 1].
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.core.errors import FileError, MedSoftError, reading_fault
from ldm.data.png import PNG_SIGNATURE, check_png, check_size
from ldm.data.tiff import TIFF_HEADS, read_tiff, tiff_is_lossy, tiff_orientation

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DARK, BRIGHT = 0.5, 99.9  # percentiles: of all visible pixels, and of the body's
HUMP = 5  # percent: what counts as a maximum of its own stands so far above what surrounds it
BACKGROUND = 0.1  # of the way from the one to the other: what is darker is air
_ORIENTATION_TAG = 0x0112
PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"tEXt", b"pHYs", b"tIME"}  # nothing that changes what the pixels are
_ALPHA_MODES = ("LA", "RGBA", "La", "RGBa", "PA")  # Pillow's
_IMAGE_MAGIC = {PNG_SIGNATURE: "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", **dict.fromkeys(TIFF_HEADS, "TIFF")}
_OTHER_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"GIF8": "a GIF image",
    b"\0\0\0\x0cjP": "a JPEG 2000 image",
    b"\xffO\xffQ": "a JPEG 2000 image",
    b"RIFF": "a WebP or other RIFF file",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive (NIfTI?)",
    b"\x93NUMPY": "a NumPy array",
}


class ImageFile(NamedTuple):
    """An image file whose bytes were read once, for several questions to it. ``kind``: PNG, JPEG, BMP or TIFF."""

    path: Path
    data: bytes
    kind: str


ImageSource = str | Path | ImageFile


def read_image(path: ImageSource) -> np.ndarray:
    """Decode one image file completely: HxW or HxWx3, uint8 or uint16.

    One rule per kind of file: EXIF orientation is applied; alpha is dropped and what lies under alpha 0 becomes 0, so
    hidden colour never reaches training; a palette becomes RGB, or grey if all its used colours are grey; 1-bit becomes
    0/255; CMYK and other colour spaces become RGB; 16 bits stay 16 bits. Raises FileError naming file, cause and cure.
    """
    return _decode(open_image(path), indices=False)


def header_shapes(path: str | Path) -> set[tuple[int, int]]:
    """The (height, width) that an image can have by its file's header; none where Pillow reads none.

    Two where EXIF or TIFF's tag may turn it. An EXIF block behind the pixels of a PNG is not seen.
    """
    try:
        with Image.open(path, formats=sorted(set(_IMAGE_MAGIC.values()))) as opened:
            shape = opened.height, opened.width
            tags = getattr(opened, "tag_v2", {})
            turned = tags.get(_ORIENTATION_TAG, 1) != 1 or {"exif", "Raw profile type exif"} & opened.info.keys()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return set()
    return {shape, shape[::-1]} if turned else {shape}


def is_lossy(path: ImageSource) -> bool:
    """Whether an image file that can be read is compressed with loss (JPEG, also inside TIFF), which changes levels."""
    file = open_image(path)
    return file.kind == "JPEG" or (file.kind == "TIFF" and tiff_is_lossy(file.data))


def has_palette(file: ImageFile) -> bool:
    """Whether the pixels of a file may be indices of a palette; only of a PNG this is known without decoding it."""
    return file.kind != "PNG" or file.data[25:26] == b"\3"


def read_labels(path: ImageSource) -> np.ndarray:
    """Decode a label map: HxW integers. A palette file gives its indices; equal RGB channels count as grey."""
    file = open_image(path)
    labels = _decode(file, indices=True)
    if is_lossy(file):
        raise FileError(file.path, "a label map as JPEG, whose compression changes labels; export it as PNG")
    if not is_grey(labels):
        raise FileError(file.path, "expected a label map (grey or palette), found a colour image")
    return labels if labels.ndim == 2 else labels[..., 0]


def read_layers(path: ImageSource) -> np.ndarray:
    """Decode one image file as ``read_image`` does, with its alpha channel, if any, and nothing hidden.

    HxW, HxWx2 (grey, alpha), HxWx3 or HxWx4.
    """
    return _decode(open_image(path), indices=False, alpha=True)


def with_alpha(result: np.ndarray, path: ImageSource, inside: np.ndarray) -> np.ndarray:
    """``result`` (HxW or HxWx3, generated from ``read_image(path)``) with the file's own alpha channel: HxWx2 or HxWx4.

    Where ``inside`` (bool HxW) is False, the colour that lies under alpha 0 is the file's again. A file without alpha
    gives ``result`` itself.
    """
    layers = read_layers(path)
    channels = 1 if result.ndim == 2 else result.shape[2]
    if layers.ndim == 2 or layers.shape[2] == 3:
        return result
    whole = layers[..., [0, -1]] if channels == 1 else layers.copy()
    whole[inside, :channels] = result.reshape(*result.shape[:2], channels)[inside]
    return whole


def orientations_differ(paths: Iterable[ImageSource | None]) -> bool:
    """Whether image files that belong together are not all turned in the same way when they are read."""
    return len({_orientation_of(open_image(path)) for path in paths if path is not None}) > 1


def _orientation_of(file: ImageFile) -> int:
    """The EXIF or TIFF orientation of an image file that can be read: 1 (upright) to 8."""
    path, data, kind = file
    if kind == "TIFF":
        return tiff_orientation(data)
    if kind == "PNG" and b"eXIf" not in data and b"Raw profile type" not in data:
        return 1  # Pillow would decode the whole file to look for it
    with Image.open(io.BytesIO(data), formats=[kind]) as opened:
        return _exif_orientation(path, opened)


def _exif_orientation(path: Path, opened: Image.Image) -> int:
    """The orientation that an image's EXIF names, 1 (upright) to 8; 1 without EXIF, or with one that was emptied.

    FileError for an EXIF block that cannot be read: then nothing says how the image is turned.
    """
    if opened.format == "PNG":
        opened.load()  # the block may follow the pixels
    block = opened.info.get("exif", b"")
    if text := opened.info.get("Raw profile type exif"):  # as ImageMagick writes it: name, length, then hexadecimal
        block = block or bytes.fromhex("".join(text.split("\n")[3:]))
    if not block.removeprefix(b"Exif\0\0").strip(b"\0"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        found = exif.get(_ORIENTATION_TAG, 1)
    except Exception as error:  # Pillow raises many kinds
        reason = f"its EXIF block cannot be read ({error}), so nothing says how it is turned; remove it or export again"
        raise FileError(path, reason) from error
    return found if found in range(1, 9) else 1


def pixel_digest(pixels: np.ndarray) -> str:
    """SHA-256 of the pixels with their shape and type: equal for the same image in another file format."""
    head = f"{pixels.shape}{pixels.dtype}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def is_grey(image: np.ndarray) -> bool:
    """True for HxW, and for HxWx3 whose three channels are equal everywhere."""
    return image.ndim == 2 or bool((image == image[..., :1]).all())


def _decode(file: ImageFile, indices: bool, alpha: bool = False) -> np.ndarray:
    """The pixels, upright. ``indices``: of a palette. ``alpha``: HxWx2 or HxWx4, nothing hidden, if there is alpha."""
    path, data, kind = file
    try:
        if kind == "PNG" and check_png(path, data) <= PLAIN_CHUNKS and (grey := _plain_grey(data)) is not None:
            return grey
        found = read_tiff(path, data, indices) if kind == "TIFF" else None
        if found is None:
            with Image.open(io.BytesIO(data), formats=[kind]) as opened:
                check_size(path, *opened.size)
                if kind == "PNG" and getattr(opened, "n_frames", 1) > 1:
                    raise FileError(path, "holds several images; expected one")
                opened.info.pop("xmp", None)  # it may name a turn too, which Pillow would apply to TIFF files
                opened.load()
                deep = kind == "PNG" and data[24] == 16
                layers = _deep_layers(data, opened) if deep else _layers(opened, indices)
                if kind == "PNG" and data[25] in (0, 2) and "transparency" in opened.info:
                    layers = _with_transparent_level(layers, opened, data[24])
                found = layers, 1 if kind == "TIFF" else _exif_orientation(path, opened)  # Pillow has turned TIFF files
    except MedSoftError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(path, "declares more pixels than the limit; refused before decoding") from error
    except Exception as error:  # decoders raise many kinds of error on hostile files
        raise FileError(path, _decoding_error(kind, data, error)) from error
    layers, orientation = found
    if not alpha and layers.shape[2:] in ((2,), (4,)) and not layers[..., -1].any():
        raise FileError(path, "all of it is transparent (alpha 0 everywhere); export it without an alpha channel")
    return np.ascontiguousarray(_oriented(layers if alpha else _visible(layers), orientation))


def _plain_grey(data: bytes) -> np.ndarray | None:
    """HxW pixels of a sound PNG of PLAIN_CHUNKS if it is grey with 8 or 16 bits, else None.

    Most images and masks are: OpenCV, which applies nothing, decodes a small one in a fifth of Pillow's time.
    """
    depth, colour, interlaced = data[24], data[25], data[28]
    if depth not in (8, 16) or colour or interlaced or b"Raw profile type" in data:  # which may hold EXIF
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # beyond its limits
        return None
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    sound = pixels is not None and pixels.shape == (height, width) and 8 * pixels.dtype.itemsize == depth
    return pixels if sound else None


def _deep_layers(data: bytes, opened: Image.Image) -> np.ndarray:
    """Pixels and alpha of a 16-bit PNG; Pillow would cut colour and alpha down to 8 bits, so OpenCV decodes those."""
    layers: np.ndarray = np.asarray(opened).astype(np.uint16)
    if data[25] != 0:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None or decoded.dtype != np.uint16:
            raise ValueError("its 16-bit pixels cannot be decoded")
        channels = {2: [2, 1, 0], 4: [0, 3], 6: [2, 1, 0, 3]}[data[25]]  # by PNG's colour type; OpenCV's order is BGRA
        layers = decoded[..., channels]
    return layers


def _with_transparent_level(layers: np.ndarray, opened: Image.Image, depth: int) -> np.ndarray:
    """HxWx2 or HxWx4: alpha is 0 where HxW or HxWx3 ``layers`` have the level that a PNG of ``depth`` bits hides.

    Pillow scales pixels of 2 and 4 bits to 8, but not this level.
    """
    top = np.iinfo(layers.dtype).max
    level = np.bitwise_and(opened.info["transparency"], 2**depth - 1) * (top // (2**depth - 1))
    colours = layers.reshape(*layers.shape[:2], -1)
    alpha = np.where((colours == level).all(axis=2, keepdims=True), 0, top).astype(layers.dtype)
    return np.concatenate([colours, alpha], axis=2)


def _layers(opened: Image.Image, indices: bool) -> np.ndarray:
    """8-bit pixels, and alpha if there is one: HxW, HxWx2, HxWx3 or HxWx4."""
    mode = opened.mode
    if indices and mode == "P":
        return np.asarray(opened)
    if mode in _ALPHA_MODES or (mode == "P" and "transparency" in opened.info):
        rgba = np.asarray(opened.convert("RGBA"))
        grey = mode in ("LA", "La") or (mode in ("P", "PA") and is_grey(_visible(rgba)))
        return rgba[..., [0, 3]] if grey else rgba
    if mode in ("1", "L"):
        return np.asarray(opened if mode == "L" else opened.convert("L"))
    colours = np.asarray(opened.convert("RGB"))
    return colours[..., 0] if mode == "P" and is_grey(colours) else colours


def _visible(layers: np.ndarray) -> np.ndarray:
    """HxW or HxWx3 without the alpha channel: what lies under alpha 0 becomes 0."""
    if layers.ndim == 2 or layers.shape[2] == 3:
        return layers
    colours = np.where(layers[..., -1:] == 0, layers.dtype.type(0), layers[..., :-1])
    return colours[..., 0] if colours.shape[2] == 1 else colours


def _decoding_error(kind: str, data: bytes, error: Exception) -> str:
    """Why a file was not decoded: it is damaged, or of a kind that is not supported, or memory is short."""
    if isinstance(error, MemoryError):
        return reading_fault(error, "")
    reason = str(error) if "nsupported" in str(error) else None
    if kind == "TIFF" and isinstance(error, UnidentifiedImageError):  # its directory has been read before
        reason = "bits, photometric interpretation or byte order"
    frame = _jpeg_frame(data) if kind == "JPEG" else None
    if frame is not None and (frame[0] not in (0, 1, 2) or frame[1] != 8):
        reason = f"coding process {frame[0]}, {frame[1]} bits a sample"
    if reason:
        return f"this kind of {kind} file is not supported ({reason}); export it as 8- or 16-bit PNG"
    return f"damaged {kind}: it cannot be decoded ({error}); copy or export it again"


def _jpeg_frame(data: bytes) -> tuple[int, int] | None:
    """The coding process of a JPEG file (n of its SOFn marker; 55 is JPEG-LS) and its bits a sample."""
    place = 2
    while place + 5 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return marker - 0xC0, data[place + 4]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _oriented(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """The pixels upright, for an EXIF ``orientation``: 2, 4, 5 and 7 are mirrored too, the others only rotated."""
    if orientation == 1:
        return pixels
    mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    return np.rot90(mirrored, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0))


def open_image(path: ImageSource) -> ImageFile:
    """The bytes of an image file and its kind, told from the content, not the name; one that is open stays as it is.

    Raises FileError for a missing, unreadable or empty file, and for one that is no image, saying what it is.
    """
    if isinstance(path, ImageFile):
        return path
    path = path if isinstance(path, Path) else Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        reason = "points to a file that does not exist" if path.is_symlink() else "does not exist"
        raise FileError(path, reason) from error
    except IsADirectoryError as error:
        raise FileError(path, "expected an image file, found a folder") from error
    except OSError as error:
        raise FileError(path, f"could not be read ({error.strerror or error})") from error
    return ImageFile(path, data, _image_format(path, data[:512]))


def check_ends(path: str | Path) -> None:
    """A quick look at an image file: FileError if it is missing or unreadable, if its first bytes are not those of an
    image, or if it is a PNG without its end. What lies between is seen when it is decoded."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            kind = _image_format(path, handle.read(512))
            handle.seek(-min(1024, handle.seek(0, 2)), 2)
            ended = b"IEND" in handle.read()
    except OSError as error:
        raise FileError(path, f"could not be read ({error.strerror or error})") from error
    if kind == "PNG" and not ended:
        check_png(path, path.read_bytes())  # says what is wrong with it


def _image_format(path: Path, head: bytes) -> str:
    """The image format the first bytes of a file announce; FileError naming what the file is instead."""
    if not head:
        raise FileError(path, "the file is empty (0 bytes); copy it again")
    kind = next((kind for magic, kind in _IMAGE_MAGIC.items() if head.startswith(magic)), None)
    if kind is None:
        raise FileError(path, f"not an image: {_describe(head)}; expected PNG, JPEG, BMP or TIFF")
    return kind


def _describe(head: bytes) -> str:
    for magic, what in _OTHER_MAGIC.items():
        if head.startswith(magic):
            return f"this is {what}"
    if head[128:132] == b"DICM":
        return "this is a DICOM file: export it as PNG first"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "this is HTML or XML text (a failed download?)"
    text_bytes = set(range(32, 256)) | {7, 8, 9, 10, 12, 13, 27}
    if all(byte in text_bytes for byte in head):
        return "this is a text file"
    return f"unknown content beginning with {head[:8].hex(' ')}"


def intensity_range_of(
    image: np.ndarray, given: Sequence[float] | None = None, hidden: np.ndarray | None = None
) -> tuple[float, float]:
    """The (low, high) pixel values that become 0 and 1.

    8-bit: (0, 255). 16-bit: ``given`` (meta.json's ``window``: two rising numbers), or what the pixels that are not
    ``hidden`` (bool HxW) hold: from their 0.5 percentile to the 99.9 percentile of those brighter than a tenth of the
    way up. So air around the body takes no share in how bright bone may be. All pixels count where none is visible; a
    range without width is made one level wide. Raises MedSoftError for a ``given`` that leaves less than one of 256
    levels of the image.
    """
    if image.dtype == np.uint8:
        return 0.0, 255.0
    if given is not None:
        low, high = float(given[0]), float(given[1])
        darkest, brightest = float(image.min()), float(image.max())
        shared = min(high, brightest) - max(low, darkest)
        if shared < 0 or (darkest < brightest and shared < (high - low) / 256):
            raise MedSoftError(
                f"window: {given} does not meet the image, whose levels go from {darkest:g} to {brightest:g}; expected "
                "levels as they are in the file, not physical units such as HU"
            )
        return low, high
    visible = image if hidden is None or hidden.all() else image[~hidden]
    low, high = (float(value) for value in np.percentile(visible, (DARK, BRIGHT)))
    body = visible[visible > low + BACKGROUND * (high - low)]
    high = float(np.percentile(body, BRIGHT)) if body.size else low
    return low, max(high, low + 1.0)


def to_unit(image: np.ndarray, intensity_range: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 or uint16 pixels -> float32 in [0, 1], same shape; the range defaults to ``intensity_range_of(image)``."""
    low, high = intensity_range_of(image) if intensity_range is None else intensity_range
    return np.clip((image.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)


def composite(
    original: np.ndarray, generated: np.ndarray, soft: np.ndarray, intensity_range: tuple[float, float] | None = None
) -> np.ndarray:
    """``soft * generated + (1 - soft) * original`` at native size and depth; grey in, grey out, in three channels too.

    original: HxW or HxWx3, uint8 or uint16. generated: HxW or HxWx3 float in [0, 1], in the original's
    ``intensity_range`` (default ``intensity_range_of(original)``). soft: HxW float in [0, 1]. Where soft is 0
    the result equals the original bit for bit. Raises MedSoftError if the sizes differ or ``generated`` is not finite
    inside the mask's support.
    """
    if original.shape[:2] != soft.shape or original.shape[:2] != generated.shape[:2]:
        raise MedSoftError(
            f"composite: image {dimensions(original)}, generated {dimensions(generated)} and mask {dimensions(soft)} "
            "differ in size"
        )
    low, high = intensity_range_of(original) if intensity_range is None else intensity_range
    inside = soft > 0
    weight = soft[inside].astype(np.float32)
    unit = np.clip(match_channels(generated, original)[inside], 0, 1)
    values = unit * np.float32(high - low) + np.float32(low)
    if original.ndim == 3:
        weight = weight[:, None]
    blended = weight * values + (1 - weight) * original[inside].astype(np.float32)
    if not np.isfinite(blended).all():
        raise MedSoftError("the image holds values that are not numbers (NaN or infinity); nothing was written")
    result = original.copy()
    result[inside] = np.clip(np.rint(blended), 0, np.iinfo(original.dtype).max)
    return result


def border_gradient(unit: np.ndarray, soft: np.ndarray) -> float:
    """How visible the border of a mask is: the mean absolute difference of neighbours whose soft values differ.

    ``unit``: HxW or HxWx3 in [0, 1]; ``soft``: HxW. There the composite passes from the original to the generated
    image; a seam shows as a value that differs from the original's. NaN for a mask without a border.
    """
    grey = unit if unit.ndim == 2 else unit.mean(axis=2)
    across = np.concatenate([np.abs(np.diff(grey, axis=axis))[np.diff(soft, axis=axis) != 0] for axis in (0, 1)])
    return float(across.mean()) if across.size else float("nan")


def humps_of(unit: np.ndarray) -> int:
    """How many separate maxima of values (HxW in [0, 1]) stay below the maximum; a picture has dozens, a mask few.

    Counted are those from 0.1 to 0.8 that stand HUMP percent above what surrounds them, in the image brought to
    at most 128 pixels a side.
    """
    height, width = unit.shape
    scale = min(1.0, 128 / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    percent = np.rint(100 * cv2.resize(unit, size, interpolation=cv2.INTER_AREA)).astype(np.uint8)
    smooth, kernel = cv2.medianBlur(percent, 3), np.ones((3, 3), np.uint8)
    level = cv2.subtract(smooth, np.full_like(smooth, HUMP))
    while True:  # morphological reconstruction: what is left without the peaks
        grown = np.minimum(cv2.dilate(level, kernel), smooth)
        if (grown == level).all():
            break
        level = grown
    tops = (smooth - level >= HUMP) & (smooth > 10) & (smooth < 80)
    return int(cv2.connectedComponents(tops.astype(np.uint8), connectivity=8)[0]) - 1


def dimensions(image: np.ndarray) -> str:
    """Width x height in words, for messages."""
    return f"{image.shape[1]} x {image.shape[0]}"


def match_channels(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Float ``values``, HxW or HxWx3, with the channels of ``reference``: mean to grey, repeat to RGB; colour only for
    colour."""
    if reference.ndim == 2 and values.ndim == 3:
        return values.mean(axis=2)
    if reference.ndim == 3 and (values.ndim == 2 or is_grey(reference)):
        grey = values if values.ndim == 2 else values.mean(axis=2)
        return np.repeat(grey[..., None], 3, axis=2)
    return values
