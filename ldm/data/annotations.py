"""Sample folders, annotation files and the split by patient. No torch.

A sample folder holds ``image.png``, ``mask.png``, ``prompt.txt`` and perhaps ``anatomy.png``, ``soft_mask.png`` and
``meta.json``; an annotation file is a JSON list with one record per sample.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import named_seed, read_json, read_text, write_json
from ldm.data.images import SUFFIXES, extents, read_image
from ldm.data.masks import Mask, read_anatomy, read_mask
from ldm.data.samples import HEALTHY, Reject, Sample

SPLITS = ("train", "val", "test")
_META_TEXTS = ("patient_id", "parent_id", "lesion_type", "level", "severity")


def load_samples(path: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of a dataset folder or of an annotation file, and what of it cannot be used.

    Raises MedSoftError if the path does not exist or nothing in it is usable.
    """
    path = Path(path)
    if not path.exists():
        raise MedSoftError(f"{path}: does not exist; expected a dataset folder or an annotation JSON file")
    samples, rejects = scan_folder(path) if path.is_dir() else _read_records(path)
    if not samples:
        raise MedSoftError(f"{path}: none of its {len(rejects)} samples can be used; the first: {rejects[0]}")
    return samples, rejects


# ---------------------------------------------------------------------------------------------------- folders


def scan_folder(
    root: str | Path, workers: int | None = None, progress: bool = False
) -> tuple[list[Sample], list[Reject]]:
    """Find and check every sample folder below ``root``, in the order of their ids.

    A sample folder is any that holds ``image.*``, ``mask.*`` or ``prompt.txt``; hidden folders are left out. Every file
    is decoded completely. A sample with a fault becomes a Reject and never stops the others. Raises MedSoftError if
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
    samples = []
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        results = pool.map(lambda item: _checked(*item), folders)
        for result in tqdm(results, "checking", len(folders), unit=" samples", disable=None if progress else True):
            (samples if isinstance(result, Sample) else rejects).append(result)
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
        inner = {os.path.join(name, child): os.path.realpath(os.path.join(name, child)) for child in sorted(children)}
        children[:] = [os.path.basename(path) for path, real in inner.items() if _visible(path) and real not in passed]
        above.update({path: passed | {real} for path, real in inner.items()})
        stems = {Path(file).stem for file in (*files, *children) if Path(file).suffix.lower() in SUFFIXES}
        if stems & {"image", "mask"} or "prompt.txt" in files:
            folders.append((_identity(root, Path(name)), Path(name)))
    return sorted(folders), rejects


def _visible(path: str) -> bool:
    return not os.path.basename(path).startswith(".")


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
    """Read and check one sample folder completely; FileError for the first fault."""
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
    if mask is not None and mask.empty and not healthy:
        raise FileError(mask_file, f"the mask is empty (all zero), but the prompt names a lesion ({prompt[:60]!r})")
    if soft_file and read_mask(soft_file, image.shape, soft=True).empty and not healthy:
        raise FileError(soft_file, "the soft mask is empty (all zero), but the prompt names a lesion")
    if anatomy_file:
        read_anatomy(anatomy_file, image.shape)
    absolute = Path(os.path.abspath(folder))
    texts = {key: meta.pop(key, None) for key in _META_TEXTS}
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
    for key in _META_TEXTS:
        value = meta.get(key)
        if isinstance(value, (dict, list, bool, float)):
            raise FileError(path, f"{key}: expected text, found {value!r}")
        meta[key] = str(value).strip() or None if value is not None else None
    fault = _fault(meta)
    if fault:
        raise FileError(path, f"{fault[0]}: expected {fault[1]}, found {meta[fault[0]]!r}")
    return {key: value for key, value in meta.items() if value is not None}


def _fault(meta: dict[str, Any]) -> tuple[str, str] | None:
    """The first key whose value cannot be used, with what is expected there; null is as good as no key."""
    checks = (
        ("synthetic", lambda value: isinstance(value, bool), "true or false"),
        ("spacing_mm", _is_spacing, "one or two positive numbers"),
        ("window", _is_window, "two numbers [low, high] with low < high"),
    )
    for key, valid, expected in checks:
        if meta.get(key) is not None and not valid(meta[key]):
            return key, expected
    return None


def _is_spacing(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) in (1, 2) and all(_is_number(number) and number > 0 for number in numbers)


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------- files


def write_annotations(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write one record per sample, atomically: the published keys first, then ours."""
    write_json(path, [_record(number, sample) for number, sample in enumerate(samples)])


