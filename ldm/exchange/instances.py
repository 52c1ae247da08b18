"""Synthetic DICOM images: the stored frame that a result was inpainted into, changed inside the soft mask alone.

A stored value stands for a real one (HU) by the modality LUT, which is inverted here for the pixels that changed; all
others are the source's, and so are slope, intercept and geometry. A slice that is no stored frame (a sagittal reformat)
becomes an image with a geometry of its own. Its lesion and soft mask are DICOM segmentations beside it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless
from pydicom.valuerep import DSfloat

from ldm.core.errors import FileError, MedSoftError, reading_fault
from ldm.core.paths import software_version
from ldm.exchange.headers import (
    MAKER,
    NOT_CLINICAL,
    keywords,
    mark_synthetic,
    of_the_study,
    sop_class,
    sop_instance,
    technical,
)

_NAMED = keywords(  # in every image, if only without a value
    """PatientID PatientName PatientBirthDate PatientSex ReferringPhysicianName AccessionNumber StudyID StudyDate
    StudyTime"""
)
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)  # a JPEG 2000 file says it itself
_OF_FRAMES = keywords(
    """PatientOrientation SliceLocation SpacingBetweenSlices GantryDetectorTilt ImagerPixelSpacing
    NominalScannedPixelSpacing TablePosition ReconstructionDiameter"""
)


@dataclass(frozen=True, eq=False)
class Frame:
    """One stored frame of a DICOM file: its header and its stored values, (rows, columns) integers."""

    dataset: Dataset
    values: np.ndarray
    number: int | None = None  # in its file, from 1; None for a file of one image

    @cached_property
    def levels(self) -> np.ndarray:
        """Every value that a pixel can store, ascending."""
        bits, signed = int(self.dataset.BitsStored), bool(self.dataset.PixelRepresentation)
        lowest = -(2 ** (bits - 1)) if signed else 0
        return np.arange(lowest, lowest + 2**bits)

    @cached_property
    def meanings(self) -> np.ndarray:
        """The real value (float64) of each of ``levels``, by the modality LUT."""
        transformation = functional(self.dataset, self.number, "PixelValueTransformationSequence")
        return np.asarray(apply_modality_lut(self.levels, transformation or self.dataset), np.float64)

    @cached_property
    def padding(self) -> np.ndarray:
        """For each of ``levels``, whether it marks pixels that no tissue was measured in."""
        ends = [self.dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
        given = [int(end) for end in ends if end not in (None, "")]
        if not given:
            return np.zeros(len(self.levels), bool)
        wrapped = [end - len(self.levels) if end > self.levels[-1] else end for end in given]
        return (self.levels >= min(wrapped)) & (self.levels <= max(wrapped))

    @property
    def real(self) -> np.ndarray:
        """The real values of the frame, float64 (rows, columns)."""
        return self.meanings[self.values - self.levels[0]]

    @property
    def padded(self) -> np.ndarray:
        """Where the frame holds padding, bool (rows, columns)."""
        return self.padding[self.values - self.levels[0]]

    def stored(self, real: np.ndarray, padding: bool = False) -> np.ndarray:
        """The stored values that stand for the real values nearest to ``real``.

        None of them means padding, unless ``padding`` allows that.
        """
        usable = ~self.padding | padding
        order = np.argsort(self.meanings[usable], kind="stable")
        levels, meanings = self.levels[usable][order], self.meanings[usable][order]
        after = np.clip(np.searchsorted(meanings, real), 1, len(meanings) - 1)
        nearer_before = real - meanings[after - 1] <= meanings[after] - real
        return levels[np.where(nearer_before, after - 1, after)]


def functional(dataset: Dataset, number: int | None, name: str) -> Dataset | None:
    """The item of a multi-frame file's functional group for one of its frames; None without one."""
    if number is None:
        return None
    frames, shared = (dataset.get(f"{each}FunctionalGroupsSequence") or [] for each in ("PerFrame", "Shared"))
    for group in (*frames[number - 1 : number], *shared[:1]):
        if group.get(name):
            return group[name].value[0]
    return None


