"""Sample folders: found, read and checked, and written. No torch.

A sample folder holds ``image.png``, ``mask.png``, ``prompt.txt`` and perhaps ``anatomy.png``, ``soft_mask.png`` and
``meta.json``.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_folder, read_json, read_text, sync, write_json, write_text
from ldm.core.threads import thread_pool
from ldm.data.images import SUFFIXES, read_image
from ldm.data.masks import Mask, extents, read_anatomy, read_mask
from ldm.data.png import write_png
from ldm.data.samples import HEALTHY, META_RULES, META_TEXTS, Reject, Sample, text_of, wrong_value

MASKS = ("mask", "soft_mask")
STEMS = ("image", *MASKS, "anatomy")  # of a sample folder's image files


def scan_folder(root: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Find and check every sample folder below ``root``, in the order of their ids.

    A sample folder is any that holds ``image.*``, ``mask.*`` or ``prompt.txt``; hidden folders are left out. Every file
    is decoded completely. A sample with an error becomes a Reject and never stops the others. Raises MedSoftError if
    ``root`` is no folder or holds no sample at all.
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
    folders, rejects = [], []
    above = {str(root): {os.path.realpath(root)}}  # real folders on the way to each one: a link back up is not followed

    def unreadable(error: OSError) -> None:
        folder = Path(error.filename)
        rejects.append(Reject(_identity(root, folder), folder, f"could not be listed ({error.strerror})"))

    for name, children, files in os.walk(root, onerror=unreadable, followlinks=True):
        passed = above.pop(name)
        inner = {child: os.path.realpath(os.path.join(name, child)) for child in sorted(children) if child[0] != "."}
        children[:] = [child for child, real in inner.items() if real not in passed]
        above.update({os.path.join(name, child): passed | {inner[child]} for child in children})
        stems = {Path(file).stem for file in (*files, *children) if Path(file).suffix.lower() in SUFFIXES}
        if stems & {"image", "mask"} or "prompt.txt" in files:
            folders.append((_identity(root, Path(name)), Path(name)))
    return sorted(folders), rejects


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
    files = _image_files(folder)
    if "image" not in files:
        raise FileError(folder / "image.png", "does not exist")
    shape = read_image(files["image"]).shape
    prompt = read_text(folder / "prompt.txt", "prompt file").strip()
    if not prompt:
        raise FileError(folder / "prompt.txt", "the prompt is empty; write what the image shows, or `healthy`")
    meta = _meta(folder / "meta.json")
    diseased = prompt.lower() != HEALTHY
    if diseased and "mask" not in files:
        raise FileError(folder / "mask.png", "does not exist; a sample that is not healthy needs its lesion's mask")
    masks = {stem: read_mask(files[stem], shape, stem == "soft_mask") for stem in MASKS if stem in files}
    for stem, mask in masks.items():
        if mask.empty and diseased:
            name = stem.replace("_", " ")
            reason = f"the {name} is empty (all zero), but the prompt names a lesion ({prompt[:60]!r})"
            raise FileError(files[stem], reason)
    if "anatomy" in files:
        read_anatomy(files["anatomy"], shape)
    texts: dict[str, Any] = {key: text_of(meta.pop(key, None)) for key in META_TEXTS}
    texts["patient_id"] = texts["patient_id"] or sample_id
    paths: dict[str, Any] = {"mask": None} | {stem: Path(os.path.abspath(file)) for stem, file in files.items()}
    meta.pop("sample_id", None)  # the folder's path is the identity
    synthetic, box = meta.pop("synthetic", False), mask_box(masks.get("mask"))
    return Sample(sample_id, prompt=prompt, box=box, synthetic=synthetic, meta=meta, **paths, **texts)


def mask_box(mask: Mask | None) -> tuple[float, float, float, float]:
    """x, y, w, h as fractions, covering the region of mask >= 0.5 inclusively; zeros without one."""
    if mask is None or not mask.hard.any():
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.values.shape
    (top, bottom), (left, right) = extents(mask.hard)
    return (left / width, top / height, (right - left) / width, (bottom - top) / height)


def _image_files(folder: Path) -> dict[str, Path]:
    """The image files of a sample folder by their stems; FileError when two could be meant."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.stem in STEMS and path.suffix.lower() in SUFFIXES:
            other = found.setdefault(path.stem, path)
            if other != path:
                raise FileError(other, f"ambiguous: {other.name} and {path.name} are both here; keep one")
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
