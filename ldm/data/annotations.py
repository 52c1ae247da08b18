"""Annotation files, a JSON list with one record per sample; and ``load_samples`` for any data source. No torch.

A data source of another kind is one function here (or in a module of its own) and one entry in SOURCES.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, write_json
from ldm.data.folders import scan_folder
from ldm.data.samples import META_TEXTS, Reject, Sample, is_box, wrong_value


def load_samples(path: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of a dataset folder or of an annotation file, and what of it cannot be used.

    Raises MedSoftError if the path does not exist or nothing in it is usable.
    """
    path = Path(path)
    if not path.exists():
        raise MedSoftError(f"{path}: does not exist; expected a dataset folder or an annotation JSON file")
    source = next(source for source in SOURCES if source.recognises(path))
    samples, rejects = source.read(path)
    if not samples:
        raise MedSoftError(f"{path}: none of its {len(rejects)} samples can be used; the first: {rejects[0]}")
    return samples, rejects


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
        **{key: getattr(sample, key) for key in META_TEXTS[1:]},
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


def read_annotations(path: Path) -> tuple[list[Sample], list[Reject]]:
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
    usable: list[Sample] = []
    rejects: list[Reject] = []
    for sample in samples:
        missing = next((file for file in sample.files if file is not None and not file.is_file()), None)
        if missing is None:
            usable.append(sample)
        else:
            rejects.append(Reject(sample.sample_id, missing, "the annotation names it, but the file is not there"))
    return usable, rejects


@dataclass(frozen=True)
class _Record:
    """One record of the file at ``path``, read key by key; an error says which record and key is wrong."""

    path: Path
    index: int
    values: Any

    def error(self, key: str, expected: str) -> MedSoftError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return MedSoftError(f"{self.path}: record {self.index}, key {key!r}: expected {expected}, found {found[:80]}")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "text")
        return value

    def required_text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "text that is not empty")
        return value

    def file(self, key: str, folder: Path) -> Path | None:
        """The path under ``key``, seen from ``folder``; None if there is none."""
        value = self.text(key)
        return self.path_of(key, value, folder) if value else None

    def path_of(self, key: str, value: str, folder: Path) -> Path:
        if "\0" in value:
            raise self.error(key, "a path")
        return Path(os.path.normpath(folder / value))

    def box(self) -> tuple[float, float, float, float]:
        """x, y, width and height as fractions of the image, in [0, 1]."""
        value = self.values.get("box")
        if not is_box(value):
            raise self.error("box", "four numbers [x, y, w, h], fractions inside the image")
        x, y, width, height = map(float, value)
        return (x, y, width, height)


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
        wrong = wrong_value(values)
        if wrong:
            raise _Record(record.path, record.index, values).error(*wrong)
    sample = Sample(
        sample_id=sample_id or "",
        image=record.path_of("image", record.required_text("image"), folder),
        mask=record.file("mask_image", folder),
        prompt=record.required_text("label").strip(),
        box=record.box(),
        patient_id=record.text("patient_id") or "",
        anatomy=record.file("anatomy", folder),
        soft_mask=record.file("soft_mask", folder),
        synthetic=bool(synthetic),
        meta=meta,
        **{key: record.text(key) for key in META_TEXTS[1:]},
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
        result.append(replace(sample, sample_id=sample_id, patient_id=sample.patient_id or sample_id))
    return result


class Source(NamedTuple):
    """A kind of data source: whether a path is one, and how its samples, and those that cannot be used, are read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], tuple[list[Sample], list[Reject]]]


# The first source that recognises a path reads it. Another kind goes before the last one, which takes any file.
SOURCES = [Source(Path.is_dir, scan_folder), Source(Path.exists, read_annotations)]
