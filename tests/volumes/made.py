"""Files that the tests of volumes make: DICOM series of any orientation, syntax and fault, label maps, SEG, RTSTRUCT.

Arrays are (I, J, K) with i over columns, j over rows, k over frames; affines lead to LPS in mm, as in ``ldm.volumes``.
"""

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import cv2
import gdcm
import highdicom
import nibabel
import numpy as np
import pydicom
from nibabel import orientations
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, generate_uid

SYNTAXES = {
    "implicit": pydicom.uid.ImplicitVRLittleEndian,
    "explicit": pydicom.uid.ExplicitVRLittleEndian,
    "big_endian": pydicom.uid.ExplicitVRBigEndian,
    "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
    "rle": pydicom.uid.RLELossless,
    "j2k": pydicom.uid.JPEG2000Lossless,
    "jpeg_ls": pydicom.uid.JPEGLSLossless,
    "jpeg_lossless": pydicom.uid.JPEGLosslessSV1,
}
SOP_CLASSES = {
    "CT": pydicom.uid.CTImageStorage,
    "MR": pydicom.uid.MRImageStorage,
    "DX": pydicom.uid.DigitalXRayImageStorageForPresentation,
    "CR": pydicom.uid.ComputedRadiographyImageStorage,
}
LETTERS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}
ORIENTATIONS = ["".join(each) for pairs in permutations(("RL", "AP", "FH")) for each in product(*pairs)]  # 48
AXIAL, SAGITTAL, CORONAL = "LPH", "PFR", "LFP"  # as scanners store them: the third is the normal of the first two


