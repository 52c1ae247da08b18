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
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_folder, content_id, read_json, read_text, sync, write_json, write_text
from ldm.core.threads import thread_pool
from ldm.data.images import SUFFIXES, intensity_range_of, orientations_differ, read_image
from ldm.data.masks import (
    MOSTLY,
    TARGET_LABEL,
    Mask,
    equivalent_diameter,
    extents,
    looks_inverted,
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
    packed_samples,
    prompt_fault,
    prompt_of,
    shown,
    text_of,
    wrong_value,
)

log = logging.getLogger(__name__)

STEMS = ("image", "mask", "soft_mask", "anatomy")  # of a sample folder's image files
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

POLARITY = "1 (white) is the lesion, 0 everything else"
ORIENTATION_NOTE = (
    "its image, mask and label map have different EXIF orientations: what was made on the stored pixels of another one "
    "lies elsewhere; look at the overlays of tool/doctor.py"
)
STRAY_NOTE = "its mask has a part that is tiny, or far from the largest one (stray pixels?), which makes the crop wider"
MOSTLY_NOTE = f"its mask marks most of the image or of its border: inverted? {POLARITY}"
EVERYWHERE_NOTE = "its soft mask is above 0 in most of the image, all of which will change: is its background 0?"
OUTLINE_NOTE = "its mask encloses nearly as much as it marks, or more: an outline that is not filled?"
BEYOND_NOTE = (
    "its soft mask marks, in full, what lies far outside its mask: what is inpainted is not what its mask says"
)
SHORT_NOTE = "its soft mask leaves part of its mask out: that part will not be inpainted"
NO_TARGET_NOTE = f"its label map does not say which vertebra the image is about (no label {TARGET_LABEL})"
TARGETS_NOTE = f"label {TARGET_LABEL} of its label map has several large parts: it is one vertebra, the others are 2"
OUTSIDE_NOTE = f"its mask lies outside label {TARGET_LABEL} of its label map: look at the overlays of tool/doctor.py"


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
        expected = f"folders with an image ({', '.join(SUFFIXES)}), a mask and a prompt.txt"
        raise MedSoftError(packed_samples(root) or f"{root}: holds no sample; expected {expected}")
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
    meta = read_meta(meta_file)
    if diseased and "mask" not in files:
        raise FileError(folder / "mask.png", "does not exist; a sample that is not healthy needs its lesion's mask")
    for stem in ("mask", "soft_mask", "anatomy"):
        if stem in files and filecmp.cmp(files["image"], files[stem], shallow=False):
            raise FileError(files[stem], f"is a copy of {files['image'].name}; put the right file in its place")
    marked = read_regions(image, files.get("mask"), files.get("soft_mask"), files.get("anatomy"), not diseased)
    regions = {} if marked.anatomy is None else {"vertebra": marked.anatomy == TARGET_LABEL}
    if marked.mask is not None:
        regions["lesion" if diseased else "vertebra"] = marked.mask.hard
    try:
        notes = [*_intensity_notes(image, meta.get("window"), regions)]
    except MedSoftError as error:
        raise FileError(meta_file, str(error)) from error
    notes += dict.fromkeys(note.text for note in marked.notes)
    if orientations_differ(files[stem] for stem in STEMS if stem in files):
        notes.append(ORIENTATION_NOTE)
    if prompt == HEALTHY and raw.strip().lower() != HEALTHY:
        notes.append(f"the prompt {raw.strip()!r} is read as `healthy`")
    texts: dict[str, Any] = {key: text_of(meta.pop(key, None)) for key in META_TEXTS}
    texts["patient_id"] = texts["patient_id"] or sample_id
    paths: dict[str, Any] = {stem: Path(os.path.abspath(files[stem])) if stem in files else None for stem in STEMS}
    meta.pop("sample_id", None)  # the folder's path is the identity
    synthetic = meta.pop("synthetic", texts["parent_id"] is not None) or is_marked(files["image"])
    planned = diseased or synthetic or "soft_mask" in files  # made to be inpainted, it may be any part of the vertebra
    if not planned and _is_part(marked.mask, marked.anatomy):
        notes.append(PART_NOTE)
    box = mask_box(marked.mask)
    return Sample(
        sample_id, prompt=prompt, box=box, synthetic=synthetic, meta=meta, notes=tuple(notes), **paths, **texts
    )


class Note(NamedTuple):
    """What a person should know of a file: ``text`` is the same for every sample, ``detail`` has this one's numbers."""

    file: Path
    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text}{': ' * bool(self.detail)}{self.detail}"


class Regions(NamedTuple):
    """What the files of a sample mark in its image, and what a person should know of them."""

    mask: Mask | None
    soft_mask: Mask | None
    anatomy: np.ndarray | None
    notes: list[Note]


