"""tool/export_dicom.py on many kinds of source: multi-frame files, radiographs, look-up tables, real and public files.

What a header says of the patient is found nowhere in the output, and dciodvfy finds no fault that the source has not.
"""

import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from made import AXIAL, grid, item, marked, write_multiframe, write_nifti, write_series
from nibabel.testing import data_path
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from roundtrip import World, read, volume_of

from ldm.core.errors import MedSoftError
from ldm.data.images import read_image
from ldm.volumes.volume import Volume, cut

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"
SHAPE, SPACING = (40, 36, 5), (0.75, 0.75, 3.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def unchanged_outside(source: np.ndarray, made: np.ndarray, soft: np.ndarray) -> None:
    np.testing.assert_array_equal(made[soft == 0], source[soft == 0])
    assert (made != source)[soft > 0].any()


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_one_frame_of_a_multi_frame_file(world: World, modality: str) -> None:
    def per_frame(groups: pydicom.Dataset, frame: int) -> None:
        if modality == "CT":
            rescale = item(RescaleSlope="2", RescaleIntercept=str(-1000 - frame * 2), RescaleType="HU")
            groups.PixelValueTransformationSequence = [rescale]
        groups.FrameContentSequence = [item(StackID="of Mustermann", FrameAcquisitionDateTime="20230405101112")]

    affine = grid(AXIAL, SHAPE, SPACING)
    path = write_multiframe(world.root / "m.dcm", marked(SHAPE), affine, modality=modality, per_frame=per_frame)
    source, folder, soft = world.round_trip(path, "axial", 3, "--link_source")
    image, before = pydicom.dcmread(folder / "image.dcm"), pydicom.dcmread(source)
    unchanged_outside(marked(SHAPE)[:, :, 3].T, image.pixel_array, soft)
    assert image.NumberOfFrames == 1
    assert list(image.ImageType[:2]) == ["DERIVED", "PRIMARY"]  # the standard has no SECONDARY for these
    (content,) = image.PerFrameFunctionalGroupsSequence[0].FrameContentSequence
    assert "inpainted by MedSoft-Diffusion" in content.FrameComments
    assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == before.SOPInstanceUID
    (groups,) = image.PerFrameFunctionalGroupsSequence
    number = read(path).source["frames"][3]
    theirs = before.PerFrameFunctionalGroupsSequence[number - 1]
    assert groups.PlanePositionSequence == theirs.PlanePositionSequence
    assert groups.get("PixelValueTransformationSequence") == theirs.get("PixelValueTransformationSequence")
    assert image.SharedFunctionalGroupsSequence == before.SharedFunctionalGroupsSequence
    assert b"Mustermann" not in (folder / "image.dcm").read_bytes()
    found = highdicom.seg.segread(folder / "soft_mask.dcm").get_pixels_by_source_frame(
        image.SOPInstanceUID, [1], rescale_fractional=True
    )
    np.testing.assert_array_equal(np.rint(found[0, ..., 0] * 255), soft)


def test_a_reformat_of_a_multi_frame_file(world: World) -> None:
    shape = (36, 40, 33)
    affine = grid(AXIAL, shape, (0.8, 0.7, 0.7))
    path = write_multiframe(world.root / "m.dcm", marked(shape), affine)
    _, folder, soft = world.round_trip(path, "sagittal", 12)
    image = pydicom.dcmread(folder / "image.dcm")
    unchanged_outside(cut(read(path), "sagittal", 12).pixels, image.pixel_array, soft)
    (groups,) = image.PerFrameFunctionalGroupsSequence
    affine = cut(read(path), "sagittal", 12).affine
    assert np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float) == pytest.approx(affine[:3, 3])
    (shared,) = image.SharedFunctionalGroupsSequence
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [0.7, 0.7]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == [0, 1, 0, 0, 0, -1]


