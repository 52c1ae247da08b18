"""tool/import_volumes.py: what comes out, what is refused and why, and that it goes on where it was stopped."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import nibabel
import numpy as np
import pytest
import SimpleITK
from tiny import ROOT, call

import ver_openImagesDatasets
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.masks import read_anatomy
from ldm.exchange import writing
from ldm.volumes import volume as volumes
from ldm.volumes.intensity import PRESETS as WINDOWS
from ldm.volumes.labels import PRESETS
from tool import doctor, import_volumes

REAL = ROOT.parent / "shared" / "real"
PROMPT = "moderate osteolytic lesion of the L2 vertebra"


def run(source: Path, out: Path, *more: Any) -> int:
    return call(import_volumes, source, "--output_dir", out, *more)


def metas(out: Path) -> dict[str, dict[str, Any]]:
    """meta.json of every sample by its level."""
    found = [json.loads(path.read_text()) for path in sorted(out.rglob("meta.json"))]
    return {meta.get("level"): meta for meta in found}


def rejects(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "rejects.json").read_text()) if (out / "rejects.json").exists() else []


def left_out(folder: Path) -> list[dict[str, str]]:
    with (folder / "left_out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scans``, the axial CT of a spine, L2 with a lesion; its labels, the lesion as SEG and as NIfTI, a table."""
    folder = tmp_path_factory.mktemp("archive")
    spine = made.spine()
    files = made.write_spine(folder / "scans", spine)
    made.write_nifti(folder / "labels.nii.gz", *made.turned(spine.labels, spine.affine, "RAH"))
    made.write_nifti(folder / "lesion.nii.gz", *made.turned(spine.lesion.astype(np.uint8), spine.affine, "HRA"))
    made.write_seg(folder / "lesion.dcm", files, {"moderate osteolytic lesion": spine.lesion})
    (folder / "cases.csv").write_text(f"image,labels,lesion,prompt\nscans,labels.nii.gz,lesion.nii.gz,{PROMPT}\n")
    return folder


