"""tool/evaluate.py: planted, pasted, flat and memorised copies, their threshold, quarantine."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from evaluations import diseased, found, run

from ldm.core.errors import MedSoftError
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.phantom.dataset import write_dataset
from tool import copy_paste


def paste(lesion: Path, healthy: Path, target: Path, rng: np.random.Generator) -> None:
    """A training lesion in another patient's healthy spine, brighter, a little noisier and elsewhere: memorised."""
    shutil.copytree(healthy, target)
    source, mask = read_image(lesion / "image.png"), read_image(lesion / "mask.png") > 0
    image, anatomy = read_image(target / "image.png").copy(), read_image(target / "anatomy.png")
    rows, columns = np.nonzero(mask)
    centre = np.argwhere(anatomy == 1).mean(axis=0)
    down, right = (round(c - x.mean()) for c, x in zip(centre, (rows, columns), strict=True))
    pixels = 0.8 * source[mask].astype(float) + 30 + rng.normal(0, 1.5, mask.sum())
    new = np.zeros(image.shape, np.uint8)
    image[rows + down, columns + right] = np.clip(pixels, 0, 255)
    new[rows + down, columns + right] = 255
    write_png(target / "image.png", image)
    write_png(target / "mask.png", new)
    (target / "prompt.txt").write_text((lesion / "prompt.txt").read_text())


def test_planted_copies_are_caught_and_nothing_else(real: Path, honest: Path, tmp_path: Path) -> None:
    planted, rng = tmp_path / "results", np.random.default_rng(0)
    shutil.copytree(honest, planted)
    copied = diseased(real)[3:6]
    for folder in copied:  # training images returned as "synthetic"
        shutil.copytree(folder, planted / f"new_{folder.name}")
    healthy = sorted(path.parent for path in honest.glob("*/image.png") if not (path.parent / "mask.png").exists())
    for lesion, spine in zip(diseased(real)[7:9], healthy, strict=True):  # training lesions in other spines
        paste(lesion, spine, planted / f"pasted_{lesion.name}", rng)
    out = tmp_path / "out"
    assert run(real, planted, out) == 3
    listed = json.loads((out / "copies.json").read_text())
    expected = {f"new_{folder.name}": folder.name for folder in copied}
    expected |= {f"pasted_{folder.name}": folder.name for folder in diseased(real)[7:9]}
    assert {each["sample_id"]: each["nearest"] for each in listed} == expected
    assert all(each["correlation"] >= found(out)["copies"]["threshold"] for each in listed)

    before = {path.name for path in planted.iterdir()}
    assert run(real, planted, out, "--quarantine") == 3
    moved = {path.name for path in (tmp_path / "results_quarantine").iterdir()}
    assert moved == set(expected)
    assert {path.name for path in planted.iterdir()} == before - moved
    assert run(real, planted, out, "--overwrite") == 0


def test_pasted_lesions_are_compared_with_their_source(real: Path, tmp_path: Path) -> None:
    """They are turned, scaled and of another contrast; whether or not they count as copies, a warning says it."""
    given = ["--train_json", real, "--output_dir", tmp_path / "pasted", "--variants", 3]
    assert tiny.call(copy_paste, *given) == 0
    run(real, tmp_path / "pasted", tmp_path / "out")
    numbers = found(tmp_path / "out")
    assert numbers["copies"]["median_correlation_with_the_source"]["pasted"] > 0.85
    (said,) = [text for text in numbers["warnings"] if "shines through by construction" in text]
    assert said.startswith("9 synthetic lesions are, or began as, a real lesion")
    rows = list(csv.DictReader((tmp_path / "out" / "neighbours.csv").read_text().splitlines()))
    metas = {row["sample_id"]: json.loads((Path(row["image"]).parent / "meta.json").read_text()) for row in rows}
    nearest = [row["nearest"] == metas[row["sample_id"]]["pasted_from"] for row in rows]
    assert sum(nearest) >= 7
    assert all(float(row["correlation"]) >= float(row["source_correlation"]) for row in rows)
    assert numbers["copies"]["source_threshold"] >= numbers["copies"]["threshold"]


def saturate(folder: Path, level: int = 255) -> None:
    image, mask = read_image(folder / "image.png").copy(), read_image(folder / "mask.png") > 0
    image[cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0] = level
    write_png(folder / "image.png", image)


