"""ldm.exchange.cases and pairing: the images of a source, and the labels, lesions and sentences that belong to them."""

from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import pytest
from pydicom.dataset import Dataset

from ldm.core.errors import MedSoftError, UsageError
from ldm.exchange.cases import Case, Problem, Wanted, find_cases
from ldm.exchange.pairing import inside, pair

AFFINE = made.grid(made.AXIAL, (4, 4, 4), (1, 1, 1))


@pytest.fixture
def volume(tmp_path: Path) -> Callable[[str], Path]:
    """``volume("a/ct.nii.gz")`` writes a small volume below the test's folder."""

    def write(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return made.write_nifti(path, np.zeros((4, 4, 4), np.int16), AFFINE)

    return write


def series(folder: Path, **header: object) -> list[Path]:
    return made.write_series(folder, np.zeros((4, 4, 4), np.int16), AFFINE, **header)


def patients(source: Path, wanted: Wanted = Wanted()) -> list[str]:  # noqa: B008
    return [case.patient for case in find_cases(source, wanted)[0]]


def paired(
    source: Path, labels: Path | None = None, lesions: Path | None = None, table: Path | None = None
) -> tuple[list[Case], list[Problem]]:
    cases, problems = find_cases(source, Wanted(leave_out=frozenset(inside(labels, source) | inside(lesions, source))))
    cases, more = pair(cases, labels, lesions, table)
    return cases, problems + more


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.nii.gz", "b.nrrd"], ["a", "b"]),
        (["p1/ct.nii.gz", "p2/ct.nii.gz"], ["p1", "p2"]),
        (["site/p1/ct.nii.gz", "site/p2/ct.nii.gz"], ["site/p1", "site/p2"]),
        (["site/a.nii", "site/b.nii"], ["a", "b"]),
        (["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"], ["sub-01", "sub-01"]),
        (["case_7_0000.nii.gz"], ["case_7"]),
        ([".hidden.nii", "a.nii", "notes.txt"], ["a"]),
    ],
)
def test_whose_image_a_file_is(
    tmp_path: Path, volume: Callable[[str], Path], names: list[str], expected: list[str]
) -> None:
    for name in names:
        path = volume(name.replace(".nrrd", ".nii").replace(".txt", ".nii"))
        path.rename(tmp_path / name)
    assert patients(tmp_path) == expected


def test_an_nnunet_folder(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "imagesTr/b_0000", "imagesTr/odd", "labelsTr/a", "labelsTr/b"):
        volume(f"{name}.nii.gz")
    for source in (tmp_path, tmp_path / "imagesTr"):
        cases, problems = paired(source, labels=tmp_path / "labelsTr")
        assert [(case.patient, case.labels.name) for case in cases] == [("a", "a.nii.gz"), ("b", "b.nii.gz")]
        assert [(each.name, each.rejected) for each in problems] == [("a_0001.nii.gz", False), ("odd.nii.gz", True)]