def grid(axes: str, shape: Sequence[int], spacing: Sequence[float], turn: float = 0.0) -> np.ndarray:
    """An affine around the origin whose axes run to these letters, turned by ``turn`` degrees about an oblique axis."""
    vector, _ = cv2.Rodrigues(np.deg2rad(turn) * np.array([1.0, 2.0, 0.5]) / np.linalg.norm([1.0, 2.0, 0.5]))
    affine = np.eye(4)
    affine[:3, :3] = vector @ np.array([LETTERS[letter] for letter in axes], float).T * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def turned(values: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same places, stored along other axes; by nibabel, whose letters are RAS."""
    start = orientations.io_orientation(np.diag([-1, -1, 1, 1]) @ affine)
    end = orientations.axcodes2ornt(axes.replace("H", "S").replace("F", "I"))
    change = orientations.ornt_transform(start, end)
    return (
        orientations.apply_orientation(values, change),
        affine @ orientations.inv_ornt_aff(change, values.shape),
    )


def marked(shape: Sequence[int] = (40, 36, 8), seed: int = 0) -> np.ndarray:
    """Twelve bits of noise, so that every turn and flip is another array. JPEG 2000 needs sides of 32 at least."""
    return np.random.default_rng(seed).integers(0, 4096, shape).astype(np.int16)


def write_series(
    folder: Path,
    values: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "CT",
    syntax: str = "explicit",
    change: Callable[[Dataset, int], Any] | None = None,
    **header: Any,
) -> list[Path]:
    """A series of one file a frame, with shuffled names; the paths in the frames' order.

    ``header`` sets elements of every file by keyword; ``change(dataset, frame)`` may do anything to one of them before
    it is encoded, and leaves a frame out by returning False. The patient and the texts are the ones of ``common``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(len(list(folder.iterdir()))).permutation(1000)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    everywhere = common(modality) | {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    paths = []
    for frame in range(values.shape[2]):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        for key, value in everywhere.items():
            setattr(dataset, key, value)
        dataset.SOPInstanceUID = generate_uid()
        dataset.InstanceNumber = int(names[frame])
        dataset.ImagePositionPatient = [_decimal(x) for x in affine[:3, 3] + frame * affine[:3, 2]]
        dataset.ImageOrientationPatient = [_decimal(x) for x in (affine[:3, :2] / spacing[:2]).T.ravel()]
        dataset.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        dataset.SliceThickness = _decimal(spacing[2])
        set_pixels(dataset, values[:, :, frame].T)
        for key, value in header.items():
            setattr(dataset, key, value)
        if change is not None and change(dataset, frame) is False:
            continue
        paths.append(folder / f"IM{names[frame]:04d}.dcm")
        save(dataset, paths[-1], syntax)
    return paths


def write_multiframe(
    path: Path,
    values: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "MR",
    syntax: str = "explicit",
    change: Callable[[Dataset], Any] | None = None,
    per_frame: Callable[[Dataset, int], Any] | None = None,
) -> Path:
    """An enhanced MR or CT image: one file, geometry in functional groups, frames stored in shuffled order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    for key, value in common(modality).items():
        setattr(dataset, key, value)
    for key in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        dataset.pop(key, None)
    dataset.SOPClassUID = {"MR": pydicom.uid.EnhancedMRImageStorage, "CT": pydicom.uid.EnhancedCTImageStorage}[modality]
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.StudyInstanceUID = generate_uid()
    order = np.random.default_rng(5).permutation(values.shape[2])
    set_pixels(dataset, values[:, :, order].T)
    measures = item(PixelSpacing=[_decimal(spacing[1]), _decimal(spacing[0])], SliceThickness=_decimal(spacing[2]))
    plane = item(ImageOrientationPatient=[_decimal(x) for x in (affine[:3, :2] / spacing[:2]).T.ravel()])
    dataset.SharedFunctionalGroupsSequence = [item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[plane])]
    dataset.PerFrameFunctionalGroupsSequence = []
    for frame in map(int, order):
        place = [_decimal(x) for x in affine[:3, 3] + frame * affine[:3, 2]]
        groups = item(PlanePositionSequence=[item(ImagePositionPatient=place)])
        if per_frame is not None:
            per_frame(groups, frame)
        dataset.PerFrameFunctionalGroupsSequence.append(groups)
    if change is not None:
        change(dataset)
    save(dataset, path, syntax)
    return path


def common(modality: str) -> dict[str, Any]:
    """What every file of a series says."""
    header = {
        "SOPClassUID": SOP_CLASSES[modality],
        "Modality": modality,
        "PatientName": "Mustermann^Erika",
        "PatientID": "P-4711",
        "PatientBirthDate": "19500102",
        "PatientSex": "F",
        "StudyDate": "20230405",
        "StudyTime": "101112",
        "StudyID": "1",
        "AccessionNumber": "A-99",
        "ReferringPhysicianName": "Doe^John",
        "SeriesNumber": 3,
        "SeriesDescription": "Spine 1.0 mm",
        "FrameOfReferenceUID": generate_uid(),
        "PositionReferenceIndicator": "",
        "Manufacturer": "Maker",
        "ManufacturerModelName": "Model 1",
        "BodyPartExamined": "SPINE",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    }
    if modality == "CT":
        header |= {"KVP": "120", "RescaleSlope": "1", "RescaleIntercept": "-1024", "RescaleType": "HU"}
    if modality == "MR":
        header |= {"ScanningSequence": "SE", "SequenceVariant": "SK", "EchoTime": "10", "RepetitionTime": "500"}
    return header


def set_pixels(dataset: Dataset, frames: np.ndarray, low_is_white: bool = False) -> None:
    """Put (rows, columns) or (frames, rows, columns) of an 8, 16 or 32-bit integer type into the data set."""
    dataset.Rows, dataset.Columns = frames.shape[-2:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if low_is_white else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = frames.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    if frames.ndim == 3:
        dataset.NumberOfFrames = len(frames)
    dataset.PixelData = np.ascontiguousarray(frames).tobytes()


def save(dataset: Dataset, path: Path, syntax: str = "explicit") -> None:
    """Write the data set (pixels uncompressed, little endian) in one of SYNTAXES."""
    uid = SYNTAXES[syntax]
    dataset.file_meta.TransferSyntaxUID = uid if not uid.is_compressed else pydicom.uid.ExplicitVRLittleEndian
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    if syntax in ("rle", "j2k", "jpeg_ls"):
        dataset.compress(uid)
    if syntax == "big_endian" and dataset.BitsAllocated > 8:
        dataset.PixelData = np.frombuffer(dataset.PixelData, f"<u{dataset.BitsAllocated // 8}").byteswap().tobytes()
    if syntax == "deflated":
        dataset.file_meta.TransferSyntaxUID = uid
    dataset.save_as(path, enforce_file_format=True)
    if syntax == "jpeg_lossless":
        _recode(path, gdcm.TransferSyntax.JPEGLosslessProcess14_1)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    """A NIfTI file of a grid in LPS, in the byte order of ``values``; ``header`` overwrites fields, as it is."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    empty = nibabel.Nifti1Header(endianness=order)
    image = nibabel.Nifti1Image(values, np.diag([-1, -1, 1, 1]) @ affine, empty, dtype=values.dtype)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    data = image.to_bytes()
    changed = nibabel.Nifti1Header(data[:348], endianness=order)
    for key, value in header.items():
        changed[key] = value
    data = changed.binaryblock + data[348:]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@dataclass(frozen=True)
class Spine:
    """Three lumbar vertebrae as TotalSegmentator numbers them (L3 29, L2 30, L1 31; cord 79), L2 with a lesion.

    Axes run to left, posterior, head. Bodies lie in front of the canal; labels hold body and arch.
    """

    image: np.ndarray  # int16, HU
    labels: np.ndarray  # uint8
    lesion: np.ndarray  # bool
    affine: np.ndarray


def spine(shape: Sequence[int] = (40, 56, 60), spacing: Sequence[float] = (1.5, 1.25, 1.0)) -> Spine:
    """A spine of 60 mm height in soft tissue, with air around the body."""
    affine = grid(AXIAL, shape, spacing)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    labels = np.zeros(shape, np.uint8)
    height = 20.0
    for number, middle in ((29, -height), (30, 0.0), (31, height)):
        body = ((x / 15) ** 2 + ((y + 8) / 11) ** 2 < 1) & (abs(z - middle) < 8)
        ring = ((x / 11) ** 2 + ((y - 9) / 9) ** 2 < 1) & (abs(z - middle) < 6)
        process = (abs(x) < 2.5) & (y > 14) & (y < 26) & (abs(z - middle + 2) < 4)
        labels[body | ring | process] = number
    labels[(x / 6) ** 2 + ((y - 8) / 5) ** 2 < 1] = 79
    noise = np.random.default_rng(1).normal(0, 12, shape)
    image = np.where((x / 28) ** 2 + (y / 34) ** 2 < 1, 50.0, -1000.0)
    image[(labels > 28) & (labels < 40)] = 350
    image[labels == 79] = 20
    lesion = ((x - 3) ** 2 + (y + 8) ** 2 + z**2 < 5**2) & (labels == 30)
    image[lesion] = 90
    return Spine(np.rint(image + noise).astype(np.int16), labels, lesion, affine)


def write_spine(folder: Path, made: Spine, **options: Any) -> list[Path]:
    """The spine's image as an axial CT series (stored values HU + 1024)."""
    return write_series(folder, (made.image + 1024).astype(np.int16), made.affine, **options)


def write_seg(path: Path, series: Sequence[Path], masks: Mapping[str, np.ndarray]) -> Path:
    """A binary DICOM SEG on the grid of ``series`` (paths in the frames' order): one segment a label and mask."""
    images = [pydicom.dcmread(file) for file in series]
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, label in enumerate(masks, 1)
    ]
    highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=np.stack([mask.T.astype(np.uint8) for mask in masks.values()], -1),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=100,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Maker",
        manufacturer_model_name="Model",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)
    return path