@pytest.fixture(scope="module")
def imported(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples of ``cases.csv`` in the sagittal plane."""
    out = tmp_path_factory.mktemp("imported") / "data"
    assert run(archive / "cases.csv", out, "--preset", "totalsegmentator") == 0
    return out


def test_choices_are_those_of_the_library() -> None:
    assert set(PRESETS) == set(import_volumes.PRESETS)
    assert import_volumes.PLANES == volumes.PLANES
    text = import_volumes.build_parser().format_help()
    assert all(name in text for name in WINDOWS)


def test_a_series_with_labels_and_a_lesion_becomes_samples(imported: Path) -> None:
    samples, rejected = load_samples(imported)
    assert not rejected
    assert {sample.level: sample.prompt for sample in samples} == {"L1": "healthy", "L2": PROMPT, "L3": "healthy"}
    assert len({sample.patient_id for sample in samples}) == 1
    for sample in samples:
        image = read_image(sample.image)
        anatomy = read_anatomy(sample.anatomy, image.shape)
        assert image.dtype == np.uint16
        rows = {label: np.argwhere(anatomy == label).mean(axis=0) for label in (1, 2, 4)}
        assert rows[1][1] < rows[4][1]  # the body lies in front of the canal, which is at the left
        assert (sample.mask is not None) == (sample.level == "L2")
    order = sorted(samples, key=lambda each: np.argwhere(read_anatomy(each.anatomy, (60, 70)) == 1)[:, 0].mean())
    assert [sample.level for sample in order] == ["L1", "L2", "L3"]  # head up
    meta = metas(imported)["L2"]
    assert meta["spacing_mm"] == [1.0, 1.0]
    assert meta["native_spacing_mm"] == [1.0, 1.25]
    assert (meta["modality"], meta["region"], meta["plane"], meta["unit"]) == ("CT", "lumbar", "sagittal", "HU")
    assert (meta["kvp"], meta["manufacturer"], meta["scanner"]) == (120, "Maker", "Model 1")
    assert [meta["value_offset"] + meta["value_scale"] * level for level in meta["window"]] == [-500, 1299]
    assert meta["window_rule"] == "bone"
    assert not meta["acquired"]


def test_what_comes_out_is_taken_as_it_is(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(ver_openImagesDatasets, "--root_dir", imported, "--strict") == 0
    assert call(doctor, "--data", imported) == 0


def test_a_sheet_shows_the_samples_with_directions(imported: Path) -> None:
    assert "import_overlays_files/sheet_0001.png" in (imported / "import_overlays.html").read_text()
    sheet = read_image(imported / "import_overlays_files" / "sheet_0001.png")
    assert (sheet == (80, 220, 100)).all(axis=-1).any()  # the vertebra's outline


@pytest.mark.parametrize("syntax", ["explicit", "j2k"])
def test_values_of_acquired_slices_are_the_files_own(tmp_path: Path, syntax: str) -> None:
    """Axial slices against SimpleITK's reading: value = value_offset + value_scale * pixel, and where it lies."""
    spine = made.spine((48, 56, 60), (1.25, 1.25, 1.0))
    made.write_spine(tmp_path / "scans", spine, syntax=syntax, RescaleSlope="2", RescaleIntercept="-1000.5")
    made.write_nifti(tmp_path / "labels.nii.gz", spine.labels, spine.affine)
    flags = ["--labels", tmp_path / "labels.nii.gz", "--preset", "totalsegmentator", "--plane", "axial"]
    assert run(tmp_path / "scans", tmp_path / "out", *flags, "--slices", 2) == 0
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "scans")))
    image = reader.Execute()
    values = SimpleITK.GetArrayFromImage(image)
    mapping = json.loads((tmp_path / "out.private" / "mapping.json").read_text())
    found = sorted((tmp_path / "out").rglob("meta.json"))
    assert len(found) == 6
    for path in found:
        meta = json.loads(path.read_text())
        pixels = read_image(path.with_name("image.png")).astype(float)
        place = np.array(meta["affine"]) @ (0, 0, 0, 1) + (*mapping["series"][meta["series"]]["origin"], 0)
        index = image.TransformPhysicalPointToIndex(place[:3])
        assert meta["acquired"]
        assert index[:2] == (0, 0)
        np.testing.assert_array_equal(meta["value_offset"] + meta["value_scale"] * pixels, values[index[2]])
        stored = made.pydicom.dcmread(mapping["instances"][meta["instance"]]["path"])
        assert float(stored.ImagePositionPatient[2]) == pytest.approx(place[2])
        np.testing.assert_array_equal(stored.pixel_array * 2 - 1000.5, values[index[2]])
    assert run(tmp_path / "scans", tmp_path / "out2", *flags, "--slices", 2, "--mm_per_pixel", 2.5) == 0
    assert {tuple(meta["spacing_mm"]) for meta in metas(tmp_path / "out2").values()} == {(2.5, 2.5)}


def test_nifti_values_are_nibabels(archive: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-1000, 2000, (40, 56, 60)).astype(np.int16)
    spine = made.spine()
    made.write_nifti(tmp_path / "ct.nii.gz", values, spine.affine, scl_slope=1, scl_inter=0)
    flags = ["--labels", archive / "labels.nii.gz", "--preset", "totalsegmentator", "--modality", "CT"]
    assert run(tmp_path / "ct.nii.gz", tmp_path / "out", *flags, "--window", -200, 900, "--plane", "coronal") == 0
    array = np.asarray(nibabel.as_closest_canonical(nibabel.load(tmp_path / "ct.nii.gz")).dataobj)
    for path in (tmp_path / "out").rglob("meta.json"):
        meta = json.loads(path.read_text())
        window = [meta["value_offset"] + meta["value_scale"] * level for level in meta["window"]]
        assert (window, meta["unit"], meta["window_rule"]) == ([-200, 900], "HU", "given")
        assert meta["spacing_mm"] == [1, 1]
        pixels = meta["value_offset"] + read_image(path.with_name("image.png")).astype(float)
        coronal = array[::-1, array.shape[1] - 1 - meta["slice"], ::-1].T  # right at the left, head up
        rows = np.linspace(0, coronal.shape[0] - 1, 7).astype(int)  # 1.5 mm columns are resampled to 1 mm, rows are not
        places = (np.arange(pixels.shape[1]) + 0.5) / 1.5 - 0.5
        for row in rows:
            expected = np.interp(places, np.arange(coronal.shape[1]), coronal[row])
            np.testing.assert_allclose(pixels[row, 2:-2], expected[2:-2], atol=0.6)