def test_nnunets_test_set_is_named(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("imagesTr/a_0000", "imagesTs/b_0000", "imagesTs/b_0001"):
        volume(f"{name}.nii.gz")
    cases, problems = find_cases(tmp_path, Wanted())
    assert [case.patient for case in cases] == ["a"]
    assert [(each.name, each.rejected) for each in problems] == [("imagesTs", False)]
    assert patients(tmp_path / "imagesTs") == ["b"]


def test_a_modality_that_nothing_has_is_refused(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    series(tmp_path / "dicom" / "ct")
    series(tmp_path / "dicom" / "mr", modality="MR")
    with pytest.raises(UsageError, match="--modality CTT: no series has it; there are CT, MR"):
        find_cases(tmp_path / "dicom", Wanted(modality="CTT"))
    for source in (volume("volumes/a.nii.gz"), tmp_path / "volumes", tmp_path):
        with pytest.raises(UsageError, match="--modality CTT: of a volume in a file, expected CT, MR, "):
            find_cases(source, Wanted(modality="CTT"))
    table = write(tmp_path / "t.csv", "image\ndicom/ct\nvolumes/a.nii.gz\n")
    cases, problems = find_cases(table, Wanted(modality="MR"))
    assert [case.image.name for case in cases] == ["a.nii.gz"]
    assert "no series has it; there are CT" in problems[0].reason


def test_dicom_series_at_any_depth_and_what_is_none(tmp_path: Path) -> None:
    series(tmp_path / "x" / "ct", PatientID="P1")
    series(tmp_path / "y", PatientID="P2", modality="MR")
    series(tmp_path / "y", PatientID="", StudyInstanceUID="1.2.3")
    series(tmp_path / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (tmp_path / "y" / "broken.dcm").write_bytes(b"no DICOM at all")
    cases, problems = find_cases(tmp_path, Wanted())
    assert sorted(case.patient for case in cases) == ["P1", "P2", "study 1.2.3"]
    assert {(each.path.name, each.rejected) for each in problems} == {("scout", False), ("broken.dcm", True)}
    assert patients(tmp_path, Wanted(modality="MR")) == ["P2"]


def test_series_are_chosen_by_number_uid_or_description(tmp_path: Path) -> None:
    files = series(tmp_path, PatientID="bone", SeriesNumber=4, SeriesDescription="Bone kernel")
    series(tmp_path, PatientID="soft", SeriesNumber=5, SeriesDescription="Soft kernel")
    uid = made.pydicom.dcmread(files[0]).SeriesInstanceUID
    for text in ("4", uid, "bone"):
        assert patients(tmp_path, Wanted(series=text)) == ["bone"]
    assert patients(tmp_path, Wanted(series="kernel")) == ["bone", "soft"]
    series(tmp_path, PatientID="four mm", SeriesNumber=6, SeriesDescription="Bone 4 mm")
    assert patients(tmp_path, Wanted(series="4")) == ["bone"]  # a number is no part of a description
    _, problems = find_cases(tmp_path, Wanted(series="4"))
    assert [(each.reason, each.rejected) for each in problems] == [("is not the --series", False)] * 2


def test_files_belong_to_the_image_with_whose_name_theirs_begins(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("P1", "P1_2", "P10", "P3"):
        volume(f"images/{name}.nii.gz")
    for name in ("P1_seg", "P1_2", "P10.seg", "P3/labels", "Q9"):
        volume(f"labels/{name}.nii.gz")
    cases, problems = paired(tmp_path / "images", labels=tmp_path / "labels")
    found = {case.patient: case.labels.relative_to(tmp_path / "labels").as_posix() for case in cases}
    assert found == {"P1": "P1_seg.nii.gz", "P1_2": "P1_2.nii.gz", "P10": "P10.seg.nii.gz", "P3": "P3/labels.nii.gz"}
    (problem,) = problems
    assert (problem.path.name, problem.reason) == ("Q9.nii.gz", "belongs to no image by its name")
    assert not problem.rejected


def test_an_image_without_labels_or_with_two_is_rejected(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("images/a", "images/b", "images/c", "labels/a", "labels/b_seg", "labels/b_label"):
        volume(f"{name}.nii.gz")
    cases, problems = paired(tmp_path / "images", labels=tmp_path / "labels")
    assert [case.patient for case in cases] == ["a"]
    assert [(each.name, each.rejected) for each in problems] == [("b.nii.gz", True), ("c.nii.gz", True)]
    assert "2 files of --labels fit it (b_label.nii.gz, b_seg.nii.gz)" in problems[0].reason
    assert "looked for a name that begins with c" in problems[1].reason


def test_lesions_several_for_one_image_and_none_for_another(
    tmp_path: Path, volume: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("images/a", "images/b", "lesions/a_lesion_1", "lesions/a_lesion_2", "lesions/aa"):
        volume(f"{name}.nii.gz")
    cases, problems = paired(tmp_path / "images", lesions=tmp_path / "lesions")
    assert [[path.name for path, _ in case.lesions] for case in cases] == [
        ["a_lesion_1.nii.gz", "a_lesion_2.nii.gz"],
        [],
    ]
    assert [(each.path.name, each.rejected) for each in problems] == [("aa.nii.gz", True)]  # misspelled: never healthy
    assert "1 of 2 images have no file of --lesions" in caplog.text


@pytest.mark.parametrize("name", ["D12", "LWK3", "lwk_3", "Th12", "t2", "L3-5", "T12-L1", "lumbar_2", "L5_2"])
def test_a_vertebra_in_the_name_of_a_file_is_read_as_in_a_sentence(
    tmp_path: Path, volume: Callable[[str], Path], name: str
) -> None:
    for each in ("images/P1", "images/P2", f"lesions/P1_{name}_lesion", f"lesions/P2-lesion_2-{name}"):
        volume(f"{each}.nii.gz")
    cases, problems = paired(tmp_path / "images", lesions=tmp_path / "lesions")
    assert [path.name for case in cases for path, _ in case.lesions] == [
        f"P1_{name}_lesion.nii.gz",
        f"P2-lesion_2-{name}.nii.gz",
    ]
    assert not problems


@pytest.mark.parametrize("name", ["D14", "T_2", "L9", "-2", "S_1", "visit2"])
def test_what_names_no_vertebra_may_be_another_image(tmp_path: Path, volume: Callable[[str], Path], name: str) -> None:
    for each in ("images/P1", f"lesions/P1_{name}_lesion"):
        volume(f"{each}.nii.gz")
    cases, problems = paired(tmp_path / "images", lesions=tmp_path / "lesions")
    assert not cases
    assert "begins as that of P1.nii.gz" in problems[0].reason


def test_images_to_which_one_lesion_file_may_belong_are_not_healthy(
    tmp_path: Path, volume: Callable[[str], Path]
) -> None:
    for number in (4, 5):
        series(tmp_path / "scans" / "P1", SeriesNumber=number)
    series(tmp_path / "scans" / "P2", PatientID="2")
    volume("lesions/P1_lesion.nii.gz")
    table = write(tmp_path / "t.csv", "image,prompt\nP1,lytic lesion of the L3 vertebra\n")
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "P1.txt", "lytic lesion of the L3 vertebra")
    for flags in ({"lesions": tmp_path / "lesions"}, {"table": table}, {"table": tmp_path / "texts"}):
        cases, problems = paired(tmp_path / "scans", **flags)
        assert [case.patient for case in cases] == ["2"]
        assert sum("not taken for healthy" in each.reason and each.rejected for each in problems) == 2


def test_a_longer_name_may_be_of_another_image(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("P1", "Q1"):
        volume(f"images/{name}.nii.gz")
    for name in ("P1-2_lesion", "P1-2_seg", "Q1_seg"):
        volume(f"{'lesions' if 'lesion' in name else 'labels'}/{name}.nii.gz")
    cases, problems = paired(tmp_path / "images", lesions=tmp_path / "lesions")
    assert [(case.patient, case.lesions) for case in cases] == [("Q1", ())]  # P1 is neither diseased nor healthy
    assert [each.name for each in problems if each.rejected] == ["P1-2_lesion.nii.gz", "P1.nii.gz"]
    assert "begins as that of P1.nii.gz" in problems[0].reason
    assert [case.patient for case in paired(tmp_path / "images", labels=tmp_path / "labels")[0]] == ["Q1"]
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "P1-2.txt", "lytic lesion of the L3 vertebra")
    assert [case.patient for case in paired(tmp_path / "images", table=tmp_path / "texts")[0]] == ["Q1"]


def test_the_next_name_chooses_where_the_nearest_fits_all(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("images/p1/image", "images/p2/image", "labels/p2/image", "labels/p1/image"):
        volume(f"{name}.nii.gz")
    cases, problems = paired(tmp_path / "images", labels=tmp_path / "labels")
    assert [(case.patient, case.labels.parent.name) for case in cases] == [("p1", "p1"), ("p2", "p2")]
    assert not problems


def test_names_beside_the_images(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for patient in ("p1", "p2"):
        for name in ("ct", "labels", "segmentations/vertebrae_L3", "segmentations/vertebrae_L4"):
            volume(f"{patient}/{name}.nii.gz")
    volume("p1/tumour.nii.gz")
    for labels in ("labels.nii.gz", "segmentations"):
        (tmp_path / "p1" / "labels.nii.gz").touch()
        cases, _ = paired(tmp_path, labels=Path(labels), lesions=Path("tumour.nii.gz"))
        cases = [case for case in cases if case.image.name == "ct.nii.gz"]
        assert [case.labels.name for case in cases] == [labels, labels]
        assert [len(case.lesions) for case in cases] == [1, 0]


def test_segmentations_belong_to_the_series_that_they_refer_to(tmp_path: Path) -> None:
    shape = (16, 16, 4)
    affine = made.grid(made.AXIAL, shape, (1, 1, 1))
    mask = np.zeros(shape, bool)
    mask[4:8, 4:8] = True
    for name in ("one", "two"):
        files = made.write_series(tmp_path / "scans", np.zeros(shape, np.int16), affine, PatientID="P")
        made.write_seg(tmp_path / "scans" / f"{name}.dcm", files, {f"lesion {name}": mask})
    cases, problems = paired(tmp_path / "scans", lesions=tmp_path / "scans")
    assert len(cases) == 2
    assert all(len(case.lesions) == 1 for case in cases)
    assert [each.rejected for each in problems] == [False, False]  # they are no images themselves
    cases, problems = paired(tmp_path / "scans", labels=tmp_path / "scans" / "two.dcm")
    assert len(cases) == 1
    assert len([each for each in problems if each.rejected]) == 1


def test_one_file_for_several_images_is_refused(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("images/a", "images/b", "labels"):
        volume(f"{name}.nii.gz")
    with pytest.raises(UsageError, match=r"--labels .*labels.nii.gz: is one file for 2 images \(a.nii.gz; b.nii.gz\)"):
        paired(tmp_path / "images", labels=tmp_path / "labels.nii.gz")
    with pytest.raises(UsageError, match="--lesions nowhere: does not exist, and there is nothing of that name"):
        paired(tmp_path / "images", lesions=Path("nowhere"))


def test_several_series_of_a_patient_for_one_label_file(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    series(tmp_path / "scans" / "P1", SeriesNumber=4)
    series(tmp_path / "scans" / "P1", SeriesNumber=5)
    volume("labels/P1.nii.gz")
    cases, problems = paired(tmp_path / "scans", labels=tmp_path / "labels")
    assert not cases
    assert "2 images fit it" in problems[0].reason
    assert "(series 4)" in problems[0].reason
    assert "choose with --series" in problems[0].reason


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_as_source(tmp_path: Path, volume: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "seg/a", "l1", "l2"):
        volume(f"{name}.nii.gz")
    caplog.set_level("INFO")
    rows = "a.nii.gz,seg/a.nii.gz,l1.nii.gz,L3,first,P1,Doe\na.nii.gz,seg/a.nii.gz,l2.nii.gz,L4,second,P1,Doe\n"
    rows += "b.nii.gz,,,,,P2,Doe\nc.nii.gz,,,,,P3,Doe\nb2.nii.gz,nowhere.nii.gz,,,,P4,Doe\n"
    volume("b2.nii.gz")
    table = write(tmp_path / "cases.csv", "Image,labels,lesion,level,prompt,patient_id,PatientName\n" + rows)
    cases, problems = find_cases(table, Wanted())
    assert [case.patient for case in cases] == ["P1", "P2"]
    assert [(path.name, [row["prompt"] for row in rows]) for path, rows in cases[0].lesions] == [
        ("l1.nii.gz", ["first"]),
        ("l2.nii.gz", ["second"]),
    ]
    assert [row["level"] for row in cases[0].rows] == ["L3", "L4"]
    assert cases[0].labels == tmp_path / "seg/a.nii.gz"
    assert [(each.path.name, each.name) for each in problems] == [
        ("c.nii.gz", "cases.csv, line 5"),
        ("nowhere.nii.gz", "cases.csv, line 6"),
    ]
    assert "columns that are not read: PatientName" in caplog.text
    assert "Doe" not in caplog.text


def test_a_table_chooses_among_series(tmp_path: Path) -> None:
    series(tmp_path / "s", SeriesNumber=4)
    series(tmp_path / "s", SeriesNumber=5)
    table = write(tmp_path / "t.csv", "image,series\ns,5\n")
    assert [case.series.number for case in find_cases(table, Wanted())[0]] == [5]
    cases, problems = find_cases(write(tmp_path / "u.csv", "image\ns\n"), Wanted())
    assert not cases
    assert "expected one image, found 2" in problems[0].reason


def test_rows_of_one_image_belong_together_however_they_write_it(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("scans/a", "l1", "l2"):
        volume(f"{name}.nii.gz")
    rows = "scans/a.nii.gz,l1.nii.gz\n./scans/../scans/a.nii.gz,l2.nii.gz\n"
    cases, problems = find_cases(write(tmp_path / "t.csv", f"image,lesion\n{rows}"), Wanted())
    assert [[path.name for path, _ in case.lesions] for case in cases] == [["l1.nii.gz", "l2.nii.gz"]]
    assert not problems


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"expected a column image \(of image, series"):
        find_cases(write(tmp_path / "t.csv", "file;patient\na;b\n"), Wanted())
    with pytest.raises(MedSoftError, match="expected a header and at least one row"):
        find_cases(write(tmp_path / "t.csv", ""), Wanted())


def test_rows_that_contradict_each_other(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    volume("a.nii.gz")
    cases, problems = find_cases(write(tmp_path / "t.csv", "image,patient\na.nii.gz,P1\na.nii.gz,P2\n"), Wanted())
    assert not cases
    assert "its rows differ in patient (P1, P2)" in problems[0].reason


def test_a_table_beside_a_folder(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    volume("scans/a.nii.gz")
    volume("scans/b.nii.gz")
    volume("l.nii.gz")
    text = "image,lesion,prompt,patient\nscans/a.nii.gz,l.nii.gz,one,P1\nb,,healthy,P2\nz,,x,P3\n"
    cases, problems = paired(tmp_path / "scans", table=write(tmp_path / "t.csv", text))
    assert [(case.patient, [row["prompt"] for row in case.rows]) for case in cases] == [
        ("P1", ["one"]),
        ("P2", ["healthy"]),
    ]
    assert [path.name for path, _ in cases[0].lesions] == ["l.nii.gz"]
    assert [(each.name, each.reason) for each in problems] == [("t.csv, line 4", "no image is called 'z'")]


def test_a_folder_of_text_files(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    for name in ("a", "b"):
        volume(f"scans/{name}.nii.gz")
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "lytic lesion of the L3 vertebra\nlytic lesion of the L4 vertebra\n")
    write(tmp_path / "texts" / "b.txt", "")
    write(tmp_path / "texts" / "c.txt", "x")
    cases, problems = paired(tmp_path / "scans", table=tmp_path / "texts")
    assert [len(case.rows) for case in cases] == [2]
    assert {(each.name, each.rejected) for each in problems} == {("b.txt", True), ("b.nii.gz", True), ("c.txt", True)}


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: does not exist"):
        find_cases(tmp_path / "nowhere", Wanted())


def test_multi_frame_files_and_radiographs_are_images_of_their_own(tmp_path: Path) -> None:
    def change(dataset: Dataset, frame: int) -> None:
        del dataset.ImageOrientationPatient

    series(tmp_path, modality="DX", PatientID="P1", change=change)
    cases, _ = find_cases(tmp_path, Wanted())
    assert len({case.key for case in cases}) == len(cases) == 4


def test_links_to_folders_are_followed_once(tmp_path: Path, volume: Callable[[str], Path]) -> None:
    volume("archive/P1/ct.nii.gz")
    series(tmp_path / "archive" / "P2", PatientID="P2")
    volume("masks/P1/lesion.nii.gz")
    for name in ("source", "lesions"):
        (tmp_path / name).mkdir()
    for target in ("P1", "P2"):
        (tmp_path / "source" / target).symlink_to(tmp_path / "archive" / target)
    (tmp_path / "lesions" / "P1").symlink_to(tmp_path / "masks" / "P1")
    for place in ("archive/P1/again", "masks/P1/again", "source/again", "lesions/again"):
        (tmp_path / place).symlink_to((tmp_path / place).parent)
    cases, problems = paired(tmp_path / "source", lesions=tmp_path / "lesions")
    assert [(case.patient, len(case.lesions)) for case in cases] == [("P1", 1), ("P2", 0)]
    assert not problems
