"""tool/choose_results.py: margins of results, the best variants, a list for the classifier, rejected inputs."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from ldm.classifier.data import load_images
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.evaluation.choice import keep
from ldm.evaluation.lesions import read_lesions
from ldm.phantom.dataset import write_dataset
from ldm.reviews.table import Review, add_review
from tool import choose_results

VARIANTS = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms in the place of results, three of each parent; the first of three shows another type than asked."""
    folder = tmp_path_factory.mktemp("chosen") / "results"
    write_dataset(folder, 11, 2, 24)
    diseased = sorted(path.parent for path in folder.glob("*/mask.png"))
    about = {path: json.loads((path / "meta.json").read_text()) for path in folder.iterdir() if path.is_dir()}
    prompts = {path: (path / "prompt.txt").read_text() for path in diseased}
    for number, path in enumerate(diseased):
        if number % VARIANTS == 0:
            other = next(each for each in diseased if about[each]["lesion_type"] != about[path]["lesion_type"])
            (path / "prompt.txt").write_text(prompts[other])
            about[path] = about[path] | {"asked": about[other]["lesion_type"]}
        about[path]["parent_id"] = f"parent{number // VARIANTS}"
    for path, meta in about.items():
        asked = meta.pop("asked", meta.get("lesion_type"))
        (path / "meta.json").write_text(
            json.dumps(meta | {"synthetic": True} | ({"lesion_type": asked} if asked else {}))
        )
    return folder


def run(results: Path, output: Path, *more: Any) -> int:
    flags = ["--output_dir", output, "--config", tiny.PHANTOM, "--biomedclip", tiny.CLIP]
    return tiny.call(choose_results, results, *flags, *more)


def rows_of(output: Path) -> list[dict[str, str]]:
    with open(output / "scores.csv", newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_best_variant_of_each_parent_is_kept_for_the_classifier(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(results, out, "--best", 1) == 0
    rows = rows_of(out)
    assert len(rows) == 24
    for row in rows:
        rivals = [float(row[name]) for name in ("other", "healthy")]
        assert float(row["margin"]) == pytest.approx(float(row["own"]) - max(rivals))
    kept = [row for row in rows if row["kept"] == "True"]
    assert sorted(row["parent_id"] for row in kept) == sorted(f"parent{number}" for number in range(8))
    for row in kept:
        family = [float(each["margin"]) for each in rows if each["parent_id"] == row["parent_id"]]
        assert float(row["margin"]) == max(family)
    wrong = [float(row["margin"]) for row in rows[::VARIANTS]]
    right = [float(row["margin"]) for place, row in enumerate(rows) if place % VARIANTS]
    assert np.mean(right) > np.mean(wrong)  # the encoder tells the type that is shown from the one that was asked for
    images = load_images("synthetic", str(out / "kept.json"), 32, "type")
    assert sorted(sample.sample_id for sample in images.samples) == sorted(row["sample_id"] for row in kept)
    assert all(sample.synthetic and sample.parent_id for sample in images.samples)

    before = (out / "scores.csv").stat().st_mtime_ns
    assert run(results, out, "--best", 1) == 0
    assert (out / "scores.csv").stat().st_mtime_ns == before  # already complete
    other = shutil.copytree(tiny.CLIP, tmp_path / "clip")
    settings = other / "open_clip_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.25"))  # the same weights see other images
    with pytest.raises(UsageError, match=r"another run \(biomedclip_preparation\.images: "):
        run(results, out, "--best", 1, "--biomedclip", other)

    best = next(each for each in load_samples(results)[0] if each.sample_id == kept[0]["sample_id"])
    review = tmp_path / "review.csv"
    add_review(review, Review(best.sample_id, "a", "reject", str(best.image_sha256), "seam"))
    with pytest.raises(UsageError, match=r"another run \(results: "):
        run(results, out, "--best", 1, "--review", review)
    other = tmp_path / "reviewed"
    assert run(results, other, "--best", 1, "--review", review) == 0
    second = [row for row in rows_of(other) if row["kept"] == "True"]
    assert sorted(row["parent_id"] for row in second) == sorted(row["parent_id"] for row in kept)
    assert best.sample_id not in [row["sample_id"] for row in rows_of(other)]
    assert json.loads((other / "choice.json").read_text())["review"]["left_out"] == 1
    with pytest.raises(UsageError, match=r"holds results of another run \(best: 1 -> 2\)"):
        run(results, out, "--best", 2)
    least = sorted(float(row["margin"]) for row in rows)[-5]
    assert run(results, out, "--least", least - 1e-9, "--overwrite") == 0
    assert sum(row["kept"] == "True" for row in rows_of(out)) == 5
    with pytest.raises(MedSoftError, match=r"no margin is at least 1.5 \(the highest: "):
        run(results, tmp_path / "none", "--least", 1.5)


def test_a_result_that_is_drawn_again_meanwhile_is_not_chosen_as_the_one_before(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(results, tmp_path / "results")

    def read(samples: Any, *given: Any) -> Any:
        write_png(samples[0].image, 255 - read_image(samples[0].image))
        return read_lesions(samples, *given)

    monkeypatch.setattr("ldm.evaluation.choice.read_lesions", read)
    with pytest.raises(MedSoftError, match=r"image\.png: was replaced or changed after it had been read; run the same"):
        run(images, tmp_path / "out", "--best", 1)
    assert not (tmp_path / "out" / "choice.json").exists()


def test_limits_work_together() -> None:
    margins, parents = [0.1, 0.3, 0.3, -0.2, 0.2], ["a", "a", "a", "b", "b"]
    assert keep(margins, parents, 1, None).tolist() == [False, True, False, False, True]
    assert keep(margins, parents, 2, None).tolist() == [False, True, True, True, True]
    assert keep(margins, parents, None, 0.2).tolist() == [False, True, True, False, True]
    assert keep(margins, parents, 1, 0.25).tolist() == [False, True, False, False, False]


def test_what_is_no_choice_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected --best N, --least MARGIN or both"):
        run(results, tmp_path / "out")
    with pytest.raises(UsageError, match="--least: expected a number from -2 to 2, found nan"):
        run(results, tmp_path / "out", "--least", "nan")
    write_dataset(tmp_path / "real", 3, 0, 2)
    with pytest.raises(MedSoftError, match="2 of 2 samples do not say that they are synthetic"):
        run(tmp_path / "real", tmp_path / "out", "--best", 1)
    assert not (tmp_path / "out" / "kept.json").exists()
