"""ver_train.py on data and checkpoints that cannot be used, or only in part."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, call, edit, train, ver_train

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations


def test_annotation_of_vanished_files(world: Path, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "train", tmp_path / "data")
    write_annotations(tmp_path / "train.json", load_samples(tmp_path / "data")[0])
    gone = tmp_path / "data" / "w5p000001_L3" / "image.png"
    gone = gone if gone.exists() else next((tmp_path / "data").glob("*1_*/image.png"))
    gone.unlink()
    given = ("--train_json", tmp_path / "train.json", "training.max_rejected=0.1")
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=8) == 3
    (reject,) = json.loads((tmp_path / "s" / "rejects.json").read_text())
    assert reject["sample_id"] == gone.parent.name
    assert reject["file"] == str(gone)
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=8) == 3  # complete, and said again


def test_damaged_image_is_skipped_and_named(world: Path, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "train", tmp_path / "data")
    write_annotations(tmp_path / "train.json", load_samples(tmp_path / "data")[0])
    bad = next((tmp_path / "data").glob("*0_*/image.png"))
    bad.write_bytes(bad.read_bytes()[:500])
    given = ("--train_json", tmp_path / "train.json", "--cache_dir", tmp_path / "features")
    too_many = r"1 of 12 samples cannot be read, more than training\.max_rejected=0\.01 allows; the first: .*truncated"
    with pytest.raises(MedSoftError, match=too_many):
        train("stage1", converted, tmp_path / "s", world, *given, batch_size=8)
    assert train("stage1", converted, tmp_path / "s", world, *given, "training.max_rejected=0.1", batch_size=8) == 3
    rejects = json.loads((tmp_path / "s" / "rejects.json").read_text())
    assert {reject["sample_id"] for reject in rejects} == {bad.parent.name}
    assert torch.load(tmp_path / "s" / "last.ckpt", weights_only=True)["medsoft"]["step"] == 1


def test_patient_on_both_sides(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"patient w5p\d+ is in the training set and in the val.*split by"):
        train("stage1", converted, tmp_path / "s", world, "--val_json", world / "train")


def test_empty_annotation(world: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(MedSoftError, match=r"empty\.json: holds no record"):
        train("stage1", converted, tmp_path / "s", world, "--train_json", tmp_path / "empty.json")


def test_nothing_that_can_be_drawn_on(world: Path, converted: Path, tmp_path: Path, write_sample: Any) -> None:
    write_sample(tmp_path / "data" / "a", prompt="healthy", mask=None)
    with pytest.raises(MedSoftError, match=r"data: no sample can be used for training \(1 read"):
        train("stage1", converted, tmp_path / "s", world, "--train_json", tmp_path / "data")
    assert not (tmp_path / "s").exists()


def test_checkpoint_of_another_stage(trained: dict, world: Path, tmp_path: Path) -> None:
    expected = r"stage1/last\.ckpt: does not fit .*It holds msc \(it was left by stage1\); needed: unet, .*merge"
    with pytest.raises(MedSoftError, match=expected):
        train("stage2_1", trained["stage1"].last, tmp_path / "s", world)


def test_checkpoint_of_another_preparation(trained: dict, world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    content = torch.load(trained["stage2_1"].last, weights_only=True)
    content["medsoft"]["config"]["data"]["context"] = 3.0
    torch.save(content, other)
    with pytest.raises(UsageError, match=r"was trained with data\.context=3\.0, .* has 2\.0; add data\.context=3\.0"):
        train("stage2_2", other, tmp_path / "s", world, "--dry_run")
    assert train("stage2_2", other, tmp_path / "s", world, "--dry_run", "data.context=3.0") == 0


def test_checkpoint_from_before_min_crop(trained: dict, world: Path, tmp_path: Path) -> None:
    """Its crops had at least the model's own size, which is the phantoms' default, and another one in other YAMLs."""
    other = tmp_path / "other.ckpt"
    content = torch.load(trained["stage2_1"].last, weights_only=True)
    for key in ("min_crop", "min_crop_unit", "mm_per_pixel"):
        del content["medsoft"]["config"]["data"][key]
    torch.save(content, other)
    assert train("stage2_2", other, tmp_path / "s", world, "--dry_run") == 0
    with pytest.raises(UsageError, match=r"with data\.min_crop=64\.0, .* has 32\.0; add data\.min_crop=64\.0"):
        train("stage2_2", other, tmp_path / "s", world, "--dry_run", "data.min_crop=32")


def test_samples_without_spacing_where_lengths_are_in_mm(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They count as samples that cannot be read, before anything is built; the others are trained on."""
    shutil.copytree(world / "train", tmp_path / "data")
    changed = next((tmp_path / "data").glob("*/meta.json"))
    meta = json.loads(changed.read_text())
    del meta["spacing_mm"]
    changed.write_text(json.dumps(meta))
    given = ("--train_json", tmp_path / "data", "--dry_run", "data.mm_per_pixel=0.8")
    reason = r"data\.mm_per_pixel=0\.8: the sample's meta\.json has no spacing_mm; add it"
    with pytest.raises(MedSoftError, match=rf"1 of 12 samples cannot be read, .*max_rejected=0\.01 .*{reason}"):
        train("stage1", converted, tmp_path / "s", world, *given)
    with caplog.at_level("INFO"):
        train("stage1", converted, tmp_path / "s", world, *given, "training.max_rejected=0.1")
    assert f"skipped {changed.with_name('image.png')}: data.mm_per_pixel=0.8" in caplog.text


