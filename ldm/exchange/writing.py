"""One case becomes sample folders: its volume is read, cut, windowed, and written without what identifies it."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.errors import FileError, MedSoftError
from ldm.data.folders import write_sample
from ldm.data.images import intensity_range_of
from ldm.exchange.cases import Case, Row, is_volume
from ldm.exchange.privacy import IdentifyingTexts, Pseudonyms, identifying, path_texts
from ldm.exchange.sentences import Sentence, sentence
from ldm.exchange.targets import Cut, choose
from ldm.volumes.dicom import read_series
from ldm.volumes.dicom_files import open_file
from ldm.volumes.formats import read_volume
from ldm.volumes.intensity import Levels, levels_of, window_for
from ldm.volumes.labels import Lesion, Scheme, region_of
from ldm.volumes.segmentations import read_labels, read_lesions
from ldm.volumes.volume import Slice, Volume, only_plane, square

WHITE_LIST = ("manufacturer", "kvp", "sequence", "slice_thickness_mm", "body_part")  # of a header
COPIED = ("site", "scanner")  # of a table, beside what a sentence is made of
MICRO = 6  # decimals of lengths in mm
EQUAL, MOST_LABELS = 0.75, 256  # of a label map: the share of equal neighbours, numbers


class OutputError(MedSoftError):
    """The output cannot be written: nothing is wrong with the case."""


@dataclass(frozen=True)
class CutOptions:
    """What is made of a volume: the flags of the command, under their names."""

    plane: str
    target: tuple[str, ...]
    slices: str | int
    window: str | tuple[float, float] | None
    mm_per_pixel: float | None
    modality: str | None
    year: bool


@dataclass(frozen=True)
class LeftOutPart:
    """What of a case did not become a sample: ``reason`` for the person at the machine, ``public`` for the data set."""

    what: str
    reason: str
    public: str
    rejected: bool


@dataclass(frozen=True)
class Written:
    """What became of a case. PRIVATE but for the names of samples, and ``public`` of what was left out."""

    samples: tuple[str, ...]
    left_out: tuple[LeftOutPart, ...]
    series: Mapping[str, Any]
    instances: Mapping[str, Any]


def texts_of(case: Case, source: Path) -> IdentifyingTexts:
    """What may not be written of a case: names and numbers of its DICOM headers, its patient, its paths."""
    partners = [path for path in (case.labels, *(path for path, _ in case.lesions)) if path]
    headers = [*(case.series.files[:1] if case.series else ()), *partners]
    who = {row["patient"] for row in case.rows if row.get("patient")}
    return texts_of_files(headers, source, who, {*path_texts(case.files, source), *case.names, case.patient})


def texts_of_files(
    paths: Iterable[Path], source: Path, who: Set[str] = frozenset(), others: Set[str] = frozenset()
) -> IdentifyingTexts:
    """What may not be written of files: their paths, what their headers say if they are DICOM, and what is given."""
    paths = list(paths)
    who, others = {*who}, {*others, *path_texts(paths, source)}
    for path in paths:
        if is_volume(path):
            continue  # NIfTI and the like name nobody
        with suppress(FileError):  # what is damaged is refused where it is read
            names, more = identifying(open_file(path, pixels=False))
            who, others = who | names, others | more
    return IdentifyingTexts(who, others)


def write_case(
    case: Case,
    output: Path,
    source: Path,
    pseudonyms: Pseudonyms,
    scheme: Scheme | None,
    options: CutOptions,
    limit: int | None,
) -> Written:
    """Write the samples of a case below ``output``; ``limit``: the most of them.

    What is wrong with one of them leaves the others; what is wrong with the whole image is a MedSoftError.
    """
    volume = _read_image(case, options)
    labels = read_labels(case.labels, volume, scheme) if case.labels else None
    lesions, rows_of = _read_lesions(case, volume)
    texts = texts_of(case, source).and_others(lesion.name for lesion in lesions)  # a segment may be called anything
    plane = only_plane(volume) or options.plane
    cuts, left = choose(volume, labels, lesions, plane=plane, target=options.target, slices=options.slices, limit=limit)
    left_out = [
        LeftOutPart(texts.hidden(each.what), each.reason, texts.hidden(each.reason), each.rejected) for each in left
    ]
    writer = _Writer(case, volume, pseudonyms, texts, options)
    samples = []
    for cut in cuts:
        rows = rows_of.get(id(cut.lesion_of), case.rows)
        try:
            told = sentence(cut.level, cut.lesion_of, rows, diseased=bool(lesions))
            files, meta = writer.sample(cut, told)
        except MedSoftError as error:
            left_out.append(LeftOutPart(cut.name, str(error), texts.hidden(str(error)), True))
            continue
        samples.append(f"{writer.patient}/{writer.digest[:8]}_{cut.name}")
        try:
            write_sample(output / samples[-1], files, told.prompt, meta)
        except MedSoftError as error:
            raise OutputError(str(error)) from error
    return Written(tuple(samples), tuple(left_out), writer.series, writer.instances)


def _read_image(case: Case, options: CutOptions) -> Volume:
    """The volume of a case, with the modality that the table or ``--modality`` gives to a file that does not say it."""
    volume = read_series(case.series) if case.series else read_volume(case.image)
    given = (case.value("modality") or options.modality or "").upper()
    if given and not volume.modality:
        unit = "HU" if given == "CT" and volume.unit is None else volume.unit
        volume = replace(volume, modality=given, unit=unit)
    if case.series is None:
        _check_is_image(volume)
    return volume


def _read_lesions(case: Case, volume: Volume) -> tuple[list[Lesion], dict[int, tuple[Row, ...]]]:
    """The lesions of a case, and the rows of the table about those that have rows of their own, by the lesion's id."""
    lesions: list[Lesion] = []
    rows_of: dict[int, tuple[Row, ...]] = {}
    for path, rows in case.lesions:
        found = read_lesions(path, volume)
        rows_of |= {id(lesion): rows for lesion in found if rows}
        lesions += found
    return lesions, rows_of


