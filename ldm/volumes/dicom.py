"""DICOM series: found in folders by their headers, and read into volumes.

A series is read only if its frames are a right-angled, regular stack. Where one is missing, tilted, doubled or of
another orientation, the message names it: readers that go on instead shift every slice behind a gap.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, MediaStorageDirectoryStorage

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.paths import walk
from ldm.core.tables import counted
from ldm.data.samples import shown
from ldm.volumes.dicom_files import Decoder, open_file, told
from ldm.volumes.dicom_frames import Frame, frames_of, is_projection, sop_uids, stored_values
from ldm.volumes.dicom_stack import stacked
from ldm.volumes.volume import PROJECTION, Volume, frame_plane, to_integers

IMAGE, LOCALIZER = "image", "localizer"
SUFFIXES = ("", ".dcm", ".ima", ".dicom", ".dic")  # and numbers: a file so named is expected to be DICOM
NO_RESCALE = "no RescaleSlope or no RescaleIntercept in the header: values are as stored, and not taken for HU"
# By the beginnings of the names of their SOP classes in pydicom's dictionary.
KINDS = {
    "Segmentation Storage": "segmentation",
    "RT Structure Set": "structure set",
    "RT Dose": "dose",
    "Basic Text SR": "report",
    "Enhanced SR": "report",
    "Comprehensive": "report",
    "X-Ray Radiation Dose SR": "report",
}


@dataclass(frozen=True)
class Series:
    """Files that belong to one stack of frames: a series, one multi-frame file or one radiograph. All of it is private.

    ``kind`` is "image", or says why it is none to import: "localizer", "segmentation", "structure set", "report", ...
    """

    files: tuple[Path, ...]
    folder: Path
    uid: str
    study_uid: str
    patient_id: str
    modality: str
    description: str
    number: int | None
    frames: int
    kind: str = IMAGE

    @property
    def name(self) -> str:
        """How messages name it."""
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.folder} (series {'?' if self.number is None else self.number})"


def find_series(path: Path) -> tuple[list[Series], list[FileError]]:
    """The series in a file or, at any depth, in a folder, by their headers; and the files that cannot be read.

    A DICOMDIR stands for its folder. Files in a folder whose names promise no DICOM (``notes.txt``) are passed over.
    Raises FileError where ``path`` is one file that is no readable DICOM, or a folder without any.
    """
    found: dict[tuple[str, str], list[Series]] = {}
    rejects: list[FileError] = []
    if not path.exists():
        raise FileError(path, "it does not exist")
    single = path.is_file() and path.name.upper() != "DICOMDIR"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about values that are odd and no matter here
        for file in [path] if single else _files(path if path.is_dir() else path.parent):
            try:
                if not single and not promises_dicom(file):
                    continue
                with told(file, "its header is damaged"):
                    header = open_file(file, pixels=False)
                    if sop_uids(header)[0] != MediaStorageDirectoryStorage:
                        found.setdefault(_key(file, header), []).append(_series(file, header))
            except FileError as error:
                if single:
                    raise
                rejects.append(error)
    if not found and not rejects:
        raise FileError(path, "there is no DICOM image or object in it")
    return [_joined(parts) for parts in found.values()], rejects


def named(series: Sequence[Series], wanted: str) -> list[Series]:
    """Those whose number or UID ``wanted`` is; if there are none, those with ``wanted`` in their description."""
    return [each for each in series if wanted in (str(each.number), each.uid)] or [
        each for each in series if wanted.casefold() in each.description.casefold()
    ]


def only_series(series: Sequence[Series], path: Path) -> Series:
    """The one image series of those found in ``path``.

    Raises UsageError with a list of the series where it is not one. The list shows descriptions, which may hold
    anything: it is for the console only.
    """
    images = [each for each in series if each.kind == IMAGE]
    if not images:
        kinds = ", ".join(sorted({each.kind for each in series}))
        raise FileError(path, f"there is no image series in it, only: {kinds}")
    if len(images) == 1:
        return images[0]
    listed = "".join(
        f"\n  {'?' if each.number is None else each.number}: {counted(each.frames, 'slice')}, {each.modality}, "
        f"{shown(each.description) or 'no description'}, UID {each.uid}"
        for each in images
    )
    cure = "put the files of one of them into a folder of its own"
    raise UsageError(f"{path}: {len(images)} image series, expected one; {cure}:{listed}")


def read_series(series: Series) -> Volume:
    """Read a series into a volume whose frames are ordered along their normal.

    Values are the stored ones, after a modality LUT; where slopes differ between slices they are brought to one
    scale, exactly if 16 bits are enough, else rounded (then ``rounded`` is set). Refused by FileError or MedSoftError:
    files that are damaged or no grey images, and stacks that are not regular.
    """
    if series.kind not in (IMAGE, LOCALIZER):
        raise MedSoftError(f"{series.name}: this is no image but: {series.kind}; expected slices or a radiograph")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = [frame for file in series.files for frame in frames_of(file, open_file(file, pixels=False))]
        with told(series.files[0], "its header is damaged"):
            header = open_file(series.files[0], pixels=False)
            frames, affine = stacked(series.name, frames, _thickness(header))
            unit = _unit(series, header)
            unknown = unit == "HU" and not all(frame.rescaled for frame in frames)
            acquired = PROJECTION if is_projection(header) else frame_plane(affine)
            kept, source = _white_list(header), _source(series, frames, header)
        middle = frames[len(frames) // 2]
        volume = Volume(
            values=_decoded(frames).transpose(2, 1, 0),
            affine=affine,
            low_is_white=middle.low_is_white,
            modality=series.modality or None,
            windows=middle.windows,
            calibrated=middle.calibrated,
            name=series.name,
            unit=None if unknown else unit,
            notes=(NO_RESCALE,) if unknown else (),
            acquired=acquired,
            header=kept,
            source=source,
        )
        return _rescaled(volume, frames)


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth, in the order of their names; hidden ones, and those in hidden folders, are left out."""
    for file in sorted(place / name for place, names in walk(folder) for name in names if name[0] != "."):
        if file.is_file() and file.name.upper() != "DICOMDIR":
            yield file


