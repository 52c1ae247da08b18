"""ldm.exchange.privacy: pseudonyms, keys, the texts that identify somebody, the private folder."""

import os
import stat
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from ldm.core.errors import MedSoftError
from ldm.data.checks import looks_personal
from ldm.exchange.privacy import HIDDEN, IdentifyingTexts, PrivateFolder, Pseudonyms, identifying, path_texts, read_key


@given(st.text(), st.text())
def test_pseudonyms_follow_from_the_key_alone_and_look_like_nobody(first: str, second: str) -> None:
    ours, others = Pseudonyms(b"a" * 32), Pseudonyms(b"b" * 32)
    assert ours.patient(first) == Pseudonyms(b"a" * 32).patient(first) != others.patient(first)
    assert (ours.patient(first) == ours.patient(second)) == (first == second)
    assert looks_personal(ours.patient(first)) is None
    assert not any(letter.isdigit() for letter in ours.digest("series", first))
    assert ours.digest("series", first) != ours.digest("instance", first)


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    key = read_key(path)
    assert len(key) == 32
    assert read_key(path) == key != read_key(tmp_path / "another")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("text", "found"), [("", "an empty file"), ("ab" * 31, "62 characters"), ("z" * 64, "64")])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(MedSoftError, match=f"key: expected a key of 64 hexadecimal digits, found {found}"):
        read_key(tmp_path / "key")


def test_the_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = PrivateFolder(tmp_path / "data.private")
        (tmp_path / "data.private").mkdir(mode=0o755)
        folder.create()
        folder.write("cases/one.json", {"name": "Müller"})
        folder.write_table("cases.csv", [{"path": "/x"}], ["path"])
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.path.rglob("*") if file.is_file()} == {0o600}
    (folder.path / "cases" / "two.json").write_text("{")
    assert folder.read_all("cases") == {"one": {"name": "Müller"}}


def header() -> Dataset:
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = (
        "von der Mustermann^Erika",
        "HOSP-4711",
        "19500102",
    )
    dataset.InstitutionName, dataset.SeriesDescription = "Klinikum Nord", "Mustermann follow-up"
    dataset.ReferringPhysicianName = "Doe^John"
    item = Dataset()
    item.OperatorsName = "Inner^Ida"
    dataset.ReferencedStudySequence = [item]
    segment = Dataset()
    segment.SegmentLabel = "GTV Krause"
    dataset.SegmentSequence = [segment]
    dataset.add_new(0x00091001, "LO", "private words")
    return dataset


@pytest.mark.parametrize(
    "text",
    [
        "lytic lesion of Mustermann",
        "ERIKA: sclerotic lesion",
        "lesion (HOSP-4711)",
        "lesion since 19500102",
        "seen by Doe",
        "operator Ida, lesion of L3",
        "lesion, klinikum nord",
        "lesion, first seen 2023-04-05",
        "GTV_Mustermann2",
    ],
)
def test_a_text_that_identifies_somebody_is_found(text: str) -> None:
    assert IdentifyingTexts(*identifying(header())).found_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "moderate osteolytic lesion of the L3 vertebra",
        "erikalike lesion",
        "private words",
        "Ewing Sarcoma",
        "Läsion der L3",
    ],
)
def test_other_texts_are_not(text: str) -> None:
    assert IdentifyingTexts(*identifying(header())).found_in(text) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Wang^Fang=王^芳", "患者王某，第三腰椎溶骨性病变"),
        ("Yamada^Ryo=山田^亮", "山田さんの骨病変"),
        ("Ü^Kim", "Herr Ü, Läsion L3"),
    ],
)
def test_short_names_of_other_scripts_are_found(name: str, text: str) -> None:
    dataset = Dataset()
    dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 192", name
    texts = IdentifyingTexts(*identifying(dataset))
    assert texts.found_in(text)
    assert text != texts.hidden(text)
    assert texts.found_in("lytic lesion of the L3 vertebra, über L4") is None


def test_messages_lose_names_paths_and_numbers() -> None:
    source = Path("/archive/Mustermann_Erika_1950")
    paths = path_texts([source / "CT" / "IM0003.dcm", source / "images" / "L3.nii.gz"], source)
    texts = IdentifyingTexts(
        *(first | second for first, second in zip(identifying(header()), (set(), paths), strict=True))
    )
    message = (
        f"{source}/CT/IM0003.dcm: the image of Mustermann Erika, born 1950-01-02 (HOSP-4711, private words), series "
        "1.2.840.113619.2.55.3.604688, number 123456789, GTV Krause, IM0003 in "
        "Mustermann_Erika_1950: no pixels"
    )
    hidden = texts.hidden(message)
    assert hidden.startswith(HIDDEN)
    assert "the image of" in hidden
    assert hidden.endswith("no pixels")
    for word in (
        "Mustermann",
        "Erika",
        "1950",
        "4711",
        "private",
        "1.2.840",
        "123456789",
        "Krause",
        "IM0003",
        "archive",
    ):
        assert word not in hidden, word


def test_names_that_all_data_sets_have_stay(tmp_path: Path) -> None:
    paths = path_texts([tmp_path / "images" / "image.nii.gz"], tmp_path / "images")
    assert IdentifyingTexts((), paths).hidden("the image and its labels") == "the image and its labels"


def test_odd_headers_are_read() -> None:
    dataset = pydicom.dataset.Dataset()
    dataset.PatientName, dataset.OtherPatientIDs, dataset.AccessionNumber = "", ["A-17", "B-18"], None
    who, _ = identifying(dataset)
    assert who == {"A-17", "B-18"}
    tag = pydicom.tag.Tag("EchoTrainLength")
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, "US", 1, b"\1", 0, False, True)  # half of a number
    item = pydicom.dataset.Dataset()
    item.PersonName = "Trude"
    dataset.ReferencedPatientSequence = [item]
    assert identifying(dataset)[0] == {"A-17", "B-18", "Trude"}
