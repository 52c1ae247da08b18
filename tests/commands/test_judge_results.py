"""tool/judge_results.py on drawn phantoms, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import TRAIN, call, metas

from ldm.classifier.config import ClassifierConfig
from ldm.classifier.run import predict, train_classifier
from ldm.core.errors import MedSoftError
from tool import judge_results


def test_it_says_of_every_drawing_what_the_classifier_says(
    results: Path, world: Path, judge: Path, tmp_path: Path
) -> None:
    given = (results, "--judge", judge, "--output", tmp_path / "judged.json")
    assert call(judge_results, *given, "--real", world / TRAIN) == 0
    found = json.loads((tmp_path / "judged.json").read_text())
    rows = {row["sample_id"]: row for row in predict(judge, results)[0]}
    asked = {name: meta["lesion_type"] for name, meta in metas(results).items()}
    assert {each["sample_id"]: (each["asked"], each["diseased"]) for each in found["pictures"]} == {
        name: (kind, rows[name]["predicted"] != "healthy") for name, kind in asked.items()
    }
    assert found["endpoints"]["seam"]["value"] > 0
    assert found["endpoints"]["changed_outside"] == {"value": 0, "n": len(asked)}
    assert call(judge_results, *given) == 0
    assert json.loads((tmp_path / "judged.json").read_text())["endpoints"]["seam"]["value"] is None


def test_drawings_that_cannot_be_read_are_left_out_and_said(results: Path, judge: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "some")
    next((tmp_path / "some").glob("*/image.png")).write_bytes(b"no picture")
    assert call(judge_results, tmp_path / "some", "--judge", judge, "--output", tmp_path / "judged.json") == 3
    found = json.loads((tmp_path / "judged.json").read_text())
    assert len(found["rejected"]) == 1
    assert len(found["pictures"]) == len(metas(results)) - 1


def test_what_cannot_be_judged_is_refused(results: Path, world: Path, judge: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "judged.json")
    with pytest.raises(MedSoftError, match=r"no.safetensors: there is no saved classifier"):
        call(judge_results, results, "--judge", tmp_path / "no.safetensors", *output)
    shutil.copytree(results, tmp_path / "other")
    meta = next((tmp_path / "other").glob("*/meta.json"))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sign": "wedge fracture"}))
    with pytest.raises(MedSoftError, match=r"classifier.safetensors: knows no wedge fracture, which .*other was asked"):
        call(judge_results, tmp_path / "other", "--judge", judge, *output)
    for prompt in (tmp_path / "other").glob("*/prompt.txt"):
        prompt.write_text("healthy")
    with pytest.raises(MedSoftError, match=r"other: holds no image with a lesion that can be read; nothing to judge"):
        call(judge_results, tmp_path / "other", "--judge", judge, *output)
    given = {"train_json": str(world / "train"), "val_json": str(world / "val"), "output_dir": str(tmp_path / "binary")}
    train_classifier(ClassifierConfig(img_size=32, Batch_Size=4, EPOCHS=1, GPU="cpu", **given))
    with pytest.raises(MedSoftError, match=r"binary/classifier.safetensors: names no lesion types; expected a class"):
        call(judge_results, results, "--judge", tmp_path / "binary" / "classifier.safetensors", *output)
    assert not (tmp_path / "judged.json").exists()
