"""Sample folders: found, read and checked, and written. No torch.

A sample folder holds ``image.png``, ``mask.png``, ``prompt.txt`` and perhaps ``anatomy.png``, ``soft_mask.png`` and
``meta.json``.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import atomic_folder, read_json, read_text, write_json, write_text
from ldm.core.threads import thread_pool
from ldm.data.images import SUFFIXES, read_image
from ldm.data.masks import Mask, extents, read_anatomy, read_mask
from ldm.data.png import write_png
from ldm.data.samples import HEALTHY, META_TEXTS, Reject, Sample, wrong_value


def scan_folder(root: str | Path, progress: bool = False) -> tuple[list[Sample], list[Reject]]:
    """Find and check every sample folder below ``root``, in the order of their ids.

    A sample folder is any that holds ``image.*``, ``mask.*`` or ``prompt.txt``; hidden folders are left out. Every file
    is decoded completely. A sample with an error becomes a Reject and never stops the others. Raises MedSoftError if
    ``root`` is no folder or holds no sample at all.
    """
    root = Path(root)
    if not root.exists():
        raise MedSoftError(f"{root}: this dataset folder does not exist")
    if not root.is_dir():
        raise MedSoftError(f"{root}: expected a dataset folder, found a file")
    folders, rejects = _sample_folders(root)
    if not folders and not rejects:
        raise MedSoftError(
            f"{root}: holds no sample; expected folders with an image ({', '.join(SUFFIXES)}), a mask and a prompt.txt"
        )
    samples: list[Sample] = []
    pool = thread_pool()
    try:
        results = pool.map(lambda item: _checked(*item), folders)
        for result in tqdm(results, "checking", len(folders), unit=" samples", disable=None if progress else True):
            if isinstance(result, Sample):
                samples.append(result)
            else:
                rejects.append(result)
    finally:
        pool.shutdown(cancel_futures=True)
    return samples, sorted(rejects, key=lambda reject: (reject.sample_id, str(reject.file)))


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
    image_file = _one_file(folder, "image")
    if image_file is None:
        raise FileError(folder / "image.png", "does not exist")
    image = read_image(image_file)
    prompt = _prompt(folder / "prompt.txt")
    meta = _meta(folder / "meta.json")
    healthy = prompt.lower() == HEALTHY
    mask_file, soft_file = _one_file(folder, "mask"), _one_file(folder, "soft_mask")
    anatomy_file = _one_file(folder, "anatomy")
    if mask_file is None and not healthy:
        raise FileError(folder / "mask.png", "does not exist; a sample that is not healthy needs its lesion's mask")
    mask = read_mask(mask_file, image.shape) if mask_file else None
    if mask_file and mask and mask.empty and not healthy:
        raise FileError(mask_file, f"the mask is empty (all zero), but the prompt names a lesion ({prompt[:60]!r})")
    if soft_file and read_mask(soft_file, image.shape, soft=True).empty and not healthy:
        raise FileError(soft_file, "the soft mask is empty (all zero), but the prompt names a lesion")
    if anatomy_file:
        read_anatomy(anatomy_file, image.shape)
    absolute = Path(os.path.abspath(folder))
    texts = {key: meta.pop(key, None) for key in META_TEXTS}
    patient = texts.pop("patient_id")
    synthetic = meta.pop("synthetic", False)
    meta.pop("sample_id", None)  # the folder's path is the identity
    return Sample(
        sample_id=sample_id,
        image=absolute / image_file.name,
        mask=absolute / mask_file.name if mask_file else None,
        prompt=prompt,
        box=mask_box(mask),
        patient_id=patient or sample_id,
        anatomy=absolute / anatomy_file.name if anatomy_file else None,
        soft_mask=absolute / soft_file.name if soft_file else None,
        synthetic=synthetic,
        meta=meta,
        **texts,
    )


def mask_box(mask: Mask | None) -> tuple[float, float, float, float]:
    """x, y, w, h as fractions, covering the region of mask >= 0.5 inclusively; zeros without one."""
    if mask is None or not mask.hard.any():
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.values.shape
    (top, bottom), (left, right) = extents(mask.hard)
    return (left / width, top / height, (right - left) / width, (bottom - top) / height)


def _one_file(folder: Path, stem: str) -> Path | None:
    """The one file ``stem`` + image suffix in ``folder``; None without any; FileError when two could be meant."""
    names = sorted(os.listdir(folder))
    found = [folder / name for name in names if Path(name).stem == stem and Path(name).suffix.lower() in SUFFIXES]
    if len(found) > 1:
        raise FileError(found[0], f"ambiguous: {' and '.join(file.name for file in found)} are both here; keep one")
    return found[0] if found else None


def _refile(path: Path, read: Callable[[], Any]) -> Any:
    """Call ``read``; its MedSoftError becomes a FileError about ``path``."""
    try:
        return read()
    except MedSoftError as error:
        raise FileError(path, str(error).removeprefix(f"{path}: ")) from error


def _prompt(path: Path) -> str:
    prompt = _refile(path, lambda: read_text(path, "prompt file")).strip()
    if not prompt:
        raise FileError(path, "the prompt is empty; write the sentence, or `healthy`")
    return prompt


def _meta(path: Path) -> dict[str, Any]:
    """meta.json checked key by key; ids given as numbers become text. Empty if there is none."""
    if not os.path.lexists(path):
        return {}
    meta = _refile(path, lambda: read_json(path))
    if not isinstance(meta, dict):
        raise FileError(path, f"expected a JSON object, found {type(meta).__name__}")
    for key in META_TEXTS:
        value = meta.get(key)
        if isinstance(value, (dict, list, bool, float)):
            raise FileError(path, f"{key}: expected text, found {value!r}")
        meta[key] = str(value).strip() or None if value is not None else None
    wrong = wrong_value(meta)
    if wrong:
        key, expected = wrong
        raise FileError(path, f"{key}: expected {expected}, found {meta[key]!r}")
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
        os.fsync(handle.fileno())