def read_frame(path: Path, number: int | None = None) -> Frame:
    """Read one frame of a DICOM file; FileError for a file that is missing, cannot be decoded, or is no grey image."""
    try:
        dataset = pydicom.dcmread(path)
        values = np.asarray(pixel_array(dataset, index=None if number is None else number - 1))
    except FileNotFoundError as error:
        raise FileError(path, "does not exist any more; put it back, or import the series again") from error
    except Exception as error:  # decoders raise many kinds of error
        raise FileError(path, reading_fault(error, "its pixels cannot be read")) from error
    if values.ndim != 2 or values.dtype.kind not in "iu" or int(dataset.BitsStored) > 16:
        found = f"{values.dtype} values of shape {values.shape}"
        raise FileError(path, f"expected one grey frame of integers of at most 16 bits, found {found}")
    if dataset.get("BurnedInAnnotation") == "YES":
        raise FileError(path, "has burned-in annotation, which may name the patient; it is not exported")
    size = 2 ** int(dataset.BitsStored)
    values = values.astype(np.int64) & (size - 1)  # what lies above the stored bits is an overlay's
    if dataset.PixelRepresentation:
        values = np.where(values >= size // 2, values - size, values)
    return Frame(dataset, values, number)


@dataclass(frozen=True)
class Identity:
    """Whose a synthetic image is, and the identifiers of its own."""

    patient: str  # both name and number: SYN-...
    study: str
    series: str
    instance: str
    frame_of_reference: str
    series_number: int
    number: int  # of the instance in its series, from 1
    date: str  # YYYYMMDD and HHMMSS: when the export began
    time: str
    description: str
    same_study: bool = False  # patient, study and frame of reference are the source's
    sources: tuple[tuple[str, str], ...] = field(default=())  # (SOP class, SOP instance) to refer to


def synthetic_image(frame: Frame, stored: np.ndarray, identity: Identity, derivation: str) -> Dataset:
    """A new image with the header's white list of ``frame`` and these stored values, on the same grid.

    ``stored``: integers (rows, columns). Uncompressed, explicit little endian; one frame of a multi-frame file.
    """
    source = frame.dataset
    image = technical(source)
    if frame.number is not None:
        _keep_one_frame(image, source, frame.number, identity)
    kind = f"{'i' if source.PixelRepresentation else 'u'}{int(source.BitsAllocated) // 8}"
    image.Rows, image.Columns = stored.shape
    image.PixelData = np.ascontiguousarray(stored, f"<{kind}").tobytes()
    if len(image.PixelData) % 2:
        image.PixelData += b"\0"
    if source.file_meta.TransferSyntaxUID in _LOSSY:
        image.LossyImageCompression = "01"  # once lossy, always
    if source.get("BurnedInAnnotation"):
        image.BurnedInAnnotation = source.BurnedInAnnotation
    _identify(image, source, identity)
    if identity.sources:
        image.SourceImageSequence = [_reference(*each) for each in identity.sources]
    mark_synthetic(image, derivation)
    return image


def place(image: Dataset, affine: np.ndarray) -> None:
    """Give the image the geometry of ``affine`` (row, column, 0, 1 -> LPS in mm) instead of its source's."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / steps
    measures, orientation, position = (Dataset() for _ in range(3))
    measures.PixelSpacing = _decimals(steps[:2])
    measures.SliceThickness = _decimals(steps[2:])[0]
    orientation.ImageOrientationPatient = _decimals([*directions[:, 1], *directions[:, 0]])
    position.ImagePositionPatient = _decimals(affine[:3, 3])
    for keyword in _OF_FRAMES:
        if keyword in image:
            del image[keyword]
    frames = image.get("PerFrameFunctionalGroupsSequence")
    if frames:
        shared = image.SharedFunctionalGroupsSequence[0]
        for name, item, group in (
            ("PixelMeasuresSequence", measures, shared),
            ("PlaneOrientationSequence", orientation, shared),
            ("PlanePositionSequence", position, frames[0]),
        ):
            for each in (shared, frames[0]):
                each.pop(name, None)
            setattr(group, name, [item])
    else:
        for item in (measures, orientation, position):
            image.update(item)
        image.DerivationCodeSequence = [CodedConcept.from_code(codes.DCM.MultiplanarReformatting)]
        image.ImageType = list(image.ImageType)[:3]  # what else it says is of the acquired frames


def write_instance(path: Path, instance: Dataset) -> None:
    """Write a DICOM file, uncompressed, explicit little endian. Any OSError is the caller's."""
    instance.file_meta = FileMetaDataset()
    instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    instance.file_meta.MediaStorageSOPClassUID = instance.SOPClassUID
    instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
    instance.save_as(path, enforce_file_format=True)


def check_source(frame: Frame, path: Path, sop_uid: str) -> None:
    """FileError unless the file still holds the image that was imported."""
    found = sop_instance(frame.dataset)
    if found != sop_uid:
        raise FileError(path, "is another image than the one that was imported from there; put that one back")


def _identify(image: Dataset, source: Dataset, identity: Identity) -> None:
    if identity.same_study:
        image.update(of_the_study(source))
    else:
        image.PatientID, image.PatientName = identity.patient, f"{identity.patient}^Synthetic"
        image.PatientIdentityRemoved = "YES"
        image.DeidentificationMethod = f"synthetic patient; white list of the header; {MAKER}"
        image.StudyInstanceUID = identity.study
        image.StudyDate, image.StudyTime = identity.date, identity.time
        image.StudyID = "SYN"
        image.StudyDescription = "Synthetic lesions, not for clinical use"
    has_place = "ImagePositionPatient" in image or "PerFrameFunctionalGroupsSequence" in image
    if "FrameOfReferenceUID" not in image and (has_place or source.get("FrameOfReferenceUID")):
        image.FrameOfReferenceUID = identity.frame_of_reference
    for keyword in _NAMED:
        if keyword not in image:
            setattr(image, keyword, None)
    image.SOPInstanceUID, image.SeriesInstanceUID = identity.instance, identity.series
    image.SeriesNumber, image.InstanceNumber = identity.series_number, identity.number
    image.SeriesDate = image.ContentDate = identity.date
    image.SeriesTime = image.ContentTime = identity.time
    image.SeriesDescription = identity.description[:64]
    image.ImageComments = NOT_CLINICAL


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(purpose)]
    return item


