"""The one image of ``dataset_infer.py --image``: an image file, or a slice of a DICOM or NIfTI volume, as a sample.

A slice is written beside the results, into ``OUTPUT_DIR.input``, with what is known of it in a meta.json: results name
the image they were made from, and --replay needs it. Images in memory, of ``medsoft.draw``, are read as the PNG files
that they would be, so that the same rules and refusals hold for them.
"""

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import fingerprint
from ldm.core.locks import exclusive
from ldm.data.folders import read_meta, texts_from, write_sample
from ldm.data.images import SUFFIXES, ImageFile, ImageSource, pixel_digest, read_image
from ldm.data.png import encode_png
from ldm.data.samples import Sample
from ldm.inference.options import InferenceOptions
from ldm.volumes.intensity import PRESETS, levels_of, window_asked, window_for
from ldm.volumes.volume import Slice, Volume, count, cut, only_plane, require_extra, square

log = logging.getLogger(__name__)

VOLUMES = (".dcm", ".ima", ".dicom", ".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16")  # of PIL images that a PNG file holds as they are
HEADER = ("manufacturer", "kvp", "sequence", "slice_thickness_mm")  # of a volume, for meta.json


def single_sample(options: InferenceOptions) -> Sample:
    """The sample that ``--image``, ``--mask`` and ``--prompt`` describe.

    Raises UsageError for flags that do not fit the image, and FileError or MedSoftError where it cannot be read.
    """
    assert options.image  # the options were checked: these three come together
    assert options.mask
    assert options.prompt
    if is_volume(options.image):
        return _slice_sample(options, options.image, options.mask, options.prompt)
    if options.plane is not None or options.slice is not None:
        raise UsageError(f"--plane and --slice choose a slice of a volume; {options.image} is an image")
    meta = read_meta(options.image.with_name("meta.json"))
    if options.spacing:
        meta["spacing_mm"] = list(options.spacing)
    if options.window:
        meta["window"] = window_in_levels(options.window, meta, options.image)
    return one_sample(options.image.stem, options.image.resolve(), options.mask.resolve(), options.prompt, meta)