@pytest.mark.parametrize("modality", ["CR", "DX"])
def test_a_radiograph(world: World, modality: str) -> None:
    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PixelSpacing"):
            del dataset[key]
        dataset.PatientOrientation = ["A", "F"]
        dataset.PhotometricInterpretation = "MONOCHROME1"
        dataset.OtherStudyNumbers, dataset.ContentQualification = 4711, "PRODUCT"

    shape = (40, 36, 1)
    affine = grid(AXIAL, shape, SPACING)
    write_series(
        world.root / "x", marked(shape), affine, modality=modality, change=change, ImagerPixelSpacing=[0.2, 0.2]
    )
    source, folder, soft = world.round_trip(world.root / "x", "projection", 0)
    image, before = pydicom.dcmread(folder / "image.dcm"), pydicom.dcmread(source)
    turn = json.loads((world.root / "results/case/projection_000__v0/meta.json").read_text())["turn"]
    assert turn == [False, False, True]  # anterior at the left
    unchanged_outside(before.pixel_array, image.pixel_array, soft[:, ::-1])
    assert image.ImagerPixelSpacing == [0.2, 0.2]
    assert image.ContentQualification == "RESEARCH"
    assert "OtherStudyNumbers" not in image
    assert (image.PhotometricInterpretation, image.PatientOrientation) == ("MONOCHROME1", ["A", "F"])
    found = highdicom.seg.segread(folder / "lesion.dcm").get_pixels_by_source_instance([image.SOPInstanceUID])
    mask = read_image(world.root / "results/case/projection_000__v0/mask.png")[:, ::-1]
    np.testing.assert_array_equal(found[0, ..., 0] > 0, mask > 0)


def test_a_modality_look_up_table_and_embedded_overlays(world: World) -> None:
    """The real values run downward, and what lies above the stored bits is an overlay's."""
    table = (8000 - 2 * np.arange(4096)).clip(0).astype(np.uint16)

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            del dataset[key]
        lut = item(LUTDescriptor=[4096, 0, 16], ModalityLUTType="US", LUTExplanation="by Doe", LUTData=table.tobytes())
        lut["LUTData"].VR = "OW"
        dataset.ModalityLUTSequence = [lut]
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0

    affine = grid(AXIAL, SHAPE, SPACING)
    write_series(world.root / "s", marked(SHAPE), affine, change=change)
    source, folder, soft = world.round_trip(world.root / "s", "axial", 2)
    image, before = pydicom.dcmread(folder / "image.dcm"), pydicom.dcmread(source)
    unchanged_outside(before.pixel_array, image.pixel_array, soft)
    shown = read_image(world.root / "results/case/axial_002__v0/image.png").astype(float)
    assert np.abs(table[image.pixel_array] - shown)[soft > 0].max() <= 1
    assert b"by Doe" not in (folder / "image.dcm").read_bytes()


def test_what_was_lossy_stays_so(world: World) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    (path, *_) = write_series(world.root / "s", marked(SHAPE) // 16, affine, syntax="jpeg_ls")
    dataset = pydicom.dcmread(path)
    near = dataset.pixel_array
    dataset.compress(pydicom.uid.JPEGLSNearLossless, near, jls_error=3)
    dataset.LossyImageCompression = "00"
    dataset.save_as(path)
    shutil.move(path, world.root / "one.dcm")
    _, folder, _ = world.round_trip(world.root / "one.dcm", "axial", 0)
    assert pydicom.dcmread(folder / "image.dcm").LossyImageCompression == "01"


# -------------------------------------------------------------------------------------------------- public, real files


def import_file(world: World, path: Path) -> tuple[Path, Path, np.ndarray]:
    target = world.root / "source" / path.name
    target.parent.mkdir(exist_ok=True)
    shutil.copy(path, target)
    return world.round_trip(target, read(target).acquired or "axial", 0)


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "693_J2KI.dcm"]
)
def test_pydicoms_own_files(world: World, name: str) -> None:
    source, folder, soft = import_file(world, Path(get_testdata_file(name)))
    image, before = pydicom.dcmread(folder / "image.dcm"), pydicom.dcmread(source)
    turn = json.loads((world.root / "results" / folder.relative_to(world.out) / "meta.json").read_text())["turn"]
    soft = soft[:: -1 if turn[1] else 1, :: -1 if turn[2] else 1]
    unchanged_outside(before.pixel_array, image.pixel_array, soft.T if turn[0] else soft)
    highdicom.seg.segread(folder / "lesion.dcm").get_volume()


