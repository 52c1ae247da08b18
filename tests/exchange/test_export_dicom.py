"""tool/export_dicom.py: stored values outside the soft mask, headers, segmentations, planes, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from made import AXIAL, CORONAL, SAGITTAL, grid, marked, set_pixels, write_series
from pydicom.pixels import apply_modality_lut
from roundtrip import PROMPT, World, lesion_in, volume_of

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import sha256_file
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.exchange.results import Pixels, read_pixels
from ldm.reviews.table import Review, add_review

SHAPE, SPACING = (40, 36, 5), (0.75, 0.75, 3.0)
GEOMETRY = (
    "Rows Columns PixelSpacing ImagePositionPatient ImageOrientationPatient SliceThickness RescaleSlope "
    "RescaleIntercept BitsAllocated BitsStored HighBit PixelRepresentation PhotometricInterpretation"
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def stored(path: Path) -> np.ndarray:
    return pydicom.dcmread(path).pixel_array.astype(np.int64)


def exported(world: World, name: str) -> pydicom.Dataset:
    return pydicom.dcmread(world.out / name / "image.dcm")


def on_frame(shown: np.ndarray, turn: list[bool]) -> np.ndarray:
    """A displayed array on the stored frame's grid, by the words of the contract: undo the flips, then transpose."""
    shown = shown[:, ::-1] if turn[2] else shown
    shown = shown[::-1] if turn[1] else shown
    return shown.T if turn[0] else shown


def low_is_white(dataset: pydicom.Dataset, frame: int) -> None:
    dataset.PhotometricInterpretation = "MONOCHROME1"


def padded(dataset: pydicom.Dataset, frame: int) -> None:
    """A corner without tissue that reaches into the lesion, and a padding value that drawings may come to."""
    pixels = np.frombuffer(dataset.PixelData, np.int16).reshape(dataset.Rows, dataset.Columns).copy()
    pixels[pixels == 2000] = 2001
    pixels[:16, :22] = 2000
    set_pixels(dataset, pixels)
    dataset.add_new("PixelPaddingValue", "SS", 2000)


def unsigned(dataset: pydicom.Dataset, frame: int) -> None:
    set_pixels(dataset, np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns))
    dataset.BitsStored, dataset.HighBit = 12, 11


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "axial": (AXIAL, {}),
    "head first": ("LPF", {}),
    "rows upward": ("LAH", {}),
    "left at the left": ("RPF", {}),
    "columns first": ("PLH", {}),
    "sagittal": (SAGITTAL, {"modality": "MR", "read": {"offset": 0.0, "modality": "MR", "unit": None}}),
    "coronal": (CORONAL, {}),
    "low is white": (AXIAL, {"change": low_is_white, "read": {"low_is_white": True}}),
    "slope": (AXIAL, {"RescaleSlope": "3.774", "RescaleIntercept": "-7.5", "read": {"offset": -7.5, "scale": 3.774}}),
    "padding": (AXIAL, {"change": padded}),
    "12 bits": (AXIAL, {"change": unsigned}),
    "implicit": (AXIAL, {"syntax": "implicit"}),
    "big endian": (AXIAL, {"syntax": "big_endian"}),
    "JPEG 2000": (AXIAL, {"syntax": "j2k"}),
    "JPEG lossless": (AXIAL, {"syntax": "jpeg_lossless"}),
}
PLANE = {"sagittal": "sagittal", "coronal": "coronal"}


def made_result(world: World, case: str) -> tuple[str, Path]:
    """A result on one stored frame of a series; its name and the frame's file."""
    axes, given = CASES[case]
    more = {"read": {}, **given}
    affine = grid(axes, SHAPE, SPACING, turn=3.0)
    read = more.pop("read")
    paths = write_series(world.root / "series", marked(SHAPE), affine, **more)
    values = np.stack([stored(path).T for path in paths], -1)
    plane = PLANE.get(case, "axial")
    name = world.import_and_inpaint(volume_of(values, affine, plane, **read), plane, 3, paths)
    meta = json.loads((world.root / "results" / name / "meta.json").read_text())
    return name, Path(world.mapping["instances"][meta["instance"]]["path"])