def _check_is_image(volume: Volume) -> None:
    """MedSoftError for a label map: most neighbours are equal there, beside the background."""
    values = volume.values
    marked = (values[1:] != 0) & (values[:-1] != 0)
    equal = np.count_nonzero(marked & (values[1:] == values[:-1]))
    if equal > EQUAL * np.count_nonzero(marked) and len(np.unique(values)) <= MOST_LABELS:
        raise MedSoftError(
            f"{volume.name}: looks like a label map; name it with --labels or --lesions, or move it away"
        )


class _Writer:
    """Writes slices of one volume, and keeps what the private mapping holds of it."""

    def __init__(
        self,
        case: Case,
        volume: Volume,
        pseudonyms: Pseudonyms,
        texts: IdentifyingTexts,
        options: CutOptions,
    ) -> None:
        self.case, self.volume, self.pseudonyms, self.texts = case, volume, pseudonyms, texts
        self.options = options
        self.levels: Levels = levels_of(volume)
        self.window = window_for(volume, options.window)
        self.patient = pseudonyms.patient(case.patient)
        self.origin = np.round(volume.affine[:3, 3], MICRO)
        source = volume.source
        uid = source.get("series_uid")
        self.digest = pseudonyms.digest("series", source.get("key") or os.path.abspath(case.image))
        self.series = {
            self.digest: {
                "series_uid": uid,
                "study_uid": source.get("study_uid"),
                "patient_id": case.patient,
                "patient": self.patient,
                "kind": "dicom" if uid else "nifti",
                "paths": [os.path.abspath(path) for path in (case.series.files if case.series else [case.image])],
                "origin": self.origin.tolist(),
            }
        }
        self.instances: dict[str, Any] = {}

    def sample(self, cut: Cut, told: Sentence) -> tuple[dict[str, np.ndarray | Path | bytes], dict[str, Any]]:
        """The files of one sample, and its meta.json. MedSoftError if it cannot be one."""
        for text in (told.prompt, told.lesion_type, told.severity):
            if text and (found := self.texts.found_in(text)):
                raise MedSoftError(f"its sentence or lesion type holds {found}; take that out")
        image = square(cut.image, self.options.mm_per_pixel)
        window = self.levels.window(*self.window[:2])
        pixels = self.levels.pixels(image.pixels)
        files: dict[str, np.ndarray | Path | bytes] = {"image.png": pixels}
        intensity_range_of(pixels, window)  # MedSoftError for a window that does not meet the pixels
        if cut.lesion is not None:
            lesion = self._resampled(cut, cut.lesion)
            if not lesion.any():
                raise MedSoftError("nothing is left of its lesion at this number of mm a pixel")
            files["mask.png"] = lesion.astype(np.uint8) * 255
        if cut.anatomy is not None:
            files["anatomy.png"] = self._resampled(cut, cut.anatomy)
        level = told.level or cut.level
        notes = (*self.volume.notes, *cut.notes, *told.notes)
        meta = {
            "patient_id": self.patient,
            "level": level,
            "lesion_type": told.lesion_type,
            "severity": told.severity,
            **self._acquisition(level),
            **self._geometry(cut.image, image),
            "value_offset": self.levels.value_offset,
            "value_scale": self.levels.value_scale,
            "unit": self.volume.unit,
            "window": window,
            "window_rule": self.window[2],
            "series": self.digest,
            "notes": [self.texts.hidden(note) for note in notes] or None,
        }
        return files, {key: value for key, value in meta.items() if value is not None}

    def _resampled(self, cut: Cut, labels: np.ndarray) -> np.ndarray:
        flat = replace(cut.image, pixels=labels.astype(np.uint8))
        return square(flat, self.options.mm_per_pixel, nearest=True).pixels

    def _acquisition(self, level: str | None) -> dict[str, Any]:
        """What may be told of the image's making: the white list of its header, and the table's columns for it."""
        header = dict(self.volume.header)
        found = {key: self._plain(header.get(key)) for key in WHITE_LIST}
        found |= {"scanner": self._plain(header.get("model")), "modality": self._plain(self.volume.modality)}
        found["year"] = header.get("year") if self.options.year else None
        for key in COPIED:
            text = self.case.value(key)
            if text:
                hidden = self.texts.found_in(text) is not None
                found[key] = f"{key}_{self.pseudonyms.digest(key, text, 8)}" if hidden else text
        found["region"] = region_of(level) or self._plain(self.case.value("region"))
        return found

    def _plain(self, value: Any) -> Any:
        """The value, unless it is a text that identifies somebody."""
        return None if isinstance(value, str) and self.texts.found_in(value) else value

    def _geometry(self, cut: Slice, image: Slice) -> dict[str, Any]:
        """Where the written image lies in the volume, and how it comes from a stored frame."""
        affine = image.affine.copy()
        affine[:3, 3] -= self.origin
        found: dict[str, Any] = {
            "spacing_mm": _rounded(image.spacing),
            "native_spacing_mm": _rounded(cut.spacing),
            "plane": image.plane,
            "slice": image.index,
            "acquired": image.acquired,
            "affine": (np.round(affine, MICRO) + 0.0).tolist(),
        }
        if image.acquired and image.frame is not None:
            found |= {"turn": list(image.turn), "instance": self._instance(image.frame)}
        return found

    def _instance(self, frame: int) -> str | None:
        """The digest of a stored frame, which is kept for the way back; None for what is no DICOM."""
        source = self.volume.source
        if not source.get("sop_uids"):
            return None
        uid, number = source["sop_uids"][frame], source["frames"][frame]
        digest = self.pseudonyms.digest("instance", uid if number is None else f"{uid}#{number}")
        self.instances[digest] = {"sop_uid": uid, "path": os.path.abspath(source["paths"][frame]), "frame": number}
        return digest


def _rounded(spacing: Sequence[float] | None) -> list[float] | None:
    return None if spacing is None else [round(float(length), MICRO) for length in spacing]
