"""Labels and lesions read from files onto the grid of an image: label maps, folders of masks, DICOM SEG, RTSTRUCT.

A label map (NIfTI, NRRD, MHA, a DICOM series of labels) holds numbers, which a scheme gives their meaning. The segments
of a DICOM SEG or of Slicer (``.seg.nrrd``), the structures of an RTSTRUCT and the files of a folder
(``vertebrae_L3.nii.gz``) have names, which a scheme may translate; else they mean what they say, and those that are no
part of the spine are left out and counted.
Everything is brought onto the image's grid by nearest neighbour, which is said where the voxels do not coincide.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import cv2
import highdicom
import nrrd
import numpy as np
import pydicom

from ldm.core.errors import FileError, MedSoftError, reading_fault
from ldm.core.tables import counted
from ldm.data.samples import shown
from ldm.volumes.dicom_files import told
from ldm.volumes.formats import read_volume
from ldm.volumes.labels import (
    LEVELS,
    PRESETS,
    VERTEBRAE,
    Labels,
    Lesion,
    Scheme,
    names_lesion,
    structure_named,
    structures_of,
)
from ldm.volumes.vertebrae import check_order, separated
from ldm.volumes.volume import Volume, onto

SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # binary or fractional; label map
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
MOST_LESIONS = 32  # values of a lesion file: more are no numbers of lesions
RESAMPLED = "brought onto the image's grid by nearest neighbour: the two grids differ"
_ALTERED = ("49755003", "M-01000")  # SCT and SRT: morphologically altered structure


@dataclass(frozen=True)
class _Segment:
    """One named part of a file; ``load`` gives its mask on the grid, and whether it was resampled."""

    number: int
    name: str
    description: str | None
    lesion: bool  # named as one
    coded: bool  # coded as one
    load: Callable[[], tuple[np.ndarray, bool]]
    notes: tuple[str, ...] = ()


def read_labels(path: Path, grid: Volume, scheme: Scheme | None = None) -> Labels:
    """The structures of the spine in a file or folder, on the grid of an image.

    MedSoftError for numbers that the scheme does not know, no vertebra, levels in an order that no spine has, one label
    for several vertebrae that touch, another patient's grid, another series' segmentation. One label for all vertebrae
    (``vertebra``) becomes one number for each of its parts.
    """
    path = Path(path)
    segments = _segments(path, grid)
    notes: tuple[str, ...] = ()
    if segments is None:
        values, resampled = _label_map(path, grid)
        structures = structures_of(_counts(values), scheme, str(path))
    else:
        values, structures, resampled, notes = _combined(path, segments, grid, scheme)
    structures = {number: name for number, name in structures.items() if name != "ignore"}
    # A body and an arch that are labelled apart are one vertebra: the first of its numbers.
    first = {name: number for number, name in reversed(structures.items()) if name in LEVELS}
    highest = max(int(values.max()), 1)
    renumbered = np.zeros(highest + 1, np.uint8 if highest < 256 else np.int32)
    for number, name in structures.items():
        renumbered[number] = first.get(name, number)
    values = renumbered[values]
    structures = {number: name for number, name in structures.items() if renumbered[number] == number}
    notes = (*notes, *(f"labels {RESAMPLED}" for _ in range(resampled)))
    values, structures = separated(values, structures, grid)
    notes += check_order(path, values, structures, grid)
    ill = tuple(each.name for each in segments or () if each.lesion and each.load()[0].any())
    return Labels(values, structures, notes, ill)


def read_lesions(path: Path, grid: Volume) -> list[Lesion]:
    """The lesions in a file or folder, on the grid of an image; none if no voxel is marked.

    Of a label map each number is one; of segments those that are named or coded as a lesion, else the only one that is
    no part of the spine. MedSoftError if there is none of these, for probabilities, for a mask of more than half of the
    image, and as ``read_labels`` for the grid.
    """
    path = Path(path)
    segments = _segments(path, grid)
    if segments is None:
        values, resampled = _label_map(path, grid)
        notes = (f"lesion {RESAMPLED}",) * resampled
        counts = _counts(values)
        numbers = [number for number, count in counts.items() if number and count]
        _check_share(path, values.size - counts.get(0, 0), grid)
        if len(numbers) > MOST_LESIONS:
            raise FileError(
                path, f"has {len(numbers)} different values; expected a lesion mask: 0, and one number a lesion"
            )
        return [Lesion(values == n, f"lesion {n}" if len(numbers) > 1 else "lesion", notes=notes) for n in numbers]
    chosen = [each for each in segments if each.lesion or each.coded]
    others = [each for each in segments if structure_named(each.name) is None]
    if not chosen and len(others) != 1:
        names = ", ".join(shown(each.name) for each in segments[:8]) + (", ..." if len(segments) > 8 else "")
        raise FileError(path, f"has no segment that is named or coded as a lesion: {names}; name one of them so")
    chosen = chosen or others
    lesions = []
    for segment in chosen:
        mask, resampled = segment.load()
        _check_share(path, int(np.count_nonzero(mask)), grid)
        if mask.any():
            notes = (*segment.notes, *(f"lesion {RESAMPLED}" for _ in range(resampled)))
            lesions.append(Lesion(mask, segment.name, segment.description, notes=notes))
    return lesions


def _check_share(path: Path, marked: int, grid: Volume) -> None:
    if 2 * marked > grid.values.size:
        raise FileError(path, f"marks {marked / grid.values.size:.0%} of {grid.name} as a lesion; is it inverted?")


def references(path: Path) -> set[str]:
    """The SeriesInstanceUIDs of the images that a SEG or RTSTRUCT refers to; none for other files."""
    dataset = _dataset(path)
    return _referenced(dataset)[0] if dataset is not None else set()


def _segments(path: Path, grid: Volume) -> list[_Segment] | None:
    """The named parts of a SEG, an RTSTRUCT, a file of Slicer's or a folder of masks; None for a label map."""
    if path.is_dir():
        masks = {file: _stem(file) for file in sorted(path.iterdir()) if file.name.lower().endswith(SUFFIXES)}
        if masks:
            return [_mask_file(number, *item, grid) for number, item in enumerate(masks.items(), 1)]
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _dataset(file) is not None]
        if len(inside) > 1:
            raise MedSoftError(f"{path}: holds {len(inside)} DICOM segmentations; expected one: name the file")
        if not inside:
            return None
        path = inside[0]
    if path.name.lower().endswith(".nrrd"):
        return _slicer_segments(path, grid)
    dataset = _dataset(path)
    if dataset is None:
        return None
    _same_image(path, dataset, grid)
    return (_structure_set if dataset.SOPClassUID == RTSTRUCT else _segmentation)(path, dataset, grid)