def is_volume(path: Path) -> bool:
    """Whether a path is a folder or, by its name or its first bytes, a DICOM file or a volume, and no image file."""
    if path.is_dir() or path.name.lower().endswith(VOLUMES):
        return True
    if path.suffix.lower() in SUFFIXES:
        return False
    with path.open("rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def window_in_levels(words: Sequence[str], meta: dict[str, Any], image: Path) -> list[float]:
    """``--window`` of an image file in its levels, by the value_offset and value_scale that its meta.json may have."""
    asked = window_asked(words)
    if read_image(image).dtype == np.uint8:
        raise UsageError(f"--window: {image} has 8 bits, which are used as they are")
    if isinstance(asked, str) and (asked not in PRESETS or meta.get("unit") != "HU" or "value_offset" not in meta):
        raise UsageError(f"--window {asked}: {image} has no meta.json that says how its levels are HU; give LOW HIGH")
    ends = PRESETS[asked] if isinstance(asked, str) else asked
    assert ends is not None  # words are given
    offset, scale = meta.get("value_offset", 0), meta.get("value_scale", 1)
    return sorted((end - offset) / scale for end in ends)


def image_source(name: str, given: Any) -> ImageSource:
    """A path as it is; a NumPy array or a PIL image as the PNG file that it would be, called ``name`` in messages.

    Arrays: HxW or HxWx3 (with alpha HxWx2 or HxWx4) of uint8 or uint16; masks also HxW of bool, or of float in [0, 1],
    which are rounded to k/255. MedSoftError for others.
    """
    if isinstance(given, str | Path):
        return Path(given)
    if isinstance(given, Image.Image):
        if given.mode not in MODES:
            raise MedSoftError(f"{name}: a PIL image of mode {given.mode}; convert it to L, RGB or I;16")
        with io.BytesIO() as buffer:
            given.save(buffer, "PNG")
            return ImageFile(Path(name), buffer.getvalue(), "PNG")
    if not isinstance(given, np.ndarray):
        raise MedSoftError(f"{name}: expected a path, a NumPy array or a PIL image, found {type(given).__name__}")
    pixels = given
    if name == "mask" and given.ndim == 2 and given.dtype.kind in "bf" and given.size:
        if not (given.min() >= 0 and given.max() <= 1):
            raise MedSoftError(f"{name}: expected values from 0 to 1, found {given.min():g} to {given.max():g}")
        pixels = np.rint(given.astype(np.float64) * 255).astype(np.uint8)
    sound = pixels.dtype in (np.uint8, np.uint16) and pixels.ndim in (2, 3) and pixels.size
    if not sound or pixels.shape[2:] not in ((), (2,), (3,), (4,)):
        found = f"{given.dtype} of shape {given.shape}"
        raise MedSoftError(f"{name}: expected HxW or HxWx3 pixels of 8 or 16 bits, found {found}")
    return ImageFile(Path(name), encode_png(pixels), "PNG")


def one_sample(name: str, image: Path, mask: Path, prompt: str, meta: dict[str, Any]) -> Sample:
    """The sample of one image with the keys of its meta.json; its patient is called as the image unless it says."""
    texts = texts_from(meta, name)
    meta.pop("synthetic", None)
    return Sample(name, image, mask, prompt, (0.0, 0.0, 0.0, 0.0), meta=meta, **texts)


def _slice_sample(options: InferenceOptions, path: Path, mask: Path, prompt: str) -> Sample:
    require_extra()
    from ldm.volumes.formats import read_volume

    volume = read_volume(path)
    lesion = _lesion(mask, volume) if is_volume(mask) else None
    plane, index = _chosen(options, volume, lesion)
    shown = cut(volume, plane, index)
    if options.spacing:
        shown = dataclasses.replace(shown, spacing=(float(options.spacing[0]), float(options.spacing[-1])))
    pixels, known, window = slice_image(volume, shown, window_asked(options.window))
    files = {"image.png": pixels}
    if lesion is not None:
        files["mask.png"] = _mask_of(lesion, shown, mask)
    name = slice_name(path, plane, index)
    folder = _written(options.output_dir, name, files, prompt, known)
    log.info("%s: %s slice %d, window %g to %g (%s), is read as %s", path, plane, index, *window, folder / "image.png")
    own_mask = folder / "mask.png" if lesion is not None else mask.resolve()
    return one_sample(name, folder / "image.png", own_mask, prompt, known)


def slice_name(path: Path, plane: str, index: int) -> str:
    """What the sample of a slice of the volume at ``path`` is called."""
    stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    return f"{stem}_{plane}_{index:03d}"


def slice_image(
    volume: Volume, shown: Slice, asked: str | tuple[float, float] | None = None
) -> tuple[np.ndarray, dict[str, Any], tuple[float, float, str]]:
    """A slice of a volume as an image with square pixels (HxW levels), its meta.json, and ``window_for(.., asked)``."""
    image = square(shown)
    levels, window = levels_of(volume), window_for(volume, asked)
    meta = {
        **{key: volume.header[key] for key in HEADER if key in volume.header},
        "modality": volume.modality,
        "spacing_mm": image.spacing and list(image.spacing),
        "plane": shown.plane,
        "slice": shown.index,
        "value_offset": levels.value_offset,
        "value_scale": levels.value_scale,
        "unit": volume.unit,
        "window": levels.window(*window[:2]),
    }
    known = {key: value for key, value in meta.items() if value is not None}
    return levels.pixels(image.pixels), known, window


def _chosen(options: InferenceOptions, volume: Volume, lesion: Volume | None) -> tuple[str, int]:
    """The plane and the slice: as asked, the only one, or the one in which most of the lesion lies."""
    if only := only_plane(volume):
        if options.plane not in (None, only):
            raise UsageError(f"--plane {options.plane}: {options.image} is one {only} slice")
        return only, options.slice or 0
    plane = options.plane or "sagittal"
    if options.slice is not None:
        return plane, options.slice
    number = count(volume, plane)
    if lesion is None:
        raise UsageError(f"--slice is needed: {options.image} has {number} {plane} slices, and --mask is an image")
    return plane, int(np.argmax([np.count_nonzero(cut(lesion, plane, index).pixels) for index in range(number)]))


def _lesion(path: Path, volume: Volume) -> Volume:
    """All that a file marks, on the volume's grid: values 0 and 1."""
    from ldm.volumes.segmentations import read_lesions

    found = read_lesions(path, volume)
    if not found:
        raise FileError(path, "marks nothing in the image; mark the region to inpaint")
    values = np.any([lesion.mask for lesion in found], axis=0).astype(np.uint8)
    return dataclasses.replace(volume, values=values, low_is_white=False)


def _mask_of(lesion: Volume, shown: Slice, path: Path) -> np.ndarray:
    """The lesion in a slice, on the grid of the image that is written."""
    pixels = cut(lesion, shown.plane, shown.index).pixels
    mask = square(dataclasses.replace(shown, pixels=pixels), nearest=True).pixels
    if not mask.any():
        raise FileError(path, f"marks nothing in the {shown.plane} slice {shown.index}; see --slice")
    return mask * np.uint8(255)


def _written(output: Path, name: str, files: dict[str, Any], prompt: str, meta: dict[str, Any]) -> Path:
    """The sample folder of a slice, in ``OUTPUT_DIR.input``; its name follows from its content."""
    content = [[key, pixel_digest(pixels)] for key, pixels in files.items()]
    above = output.resolve().with_name(f"{output.resolve().name}.input")
    folder = above / f"{name}_{fingerprint([content, meta])[:8]}"
    write_once(folder, files, prompt, meta)
    return folder


def write_once(folder: Path, files: Mapping[str, Any], prompt: str, meta: Mapping[str, Any]) -> None:
    """``write_sample`` into a folder whose name follows from its content, unless another process has done that."""
    above = folder.parent
    above.mkdir(parents=True, exist_ok=True)
    with exclusive(above / ".lock", f"{above}: another run is writing here at this moment", wait=True):
        if not (folder / "meta.json").exists():
            write_sample(folder, files, prompt, meta)