def faults(path: Path) -> set[str]:
    """What dciodvfy says of a file, but for the attribute that it is too old to know."""
    lines = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr.splitlines()
    kind = "Standard Extended SOP Class"  # it is one for this attribute
    return {line for line in lines if "(0x0008,0x001c)" not in line and kind not in line}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian: dicom3tools) is not installed")
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm", "693_J2KI.dcm", "real", "reformat", "enhanced"]
)
def test_dciodvfy_finds_nothing_new(world: World, name: str) -> None:
    if name == "real":
        if not REAL.exists():
            pytest.skip("no real files beside the repository")
        source, folder, _ = world.round_trip(REAL / "ct_series", "axial", 7)
        whole = pydicom.dcmread(source)  # its data set does not say what kind of image it is
        whole.SOPClassUID, whole.SOPInstanceUID = (
            whole.file_meta.MediaStorageSOPClassUID,
            whole.file_meta.MediaStorageSOPInstanceUID,
        )
        source = world.root / "whole.dcm"
        whole.save_as(source)
    elif name == "reformat":
        affine = grid(AXIAL, (36, 40, 33), (0.7, 0.7, 0.7))
        write_series(world.root / "s", marked((36, 40, 33)), affine, **TYPE_TWO)
        source, folder, _ = world.round_trip(world.root / "s", "sagittal", 12)
    elif name == "enhanced":
        affine = grid(AXIAL, SHAPE, SPACING)
        slices = [pydicom.dcmread(path) for path in write_series(world.root / "s", marked(SHAPE), affine, **TYPE_TWO)]
        convert = highdicom.legacy.LegacyConvertedEnhancedCTImage
        path = world.root / "enhanced.dcm"
        convert(slices, generate_uid(), 5, generate_uid(), 1).save_as(path)
        source, folder, _ = world.round_trip(path, "axial", 2)
    else:
        source, folder, _ = import_file(world, Path(get_testdata_file(name)))
    assert not faults(folder / "image.dcm") - faults(source)
    for part in ("lesion", "soft_mask"):
        assert not [line for line in faults(folder / f"{part}.dcm") if line.startswith("Error")]


TYPE_TWO = {"AcquisitionNumber": 1, "ContentDate": "20230405", "ContentTime": "101112", "PatientPosition": "HFS"}


@pytest.mark.skipif(not REAL.exists(), reason="no real files beside the repository")
def test_a_real_series(world: World) -> None:
    for index in (0, 9, 19):
        volume = read(REAL / "ct_series")
        paths = [Path(path) for path in volume.source["paths"]]
        world.import_and_inpaint(volume, "axial", index, paths)
    assert world.export() == 0
    for index in (0, 9, 19):
        image = pydicom.dcmread(world.out / f"case/axial_{index:03d}__v0/image.dcm")
        before = pydicom.dcmread(paths[index])
        soft = read_image(world.root / f"results/case/axial_{index:03d}__v0/soft_mask.png")
        unchanged_outside(before.pixel_array, image.pixel_array, soft)
    private = {element.tag for element in before if element.tag.is_private}
    assert private
    assert not any(element.tag.is_private for element in image)


# --------------------------------------------------------------------------------------------------------- NIfTI