def test_a_result_that_is_replaced_meanwhile_is_not_exported_as_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = made_result(world, "axial")

    def read(sample: Sample) -> Pixels:
        found = read_pixels(sample)
        write_png(sample.image, found.image, {"Comment": "drawn again"})
        return found

    monkeypatch.setattr("ldm.exchange.results.read_pixels", read)
    with pytest.raises(
        MedSoftError, match=r"no result could be .*image\.png: was replaced or changed after it had been"
    ):
        world.export()
    assert not (world.out / name).exists()


@pytest.mark.parametrize("case", CASES)
def test_stored_values_change_inside_the_soft_mask_alone(world: World, case: str) -> None:
    name, source = made_result(world, case)
    assert world.export() == 0
    before, after, made = pydicom.dcmread(source), stored(source), exported(world, name)
    result = world.root / "results" / name
    turn = json.loads((result / "meta.json").read_text())["turn"]
    soft, image = (on_frame(read_image(result / f"{part}.png"), turn) for part in ("soft_mask", "image"))
    assert soft.shape == after.shape
    assert (made.pixel_array != after)[soft > 0].any()
    np.testing.assert_array_equal(made.pixel_array[soft == 0], after[soft == 0])
    # Inside, the real values are the result's, as near as stored values come to them.
    meta = json.loads((result / "meta.json").read_text())
    wanted = meta["value_offset"] + meta["value_scale"] * image.astype(float)
    padding = after == before.get("PixelPaddingValue", -1)
    found = apply_modality_lut(made.pixel_array, made)
    assert np.abs(found - wanted)[~padding].max() <= (1.0 if padding.any() else 1e-6)
    np.testing.assert_array_equal(made.pixel_array == before.get("PixelPaddingValue", -1), padding)
    for keyword in GEOMETRY.split():
        assert made.get(keyword) == before.get(keyword), keyword
    assert made.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian


