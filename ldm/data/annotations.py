"""Annotation files, a JSON list with one record per sample; and ``load_samples`` for any data source. No torch.

A data source of another kind is one function here and one entry in SOURCES.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.core.errors import MedSoftError
from ldm.core.files import json_text, read_json, write_text
from ldm.core.schema import Rule
from ldm.data.checks import warn_of_texts
from ldm.data.folders import is_marked, scan_folder
from ldm.data.samples import (
    HEALTHY,
    META_RULES,
    META_TEXTS,
    Reject,
    Sample,
    is_box,
    packed_samples,
    prompt_fault,
    prompt_of,
    text_of,
    wrong_value,
)


def load_samples(path: str | Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of a dataset folder, an annotation file or another source, and what of it cannot be used.

    What is doubtful about them is logged. Raises MedSoftError if the path does not exist or nothing in it is usable.
    """
    samples, rejects = read_samples(path)
    warn_of_texts(samples)
    return samples, rejects


def read_samples(path: str | Path) -> tuple[list[Sample], list[Reject]]:
    """``load_samples`` for a caller that says itself what is doubtful about them."""
    path = Path(path)
    if not path.exists():
        raise MedSoftError(f"{path}: does not exist; expected a dataset folder or an annotation JSON file")
    if path.suffix == ".tar":
        raise MedSoftError(str(packed_samples(path)))
    source = next(source for source in SOURCES if source.recognises(path))
    samples, rejects = source.read(path)
    if not samples:
        first = f"; the first: {rejects[0]}" if rejects else ""
        raise MedSoftError(f"{path}: none of its {len(rejects)} samples can be used{first}")
    return samples, rejects


