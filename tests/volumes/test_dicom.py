"""DICOM series into volumes: equal to SimpleITK's, in the order of their positions, with the real values kept."""

import tracemalloc
from pathlib import Path
from typing import Any

import made
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.pixels import apply_modality_lut
from pydicom.uid import generate_uid

from ldm.core.errors import MedSoftError, UsageError
from ldm.volumes.dicom import Series, find_series, named, only_series, read_series
from ldm.volumes.volume import Volume, cut, orient

REAL = Path(__file__).parents[2].parent / "shared/real"
SPACING = (0.7, 0.8, 3.0)


def only(path: Path) -> Series:
    series, rejects = find_series(path)
    assert (len(series), rejects) == (1, [])
    return series[0]


def read(path: Path) -> Volume:
    return read_series(only(path))


def real(volume: Volume) -> np.ndarray:
    return volume.offset + volume.scale * volume.values


def by_simpleitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Real values (I, J, K) and affine as SimpleITK reads them."""
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, affine


SOUND: dict[str, dict[str, Any]] = {
    "axial": {},
    "sagittal": {"axes": made.SAGITTAL},
    "coronal": {"axes": made.CORONAL},
    "oblique": {"turn": 17},
    "implicit": {"syntax": "implicit"},
    "deflated": {"syntax": "deflated"},
    "rle": {"syntax": "rle"},
    "j2k": {"syntax": "j2k"},
    "jpeg_ls": {"syntax": "jpeg_ls"},
    "jpeg_lossless": {"syntax": "jpeg_lossless"},
    "signed": {"below": 2000},
    "slope": {"RescaleSlope": "3.774", "RescaleIntercept": "-17.5"},
    "windows": {"WindowCenter": ["40", "300"], "WindowWidth": ["300", "1500"]},
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_series_equal_simpleitk(tmp_path: Path, name: str) -> None:
    options = dict(SOUND[name])
    values = made.marked() - np.int16(options.pop("below", 0))
    affine = made.grid(options.pop("axes", made.AXIAL), values.shape, SPACING, options.pop("turn", 0))
    made.write_series(tmp_path, values, affine, **options)
    volume = read(tmp_path)
    expected, placed = by_simpleitk(tmp_path)
    assert np.abs(real(volume) - expected).max() == 0.0
    np.testing.assert_allclose(volume.affine, placed, atol=1e-6)


@pytest.mark.skipif(not REAL.exists(), reason="the real images are not here")
def test_a_real_series_equals_simpleitk() -> None:
    volume = read(REAL / "ct_series")
    expected, placed = by_simpleitk(REAL / "ct_series")
    assert np.abs(real(volume) - expected).max() == 0.0
    np.testing.assert_allclose(volume.affine, placed, atol=1e-4)
    assert (volume.unit, volume.acquired) == ("HU", "axial")
    assert all(volume.source["sop_uids"])


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_48_orientations_come_out_the_same_way_up(tmp_path: Path, axes: str) -> None:
    base = made.marked((6, 5, 4))
    values, affine = made.turned(base, made.grid("LPH", base.shape, SPACING), axes)
    paths = made.write_series(tmp_path, values, affine)
    volume = read(tmp_path)
    np.testing.assert_array_equal(orient(volume).values, base)
    view = cut(volume, volume.acquired, 1)
    assert view.acquired
    frame = pydicom.dcmread(volume.source["paths"][view.frame])
    assert str(frame.SOPInstanceUID) == volume.source["sop_uids"][view.frame]
    assert Path(volume.source["paths"][view.frame]) in paths
    transpose, rows, columns = view.turn
    stored = frame.pixel_array.T if transpose else frame.pixel_array
    np.testing.assert_array_equal(stored[:: -1 if rows else 1, :: -1 if columns else 1], view.pixels)


def test_positions_decide_not_names_numbers_or_spacing_between_slices(tmp_path: Path) -> None:
    values = made.marked()
    affine = made.grid(made.AXIAL, values.shape, SPACING)
    paths = made.write_series(tmp_path, values, affine, SpacingBetweenSlices="5")
    assert paths != sorted(paths)
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.source["paths"] == [str(path) for path in paths]


def test_what_a_volume_says_of_its_making_is_a_white_list(tmp_path: Path) -> None:
    values = made.marked((4, 5, 3))
    made.write_series(
        tmp_path,
        values,
        made.grid("LPH", values.shape, SPACING),
        WindowCenter=["40", "300"],
        WindowWidth=["301", "1500"],
    )
    volume = read(tmp_path)
    assert volume.header == {
        "modality": "CT",
        "manufacturer": "Maker",
        "model": "Model 1",
        "kvp": 120.0,
        "slice_thickness_mm": 3.0,
        "body_part": "SPINE",
        "year": 2023,
    }
    assert volume.windows == ((-110.5, 189.5), (-450.0, 1049.0))
    assert (volume.offset, volume.scale, volume.unit) == (-1024, 1, "HU")
    assert volume.source["patient_id"] == "P-4711"
    assert volume.source["key"] == volume.source["series_uid"]
    assert (volume.rounded, volume.notes, volume.low_is_white) == (False, (), False)


@pytest.mark.parametrize("missing", ["RescaleSlope", "RescaleIntercept"])
def test_ct_without_slope_or_intercept_has_no_unit_and_it_is_said(tmp_path: Path, missing: str) -> None:
    values = made.marked((4, 5, 3))
    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), **{missing: None})
    volume = read(tmp_path)
    assert volume.unit is None
    assert "not taken for HU" in volume.notes[0]


def test_mr_has_no_unit_and_names_its_sequence(tmp_path: Path) -> None:
    values = made.marked((4, 5, 3))
    made.write_series(tmp_path, values, made.grid(made.SAGITTAL, values.shape, SPACING), modality="MR")
    volume = read(tmp_path)
    assert (volume.unit, volume.header["sequence"], volume.acquired) == (None, "SE", "sagittal")


def test_monochrome1_stays_as_stored_and_is_said(tmp_path: Path) -> None:
    values = made.marked((4, 5, 3))
    affine = made.grid("LPH", values.shape, SPACING)
    made.write_series(tmp_path, values, affine, PhotometricInterpretation="MONOCHROME1")
    volume = read(tmp_path)
    assert volume.low_is_white
    np.testing.assert_array_equal(volume.values, values)


def test_a_modality_lut_replaces_slope_and_intercept(tmp_path: Path) -> None:
    values = (made.marked((4, 5, 3)) % 40).astype(np.uint16)
    table = np.random.default_rng(2).integers(0, 60000, 30).astype(np.uint16)  # begins at 5, and is shorter

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            del dataset[key]
        lut = made.item(ModalityLUTType="OD")
        lut.add_new("LUTDescriptor", "US", [len(table), 5, 16])
        lut.add_new("LUTData", "US", table.tolist())
        dataset.ModalityLUTSequence = [lut]

    paths = made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), change=change)
    volume = read(tmp_path)
    assert (volume.offset, volume.scale) == (0, 1)
    for frame, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        np.testing.assert_array_equal(volume.values[:, :, frame].T, apply_modality_lut(dataset.pixel_array, dataset))


def test_slopes_that_differ_come_to_one_scale_exactly_where_16_bits_are_enough(tmp_path: Path) -> None:
    values = made.marked((6, 5, 4))
    slopes, intercepts = ["0.5", "1.25", "2", "0.75"], ["-10", "0", "5.5", "100"]

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slopes[frame], intercepts[frame]

    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), change=change)
    volume = read(tmp_path)
    expected = values * np.array(slopes, float) + np.array(intercepts, float)
    assert np.abs(real(volume) - expected).max() == 0.0
    assert (volume.values.dtype, volume.scale, volume.rounded) == (np.uint16, 0.25, False)
    assert volume.notes == ("slopes differ between slices: values are brought to one scale",)


def test_slopes_that_do_not_fit_are_rounded_to_16_bits_and_it_is_said(tmp_path: Path) -> None:
    values = made.marked((6, 5, 4))
    slopes = ["0.518273645", "1.2390817", "2.71828182845", "0.33333333"]
    affine = made.grid("LPH", values.shape, SPACING)
    made.write_series(
        tmp_path, values, affine, change=lambda dataset, frame: setattr(dataset, "RescaleSlope", slopes[frame])
    )
    volume = read(tmp_path)
    expected = values * np.array(slopes, float) - 1024
    assert np.abs(real(volume) - expected).max() <= volume.scale / 2 * 1.001
    assert volume.scale == pytest.approx((expected.max() - expected.min()) / 65535)
    assert volume.rounded
    assert volume.notes == ("slopes differ between slices: values are brought to one scale, rounded",)


@pytest.mark.parametrize("syntax", ["explicit", "j2k", "rle"])
def test_a_multi_frame_image_is_ordered_by_its_functional_groups(tmp_path: Path, syntax: str) -> None:
    values = made.marked()
    affine = made.grid(made.SAGITTAL, values.shape, SPACING, turn=5)
    path = made.write_multiframe(tmp_path / "enhanced.dcm", values, affine, syntax=syntax)
    volume = read(path)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.acquired == "sagittal"
    assert sorted(volume.source["frames"]) == list(range(1, 9))
    frames = pydicom.dcmread(path).pixel_array
    for place, number in enumerate(volume.source["frames"]):
        np.testing.assert_array_equal(frames[number - 1], values[:, :, place].T)


def test_a_multi_frame_image_has_slopes_and_windows_in_its_functional_groups(tmp_path: Path) -> None:
    values = made.marked((6, 5, 4))

    def per_frame(groups: pydicom.Dataset, frame: int) -> None:
        rescale = made.item(RescaleSlope=str(frame + 1), RescaleIntercept="-1000", RescaleType="HU")
        groups.PixelValueTransformationSequence = [rescale]
        groups.FrameVOILUTSequence = [made.item(WindowCenter="50", WindowWidth="101")]

    affine = made.grid("LPH", values.shape, SPACING)
    path = made.write_multiframe(tmp_path / "enhanced.dcm", values, affine, modality="CT", per_frame=per_frame)
    volume = read(path)
    np.testing.assert_array_equal(real(volume), values * np.arange(1.0, 5) - 1000)
    assert (volume.unit, volume.windows) == ("HU", ((-0.5, 99.5),))


def test_float_pixel_data_is_rounded_to_16_bits(tmp_path: Path) -> None:
    values = made.marked((6, 5, 4))
    floats = values.T.astype(np.float32) / 7

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("PixelData", "PixelRepresentation", "BitsStored", "HighBit"):
            del dataset[key]
        dataset.BitsAllocated = 32
        dataset.FloatPixelData = floats[frame].tobytes()

    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), change=change)
    volume = read(tmp_path)
    assert volume.rounded
    assert volume.notes == ("real values are rounded to 16 bits",)
    np.testing.assert_allclose(real(volume), floats.T.astype(float) - 1024, atol=volume.scale / 2 * 1.01)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(None, lambda x: x), ("L\\F", lambda x: x), ("R\\H", lambda x: x[::-1, ::-1]), ("A\\F", lambda x: x[:, ::-1])],
)
def test_radiographs_are_projections_turned_head_up(tmp_path: Path, orientation: str | None, turned: Any) -> None:
    values = made.marked((6, 5, 2))

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            del dataset[key]
        if orientation:
            dataset.PatientOrientation = orientation

    affine = made.grid("LPH", values.shape, SPACING)
    paths = made.write_series(tmp_path, values, affine, modality="DX", change=change, ImagerPixelSpacing=["0.2", "0.3"])
    series, _ = find_series(tmp_path)
    assert [each.files for each in series] == [(path,) for path in sorted(paths)]  # each is a volume of its own
    volume = read(paths[1])
    view = cut(volume, "projection", 0)
    np.testing.assert_array_equal(view.pixels, turned(values[:, :, 1].T))
    assert (view.spacing, volume.acquired, view.acquired) == ((0.2, 0.3), "projection", True)
    assert len({read_series(each).source["key"] for each in series}) == 2


def test_a_radiograph_without_spacing_is_uncalibrated(tmp_path: Path) -> None:
    values = made.marked((6, 5, 1))

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        for key in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            del dataset[key]

    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), modality="CR", change=change)
    assert cut(read(tmp_path), "projection", 0).spacing is None


def test_empty_uids_are_taken_from_the_files_meta_information(tmp_path: Path) -> None:
    values = made.marked((4, 5, 2))
    paths = made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING))
    uids = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        uids.append(str(dataset.SOPInstanceUID))
        dataset.SOPInstanceUID = dataset.SOPClassUID = ""
        dataset.save_as(path)
    assert read(tmp_path).source["sop_uids"] == uids


def test_files_without_preamble_are_read(tmp_path: Path) -> None:
    values = made.marked((4, 5, 2))
    for path in made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), syntax="implicit"):
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(read(tmp_path).values, values)


def test_series_are_found_at_any_depth_and_other_objects_are_named(tmp_path: Path) -> None:
    spine = made.spine()
    slices = made.write_spine(tmp_path / "a" / "b", spine, SeriesNumber=7, SeriesDescription="bone")
    other = made.marked((4, 5, 3))
    made.write_series(tmp_path / "c", other, made.grid("LPH", other.shape, SPACING), SeriesNumber=8)
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    made.write_series(tmp_path / "d", other, made.grid("LPH", other.shape, SPACING), ImageType=scout)
    made.write_seg(tmp_path / "seg.dcm", slices, {"L2": spine.lesion})
    made.write_rtstruct(tmp_path / "rt.dcm", slices, {"L2": spine.lesion})
    (tmp_path / "notes.txt").write_text("not DICOM, and no name that says so")
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "DICOMDIR").write_bytes(b"x")
    series, rejects = find_series(tmp_path)
    assert rejects == []
    found = {each.kind: each for each in series if each.number != 8}
    assert set(found) == {"image", "localizer", "segmentation", "structure set"}
    assert sorted(found["image"].files) == sorted(slices)
    assert (found["image"].frames, found["image"].modality, found["image"].description) == (60, "CT", "bone")
    assert len(find_series(tmp_path / "DICOMDIR")[0]) == 5

    for wanted in ("7", "BON", found["image"].uid):
        assert named(series, wanted) == [found["image"]]
    assert named(series, "99") == []
    with pytest.raises(UsageError, match=r"2 image series, expected one; put the files of one .*\n.*7: 60 slices, CT"):
        only_series(series, tmp_path)


def test_finding_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = made.marked((4, 5, 3))
    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING))
    calls = []
    original = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **more: calls.append(more) or original(*args, **more))
    find_series(tmp_path)
    assert [call["stop_before_pixels"] for call in calls] == [True] * 3


@pytest.mark.parametrize("differing", [False, True])
def test_a_series_is_read_in_little_more_memory_than_it_has(tmp_path: Path, differing: bool) -> None:
    values = made.marked((160, 160, 40))

    def change(dataset: pydicom.Dataset, frame: int) -> None:
        dataset.RescaleSlope = str(1 + differing * frame)

    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), change=change)
    series = only(tmp_path)
    tracemalloc.start()
    try:
        read_series(series)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (3 if differing else 2) * values.nbytes


def test_every_image_that_comes_with_pydicom_is_read_or_refused_in_one_line() -> None:
    root = Path(pydicom.__file__).parent / "data"
    files = [*root.rglob("*.dcm"), *(root / "test_files" / "dicomdirtests" / "77654033").rglob("*")]
    names, refusals = set(), []
    for path in filter(Path.is_file, files):
        try:
            names.add(path.name if read(path).values.size else "")
        except MedSoftError as error:
            refusals.append((path, str(error)))
    assert all("\n" not in text and text.startswith(str(path)) for path, text in refusals)
    assert {"CT_small.dcm", "MR_small_RLE.dcm", "693_J2KI.dcm", "MR_small_jpeg_ls_lossless.dcm", "6154"} <= names
    assert len(names) > 15


def test_two_series_of_one_uid_in_two_folders_are_one(tmp_path: Path) -> None:
    values = made.marked((4, 5, 6))
    affine = made.grid("LPH", values.shape, SPACING)
    uid = generate_uid()
    made.write_series(tmp_path / "a", values[:, :, :3], affine, SeriesInstanceUID=uid)
    affine[:3, 3] += 3 * affine[:3, 2]
    made.write_series(tmp_path / "b", values[:, :, 3:], affine, SeriesInstanceUID=uid)
    np.testing.assert_array_equal(read(tmp_path).values, values)