def test_header_says_what_it_is_and_whose(world: World, capsys: pytest.CaptureFixture) -> None:
    name, source = made_result(world, "axial")
    assert world.export() == 0
    made, before = exported(world, name), pydicom.dcmread(source)
    assert made.SyntheticData == "YES"
    assert list(made.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert "MedSoft-Diffusion" in made.DerivationDescription
    assert PROMPT in made.DerivationDescription
    (equipment,) = made.ContributingEquipmentSequence
    (purpose,) = equipment.PurposeOfReferenceCodeSequence
    assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("109100", "DCM")
    assert made.PatientID.startswith("SYN-")
    assert str(made.PatientName).startswith(made.PatientID)
    assert made.PatientIdentityRemoved == "YES"
    assert made.SOPClassUID == before.SOPClassUID
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert made[keyword].value != before[keyword].value
        assert pydicom.uid.UID(made[keyword].value).is_valid
    assert "SourceImageSequence" not in made
    for keyword in ("Manufacturer", "KVP", "BodyPartExamined"):
        assert made[keyword].value == before[keyword].value
    (row,) = (world.out / "export.csv").read_text().splitlines()[1:]
    assert made.SOPInstanceUID in row
    assert row.startswith(f"{name},frame,{made.PatientID},{PROMPT},L3,")


def test_segmentations_read_back_as_the_masks(world: World) -> None:
    name, _ = made_result(world, "rows upward")
    assert world.export() == 0
    made = exported(world, name)
    result = world.root / "results" / name
    turn = json.loads((result / "meta.json").read_text())["turn"]
    lesion, soft = (on_frame(read_image(result / f"{part}.png"), turn) for part in ("mask", "soft_mask"))
    segmentation = highdicom.seg.segread(world.out / name / "lesion.dcm")
    found = segmentation.get_pixels_by_source_instance([made.SOPInstanceUID])
    np.testing.assert_array_equal(found[0, ..., 0], lesion > 0)
    (segment,) = segmentation.SegmentSequence
    assert (segment.SegmentLabel, segment.SegmentDescription) == ("lesion", PROMPT)
    assert segment.AnatomicRegionSequence[0].CodeMeaning == "L3 vertebra"
    fractional = highdicom.seg.segread(world.out / name / "soft_mask.dcm")
    found = fractional.get_pixels_by_source_instance([made.SOPInstanceUID], rescale_fractional=True)
    np.testing.assert_array_equal(np.rint(found[0, ..., 0] * 255), soft)
    for each in (segmentation, fractional):
        assert each.SyntheticData == "YES"
        assert each.PatientID == made.PatientID
        assert each.StudyInstanceUID == made.StudyInstanceUID
        assert each.FrameOfReferenceUID == made.FrameOfReferenceUID
        assert each.SeriesInstanceUID != made.SeriesInstanceUID
    assert len({segmentation.SeriesInstanceUID, fractional.SeriesInstanceUID}) == 2


def test_a_healthy_result_has_no_lesion(world: World) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    paths = write_series(world.root / "series", marked(SHAPE), affine)
    volume = volume_of(marked(SHAPE), affine, "axial")
    world.import_slice(volume, "axial", 2, paths)
    sample = world.root / "data" / "case" / "axial_002"
    world.inpaint("case/axial_002")
    shutil.copy(sample / "mask.png", sample / "soft_mask.png")
    (world.root / "results" / "case" / "axial_002__v0" / "prompt.txt").write_text("healthy")
    assert world.export() == 0
    assert {path.name for path in (world.out / "case" / "axial_002__v0").iterdir()} == {
        "image.dcm",
        "soft_mask.dcm",
        "about.json",
    }


def test_same_study_and_source_only_on_demand(world: World, caplog: pytest.LogCaptureFixture) -> None:
    name, source = made_result(world, "axial")
    before = pydicom.dcmread(source)
    assert world.export("--same_study", "--link_source") == 0
    assert "never send them to a clinical archive" in caplog.text
    assert "--link_source names the real images" in caplog.text
    made = exported(world, name)
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert made[keyword].value == before[keyword].value
    assert "PatientIdentityRemoved" not in made
    assert made.SyntheticData == "YES"
    assert made.SeriesInstanceUID != before.SeriesInstanceUID
    (reference,) = made.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == before.SOPInstanceUID
    assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"


def odd(dataset: pydicom.Dataset, frame: int) -> None:
    """Patient and study are not named at all."""
    for keyword in ("PatientName", "PatientID", "StudyDate", "StudyTime"):
        del dataset[keyword]
    dataset.add_new("RegionLocationMinX0", "US", 1)


@pytest.mark.parametrize("flag", [None, "--same_study"])
def test_odd_headers_are_exported(world: World, flag: str | None) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    for path in write_series(world.root / "s", marked(SHAPE), affine, change=odd):
        data = path.read_bytes()
        assert data.count(b"\x18\x00\x18\x60US") == 1
        path.write_bytes(data.replace(b"\x18\x00\x18\x60US", b"\x18\x00\x18\x60UL"))  # half a number
    _, folder, _ = world.round_trip(world.root / "s", "axial", 2, *([flag] if flag else []))
    image = pydicom.dcmread(folder / "image.dcm")
    assert "RegionLocationMinX0" not in image
    assert bool(image.PatientID) == (flag is None)


def test_a_source_that_is_gone_cannot_be_linked(world: World) -> None:
    affine = grid(AXIAL, (36, 40, 33), (0.7, 0.7, 0.7))
    paths = write_series(world.root / "s", marked((36, 40, 33)), affine)
    name = world.import_and_inpaint(volume_of(marked((36, 40, 33)), affine, "axial"), "sagittal", 9, paths)
    paths[5].unlink()
    with pytest.raises(MedSoftError, match=f"no result could be exported; first: .*{name}.*its source No such file"):
        world.export("--link_source")


def test_a_reformat_is_a_series_of_its_own(world: World) -> None:
    """Every pixel lies where its voxel lies, outside of the soft mask with its value."""
    shape = (36, 40, 33)
    affine = grid(AXIAL, shape, (0.8, 0.7, 0.7), turn=4.0)
    values = marked(shape)
    paths = write_series(world.root / "series", values, affine, PatientOrientation=["L", "P"])
    volume = volume_of(values, affine, "axial")
    names = [world.import_and_inpaint(volume, "sagittal", index, paths) for index in (10, 20)]
    names.append(world.import_and_inpaint(volume, "axial", 9, paths, mm_per_pixel=0.7))
    world.inpaint("case/sagittal_020", variant=1)
    assert world.export() == 0
    made = [exported(world, name) for name in [*names, "case/sagittal_020__v1"]]
    first, second, axial, repeated = (image.SeriesInstanceUID for image in made)
    assert first == second
    assert len({first, axial, repeated}) == 3  # a slice that stands twice in a series hides one of the two
    assert len({image.StudyInstanceUID for image in made}) == len({image.FrameOfReferenceUID for image in made}) == 1
    assert [image.InstanceNumber for image in made] == [1, 2, 1, 1]
    assert len({image.SeriesNumber for image in made}) == 3
    inverse = np.linalg.inv(affine)
    for image, name in zip(made[:2], names[:2], strict=True):
        assert image.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]  # CT's word for any cross-section
        assert image.DerivationCodeSequence[0].CodeMeaning == "Multiplanar reformatting"
        assert image.DerivationDescription.startswith("A sagittal slice was reformatted")
        assert "PatientOrientation" not in image  # that of the acquired frames
        orientation = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        steps = np.array(image.PixelSpacing, float)[::-1]
        rows, columns = np.mgrid[: image.Rows, : image.Columns]
        places = np.stack([columns, rows], -1) * steps @ orientation + np.array(image.ImagePositionPatient, float)
        voxels = places @ inverse[:3, :3].T + inverse[:3, 3]
        nearest = np.rint(voxels).astype(int)
        assert np.abs(voxels - nearest).max() < 0.01
        soft = read_image(world.root / "results" / name / "soft_mask.png")
        expected = values[tuple(np.moveaxis(nearest, -1, 0))]
        np.testing.assert_array_equal(image.pixel_array[soft == 0], expected[soft == 0])
        assert (image.pixel_array != expected)[soft > 0].any()
        assert float(image.SliceThickness) == pytest.approx(0.8)
        segmentation = highdicom.seg.segread(world.out / name / "lesion.dcm")
        found = segmentation.get_pixels_by_source_instance([image.SOPInstanceUID])
        np.testing.assert_array_equal(found[0, ..., 0] > 0, read_image(world.root / "results" / name / "mask.png") > 0)