def test_a_dicom_segmentation_brings_its_sentence(archive: Path, tmp_path: Path) -> None:
    flags = ["--labels", archive / "labels.nii.gz", "--lesions", archive / "lesion.dcm", "--preset", "totalsegmentator"]
    assert run(archive / "scans", tmp_path / "out", *flags, "--slices", "lesion") == 0
    samples, _ = load_samples(tmp_path / "out")
    assert {sample.prompt for sample in samples} == {"moderate osteolytic lesion"}
    assert len(samples) > 3
    assert {sample.level for sample in samples} == {"L2"}


def test_a_lesion_without_a_sentence_is_rejected(archive: Path, tmp_path: Path) -> None:
    flags = ["--labels", archive / "labels.nii.gz", "--lesions", archive / "lesion.nii.gz"]
    assert run(archive / "scans", tmp_path / "out", *flags, "--preset", "totalsegmentator") == 3
    (reject,) = rejects(tmp_path / "out")
    assert "has no sentence" in reject["reason"]
    assert {sample.level for sample in load_samples(tmp_path / "out")[0]} == {"L1", "L3"}


def test_lesions_of_two_files_have_the_sentences_of_their_rows(archive: Path, tmp_path: Path) -> None:
    spine = made.spine()
    upper = np.roll(spine.lesion, 20, axis=2) & (spine.labels == 31)
    made.write_nifti(tmp_path / "upper.nii.gz", upper.astype(np.uint8), spine.affine)
    rows = "image,labels,lesion,prompt\n"
    for lesion, words in ((archive / "lesion.nii.gz", "lytic lesion"), (tmp_path / "upper.nii.gz", "blastic lesion")):
        rows += f"{archive / 'scans'},{archive / 'labels.nii.gz'},{lesion},{words}\n"
    (tmp_path / "rows.csv").write_text(rows)
    assert run(tmp_path / "rows.csv", tmp_path / "out", "--preset", "totalsegmentator") == 0
    prompts = {sample.level: sample.prompt for sample in load_samples(tmp_path / "out")[0]}
    assert prompts == {"L1": "blastic lesion", "L2": "lytic lesion", "L3": "healthy"}


@pytest.mark.parametrize("axes", ["LPH", "PHL", "HLP"])
def test_an_image_of_one_slice_is_cut_in_its_plane(tmp_path: Path, axes: str) -> None:
    values, affine = made.turned(made.marked((32, 32, 1)), made.grid(made.AXIAL, (32, 32, 1), (1, 1, 3)), axes)
    made.write_nifti(tmp_path / "slice.nii.gz", values, affine)
    assert run(tmp_path / "slice.nii.gz", tmp_path / "out") == 0
    (meta,) = metas(tmp_path / "out").values()
    assert meta["plane"] == "axial"
    assert read_image(next((tmp_path / "out").rglob("image.png"))).shape == (32, 32)


def test_what_was_rejected_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = made.grid(made.AXIAL, (16, 16, 16), (1, 1, 1))
    for name in ("a", "b"):
        made.write_nifti(tmp_path / f"{name}.nii.gz", made.marked((16, 16, 16)), affine)
    out, read = tmp_path.with_name(f"{tmp_path.name}_out"), writing.read_volume

    def away(path: Path) -> volumes.Volume:
        if path.name == "b.nii.gz":
            raise OSError("the disk is away")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "read_volume", away)
        assert run(tmp_path, out) == 3
        assert "OSError: the disk is away" in rejects(out)[0]["reason"]
    assert run(tmp_path, out) == 0
    assert len(load_samples(out)[0]) == 2
    assert not rejects(out)


def test_target_slices_and_limit(archive: Path, tmp_path: Path) -> None:
    flags = ["--preset", "totalsegmentator", "--target", "L1", "L2", "--slices", "all", "--limit", 5]
    assert run(archive / "cases.csv", tmp_path / "out", *flags) == 0
    samples, _ = load_samples(tmp_path / "out")
    assert len(samples) == 5
    assert {sample.level for sample in samples} <= {"L1", "L2"}
    reasons = " ".join(row["reason"] for row in left_out(tmp_path / "out"))
    assert "beyond the limit of 5" in reasons


