"""The way back from a result of dataset_infer.py to its source: meta.json and the private mapping of the import."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import read_json
from ldm.core.schema import Rule
from ldm.data.samples import Sample, is_number, wrong_value

MAPPING = "mapping.json"
_TEXT = Rule(lambda value: isinstance(value, str) and bool(value), "text")
_NUMBER = Rule(is_number, "a number")
META = {
    "series": _TEXT,
    "value_offset": _NUMBER,
    "value_scale": Rule(lambda value: is_number(value) and value != 0, "a number that is not 0"),
    "affine": Rule(lambda value: _affine(value) is not None, "3 or 4 rows of 4 numbers"),
}
_TURN = Rule(
    lambda value: isinstance(value, list) and [type(each) for each in value] == [bool] * 3, "three times true or false"
)
_PLACE = Rule(lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_number, value)), "3 numbers")
_SERIES = {
    "kind": Rule(lambda value: value in ("dicom", "nifti"), "dicom or nifti"),
    "patient": _TEXT,
    "paths": Rule(lambda value: isinstance(value, list) and bool(value) and all(map(_TEXT.holds, value)), "paths"),
    "origin": _PLACE,
}
_INSTANCE = {"sop_uid": _TEXT, "path": _TEXT}


@dataclass(frozen=True)
class Instance:
    """A stored frame, and how a displayed slice comes from it."""

    sop_uid: str
    path: Path
    frame: int | None  # in its file, from 1; None for a file of one image
    turn: tuple[bool, bool, bool]  # transpose, flip rows, flip columns, in this order

    def turned_back(self, shown: np.ndarray) -> np.ndarray:
        """Pixels (H, W) of the displayed slice on the stored frame's grid."""
        transpose, flip_rows, flip_columns = self.turn
        stored = shown[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(stored.T if transpose else stored)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a result comes from. The real value of a pixel is ``value_offset + value_scale * pixel``."""

    series: str  # digest
    patient: str  # pseudonym
    study_uid: str | None
    series_uid: str | None
    kind: str  # dicom or nifti
    paths: tuple[Path, ...]  # of the series
    affine: np.ndarray  # (4, 4): (row, column, 0, 1) of the result -> LPS in mm
    value_offset: float
    value_scale: float
    place: tuple[str, int]  # plane and slice
    unit: str | None
    instance: Instance | None  # None: the result's grid is no stored frame's

    def real(self, pixels: np.ndarray) -> np.ndarray:
        """Real values (float64) of pixels."""
        return self.value_offset + self.value_scale * pixels.astype(np.float64)


class PrivateMapping:
    """The private mapping that ``tool/import_volumes.py`` wrote: digests of series and images -> where they lie."""

    def __init__(self, path: Path) -> None:
        """MedSoftError for a file that is no such mapping."""
        match read_json(path, "private mapping of the import"):
            case {"series": dict(series), "instances": dict(instances)}:
                self.path, self._series, self._instances = path, series, instances
            case _:
                raise MedSoftError(f"{path}: expected a mapping with `series` and `instances`, as the import writes it")

    def origin_of(self, sample: Sample) -> Origin:
        """Where a result comes from; FileError if its meta.json or the mapping does not say."""
        meta = {"value_scale": 1.0, **sample.meta}
        file = sample.image.with_name("meta.json")
        wrong = wrong_value(meta, META, [*META])
        if wrong:
            raise FileError(file, f"{wrong[0]}: {wrong[1]}; expected a result made from an image that was imported")
        series = self._entry(self._series, meta["series"], _SERIES, file, "series")
        affine = _affine(meta["affine"])
        assert affine is not None  # its rule holds
        affine[:3, 3] += series["origin"]
        return Origin(
            series=meta["series"],
            patient=series["patient"],
            study_uid=series.get("study_uid"),
            series_uid=series.get("series_uid"),
            kind=series["kind"],
            paths=tuple(map(Path, series["paths"])),
            affine=affine,
            value_offset=float(meta["value_offset"]),
            value_scale=float(meta["value_scale"]),
            place=(str(meta.get("plane")), int(meta["slice"]) if type(meta.get("slice")) is int else 0),
            unit=meta.get("unit"),
            instance=self._instance(meta, file) if meta.get("instance") else None,
        )

    def _instance(self, meta: Mapping[str, Any], file: Path) -> Instance:
        wrong = wrong_value(meta, {"turn": _TURN}, ["turn"])
        if wrong:
            raise FileError(file, f"{wrong[0]}: {wrong[1]}")
        found = self._entry(self._instances, meta["instance"], _INSTANCE, file, "instance")
        number = found.get("frame")
        return Instance(found["sop_uid"], Path(found["path"]), number, tuple(meta["turn"]))

    def _entry(self, part: Mapping, digest: Any, rules: Mapping, file: Path, name: str) -> dict[str, Any]:
        found = part.get(digest) if isinstance(digest, str) else None
        if not isinstance(found, dict):
            raise FileError(file, f"{name} {digest} is not in {self.path}; give the --private folder of its import")
        if wrong := wrong_value(found, rules, [*rules]):
            raise MedSoftError(f"{self.path}: {name} {digest}: {wrong[0]}: {wrong[1]}")
        return found


def _affine(value: Any) -> np.ndarray | None:
    """The rows of an affine as (4, 4); None for anything else."""
    rows = isinstance(value, list) and len(value) in (3, 4) and all(isinstance(row, list) for row in value)
    if not rows or not all(len(row) == 4 and all(map(is_number, row)) for row in value):
        return None
    affine = np.eye(4)
    affine[:3] = value[:3]
    return affine if (np.linalg.norm(affine[:3, :3], axis=0) > 0).all() else None
