"""Sample folders: found, read and checked, and written. No torch.

A sample folder holds ``image.png``, ``mask.png``, ``prompt.txt`` and perhaps ``anatomy.png``, ``soft_mask.png`` and
``meta.json``; capitals in these names do not matter.
"""

import functools
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_folder, content_id, read_json, read_text, sync, write_json, write_text
from ldm.core.tables import counted
from ldm.core.threads import side_by_side
from ldm.data.images import SUFFIXES, open_image, orientations_differ, read_image
from ldm.data.masks import TARGET_LABEL, Mask, extents
from ldm.data.png import write_png
from ldm.data.regions import ORIENTATION_NOTE, STEMS, Decoded, intensity_notes, read_regions, region_notes
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
SYNTHETIC_MARK = b"MedSoft-Diffusion"  # in a text tag at the beginning of every image.png that was inpainted here


def scan_folder(root: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Find and check every sample folder below ``root``, in the order of their ids; see ``scan_each``."""
    found = [sample for sample, _ in scan_each(root)]
    rejects = [each for each in found if isinstance(each, Reject)]
    return [each for each in found if isinstance(each, Sample)], sorted(
        rejects, key=lambda each: (each.sample_id, str(each.file))
    )


def scan_each(
    root: str | Path, judge: Callable[[Sample, Decoded, int, int], Any] | None = None, workers: int | None = None
) -> Iterator[tuple[Sample | Reject, Any]]:
    """Every sample folder below ``root``, in the order of their ids, with what ``judge`` says of it.

    A sample folder is any that holds an image file or the prompt of one, or a file of nearly such a name
    (``image_1.png``); those that are hidden or a system's own are left out and counted, as are image files of other
    names. Every file is decoded completely, once. A sample with an error becomes a Reject and never stops the others.
    ``judge`` must be picklable; its last arguments are the sample's number and how many there are. Raises MedSoftError
    if ``root`` is no folder or holds no sample at all.
    """
    root = Path(root)
    if not root.is_dir():
        reason = "expected a dataset folder, found a file" if root.exists() else "does not exist"
        raise MedSoftError(f"{root}: {reason}")
    folders, rejects = sample_folders(root)
    if not folders and not rejects:
        expected = f"folders with an image ({', '.join(SUFFIXES)}), a mask and a prompt.txt"
        raise MedSoftError(packed_samples(root) or f"{root}: holds no sample; expected {expected}")
    yield from ((reject, None) for reject in rejects)
    checked = side_by_side(functools.partial(_checked, judge, len(folders)), list(enumerate(folders)), workers)
    yield from tqdm(checked, "checking", len(folders), unit=" samples", disable=None)


def sample_folders(root: Path) -> tuple[list[tuple[str, Path]], list[Reject]]:
    """(sample_id, folder) of every sample folder, sorted, and the folders that could not be listed."""
    folders: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    unread: list[Path] = []
    rejects = []

    def unreadable(error: OSError) -> None:
        """What os.walk calls for a folder that cannot be listed."""
        folder = Path(error.filename)
        if not _is_hidden(root, folder):
            rejects.append(Reject(_identity(root, folder), folder, f"could not be listed ({error.strerror})"))

    for folder, children, files in _walk(root, unreadable):
        named = [*files, *(child for child in children if "." in child)]
        hidden, keys = _is_hidden(root, folder), {_key_of(each) for each in named}
        if keys - {None, "meta.json"}:
            if hidden:
                left_out.append(folder)
            else:
                folders.append((_identity(root, folder), folder))
        if not hidden and not folder.name.endswith("_files"):  # the images of a report
            unread += [folder / file for file in files if _is_unread(file)]
    if left_out:
        said = counted(len(left_out), "sample folder is", "sample folders are")
        log.warning("%s left out, as hidden or a system's own; the first: %s", said, shown(min(left_out)))
    if unread:
        said = counted(len(unread), "image file is not read, as it is", "image files are not read, as they are")
        log.warning("%s not named image, mask, soft_mask or anatomy; the first: %s", said, shown(min(unread)))
    first = (_identity(root, root), root)
    if first in folders and (first[0], root / first[0]) in folders:
        folders.remove(first)
        reason = f"is a sample, as is {first[0]} in it, and both have this name; rename one"
        rejects.append(Reject(first[0], root, reason))
    return sorted(folders), rejects


def _walk(root: Path, unreadable: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """``os.walk`` in order and through links, of which one that leads back up is passed over."""
    top = os.path.realpath(root)
    above = {str(root): (top, {top})}  # each one's real path, and those on the way
    for name, children, files in os.walk(root, onerror=unreadable, followlinks=True):
        own, passed = above.pop(name)
        children.sort()
        inner = {child: os.path.join(name, child) for child in children}
        real = {
            child: os.path.realpath(path) if os.path.islink(path) else os.path.join(own, child)
            for child, path in inner.items()
        }
        children[:] = [child for child in children if real[child] not in passed]
        above.update({inner[child]: (real[child], passed | {real[child]}) for child in children})
        yield Path(name), children, files


def _is_hidden(root: Path, folder: Path) -> bool:
    parts = folder.relative_to(root).parts
    return any(part[0] == "." or part.lower() in SYSTEM_FOLDERS for part in parts)


@functools.lru_cache
def _split_name(name: str) -> tuple[str, str]:
    """Stem and suffix in small letters; ``.nii.gz`` is one suffix."""
    stem, suffix = os.path.splitext(name.lower())
    return (stem.removesuffix(".nii"), ".nii.gz") if name.lower().endswith(".nii.gz") else (stem, suffix)


@functools.lru_cache
def _is_unread(name: str) -> bool:
    """Whether a file is an image, but none of a sample's by its name. Hidden files are not looked at."""
    stem, suffix = _split_name(name)
    own = (stem in STEMS and suffix in SUFFIXES) or name == OVERVIEW or name.startswith(".")
    return suffix in (*SUFFIXES, *OTHER_SUFFIXES) and not own


@functools.lru_cache
def _key_of(name: str) -> str | None:
    """Which file of a sample a name means, or is probably meant to (``mask (1).png``, ``prompt.txt.txt``); None: none.

    An image's key is its stem, another file's its name.
    """
    return next((key for key, pattern in _ALIKE_NAMES.items() if pattern.fullmatch(name.lower())), None)


def _identity(root: Path, folder: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return relative if relative != "." else Path(os.path.abspath(root)).name


def _checked(
    judge: Callable[[Sample, Decoded, int, int], Any] | None, total: int, numbered: tuple[int, tuple[str, Path]]
) -> tuple[Sample | Reject, Any]:
    number, (sample_id, folder) = numbered
    try:
        sample, decoded = decode_sample(sample_id, folder)
        return sample, judge(sample, decoded, number, total) if judge else None
    except FileError as error:
        return Reject(sample_id, error.path, error.reason), None
    except OSError as error:
        return Reject(sample_id, folder, f"could not be read ({error.strerror or error})"), None


def read_sample(sample_id: str, folder: Path) -> Sample:
    """The sample in one folder, which is read and checked completely; FileError for the first error in it."""
    return decode_sample(sample_id, folder)[0]


def decode_sample(sample_id: str, folder: Path) -> tuple[Sample, Decoded]:
    """Read and check one sample folder completely; FileError for the first error in it."""
    try:
        sample_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(folder, "its name is not valid UTF-8; rename the folder") from error
    files = _files(folder)
    if "image" not in files:
        raise FileError(folder / "image.png", "does not exist")
    opened = {"image": open_image(files["image"])}
    image = read_image(opened["image"])
    prompt, prompt_notes = _read_prompt(files.get("prompt.txt") or folder / "prompt.txt")
    meta_file = files.get("meta.json") or folder / "meta.json"
    meta = read_meta(meta_file)
    if prompt != HEALTHY and "mask" not in files:
        raise FileError(folder / "mask.png", "does not exist; a sample that is not healthy needs its lesion's mask")
    for stem in [stem for stem in STEMS[1:] if stem in files]:
        opened[stem] = open_image(files[stem])
        if opened[stem].data == opened["image"].data:
            raise FileError(files[stem], f"is a copy of {files['image'].name}; put the right file in its place")
    decoded = Decoded(opened["image"], image, read_regions(image, opened))
    absolute = os.path.abspath(folder)
    paths = {stem: Path(absolute, files[stem].name) if stem in files else None for stem in STEMS}
    sample = _sample_of(sample_id, paths, prompt, meta, decoded)
    return replace(sample, notes=(*_notes(sample, decoded, meta_file), *prompt_notes)), decoded


def _read_prompt(file: Path) -> tuple[str, list[str]]:
    """The prompt in a file, and what a person should know of it; FileError for a text that cannot be one."""
    raw = read_text(file, "prompt file")
    prompt = prompt_of(raw)
    if fault := prompt_fault(prompt):
        raise FileError(file, fault)
    other = prompt == HEALTHY and raw.strip().lower() != HEALTHY
    return prompt, [f"the prompt {raw.strip()!r} is read as `healthy`"] if other else []


def _sample_of(sample_id: str, paths: Mapping[str, Any], prompt: str, meta: dict[str, Any], decoded: Decoded) -> Sample:
    """The sample that the files say it is; ``paths``: of the images, by their stems. ``meta`` keeps what is left."""
    texts, pixels = texts_from(meta, sample_id), decoded.file.data
    return Sample(
        sample_id,
        prompt=prompt,
        box=mask_box(decoded.regions.mask),
        synthetic=meta.pop("synthetic", texts["parent_id"] is not None) or SYNTHETIC_MARK in pixels[:1024],
        meta=meta,
        image_sha256=hashlib.sha256(pixels).hexdigest(),
        **paths,
        **texts,
    )


def texts_from(meta: dict[str, Any], sample_id: str) -> dict[str, Any]:
    """The texts of META_TEXTS, taken out of ``meta``; the patient of a sample that names none is called as it is."""
    texts = {key: text_of(meta.pop(key, None)) for key in META_TEXTS}
    meta.pop("sample_id", None)  # where the sample lies says what it is called
    return texts | {"patient_id": texts["patient_id"] or sample_id}


def _notes(sample: Sample, decoded: Decoded, meta_file: Path) -> list[str]:
    """What a person should know of a sample's files; FileError for what is certainly a mistake in them."""
    image, regions = decoded.image, decoded.regions
    of_regions = region_notes(image, regions, sample.healthy)
    marked = {} if regions.anatomy is None else {"vertebra": regions.anatomy == TARGET_LABEL}
    if regions.mask is not None:
        marked["vertebra" if sample.healthy else "lesion"] = regions.mask.hard
    try:
        notes = [*intensity_notes(image, sample.meta.get("window"), marked)]
    except MedSoftError as error:
        raise FileError(meta_file, str(error)) from error
    notes += dict.fromkeys(note.text for note in of_regions)
    if orientations_differ([decoded.file, *regions.files.values()]):
        notes.append(ORIENTATION_NOTE)
    # A region to inpaint may be any part of the vertebra.
    to_inpaint = sample.synthetic or sample.soft_mask is not None
    if sample.healthy and not to_inpaint and _is_part(regions.mask, regions.anatomy):
        notes.append(PART_NOTE)
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
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        stem, suffix = _split_name(entry.name)
        key = stem if stem in STEMS and suffix in SUFFIXES else entry.name.lower()
        is_folder = entry.is_dir()
        if key in _ALIKE and not is_folder and not entry.is_file() and os.path.exists(entry.path):
            reason = "is a pipe, a socket or a device, which would be waited for; put a file in its place"
            raise FileError(folder / entry.name, reason)
        if is_folder and "." not in entry.name:
            continue  # `mask/` is not a mask
        if key in _ALIKE:
            path = folder / entry.name
            other = found.setdefault(key, path)
            if other != path:
                raise FileError(other, f"ambiguous: {other.name} and {path.name} are both here; keep one")
        elif meant := _key_of(entry.name):
            alike.setdefault(meant, folder / entry.name)
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