def promises_dicom(file: Path) -> bool:
    """Whether it is marked as DICOM, or named so that it should be."""
    if file.suffix.lower() in SUFFIXES or file.suffix[1:].isdigit():
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError as error:
        raise FileError(file, error.strerror or str(error)) from error


def _key(file: Path, header: Dataset) -> tuple[str, str]:
    """What files of one stack have in common. Radiographs and multi-frame files stand for themselves."""
    alone = is_projection(header) or _whole(header.get("NumberOfFrames")) not in (None, 1)
    alone |= "PerFrameFunctionalGroupsSequence" in header or "SeriesInstanceUID" not in header
    return (str(header.get("SeriesInstanceUID")), str(file) if alone else "")


def _series(file: Path, header: Dataset) -> Series:
    """What one file says of its series."""
    return Series(
        files=(file,),
        folder=file.parent,
        uid=str(header.get("SeriesInstanceUID") or sop_uids(header)[1] or file.absolute()),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        patient_id=str(header.get("PatientID") or ""),
        modality=str(header.get("Modality") or ""),
        description=str(header.get("SeriesDescription") or ""),
        number=_whole(header.get("SeriesNumber")),
        frames=_whole(header.get("NumberOfFrames")) or 1,
        kind=_kind(header),
    )


def _joined(parts: Sequence[Series]) -> Series:
    """One series of its files. A localizer among slices makes it an image that is refused when it is read."""
    kinds = {part.kind for part in parts}
    return replace(
        parts[0],
        files=tuple(file for part in parts for file in part.files),
        frames=sum(part.frames for part in parts),
        kind=kinds.pop() if len(kinds) == 1 else IMAGE,
    )


def _kind(header: Dataset) -> str:
    name = UID(sop_uids(header)[0]).name
    for beginning, kind in KINDS.items():
        if name.startswith(beginning):
            return kind
    if not header.get("Rows"):
        return f"object without pixels ({shown(name)[:60] or 'of no SOP class'})"
    if "Secondary Capture" in name and not is_projection(header) and "ImageOrientationPatient" not in header:
        return "secondary capture"
    if LOCALIZER.upper() in _texts(header.get("ImageType")):
        return LOCALIZER
    return IMAGE


def _decoded(frames: Sequence[Frame]) -> np.ndarray:
    """The values (frames, rows, columns) in the frames' order; one copy, filled file by file."""
    values = np.empty((len(frames), *frames[0].shape), np.result_type(*{frame.dtype for frame in frames}))
    by_file = sorted(range(len(frames)), key=lambda place: (str(frames[place].path), frames[place].index))
    with Decoder() as decoder:
        for (path, syntax), places in groupby(by_file, key=lambda place: (frames[place].path, frames[place].syntax)):
            taken = list(places)
            decoded = decoder.frames(path, syntax, [frames[place].index for place in taken])
            for place, pixels in zip(taken, decoded, strict=True):
                values[place] = stored_values(frames[place], pixels)
    return values