def write_annotations(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write one record per sample, atomically: the published keys first, then ours."""
    write_text(path, annotations_text(samples))


def annotations_text(
    samples: Sequence[Sample], split: str | None = None, digests: Mapping[str, str] | None = None
) -> str:
    """The content of an annotation file.

    ``split`` says, in every record, how a split was made; ``digests``: sample_id -> SHA-256 of its image.
    """
    made, known = {"split": split} if split else {}, digests or {}
    images = [{"image_sha256": known[s.sample_id]} if s.sample_id in known else {} for s in samples]
    return json_text([_record(n, sample) | images[n] | made for n, sample in enumerate(samples)])


def _record(number: int, sample: Sample) -> dict[str, Any]:
    record = {
        "mask_image": sample.mask,
        "label": sample.prompt,
        "image": sample.image,
        "box": list(sample.box),
        "box_id": f"{number}_box",
        "image_id": str(number),
        "sample_id": sample.sample_id,
        "patient_id": sample.patient_id,
    }
    optional = {
        "anatomy": sample.anatomy,
        "soft_mask": sample.soft_mask,
        **{key: getattr(sample, key) for key in META_TEXTS[1:]},
        "synthetic": sample.synthetic or (None if sample.parent_id is None else False),
        "meta": sample.meta or None,
    }
    record |= {key: value for key, value in optional.items() if value is not None}
    return {key: str(value) if isinstance(value, Path) else value for key, value in record.items()}


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Write the file of ``rejects_text``, atomically; without rejects there is no such file."""
    if rejects:
        write_text(path, rejects_text(rejects))
    else:
        Path(path).unlink(missing_ok=True)


def rejects_text(rejects: Sequence[Reject]) -> str:
    """A JSON list of {sample_id, file, reason}, all text.

    File names that are not valid UTF-8 have their bytes written out, so that JSON can hold them.
    """
    rows = [{"sample_id": r.sample_id, "file": str(r.file), "reason": r.reason} for r in rejects]
    return json_text([{k: v.encode("utf-8", "backslashreplace").decode() for k, v in row.items()} for row in rows])


def read_annotations(path: Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of an annotation file, and the records whose files are no longer there.

    Relative paths resolve against the file's own folder. Raises MedSoftError naming file, record and key for anything
    malformed.
    """
    records = read_json(path, "annotation file")
    if not isinstance(records, list):
        raise MedSoftError(f"{path}: expected a JSON list of records, found {type(records).__name__}")
    if not records:
        raise MedSoftError(f"{path}: holds no record; make it again with ver_openImagesDatasets.py")
    usable: list[Sample] = []
    rejects: list[Reject] = []
    for sample in _with_identities(path, [_parse(path, index, record) for index, record in enumerate(records)]):
        missing = next((file for file in sample.files if file is not None and not os.path.isfile(file)), None)
        if missing is None:  # an image that was inpainted here says so itself, whoever has listed it
            usable.append(sample if sample.synthetic else replace(sample, synthetic=is_marked(sample.image)))
        else:
            rejects.append(Reject(sample.sample_id, missing, "the annotation names it, but the file is not there"))
    return usable, rejects


def _is_identity(value: Any) -> bool:
    parts = PurePosixPath(value).parts if isinstance(value, str) and "\0" not in value else ()
    return bool(parts) and ".." not in parts and parts[0] != "/"


_PATH = Rule(lambda value: isinstance(value, str) and "\0" not in value, "a path (every lesion has a mask)")
_REQUIRED = ("image", "label", "box")
_RULES = {
    **{key: META_RULES[key] for key in (*META_TEXTS, "synthetic")},  # what else stands beside `meta` is not ours
    **dict.fromkeys(("image", "mask_image", "anatomy", "soft_mask"), _PATH),
    "label": Rule(
        lambda value: isinstance(value, str) and not prompt_fault(prompt_of(value)),
        "one sentence on one line, not empty",
    ),
    "box": Rule(is_box, "four numbers [x, y, w, h], fractions inside the image"),
    "sample_id": Rule(_is_identity, "a relative path without '..'"),
    "meta": Rule(lambda value: isinstance(value, dict), "an object"),
}


def _parse(path: Path, index: int, record: Any) -> Sample:
    """The sample of record number ``index`` of the file at ``path``; MedSoftError naming the key that is wrong."""
    if not isinstance(record, dict):
        raise MedSoftError(f"{path}: record {index}: expected an object, found {type(record).__name__}")
    prompt = prompt_of(str(record.get("label")))
    required = _REQUIRED if prompt.lower() == HEALTHY else (*_REQUIRED, "mask_image")
    wrong = wrong_value(record, _RULES, required) or wrong_value(record.get("meta") or {}, META_RULES)
    if wrong:
        raise MedSoftError(f"{path}: record {index}, key {wrong[0]!r}: {wrong[1]}")

    def file(key: str) -> Path | None:
        return Path(os.path.abspath(path.parent / record[key])) if record.get(key) else None

    image = Path(os.path.abspath(path.parent / record["image"]))
    for key in ("mask_image", "anatomy", "soft_mask"):
        if file(key) == image:
            raise MedSoftError(f"{path}: record {index}, key {key!r}: is the image itself")
    x, y, width, height = map(float, record["box"])
    texts: dict[str, Any] = {key: text_of(record.get(key)) for key in META_TEXTS}
    return Sample(
        sample_id=PurePosixPath(record["sample_id"]).as_posix() if record.get("sample_id") else "",
        image=image,
        mask=file("mask_image"),
        prompt=prompt,
        box=(x, y, width, height),
        anatomy=file("anatomy"),
        soft_mask=file("soft_mask"),
        synthetic=bool(texts["parent_id"] if record.get("synthetic") is None else record["synthetic"]),
        meta=record.get("meta") or {},
        **texts | {"patient_id": texts["patient_id"] or ""},
    )


def _with_identities(path: Path, samples: list[Sample]) -> list[Sample]:
    """Fill in missing ids and refuse repeated ones.

    Files of the published tool have no ids: an image's folder is its sample's id or, where several lie in one folder,
    its file's name without the suffix.
    """
    nameless = [sample.image for sample in samples if not sample.sample_id]
    names = {image: image.parent for image in nameless}
    if len({*names.values()}) < len(nameless):
        names = {image: image.with_suffix("") for image in nameless}
    common = Path(os.path.commonpath([name.parent for name in names.values()])) if names else Path()
    seen: dict[str, int] = {}
    result = []
    for index, sample in enumerate(samples):
        sample_id = sample.sample_id or names[sample.image].relative_to(common).as_posix()
        if sample_id in seen:
            cure = "" if sample.sample_id else ", as it is made from the image's name; give each a sample_id"
            first = seen[sample_id]
            raise MedSoftError(f"{path}: records {first} and {index} have the same sample_id {sample_id!r}{cure}")
        seen[sample_id] = index
        result.append(replace(sample, sample_id=sample_id, patient_id=sample.patient_id or sample_id))
    return result


class Source(NamedTuple):
    """A kind of data source: whether a path is one, and how its samples, and those that cannot be used, are read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], tuple[list[Sample], list[Reject]]]


# The first source that recognises a path reads it. Another kind goes before the last one, which takes any file.
SOURCES = [Source(Path.is_dir, scan_folder), Source(Path.exists, read_annotations)]