def _record(number: int, sample: Sample) -> dict[str, Any]:
    record = {
        "mask_image": _text(sample.mask),
        "label": sample.prompt,
        "image": str(sample.image),
        "box": list(sample.box),
        "box_id": f"{number}_box",
        "image_id": str(number),
        "sample_id": sample.sample_id,
        "patient_id": sample.patient_id,
    }
    optional = {
        "anatomy": _text(sample.anatomy),
        "soft_mask": _text(sample.soft_mask),
        **{key: getattr(sample, key) for key in _META_TEXTS[1:]},
        "synthetic": sample.synthetic or None,
        "meta": sample.meta or None,
    }
    return record | {key: value for key, value in optional.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Write a JSON list of {sample_id, file, reason}, all text, atomically; without rejects there is no such file.

    File names that are not valid UTF-8 have their bytes written out, so that JSON can hold them.
    """
    if not rejects:
        Path(path).unlink(missing_ok=True)
        return
    rows = [{"sample_id": r.sample_id, "file": str(r.file), "reason": r.reason} for r in rejects]
    encodable = [{k: v.encode("utf-8", "backslashreplace").decode() for k, v in row.items()} for row in rows]
    write_json(path, encodable)


def _read_records(path: Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of an annotation file, and the records whose files are no longer there.

    Relative paths resolve against the file's own folder. Raises MedSoftError naming file, record and key for anything
    malformed.
    """
    records = read_json(path, "annotation file")
    if not isinstance(records, list):
        raise MedSoftError(f"{path}: expected a JSON list of records, found {_kind(records)}")
    if not records:
        raise MedSoftError(f"{path}: holds no record; make it again with ver_openImagesDatasets.py")
    folder = Path(os.path.abspath(path)).parent
    parsed = [_parse(_Record(path, index, record), folder) for index, record in enumerate(records)]
    samples = _with_identities(path, parsed)
    usable, rejects = [], []
    for sample in samples:
        files = (sample.image, sample.mask, sample.anatomy, sample.soft_mask)
        missing = next((file for file in files if file is not None and not file.is_file()), None)
        if missing is None:
            usable.append(sample)
        else:
            rejects.append(Reject(sample.sample_id, missing, "the annotation names it, but the file is not there"))
    return usable, rejects


@dataclass(frozen=True)
class _Record:
    """One record with the words to say where it is wrong."""

    path: Path
    index: int
    values: Any

    def error(self, key: str, expected: str) -> MedSoftError:
        """What is wrong with ``key``, as an error to raise."""
        found = repr(self.values[key]) if key in self.values else "nothing"
        return MedSoftError(f"{self.path}: record {self.index}, key {key!r}: expected {expected}, found {found[:80]}")

    def text(self, key: str, required: bool = False) -> str | None:
        """The text under ``key``; None if there is none and it is not required."""
        value = self.values.get(key)
        if value is None and not required:
            return None
        if not isinstance(value, str) or (required and not value.strip()):
            raise self.error(key, "text that is not empty" if required else "text")
        return value

    def file(self, key: str, folder: Path, required: bool = False) -> Path | None:
        """The path under ``key``, seen from ``folder``."""
        value = self.text(key, required)
        if not value:
            return None
        if "\0" in value:
            raise self.error(key, "a path")
        return Path(os.path.normpath(folder / value))

    def box(self) -> tuple[float, float, float, float]:
        """x, y, width and height as fractions of the image, in [0, 1]."""
        value = self.values.get("box")
        numbers = isinstance(value, list) and len(value) == 4 and all(_is_number(number) for number in value)
        if not numbers or min(value) < 0 or value[0] + value[2] > 1 + 1e-6 or value[1] + value[3] > 1 + 1e-6:
            raise self.error("box", "four numbers [x, y, w, h], fractions inside the image")
        return tuple(float(number) for number in value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _parse(record: _Record, folder: Path) -> Sample:
    if not isinstance(record.values, dict):
        raise MedSoftError(f"{record.path}: record {record.index}: expected an object, found {_kind(record.values)}")
    sample_id = record.text("sample_id")
    parts = PurePosixPath(sample_id or "").parts
    if sample_id is not None and (not parts or ".." in parts or parts[0] == "/" or "\0" in sample_id):
        raise record.error("sample_id", "a relative path without '..'")
    meta = record.values.get("meta", {})
    if not isinstance(meta, dict):
        raise record.error("meta", "an object")
    synthetic = record.values.get("synthetic")
    for values in ({"synthetic": synthetic}, meta):  # other keys beside `meta` are not ours
        fault = _fault(values)
        if fault:
            raise _Record(record.path, record.index, values).error(*fault)
    sample = Sample(
        sample_id=sample_id or "",
        image=record.file("image", folder, required=True),
        mask=record.file("mask_image", folder),
        prompt=record.text("label", required=True).strip(),
        box=record.box(),
        patient_id=record.text("patient_id") or "",
        anatomy=record.file("anatomy", folder),
        soft_mask=record.file("soft_mask", folder),
        synthetic=bool(synthetic),
        meta=meta,
        **{key: record.text(key) for key in _META_TEXTS[1:]},
    )
    if sample.mask is None and not sample.healthy:
        raise record.error("mask_image", "a path, as the label is not `healthy`")
    return sample


def _with_identities(path: Path, samples: list[Sample]) -> list[Sample]:
    """Fill in missing ids (files of the published tool have none) and refuse repeated ones."""
    parents = [sample.image.parent for sample in samples]
    common = Path(os.path.commonpath(parents)) if len(set(parents)) > 1 else parents[0].parent
    seen: dict[str, int] = {}
    result = []
    for index, (sample, parent) in enumerate(zip(samples, parents, strict=True)):
        sample_id = sample.sample_id or parent.relative_to(common).as_posix()
        if sample_id in seen:
            raise MedSoftError(f"{path}: records {seen[sample_id]} and {index} have the same sample_id {sample_id!r}")
        seen[sample_id] = index
        values = {**sample.__dict__, "sample_id": sample_id, "patient_id": sample.patient_id or sample_id}
        result.append(Sample(**values))
    return result


# ---------------------------------------------------------------------------------------------------- split


def split_by_patient(
    samples: Sequence[Sample], seed: int = 0, fractions: Sequence[float] = (0.7, 0.1, 0.2)
) -> dict[str, list[Sample]]:
    """Split into train, val and test so that no patient is on two sides; stratified by class and lesion type.

    A patient with any lesion counts as diseased. Deterministic for a seed and independent of the order of ``samples``.
    Train is never empty; val and test get a patient each as soon as there are enough. Raises UsageError for fractions
    that are not three shares of 1 with something for train.
    """
    shares = _shares(fractions)
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.sample_id):
        patients.setdefault(sample.patient_id, []).append(sample)
    strata = {name: _stratum(group) for name, group in patients.items()}
    sizes = Counter(strata.values())
    # Rare kinds come first: the first patients go to train.
    ordered = sorted(patients, key=lambda name: (sizes[strata[name]], strata[name], named_seed("split", seed, name)))
    sides: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, patient in enumerate(ordered, 1):
        # Each patient goes to the side that is furthest behind its share, which keeps every stratum near the shares.
        side = max(SPLITS, key=lambda name: shares[name] * number - len(sides[name]))
        sides[side].append(patient)
    wanted = [name for name in SPLITS if shares[name] > 0]
    for name in wanted:
        if not sides[name] and len(ordered) >= len(wanted):
            trained = Counter(strata[patient] for patient in sides["train"])
            commonest = max(sorted(trained), key=trained.get)  # it can spare one; on a tie, the healthy ones
            moved = next(patient for patient in reversed(sides["train"]) if strata[patient] == commonest)
            sides["train"].remove(moved)
            sides[name].append(moved)
    members = {patient: name for name, group in sides.items() for patient in group}
    result: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for patient in sorted(patients):
        result[members[patient]].extend(patients[patient])
    return {name: sorted(group, key=lambda sample: sample.sample_id) for name, group in result.items()}


def _shares(fractions: Sequence[float]) -> dict[str, Fraction]:
    valid = len(fractions) == 3 and all(_is_number(value) and value >= 0 for value in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        given = " ".join(str(value) for value in fractions)
        raise UsageError(
            f"fractions: expected three numbers (train above 0, val, test) that add up to 1, found {given}"
        )
    return {name: Fraction(value).limit_denominator(10**6) for name, value in zip(SPLITS, fractions, strict=True)}


def _stratum(samples: list[Sample]) -> tuple[int, str]:
    types = [sample.lesion_type or "" for sample in samples if not sample.healthy]
    return (1, max(sorted(set(types)), key=types.count)) if types else (0, "")
