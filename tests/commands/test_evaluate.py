"""tool/evaluate.py: honest samples, drawn results, running again, rejected inputs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from evaluations import diseased, found, run

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.run_folder import RunFolder
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.evaluation.lesions import read_lesions
from ldm.phantom.dataset import write_dataset
from ldm.reports.figures import write_figure


def test_honest_samples_are_no_copies_and_like_real_ones(
    real: Path, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.evaluation.report.write_figure", write_figure)
    out, judge = tmp_path / "out", tmp_path / "predictions_pictures.csv"
    kinds = {path.name: json.loads((path / "meta.json").read_text())["lesion_type"] for path in diseased(honest)}
    judge.write_text("sample_id,predicted,p_healthy,p_a,p_b\n" + "".join(f"{n},{k},0,1,0\n" for n, k in kinds.items()))
    assert run(real, honest, out, "--predictions", judge) == 0
    numbers = found(out)
    told = numbers["asked_drawn"]  # this judge sees what was asked in every picture
    assert told["value"] == pytest.approx(told["maximum"])
    assert (told["n"], told["agreement"]["value"]) == (40, 1)
    assert numbers["pictures"] == {"real": 30, "synthetic": 40, "train": 30}
    assert numbers["copies"]["count"] == 0
    assert json.loads((out / "copies.json").read_text()) == []
    assert numbers["copies"]["nearer_than_95_percent_of_held_out"] is None  # nothing is held out
    assert numbers["extractor"]["dimensions"] == 64
    assert len(numbers["extractor"]["fingerprint"]) == 64
    assert "30 images in 64 dimensions" in numbers["warnings"][0]
    assert "rough" in numbers["warnings"][1]
    for name, each in numbers["distances"].items():
        assert each["low"] <= each["value"] <= each["high"], name
    assert numbers["distances"]["coverage"]["value"] > 0.6
    # Own prompts fit better than those of other lesion types: the stand-in knows lesions.
    assert numbers["text"]["synthetic"]["own_is_closer"]["low"] > 0.5
    assert numbers["text"]["synthetic"]["difference"]["low"] > 0
    assert numbers["parents"] == numbers["parents"] | {"compared": 0, "without_parent": 40}
    page = (out / "report.html").read_text()
    assert "of none of the 40 synthetic images" in page  # instead of a table of dashes
    assert "Distances" in page
    assert "asked against drawn" in page
    assert numbers["extractor"]["fingerprint"][:16] in page
    for name in ("closest_pairs.png", "lesions.png"):
        assert len(np.unique(cv2.imread(str(out / name)))) > 8
    assert (out / "neighbours.csv").read_text().count("\n") == 41


def test_sizes_are_in_mm_where_the_spacing_is_known(real: Path, honest: Path, tmp_path: Path) -> None:
    images, sizes = tmp_path / "images", []
    shutil.copytree(honest, images)
    for number, folder in enumerate(diseased(images)):
        meta = json.loads((folder / "meta.json").read_text()) | {"spacing_mm": [2.0, 0.5]}
        if number == 0:
            del meta["spacing_mm"]
        else:
            sizes.append(2 * np.sqrt(np.count_nonzero(read_image(folder / "mask.png") > 127) / np.pi))  # 1 mm2 a pixel
        (folder / "meta.json").write_text(json.dumps(meta))
    assert run(real, images, tmp_path / "out") == 0
    numbers = found(tmp_path / "out")["lesions"]
    assert numbers["diameter_mm"]["synthetic_quartiles"] == pytest.approx(np.percentile(sizes, (25, 50, 75)), rel=0.01)
    assert "equivalent diameter, mm" in (tmp_path / "out" / "report.html").read_text()
    for folder in diseased(images):
        (folder / "meta.json").write_text("{}")
    assert run(real, images, tmp_path / "unknown") == 0
    assert set(found(tmp_path / "unknown")["lesions"]) == {"diameter", "contrast", "texture"}
    assert "equivalent diameter, mm" not in (tmp_path / "unknown" / "report.html").read_text()


def test_other_pictures_are_farther_away(real: Path, honest: Path, tmp_path: Path) -> None:
    blurred = tmp_path / "blurred"
    shutil.copytree(honest, blurred)
    for folder in diseased(blurred):
        write_png(folder / "image.png", cv2.GaussianBlur(read_image(folder / "image.png"), (0, 0), 4))
    assert run(real, honest, tmp_path / "a") == 0
    assert run(real, blurred, tmp_path / "b") in (0, 3)
    near, far = (found(tmp_path / name)["distances"] for name in "ab")
    for name in ("frechet", "kernel"):
        assert far[name]["value"] > 2 * near[name]["value"]
        assert far[name]["low"] > near[name]["value"]
    assert far["coverage"]["value"] < near["coverage"]["value"]
    numbers = [found(tmp_path / name)["lesions"]["texture"] for name in "ab"]
    assert numbers[1]["wasserstein"] > numbers[0]["wasserstein"]


def test_an_image_that_is_drawn_again_meanwhile_is_not_recorded_as_the_one_before(
    real: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(few, tmp_path / "images")

    def read(samples: Any, *given: Any) -> Any:
        if given[-1] == "synthetic":
            write_png(samples[0].image, 255 - read_image(samples[0].image))
        return read_lesions(samples, *given)

    monkeypatch.setattr("ldm.evaluation.run.read_lesions", read)
    with pytest.raises(MedSoftError, match=r"image\.png: was replaced or changed after it had been read; run the same"):
        run(real, images, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_few_patients_give_no_interval(real: Path, honest: Path, tmp_path: Path) -> None:
    """Forty images of nine patients are nine patients."""
    few = shutil.copytree(honest, tmp_path / "few")
    for number, folder in enumerate(diseased(few)):
        meta = json.loads((folder / "meta.json").read_text()) | {"patient_id": f"patient {number % 9}"}
        (folder / "meta.json").write_text(json.dumps(meta))
    assert run(real, few, tmp_path / "out") == 0
    numbers = found(tmp_path / "out")
    assert {each["low"] for each in numbers["distances"].values()} == {None}
    assert numbers["text"]["synthetic"]["own"]["low"] is None
    assert numbers["text"]["real"]["own"]["low"] is not None
    text = "The synthetic lesions are of 9 patients: no number of theirs has an interval"
    assert any(each.startswith(text) for each in numbers["warnings"])


def test_real_samples_that_were_trained_on_are_no_yardstick(real: Path, honest: Path, tmp_path: Path) -> None:
    seen, out = tmp_path / "seen", tmp_path / "out"
    for folder in [*diseased(real)[:2], *diseased(honest)[:3]]:
        shutil.copytree(folder, seen / folder.name)
    assert run(seen, honest, out, "--train_json", real) == 0
    assert "2 patients of REAL are also in the training set" in " ".join(found(out)["warnings"])


def test_drawn_results_are_compared_with_their_parents(world: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(world / tiny.TEST, results, out, "--train_json", world / tiny.TRAIN) in (0, 3)
    numbers = found(out)
    assert numbers["parents"]["compared"] == len(diseased(results))
    assert numbers["parents"]["without_parent"] == 0
    (ours,) = {meta["checkpoint_sha256"] for meta in tiny.metas(results).values()}
    assert numbers["drawn_by"] == [{"checkpoint_sha256": ours, "method": None, "samples": len(tiny.metas(results))}]
    assert numbers["parents"]["outside"]["unchanged_pictures"] == 1.0
    assert numbers["parents"]["outside"]["ssim"]["value"] == pytest.approx(1, abs=1e-6)
    assert numbers["parents"]["outside"]["psnr"] is None  # nothing differs there
    assert numbers["parents"]["inside"]["ssim"]["value"] < 0.95
    assert numbers["parents"]["inside"]["psnr"]["value"] < 40
    assert any("not measured" in text for text in numbers["warnings"])
    assert any("no number of theirs has an interval" in text for text in numbers["warnings"])  # three patients
    assert "density" not in numbers["distances"]
    page = (out / "report.html").read_text()
    likeness = found(out)["copies"]["median_correlation_with_the_source"]["mask"]
    name = "median correlation with the source, lesions in the mask of a training lesion"
    assert f'<td>{name}</td><td class="number">{likeness:.3f}</td>' in page
    assert "{" not in page.partition("<main>")[2]


def test_synthetic_images_among_the_real_ones_are_left_out(
    world: Path, results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a data set was prepared with --synthetic."""
    for sample in diseased(world / "test"):
        shutil.copytree(sample, tmp_path / "mixed" / sample.name)
    made = diseased(results)
    for folder in made:
        shutil.copytree(folder, tmp_path / "mixed" / "results" / folder.name)
    assert run(tmp_path / "mixed", results, tmp_path / "out", "--train_json", world / tiny.TRAIN) in (0, 3)
    assert found(tmp_path / "out")["pictures"]["real"] == len(diseased(world / "test"))
    assert f"{len(made)} synthetic samples are left out, as real ones are measured here" in caplog.text