def reference_to(dataset: Dataset) -> tuple[str, str]:
    """(SOP class, SOP instance) of an image."""
    return sop_class(dataset), sop_instance(dataset)


def _keep_one_frame(image: Dataset, source: Dataset, number: int, identity: Identity) -> None:
    """Make a multi-frame header that of one of its frames."""
    image.NumberOfFrames = 1
    frames = image.get("PerFrameFunctionalGroupsSequence")
    if frames is None:
        return
    if len(frames) != len(source.PerFrameFunctionalGroupsSequence):
        raise MedSoftError("its frames have functional groups of which nothing may be kept")
    image.PerFrameFunctionalGroupsSequence = [frames[number - 1]]
    for group in (*image.get("SharedFunctionalGroupsSequence", []), frames[number - 1]):
        for content in group.get("FrameContentSequence", []):
            content.StackID = "1"
    if source.get("DimensionIndexSequence"):
        organization = f"{identity.series}.1"
        made = Dataset()
        made.DimensionOrganizationUID = organization
        image.DimensionOrganizationSequence = [made]
        pointers = ("DimensionIndexPointer", "FunctionalGroupPointer")
        image.DimensionIndexSequence = [_index(item, pointers, organization) for item in source.DimensionIndexSequence]


def _index(item: Dataset, pointers: Sequence[str], organization: str) -> Dataset:
    kept = Dataset()
    for keyword in pointers:
        if keyword in item:
            kept.add(item[keyword])
    kept.DimensionOrganizationUID = organization
    return kept


def _decimals(numbers: Any) -> list[DSfloat]:
    return [DSfloat(float(number), auto_format=True) for number in numbers]


@dataclass(frozen=True)
class SegmentIdentity:
    """The identifiers of a segmentation and its place in the study."""

    series: str
    instance: str
    series_number: int
    number: int  # of the instance in its series, from 1


def lesion_segmentation(
    image: Dataset, lesion: np.ndarray, prompt: str, level: str | None, identity: SegmentIdentity
) -> Dataset:
    """A binary segmentation of the lesion, bool (rows, columns) on the grid of ``image``; the prompt describes it."""
    vertebra = getattr(codes.SCT, f"{level}Vertebra", codes.SCT.Vertebra)
    segment = _segment("lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, [vertebra])
    segment.SegmentDescription = prompt
    pixels = lesion[None].astype(np.uint8)
    return _segmentation(image, pixels, "BINARY", segment, "LESION", "synthetic lesion", identity)


def soft_mask_segmentation(image: Dataset, soft: np.ndarray, identity: SegmentIdentity) -> Dataset:
    """A fractional segmentation (k of 255) of the soft mask, float in [0, 1]: the share of a pixel that was made."""
    segment = _segment("inpainted region", codes.SCT.SpatialAndRelationalConcept, codes.DCM.SelectedRegion)
    pixels = soft[None].astype(np.float64)
    return _segmentation(image, pixels, "FRACTIONAL", segment, "SOFT_MASK", "soft mask of the lesion", identity)


def _segment(label: str, category: Code, kind: Code, regions: Sequence[Code] | None = None) -> SegmentDescription:
    algorithm = AlgorithmIdentificationSequence(MAKER, codes.DCM.ArtificialIntelligence, software_version())
    return SegmentDescription(1, label, category, kind, "AUTOMATIC", algorithm, anatomic_regions=regions)


def _segmentation(
    image: Dataset,
    pixels: np.ndarray,
    kind: str,
    segment: SegmentDescription,
    label: str,
    description: str,
    identity: SegmentIdentity,
) -> Dataset:
    source = copy.copy(image)
    source.pop("SpacingBetweenSlices", None)  # one slice has none, and some headers contradict their positions
    made = Segmentation(
        [source],
        pixels,
        kind,
        [segment],
        identity.series,
        identity.series_number,
        identity.instance,
        identity.number,
        MAKER,
        MAKER,
        software_version(),
        software_version(),
        fractional_type="OCCUPANCY",
        content_label=label,
        content_description=description,
        omit_empty_frames=False,
    )
    made.SeriesDescription = description
    for keyword in ("SeriesDate", "ContentDate", "SeriesTime", "ContentTime", "PatientIdentityRemoved"):
        if keyword in image:
            made.add(copy.deepcopy(image[keyword]))
    for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        item.DimensionOrganizationUID = f"{identity.series}.1"  # not a random one: equal files on every run
    made.InstanceCreationDate, made.InstanceCreationTime = image.ContentDate, image.ContentTime
    mark_synthetic(made, f"{description[0].upper()}{description[1:]}, made by {MAKER}")
    return made
