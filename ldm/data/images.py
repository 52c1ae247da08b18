"""Read any image safely, bring it to the model's square and back, write PNG. NumPy, OpenCV and Pillow; no torch.

Pixels are HxW (grey) or HxWx3 (RGB), uint8 or uint16, as in the file. "Unit" images are float32 in [0, 1].
"""

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import atomic_file
from ldm.data.image_checks import PNG_SIGNATURE, check_size, read_image_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
PERCENTILES = (0.5, 99.5)
FIT_MODES = ("crop", "pad", "resize")
_ORIENTATION_TAG = 0x0112
_ALPHA_MODES = ("LA", "RGBA", "La", "RGBa", "PA")  # Pillow's
_COLOUR_TYPES = {(): 0, (3,): 2, (2,): 4, (4,): 6}  # PNG's, by the shape beyond height and width


# ---------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path) -> np.ndarray:
    """Decode one image file completely: HxW or HxWx3, uint8 or uint16.

    One rule per kind of file: EXIF orientation is applied; alpha is dropped and what lies under alpha 0 becomes 0, so
    hidden colour never reaches training; a palette becomes RGB, or grey if all its used colours are grey; 1-bit becomes
    0/255; CMYK and other colour spaces become RGB; 16 bits stay 16 bits. Raises FileError naming file, cause and cure.
    """
    return _read(Path(path), indices=False)


def read_labels(path: str | Path) -> np.ndarray:
    """Decode a label map: HxW integers. A palette file gives its indices; equal RGB channels count as grey."""
    labels = _read(Path(path), indices=True)
    if not is_grey(labels):
        raise FileError(path, "expected a label map (grey or palette), found a colour image")
    return labels if labels.ndim == 2 else labels[..., 0]


def with_alpha(result: np.ndarray, path: str | Path, inside: np.ndarray) -> np.ndarray:
    """``result`` (HxW or HxWx3, drawn on ``read_image(path)``) with the file's own alpha channel: HxWx2 or HxWx4.

    Where ``inside`` (bool HxW) is False, the colour that lies under alpha 0 is the file's again. A file without alpha
    gives ``result`` itself.
    """
    with Image.open(path) as opened:  # reads the header only
        if opened.mode not in _ALPHA_MODES and "transparency" not in opened.info:
            return result
    layers = _read(Path(path), indices=False, alpha=True)
    channels = 1 if result.ndim == 2 else result.shape[2]
    if layers.ndim == 2 or layers.shape[2] == 3:
        return result
    whole = layers[..., [0, -1]] if channels == 1 else layers.copy()
    whole[inside, :channels] = result.reshape(*result.shape[:2], channels)[inside]
    return whole


def is_grey(image: np.ndarray) -> bool:
    """True for HxW, and for HxWx3 whose three channels are equal everywhere."""
    return image.ndim == 2 or bool((image == image[..., :1]).all())


def _read(path: Path, indices: bool, alpha: bool = False) -> np.ndarray:
    """``alpha``: HxWx4 with nothing hidden, if the file has an alpha channel."""
    data, kind = read_image_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as opened:
            check_size(path, *opened.size)
            if kind == "TIFF" and getattr(opened, "n_frames", 1) > 1:
                raise FileError(path, f"holds {opened.n_frames} images; expected one")
            opened.load()
            deep = _deep_colour(data, kind, alpha)
            pixels = deep if deep is not None else _pixels(path, opened, indices, alpha)
            orientation = opened.getexif().get(_ORIENTATION_TAG, 1)
    except MedSoftError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(path, "declares more pixels than the limit; refused before decoding") from error
    except Exception as error:  # decoders raise many kinds of error on hostile files
        raise FileError(path, f"damaged {kind}: it cannot be decoded ({error}); copy or export it again") from error
    return np.ascontiguousarray(_oriented(pixels, orientation))


