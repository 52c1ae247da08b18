"""Patients that a file was trained on never validate or test what follows from it, by salted digests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from tiny import CLIP, MODELS, TEST, TRAIN, VAL, call, convert, export, infer, metas, train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from ldm.data.checks import check_unseen, groups_of, trained_on
from tool import doctor, evaluate

import dataset_infer  # isort: skip


def groups(checkpoint: Path) -> list[dict[str, Any]]:
    return read_checkpoint(checkpoint).metadata["trained_on"]


def classify(world: Path, folder: Path, **settings: Any) -> int:
    """Trained on the test split, so that nothing here has seen its patients; tested on what ``settings`` say."""
    plain = {"train_json": str(world / TEST), "val_json": str(world / VAL), "output_dir": str(folder), "EPOCHS": 1}
    plain |= {"img_size": 32, "Batch_Size": 4, "model": "test_resnet", "GPU": "cpu"}
    return toy.run(plain | settings)


@pytest.fixture(scope="module")
def pictures(final: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn on patients of the test split, by a generator that has learned from those of the training split."""
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    assert infer(final, folder, "--data", world / "test", "--prompt", "lytic lesion", "--limit", 2) == 0
    return folder


def test_every_stage_carries_its_patients_and_no_plain_ids(trained: dict, world: Path) -> None:
    (group,) = groups(trained["stage2_2"].last)
    assert group["steps"] == ["stage1", "stage2_1", "stage2_2", "unet_only"]  # one split: one group
    patients = {sample.patient_id for sample in load_samples(world / TRAIN)[0]}
    assert len(group["patients"]) == len(patients) == 9
    assert not any(patient in json.dumps(group) for patient in patients)
    assert groups(trained["stage1"].last)[0]["steps"] == ["stage1"]
    (best,) = trained["stage1"].folder.glob("best_*.ckpt")
    assert groups(best) == groups(trained["stage1"].last)


def test_export_and_import_keep_them(final: Path, tmp_path: Path) -> None:
    assert export(final, tmp_path / "folder") == 0
    assert convert(tmp_path / "folder", tmp_path / "again.ckpt") == 0
    assert groups(tmp_path / "again.ckpt") == groups(final)


def test_a_later_stage_is_not_validated_on_patients_of_an_earlier_one(
    trained: dict, world: Path, tmp_path: Path
) -> None:
    swapped = ("--train_json", world / VAL, "--val_json", world / TRAIN)
    expected = r"--val_json .*_train\.json: 9 of its 9 patients \(w5p.*\) are among those that stage1, unet_only "
    with pytest.raises(MedSoftError, match=expected + r"learned from, says .*ckpt_for_stage2\.ckpt; split by patient"):
        train("stage2_1", trained["stage2_1"].source, tmp_path / "s", world, *swapped)
    assert not (tmp_path / "s").exists()
    found = tmp_path / "findings.json"
    flags = ["--config", MODELS / "phantom_stage2_1.yaml", "--ckpt", trained["stage2_1"].source, "--output", found]
    flags += ["--biomedclip", CLIP, "--train_json", world / VAL, "--val_json", world / TRAIN, "--save_path", tmp_path]
    assert call(doctor, *flags) == 1
    (error,) = [each for each in json.loads(found.read_text()) if each["level"] == "error"]
    assert error["text"].startswith("val: 9 of its 9 patients")
    nobody = trained["stage1"].source  # has learned from none of them
    assert train("stage1", nobody, tmp_path / "s", world, *swapped, "--dry_run") == 0


def test_what_is_trained_on_results_has_their_generator_behind_it(
    trained: dict, pictures: Path, world: Path, tmp_path: Path
) -> None:
    source, given = trained["stage1"].source, ("--train_json", pictures, "--val_json")
    with pytest.raises(MedSoftError, match=r"--val_json .*_train\.json: 9 of its 9 patients .* says .*pictures; split"):
        train("stage1", source, tmp_path / "s", world, *given, world / TRAIN)
    found = tmp_path / "findings.json"
    flags = ["--train_json", pictures, "--val_json", world / VAL, "--test_json", world / TRAIN, "--output", found]
    assert call(doctor, *flags, "--overlays", tmp_path / "overlays.html") == 1
    errors = [each for each in json.loads(found.read_text()) if each["level"] == "error" and "learned" in each["text"]]
    assert [each["text"].partition(" patients")[0] for each in errors] == ["test: 9 of its 9"]
    assert train("stage1", source, tmp_path / "s", world, *given, world / VAL, batch_size=2) == 0
    assert groups(trained["stage2_2"].last)[0] | {"steps": []} in [
        g | {"steps": []} for g in groups(tmp_path / "s/last.ckpt")
    ]


