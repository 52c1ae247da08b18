"""Labels and lesions from NIfTI, SEG, RTSTRUCT and folders: equal to what was written; what does not fit is refused."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from made import ORIENTATIONS, SAGITTAL, Spine, grid, spine, turned, write_nifti, write_rtstruct, write_seg, write_spine
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from ldm.core.errors import FileError, MedSoftError
from ldm.volumes.dicom import find_series, read_series
from ldm.volumes.labels import PRESETS, Scheme, scheme
from ldm.volumes.segmentations import RESAMPLED, read_labels, read_lesions, references
from ldm.volumes.volume import Volume

TOTAL = PRESETS["totalsegmentator"]
NAMES = {29: "L3", 30: "L2", 31: "L1", 79: "canal"}


class Case:
    """A CT series of the made spine, and its volume."""

    def __init__(self, folder: Path, made: Spine) -> None:
        self.made, self.folder = made, folder
        self.files = write_spine(folder / "ct", made)
        self.volume = read_series(find_series(folder / "ct")[0][0])

    def named(self) -> dict[str, np.ndarray]:
        return {name: self.made.labels == number for number, name in NAMES.items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), spine((32, 48, 52), (1.9, 1.5, 1.2)))


def segmentation(
    path: Path,
    files: list[Path],
    masks: Mapping[str, np.ndarray],
    kind: str = "BINARY",
    change: Callable[[pydicom.Dataset], Any] | None = None,
    descriptions: Mapping[str, str] | None = None,
) -> Path:
    """A SEG of anatomical structures, except for those named a lesion."""
    described = [
        highdicom.seg.SegmentDescription(
            number,
            name,
            codes.SCT.MorphologicallyAbnormalStructure if "lesion" in name else codes.SCT.AnatomicalStructure,
            codes.SCT.Lesion if "lesion" in name else codes.SCT.Vertebra,
            highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks, 1)
    ]
    stack = np.stack([mask.T for mask in masks.values()], -1)
    if kind == "LABELMAP":
        pixels = (stack.argmax(-1) + 1) * stack.any(-1)
    else:
        pixels = stack
    images = [pydicom.dcmread(file) for file in files]
    if change is not None:
        for image in images:
            change(image)
    made = highdicom.seg.Segmentation(
        images,
        pixels.astype(np.float32 if kind == "FRACTIONAL" else np.uint8),
        kind,
        described,
        generate_uid(),
        9,
        generate_uid(),
        1,
        "Maker",
        "Model",
        "1",
        "1",
    )
    for item in made.SegmentSequence:
        if text := (descriptions or {}).get(item.SegmentLabel):
            item.SegmentDescription = text
    made.save_as(path)
    return path


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.array_equal(found, expected)


def named_masks(labels: Any) -> dict[str, np.ndarray]:
    return {name: labels.values == number for number, name in labels.structures.items()}


@pytest.mark.parametrize("axes", ORIENTATIONS[::7])
def test_a_label_map_of_any_orientation_lies_on_the_image(case: Case, tmp_path: Path, axes: str) -> None:
    path = write_nifti(tmp_path / "labels.nii.gz", *turned(case.made.labels, case.made.affine, axes))
    found = read_labels(path, case.volume, TOTAL)
    assert same(found.values, case.made.labels)
    assert found.structures == NAMES
    assert found.notes == ()
    # Independently: nibabel's canonical array of the file, in the axes of the series (left, posterior, head).
    canonical = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    assert same(found.values, canonical[::-1, ::-1])


def test_other_numbers_of_a_known_preset_are_left_out(case: Case, tmp_path: Path) -> None:
    values = case.made.labels.copy()
    values[:2] = 5  # the liver
    found = read_labels(write_nifti(tmp_path / "labels.nii", values, case.made.affine), case.volume, TOTAL)
    assert same(found.values, np.where(values == 5, 0, values))
    assert found.structures == NAMES


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_the_segments_of_a_seg_by_their_names(case: Case, tmp_path: Path, kind: str) -> None:
    path = segmentation(tmp_path / "seg.dcm", case.files, case.named(), kind)
    found = read_labels(path, case.volume)
    assert {*found.structures.values()} == {*NAMES.values()}
    for name, mask in case.named().items():
        assert same(named_masks(found)[name], mask), name
    assert ("fractional segments are cut at 0.5" in found.notes) == (kind == "FRACTIONAL")
    whole = highdicom.seg.segread(path).get_volume(combine_segments=kind != "FRACTIONAL", dtype=None)
    assert np.count_nonzero(found.values) == np.count_nonzero(whole.array)


def test_a_seg_with_structures_and_lesions_gives_each_to_its_reader(case: Case, tmp_path: Path) -> None:
    masks = {"vertebra L2": case.made.labels == 30, "lytic lesion": case.made.lesion, "Aorta": case.made.labels == 79}
    path = segmentation(
        tmp_path / "seg.dcm",
        case.files,
        masks,
        descriptions={"lytic lesion": "moderate lytic lesion of the L2 vertebra"},
    )
    labels = read_labels(path, case.volume)
    assert {*labels.structures.values()} == {"L2"}
    assert labels.notes == ("2 segments are no part of the spine and left out",)
    assert labels.lesions == ("lytic lesion",)
    (lesion,) = read_lesions(path, case.volume)
    assert same(lesion.mask, case.made.lesion)
    assert (lesion.name, lesion.description) == ("lytic lesion", "moderate lytic lesion of the L2 vertebra")
    assert references(path) == {case.volume.source["series_uid"]}


def test_a_seg_on_some_of_the_images_whose_header_contradicts_their_positions(case: Case, tmp_path: Path) -> None:
    def lie(image: pydicom.Dataset) -> None:
        image.SpacingBetweenSlices = "5.0"

    part = slice(20, 30)
    path = segmentation(tmp_path / "seg.dcm", case.files[part], {"lesion": case.made.lesion[..., part]}, change=lie)
    expected = np.zeros_like(case.made.lesion)
    expected[..., part] = case.made.lesion[..., part]
    assert same(read_lesions(path, case.volume)[0].mask, expected)
    one = case.made.lesion.any(axis=(0, 1)).argmax() + 2
    path = segmentation(
        tmp_path / "one.dcm", case.files[one : one + 1], {"lesion": case.made.lesion[..., one : one + 1]}
    )
    (lesion,) = read_lesions(path, case.volume)
    assert lesion.mask.any(axis=(0, 1)).nonzero()[0].tolist() == [one]
    assert same(lesion.mask[..., one], case.made.lesion[..., one])


def test_an_rtstruct_with_a_hole(case: Case, tmp_path: Path) -> None:
    ring = case.made.lesion.copy()
    rows, columns, slices = (each[len(each) // 2] for each in np.nonzero(case.made.lesion))
    ring[rows, columns, slices] = False
    path = write_rtstruct(tmp_path / "rt.dcm", case.files, {**case.named(), "GTV lesion": ring})
    labels = read_labels(path, case.volume)
    for name, mask in case.named().items():
        assert same(named_masks(labels)[name], mask), name
    (lesion,) = read_lesions(path, case.volume)
    assert same(lesion.mask, ring)
    assert lesion.name == "GTV lesion"


def test_a_sagittal_series(tmp_path: Path, case: Case) -> None:
    made = case.made
    image, affine = turned(made.image, made.affine, SAGITTAL)
    labels, _ = turned(made.labels, made.affine, SAGITTAL)
    lesion, _ = turned(made.lesion, made.affine, SAGITTAL)
    sagittal = Case(tmp_path, Spine(image, labels, lesion, affine))
    write_nifti(tmp_path / "labels.nii.gz", made.labels, made.affine)
    assert same(read_labels(tmp_path / "labels.nii.gz", sagittal.volume, TOTAL).values, labels)
    for path in (
        write_seg(tmp_path / "seg.dcm", sagittal.files, {"lesion": lesion}),
        write_rtstruct(tmp_path / "rt.dcm", sagittal.files, {"lesion": lesion}),
    ):
        assert same(read_lesions(path, sagittal.volume)[0].mask, lesion)


def test_labels_of_another_grid_are_resampled_and_it_is_said(case: Case, tmp_path: Path) -> None:
    fine = spine((58, 90, 78), (1.04, 0.8, 0.8))
    path = write_nifti(tmp_path / "labels.nii.gz", fine.labels, fine.affine)
    found = read_labels(path, case.volume, TOTAL)
    assert found.notes == (f"labels {RESAMPLED}",)
    for number in (29, 30, 31):
        mask, truth = found.values == number, case.made.labels == number
        assert 2 * np.count_nonzero(mask & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth)) > 0.95
    (lesion,) = read_lesions(
        write_nifti(tmp_path / "lesion.nii", fine.lesion.astype(np.uint8), fine.affine), case.volume
    )
    assert lesion.notes == (f"lesion {RESAMPLED}",)


def test_a_folder_of_one_mask_a_structure(case: Case, tmp_path: Path) -> None:
    for name, mask in {**case.named(), "liver": case.made.labels == 0}.items():
        file = {"canal": "spinal_cord", "liver": "liver"}.get(name, f"vertebrae_{name}")
        write_nifti(tmp_path / f"{file}.nii.gz", mask.astype(np.uint8), case.made.affine)
    found = read_labels(tmp_path, case.volume)
    for name, mask in case.named().items():
        assert same(named_masks(found)[name], mask), name
    assert found.notes == ("1 segment is no part of the spine and left out",)


def test_the_segments_that_slicer_names(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "made.seg.nrrd"
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": case.made.affine[:3, :3].T,
        "space origin": case.made.affine[:3, 3],
    }
    for place, (number, name) in enumerate({29: "L3 vertebra", 30: "Segment_2", 31: "liver"}.items()):
        header |= {f"Segment{place}_LabelValue": str(number), f"Segment{place}_Name": name}
    nrrd.write(str(path), case.made.labels, header)
    found = read_labels(path, case.volume)
    assert {name: np.count_nonzero(mask) for name, mask in named_masks(found).items()} == {
        "L3": np.count_nonzero(case.made.labels == 29)
    }
    assert {*read_labels(path, case.volume, TOTAL).structures.values()} == {"L3", "L2", "L1"}  # by number where unnamed
    header["Segment1_Name"] = "small lytic lesion"
    nrrd.write(str(path), case.made.labels, header)
    (lesion,) = read_lesions(path, case.volume)
    assert same(lesion.mask, case.made.labels == 30)
    assert lesion.description == "small lytic lesion"


def test_segments_that_share_voxels_are_said(case: Case, tmp_path: Path) -> None:
    masks = {"L2": case.made.labels == 30, "L3": (case.made.labels == 29) | case.made.lesion}
    found = read_labels(segmentation(tmp_path / "seg.dcm", case.files, masks), case.volume)
    assert same(named_masks(found)["L2"], masks["L2"])
    assert found.notes == (f"{np.count_nonzero(case.made.lesion)} voxels belong to two segments; the first one counts",)


def test_a_map_names_segments_and_numbers(case: Case, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"Segment_1": "L2", "Segment_2": "canal", "3": "L1"}))
    masks = {"Segment_1": case.made.labels == 30, "Segment_2": case.made.labels == 79, "other": case.made.labels == 31}
    path = segmentation(tmp_path / "seg.dcm", case.files, masks)
    found = read_labels(path, case.volume, scheme(None, tmp_path / "map.json"))
    assert {name: np.count_nonzero(mask) for name, mask in named_masks(found).items()} == {
        name: np.count_nonzero(mask) for name, mask in zip(("L2", "canal", "L1"), masks.values(), strict=True)
    }
    with pytest.raises(
        MedSoftError, match=r"no segment is named as a vertebra \(Segment_1, Segment_2, other\); give --m"
    ):
        read_labels(path, case.volume)


def test_one_label_for_all_vertebrae_becomes_one_a_part(case: Case, tmp_path: Path) -> None:
    semantic = ((case.made.labels > 28) & (case.made.labels < 40)).astype(np.uint8)
    semantic[0, 0, 0] = 1  # a speck
    path = write_nifti(tmp_path / "labels.nii.gz", semantic, case.made.affine)
    found = read_labels(path, case.volume, Scheme("map.json", {1: "vertebra"}))
    parts = [n for n, name in sorted(found.structures.items()) if name == "vertebra"]
    assert len(parts) == 3
    for number, original in zip(parts, (31, 30, 29), strict=True):  # from the head down
        assert same(found.values == number, case.made.labels == original)
    assert [np.count_nonzero(found.values == n) for n, name in found.structures.items() if name == "partial"] == [1]


def test_a_body_and_an_arch_that_are_labelled_apart_are_one_vertebra(case: Case, tmp_path: Path) -> None:
    split = case.made.labels.copy()
    split[:, 30:][split[:, 30:] == 30] = 130
    path = write_nifti(tmp_path / "labels.nii.gz", split, case.made.affine)
    found = read_labels(path, case.volume, Scheme("map.json", NAMES | {130: "L2"}))
    assert same(found.values, case.made.labels)


def test_the_numbers_of_a_lesion_file_are_lesions(case: Case, tmp_path: Path) -> None:
    values = np.where(case.made.lesion, 2, 0).astype(np.uint8)
    values[3:6, 3:6, 3:6] = 1
    found = read_lesions(write_nifti(tmp_path / "lesion.nii.gz", values, case.made.affine), case.volume)
    assert [lesion.name for lesion in found] == ["lesion 1", "lesion 2"]
    assert same(found[1].mask, case.made.lesion)
    path = write_nifti(tmp_path / "mask.nii.gz", case.made.lesion.astype(np.uint8) * 255, case.made.affine)
    assert [lesion.name for lesion in read_lesions(path, case.volume)] == ["lesion"]
    path = write_nifti(tmp_path / "none.nii.gz", np.zeros_like(values), case.made.affine)
    assert read_lesions(path, case.volume) == []


def test_levels_in_a_wrong_order_are_refused_with_the_preset_that_fits(case: Case, tmp_path: Path) -> None:
    counted = np.choose((case.made.labels > 28) * (case.made.labels - 28).clip(0, 4), [0, 1, 2, 3, 0]).astype(np.uint8)
    path = write_nifti(tmp_path / "labels.mha.nii.gz", counted, case.made.affine)  # from below, as SPIDER counts
    assert {*read_labels(path, case.volume, PRESETS["spider"]).structures.values()} == {"L5", "L4", "L3"}
    with pytest.raises(MedSoftError, match=r"C2 lies nearer to the head than C1, .* its numbers fit --preset spider"):
        read_labels(path, case.volume, PRESETS["verse"])


def test_one_level_over_the_whole_spine_is_refused(tmp_path: Path) -> None:
    affine = grid("LPH", (8, 8, 60), (4, 4, 4))
    volume = Volume(np.zeros((8, 8, 60), np.int16), affine)
    values = np.zeros((8, 8, 60), np.uint8)
    values[2:6, 2:6, 5:50] = 1
    path = write_nifti(tmp_path / "labels.nii.gz", values, affine)
    with pytest.raises(MedSoftError, match=r'1 \(L5\) reaches over 180 mm .* --map with {"1": "vertebra"}'):
        read_labels(path, volume, PRESETS["spider"])


def test_unknown_numbers_of_a_file_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "labels.nii.gz", case.made.labels, case.made.affine)
    with pytest.raises(
        MedSoftError, match=r"labels.nii.gz: spider does not know 29 \(\d+ voxels\), 30 .*totalsegmentator"
    ):
        read_labels(path, case.volume, PRESETS["spider"])


@pytest.mark.parametrize("what", ["series", "frame of reference"])
@pytest.mark.parametrize("write", [segmentation, write_rtstruct])
def test_a_segmentation_of_another_image_is_refused(case: Case, tmp_path: Path, what: str, write: Callable) -> None:
    path = write(tmp_path / "seg.dcm", case.files, {"lesion": case.made.lesion})
    dataset = pydicom.dcmread(path)
    if what == "frame of reference":
        dataset.FrameOfReferenceUID = "1.2.3.4"
    elif dataset.Modality == "SEG":
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3.4"
    else:
        reference = pydicom.Dataset()
        reference.RTReferencedStudySequence = [pydicom.Dataset()]
        reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence = [pydicom.Dataset()]
        reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3.4"
        dataset.ReferencedFrameOfReferenceSequence = [reference]
    dataset.save_as(path)
    with pytest.raises(MedSoftError, match=rf"seg.dcm: was made on another {what} \(1.2.3.4\) than"):
        read_lesions(path, case.volume)


def test_contours_of_planes_between_the_slices_add_up(case: Case, tmp_path: Path) -> None:
    path = write_rtstruct(tmp_path / "rt.dcm", case.files, {"lesion": case.made.lesion})
    dataset = pydicom.dcmread(path)
    contours = dataset.ROIContourSequence[0].ContourSequence
    for contour in [*contours]:  # as drawn on a series of half the slice distance
        second = copy.deepcopy(contour)
        places = np.add(np.reshape(list(map(float, contour.ContourData)), (-1, 3)), (0, 0, 0.4))
        second.ContourData = [f"{x:.4f}" for x in places.ravel()]
        contours.append(second)
    dataset.save_as(path)
    (lesion,) = read_lesions(path, case.volume)
    assert same(lesion.mask, case.made.lesion)
    assert lesion.notes == (f"lesion {RESAMPLED}",)


def test_contours_on_every_second_slice_are_refused(case: Case, tmp_path: Path) -> None:
    sparse = case.made.lesion.copy()
    sparse[..., 1::2] = False
    path = write_rtstruct(tmp_path / "rt.dcm", case.files, {"lesion": sparse})
    with pytest.raises(FileError, match=r"the contours of lesion lie on every 2\. slice .* interpolate them first"):
        read_lesions(path, case.volume)


def test_labels_of_another_patient_are_refused(case: Case, tmp_path: Path) -> None:
    away = case.made.affine.copy()
    away[2, 3] += 500
    path = write_nifti(tmp_path / "labels.nii.gz", case.made.labels, away)
    with pytest.raises(MedSoftError, match="its grid does not overlap the image's"):
        read_labels(path, case.volume, TOTAL)
    beside = np.zeros((32, 48, 104), np.uint8)  # the grids meet, the labels do not
    beside[..., 60:] = 30
    path = write_nifti(tmp_path / "beside.nii.gz", beside, case.made.affine)
    with pytest.raises(FileError, match="none of its labels lies in"):
        read_labels(path, case.volume, TOTAL)


def test_a_seg_that_marks_nothing_in_the_image_is_refused(case: Case, tmp_path: Path) -> None:
    lesion = np.zeros_like(case.made.lesion)
    lesion[-4:-1, 4:8, 20:24] = True
    path = segmentation(tmp_path / "seg.dcm", case.files, {"lesion": lesion})
    narrow = replace(case.volume, values=case.volume.values[:-4])
    with pytest.raises(FileError, match="nothing of its segment 1 lies in"):
        read_lesions(path, narrow)


def test_contours_elsewhere_or_oblique_are_refused(case: Case, tmp_path: Path) -> None:
    path = write_rtstruct(tmp_path / "rt.dcm", case.files, {"lesion": case.made.lesion})
    dataset = pydicom.dcmread(path)
    contours = dataset.ROIContourSequence[0].ContourSequence
    kept = [list(map(float, contour.ContourData)) for contour in contours]
    for contour, data in zip(contours, kept, strict=True):
        contour.ContourData = [f"{x:.4f}" for x in np.add(np.reshape(data, (-1, 3)), (0, 0, 400)).ravel()]
    dataset.save_as(path)
    with pytest.raises(MedSoftError, match="no contour of lesion lies in"):
        read_lesions(path, case.volume)
    for contour, data in zip(contours, kept, strict=True):
        places = np.reshape(data, (-1, 3))
        contour.ContourData = [f"{x:.4f}" for x in (places + np.outer(places[:, 0] - 3, (0, 0, 1))).ravel()]
    dataset.save_as(path)
    with pytest.raises(FileError, match="a contour of lesion is oblique to the voxels"):
        read_lesions(path, case.volume)
    del dataset.ROIContourSequence
    dataset.save_as(path)
    with pytest.raises(FileError, match="is an RTSTRUCT without contours"):
        read_lesions(path, case.volume)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda mask: mask * 0.37 + mask.any() * 0.001, "holds fractions"),
        (lambda mask: np.where(mask, -5, 0).astype(np.int16), "holds the number -5"),
        (lambda mask: (~mask).astype(np.uint8), r"marks \d+% of .*; is it inverted"),
        (
            lambda mask: (
                np.arange(mask.size).reshape(mask.shape).astype(np.int32) % 100 * (np.arange(mask.shape[2]) < 20)
            ),
            "has 99 different values",
        ),
    ],
)
def test_a_lesion_file_that_is_no_mask_is_refused(case: Case, tmp_path: Path, values: Callable, message: str) -> None:
    path = write_nifti(tmp_path / "lesion.nii.gz", values(case.made.lesion), case.made.affine)
    with pytest.raises(FileError, match=message):
        read_lesions(path, case.volume)


def test_a_seg_whose_lesion_is_not_named_is_refused(case: Case, tmp_path: Path) -> None:
    path = segmentation(tmp_path / "seg.dcm", case.files, case.named())
    with pytest.raises(FileError, match="no segment that is named or coded as a lesion: L3, L2, L1, canal; name one"):
        read_lesions(path, case.volume)
    other = {"L2": case.made.labels == 30, "Segment_1": case.made.lesion}
    path = segmentation(tmp_path / "one.dcm", case.files, other)
    assert same(read_lesions(path, case.volume)[0].mask, case.made.lesion)
    path = write_rtstruct(tmp_path / "rt.dcm", case.files, other | {"Body": case.made.image > -500})
    with pytest.raises(FileError, match="no segment that is named or coded as a lesion: L2, Segment_1, Body"):
        read_lesions(path, case.volume)


def test_a_damaged_seg_is_refused(case: Case, tmp_path: Path) -> None:
    path = segmentation(tmp_path / "seg.dcm", case.files, {"lesion": case.made.lesion})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(FileError, match="cannot be read"):
        read_lesions(path, case.volume)


def test_a_folder_with_two_segmentations_is_refused(case: Case, tmp_path: Path) -> None:
    for name in ("one.dcm", "two.dcm"):
        segmentation(tmp_path / name, case.files, {"lesion": case.made.lesion})
    with pytest.raises(MedSoftError, match="holds 2 DICOM segmentations; expected one: name the file"):
        read_lesions(tmp_path, case.volume)
    (tmp_path / "two.dcm").unlink()
    assert same(read_lesions(tmp_path, case.volume)[0].mask, case.made.lesion)
    write_nifti(tmp_path / "L2.nii.gz", case.made.labels, case.made.affine)
    with pytest.raises(FileError, match="holds several numbers; in a folder of masks expected one structure a file"):
        read_labels(tmp_path, case.volume)