def _deep_colour(data: bytes, kind: str, alpha: bool) -> np.ndarray | None:
    """Pixels of a 16-bit PNG with colour or alpha, which Pillow would cut down to 8 bits; None for any other file."""
    if kind != "PNG" or data[24] != 16 or data[25] == 0:
        return None
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        raise ValueError("its 16-bit pixels cannot be decoded")
    if decoded.shape[2] == 4 and alpha:
        return decoded[..., [2, 1, 0, 3]]
    if decoded.shape[2] == 4:
        decoded = np.where(decoded[..., 3:] == 0, np.uint16(0), decoded)[..., :3]
    grey_file = data[25] == 4
    return decoded[..., 0] if grey_file else decoded[..., ::-1]


def _pixels(path: Path, opened: Image.Image, indices: bool, alpha: bool) -> np.ndarray:
    mode = opened.mode
    if indices and mode == "P":
        return np.asarray(opened)
    if mode.startswith("I") or mode == "F":
        return _deep_grey(path, np.asarray(opened))
    if mode in _ALPHA_MODES or "transparency" in opened.info:
        grey = mode in ("LA", "La", "L", "1")
        rgba = np.asarray(opened.convert("RGBA"))
        if alpha:
            return rgba
        visible = np.where(rgba[..., 3:] == 0, np.uint8(0), rgba[..., :3])
        return visible[..., 0] if grey or (mode in ("P", "PA") and is_grey(visible)) else visible
    if mode == "P":
        colours = np.asarray(opened.convert("RGB"))
        return colours[..., 0] if is_grey(colours) else colours
    if mode in ("1", "L"):
        return np.asarray(opened.convert("L"))
    return np.asarray(opened.convert("RGB"))


