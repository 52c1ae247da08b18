"""The whole chain once: phantoms, annotations, convert, four stages, merge, inference, classifier on the outcome."""

import json
from pathlib import Path

import pytest
import torch
from tiny import STAGES, call, infer

import classifier
import ver_openImagesDatasets
from ldm.annotations import load_samples


def test_every_stage_starts_from_the_one_before(trained: dict, world: Path) -> None:
    sources = {stage: run.source.relative_to(world).as_posix() for stage, run in trained.items()}
    assert sources == {
        "stage1": "ckpt_for_stage1.ckpt",
        "unet_only": "ckpt_for_stage1.ckpt",
        "stage2_1": "ckpt_for_stage2.ckpt",
        "stage2_2": "stage2_1/last.ckpt",
    }
    for stage in STAGES:
        about = torch.load(trained[stage].last, weights_only=True)["medsoft"]
        assert (about["stage"], about["step"], about["complete"]) == (stage, 3, True)
        assert trained[stage].first_steps == [0]


def test_from_folder_to_classifier(trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands with their default file names, in one working directory; results feed the classifier."""
    monkeypatch.chdir(tmp_path)
    flags = ["--root_dir", world / "train", "--output_file", "openimages_format.json"]
    assert call(ver_openImagesDatasets, *flags) == 0
    train, val = (load_samples(f"openimages_format_{name}.json")[0] for name in ("train", "val"))
    assert train
    assert infer(trained["stage2_2"].last, Path("results"), "--variants", 2) == 0
    drawn, rejects = load_samples("results")
    healthy = [sample.sample_id for sample in train if sample.healthy]
    assert not rejects
    assert sorted(sample.sample_id for sample in drawn) == sorted(f"{name}__v{k}" for name in healthy for k in (0, 1))
    assert {sample.patient_id for sample in drawn}.isdisjoint(sample.patient_id for sample in val)
    settings = {
        **{"img_size": 32, "Batch_Size": 8, "EPOCHS": 1, "model": "test_resnet", "GPU": "cpu", "dataset": "chain"},
        **{"train_json": "openimages_format_train.json", "val_json": str(world / "val"), "output_dir": "classifier"},
        **{"test_json": "openimages_format_test.json", "synthetic": ["results"], "predict": ["results"]},
    }
    Path("args.json").write_text(json.dumps(settings))
    assert call(classifier, "args.json") == 0
    metrics = json.loads(Path("classifier/metrics.json").read_text())
    assert metrics["n_synthetic"] == len(drawn)
    assert len(Path("classifier/predictions_results.csv").read_text().splitlines()) == 1 + len(drawn)