def _rescaled(volume: Volume, frames: Sequence[Frame]) -> Volume:
    """The volume with the offset and scale of its frames, and integers where the file has real numbers."""
    if volume.values.dtype.kind == "f":
        return _from_real(volume, frames)
    rules = {(frame.slope, frame.intercept) for frame in frames}
    if len(rules) == 1:
        slope, intercept = rules.pop()
        return replace(volume, offset=float(intercept), scale=float(slope))
    base = frames[0].intercept
    step = _common_divisor([number for slope, intercept in rules for number in (slope, intercept - base)])
    factors = [(int(frame.slope / step), int((frame.intercept - base) / step)) for frame in frames]
    ends = [
        factor * int(end) + shift
        for (factor, shift), values in zip(factors, np.moveaxis(volume.values, 2, 0), strict=True)
        for end in (values.min(), values.max())
    ]
    low, high = min(ends), max(ends)
    exact = high - low <= 65535
    share = 1.0 if exact else 65535 / (high - low)
    common = np.empty(volume.values.shape[::-1], np.uint16).transpose(2, 1, 0)
    for place, (factor, shift) in enumerate(factors):
        values = volume.values[:, :, place].astype(np.float64)
        start = int(values.min())
        common[:, :, place] = np.rint(((values - start) * factor + (start * factor + shift - low)) * share)
    notes = (*volume.notes, "slopes differ between slices: values are brought to one scale" + ", rounded" * (not exact))
    scale = float(step) / share
    return replace(volume, values=common, offset=float(base + step * low), scale=scale, rounded=not exact, notes=notes)


def _from_real(volume: Volume, frames: Sequence[Frame]) -> Volume:
    """A volume of Float Pixel Data as integers."""
    if not np.isfinite(volume.values).all():
        raise MedSoftError(f"{volume.name}: its pixels hold values that are no finite numbers")
    slopes, intercepts = ([float(getattr(frame, name)) for frame in frames] for name in ("slope", "intercept"))
    values, offset, scale, rounded = to_integers(volume.values * np.array(slopes) + np.array(intercepts))
    notes = (*volume.notes, "real values are rounded to 16 bits") if rounded else volume.notes
    return replace(volume, values=values, offset=offset, scale=scale, rounded=rounded, notes=notes)


def _common_divisor(numbers: Iterable[Fraction]) -> Fraction:
    """The largest number of which all others are whole multiples."""
    numbers = list(numbers)
    denominator = lcm(*(number.denominator for number in numbers))
    return Fraction(gcd(*(int(number * denominator) for number in numbers)), denominator)


def _source(series: Series, frames: Sequence[Frame], header: Dataset) -> Mapping[str, Any]:
    """Private: where the frames come from, each list in their order."""
    return {
        "key": series.uid if len(series.files) > 1 else f"{series.uid} {frames[0].sop_uid}",
        "paths": [str(frame.path.absolute()) for frame in frames],
        "frames": [frame.number for frame in frames],
        "sop_uids": [frame.sop_uid for frame in frames],
        "patient_id": series.patient_id,
        "study_uid": series.study_uid,
        "series_uid": series.uid,
        "frame_of_reference": str(header.get("FrameOfReferenceUID") or ""),
    }


def _white_list(header: Dataset) -> dict[str, Any]:
    """What may be known of an image's making; nothing else of the header leaves this package in public."""
    known = {
        "modality": _text(header.get("Modality")),
        "manufacturer": _text(header.get("Manufacturer")),
        "model": _text(header.get("ManufacturerModelName")),
        "kvp": _real(header.get("KVP")),
        "sequence": "+".join(_texts(header.get("ScanningSequence"))),
        "slice_thickness_mm": _thickness(header),
        "body_part": _text(header.get("BodyPartExamined")),
        "year": _whole(str(header.get("AcquisitionDate") or header.get("StudyDate") or "")[:4]),
    }
    return {key: value for key, value in known.items() if value}


def _thickness(header: Dataset) -> float | None:
    """Slice thickness in mm, of multi-frame images the shared one."""
    for group in header.get("SharedFunctionalGroupsSequence") or ():
        for measures in group.get("PixelMeasuresSequence") or ():
            return _real(measures.get("SliceThickness"))
    return _real(header.get("SliceThickness"))


def _unit(series: Series, header: Dataset) -> str | None:
    """The unit of the real values, where the file or the modality says it."""
    said = _text(header.get("RescaleType")).upper()
    if said in ("", "HU"):
        return "HU" if series.modality == "CT" and series.kind == IMAGE else None
    return None if said == "US" else said


def _text(value: Any) -> str:
    return shown(value or "").strip()


def _texts(value: Any) -> list[str]:
    """A value of one or several texts."""
    return [str(each).upper() for each in ([value] if isinstance(value, str) else value or [])]


def _real(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