def _deep_grey(path: Path, values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" or low < 0 or high > 65535:
        raise FileError(path, f"values from {low} to {high}; expected 8- or 16-bit unsigned pixels, export it as such")
    return values.astype(np.uint16)


def _oriented(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    transposed = np.swapaxes(pixels, 0, 1)
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }
    return turned.get(orientation, pixels)


# ---------------------------------------------------------------------------------------------------- depth


def intensity_range_of(image: np.ndarray, given: Any = None) -> tuple[float, float]:
    """The (low, high) pixel values that become 0 and 1.

    8-bit: (0, 255). 16-bit: ``given`` (for instance meta.json's ``window``) or the 0.5-99.5 percentile; where those
    coincide the extremes, and for a constant image one level above it. Raises MedSoftError for a ``given`` that is not
    two rising numbers.
    """
    if image.dtype == np.uint8:
        return 0.0, 255.0
    if given is not None:
        try:
            low, high = (float(value) for value in given)
        except (TypeError, ValueError) as error:
            raise MedSoftError(f"window: expected two numbers [low, high], found {given!r}") from error
        if not (np.isfinite([low, high]).all() and low < high):
            raise MedSoftError(f"window: expected low < high, found {given!r}")
        return low, high
    low, high = (float(value) for value in np.percentile(image, PERCENTILES))
    if low >= high:
        low, high = float(image.min()), float(image.max())
    return low, max(high, low + 1.0)


def to_unit(image: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 or uint16 pixels -> float32 in [0, 1], same shape; ``window`` defaults to ``intensity_range_of(image)``."""
    low, high = intensity_range_of(image) if window is None else window
    return np.clip((image.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)


def from_unit(values: np.ndarray, window: tuple[float, float], dtype: Any = np.uint8) -> np.ndarray:
    """The inverse of ``to_unit``: float values -> rounded and clipped pixels of ``dtype``. Refuses NaN and infinity."""
    return _to_pixels(_unwindowed(values, window), np.dtype(dtype))


def _unwindowed(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return np.clip(values, 0, 1) * np.float32(high - low) + np.float32(low)


def _to_pixels(levels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not np.isfinite(levels).all():
        raise MedSoftError("the picture holds values that are not numbers (NaN or infinity); nothing was written")
    return np.clip(np.rint(levels), 0, np.iinfo(dtype).max).astype(dtype)


def composite(
    original: np.ndarray, generated: np.ndarray, soft: np.ndarray, window: tuple[float, float] | None = None
) -> np.ndarray:
    """``soft * generated + (1 - soft) * original`` at native size and depth; grey in, grey out, in three channels too.

    original: HxW or HxWx3, uint8 or uint16. generated: HxW or HxWx3 float in [0, 1], in the original's ``window``
    (default ``intensity_range_of(original)``). soft: HxW float in [0, 1]. Where soft is 0 the result equals the
    original bit for bit. Raises MedSoftError if the sizes differ or ``generated`` is not finite inside the mask's
    support.
    """
    if original.shape[:2] != soft.shape or original.shape[:2] != generated.shape[:2]:
        raise MedSoftError(
            f"composite: image {_size(original)}, generated {_size(generated)} and mask {_size(soft)} differ in size"
        )
    window = intensity_range_of(original) if window is None else window
    inside = soft > 0
    weight = soft[inside].astype(np.float32)
    fresh = _unwindowed(_like_channels(generated, original)[inside], window)
    if original.ndim == 3:
        weight = weight[:, None]
    result = original.copy()
    blended = weight * fresh + (1 - weight) * original[inside].astype(np.float32)
    result[inside] = _to_pixels(blended, original.dtype)
    return result


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _like_channels(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Bring float ``values`` to the channels of ``reference``: mean to grey, repeat to RGB; colour only for colour."""
    if reference.ndim == 2 and values.ndim == 3:
        return values.mean(axis=2)
    if reference.ndim == 3 and (values.ndim == 2 or is_grey(reference)):
        grey = values if values.ndim == 2 else values.mean(axis=2)
        return np.repeat(grey[..., None], 3, axis=2)
    return values


# ---------------------------------------------------------------------------------------------------- writing


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
    chunks += [_chunk(b"IDAT", zlib.compress(rows, 1)), _chunk(b"IEND", b"")]
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


# ---------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fit:
    """How an image and its mask are brought to the model's ``size`` x ``size`` square.

    ``crop``: a square around the lesion of at least ``context`` times its longest side, at native pixels where
    ``size`` native pixels suffice; ``pad``: the whole image in a square, its border repeated; ``resize``: the whole
    image stretched.
    """

    mode: str = "crop"
    size: int = 512
    context: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in FIT_MODES:
            raise UsageError(f"fit.mode: expected one of {', '.join(FIT_MODES)}, found {self.mode!r}")
        if self.size < 1:
            raise UsageError(f"fit.size: expected a positive number of pixels, found {self.size}")
        if not self.context >= 1:
            raise UsageError(f"fit.context: expected at least 1, found {self.context}")

    def window(
        self, shape: tuple[int, ...], mask: np.ndarray | None = None, offset: tuple[float, float] = (0, 0)
    ) -> "CropWindow":
        """The part of an image of ``shape`` (H, W, ...) that the model sees, for a lesion ``mask`` (HxW in [0, 1]).

        Without a mask, or with an empty one, ``crop`` takes the whole image as ``pad`` does. ``offset`` (down, right)
        moves a crop by that share of its side, as far as the lesion and the image allow.
        """
        height, width = int(shape[0]), int(shape[1])
        if mask is not None and mask.shape != (height, width):
            raise MedSoftError(f"fit: the image has {width} x {height} pixels, the mask {_size(mask)}")
        if self.mode == "resize":
            return CropWindow(0, 0, height, width, self.size)
        longest = max(height, width)
        if self.mode == "pad" or mask is None or not (mask > 0).any():
            return CropWindow(-((longest - height) // 2), -((longest - width) // 2), longest, longest, self.size)
        support = extents(mask > 0)
        core = extents(mask >= 0.5) if (mask >= 0.5).any() else support
        wanted = max(
            int(np.ceil(self.context * max(last - first for first, last in core))),
            min(self.size, longest),
            *(last - first for first, last in support),
        )
        side = min(wanted, longest)
        top, left = (
            _start(side, length, c, s, round(share * side))
            for length, c, s, share in zip((height, width), core, support, offset, strict=True)
        )
        return CropWindow(top, left, side, side, self.size)


def extents(region: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, last + 1) of the rows and of the columns that a non-empty boolean region (HxW) occupies."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _start(side: int, length: int, core: tuple[int, int], support: tuple[int, int], move: int) -> int:
    """Where a window of ``side`` begins along one axis: centred on core, moved, holding support, inside if it fits."""
    if side >= length:
        return -((side - length) // 2)
    start = (core[0] + core[1] - side) // 2 + move
    start = min(max(start, support[1] - side), support[0])
    return min(max(start, 0), length - side)


@dataclass(frozen=True)
class CropWindow:
    """A rectangle of native pixels (it may reach beyond the image, where the border is repeated) and the model size."""

    top: int
    left: int
    height: int
    width: int
    size: int

    @property
    def exact(self) -> bool:
        """True if one model pixel is one native pixel."""
        return self.height == self.width == self.size

    def forward(self, image: np.ndarray) -> np.ndarray:
        """HxW(x3) -> size x size(x3), float32: area average down, cubic up (never beyond the values present)."""
        return _resized(self._cut(image).astype(np.float32), self.size, self.size)

    def forward_mask(self, mask: np.ndarray) -> np.ndarray:
        """HxW in [0, 1] (or bool) -> size x size float32; each pixel is the maximum of what it covers.

        So no lesion is lost, however small. Beyond the image the border is repeated, as in ``forward``: what is hidden
        at the border stays hidden beyond it.
        """
        cut = self._cut(mask).astype(np.float32)
        return _max_resized(_max_resized(cut, self.size).T, self.size).T.copy()

    def backward(self, values: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        """size x size(x3) float values -> a float32 copy of ``canvas`` (HxW or HxWx3) with the window's part replaced.

        Pixel exact both ways when no scaling is needed; the number of channels follows the canvas.
        """
        if values.shape[:2] != (self.size, self.size):
            raise MedSoftError(
                f"window: expected {self.size} x {self.size} pixels from the model, found {_size(values)}"
            )
        result = canvas.astype(np.float32)
        native = _resized(_like_channels(values, canvas).astype(np.float32), self.height, self.width)
        top, left = max(self.top, 0), max(self.left, 0)
        bottom = min(self.top + self.height, canvas.shape[0])
        right = min(self.left + self.width, canvas.shape[1])
        result[top:bottom, left:right] = native[
            top - self.top : bottom - self.top, left - self.left : right - self.left
        ]
        return result

    def _cut(self, image: np.ndarray) -> np.ndarray:
        rows = np.clip(np.arange(self.top, self.top + self.height), 0, image.shape[0] - 1)
        columns = np.clip(np.arange(self.left, self.left + self.width), 0, image.shape[1] - 1)
        return image[rows[:, None], columns]


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Float image to height x width, each axis by its own rule: area average down, cubic up."""
    low, high = image.min(), image.max()
    if height != image.shape[0]:
        rule = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
        image = cv2.resize(image, (image.shape[1], height), interpolation=rule)
    if width != image.shape[1]:
        rule = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
        image = cv2.resize(image, (width, image.shape[0]), interpolation=rule)
    return np.clip(image, low, high)


def _max_resized(mask: np.ndarray, size: int) -> np.ndarray:
    """Bring the first axis to ``size``: each output row is the maximum of all input rows it overlaps."""
    length = mask.shape[0]
    if length == size:
        return mask
    steps = np.arange(size)
    first = steps * length // size
    last = -(-(steps + 1) * length // size) - 1
    result = mask[first]
    for offset in range(1, int((last - first).max()) + 1):
        np.maximum(result, mask[np.minimum(first + offset, last)], out=result)
    return result
