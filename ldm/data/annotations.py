"""Annotation files, a JSON list or JSON Lines with one record per sample; ``load_samples`` for any source. No torch.

A data source of another kind is one function here and one entry in SOURCES.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.core.errors import MedSoftError
from ldm.core.files import JSON_LINES, json_text, read_records, write_text, write_together
from ldm.core.schema import Rule
from ldm.data.checks import warn_of_texts
from ldm.data.folders import is_marked, scan_folder
from ldm.data.samples import (
    HEALTHY,
    META_RULES,
    META_TEXTS,
    NO_META,
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
        raise MedSoftError(f"{path}: does not exist; expected a dataset folder or an annotation file (.json, .jsonl)")
    if path.suffix == ".tar":
        raise MedSoftError(str(packed_samples(path)))
    source = next(source for source in SOURCES if source.recognises(path))
    samples, rejects = source.read(path)
    if not samples:
        raise none_usable(path, rejects)
    return samples, rejects


def none_usable(path: Path, rejects: Sequence[Reject]) -> MedSoftError:
    """What to raise where all samples of a source are ``rejects``."""
    first = f"; the first: {rejects[0]}" if rejects else ""
    none = "its only sample cannot" if len(rejects) == 1 else f"none of its {len(rejects)} samples can"
    return MedSoftError(f"{path}: {none} be used{first}")


def write_annotations(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write one record per sample, atomically: the published keys first, then ours."""
    write_together({Path(path): annotation_texts(Path(path), samples)})


def annotation_texts(
    path: Path, samples: Sequence[Sample], split: str | None = None, digests: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The content of the annotation file at ``path``, record by record.

    A JSON list with absolute paths; where its name ends with .jsonl, a record a line with paths relative to its folder.
    ``split`` says, in every record, how a split was made; ``digests``: sample_id -> SHA-256 of its image.
    """
    lines = path.suffix.lower() == JSON_LINES
    folder = os.path.abspath(path.parent) if lines else None
    known = digests or {}
    for number, sample in enumerate(samples):
        record = _record(number, sample, folder)
        if sample.sample_id in known:
            record["image_sha256"] = known[sample.sample_id]
        if split:
            record["split"] = split
        if lines:
            yield f"{_FLAT(record)}\n"
        else:  # as ``json_text`` of the whole list would be
            rows = ",\n".join(f'    "{key}": {_indented(value)}' for key, value in record.items())
            yield f"{',' if number else '['}\n  {{\n{rows}\n  }}"
    if not lines:
        yield "\n]\n" if samples else "[]\n"


_FLAT = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _indented(value: Any, margin: str = "    ") -> str:
    """A value of a record as Python's encoder writes it with an indent of 2, which it does several times slower."""
    inner = f"{margin}  "
    if isinstance(value, dict) and value:
        rows = (f"{inner}{_FLAT(key)}: {_indented(each, inner)}" for key, each in value.items())
        return "{\n" + ",\n".join(rows) + f"\n{margin}}}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"{inner}{_indented(each, inner)}" for each in value) + f"\n{margin}]"
    return _FLAT(value)


def _record(number: int, sample: Sample, folder: str | None) -> dict[str, Any]:
    """The record of a sample, its paths relative to ``folder`` if that is given."""
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
    return {key: _shown_path(value, folder) if isinstance(value, Path) else value for key, value in record.items()}


def _shown_path(path: Path, folder: str | None) -> str:
    """``path`` as a record names it."""
    if folder is None:
        return str(path)
    try:
        shown = os.path.relpath(path, folder)
        if shown.startswith(os.pardir):  # one of the two may have been given by a link
            shown = os.path.relpath(Path(_real(path.parent), path.name), _real(folder))
    except ValueError:  # on another drive
        return path.as_posix()
    return Path(shown).as_posix()


_real = functools.lru_cache(os.path.realpath)  # the files of a sample lie in one folder


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Write the file of ``rejects_text``, atomically; without rejects there is no such file."""
    if rejects:
        write_text(path, rejects_text(rejects))
    else:
        Path(path).unlink(missing_ok=True)


def rejects_text(rejects: Sequence[Reject], lines: bool = False) -> str:
    """A JSON list of {sample_id, file, reason}, all text, or, with ``lines``, one of them a line.

    File names that are not valid UTF-8 have their bytes written out, so that JSON can hold them.
    """
    rows = [{"sample_id": r.sample_id, "file": str(r.file), "reason": r.reason} for r in rejects]
    rows = [{k: v.encode("utf-8", "backslashreplace").decode() for k, v in row.items()} for row in rows]
    return "".join(json_text(row, None) for row in rows) if lines else json_text(rows)


def read_annotations(path: Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of an annotation file, and the records whose files are no longer there.

    A JSON list, or, where the name ends with .jsonl, one record a line. Relative paths resolve against the file's own
    folder. Raises MedSoftError naming file, record or line, and key for anything malformed.
    """
    # The folder's real path, and the one it is reached by, which is another where that leads through a link.
    folders, known = (os.path.realpath(path.parent), os.path.abspath(path.parent)), _Once()
    places: list[str] = []
    samples: list[Sample] = []
    for place, record in read_records(path, "annotation file"):
        places.append(place)
        samples.append(_parse(path, folders, place, record, known))
    if not samples:
        raise MedSoftError(f"{path}: holds no record; make it again with ver_openImagesDatasets.py")
    names = _names_of(samples)
    first: dict[str, str] = {}
    usable: list[Sample] = []
    rejects: list[Reject] = []
    for place, sample in zip(places, samples, strict=True):
        sample_id = sample.sample_id or names[sample.image]
        if (other := first.setdefault(sample_id, place)) != place:
            cure = "" if sample.sample_id else ", as it is made from the image's name; give each a sample_id"
            raise MedSoftError(f"{path}: {other} and {place} have the same sample_id {sample_id!r}{cure}")
        if not sample.sample_id or not sample.patient_id:
            sample = replace(sample, sample_id=sample_id, patient_id=sample.patient_id or sample_id)
        missing = next((file for file in sample.files if file is not None and not os.path.isfile(file)), None)
        if missing is not None:
            rejects.append(Reject(sample_id, missing, "the annotation names it, but the file is not there"))
        elif sample.synthetic or not is_marked(sample.image):
            usable.append(sample)
        else:  # an image that was inpainted here says so itself, whoever has listed it
            usable.append(replace(sample, synthetic=True))
    return usable, rejects