def placed_like_the_source(source: Path, image: Path, soft: np.ndarray) -> None:
    """Outside the soft mask every voxel of the exported slice has the source's value at its place."""
    theirs, ours = nibabel.load(source), nibabel.load(image)
    assert ours.ndim == 3
    assert ours.shape[2] == 1
    index = np.stack(np.meshgrid(*map(np.arange, ours.shape), indexing="ij"), -1)
    to_source = np.linalg.inv(theirs.affine) @ ours.affine
    places = index @ to_source[:3, :3].T + to_source[:3, 3]
    nearest = np.rint(places).astype(int)
    assert np.abs(places - nearest).max() < 0.01
    expected, found = theirs.get_fdata()[tuple(np.moveaxis(nearest, -1, 0))][..., 0], ours.get_fdata()[..., 0]
    np.testing.assert_allclose(found[soft == 0], expected[soft == 0], rtol=1e-5)
    assert (np.abs(found - expected) > 1e-3)[soft > 0].any()


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
@pytest.mark.parametrize("axes", ["LPH", "RAH", "PHR"])
def test_nifti_comes_back_as_nifti(world: World, plane: str, axes: str) -> None:
    affine = grid(axes, (34, 36, 38), (0.8, 0.8, 0.8), turn=4)
    path = write_nifti(world.root / "image.nii.gz", marked((34, 36, 38)), affine)
    volume = Volume(marked((34, 36, 38)), affine, name="image")
    name = world.import_and_inpaint(volume, plane, 11, [path], kind="nifti")
    assert world.export("--format", "nifti") == 0
    folder = world.out / name
    soft = read_image(world.root / "results" / name / "soft_mask.png")
    placed_like_the_source(path, folder / "image.nii.gz", soft)
    lesion, exported_soft = (nibabel.load(folder / f"{part}.nii.gz") for part in ("lesion", "soft_mask"))
    np.testing.assert_array_equal(
        lesion.get_fdata()[..., 0], read_image(world.root / "results" / name / "mask.png") > 0
    )
    np.testing.assert_array_equal(np.rint(exported_soft.get_fdata()[..., 0] * 255), soft)
    np.testing.assert_allclose(lesion.affine, nibabel.load(folder / "image.nii.gz").affine)


def test_nifti_without_a_header_cannot_become_dicom(world: World) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    nifti = write_nifti(world.root / "image.nii.gz", marked(SHAPE), affine)
    world.import_and_inpaint(Volume(marked(SHAPE), affine, name="image"), "axial", 1, [nifti], kind="nifti")
    with pytest.raises(MedSoftError, match="cannot become DICOM; --format nifti writes it"):
        world.export()
    paths = write_series(world.root / "series", marked(SHAPE), affine)
    world.import_and_inpaint(volume_of(marked(SHAPE), affine, "axial"), "axial", 2, paths)
    assert world.export() == 3
    (reject,) = json.loads((world.out / "rejects.json").read_text())
    assert reject["sample_id"] == "case/axial_001__v0"


def test_dicom_as_nifti_holds_hounsfield_units(world: World) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    paths = write_series(world.root / "series", marked(SHAPE), affine)
    name = world.import_and_inpaint(volume_of(marked(SHAPE), affine, "axial"), "axial", 2, paths)
    assert world.export("--format", "nifti") == 0
    reference = write_nifti(world.root / "reference.nii.gz", marked(SHAPE) - 1024, affine)
    soft = read_image(world.root / "results" / name / "soft_mask.png")
    placed_like_the_source(reference, world.out / name / "image.nii.gz", soft)
    assert nibabel.load(world.out / name / "image.nii.gz").get_data_dtype() == np.int16


def test_scaled_values_of_nibabels_own_file(world: World) -> None:
    path = Path(data_path) / "anatomical.nii"
    image = nibabel.load(path)
    stored = np.asarray(image.dataobj.get_unscaled())
    slope, inter = 0.5, -3.25
    scaled = nibabel.Nifti1Image(stored, image.affine)
    scaled.header.set_slope_inter(slope, inter)
    nibabel.save(scaled, world.root / "scaled.nii")
    volume = Volume(stored, np.diag([-1, -1, 1, 1]) @ image.affine, offset=inter, scale=slope, name="scaled")
    name = world.import_and_inpaint(volume, "sagittal", 15, [world.root / "scaled.nii"], kind="nifti")
    assert world.export("--format", "nifti") == 0
    soft = read_image(world.root / "results" / name / "soft_mask.png")
    placed_like_the_source(world.root / "scaled.nii", world.out / name / "image.nii.gz", soft)


# ------------------------------------------------------------------------------------------------------- privacy