def test_lesion_wider_than_a_window_in_mm(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as a sample that cannot be read, before anything is built, as one without a spacing does."""
    shutil.copytree(world / "train", tmp_path / "data")
    metas = {path: json.loads(path.read_text()) for path in (tmp_path / "data").glob("*/meta.json")}
    changed = next(path for path, meta in metas.items() if meta["lesion_type"])
    changed.write_text(json.dumps(metas[changed] | {"spacing_mm": 9.0}))
    given = ("--train_json", tmp_path / "data", "--dry_run", "data.mm_per_pixel=0.8")
    reason = r"the window of data\.mm_per_pixel=0\.8 has 51\.2 mm; data\.mm_per_pixel=\S+ is wide enough"
    with pytest.raises(MedSoftError, match=rf"1 of 12 samples cannot be read, .*max_rejected=0\.01 .*{reason}"):
        train("stage1", converted, tmp_path / "s", world, *given)
    assert train("stage1", converted, tmp_path / "s", world, *given, "training.max_rejected=0.1") == 0
    assert f"skipped {changed.with_name('image.png')}: the lesion with its soft border has" in caplog.text


def test_checkpoint_for_another_configuration(converted: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"another size.*Use the YAML it was made with, or convert it"):
        train("stage1", converted, tmp_path / "s", world, "msc.width=64")


def test_checkpoint_with_a_value_that_is_not_a_number(converted: Path, world: Path, tmp_path: Path) -> None:
    spoilt = edit(
        converted, tmp_path / "nan.ckpt", keep=lambda key, v: v * float("nan") if key == "msc.position" else v
    )
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensor holds NaN .* msc\.position"):
        train("stage1", spoilt, tmp_path / "s", world)


def test_yaml_without_a_stage(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"phantom\.yaml: names no stage"):
        call(ver_train, "--ckpt", converted, "--config", MODELS / "phantom.yaml", "--save_path", tmp_path / "s")


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_device_that_is_too_small_is_refused_before_anything_is_built(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr("ldm.training.estimates.all_memory", lambda device: 2**20)
    monkeypatch.setattr("ldm.training.run.open_model", None)  # whoever calls it fails
    expected = r"a step needs about \d+\.\d MiB, the whole device has 1\.0 MiB: a smaller --batch_size with .* helps"
    with pytest.raises(MedSoftError, match=expected):
        train("stage1", converted, tmp_path / "s", world, *more)
    assert not (tmp_path / "s").exists()


def test_scaled_gradients_cannot_be_shared_out(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fabric.Fabric.device", torch.device("cuda"))
    given = ("--dry_run", "training.strategy=fsdp")
    with pytest.raises(UsageError, match=r"training\.strategy=fsdp: trains in bf16-mixed or 32-true, found .*16-mixed"):
        train("stage1", converted, tmp_path / "s", world, *given, precision="16-mixed")
