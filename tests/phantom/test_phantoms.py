"""Phantoms: what a picture promises, and the command that writes a dataset of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ldm.core.errors import UsageError
from ldm.core.files import fingerprint
from ldm.core.run_folder import RunFolder
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.phantom import dataset
from ldm.phantom.dataset import write_dataset
from ldm.phantom.spines import LESION_TYPES, LEVELS, SEVERITIES, Phantom, biomedclip_pairs, plan, render_phantom
from ldm.phantom.worlds import lesion_prompt
from tool import make_phantoms

SCRIPT = Path(__file__).resolve().parents[2] / "tool" / "make_phantoms.py"


def _dilated(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _pairs(kind: str, n: int = 12) -> list[tuple[Phantom, Phantom]]:
    severities = [SEVERITIES[i % 3] for i in range(n)]
    return [(render_phantom(5, i, kind, severity), render_phantom(5, i, None)) for i, severity in enumerate(severities)]


def test_same_arguments_same_bytes_and_other_ones_differ():
    one, again = render_phantom(3, 8, "haemangioma", "severe"), render_phantom(3, 8, "haemangioma", "severe")
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.mask, again.mask)
    assert one.prompt == again.prompt
    for other in (render_phantom(3, 9, None), render_phantom(4, 8, None), render_phantom(3, 8, None, image=1)):
        assert other.image.shape != one.image.shape or not np.array_equal(other.image, one.image)


def test_native_sizes_and_body_sizes():
    shapes, widths, heights = set(), [], []
    for i in range(24):
        phantom = render_phantom(11, i, None)
        shapes.add(phantom.image.shape)
        assert all(104 <= side <= 144 for side in phantom.image.shape)
        assert phantom.image.dtype == np.uint8
        assert phantom.level in LEVELS
        assert 0.7 < phantom.spacing_mm < 1.1
        rows, columns = np.nonzero(phantom.anatomy == 1)
        widths.append(np.ptp(columns) + 1)
        heights.append(np.ptp(rows) + 1)
        assert set(np.unique(phantom.anatomy)) == {0, 1, 2, 3, 4}
        centre = np.array([rows.mean(), columns.mean()]) / phantom.image.shape
        assert np.all(np.abs(centre - 0.5) < 0.17)
    assert len(shapes) > 12
    assert 32 < np.median(widths) < 50
    assert max(heights) < 50  # with its tilt the body still fits a crop of 64
    assert max(widths) < 58


@pytest.mark.parametrize("kind", LESION_TYPES)
def test_lesion_lies_in_the_target_body_and_has_the_promised_size(kind):
    for diseased, healthy in _pairs(kind):
        assert np.array_equal(diseased.anatomy, healthy.anatomy)
        assert not np.any(diseased.mask & ~_dilated(diseased.anatomy == 1, 1))
        diameter = 2 * np.sqrt(diseased.mask.sum() / np.pi)
        assert 8 < diameter < 28
        assert cv2.connectedComponents(diseased.mask.astype(np.uint8), connectivity=8)[0] == 2
    means = [np.mean([render_phantom(6, i, kind, severity).mask.sum() for i in range(8)]) for severity in SEVERITIES]
    assert means == sorted(means)


@pytest.mark.parametrize("kind", LESION_TYPES)
def test_twins_differ_near_the_mask_only(kind):
    signs = []
    for diseased, healthy in _pairs(kind):
        beyond = ~_dilated(diseased.mask, 2)
        assert np.array_equal(diseased.image[beyond], healthy.image[beyond])
        change = diseased.image.astype(int)[diseased.mask] - healthy.image[diseased.mask]
        assert np.abs(change).mean() > 5
        signs.append(change.mean())
    if kind == "osteolytic":
        assert max(signs) < -5
    if kind == "osteoblastic":
        assert min(signs) > 5
    if kind in ("salt-and-pepper", "haemangioma"):  # both brighter and darker than the bone
        assert abs(np.mean(signs)) < 20


def test_haemangioma_has_columns_and_salt_and_pepper_has_not():
    def anisotropy(kind: str) -> float:
        ratios = []
        for i in range(8):
            diseased, healthy = render_phantom(9, i, kind, "severe"), render_phantom(9, i, None)
            change = diseased.image.astype(float) - healthy.image
            ratios.append(np.abs(np.diff(change, axis=1)).sum() / np.abs(np.diff(change, axis=0)).sum())
        return float(np.median(ratios))

    assert anisotropy("haemangioma") > 1.6
    assert 0.7 < anisotropy("salt-and-pepper") < 1.4


def test_severity_controls_the_contrast():
    def contrast(severity: str) -> float:
        changes = []
        for i in range(8):
            diseased, healthy = render_phantom(2, i, "osteolytic", severity), render_phantom(2, i, None)
            changes.append((healthy.image.astype(int) - diseased.image)[diseased.mask].mean())
        return float(np.mean(changes))

    subtle, moderate, severe = (contrast(severity) for severity in SEVERITIES)
    assert subtle + 5 < moderate
    assert moderate + 5 < severe


def test_prompt_names_type_severity_and_level():
    wordings = set()
    for kind in LESION_TYPES:
        for severity in SEVERITIES:
            for i in range(4):
                phantom = render_phantom(1, i, kind, severity)
                for word in (kind, severity, phantom.level):
                    assert word in phantom.prompt
                wordings.add(phantom.prompt.replace(kind, "").replace(severity, "").replace(phantom.level, ""))
    assert len(wordings) > 2
    assert lesion_prompt("osteolytic", "severe", "L3", 0) == "a severe osteolytic lesion in the L3 vertebral body"


def test_healthy_has_no_lesion_and_severity_is_drawn_when_not_given():
    healthy = render_phantom(1, 4, None, "severe")
    assert healthy.healthy
    assert healthy.prompt == "healthy"
    assert healthy.severity is None
    assert not healthy.mask.any()
    drawn = [render_phantom(1, i, "osteolytic").severity for i in range(24)]
    assert set(drawn) == set(SEVERITIES)


@pytest.mark.parametrize(
    ("kind", "severity", "named"), [("fracture", None, "fracture"), ("osteolytic", "huge", "huge")]
)
def test_unknown_names_are_refused(kind, severity, named):
    with pytest.raises(ValueError, match=named):
        render_phantom(0, 0, kind, severity)


def test_plan_is_balanced_and_a_larger_one_contains_the_smaller():
    small, large = list(plan(6, 64)), list(plan(9, 96))
    assert set(small) < set(large)
    kinds = [kind for _, kind, _, _ in small if kind]
    assert {kind: kinds.count(kind) for kind in LESION_TYPES} == dict.fromkeys(LESION_TYPES, 16)
    assert sum(severity == "subtle" for _, _, severity, _ in small) == 16
    assert len({index for index, *_ in small}) == 70
    grouped = list(plan(4, 4, per_patient=2))
    assert len({index for index, *_ in grouped}) == 4
    assert len({(index, image) for index, *_, image in grouped}) == 8


def test_dataset_on_disk(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "a"), "--healthy", "3", "--diseased", "4", "--seed", "12"]
    assert make_phantoms.main(make_phantoms.build_parser().parse_args(arguments)) == 0
    folders = sorted(path for path in (tmp_path / "a").iterdir() if path.is_dir())
    assert len(folders) == 7
    for folder in folders:
        meta = json.loads((folder / "meta.json").read_text())
        prompt = (folder / "prompt.txt").read_text().strip()
        image, anatomy = (cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for name in ("image.png", "anatomy.png"))
        assert image.shape == anatomy.shape
        assert meta["sample_id"] == folder.name == f"{meta['patient_id']}_{meta['level']}"
        assert meta["synthetic"] is False
        assert meta["seed"] == 12
        if meta["lesion_type"] is None:
            assert prompt == "healthy"
            assert not (folder / "mask.png").exists()
        else:
            mask = cv2.imread(str(folder / "mask.png"), cv2.IMREAD_UNCHANGED)
            assert mask.shape == image.shape
            assert set(np.unique(mask)) == {0, 255}
            assert meta["lesion_type"] in prompt
    before = _files(tmp_path / "a")
    capsys.readouterr()
    assert make_phantoms.main(make_phantoms.build_parser().parse_args(arguments)) == 0
    assert "already complete" in capsys.readouterr().out
    assert _files(tmp_path / "a") == before


def test_pictures_do_not_depend_on_the_size_of_the_dataset_and_seeds_share_no_patient(tmp_path):
    write_dataset(tmp_path / "small", 5, 2, 2)
    write_dataset(tmp_path / "large", 5, 4, 5)
    write_dataset(tmp_path / "other", 6, 2, 2)
    small, large, other = (_files(tmp_path / name) for name in ("small", "large", "other"))
    pictures = {name for name in small if "/" in name}
    assert pictures
    assert all(large[name] == small[name] for name in pictures)
    assert not pictures & set(other)


def test_several_pictures_per_patient(tmp_path):
    write_dataset(tmp_path / "d", 5, 4, 4, per_patient=2)
    patients = [json.loads(path.read_text())["patient_id"] for path in (tmp_path / "d").glob("*/meta.json")]
    assert len(patients) == 8
    assert {patients.count(patient) for patient in patients} == {2}


def test_interrupted_run_is_finished(tmp_path):
    write_dataset(tmp_path / "whole", 5, 3, 3)
    whole = _files(tmp_path / "whole")
    write_dataset(tmp_path / "cut", 5, 3, 3)
    index = tmp_path / "cut" / "phantoms.json"
    stored = json.loads(index.read_text())
    index.write_text(json.dumps({"fingerprint": stored["fingerprint"], "complete": False}))
    lost = sorted(path for path in (tmp_path / "cut").iterdir() if path.is_dir())[2]
    lost.rename(tmp_path / "cut" / f".partial-{lost.name}")
    assert write_dataset(tmp_path / "cut", 5, 3, 3)
    assert _files(tmp_path / "cut") == whole


def test_other_arguments_need_overwrite_which_spares_foreign_folders(tmp_path):
    write_dataset(tmp_path / "d", 5, 3, 0)
    before = _files(tmp_path / "d")
    with pytest.raises(UsageError, match="--overwrite"):
        write_dataset(tmp_path / "d", 5, 2, 0)
    assert _files(tmp_path / "d") == before
    assert write_dataset(tmp_path / "d", 5, 2, 0, overwrite=True)
    assert len(list((tmp_path / "d").glob("*/image.png"))) == 2
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no phantoms of this command"):
        write_dataset(foreign, 5, 2, 0, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("counts", [(-1, 2, 1), (2, -1, 1), (0, 0, 1), (2, 2, 0)])
def test_impossible_counts_are_refused(tmp_path, counts):
    with pytest.raises(UsageError, match="counts"):
        write_dataset(tmp_path / "d", 5, *counts)
    assert not (tmp_path / "d").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "d").write_text("x")
    with pytest.raises(UsageError, match="found a file"):
        write_dataset(tmp_path / "d", 5, 1, 1)


def test_contact_sheet(tmp_path):
    assert make_phantoms.main(make_phantoms.build_parser().parse_args(["--sheet", str(tmp_path / "sheet.png")])) == 0
    sheet = cv2.imread(str(tmp_path / "sheet.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape[0] == 5 * (22 + 148)
    assert all(line[4:18, :80].any() for line in sheet.reshape(5, 170, -1))  # a row says what it shows
    assert sheet.std() > 20


def test_calibration_says_how_the_classifier_does_on_few_and_on_many_patients(monkeypatch, capsys) -> None:
    from ldm.phantom import calibration

    small = {"FEW": (8, 4), "MANY": (10, 10), "VALIDATION": (4, 4), "TEST": (8, 12), "FEW_EPOCHS": 1, "MANY_EPOCHS": 1}
    small["FEW_RUNS"] = 2
    for name, value in small.items():
        monkeypatch.setattr(calibration, name, value)
    assert make_phantoms.main(make_phantoms.build_parser().parse_args(["--calibrate", "--seed", "3"])) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    auc, share = r"[01]\.\d{3}", r"\d+\.\d%"
    assert re.fullmatch(
        rf"test AUC {auc} \({auc}-{auc}, 2 runs\) with 4 diseased and 8 healthy patients; {auc} with 10 and 10 "
        rf"\(called diseased: {share} healthy, {share} subtle, {share} moderate, {share} severe\); 20 test patients",
        said,
    )


def test_command_line_exit_codes_and_help_without_torch(tmp_path):
    write_dataset(tmp_path / "d", 5, 1, 1)
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "d"), "--healthy", "2", "--diseased", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert refused.stderr.count("\n") == 1
    help_ = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert "--calibrate" in help_.stdout
    assert not any(line.split("|")[-1].strip() in ("torch", "cv2") for line in help_.stderr.splitlines())


def test_what_the_biomedclip_stand_in_has_seen_can_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dataset, "BIOMEDCLIP_PAIRS", 7)
    assert (
        make_phantoms.main(
            make_phantoms.build_parser().parse_args(["--output_dir", str(tmp_path), "--seen_by_biomedclip"])
        )
        == 0
    )
    samples = {sample.sample_id: sample for sample in load_samples(tmp_path)[0]}
    expected = [render_phantom(*item) for item in biomedclip_pairs(7)]
    assert samples.keys() == {phantom.sample_id for phantom in expected}
    for phantom in expected:
        assert np.array_equal(read_image(samples[phantom.sample_id].image), phantom.image)
        assert samples[phantom.sample_id].prompt == phantom.prompt
    assert [phantom.healthy for phantom in expected] == [True, False, False] * 2 + [True]
    assert {phantom.seed for phantom in expected} == {90_001}  # of the phantom base alone


def test_two_equal_commands_at_once_both_end_well(tmp_path: Path) -> None:
    """The test holds the folder until both say that they wait: whoever comes second finds the work of the first."""
    out = tmp_path / "d"
    command = [sys.executable, str(SCRIPT), "--output_dir", str(out), "--healthy", "2", "--diseased", "2"]
    with RunFolder(out, "phantoms.json").lock():
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for each in both:
            assert each.stdout is not None
            assert "another run is writing here at this moment; waiting for it to end" in each.stdout.readline()
    said = sorted(each.communicate(timeout=120)[0] for each in both)
    assert [each.returncode for each in both] == [0, 0]
    assert [": already complete (2 healthy" in text for text in said] == [False, True]
    write_dataset(tmp_path / "alone", 0, 2, 2)
    assert _files(out) == _files(tmp_path / "alone")


def test_a_dataset_of_the_older_version_is_complete(tmp_path: Path) -> None:
    """Its record names the same fingerprint and arguments."""
    write_dataset(tmp_path / "d", 5, 1, 0)
    arguments = {"version": 3, "seed": 5, "healthy": 1, "diseased": 0, "per_patient": 1}
    stored = {"fingerprint": fingerprint(arguments), "arguments": arguments, "complete": True, "images": 1}
    assert (tmp_path / "d" / "phantoms.json").read_text() == json.dumps(stored, indent=2) + "\n"
    with pytest.raises(UsageError, match=r"another run \(seed: 5 -> 6, diseased: 0 -> 1\)"):
        write_dataset(tmp_path / "d", 6, 1, 1)
