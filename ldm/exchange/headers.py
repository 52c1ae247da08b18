"""What of a DICOM header a synthetic image keeps: a white list, and what the standard wants said of such an image.

Kept are numbers and code strings of the acquisition, the geometry and the pixels (groups 0018, 0020, 0028, ...), a few
texts by name (manufacturer, model, kernel, ...) and the functional groups of multi-frame files, cleaned in the same
way. All else goes: every other text, date, time, name and identifier, private elements, overlays, curves, icons,
signatures and references to other images.
"""

from collections.abc import Iterator

import pydicom
from highdicom import ContributingEquipment
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ldm.core.paths import software_version
from ldm.volumes.dicom_files import readable

MAKER = "MedSoft-Diffusion"
NOT_CLINICAL = "Synthetic image, made by software; it shows no patient as they are; not for clinical use"
_NUMBERS = ("CS", "DS", "IS", "FD", "FL", "US", "SS", "UL", "SL", "UV", "SV", "AT")
_GROUPS = (0x0008, 0x0018, 0x0020, 0x0028, 0x0054, 0x2050, 0x5200)
_CODES = ("CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning")
_PUBLIC_SCHEMES = ("DCM", "SCT", "SRT", "UCUM", "FMA", "RADLEX")
_SEQUENCES_OF_0008 = ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence")


def keywords(text: str) -> tuple[str, ...]:
    """The keywords of DICOM attributes that a text lists."""
    return tuple(text.split())


_TEXTS = keywords(
    "Manufacturer ManufacturerModelName ConvolutionKernel FilterType SequenceName RescaleType ModalityLUTType LUTData"
)
_DROPPED = keywords(
    """SpecificCharacterSet QueryRetrieveLevel InstanceAvailability SmallestImagePixelValue LargestImagePixelValue
    SmallestPixelValueInSeries LargestPixelValueInSeries SmallestImagePixelValueInPlane LargestImagePixelValueInPlane
    SeriesNumber AcquisitionNumber InstanceNumber OtherStudyNumbers NumberOfFrames SyntheticData BurnedInAnnotation
    ImagesInAcquisition NumberOfStudyRelatedInstances NumberOfSeriesRelatedInstances NumberOfStudyRelatedSeries
    SeriesInStudy NumberOfPatientRelatedStudies NumberOfPatientRelatedInstances NumberOfPatientRelatedSeries
    DimensionOrganizationSequence DimensionIndexSequence"""
)
# Attributes that many kinds of image must have, if only without a value.
_EMPTY_WHERE_KNOWN = keywords(
    """PatientBirthDate PatientSex ReferringPhysicianName AccessionNumber PositionReferenceIndicator AcquisitionNumber
    ContrastBolusAgent PatientOrientation AcquisitionContextSequence Manufacturer KVP"""
)
_OF_THE_STUDY = keywords(
    """StudyInstanceUID StudyDate StudyTime StudyID StudyDescription AccessionNumber ReferringPhysicianName
    FrameOfReferenceUID PositionReferenceIndicator"""
)


def technical(source: Dataset) -> Dataset:
    """The white list of a header (a new data set): no UID but the SOP class, and no pixel data."""
    kept = _cleaned(source)
    kept.SOPClassUID = sop_class(source)
    kept.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _EMPTY_WHERE_KNOWN:
        if keyword in source and keyword not in kept:
            setattr(kept, keyword, [] if keyword.endswith("Sequence") else None)
    return kept


def sop_class(source: Dataset) -> str:
    """The kind of image: the data set's own SOP class, or that of the file, where the data set leaves it empty."""
    return str(source.get("SOPClassUID") or source.file_meta.get("MediaStorageSOPClassUID", ""))


def sop_instance(source: Dataset) -> str:
    """The image's identifier: the data set's own, or that of the file, where the data set leaves it empty."""
    return str(source.get("SOPInstanceUID") or source.file_meta.get("MediaStorageSOPInstanceUID", ""))


def of_the_study(source: Dataset) -> Dataset:
    """Who the patient is and which study this is, as in the source: for ``--same_study`` alone."""
    kept = Dataset()
    for element in readable(source):
        if (element.tag.group == 0x0010 and not element.tag.is_private) or element.keyword in _OF_THE_STUDY:
            kept.add(element)
    return kept


def _cleaned(source: Dataset) -> Dataset:
    kept = Dataset()
    for element in _candidates(source):
        if element.VR == "SQ":
            items = [_cleaned(item) for item in element.value]
            codes_only = [item for item in element.value if "CodeValue" in item]
            if codes_only:
                items = [_code(item) for item in codes_only if item.get("CodingSchemeDesignator") in _PUBLIC_SCHEMES]
            if any(items) or element.tag.group == 0x5200 or element.keyword.startswith("Unassigned"):
                kept.add_new(element.tag, "SQ", items)
        else:
            kept.add(element)
    return kept


def _candidates(source: Dataset) -> Iterator[pydicom.DataElement]:
    """The elements of a data set that the white list names, sequences among them."""
    for element in readable(source):
        group, keyword = element.tag.group, element.keyword
        if element.tag.is_private or group not in _GROUPS or keyword in _DROPPED or "Overlay" in keyword:
            continue
        if element.VR == "SQ":
            if group != 0x0008 or keyword in _SEQUENCES_OF_0008:
                yield element
        elif element.VR in _NUMBERS or keyword in _TEXTS:
            yield element


def _code(item: Dataset) -> Dataset:
    kept = Dataset()
    for keyword in _CODES:
        if keyword in item:
            kept.add(item[keyword])
    return kept


def mark_synthetic(instance: Dataset, derivation: str) -> None:
    """Say in an image's or a segmentation's header that software made what it shows, and how.

    Multi-frame images with functional groups say the how as a comment of the frame, and their Image Type knows no
    SECONDARY (PS3.3 C.8.16.1.2).
    """
    instance.SyntheticData = "YES"
    instance.ContributingEquipmentSequence = [equipment()]
    if "ContentQualification" in instance:
        instance.ContentQualification = "RESEARCH"
    frames = None if "SegmentationType" in instance else instance.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        instance.DerivationDescription = derivation[:1024]
    if "SegmentationType" in instance:
        return
    values = instance.get("ImageType") or ()
    rest = [] if isinstance(values, str) else list(values)[2:]
    instance.ImageType = ["DERIVED", "PRIMARY" if frames else "SECONDARY", *rest]
    if not frames:
        return
    if not frames[0].get("FrameContentSequence"):
        frames[0].FrameContentSequence = [Dataset()]
    frames[0].FrameContentSequence[0].FrameComments = derivation
    for group in (*instance.get("SharedFunctionalGroupsSequence", []), *frames):
        for element in group:
            if element.keyword.endswith("FrameTypeSequence") and "FrameType" in element.value[0]:
                element.value[0].FrameType = instance.ImageType


def equipment() -> ContributingEquipment:
    """This software as the equipment that synthesized an image: (109100, DCM)."""
    return ContributingEquipment(
        manufacturer=MAKER,
        purpose_of_reference=codes.DCM.SynthesizingEquipment,
        manufacturer_model_name=MAKER,
        software_versions=software_version(),
        contribution_description="A lesion was inpainted by a diffusion model",
    )