def test_a_reformat_takes_no_header_of_another_series(world: World) -> None:
    shape = (36, 40, 33)
    affine = grid(AXIAL, shape, (0.8, 0.7, 0.7))
    paths = write_series(world.root / "series", marked(shape), affine)
    world.import_and_inpaint(volume_of(marked(shape), affine, "axial"), "sagittal", 10, paths)
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = pydicom.uid.generate_uid()
        dataset.save_as(path)
    with pytest.raises(MedSoftError, match="is of another series than the one that was imported from there"):
        world.export()


def test_a_resampled_slice_is_a_series_of_its_own(world: World) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    paths = write_series(world.root / "series", marked(SHAPE), affine)
    name = world.import_and_inpaint(volume_of(marked(SHAPE), affine, "axial"), "axial", 3, paths, mm_per_pixel=0.6)
    assert world.export() == 0
    image = exported(world, name)
    assert image.PixelSpacing == [0.6, 0.6]
    found = apply_modality_lut(image.pixel_array, image)
    np.testing.assert_array_equal(found, read_image(world.root / "results" / name / "image.png") - 1024.0)


# ------------------------------------------------------------------------------------------------ running it again


def test_again_is_complete_and_what_is_missing_is_written(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    name, _ = made_result(world, "axial")
    world.inpaint("case/axial_003", variant=1)
    assert world.export() == 0
    files = sorted(path for path in world.out.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    caplog.clear()
    assert world.export() == 0
    assert "already complete (2 results)" in caplog.text
    shutil.rmtree(world.out / name)
    kept = (world.out / "case/axial_003__v1/image.dcm").stat().st_mtime_ns
    assert world.export() == 0
    assert {path: path.read_bytes() for path in files if path.suffix in (".dcm", ".json", ".csv")} == before
    assert (world.out / "case/axial_003__v1/image.dcm").stat().st_mtime_ns == kept
    with pytest.raises(UsageError, match=r"holds results of another run \(same_study: false -> true\)"):
        world.export("--same_study")
    about = world.root / "results" / name / "meta.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"severity": "corrected"}))
    with pytest.raises(UsageError, match=r"holds results of another run \(results: "):
        world.export()
    assert world.export("--format", "nifti", "--overwrite") == 0
    assert not list(world.out.rglob("*.dcm"))
    assert len(list(world.out.rglob("image.nii.gz"))) == 2

    review, image = world.root / "review.csv", world.root / "results/case/axial_003__v1/image.png"
    add_review(review, Review("case/axial_003__v1", "a", "reject", sha256_file(image), "seam"))
    assert world.export("--format", "nifti", "--overwrite", "--review", review) == 0
    assert [path.parent.name for path in world.out.rglob("image.nii.gz")] == [name.rpartition("/")[2]]
    record = json.loads((world.out / "export.json").read_text())
    assert (record["exported"], record["review"]["left_out"]) == (1, 1)


# ------------------------------------------------------------------------------------------------------ bad input


def rejected(world: World) -> tuple[str, str]:
    (reject,) = json.loads((world.out / "rejects.json").read_text())
    return reject["sample_id"], reject["reason"]


def spoilt(world: World, how: str) -> str:
    """Spoil the second of two results; what the rejection must say."""
    result = world.root / "results" / "case" / "axial_002__v0"
    meta = json.loads((result / "meta.json").read_text())
    source = Path(world.mapping["instances"][meta["instance"]]["path"])
    if how == "not synthetic":
        meta |= {"synthetic": False}
        shutil.copy(world.root / "data/case/axial_002/image.png", result / "image.png")
    elif how == "other series":
        meta["series"] = "abcdefgh"
    elif how == "no series":
        del meta["series"]
    elif how == "no turn":
        del meta["turn"]
    elif how == "source gone":
        source.unlink()
    elif how == "another image":
        dataset = pydicom.dcmread(source)
        dataset.SOPInstanceUID = pydicom.uid.generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(source)
    elif how == "odd header":
        dataset = pydicom.dcmread(source)
        dataset.add_new("PixelPaddingValue", "US", [0, 1])
        dataset.save_as(source)
    elif how == "other offset":
        meta["value_offset"] += 1
    elif how == "truncated":
        source.write_bytes(source.read_bytes()[:1500])
    (result / "meta.json").write_text(json.dumps(meta))
    return {
        "not synthetic": "is no result of dataset_infer.py",
        "other series": "series abcdefgh is not in",
        "no series": "series: expected text, found nothing",
        "no turn": "turn: expected three times true or false, found nothing",
        "source gone": "its source does not exist any more",
        "another image": "is another image than the one that was imported",
        "odd header": "cannot be written with its source's header (TypeError)",
        "other offset": "of its pixels outside the soft mask are not those of its source",
        "truncated": "its source its pixels cannot be read",
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "not synthetic",
        "other series",
        "no series",
        "no turn",
        "source gone",
        "another image",
        "odd header",
        "other offset",
        "truncated",
    ],
)
def test_what_cannot_be_exported_is_rejected_by_name_and_the_rest_goes_on(world: World, how: str) -> None:
    affine = grid(AXIAL, SHAPE, SPACING)
    paths = write_series(world.root / "Erika Mustermann 1950", marked(SHAPE), affine)
    volume = volume_of(marked(SHAPE), affine, "axial")
    for index in (1, 2):
        world.import_and_inpaint(volume, "axial", index, paths)
    message = spoilt(world, how)
    assert world.export() == 3
    name, reason = rejected(world)
    assert name == "case/axial_002__v0"
    assert message in reason
    assert "Mustermann" not in (world.out / "rejects.json").read_text()
    assert (world.out / "case/axial_001__v0/image.dcm").exists()
    assert not (world.out / "case/axial_002__v0").exists()


def test_burned_in_annotation_is_rejected(world: World) -> None:
    paths = write_series(
        world.root / "s", marked(SHAPE), affine := grid(AXIAL, SHAPE, SPACING), BurnedInAnnotation="YES"
    )
    world.import_and_inpaint(volume_of(marked(SHAPE), affine, "axial"), "axial", 1, paths)
    with pytest.raises(MedSoftError, match="burned-in annotation"):
        world.export()


def test_paths_that_cannot_be_meant(world: World) -> None:
    made_result(world, "axial")
    mapping = (world.private / "mapping.json").read_text()
    (world.private / "mapping.json").write_text("[]")
    with pytest.raises(MedSoftError, match="expected a mapping with `series` and `instances`"):
        world.export()
    (world.private / "mapping.json").unlink()
    with pytest.raises(UsageError, match=r"--private .*mapping.json: does not exist"):
        world.export()
    (world.private / "mapping.json").write_text(mapping)
    with pytest.raises(UsageError, match=r"--key .*: does not exist"):
        world.export("--key", world.root / "no_key")
    with pytest.raises(UsageError, match=r"lies in .* or holds it"):
        world.export("--output_dir", world.root / "results" / "out")
    with pytest.raises(UsageError, match="belong to DICOM"):
        world.export("--format", "nifti", "--link_source")
    assert lesion_in((9, 9)).any()


def test_without_the_extra_one_line_says_how_to_install_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.volumes.volume.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[dicom\]'"):
        world.export()
