"""What the header of a DICOM file says about its frames. Every fault is a FileError that names the file.

Sources: PS3.3 C.7.6.1 (image), C.7.6.2 (plane), C.7.6.16 (functional groups of multi-frame images), C.11.1 (modality
LUT), C.11.2 (window).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from ldm.core.errors import FileError, MedSoftError
from ldm.volumes.dicom_files import told, transfer_syntax
from ldm.volumes.intensity import linear_window

PROJECTIONS = ("CR", "DX", "MG", "RG", "RF", "XA", "IO", "PX")  # modalities whose images have no place in the patient
LETTERS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


@dataclass(frozen=True, eq=False)
class Frame:
    """One stored frame: where it is, and how its values become real ones."""

    path: Path
    index: int  # in its file, from 0
    number: int | None  # in its file, from 1; None in a file of one frame
    sop_uid: str
    syntax: UID
    shape: tuple[int, int]
    orientation: np.ndarray  # (2, 3) unit vectors in LPS: along a row, along a column
    position: np.ndarray  # (3,) LPS in mm, centre of the first pixel
    spacing: tuple[float, float]  # mm between rows, between columns
    calibrated: bool
    low_is_white: bool  # MONOCHROME1
    slope: Fraction
    intercept: Fraction
    rescaled: bool  # the header gives slope and intercept, or the lut
    lut: tuple[int, np.ndarray] | None  # the stored value of its first entry; integers
    dtype: np.dtype[Any]  # of the decoded values, after the lut
    windows: tuple[tuple[float, float], ...]


def sop_uids(dataset: Dataset) -> tuple[str, str]:
    """SOP class and instance; those of the file's meta information where the data set's are empty."""
    meta = getattr(dataset, "file_meta", None) or Dataset()
    return (
        str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
        str(dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
    )


def is_projection(dataset: Dataset) -> bool:
    """Whether it is one image without a place in the patient, as radiographs are."""
    return dataset.get("Modality") in PROJECTIONS and "ImageOrientationPatient" not in dataset


def frames_of(path: Path, dataset: Dataset) -> list[Frame]:
    """The frames of one file, from its header; refused where they are no grey images with a place in the patient."""
    with told(path, "its header is damaged"):
        _check(path, dataset)
        count = int(dataset.get("NumberOfFrames") or 1)
        multi = count > 1 or "PerFrameFunctionalGroupsSequence" in dataset
        return [_frame(path, dataset, index if multi else None) for index in range(count)]


def stored_values(frame: Frame, values: np.ndarray) -> np.ndarray:
    """What was decoded for a frame, after its modality LUT, before slope and intercept; refused if it is another."""
    if values.shape != frame.shape:
        raise FileError(frame.path, f"a frame has {values.shape} pixels, its header says {frame.shape}")
    values = values if frame.lut is None else _looked_up(values, *frame.lut)
    if not np.can_cast(values.dtype, frame.dtype):
        raise FileError(frame.path, f"its pixels are {values.dtype}, its header says {frame.dtype}")
    return values


def _check(path: Path, dataset: Dataset) -> None:
    """What no image may be, whatever its geometry."""
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise FileError(path, f"it has no pixels ({UID(sop_uids(dataset)[0] or '?').name}); expected an image")
    colours = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise FileError(path, f"a colour image ({colours}); expected grey values (MONOCHROME1 or MONOCHROME2)")
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise FileError(
            path,
            "BurnedInAnnotation is YES: text, perhaps a name, is part of its pixels; paint it over first",
        )


def _frame(path: Path, dataset: Dataset, index: int | None) -> Frame:
    """One frame; ``index`` None: the only one of a file without functional groups."""
    shape = int(dataset.Rows), int(dataset.Columns)
    if index is None and is_projection(dataset):
        orientation, position, spacing = _projected(path, dataset)
    else:
        orientation, position, spacing = _placed(path, dataset, index)
    rescale = _group(dataset, index, "PixelValueTransformationSequence")
    lut = None if not dataset.get("ModalityLUTSequence") else _lut(path, dataset.ModalityLUTSequence[0])
    slope = Fraction(1) if lut else _fraction(rescale.get("RescaleSlope"), 1)
    if not slope:
        raise FileError(path, "RescaleSlope is 0; expected another number")
    return Frame(
        path=path,
        index=index or 0,
        number=None if index is None else index + 1,
        sop_uid=sop_uids(dataset)[1],
        syntax=transfer_syntax(path, dataset),
        shape=shape,
        orientation=orientation,
        position=position,
        spacing=spacing or (1.0, 1.0),
        calibrated=spacing is not None,
        low_is_white=dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        slope=slope,
        intercept=Fraction(0) if lut else _fraction(rescale.get("RescaleIntercept"), 0),
        rescaled=lut is not None
        or all(rescale.get(name) not in (None, "") for name in ("RescaleSlope", "RescaleIntercept")),
        lut=lut,
        dtype=_dtype(dataset) if lut is None else lut[1].dtype,
        windows=_windows(path, _group(dataset, index, "FrameVOILUTSequence")),
    )


def _placed(path: Path, dataset: Dataset, index: int | None) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Orientation, position and spacing of a frame in the patient."""
    plane = _group(dataset, index, "PlaneOrientationSequence").get("ImageOrientationPatient")
    place = _group(dataset, index, "PlanePositionSequence").get("ImagePositionPatient")
    if not plane or not place:
        what = "a multi-frame image" if index is not None else f"an image of modality {dataset.get('Modality') or '?'}"
        raise FileError(
            path,
            f"{what} without geometry (no {'ImagePositionPatient' if plane else 'ImageOrientationPatient'}): "
            f"where its pixels lie in the patient is unknown; expected it, or one image of {', '.join(PROJECTIONS)}",
        )
    orientation = np.array(plane, float).reshape(2, 3)
    lengths = np.linalg.norm(orientation, axis=1)
    if not np.allclose(lengths, 1, atol=0.01) or abs(orientation[0] @ orientation[1]) > 0.01:
        found = list(map(float, plane))
        raise FileError(path, f"ImageOrientationPatient is {found}; expected two unit vectors at right angles")
    spacing = _spacing(path, _group(dataset, index, "PixelMeasuresSequence"), ("PixelSpacing",))
    if spacing is None:
        raise FileError(path, "it has no PixelSpacing; expected the distances between rows and columns in mm")
    return orientation / lengths[:, None], np.array(place, float), spacing