@pytest.mark.parametrize("beside", ["nothing", "a namesake"])
def test_results_that_were_copied_without_their_data_are_compared_with_no_other(
    world: Path, results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, beside: str
) -> None:
    shutil.copytree(results, tmp_path / "copy" / "results")
    folders = diseased(tmp_path / "copy" / "results")
    said = "is not there or cannot be read"
    if beside == "a namesake":
        said = "has changed since, or is another image"
        for folder in folders:
            path = folder / json.loads((folder / "meta.json").read_text())["parent_image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "image.png", path)
    out = tmp_path / "out"
    assert run(world / tiny.TEST, tmp_path / "copy" / "results", out, "--train_json", world / tiny.TRAIN) in (0, 3)
    numbers = found(out)
    assert (numbers["parents"]["compared"], numbers["parents"]["without_parent"]) == (0, len(folders))
    (line,) = [line for line in caplog.messages if "not compared with their parents" in line]
    assert line.startswith(f"warning: {len(folders)} of {len(folders)} results")
    assert said in line


def test_the_same_again_is_complete_and_others_need_overwrite(
    real: Path, few: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    out, few = tmp_path / "out", shutil.copytree(few, tmp_path / "few")
    assert run(real, few, out) == 0
    made = (out / "evaluation.json").stat().st_mtime_ns
    assert run(real, few, out) == 0
    assert "already complete" in caplog.text
    assert (out / "evaluation.json").stat().st_mtime_ns == made
    other = shutil.copytree(tiny.CLIP, tmp_path / "clip")
    settings = other / "open_clip_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.25"))  # the same weights see other images
    with pytest.raises(UsageError, match=r"holds results of another run \(biomedclip_preparation\.images: "):
        run(real, few, out, "--biomedclip", other)
    shutil.rmtree(few / diseased(few)[0].name)
    with pytest.raises(UsageError, match=r"holds results of another run \(synthetic: \w+… -> \w+…\).*--overwrite"):
        run(real, few, out)
    assert run(real, few, out, "--overwrite") == 0
    assert found(out)["pictures"]["synthetic"] == 2


