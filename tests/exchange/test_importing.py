"""tool/import_volumes.py into the working directory, and what it finds in headers without a preamble."""

import json
from pathlib import Path

import made
import numpy as np
import pytest
from pydicom.dataset import Dataset
from tiny import call

from ldm.data.annotations import load_samples
from tool import import_volumes

SHAPE = (32, 32, 4)


def scans(folder: Path, **header: object) -> list[Path]:
    return made.write_series(folder, made.marked(SHAPE), made.grid(made.AXIAL, SHAPE, (1, 1, 2)), **header)


def test_the_private_folder_lies_beside_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans(tmp_path / "scans")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert call(import_volumes, tmp_path / "scans", "--output_dir", ".", "--plane", "axial") == 0
    assert (tmp_path / "out.private" / "mapping.json").exists()
    assert len(load_samples(tmp_path / "out")[0]) == 1


@pytest.mark.parametrize("preamble", [True, False])
def test_a_name_is_found_in_a_header_without_a_preamble(tmp_path: Path, preamble: bool) -> None:
    """The patient's name in a sentence, and the hospital's in the name of the scanner."""

    def change(dataset: Dataset, frame: int) -> None:
        dataset.InstitutionName, dataset.ManufacturerModelName = "Klinikum Waldesruh", "CT of Klinikum Waldesruh"

    files = scans(tmp_path / "scans", change=change, syntax="implicit")
    for file in files if not preamble else ():
        data = file.read_bytes()
        file.write_bytes(data[132 + 12 + int.from_bytes(data[140:144], "little") :])  # and no meta information
    mask = np.zeros(SHAPE, np.uint8)
    mask[8:16, 8:16, 2] = 1
    made.write_nifti(tmp_path / "lesion.nii.gz", mask, made.grid(made.AXIAL, SHAPE, (1, 1, 2)))
    rows = "image,lesion,prompt\nscans,lesion.nii.gz,lytic lesion of Erika\n"
    (tmp_path / "t.csv").write_text(rows)
    (tmp_path / "u.csv").write_text(rows.replace(" of Erika", ""))
    out = tmp_path / "out"
    with pytest.raises(Exception, match="its sentence or lesion type holds a name"):
        call(import_volumes, tmp_path / "t.csv", "--output_dir", out, "--plane", "axial")
    assert call(import_volumes, tmp_path / "u.csv", "--output_dir", out, "--plane", "axial", "--overwrite") == 0
    (meta,) = [json.loads(path.read_text()) for path in out.rglob("meta.json")]
    assert "scanner" not in meta