def test_the_limit_is_a_patients_over_all_series(tmp_path: Path) -> None:
    values = np.full((8, 8, 4), 24, np.int16)
    values[2:6] = 1324
    for number in (1, 2, 3):
        affine = made.grid(made.AXIAL, values.shape, (1, 1, 1))
        made.write_series(tmp_path / "s", values, affine, SeriesNumber=number, PatientID="P")
    assert run(tmp_path / "s", tmp_path / "out", "--plane", "axial", "--limit", 2) == 0
    assert len(load_samples(tmp_path / "out")[0]) == 2
    assert any("have given the 2 samples of --limit" in row["reason"] for row in left_out(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window", "lung"], "--window: expected one of bone, soft_tissue, file, body, or LOW HIGH, found lung"),
        (["--window", 900, -200], "found 900 -200; LOW is to be below HIGH"),
        (["--window", "nan", 1], "LOW is to be below HIGH"),
        (["--window", 0, "inf"], "LOW is to be below HIGH"),
        (["--slices", 0], "--slices: expected middle, lesion, all or a number above 0, found 0"),
        (["--target", "L3", "X9"], "--target: expected levels such as L3, or sacrum, found X9"),
        (["--slices", "some"], "--slices: expected middle, lesion, all or a number above 0, found some"),
        (["--labels", "nowhere.nii.gz"], "--labels nowhere.nii.gz: does not exist"),
        (["--map", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags(archive: Path, tmp_path: Path, flags: list[Any], words: str) -> None:
    with pytest.raises(MedSoftError) as caught:
        run(archive / "scans", tmp_path / "out", *flags)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_output_beside_the_source_only(archive: Path) -> None:
    with pytest.raises(UsageError, match=r"lies inside .* or holds it"):
        run(archive / "scans", archive / "scans" / "out")
    with pytest.raises(UsageError, match="nowhere: does not exist"):
        run(archive / "nowhere", archive / "out")


def test_without_the_extra_one_line_says_what_to_install(archive: Path, tmp_path: Path) -> None:
    code = "import sys, runpy; sys.modules['highdicom'] = None\n"
    code += "import importlib.util as u; f = u.find_spec\n"
    code += "u.find_spec = lambda name, *more: None if name == 'highdicom' else f(name, *more)\n"
    code += f"sys.argv = ['import', {str(archive / 'scans')!r}, '--output_dir', {str(tmp_path / 'out')!r}]\n"
    code += "runpy.run_path('tool/import_volumes.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run python -m pip install -e '.[dicom]'" in done.stderr  # no registry has the package


# ------------------------------------------------------------------------------------------------------------ bad input


def colour(dataset: Any, frame: int) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = dataset.PixelData * 3


def broken(folder: Path, name: str) -> None:
    """One faulty image ``name`` in a folder of its own."""
    values, affine = made.marked((32, 32, 6)), made.grid(made.AXIAL, (32, 32, 6), (1, 1, 2))
    place = folder / name
    if name == "not DICOM":
        place.mkdir()
        (place / "IM1.dcm").write_bytes(b"hello " * 100)
        return
    faults: dict[str, Callable[[Any, int], Any]] = {
        "missing slice": lambda dataset, frame: frame != 3,
        "spacing 0": lambda dataset, frame: setattr(dataset, "PixelSpacing", [0, 0]),
        "burned in": lambda dataset, frame: setattr(dataset, "BurnedInAnnotation", "YES"),
        "no pixels": lambda dataset, frame: None,
        "truncated": lambda dataset, frame: None,
        "sound": lambda dataset, frame: None,
        "duplicate": lambda dataset, frame: None,
        "gantry tilt": lambda dataset, frame: setattr(dataset, "ImagePositionPatient", [0, 0.7 * frame, 2 * frame]),
        "localizer": lambda dataset, frame: (
            setattr(dataset, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]) if frame == 4 else None
        ),
        "unknown syntax": lambda dataset, frame: None,
        "colour": colour,
    }
    files = made.write_series(place, values, affine, PatientID=name, change=faults[name])
    if name == "truncated":
        files[2].write_bytes(files[2].read_bytes()[:-500])
    if name == "duplicate":
        shutil.copy(files[1], place / "again.dcm")
    if name == "unknown syntax":
        for file in files:
            dataset = made.pydicom.dcmread(file)
            dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
            dataset["PixelData"].is_undefined_length = True
            dataset.PixelData = made.pydicom.encaps.encapsulate([b"\0\0\1\xb3" * 20])
            dataset.save_as(file)
    if name == "no pixels":
        dataset = made.pydicom.dcmread(files[0])
        del dataset.PixelData
        dataset.save_as(files[0])


FAULTS = {
    "not DICOM": "DICOM",
    "missing slice": "missing",
    "spacing 0": "0",
    "burned in": "BurnedInAnnotation",
    "no pixels": "pixel",
    "truncated": "truncated",
    "duplicate": "two slices at one place",
    "gantry tilt": "tilt",
    "localizer": "orientation",
    "unknown syntax": "MPEG2",
    "colour": "colour",
}


def test_what_is_faulty_is_named_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (*FAULTS, "sound"):
        broken(tmp_path, name)
    out = tmp_path.with_name(f"{tmp_path.name}_out")
    assert run(tmp_path, out, "--plane", "axial") == 3
    assert len(load_samples(out)[0]) == 1
    assert len(rejects(out)) == len(FAULTS)
    private = left_out(out.with_name(f"{out.name}.private"))
    public = {row["case"]: row for row in left_out(out)}
    lines = [line for line in caplog.messages if line.startswith("rejected: ")]
    assert len(lines) == 10
    assert all(sum(f"/{name}" in line for name in FAULTS) == 1 for line in lines)  # the console names the files
    assert f"... and 1 more like that; all are listed in {out / 'left_out.csv'}" in caplog.messages
    for name, word in FAULTS.items():
        (row,) = [row for row in private if f"/{name}" in row["path"] and row["rejected"] == "True"]
        assert word.casefold() in row["reason"].casefold(), row
        assert public[row["case"]]["rejected"] == "yes"
        assert f"/{name}" not in json.dumps(public)


def test_nothing_to_import_is_an_error(tmp_path: Path) -> None:
    broken(tmp_path, "not DICOM")
    with pytest.raises(MedSoftError, match=r"holds no image that can be imported; the first of 1: .*IM1.dcm"):
        run(tmp_path, tmp_path.with_name(f"{tmp_path.name}_out"))
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(MedSoftError, match=r"text\.txt"):
        run(tmp_path / "text.txt", tmp_path.with_name(f"{tmp_path.name}_out"))


@pytest.mark.parametrize("fault", ["another grid", "unknown numbers", "outside", "two lesions"])
def test_labels_and_lesions_that_do_not_fit(archive: Path, tmp_path: Path, fault: str) -> None:
    spine = made.spine()
    labels, lesion, affine = spine.labels, spine.lesion.astype(np.uint8), spine.affine.copy()
    preset = "totalsegmentator"
    if fault == "another grid":
        affine[:3, 3] += 1000
    elif fault == "unknown numbers":
        preset = "spider"
    elif fault == "outside":
        lesion = np.zeros_like(lesion)
        lesion[2:6, 40:44, 20:24] = 1
    else:
        lesion = lesion.copy()
        lesion[14:26, 20:26, 48:52] = 2  # in L1
    made.write_nifti(tmp_path / "labels.nii.gz", labels, affine)
    made.write_nifti(tmp_path / "lesion.nii.gz", lesion, spine.affine)
    (tmp_path / "rows.csv").write_text(f"image,prompt,level\nscans,{PROMPT},L2\n")
    flags = ["--labels", tmp_path / "labels.nii.gz", "--lesions", tmp_path / "lesion.nii.gz", "--preset", preset]
    command = (archive / "scans", tmp_path / "out", *flags, "--table", tmp_path / "rows.csv")
    words = {
        "another grid": "does not overlap",
        "unknown numbers": "30",
        "outside": "outside of every vertebra",
        "two lesions": "is about L2",
    }[fault]
    if fault in ("another grid", "unknown numbers"):  # nothing else is in the source
        with pytest.raises(MedSoftError, match=words):
            run(*command)
    else:
        assert run(*command) == 3
    assert words in " ".join(reject["reason"] for reject in rejects(tmp_path / "out"))


def test_a_label_map_among_the_images_is_none(archive: Path, tmp_path: Path) -> None:
    spine = made.spine()
    made.write_nifti(tmp_path / "ct.nii.gz", spine.image, spine.affine)
    made.write_nifti(tmp_path / "seg.nii.gz", spine.labels, spine.affine)
    out = tmp_path.with_name(f"{tmp_path.name}_out")
    assert run(tmp_path, out, "--modality", "CT") == 3
    (reject,) = rejects(out)
    assert "looks like a label map; name it with --labels or --lesions" in reject["reason"]
    assert len(load_samples(out)[0]) == 1


# ------------------------------------------------------------------------------------------------------ run and re-run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_again_finds_it_complete(
    archive: Path, imported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = {path: path.stat().st_mtime_ns for path in imported.rglob("*.png")}
    assert run(archive / "cases.csv", imported, "--preset", "totalsegmentator") == 0
    assert "already complete (3 samples of 1 patient, 1 with a lesion)" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in imported.rglob("*.png")} == before


def test_other_settings_are_refused_and_replace_with_overwrite(archive: Path, tmp_path: Path) -> None:
    flags = ["--labels", archive / "labels.nii.gz", "--preset", "totalsegmentator"]
    assert run(archive / "scans", tmp_path / "out", *flags) == 0
    with pytest.raises(UsageError, match=r"imported samples of another run \(plane: sagittal -> axial\)"):
        run(archive / "scans", tmp_path / "out", *flags, "--plane", "axial")
    (tmp_path / "key").write_text("ab" * 32)
    with pytest.raises(UsageError, match="key: "):
        run(archive / "scans", tmp_path / "out", *flags, "--key", tmp_path / "key")
    assert run(archive / "scans", tmp_path / "out", *flags, "--plane", "axial", "--overwrite") == 0
    assert {meta["plane"] for meta in metas(tmp_path / "out").values()} == {"axial"}


def test_a_key_gives_the_same_pseudonyms_again(archive: Path, tmp_path: Path) -> None:
    flags = ["--labels", archive / "labels.nii.gz", "--preset", "totalsegmentator"]
    assert run(archive / "scans", tmp_path / "one", *flags) == 0
    key = tmp_path / "one.private" / "key"
    assert run(archive / "scans", tmp_path / "two", *flags, "--key", key) == 0
    assert run(archive / "scans", tmp_path / "three", *flags) == 0
    one, two, three = (next(iter(metas(tmp_path / name).values())) for name in ("one", "two", "three"))
    assert one["patient_id"] == two["patient_id"] != three["patient_id"]
    assert one["series"] == two["series"] != three["series"]
    assert not (tmp_path / "two.private" / "key").exists()


def test_the_year_only_if_asked(archive: Path, tmp_path: Path) -> None:
    assert run(archive / "scans", tmp_path / "with", "--year") == 0
    assert run(archive / "scans", tmp_path / "without") == 0
    assert [meta.get("year") for meta in metas(tmp_path / "with").values()] == [2023]
    assert [meta.get("year") for meta in metas(tmp_path / "without").values()] == [None]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/real")
def test_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CT series and CT NIfTI with TotalSegmentator's labels, MR NIfTI with a lesion: as they are, no complaint."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "image.txt").write_text("hyperintense lesion of the cervical cord")
    series = [REAL / "ct_series", "--labels", REAL / "ct_series_labels.nii.gz", "--plane", "axial", "--slices", 2]
    volume = [REAL / "ct_nifti" / "image.nii.gz", "--labels", REAL / "ct_nifti" / "labels.nii.gz", "--modality", "CT"]
    mr = [REAL / "mr_nifti" / "image.nii.gz", "--lesions", "lesion.nii.gz", "--modality", "MR"]
    monkeypatch.chdir(tmp_path)
    for name, command in {"series": series, "volume": volume, "mr": mr}.items():
        more = ["--preset", "totalsegmentator"] if name != "mr" else ["--table", tmp_path / "texts"]
        code = run(command[0], tmp_path / "out" / name, *command[1:], *more)
        assert code == 0, name
    assert call(ver_openImagesDatasets, "--root_dir", tmp_path / "out", "--strict") == 0
    assert call(doctor, "--data", tmp_path / "out") == 0
