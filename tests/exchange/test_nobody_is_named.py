"""Thirty values that identify somebody, planted in headers, names and tables: none is found below the output."""

import json
import re
from pathlib import Path

import made
import numpy as np
import pytest
from pydicom.dataset import Dataset
from tiny import call

import ver_openImagesDatasets
from tool import import_volumes

HEADER = {
    "PatientName": "Plantagenet^Eleonore^Maria",
    "PatientID": "PID-77310",
    "OtherPatientIDs": "OPID-88412",
    "PatientBirthDate": "19410217",
    "PatientAddress": "Birkenweg 12 Kleinstadt",
    "PatientTelephoneNumbers": "+49-30-5556677",
    "PatientMotherBirthName": "Habsburg^Hedwig",
    "PatientComments": "prefers Ellie",
    "AccessionNumber": "ACC-55129",
    "StudyID": "STUDY-9931",
    "StudyDate": "20210714",
    "SeriesDate": "20210715",
    "AcquisitionDate": "20210716",
    "ContentDate": "20210717",
    "StudyDescription": "spine of Eleonore",
    "SeriesDescription": "Plantagenet bone",
    "InstitutionName": "Klinikum Waldesruh",
    "InstitutionAddress": "Waldstr. 3 Seedorf",
    "InstitutionalDepartmentName": "Radiologie Nord",
    "StationName": "CTSTATION7",
    "DeviceSerialNumber": "SN-440021",
    "ReferringPhysicianName": "Quacksalber^Quirin",
    "PerformingPhysicianName": "Pillendreher^Paul",
    "OperatorsName": "Knopf^Karla",
    "RequestedProcedureDescription": "Rueckenschmerz seit Gartenarbeit",
    "ProtocolName": "LWS Plantagenet",
    "BodyPartExamined": "SPINE",  # on the white list, and kept
    "ManufacturerModelName": "Scanner of Klinikum Waldesruh",  # on the white list, but it names the hospital
}
PRIVATE = "Geheimnis-61"
NESTED = "Tante^Trude"
FILE, FOLDER, TABLE = "Eleonore_lws_1941", "Plantagenet_Eleonore_20210714", "liste_plantagenet"
SITE, DOCTOR = "Klinikum Waldesruh", "Doktor Dolittle"
WORDS = re.findall(
    r"\S+",
    """Plantagenet Eleonore Maria PID-77310 77310 OPID-88412 19410217 Birkenweg Kleinstadt 5556677 Habsburg Hedwig Ellie
    ACC-55129 STUDY-9931 20210714 20210715 20210716 20210717 Waldesruh Waldstr Seedorf Radiologie CTSTATION7 SN-440021
    Quacksalber Quirin Pillendreher Paul Knopf Karla Rueckenschmerz Gartenarbeit Geheimnis Tante Trude lws_1941 1941
    Dolittle 2021-07-14 LWS""",
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder whose names, headers and table say who the patient is; and the series' UIDs."""
    root = tmp_path_factory.mktemp("planted")

    def change(dataset: Dataset, frame: int) -> None:
        dataset.add_new(0x00290010, "LO", "MAKER HEADER")
        dataset.add_new(0x00291010, "LO", PRIVATE)
        item = Dataset()
        item.PersonName = NESTED
        dataset.ReferencedPatientSequence = [item]

    spine = made.spine()
    folder = root / FOLDER / "CT"
    files = made.write_spine(folder, spine, change=change, **HEADER)
    other = root / FOLDER / "Eleonore_kaputt.dcm"
    other.write_bytes(b"Eleonore's letter")
    made.write_seg(
        root / f"{FILE}.dcm",
        files,
        {"lytic lesion of Eleonore Plantagenet": spine.lesion, "Plantagenet tumour": np.roll(spine.lesion, 20, 2)},
    )
    made.write_nifti(root / f"{FILE}.nii.gz", spine.labels, spine.affine)
    rows = ["image,labels,lesion,patient,site,PatientName,birth,doctor"]
    rows += [f"{FOLDER}/CT,{FILE}.nii.gz,{FILE}.dcm,PID-77310,{SITE},Eleonore Plantagenet,1941-02-17,{DOCTOR}"]
    rows += [f"{FOLDER}/Eleonore_kaputt.dcm,,,PID-77310,{SITE},Eleonore Plantagenet,1941-02-17,{DOCTOR}"]
    rows += [f"{FOLDER}/Plantagenet_fehlt.dcm,,,PID-77310,{SITE},Eleonore Plantagenet,1941-02-17,{DOCTOR}"]
    (root / f"{TABLE}.csv").write_text("\n".join(rows) + "\n")
    header = made.pydicom.dcmread(files[0])
    uids = [str(header[name].value) for name in ("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID")]
    return root, [*uids, str(header.FrameOfReferenceUID)]


def test_enough_is_planted() -> None:
    assert len(HEADER) + len((PRIVATE, NESTED, FILE, FOLDER, TABLE)) >= 30


def everything(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all that lies below a folder; of PNGs the text chunks stand in their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["table", "folder"])
def test_nobody_is_named_below_the_output(
    planted: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    root, uids = planted
    flags = ["--preset", "totalsegmentator"]
    if source == "table":
        path = root / f"{TABLE}.csv"
    else:
        path = root / FOLDER
        flags += ["--labels", root / f"{FILE}.nii.gz", "--lesions", root / f"{FILE}.dcm"]
        flags += ["--series", "Plantagenet", "--key", tmp_path / "Plantagenet.key"]
    out = tmp_path / "data"
    assert call(import_volumes, path, "--output_dir", out, *flags) == 3
    monkeypatch.chdir(out)
    assert call(ver_openImagesDatasets, "--root_dir", ".", "--output_file", "openimages_format.json") in (0, 3)
    found = everything(out)
    assert any(name.endswith("image.png") for name in found)
    assert "openimages_format.json" in found
    for name, data in found.items():
        text = data.decode("latin-1")
        for word in [*WORDS, *uids, str(root), FILE, FOLDER]:
            assert word.casefold() not in name.casefold(), (word, name)
            if len(word) > 4 or not name.endswith(".png"):  # four bytes may occur in compressed pixels by chance
                position = text.casefold().find(word.casefold())
                assert position < 0, (word, name, text[max(0, position - 60) : position + 60])
        if not name.endswith(".png"):
            assert not re.search(r"(19|20)\d\d[-./]?[01]\d[-./]?[0-3]\d(?!\d)", text), name
    reasons = " ".join(each["reason"] for each in json.loads(found["rejects.json"]))
    assert "its sentence or lesion type holds a name or a number from the image's header" in reasons
    private = b" ".join(everything(out.with_name("data.private")).values()).decode()
    for word in ("PID-77310", uids[0], FOLDER):  # the way back is there
        assert word in private


def test_white_lists_are_kept_where_they_name_nobody(planted: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, _ = planted
    flags = ["--preset", "totalsegmentator", "--slices", "middle"]
    assert call(import_volumes, root / f"{TABLE}.csv", "--output_dir", tmp_path / "data", *flags) == 3
    meta = json.loads(next((tmp_path / "data").rglob("meta.json")).read_text())
    assert (meta["body_part"], meta["manufacturer"], meta["kvp"]) == ("SPINE", "Maker", 120)
    assert "scanner" not in meta  # it named the hospital
    assert re.fullmatch("site_[a-p]{8}", meta["site"])  # so does the table's, which still tells sites apart