def _projected(path: Path, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, tuple[float, float] | None]:
    """A radiograph's directions from Patient Orientation, else left and feet (as stored); its spacing if known."""
    letters = [str(letter).strip()[:1].upper() for letter in dataset.get("PatientOrientation") or ()]
    vectors = [LETTERS[letter] for letter in letters if letter in LETTERS]
    orientation = np.array(vectors if len(vectors) == 2 else [LETTERS["L"], LETTERS["F"]], float)
    if orientation[0] @ orientation[1]:
        raise FileError(path, f"PatientOrientation is {letters}; expected two directions at right angles")
    return orientation, np.zeros(3), _spacing(path, dataset, ("PixelSpacing", "ImagerPixelSpacing"))


def _spacing(path: Path, dataset: Dataset, names: Sequence[str]) -> tuple[float, float] | None:
    """[between rows, between columns] in mm of the first element that stands there."""
    for name in names:
        if dataset.get(name):
            rows, columns = map(float, dataset[name].value)
            if not (0 < rows < np.inf and 0 < columns < np.inf):
                raise FileError(path, f"{name} is {rows:g}\\{columns:g}; expected two lengths above 0 mm")
            return rows, columns
    return None


def _group(dataset: Dataset, index: int | None, name: str) -> Dataset:
    """Where the elements of a functional group stand: the frame's own, the shared ones, or the data set itself."""
    if index is None:
        return dataset
    for sequence, item in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence) or ()
        if item < len(groups) and groups[item].get(name):
            return groups[item].get(name)[0]
    return Dataset()


def _fraction(value: Any, default: int) -> Fraction:
    """A decimal string exactly; ``default`` where there is none."""
    return Fraction(default) if value is None or value == "" else Fraction(str(value).strip())


def _dtype(dataset: Dataset) -> np.dtype[Any]:
    if "PixelRepresentation" not in dataset:  # which Float Pixel Data and Double Float Pixel Data do not have
        return np.dtype(np.float64)
    return np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{max(1, int(dataset.BitsAllocated) // 8)}")


def _lut(path: Path, item: Dataset) -> tuple[int, np.ndarray]:
    """First stored value and table of a modality LUT."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.array(data, np.uint16)
    if len(table) * 2 == (entries or 65536) and bits <= 8:  # two entries in a word
        table = table.view(np.uint8).astype(np.uint16)
    if len(table) < (entries or 65536):
        raise FileError(path, f"its modality LUT has {len(table)} entries; its descriptor says {entries or 65536}")
    return first, table[: entries or 65536]


def _looked_up(values: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    """Values outside of the table take its first or last entry (C.11.1.1)."""
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def _windows(path: Path, item: Dataset) -> tuple[tuple[float, float], ...]:
    """The linear windows, in real values; others (SIGMOID, widths below 1) are left out.

    FileError where a centre has no width, or a width no centre.
    """
    centers, widths = (item.get(name) for name in ("WindowCenter", "WindowWidth"))
    if centers in (None, "") or widths in (None, ""):
        return ()
    function = str(item.get("VOILUTFunction") or "LINEAR")
    centers, widths = np.atleast_1d(centers), np.atleast_1d(widths)
    if len(centers) != len(widths):
        counts = f"WindowCenter has {len(centers)} values, WindowWidth {len(widths)}"
        raise FileError(path, f"{counts}; expected as many of the one as of the other: correct or remove both")
    found = []
    for center, width in zip(centers, widths, strict=True):
        try:
            low, high = linear_window(float(center), float(width), function)
        except (MedSoftError, ValueError):
            continue
        if low < high:
            found.append((low, high))
    return tuple(found)
