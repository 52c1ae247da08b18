"""What readers see of a sample: the same number of native pixels around each lesion, in grey, as a PNG without tags.

Real and drawn samples take one path: the intensity range of their own image, one crop without resampling, one writer. A
16-bit image is cut to its range before it is handed out, since a drawn lesion has no levels beyond it.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldm.core.errors import FileError
from ldm.data.checks import sample_attributes
from ldm.data.crop import Fit
from ldm.data.images import intensity_range_of, is_lossy, open_image, read_image, to_unit
from ldm.data.masks import extents, read_mask, stray_parts
from ldm.data.png import encode_png
from ldm.data.samples import Sample
from ldm.exchange.targets import SECOND_LESION

LEAST_CROP = 64
CONTEXT = 3.0  # side of the picture over the largest lesion's
UNSEEN = ("width / height", "file format")  # attributes of a file that its crop does not show


@dataclass(frozen=True)
class Look:
    """What is known of a sample once its files were read. ``shape``: H, W; ``lesion``: its longest side in pixels.

    ``second``: why there may be a second lesion, "" if nothing says so.
    """

    shape: tuple[int, int]
    lesion: int
    deep: bool
    lossy: bool
    attributes: Mapping[str, float | str]
    second: str


def look_at(sample: Sample) -> Look:
    """Read a diseased sample's image and mask. FileError if one of them cannot be used."""
    file = open_image(sample.image)
    image = read_image(file)
    hard = _lesion(sample, image.shape)
    parts = [area for area, *_ in stray_parts(hard) if area > 2]
    noted = any(SECOND_LESION in str(note) for note in sample.meta.get("notes", []))
    second = "its mask has a second part far from the first" if parts else ""
    known = sample_attributes(sample, image)
    return Look(
        shape=image.shape[:2],
        lesion=max(last - first for first, last in extents(hard)),
        deep=image.dtype == np.uint16,
        lossy=is_lossy(file),
        attributes={name: value for name, value in known.items() if name not in UNSEEN},
        second="its meta.json notes a second lesion" if noted else second,
    )


def _lesion(sample: Sample, shape: tuple[int, ...]) -> np.ndarray:
    """The lesion (bool HxW) in an image of ``shape``, not empty."""
    if sample.mask is None:
        raise FileError(sample.image, "has no mask, so nobody knows where its lesion is")
    hard = read_mask(sample.mask, shape).hard
    if not hard.any():
        raise FileError(sample.mask, "the mask is empty, so nobody knows where its lesion is")
    return hard


def crop_of(sample: Sample, side: int, deep: bool) -> np.ndarray:
    """The picture: side x side levels around the lesion, uint16 if ``deep``, else uint8, over its intensity range.

    No pixel is resampled. The image must be at least as large as ``side``, and the lesion smaller.
    """
    image = read_image(sample.image)
    hard = _lesion(sample, image.shape)
    unit = to_unit(image, intensity_range_of(image, sample.meta.get("window"), hard))
    grey = unit if unit.ndim == 2 else unit.mean(axis=2)
    window = Fit("crop", side, context=1.0, min_crop=side).crop_window(grey.shape, hard)
    top = 65535 if deep else 255
    return np.rint(window.forward(grey) * top).astype(np.uint16 if deep else np.uint8)


def as_script(name: str, pixels: np.ndarray) -> str:
    """A line of JavaScript that hands the PNG of ``pixels`` to the page, which may not read other files from a disk."""
    return f'received("{name}", "{base64.b64encode(encode_png(pixels)).decode()}");\n'