def read_regions(
    image: np.ndarray, mask: Path | None, soft_mask: Path | None, anatomy: Path | None, healthy: bool
) -> Regions:
    """Read the files that mark regions of ``image`` (HxW or HxWx3), and compare them; FileError for a certain mistake.

    ``healthy``: the mask is the vertebra's, not a lesion's.
    """
    own = read_mask(mask, image.shape) if mask else None
    soft = read_mask(soft_mask, image.shape, soft=True) if soft_mask else None
    labels = read_anatomy(anatomy, image.shape) if anatomy else None
    notes = []
    for path, each in ((mask, own), (soft_mask, soft)):
        if path is None or each is None:
            continue
        if each.empty and not healthy:
            name = path.stem.lower().replace("_", " ")
            raise FileError(path, f"the {name} is empty (all zero), but the prompt names a lesion")
        if path == mask and looks_inverted(each.hard, whole=not healthy):
            reason = f"marks the whole border and {each.hard.mean():.0%} of the image: inverted? {POLARITY}"
            raise FileError(path, reason)
        # Where a flat lesion was inpainted into flat tissue, the image does rise and fall with its soft mask.
        of_mask = path == soft_mask and own is not None and own.hard.any() and (each.values[own.hard] == 1).all()
        if each.soft and not of_mask and _is_picture_of(image, each.values):
            raise FileError(path, f"looks like the image itself; expected a mask: {POLARITY}")
        if each.note:
            notes.append(Note(path, each.note))
        if each.soft and np.count_nonzero(each.values) > MOSTLY * each.values.size:
            notes.append(Note(path, EVERYWHERE_NOTE))
    if mask and own and not healthy:
        notes += _lesion_notes(mask, own.hard)
    if soft_mask and soft and own and not own.empty:
        notes += _soft_mask_notes(soft_mask, soft.values, own.hard, healthy)
    if anatomy and labels is not None:
        notes += _anatomy_notes(anatomy, labels == TARGET_LABEL, own)
    return Regions(own, soft, labels, notes)


def _is_picture_of(image: np.ndarray, values: np.ndarray) -> bool:
    """Whether the values of a mask (HxW) rise and fall with the levels of its image: a copy, or one cut to the lesion.

    A lesion may resemble its own soft mask, but not that well.
    """
    levels = image if image.ndim == 2 else image.mean(axis=2)
    for region, least in ((np.ones(values.shape, bool), 0.9), (values > 0, 0.97)):
        there, marked = levels[region].astype(float), values[region].astype(float)
        if len(marked) > 20 and np.ptp(there) and np.ptp(marked) and abs(np.corrcoef(there, marked)[0, 1]) > least:
            return True
    return False


def _lesion_notes(path: Path, hard: np.ndarray) -> list[Note]:
    edge = np.concatenate([hard[0], hard[-1], hard[:, 0], hard[:, -1]]).mean()
    notes = [Note(path, MOSTLY_NOTE, f"{hard.mean():.0%}")] if max(edge, hard.mean()) > MOSTLY else []
    outlines, _ = cv2.findContours(hard.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(hard.shape, np.uint8), outlines, -1, 1, cv2.FILLED)
    if np.count_nonzero(filled) > 1.8 * np.count_nonzero(hard):
        notes.append(Note(path, OUTLINE_NOTE))
    parts = [f"{pixels} pixels from row {row}, column {column} on" for pixels, row, column in stray_parts(hard)[:3]]
    return notes + [Note(path, STRAY_NOTE, part) for part in parts]


def _soft_mask_notes(path: Path, soft: np.ndarray, hard: np.ndarray, healthy: bool) -> list[Note]:
    """What does not fit between a soft mask (HxW in [0, 1]) and the mask beside it (bool HxW)."""
    if not healthy and not (hard & (soft >= 0.5)).any():
        raise FileError(path, "lies elsewhere than the mask beside it: none of the mask's pixels is 0.5 or more here")
    notes = []
    away = cv2.distanceTransform((~hard).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    reach = max(2.0, equivalent_diameter(hard) / 2)
    if ((soft >= 0.995) & (away > reach)).any():
        notes.append(Note(path, BEYOND_NOTE))
    if not healthy and np.count_nonzero(soft[hard] == 0) > 0.1 * np.count_nonzero(hard):
        notes.append(Note(path, SHORT_NOTE))
    return notes


def _anatomy_notes(path: Path, target: np.ndarray, own: Mask | None) -> list[Note]:
    """What is strange about the target vertebra (bool HxW), alone and beside the sample's mask."""
    if not target.any():
        return [Note(path, NO_TARGET_NOTE)]
    areas = np.sort(cv2.connectedComponentsWithStats(target.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA])
    notes = [Note(path, TARGETS_NOTE)] if len(areas) > 1 and areas[-2] > areas[-1] / 2 else []
    if own and own.hard.any() and np.count_nonzero(own.hard & target) < 0.1 * np.count_nonzero(own.hard):
        notes.append(Note(path, OUTSIDE_NOTE))
    return notes


def _is_part(mask: Mask | None, labels: np.ndarray | None) -> bool:
    """Whether a mask that is not empty leaves most of the vertebra of a label map (HxW) out."""
    if mask is None or mask.empty or labels is None or not (labels == TARGET_LABEL).any():
        return False
    return bool(mask.hard[labels == TARGET_LABEL].mean() < 0.5)


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


def read_meta(path: Path) -> dict[str, Any]:
    """The keys of a meta.json that have a value, checked one by one. Empty if there is no such file."""
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
    places = [Path(os.path.abspath(each / given)) for each in (folder.resolve(), folder)]  # a link may lead to results
    path = next((place for place in places if place.is_file()), places[0])
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