def planted() -> dict[str, Any]:
    """Attributes of a header, each with a text that must not come out."""
    texts = """PatientComments OtherPatientIDs IssuerOfPatientID PatientBirthName MilitaryRank EthnicGroup Occupation
    AdditionalPatientHistory InstitutionName InstitutionalDepartmentName StationName StudyDescription SeriesDescription
    ProtocolName DeviceSerialNumber ImageComments RequestedProcedureDescription PerformedProcedureStepDescription
    StudyID AccessionNumber WindowCenterWidthExplanation DerivationDescription ContrastBolusAgent
    AcquisitionComments"""
    found: dict[str, Any] = {keyword: f"SECRET{number:02d}X" for number, keyword in enumerate(texts.split())}
    names = ("PatientName", "ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName")
    found |= {keyword: f"SECRET{number}X^NAME" for number, keyword in enumerate(names, 30)}
    found |= {"PatientID": "SECRET40X", "PatientBirthDate": "19170203", "AcquisitionDate": "19170204"}
    found |= {"StudyDate": "19170205", "SeriesDate": "19170206", "ContentDate": "19170207", "StudyTime": "171717.17"}
    found |= {"AcquisitionDateTime": "19170208171717", "PatientWeight": "77.171717", "PatientAge": "077Y"}
    found |= {keyword: generate_uid() for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    found |= {"SmallestImagePixelValue": 3, "LargestImagePixelValue": 4000}
    return found


def plant(dataset: pydicom.Dataset, frame: int) -> None:
    """What stands in no attribute of its own: private elements, overlays, an icon, references, signatures."""
    block = dataset.private_block(0x0029, "SECRET50X", create=True)
    block.add_new(0x10, "LO", "SECRET51X")
    block.add_new(0x11, "SQ", [item(PatientName="SECRET52X")])
    dataset.add_new((0x6000, 0x0022), "LO", "SECRET53X")
    dataset.add_new((0x6000, 0x3000), "OW", b"SECRET54X ")
    dataset.IconImageSequence = [item(PixelData=b"SECRET55X ", Rows=2)]
    dataset["IconImageSequence"].value[0]["PixelData"].VR = "OW"
    reference = item(ReferencedSOPInstanceUID="1.2.840.171717171717", ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    dataset.SourceImageSequence = dataset.ReferencedImageSequence = [reference]
    dataset.RequestAttributesSequence = [item(ScheduledProcedureStepDescription="SECRET56X")]
    code = item(CodeValue="SECRET57X", CodingSchemeDesignator="LOCAL", CodeMeaning="SECRET58X")
    dataset.CTDIPhantomTypeCodeSequence = [code]
    dataset.DigitalSignaturesSequence = [item(MACIDNumber=1, CertificateOfSigner=b"SECRET59X ")]


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_nothing_of_the_patient_comes_out(world: World, plane: str, form: str) -> None:
    affine = grid(AXIAL, (36, 40, 33), (0.7, 0.7, 0.7))
    header = planted()
    folder = world.root / "SECRET60X" / "SECRET61X_19170209"
    paths = write_series(folder, marked((36, 40, 33)), affine, change=plant, **header)
    source = pydicom.dcmread(paths[12])
    assert sum(b"SECRET" in path.read_bytes() for path in paths) == len(paths)
    name = world.import_and_inpaint(volume_of(marked((36, 40, 33)), affine, "axial"), plane, 12, paths)
    assert world.export("--format", form) == 0
    secrets = [b"SECRET", b"191702", b"1.2.840.171717171717", b"171717", b"077Y"]
    uids = [source.SOPInstanceUID, *(header[key] for key in header if key.endswith("UID"))]
    for path in (path for path in world.out.rglob("*") if path.is_file()):
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        for secret in (*secrets, *(uid.encode() for uid in uids)):
            assert secret not in content, (path, secret)
            assert secret.decode() not in str(path.relative_to(world.out))
    if form == "dicom":
        image = pydicom.dcmread(world.out / name / "image.dcm")
        groups = {element.tag.group for element in image.iterall()}
        assert not {0x6000, 0x0029, 0xFFFA, 0x0088, 0x0400, 0x0032} & groups
        assert "SmallestImagePixelValue" not in image
        assert image.KVP == "120"