def test_corrected_patients_are_measured_again(real: Path, few: Path, tmp_path: Path) -> None:
    """They decide the threshold for copies and the intervals."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(real, data)
    assert run(data, few, out, "--train_json", os.path.relpath(data)) == 0  # the same
    assert found(out)["copies"]["nearer_than_95_percent_of_held_out"] is None
    path = diseased(data)[0] / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patient_id": "another"}))
    with pytest.raises(UsageError, match="holds results of another run"):
        run(data, few, out)


def test_parents_that_are_put_back_are_compared(world: Path, results: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "copy" / "results", tmp_path / "out"
    shutil.copytree(results, folder)
    given = (world / tiny.TEST, folder, out, "--train_json", world / tiny.TRAIN)
    assert run(*given) in (0, 3)
    assert found(out)["parents"]["compared"] == 0
    for name in diseased(folder):
        path = name / json.loads((name / "meta.json").read_text())["parent_image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        original = json.loads((results / name.name / "meta.json").read_text())["parent_image"]
        shutil.copyfile(results / name.name / original, path)
    with pytest.raises(UsageError, match=r"holds results of another run \(parents: "):
        run(*given)


def test_real_samples_in_the_place_of_results_are_said(
    real: Path, few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(real, few, tmp_path / "out") == 0
    assert "3 of 3 samples do not say that they are synthetic: are they real ones?" in caplog.text


def test_unreadable_samples_are_listed(real: Path, honest: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    for folder in diseased(honest)[:5]:
        shutil.copytree(folder, damaged / folder.name)
    broken, empty = diseased(damaged)[:2]
    (broken / "image.png").write_bytes((broken / "image.png").read_bytes()[:200])
    write_png(empty / "mask.png", np.zeros_like(read_image(empty / "mask.png")))
    assert run(real, damaged, out) == 3
    listed = json.loads((out / "rejects.json").read_text())
    assert {Path(each["file"]).parent.name for each in listed} == {broken.name, empty.name}
    assert found(out)["pictures"]["synthetic"] == 3


def test_wrong_usage_is_refused(real: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: does not exist; expected a dataset folder or an annotation file"):
        run(tmp_path / "nowhere", few, tmp_path / "out")
    with pytest.raises(UsageError, match="nowhere: does not exist"):
        run(real, few, tmp_path / "out", "--train_json", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="REAL and SYNTH are the same"):
        run(real, real, tmp_path / "out")
    with pytest.raises(UsageError, match=r"unknown key data.sise"):
        run(real, few, tmp_path / "out", "data.sise=3")
    (tmp_path / "file").write_text("[]")
    with pytest.raises(UsageError, match="file is a file; copies are moved out of a results folder"):
        run(real, tmp_path / "file", tmp_path / "out", "--quarantine")
    with pytest.raises(UsageError, match=r"--output_dir .*file: expected a folder, found a file"):
        run(real, few, tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_sources_without_lesions_and_other_encoders_are_refused(real: Path, few: Path, tmp_path: Path) -> None:
    healthy = tmp_path / "healthy"
    write_dataset(healthy, 13, 2, 0)
    with pytest.raises(MedSoftError, match="healthy: expected at least 2 diseased samples with a mask, found 0"):
        run(real, healthy, tmp_path / "out")
    with pytest.raises(MedSoftError, match="healthy: expected at least 1 diseased sample with"):
        run(real, few, tmp_path / "out", "--train_json", healthy)
    with pytest.raises(MedSoftError, match=r"biomedclip.grid is 10, the configuration expects 14"):
        run(real, few, tmp_path / "out", "biomedclip.grid=14", "msc.width=768")
    with pytest.raises(MedSoftError, match="BiomedCLIP folder not found"):
        run(real, few, tmp_path / "out", "--biomedclip", tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_one_evaluation_at_a_time_and_files_of_others_stay(real: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".partial-of-another", "notes.txt"):
        (out / name).write_text("mine")
    with RunFolder(out, "evaluation.json").lock(), pytest.raises(UsageError, match="another run is writing here"):
        run(real, few, out)
    assert {path.name for path in out.iterdir()} == {".partial-of-another", "notes.txt"}
    assert run(real, few, out) == 0
    assert run(real, few, out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert found(out)["complete"]


def test_a_report_that_no_evaluation_wrote_is_not_replaced(real: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("of another command")
    with pytest.raises(UsageError, match=r"holds no results of this command \(report.html is there"):
        run(real, few, out, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["report.html"]