def write_rtstruct(path: Path, series: Sequence[Path], masks: Mapping[str, np.ndarray]) -> Path:
    """An RTSTRUCT: contours run through the centres of the masks' border pixels, holes are contours of their own."""
    images = [pydicom.dcmread(file, stop_before_pixels=True) for file in series]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.RTStructureSetStorage
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    for key in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID"):
        setattr(dataset, key, getattr(images[0], key))
    dataset.Modality, dataset.StructureSetLabel = "RTSTRUCT", "contours"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    for number, (name, mask) in enumerate(masks.items(), 1):
        dataset.StructureSetROISequence.append(
            item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=images[0].FrameOfReferenceUID)
        )
        contours = [
            _contour(image, points) for image, part in zip(images, mask.T, strict=True) for points in _rings(part)
        ]
        dataset.ROIContourSequence.append(item(ReferencedROINumber=number, ContourSequence=contours))
        dataset.RTROIObservationsSequence.append(item(ObservationNumber=number, ReferencedROINumber=number))
    dataset.save_as(path, enforce_file_format=True)
    return path


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """Border pixels (column, row) of a mask's parts, of the holes in them, of the islands in those, and so on."""
    rings, mask = [], np.ascontiguousarray(mask, np.uint8)
    while mask.any():
        found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        rings += [ring[:, 0].astype(float) for ring in found]
        mask = cv2.drawContours(np.zeros_like(mask), found, -1, 1, cv2.FILLED) ^ mask
    return rings


def _contour(image: Dataset, points: np.ndarray) -> Dataset:
    orientation = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
    spacing = np.array(image.PixelSpacing, float)[::-1]
    places = points * spacing @ orientation + np.array(image.ImagePositionPatient, float)
    reference = item(ReferencedSOPClassUID=image.SOPClassUID, ReferencedSOPInstanceUID=image.SOPInstanceUID)
    return item(
        ContourImageSequence=[reference],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourData=[_decimal(x) for x in places.ravel()],
    )


def item(**values: Any) -> Dataset:
    """A data set of these elements, for a sequence."""
    made = Dataset()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters."""
    return f"{value:.10f}"[:16].rstrip("0").rstrip(".") or "0"


def _recode(path: Path, syntax: int) -> None:
    """Encode a file's pixels in another transfer syntax of GDCM's."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert UID(pydicom.dcmread(path).file_meta.TransferSyntaxUID).is_compressed