def test_validation_on_synthetic_images_is_said(
    trained: dict, pictures: Path, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("--train_json", world / VAL, "--val_json", pictures, "--dry_run")
    assert train("stage1", trained["stage1"].source, tmp_path / "s", world, *given) == 0
    assert "val: 2 of 2 samples are synthetic; the best epoch is chosen on them too" in caplog.text


def test_results_carry_them_also_drawn_again(final: Path, pictures: Path, tmp_path: Path) -> None:
    for meta in metas(pictures).values():
        assert meta["trained_on"] == groups(final)
    path = next(pictures.glob("*/meta.json"))
    old = tmp_path / "old" / path.parent.name  # of a version that did not write them
    shutil.copytree(path.parent, old)
    record = json.loads(path.read_text())
    del record["trained_on"]
    (old / "meta.json").write_text(json.dumps(record))
    flags = ("--replay", old / "meta.json", "--output_dir", tmp_path / "again", "--device", "cpu")
    assert call(dataset_infer, *flags) == 0
    (meta,) = metas(tmp_path / "again").values()
    assert meta["trained_on"] == groups(final)


def test_results_made_from_results_carry_both_generators(final: Path, pictures: Path, tmp_path: Path) -> None:
    """The second generator has learned from other patients, and from nobody of the first one's."""
    theirs = trained_on("elsewhere", ["q1"])
    content = torch.load(final, weights_only=True)
    content["medsoft"]["trained_on"] = theirs
    second, listed = tmp_path / "second.ckpt", tmp_path / "listed.txt"
    torch.save(content, second)
    listed.write_text(min(metas(pictures)))
    both = trained_on("", (), groups(final), theirs)
    given = ("--data", pictures, "--choose", listed, "--prompt", "lytic lesion")
    assert infer(second, tmp_path / "out", *given) == 0
    assert infer(second, tmp_path / "like", "--like", tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("*/meta.json")
    assert call(dataset_infer, "--replay", path, "--output_dir", tmp_path / "again", "--device", "cpu") == 0
    for folder in ("out", "like", "again"):
        (meta,) = metas(tmp_path / folder).values()
        assert meta["trained_on"] == both, folder


def test_patients_that_were_renamed_after_a_training_are_said(
    trained: dict, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = json.loads((world / TRAIN).read_text())
    for number, record in enumerate(records):
        for key in ("image", "mask_image", "anatomy", "soft_mask"):
            if record.get(key):
                record[key] = str(world / record[key])
        record["patient_id"] = f"renamed{number}"
    train_json = tmp_path / "train.json"
    train_json.write_text(json.dumps(records))
    source, given = trained["stage1"].source, ("--train_json", train_json)
    assert train("stage1", source, tmp_path / "s", world, *given) == 0
    assert train("stage1", source, tmp_path / "s", world, *given) == 0
    assert "knows its patients by other ids" not in caplog.text
    train_json.write_text(json.dumps([{**record, "patient_id": f"x{n}"} for n, record in enumerate(records)]))
    assert train("stage1", source, tmp_path / "s", world, *given) == 0
    assert "last.ckpt knows its patients by other ids than the data have now" in caplog.text
    assert train("stage1", source, tmp_path / "s", world, *given, "--overwrite") == 0
    caplog.clear()
    assert train("stage1", source, tmp_path / "s", world, *given) == 0
    assert "knows its patients by other ids" not in caplog.text


@pytest.mark.parametrize(("key", "other"), [("val_json", None), ("test_json", VAL)])
def test_a_classifier_inherits_the_patients_of_the_generator(
    world: Path, pictures: Path, tmp_path: Path, key: str, other: str | None
) -> None:
    settings: dict[str, Any] = {"synthetic": [str(pictures)]}
    settings |= {"val_json": str(world / other)} if other else {}
    assert classify(world, tmp_path / "out", **settings) == 0  # those of validation were not learned from
    expected = rf"{key}: 9 of its 9 patients .* are among those that stage1, stage2_1, stage2_2, unet_only learned"
    with pytest.raises(MedSoftError, match=expected):
        classify(world, tmp_path / "leak", **settings | {key: str(world / TRAIN)})
    # The same through the saved weights: tested later, or trained on.
    saved = {"train": False, "test_json": str(world / TRAIN)}
    with pytest.raises(MedSoftError, match=r"test_json: 9 of its 9 patients .*says .*classifier\.safetensors"):
        classify(world, tmp_path / "out", **settings | saved)
    weights = str(tmp_path / "out" / "classifier.safetensors")
    with pytest.raises(MedSoftError, match=rf"{key}: 9 of its 9 patients .*says .*classifier\.safetensors"):
        classify(world, tmp_path / "next", **{key: str(world / TRAIN), "pretrained": weights})


def test_a_classifier_is_not_tested_on_its_own_patients(world: Path, tmp_path: Path) -> None:
    assert classify(world, tmp_path / "out") == 0
    assert "trained_on" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = r"test_json: 4 of its 4 patients .* are among those that classifier learned from"
    with pytest.raises(MedSoftError, match=expected):
        classify(world, tmp_path / "out", train=False, test_json=str(world / TEST))


def test_an_evaluation_is_not_held_out_with_patients_of_the_generator(
    world: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(MedSoftError, match=r"REAL .*_train\.json: 9 of its 9 patients .*says .*pictures; split"):
        call(evaluate, world / TRAIN, pictures, "--train_json", world / TEST, "--output_dir", tmp_path / "evaluation")


def test_what_says_nothing_is_warned_of(
    trained: dict, world: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(trained["stage2_1"].last, weights_only=True)
    del content["medsoft"]["trained_on"]
    torch.save(content, tmp_path / "old.ckpt")
    assert train("stage2_2", tmp_path / "old.ckpt", tmp_path / "s", world, "--dry_run") == 0
    assert "old.ckpt does not say which patients it was trained on" in caplog.text
    shutil.copytree(pictures, tmp_path / "pictures")
    for path in (tmp_path / "pictures").glob("*/meta.json"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in meta.items() if key != "trained_on"}))
    assert classify(world, tmp_path / "out", synthetic=[str(tmp_path / "pictures")]) == 0
    assert "2 of 2 synthetic samples do not say which patients their generator was trained on" in caplog.text


def test_damaged_digests(trained: dict, world: Path, pictures: Path, tmp_path: Path) -> None:
    content = torch.load(trained["stage2_1"].last, weights_only=True)
    content["medsoft"]["trained_on"] = [{"salt": 1}]
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(MedSoftError, match=r"bad\.ckpt: its `trained_on` is damaged"):
        train("stage2_2", tmp_path / "bad.ckpt", tmp_path / "s", world, "--dry_run")
    shutil.copytree(pictures, tmp_path / "pictures")
    path = next((tmp_path / "pictures").glob("*/meta.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_on": "p1"}))
    _, rejects = load_samples(tmp_path / "pictures")
    assert [reject.reason for reject in rejects] == [
        "trained_on: expected a list of {salt, steps, patients}, as results have it, found 'p1'"
    ]


def test_groups_of_one_set_are_one(write_sample: Any, tmp_path: Path) -> None:
    one, other = trained_on("a", ["p1", "p2"]), trained_on("b", ["p2", "p1", "p1"])
    both = trained_on("c", ["p3"], one, other)
    assert sorted(group["steps"] for group in both) == [["a", "b"], ["c"]]
    assert groups_of({"trained_on": both}, "x") == both
    for name in ("p1", "p4"):
        write_sample(tmp_path / "data" / name)
    expected = r"^test: 1 of its 2 patients \(p1\) are among those that a, b learned from, .*; give other patients of"
    with pytest.raises(MedSoftError, match=expected):  # their names are those of the folders
        check_unseen("test", load_samples(tmp_path / "data")[0], both, "x")
    check_unseen("test", load_samples(tmp_path / "data")[0], trained_on("c", ["p3"]), "x")
