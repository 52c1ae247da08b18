"""Each faulty DICOM file or series is refused by name, in one line: the file, what was expected, what was found."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from ldm.core.errors import FileError, MedSoftError
from ldm.volumes import dicom_files
from ldm.volumes.dicom import find_series, only_series, read_series

SHAPE, SPACING = (10, 9, 8), (0.7, 0.8, 3.0)


def series(folder: Path, *, turn: float = 0, **options: Any) -> list[Path]:
    values = made.marked(SHAPE)
    return made.write_series(folder, values, made.grid(made.AXIAL, SHAPE, SPACING, turn), **options)


def at(frame: int, **elements: Any) -> Callable[[Dataset, int], None]:
    """A change of one frame."""

    def change(dataset: Dataset, number: int) -> None:
        if number == frame:
            for key, value in elements.items():
                setattr(dataset, key, value)

    return change


def refusal(path: Path) -> str:
    """The one line that reading ends in."""
    with pytest.raises(MedSoftError) as caught:
        read_series(find_series(path)[0][0])
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_a_file_that_is_not_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(FileError, match=r"a\.dcm: it is not a DICOM file"):
        find_series(tmp_path / "a.dcm")


def test_a_folder_goes_on_without_the_files_that_are_not_dicom(tmp_path: Path) -> None:
    series(tmp_path)
    (tmp_path / "a.dcm").write_bytes(b"PNG or so")
    (tmp_path / "empty").write_bytes(b"")
    found, rejects = find_series(tmp_path)
    assert len(found) == 1
    assert sorted(reject.path.name for reject in rejects) == ["a.dcm", "empty"]
    assert {reject.reason for reject in rejects} == {
        "it is not a DICOM file (no DICM at byte 128, and no image or object in it)"
    }


def test_a_folder_without_dicom_and_a_path_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileError, match="no DICOM image or object in it"):
        find_series(tmp_path)
    with pytest.raises(FileError, match="nowhere: it does not exist"):
        find_series(tmp_path / "nowhere")


@pytest.mark.parametrize("syntax", ["explicit", "rle", "j2k", "jpeg_ls", "jpeg_lossless"])
def test_a_truncated_file(tmp_path: Path, syntax: str) -> None:
    values = made.marked((40, 36, 3))
    path = made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), syntax=syntax)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - len(whole) // 3])
    assert "truncated" in refusal(tmp_path)
    assert path.name in refusal(tmp_path)


def test_a_decoder_that_crashes_is_one_line_and_the_next_series_is_read(tmp_path: Path) -> None:
    values = made.marked((40, 36, 3))
    paths = made.write_series(tmp_path / "bad", values, made.grid("LPH", values.shape, SPACING), syntax="jpeg_lossless")
    content = bytearray(paths[1].read_bytes())
    place = content.index(b"\xff\xc3")  # the frame header of a lossless JPEG; its precision follows
    content[place + 4] = 45  # GDCM does not survive that
    paths[1].write_bytes(content)
    assert f"{paths[1].name}: its pixels are damaged: GDCM, which decodes them, crashed" in refusal(tmp_path / "bad")
    made.write_series(tmp_path / "good", values, made.grid("LPH", values.shape, SPACING), syntax="jpeg_lossless")
    np.testing.assert_array_equal(read_series(find_series(tmp_path / "good")[0][0]).values, values)


def test_a_file_that_ends_in_its_header(tmp_path: Path) -> None:
    path = series(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:700])
    found, rejects = find_series(tmp_path)
    kinds = {each.kind.partition(" (")[0] for each in found}
    assert [reject.path for reject in rejects] == [path] or kinds == {"image", "object without pixels"}


def test_an_image_without_pixels(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        if frame == 3:
            del dataset.PixelData

    series(tmp_path, change=change)
    assert "it has no pixels (no Pixel Data element)" in refusal(tmp_path)


def test_an_object_without_an_image(tmp_path: Path) -> None:
    path = Path(get_testdata_file("rtplan.dcm"))
    assert "this is no image but: object without pixels (RT Plan Storage)" in refusal(path)
    with pytest.raises(FileError, match="there is no image series in it, only: object without pixels"):
        only_series(find_series(path)[0], path)


def test_a_transfer_syntax_that_nothing_decodes(tmp_path: Path) -> None:
    for path in series(tmp_path, syntax="explicit"):
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
        dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path)
    text = refusal(tmp_path)
    assert f"unknown transfer syntax {pydicom.uid.MPEG4HP41.name} (1.2.840.10008.1.2.4.102)" in text
    assert "gdcmconv --raw" in text


def test_12_bit_jpeg_names_the_package_that_decodes_it_and_its_licence(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))
    dataset.SOPClassUID = made.SOP_CLASSES["CR"]
    dataset.Modality = "CR"
    dataset.save_as(tmp_path / "film.dcm")
    text = refusal(tmp_path / "film.dcm")
    assert "only pylibjpeg-libjpeg decodes it, whose licence is the GPL" in text
    assert "pip install pylibjpeg-libjpeg" in text


def test_a_decoder_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        is_available = False
        missing_dependencies = ("pyjpegls - requires pyjpegls>=1.2",)

    values = made.marked((40, 36, 2))
    made.write_series(tmp_path, values, made.grid("LPH", values.shape, SPACING), syntax="jpeg_ls")
    monkeypatch.setattr(dicom_files, "get_decoder", lambda uid: Missing)
    assert "JPEG-LS Lossless Image Compression (1.2.840.10008.1.2.4.80): the package" in refusal(tmp_path)
    assert "pyjpegls - requires pyjpegls>=1.2" in refusal(tmp_path)


@pytest.mark.parametrize("colours", ["RGB", "PALETTE COLOR", "YBR_FULL"])
def test_a_colour_image(tmp_path: Path, colours: str) -> None:
    series(tmp_path, change=at(2, PhotometricInterpretation=colours))
    assert f"a colour image ({colours}); expected grey values" in refusal(tmp_path)


def test_screenshots_are_named_as_what_they_are() -> None:
    path = Path(get_testdata_file("SC_rgb_rle.dcm"))
    assert "this is no image but: secondary capture; expected slices or a radiograph" in refusal(path)


def test_a_multi_frame_image_without_geometry(tmp_path: Path) -> None:
    def change(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence

    values = made.marked(SHAPE)
    path = made.write_multiframe(tmp_path / "m.dcm", values, made.grid("LPH", SHAPE, SPACING), change=change)
    assert "a multi-frame image without geometry (no ImageOrientationPatient)" in refusal(path)


def test_a_multi_frame_radiograph_is_not_a_projection(tmp_path: Path) -> None:
    def change(dataset: Dataset) -> None:
        del dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence
        dataset.Modality = "XA"

    values = made.marked(SHAPE)
    path = made.write_multiframe(tmp_path / "m.dcm", values, made.grid("LPH", SHAPE, SPACING), change=change)
    assert "a multi-frame image without geometry" in refusal(path)


def test_a_slice_without_a_place_in_the_patient(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        del dataset.ImagePositionPatient

    series(tmp_path, change=change)
    assert "an image of modality CT without geometry (no ImagePositionPatient)" in refusal(tmp_path)


@pytest.mark.parametrize("spacing", [["0", "0.8"], ["0.000", "0.000"], ["-1", "1"]])
def test_pixel_spacing_0(tmp_path: Path, spacing: list[str]) -> None:
    series(tmp_path, PixelSpacing=spacing)
    rows, columns = map(float, spacing)
    assert f"PixelSpacing is {rows:g}\\{columns:g}; expected two lengths above 0 mm" in refusal(tmp_path)


@pytest.mark.parametrize(("centers", "widths"), [(["40", "300"], "300"), ("40", ["300", "1500"])])
def test_windows_whose_centers_and_widths_are_not_as_many(tmp_path: Path, centers: Any, widths: Any) -> None:
    series(tmp_path, change=at(1, WindowCenter=centers, WindowWidth=widths))
    counts = (len(each) if isinstance(each, list) else 1 for each in (centers, widths))
    said = "WindowCenter has {} values, WindowWidth {}; expected as many".format(*counts)
    assert said in refusal(tmp_path)


def test_slices_without_pixel_spacing(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        del dataset.PixelSpacing

    series(tmp_path, change=change)
    assert "it has no PixelSpacing" in refusal(tmp_path)


def test_directions_that_are_no_directions(tmp_path: Path) -> None:
    series(tmp_path, ImageOrientationPatient=["1", "0", "0", "1", "0", "0"])
    assert "expected two unit vectors at right angles" in refusal(tmp_path)


def test_a_rescale_slope_of_0(tmp_path: Path) -> None:
    series(tmp_path, RescaleSlope="0")
    assert "RescaleSlope is 0" in refusal(tmp_path)


@pytest.mark.parametrize("frame", [1, 3, 6])
def test_a_missing_slice_and_where_it_is_missing(tmp_path: Path, frame: int) -> None:
    paths = series(tmp_path, change=lambda dataset, number: number != frame)
    text = refusal(tmp_path)
    z = made.grid(made.AXIAL, SHAPE, SPACING)[2, 3] + 3 * frame
    assert f"a slice is missing at -3.15, -3.2, {z:.4g} mm (left, posterior, head)" in text
    assert f"between {paths[frame - 1].name} and {paths[frame].name}: they lie 6 mm apart, the others 3 mm" in text


def test_several_missing_slices(tmp_path: Path) -> None:
    series(tmp_path, change=lambda dataset, number: number not in (3, 4))
    assert "2 slices are missing at" in refusal(tmp_path)


def test_uneven_steps(tmp_path: Path) -> None:
    series(tmp_path, change=at(4, ImagePositionPatient=["-3.15", "-3.2", "2.5"]))
    assert "its slices lie at uneven steps of 2 to 4 mm" in refusal(tmp_path)


def test_positions_rounded_to_a_tenth_of_a_mm_are_even(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        dataset.ImagePositionPatient = [f"{float(x):.1f}" for x in dataset.ImagePositionPatient]

    values = made.marked(SHAPE)
    made.write_series(tmp_path, values, made.grid("LPH", SHAPE, (1, 1, 0.625)), change=change)
    assert read_series(find_series(tmp_path)[0][0]).spacing[2] == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize("degrees", [1.0, 10.0, -15.0])
def test_a_gantry_tilt(tmp_path: Path, degrees: float) -> None:
    values = made.marked(SHAPE)
    affine = made.grid(made.AXIAL, SHAPE, SPACING)
    affine[1, 2] = 3 * np.tan(np.deg2rad(degrees))
    made.write_series(tmp_path, values, affine)
    assert f"a gantry tilt: the way from slice to slice is {abs(degrees):.1f} degrees off" in refusal(tmp_path)


def test_slices_shifted_sideways(tmp_path: Path) -> None:
    series(tmp_path, change=at(4, ImagePositionPatient=["-1.15", "-3.2", "1.5"]))
    assert "its slices are shifted sideways by up to 2 mm" in refusal(tmp_path)


def test_a_localizer_among_the_slices(tmp_path: Path) -> None:
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    orientation = ["0", "1", "0", "0", "0", "-1"]
    paths = series(tmp_path, change=at(0, ImageOrientationPatient=orientation, ImageType=scout))
    text = refusal(tmp_path)
    assert "1 of 8 frames lie in another orientation than the others" in text
    assert f"the first is {paths[0].name}; is a localizer mixed in?" in text


def test_a_duplicate_slice(tmp_path: Path) -> None:
    paths = series(tmp_path)
    shutil.copy(paths[2], tmp_path / "copy.dcm")
    text = refusal(tmp_path)
    assert "two slices at one place, -3.15, -3.2, -4.5 mm" in text
    assert "copy.dcm" in text
    assert paths[2].name in text


def test_several_time_points_in_one_multi_frame_image(tmp_path: Path) -> None:
    def per_frame(groups: Dataset, frame: int) -> None:
        if frame == 5:
            groups.PlanePositionSequence[0].ImagePositionPatient = ["-3.15", "-3.2", "1.5"]

    values = made.marked(SHAPE)
    path = made.write_multiframe(tmp_path / "m.dcm", values, made.grid("LPH", SHAPE, SPACING), per_frame=per_frame)
    text = refusal(path)
    assert "two slices at one place" in text
    assert "frame 4 of m.dcm" in text or "frame 6 of m.dcm" in text


def test_another_size_in_one_series(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        if frame == 5:
            made.set_pixels(dataset, np.zeros((4, 6), np.int16))

    paths = series(tmp_path, change=change)
    assert f"{paths[5].name} has 4 x 6 pixels, the others 9 x 10" in refusal(tmp_path)


def test_another_spacing_in_one_series(tmp_path: Path) -> None:
    paths = series(tmp_path, change=at(5, PixelSpacing=["1", "1"]))
    assert f"{paths[5].name} has a PixelSpacing of 1, 1 mm" in refusal(tmp_path)


def test_both_monochromes_in_one_series(tmp_path: Path) -> None:
    series(tmp_path, change=at(5, PhotometricInterpretation="MONOCHROME1"))
    assert "MONOCHROME1 and MONOCHROME2 in one series" in refusal(tmp_path)


def test_burned_in_text(tmp_path: Path) -> None:
    paths = series(tmp_path, change=at(5, BurnedInAnnotation="YES"))
    assert f"{paths[5].name}: BurnedInAnnotation is YES" in refusal(tmp_path)
    shutil.rmtree(tmp_path)
    series(tmp_path, BurnedInAnnotation="NO")
    assert read_series(find_series(tmp_path)[0][0]).values.shape == SHAPE


def test_a_damaged_modality_lut(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        lut = made.item(ModalityLUTType="OD")
        lut.add_new("LUTDescriptor", "US", [4096, 0, 16])
        lut.add_new("LUTData", "US", [1, 2, 3])
        dataset.ModalityLUTSequence = [lut]

    series(tmp_path, change=change)
    assert "its modality LUT has 3 entries; its descriptor says 4096" in refusal(tmp_path)


def test_a_header_that_holds_no_numbers(tmp_path: Path) -> None:
    path = series(tmp_path)[3]
    path.write_bytes(path.read_bytes().replace(b"-1024 ", b"minus1"))
    assert f"{path.name}: its header is damaged" in refusal(tmp_path)


def test_pixels_that_are_no_finite_numbers(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        for key in ("PixelData", "PixelRepresentation", "BitsStored", "HighBit"):
            del dataset[key]
        dataset.BitsAllocated = 32
        dataset.FloatPixelData = np.full(SHAPE[:2], np.nan, np.float32).tobytes()

    series(tmp_path, change=change)
    assert "values that are no finite numbers" in refusal(tmp_path)
