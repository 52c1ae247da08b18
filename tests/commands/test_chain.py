"""The whole chain once, as the README gives it: prepare, convert, four stages, merge, draw, classify."""

import json
from pathlib import Path

import pytest
import torch
from tiny import STAGES, TEST, TRAIN, VAL, call, inspect, metas

import classifier
from ldm.data.annotations import load_samples


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


def test_what_a_stage_left_says_what_it_started_from(trained: dict, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for stage, origin in (
        ("unet_only", "ckpt_for_stage1.ckpt (stage converted)"),
        ("stage2_2", "last.ckpt (stage stage2_1)"),
    ):
        assert inspect(trained[stage].last) == 0
        assert f"origin: {origin}" in caplog.messages


def test_prepared_split_reaches_the_pictures(results: Path, world: Path) -> None:
    """Drawn on the healthy training images of the prepared JSON, and on nobody of another split."""
    train, val, test = (load_samples(world / name)[0] for name in (TRAIN, VAL, TEST))
    drawn, rejects = load_samples(results)
    healthy = [sample for sample in train if sample.healthy]
    assert not rejects
    assert healthy
    assert sorted(sample.sample_id for sample in drawn) == sorted(f"{sample.sample_id}__v0" for sample in healthy)
    assert {sample.patient_id for sample in drawn} == {sample.patient_id for sample in healthy}
    assert {sample.patient_id for sample in drawn}.isdisjoint(sample.patient_id for sample in [*val, *test])


def test_pictures_train_the_classifier(
    results: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    output = tmp_path / "classifier"
    settings = {
        **{"img_size": 32, "Batch_Size": 8, "EPOCHS": 1, "model": "test_resnet", "GPU": "cpu", "dataset": "chain"},
        **{"train_json": TRAIN, "val_json": VAL, "test_json": TEST, "output_dir": str(output)},
        **{"synthetic": ["results"], "predict": ["results"]},
    }
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert call(classifier, tmp_path / "args.json") == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["n_synthetic_used"] == 5
    (ours,) = {meta["checkpoint_sha256"] for meta in metas(Path("results")).values()}
    assert metrics["drawn_by"] == [{"checkpoint_sha256": ours, "method": None, "samples": 5}]
    assert len((output / "predictions_results.csv").read_text().splitlines()) == 1 + 5
    assert len((output / "predictions_test.csv").read_text().splitlines()) == 1 + 4