def _dataset(path: Path) -> pydicom.Dataset | None:
    """The header of a DICOM SEG or RTSTRUCT; None for anything else."""
    try:
        with told(path, "its header is damaged"):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
    except FileError:
        return None
    return dataset if dataset.get("SOPClassUID") in (*SEG, RTSTRUCT) else None


def _referenced(dataset: pydicom.Dataset) -> tuple[set[str], set[str]]:
    """The series and the frames of reference that a SEG or RTSTRUCT refers to."""
    series = {str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence", [])}
    frames = {str(dataset.FrameOfReferenceUID)} if dataset.get("FrameOfReferenceUID") else set()
    for frame in dataset.get("ReferencedFrameOfReferenceSequence", []):
        frames.add(str(frame.get("FrameOfReferenceUID", "")))
        for study in frame.get("RTReferencedStudySequence", []):
            series |= {str(item.SeriesInstanceUID) for item in study.get("RTReferencedSeriesSequence", [])}
    return series, frames - {""}


def _same_image(path: Path, dataset: pydicom.Dataset, grid: Volume) -> None:
    """MedSoftError unless the segmentation was made on this image, as far as both say."""
    wanted = (grid.source.get("series_uid"), grid.source.get("frame_of_reference"))
    for what, found, own in zip(("series", "frame of reference"), _referenced(dataset), wanted, strict=True):
        if own and found and str(own) not in found:
            raise MedSoftError(
                f"{path}: was made on another {what} ({min(found)}) than {grid.name} ({own}); give the segmentation of "
                "this image, or convert it to a NIfTI label map where you know that the two agree"
            )


def _label_map(path: Path, grid: Volume) -> tuple[np.ndarray, bool]:
    labels = read_volume(path)
    if labels.rounded or labels.scale != 1 or labels.offset != int(labels.offset):
        raise FileError(path, "holds fractions (probabilities, an image?); expected a label map of whole numbers")
    values, resampled = onto(labels, grid)
    values = values if not labels.offset else np.where(values == 0, 0, values + int(labels.offset))
    if values.min() < 0:
        raise FileError(path, f"holds the number {values.min()}; expected labels of 0 and above (is it an image?)")
    if not values.any() and labels.values.any():
        raise FileError(path, f"none of its labels lies in {grid.name}; is it of another patient or series?")
    return values, resampled


def _counts(values: np.ndarray) -> dict[int, int]:
    """Voxels of each number, slab by slab: counting them at once takes eight times the memory of the labels."""
    total = np.zeros(int(values.max()) + 1, np.int64)
    for slab in values:
        total += np.bincount(slab.ravel(), minlength=len(total))
    return {int(number): int(total[number]) for number in np.flatnonzero(total)}


def _combined(
    path: Path, segments: Sequence[_Segment], grid: Volume, scheme: Scheme | None
) -> tuple[np.ndarray, dict[int, str], bool, tuple[str, ...]]:
    """The segments that are parts of the spine as one label map; of two in a voxel the first counts, which is said."""
    names = {each: _meaning(each, scheme) for each in segments if not each.lesion}
    wanted = {each: name for each, name in names.items() if name not in (None, "ignore")}
    if not {*VERTEBRAE}.intersection(wanted.values()):
        listed = ", ".join(shown(each.name) for each in segments[:8]) + (", ..." if len(segments) > 8 else "")
        raise MedSoftError(
            f"{path}: no segment is named as a vertebra ({listed}); give --map with their names, such as "
            '{"Segment_1": "L5"}'
        )
    values = np.zeros(grid.values.shape, np.uint8 if len(wanted) < 256 else np.uint16)
    structures: dict[int, str] = {}
    resampled = shared = 0
    notes: set[str] = set()
    for number, (segment, name) in enumerate(wanted.items(), 1):
        mask, moved = segment.load()
        same = next((n for n, known in structures.items() if known == name and name != "vertebra"), number)
        shared += int(np.count_nonzero(values[mask]))
        values[mask & (values == 0)] = same
        structures[same] = name
        resampled += moved
        notes |= {*segment.notes}
    if not values.any():
        raise MedSoftError(f"{path}: none of its labels lies in {grid.name}; is it of another patient or series?")
    if shared:
        notes.add(f"{counted(shared, 'voxel belongs', 'voxels belong')} to two segments; the first one counts")
    if unnamed := len(segments) - len(wanted):
        notes.add(f"{counted(unnamed, 'segment is', 'segments are')} no part of the spine and left out")
    present = np.unique(values)
    return values, {n: name for n, name in structures.items() if n in present}, resampled > 0, tuple(sorted(notes))


def _meaning(segment: _Segment, scheme: Scheme | None) -> str | None:
    """The structure of a segment: as a map file calls its name or number, as its name says, as a preset numbers it."""
    if scheme is None:
        return structure_named(segment.name)
    by_name, by_number = scheme.segments.get(segment.name.casefold()), scheme.numbers.get(segment.number)
    if scheme is PRESETS.get(scheme.name):
        return structure_named(segment.name) or by_number
    return by_name or by_number or structure_named(segment.name)


def _stem(file: Path) -> str:
    return re.sub(r"\.(nii\.gz|nii|nrrd|mha|mhd)$", "", file.name, flags=re.IGNORECASE)


def _mask_file(number: int, file: Path, name: str, grid: Volume) -> _Segment:
    def load() -> tuple[np.ndarray, bool]:
        values, resampled = _label_map(file, grid)
        if len(_counts(values)) > 2:
            raise FileError(file, "holds several numbers; in a folder of masks expected one structure a file")
        return values > 0, resampled

    return _Segment(number, name, None, names_lesion(name), False, load)


def _slicer_segments(path: Path, grid: Volume) -> list[_Segment] | None:
    """The segments that Slicer names in the header of a NRRD file; None where there are none."""
    try:
        header = nrrd.read_header(str(path))
    except Exception:  # whatever is wrong with it, reading it as a label map says so
        return None
    labels = cache(partial(_label_map, path, grid))

    def load(number: int) -> tuple[np.ndarray, bool]:
        values, resampled = labels()
        return values == number, resampled

    segments = []
    for key in (f"Segment{n}" for n in range(len(header))):
        if f"{key}_LabelValue" in header:
            number, name = int(header[f"{key}_LabelValue"]), str(header.get(f"{key}_Name", ""))
            lesion = names_lesion(name)
            segments.append(_Segment(number, name, _sentence_of(None, name), lesion, False, partial(load, number)))
    return segments or None


def _segmentation(path: Path, dataset: pydicom.Dataset, grid: Volume) -> list[_Segment]:
    try:
        whole = pydicom.dcmread(path)
        segmentation = _opened(whole, grid)
    except Exception as error:  # highdicom and the decoders raise all kinds
        raise FileError(path, reading_fault(error, "is a DICOM segmentation that cannot be read")) from error
    fractional = whole.SegmentationType == "FRACTIONAL"
    notes = ("fractional segments are cut at 0.5",) if fractional else ()

    def load(number: int) -> tuple[np.ndarray, bool]:
        try:
            found = segmentation.get_volume(segment_numbers=[number], skip_overlap_checks=True)
        except Exception as error:  # as above
            raise FileError(path, reading_fault(error, "its frames cannot be read as a volume")) from error
        mask = Volume((found.array[..., 0] >= 0.5).astype(np.uint8), found.affine, name=str(path))
        values, resampled = onto(mask, grid)
        if mask.values.any() and not values.any():
            raise FileError(path, f"nothing of its segment {number} lies in {grid.name}; is it of another image?")
        return values > 0, resampled

    return [
        _Segment(
            int(item.SegmentNumber),
            str(item.get("SegmentLabel", "")),
            _sentence_of(item.get("SegmentDescription"), item.get("SegmentLabel")),
            names_lesion(str(item.get("SegmentLabel", ""))),
            _coded_as_lesion(item),
            partial(load, int(item.SegmentNumber)),
            notes,
        )
        for item in dataset.SegmentSequence
        if int(item.SegmentNumber) > 0  # 0 is the background of a label map
    ]


def _opened(whole: pydicom.Dataset, grid: Volume) -> highdicom.seg.Segmentation:
    """The segmentation with its frames placed by their positions alone: SpacingBetweenSlices may contradict them.

    A single plane has no distance to another: it gets that of the image.
    """
    for item in whole.get("SharedFunctionalGroupsSequence", []):
        for measures in item.get("PixelMeasuresSequence", []):
            measures.SpacingBetweenSlices = None
            positions = {
                tuple(frame.PlanePositionSequence[0].ImagePositionPatient)
                for frame in whole.get("PerFrameFunctionalGroupsSequence", [])
                if "PlanePositionSequence" in frame
            }
            del measures.SpacingBetweenSlices
            if len(positions) == 1:
                measures.SpacingBetweenSlices = grid.spacing[2]
    return highdicom.seg.Segmentation.from_dataset(whole, copy=False)


def _coded_as_lesion(item: pydicom.Dataset) -> bool:
    keys = ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence")
    codes = [code for key in keys for code in item.get(key, [])]
    return any(code.get("CodeValue") in _ALTERED or names_lesion(str(code.get("CodeMeaning", ""))) for code in codes)


def _sentence_of(description: str | None, label: str | None) -> str | None:
    """What a segment says in words: its description, else a label of at least three words that names a lesion."""
    if description and str(description).strip():
        return str(description).strip()
    label = str(label or "").strip()
    return label if len(label.split()) >= 3 and names_lesion(label) else None


def _structure_set(path: Path, dataset: pydicom.Dataset, grid: Volume) -> list[_Segment]:
    names = {int(item.ROINumber): item for item in dataset.get("StructureSetROISequence", [])}
    contours = {
        int(item.ReferencedROINumber): item.get("ContourSequence", []) for item in dataset.get("ROIContourSequence", [])
    }
    if not any(contours.values()):
        raise FileError(path, "is an RTSTRUCT without contours")
    segments = []
    for number, item in names.items():
        if drawn := contours.get(number):
            name = str(item.get("ROIName", ""))
            description = _sentence_of(item.get("ROIDescription"), name)
            load = partial(_filled, path, name, drawn, grid)
            segments.append(_Segment(number, name, description, names_lesion(name), False, load))
    return segments


def _filled(path: Path, name: str, contours: Sequence[pydicom.Dataset], grid: Volume) -> tuple[np.ndarray, bool]:
    """The voxels inside closed planar contours; a contour inside another one of its plane is a hole (exclusive or)."""
    inverse, moved = np.linalg.inv(grid.affine), 0.0
    rings = [
        np.array(contour.ContourData, float).reshape(-1, 3) @ inverse[:3, :3].T + inverse[:3, 3]
        for contour in contours
        if str(contour.get("ContourGeometricType", "")).startswith("CLOSED_PLANAR")
    ]
    axis = int(np.argmin(sum(np.ptp(ring, axis=0) for ring in rings))) if rings else 0
    planes: dict[float, list[np.ndarray]] = {}
    for ring in rings:
        if np.ptp(ring[:, axis]) > 0.5:
            raise FileError(path, f"a contour of {shown(name)} is oblique to the voxels of {grid.name}")
        planes.setdefault(round(float(ring[:, axis].mean()), 2), []).append(ring)
    steps = np.diff(sorted({round(position) for position in planes}))
    if len(steps) > 1 and steps.min() > 1:
        raise FileError(
            path,
            f"the contours of {shown(name)} lie on every {steps.min()}. slice of {grid.name} at most, with nothing "
            "marked between them; interpolate them first",
        )
    mask, inside = np.zeros(grid.values.shape, np.uint8), False
    for position, together in planes.items():
        index = round(position)
        if not 0 <= index < mask.shape[axis]:
            continue
        inside, moved = True, max(moved, abs(position - index))
        rows, columns = (each for each in range(3) if each != axis)
        filled = np.zeros((mask.shape[rows], mask.shape[columns]), np.uint8)
        for ring in together:
            corners = np.rint(ring[:, [columns, rows]] * 16).astype(np.int32)
            inner = np.zeros_like(filled)
            cv2.fillPoly(inner, [corners], 1, shift=4)
            filled ^= inner
        mask[(slice(None),) * axis + (index,)] |= filled
    if not inside:
        raise MedSoftError(
            f"{path}: no contour of {shown(name)} lies in {grid.name}; is it of another patient or series?"
        )
    return mask > 0, moved > 0.1