def test_equal_pixels_are_copies_and_other_flat_lesions_cannot_be_compared(
    real: Path, honest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saturated lesions have no variance, so nothing correlates with them; one copy is written as 16 bits."""
    train, results, out = tmp_path / "train", tmp_path / "results", tmp_path / "out"
    shutil.copytree(real, train)
    copied = diseased(train)[:3]
    for folder in copied:
        saturate(folder)
        shutil.copytree(folder, results / f"new_{folder.name}")
    deep = results / f"new_{copied[0].name}"
    write_png(deep / "image.png", read_image(deep / "image.png").astype(np.uint16) * 257)
    (deep / "meta.json").write_text(json.dumps({"patient_id": "new", "window": [0, 65535]}))
    for folder in diseased(honest)[:5]:
        shutil.copytree(folder, results / folder.name)
    for folder in diseased(honest)[:2]:
        saturate(results / folder.name)
    assert run(train, results, out) == 3
    assert found(out)["copies"]["count"] == 3
    listed = {row["sample_id"]: row for row in json.loads((out / "copies.json").read_text())}
    assert {name: row["nearest"] for name, row in listed.items()} == {f"new_{each.name}": each.name for each in copied}
    assert {row["correlation"] for row in listed.values()} == {1.0}
    assert found(out)["copies"]["not_comparable"] == 2
    with open(out / "neighbours.csv", newline="") as handle:
        rows = {row["sample_id"]: row["comparable"] for row in csv.DictReader(handle)}
    assert [name for name, comparable in rows.items() if comparable == "False"] == sorted(
        folder.name for folder in diseased(honest)[:2]
    )
    text = "2 synthetic lesions are flat (saturated, for instance): their pixels cannot be compared"
    assert any(each.startswith(text) for each in found(out)["warnings"])
    assert text in caplog.text
    assert text in (out / "report.html").read_text()


def without_patient(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["patient_id"]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("named", [True, False])
def test_the_threshold_says_why_it_is_near_1(real: Path, few: Path, tmp_path: Path, named: bool) -> None:
    """Two slices of one lesion, counted as two patients: as different as lesions of two patients can be, it seems."""
    train, rng = tmp_path / "train", np.random.default_rng(0)
    shutil.copytree(real, train)
    first = diseased(train)[0]
    slice_of_it = shutil.copytree(first, train / f"{first.name}_next")
    noisy = read_image(first / "image.png") + rng.normal(0, 0.7, read_image(first / "image.png").shape)
    write_png(slice_of_it / "image.png", noisy.round().clip(0, 255).astype(np.uint8))
    meta = json.loads((slice_of_it / "meta.json").read_text()) | {"patient_id": "somebody else"}
    (slice_of_it / "meta.json").write_text(json.dumps(meta))
    if not named:
        for folder in diseased(train):
            without_patient(folder)
    assert run(train, few, tmp_path / "out") == 0
    numbers = found(tmp_path / "out")
    threshold = numbers["copies"]["threshold"]
    assert threshold > 0.99
    assert numbers["copies"]["training_samples_without_patient_id"] == (0 if named else 31)
    said = " ".join(numbers["warnings"])
    assert ("31 training samples have no patient_id of their own" in said) == (not named)
    assert ("are nearly the same (correlation 0.99" in said) == named
    assert f"{first.name} and {slice_of_it.name}" in said or f"{slice_of_it.name} and {first.name}" in said or not named
    assert f"({threshold:.3f})" in said


def test_one_training_patient_leaves_the_threshold_uncalibrated(real: Path, honest: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    shutil.copytree(diseased(real)[0], alone / "a")
    assert run(real, honest, out, "--train_json", alone) == 0
    assert found(out)["copies"] == {
        "count": 0,
        "threshold": 0.95,
        "source_threshold": 0.95,
        "not_comparable": 0,
        "closest_pair_of_training_patients": None,
        "median_correlation_with_the_source": None,
        "training_samples_without_patient_id": 0,
        "nearer_than_95_percent_of_held_out": pytest.approx(0.05, abs=0.06),
    }


@pytest.mark.parametrize("place", ["behind a link", "is a link", "here"])
def test_copies_are_moved_out_of_a_folder_reached_through_a_link(
    real: Path, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    disk = tmp_path / "disk" / "results"
    for folder in diseased(honest)[:3]:
        shutil.copytree(folder, disk / "inner" / folder.name)
    shutil.copytree(diseased(real)[0], disk / "inner" / "copied")
    given = {"behind a link": tmp_path / "link" / "results", "is a link": tmp_path / "results", "here": Path()}[place]
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "results").symlink_to(disk)
    monkeypatch.chdir(disk)
    assert run(real, given, tmp_path / "out", "--quarantine") == 3
    moved = (tmp_path if place == "is a link" else tmp_path / "disk") / "results_quarantine" / "inner" / "copied"
    assert (moved / "image.png").is_file()
    assert not (disk / "inner" / "copied").exists()
    assert len(diseased(disk / "inner")) == 3


def test_a_full_quarantine_loses_nothing(real: Path, honest: Path, tmp_path: Path) -> None:
    results, copied = tmp_path / "results", diseased(real)[0]
    for folder in [*diseased(honest)[:2], copied]:
        shutil.copytree(folder, results / folder.name)
    (tmp_path / "results_quarantine" / copied.name).mkdir(parents=True)
    with pytest.raises(MedSoftError, match="is there already; move it away, then run again"):
        run(real, results, tmp_path / "out", "--quarantine")
    assert (results / copied.name / "image.png").exists()


def test_memorised_lesions_are_nearer_than_held_out_ones(real: Path, honest: Path, tmp_path: Path) -> None:
    planted, fresh, out = tmp_path / "results", tmp_path / "fresh", tmp_path / "out"
    write_dataset(fresh, 14, 0, 24)
    for folder in diseased(real)[:4]:
        shutil.copytree(folder, planted / folder.name)
    assert run(honest, planted, out, "--train_json", real) == 3
    assert found(out)["copies"]["nearer_than_95_percent_of_held_out"] == 1.0
    assert run(honest, fresh, out, "--train_json", real, "--overwrite") == 0
    assert found(out)["copies"]["nearer_than_95_percent_of_held_out"] < 0.25
    assert not any("also in the training set" in text for text in found(out)["warnings"])
