"""Sample folders: found, read and checked, and written. No torch.

A sample folder holds ``image.png``, ``mask.png``, ``prompt.txt`` and perhaps ``anatomy.png``, ``soft_mask.png`` and
``meta.json``; capitals in these names do not matter.
"""

import filecmp
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_folder, content_id, read_json, read_text, sync, write_json, write_text
from ldm.core.threads import thread_pool
from ldm.data.images import SUFFIXES, intensity_range_of, orientations_differ, read_image
from ldm.data.masks import (
    ORIENTATION_NOTE,
    STRAY_NOTE,
    TARGET_LABEL,
    Mask,
    extents,
    read_anatomy,
    read_mask,
    stray_parts,
)
from ldm.data.png import write_png
from ldm.data.samples import (
    HEALTHY,
    META_RULES,
    META_TEXTS,
    Reject,
    Sample,
    prompt_fault,
    prompt_of,
    shown,
    text_of,
    wrong_value,
)

log = logging.getLogger(__name__)

MASKS = ("mask", "soft_mask")
STEMS = ("image", *MASKS, "anatomy")  # of a sample folder's image files
# Formats in which people keep images and masks, and which are not read.
_OTHER = "webp gif jp2 jfif jpe dib heic avif tga pgm ppm exr dcm ima nii nii.gz npy npz mat mha mhd nrrd h5 zip"
OTHER_SUFFIXES = tuple(f".{name}" for name in _OTHER.split(" "))
# Folders that file servers and systems make, with copies or remains of what lies beside them.
SYSTEM_FOLDERS = ("@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "@recycle", "#snapshot")
PART_NOTE = "its prompt is `healthy`, but its mask covers less than half of the vertebra in anatomy.png: a lesion's?"
OVERVIEW = "sheet.png"  # of all samples, as tool/make_phantoms.py writes it beside them
# What names begin with that are probably meant to be a sample's file, and what they end with.
_IMAGES = "|".join(map(re.escape, sorted((*SUFFIXES, *OTHER_SUFFIXES), key=len, reverse=True)))
_ALIKE = {
    "image": ("image|img", _IMAGES),
    "mask": ("mask", _IMAGES),
    "soft_mask": ("soft[ _-]?mask", _IMAGES),
    "anatomy": ("anatomy", _IMAGES),
    "prompt.txt": ("prompt", r"\.(?:txt|text|md|rtf|docx?)"),
    "meta.json": ("meta", r"\.(?:json|txt)"),
}
_NUMBER = r"(?:[\W\d_]|copy|kopie)*"
_ALIKE_NAMES = {key: re.compile(rf"(?:{word}){_NUMBER}(?:(?:{end}){_NUMBER})*") for key, (word, end) in _ALIKE.items()}
FAINT = 0.1  # of the intensity range
FAINT_NOTE = (
    "nearly all of its image lies within a tenth of its range (0 to 255, or its `window`): the networks see next to "
    "nothing of it"
)
SYNTHETIC_MARK = b"MedSoft-Diffusion"  # in a text tag at the beginning of every image.png that was inpainted here


def scan_folder(root: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Find and check every sample folder below ``root``, in the order of their ids.

    A sample folder is any that holds an image file or the prompt of one, or a file of nearly such a name
    (``image_1.png``); those that are hidden or a system's own are left out and counted, as are image files of other
    names. Every file is decoded completely. A sample with an error becomes a Reject and never stops the others. Raises
    MedSoftError if ``root`` is no folder or holds no sample at all.
    """
    root = Path(root)
    if not root.is_dir():
        reason = "expected a dataset folder, found a file" if root.exists() else "does not exist"
        raise MedSoftError(f"{root}: {reason}")
    folders, rejects = _sample_folders(root)
    if not folders and not rejects:
        raise MedSoftError(
            f"{root}: holds no sample; expected folders with an image ({', '.join(SUFFIXES)}), a mask and a prompt.txt"
        )
    pool = thread_pool()
    try:
        checked = pool.map(lambda item: _checked(*item), folders)
        found = list(tqdm(checked, "checking", len(folders), unit=" samples", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted command does not read the rest
    rejects += [each for each in found if isinstance(each, Reject)]
    rejects.sort(key=lambda reject: (reject.sample_id, str(reject.file)))
    return [each for each in found if isinstance(each, Sample)], rejects


def _sample_folders(root: Path) -> tuple[list[tuple[str, Path]], list[Reject]]:
    """(sample_id, folder) of every sample folder, sorted, and the folders that could not be listed."""
    folders: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    unread: list[Path] = []
    rejects = []
    above = {str(root): {os.path.realpath(root)}}  # real folders on the way to each one: a link back up is not followed

    def unreadable(error: OSError) -> None:
        folder = Path(error.filename)
        if not _is_hidden(root, folder):
            rejects.append(Reject(_identity(root, folder), folder, f"could not be listed ({error.strerror})"))

    for name, children, files in os.walk(root, onerror=unreadable, followlinks=True):
        passed = above.pop(name)
        inner = {child: os.path.realpath(os.path.join(name, child)) for child in sorted(children)}
        children[:] = [child for child, real in inner.items() if real not in passed]
        above.update({os.path.join(name, child): passed | {inner[child]} for child in children})
        folder, named = Path(name), [*files, *(child for child in children if "." in child)]
        hidden, keys = _is_hidden(root, folder), {_key_of(each) for each in named}
        if keys - {None, "meta.json"}:
            if hidden:
                left_out.append(folder)
            else:
                folders.append((_identity(root, folder), folder))
        if not hidden and not name.endswith("_files"):  # the images of a report
            unread += [folder / file for file in files if _is_unread(file)]
    if left_out:
        message = "%d sample folders are left out, as hidden or a system's own; the first: %s"
        log.warning(message, len(left_out), shown(min(left_out)))
    if unread:
        message = "%d image files are not read, as they are not named image, mask, soft_mask or anatomy; the first: %s"
        log.warning(message, len(unread), shown(min(unread)))
    own = (_identity(root, root), root)
    if own in folders and (own[0], root / own[0]) in folders:
        folders.remove(own)
        rejects.append(Reject(own[0], root, f"is a sample, as is {own[0]} in it, and both have this name; rename one"))
    return sorted(folders), rejects


def _is_hidden(root: Path, folder: Path) -> bool:
    parts = folder.relative_to(root).parts
    return any(part[0] == "." or part.lower() in SYSTEM_FOLDERS for part in parts)


def _split_name(name: str) -> tuple[str, str]:
    """Stem and suffix in small letters; ``.nii.gz`` is one suffix."""
    stem, suffix = os.path.splitext(name.lower())
    return (stem.removesuffix(".nii"), ".nii.gz") if name.lower().endswith(".nii.gz") else (stem, suffix)


def _is_unread(name: str) -> bool:
    """Whether a file is an image, but none of a sample's by its name. Hidden files are not looked at."""
    stem, suffix = _split_name(name)
    own = (stem in STEMS and suffix in SUFFIXES) or name == OVERVIEW or name.startswith(".")
    return suffix in (*SUFFIXES, *OTHER_SUFFIXES) and not own


def _key_of(name: str) -> str | None:
    """Which file of a sample a name means, or is probably meant to (``mask (1).png``, ``prompt.txt.txt``); None: none.

    An image's key is its stem, another file's its name.
    """
    return next((key for key, pattern in _ALIKE_NAMES.items() if pattern.fullmatch(name.lower())), None)


def _identity(root: Path, folder: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return relative if relative != "." else Path(os.path.abspath(root)).name


def _checked(sample_id: str, folder: Path) -> Sample | Reject:
    try:
        return read_sample(sample_id, folder)
    except FileError as error:
        return Reject(sample_id, error.path, error.reason)
    except OSError as error:
        return Reject(sample_id, folder, f"could not be read ({error.strerror or error})")


def read_sample(sample_id: str, folder: Path) -> Sample:
    """Read and check one sample folder completely; FileError for the first error in it."""
    try:
        sample_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(folder, "its name is not valid UTF-8; rename the folder") from error
    files = _files(folder)
    if "image" not in files:
        raise FileError(folder / "image.png", "does not exist")
    image = read_image(files["image"])
    prompt_file = files.get("prompt.txt", folder / "prompt.txt")
    raw = read_text(prompt_file, "prompt file")
    prompt = prompt_of(raw)
    if fault := prompt_fault(prompt):
        raise FileError(prompt_file, fault)
    diseased = prompt.lower() != HEALTHY
    meta_file = files.get("meta.json", folder / "meta.json")
    meta = _meta(meta_file)
    if diseased and "mask" not in files:
        raise FileError(folder / "mask.png", "does not exist; a sample that is not healthy needs its lesion's mask")
    for stem in ("mask", "soft_mask", "anatomy"):
        if stem in files and filecmp.cmp(files["image"], files[stem], shallow=False):
            raise FileError(files[stem], f"is a copy of {files['image'].name}; put the right file in its place")
    masks = {stem: read_mask(files[stem], image.shape, stem == "soft_mask") for stem in MASKS if stem in files}
    for stem, mask in masks.items():
        if mask.empty and diseased:
            name = stem.replace("_", " ")
            reason = f"the {name} is empty (all zero), but the prompt names a lesion ({prompt[:60]!r})"
            raise FileError(files[stem], reason)
    anatomy = read_anatomy(files["anatomy"], image.shape) if "anatomy" in files else None
    regions = {} if anatomy is None else {"vertebra": anatomy == TARGET_LABEL}
    if "mask" in masks:
        regions["lesion" if diseased else "vertebra"] = masks["mask"].hard
    try:
        notes = [*_intensity_notes(image, meta.get("window"), regions)]
    except MedSoftError as error:
        raise FileError(meta_file, str(error)) from error
    notes += [mask.note for mask in masks.values() if mask.note]
    if "lesion" in regions and stray_parts(regions["lesion"]):
        notes.append(STRAY_NOTE)
    if orientations_differ(files[stem] for stem in STEMS if stem in files):
        notes.append(ORIENTATION_NOTE)
    if prompt == HEALTHY and raw.strip().lower() != HEALTHY:
        notes.append(f"the prompt {raw.strip()!r} is read as `healthy`")
    texts: dict[str, Any] = {key: text_of(meta.pop(key, None)) for key in META_TEXTS}
    texts["patient_id"] = texts["patient_id"] or sample_id
    paths: dict[str, Any] = {stem: Path(os.path.abspath(files[stem])) if stem in files else None for stem in STEMS}
    meta.pop("sample_id", None)  # the folder's path is the identity
    synthetic = meta.pop("synthetic", texts["parent_id"] is not None) or is_marked(files["image"])
    if not (diseased or synthetic) and anatomy is not None and _is_part(masks.get("mask"), anatomy == TARGET_LABEL):
        notes.append(PART_NOTE)
    box = mask_box(masks.get("mask"))
    return Sample(
        sample_id, prompt=prompt, box=box, synthetic=synthetic, meta=meta, notes=tuple(notes), **paths, **texts
    )


def _is_part(mask: Mask | None, vertebra: np.ndarray) -> bool:
    """Whether a mask that is not empty leaves most of the vertebra (bool HxW) out."""
    return mask is not None and not mask.empty and bool(vertebra.any()) and mask.hard[vertebra].mean() < 0.5


def is_marked(image: Path) -> bool:
    """Whether an image file says that it was inpainted here."""
    try:
        with image.open("rb") as handle:
            return SYNTHETIC_MARK in handle.read(1024)
    except OSError:  # which is said where its pixels are read
        return False


def _intensity_notes(image: np.ndarray, window: Any, regions: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What the intensity range does to an image and its ``regions`` (bool HxW); MedSoftError if it misses the image."""
    low, high = intensity_range_of(image, window, regions.get("lesion"))
    darkest, brightest = np.percentile(image, (0.5, 99.5))
    if brightest - darkest < FAINT * (high - low):
        yield FAINT_NOTE
    if image.dtype == np.uint8:
        if window is not None:
            yield "its image has 8 bits, which are used as they are: `window` in its meta.json is not"
        return
    levels = np.atleast_3d(image)
    inside = np.any((levels > low) & (levels < high), axis=2)
    for name, region in regions.items():
        if region.any() and inside[region].mean() < 0.5:
            yield f"more than half of its {name} lies outside its `window` and is black or white for the model"


def mask_box(mask: Mask | None) -> tuple[float, float, float, float]:
    """x, y, w, h as fractions, covering the region of mask >= 0.5 inclusively; zeros without one."""
    if mask is None or not mask.hard.any():
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.values.shape
    (top, bottom), (left, right) = extents(mask.hard)
    return (left / width, top / height, (right - left) / width, (bottom - top) / height)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a sample: images by their stems, ``prompt.txt`` and ``meta.json`` by their names.

    Raises FileError where two could be meant, for an image in a format that is not read, and for a file of nearly the
    name of one that is not there.
    """
    found: dict[str, Path] = {}
    alike: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = _split_name(path.name)
        key = stem if stem in STEMS and suffix in SUFFIXES else path.name.lower()
        if key in _ALIKE and path.exists() and not (path.is_file() or path.is_dir()):
            raise FileError(path, "is a pipe, a socket or a device, which would be waited for; put a file in its place")
        if path.is_dir() and "." not in path.name:
            continue  # `mask/` is not a mask
        if key in _ALIKE:
            other = found.setdefault(key, path)
            if other != path:
                raise FileError(other, f"ambiguous: {other.name} and {path.name} are both here; keep one")
        elif meant := _key_of(path.name):
            alike.setdefault(meant, path)
    for key, path in alike.items():
        if key not in found:
            name, suffix = f"{key}.png" if key in STEMS else key, _split_name(path.name)[1]
            if suffix in OTHER_SUFFIXES:
                raise FileError(path, f"this format is not read; export it as {name} (read are {', '.join(SUFFIXES)})")
            raise FileError(path, f"is not read under this name; call it {name}, or take it out of the sample's folder")
    return found


def _meta(path: Path) -> dict[str, Any]:
    """The keys of meta.json that have a value, checked one by one. Empty if there is no such file."""
    if not os.path.lexists(path):
        return {}
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise FileError(path, f"expected a JSON object, found {type(meta).__name__}")
    wrong = wrong_value(meta, META_RULES)
    if wrong:
        raise FileError(path, ": ".join(wrong))
    return {key: value for key, value in meta.items() if value is not None}


def parent_image(result: Sample, content: Callable[[Path], str | None] = content_id) -> Path:
    """The image that a result was made from: its meta.json has the path, seen from the result, and the SHA-256.

    ``content`` gives a file's SHA-256, None for one that cannot be read. FileError, with what to do, where the image is
    not there or is another one: results may have been copied without their data, or beside other data.
    """
    folder, given = result.image.parent, result.meta.get("parent_image")
    if not isinstance(given, str) or not given or "\0" in given:
        raise FileError(folder / "meta.json", f"expected parent_image, the path of the original, found {given!r}")
    path = Path(os.path.abspath(folder / given))
    digest, expected = content(path), result.meta.get("parent_sha256")
    if digest is None:
        raise FileError(
            path,
            f"is not there or cannot be read; it is the image that {folder} was made from, whose meta.json names it as "
            f"{given}: copy results and data together, or put it back",
        )
    if expected not in (None, digest):
        raise FileError(path, f"has changed since, or is another image than the one that {folder} was made from")
    return path


def write_sample(
    folder: Path,
    files: Mapping[str, np.ndarray | Path | bytes],
    prompt: str,
    meta: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a sample folder, whole or not at all; one that is there is replaced.

    ``files``: file name -> pixels to write as PNG (uint8 or uint16; HxW, HxWx3 or with alpha), a file to copy,
    or bytes.
    Beside them come ``prompt.txt`` and ``meta.json``. ``tags`` become text tags of ``image.png``, if it is pixels.
    Raises MedSoftError naming what could not be written.
    """
    with atomic_folder(folder) as partial:
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                write_png(partial / name, content, tags if name == "image.png" else None)
            else:
                _write_file(partial / name, content)
        write_text(partial / "prompt.txt", prompt + "\n")
        write_json(partial / "meta.json", dict(meta))


def _write_file(path: Path, content: Path | bytes) -> None:
    """A copy of a file, or bytes, on the disk before the folder gets its name."""
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    with path.open("rb") as handle:
        sync(handle.fileno())