class _Once(dict[Any, Any]):
    """Each text that many records have, kept once."""

    def __missing__(self, text: Any) -> Any:
        self[text] = text
        return text


def _is_identity(value: Any) -> bool:
    parts = PurePosixPath(value).parts if isinstance(value, str) and "\0" not in value else ()
    return bool(parts) and ".." not in parts and parts[0] != "/"


_PATH = Rule(lambda value: isinstance(value, str) and "\0" not in value, "a path (every lesion has a mask)")
_REQUIRED = ("image", "label", "box")
_FILES = ("image", "mask_image", "anatomy", "soft_mask")
_RULES = {
    **{key: META_RULES[key] for key in (*META_TEXTS, "synthetic")},  # what else stands beside `meta` is not ours
    **dict.fromkeys(_FILES, _PATH),
    "label": Rule(
        lambda value: isinstance(value, str) and not prompt_fault(prompt_of(value)),
        "one sentence on one line, not empty",
    ),
    "box": Rule(is_box, "four numbers [x, y, w, h], fractions inside the image"),
    "sample_id": Rule(_is_identity, "a relative path without '..'"),
    "meta": Rule(lambda value: isinstance(value, dict), "an object"),
}


def _parse(path: Path, folders: tuple[str, str], place: str, record: Any, known: Mapping[Any, Any]) -> Sample:
    """The sample of the record at ``place`` of the file at ``path``; MedSoftError naming the key that is wrong.

    ``folders``: see ``_located``. ``known`` keeps a text that other records have too.
    """
    if not isinstance(record, dict):
        raise MedSoftError(f"{path}: {place}: expected an object, found {type(record).__name__}")
    prompt = prompt_of(str(record.get("label")))
    required = _REQUIRED if prompt.lower() == HEALTHY else (*_REQUIRED, "mask_image")
    wrong = wrong_value(record, _RULES, required) or wrong_value(record.get("meta") or {}, META_RULES)
    if wrong:
        raise MedSoftError(f"{path}: {place}, key {wrong[0]!r}: {wrong[1]}")
    files: dict[str, Any] = {key: _located(folders, record[key]) if record.get(key) else None for key in _FILES}
    for key in _FILES[1:]:
        if files[key] == files["image"]:
            raise MedSoftError(f"{path}: {place}, key {key!r}: is the image itself")
    x, y, width, height = map(float, record["box"])
    texts: dict[str, Any] = {key: known[text_of(record.get(key))] for key in META_TEXTS}
    return Sample(
        sample_id=known[PurePosixPath(record["sample_id"]).as_posix()] if record.get("sample_id") else "",
        image=files["image"],
        mask=files["mask_image"],
        prompt=known[prompt],
        box=(x, y, width, height),
        anatomy=files["anatomy"],
        soft_mask=files["soft_mask"],
        synthetic=bool(texts["parent_id"] if record.get("synthetic") is None else record["synthetic"]),
        meta=record.get("meta") or NO_META,
        **texts | {"patient_id": texts["patient_id"] or ""},
    )


def _located(folders: tuple[str, str], given: str) -> Path:
    """The file that a record names as ``given``, which may lead out of the annotation file's folder.

    ``folders``: that folder's real path, from which ``..`` leads where the system says, and the one it is reached by.
    """
    real, reached = folders
    if real != reached and given.startswith(os.pardir):
        place = os.path.abspath(os.path.join(real, given))
        if os.path.isfile(place):
            return Path(place)
    return Path(os.path.abspath(os.path.join(reached, given)))


def _names_of(samples: Sequence[Sample]) -> dict[Path, str]:
    """sample_ids for the images of those that have none, as files of the published tool: the image's folder or, where
    several lie in one folder, its file's name without the suffix."""
    nameless = [sample.image for sample in samples if not sample.sample_id]
    names = {image: image.parent for image in nameless}
    if len({*names.values()}) < len(nameless):
        names = {image: image.with_suffix("") for image in nameless}
    common = Path(os.path.commonpath([name.parent for name in names.values()])) if names else Path()
    return {image: name.relative_to(common).as_posix() for image, name in names.items()}


class Source(NamedTuple):
    """A kind of data source: whether a path is one, and how its samples, and those that cannot be used, are read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], tuple[list[Sample], list[Reject]]]


# The first source that recognises a path reads it. Another kind goes before the last one, which takes any file.
SOURCES = [Source(Path.is_dir, scan_folder), Source(Path.exists, read_annotations)]
