"""What classifier.py refuses or reports, through its command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import add_sample, draw, make_set, make_world, metrics_of, rows_of, run, synthetic_set

import classifier
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import sha256_file

ROOT = Path(classifier.__file__).resolve().parent


@pytest.fixture
def world(tmp_path: Path) -> dict:
    return make_world(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_siz": 32}, "args.json: unknown key img_siz; did you mean img_size"),
        ({"batch_size": 8}, "unknown key batch_size; did you mean Batch_Size"),
        ({"img_size": "256"}, 'img_size: expected a whole number, found "256"'),
        ({"train": 1}, "train: expected true or false, found 1"),
        ({"synthetic": "results"}, "synthetic: expected a list of text"),
        ({"Batch_Size": 1}, "Batch_Size: expected at least 2 for training"),
        ({"steps": 0}, "steps: expected a number of at least 1"),
        ({"EPOCHS": 4, "steps": 3}, "steps: expected one for each of 4 epochs at least, found 3"),
        ({"test_epoch": 7}, "test_epoch: expected at most EPOCHS, which is 1"),
        ({"train_json": None}, "train_json: expected the path of a dataset, found null"),
        ({"train_json": ""}, 'train_json: expected the path of a dataset, found ""'),
        ({"val_json": ""}, 'val_json: expected the path of a dataset, found ""'),
        ({"task": "types"}, "task: expected one of binary, type, segment"),
        ({"task": "segment", "augmentation": "rand"}, 'augmentation: expected "light" with task segment, found "rand"'),
        ({"task": "segment", "pretrained": "hub"}, 'pretrained: expected null with task segment, found "hub"'),
        ({"task": "segment", "predict": ["x"]}, "predict: expected .. with task segment"),
        ({"task": "segment", "model": "pit_ti_224"}, "model pit_ti_224 makes no U-Net at img_size 32"),
        ({"model": "resnet81"}, "model resnet81 is not known to timm; near: resnet"),
        ({"model": "resnet18.no_such_tag"}, "model resnet18.no_such_tag is not known to timm; near: resnet18"),
        ({"img_size": 16}, "img_size: expected a number from 32 to 4096, found 16"),
        ({"model": "inception_v3", "img_size": 32}, "model inception_v3 does not work at img_size 32"),
        ({"GPU": "first"}, "GPU must hold device numbers"),
        ({"use_synthetic": "both"}, 'use_synthetic: expected one of mix, pretrain, duplicate_real, found "both"'),
        ({"use_synthetic": "duplicate_real"}, "ratio: expected a number with use_synthetic duplicate_real"),
        ({"use_synthetic": "pretrain"}, "synthetic: expected result folders with use_synthetic pretrain"),
        ({"pretrain_epochs": 0}, "pretrain_epochs: expected a number of at least 1"),
        ({"balance": "weights"}, "balance: expected one of loss, sampler"),
        ({"augmentation": "strong"}, 'augmentation: expected one of light, trivial, rand, found "strong"'),
        ({"channels": 3}, "channels: expected one of grey, rgb, found 3"),
        ({"channels": "rgba"}, "channels: expected one of grey, rgb"),
        ({"model": "test_resnet_nothing", "pretrained": "hub"}, "model test_resnet_nothing is not known to timm"),
    ],
)
def test_wrong_configurations_are_refused(world: dict, change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        run(world | change)
    assert not Path(world["output_dir"], "metrics.json").exists()


def test_folder_that_another_run_is_writing_is_left_alone(world: dict) -> None:
    from ldm.core.run_folder import RunFolder

    with (
        RunFolder(world["output_dir"], "run.json").lock(),
        pytest.raises(UsageError, match="another run is writing here at this moment"),
    ):
        run(world)
    assert not Path(world["output_dir"]).exists()


def test_file_in_the_place_of_the_output_folder_is_refused(world: dict) -> None:
    Path(world["output_dir"]).write_text("a file")
    with pytest.raises(UsageError, match=r"output_dir .*: expected a folder, found a file"):
        run(world)


def test_overwrite_deletes_nothing_that_no_run_has_written(world: dict) -> None:
    folder = Path(world["output_dir"])
    folder.mkdir()
    for name in ("report.html", "predictions_mine.csv", "notes.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(UsageError, match=r"holds no results of this command \(report\.html is there, run\.json is not"):
        run(world, "--overwrite")
    (folder / "report.html").unlink()
    assert run(world) == 0
    assert run(world, "--set", "EPOCHS=2", "--overwrite") == 0
    kept = {
        path.name: path.read_text() for path in folder.iterdir() if path.name in ("predictions_mine.csv", "notes.txt")
    }
    assert kept == {"predictions_mine.csv": "mine", "notes.txt": "mine"}
    mine = shutil.copytree(world["train_json"], folder.with_name("mine"))
    with pytest.raises(UsageError, match=r"predictions_mine\.csv: was not written by this command; rename"):
        run(world | {"predict": [str(mine)]}, "--set", "EPOCHS=2")
    assert (folder / "predictions_mine.csv").read_text() == "mine"


def test_overrides_are_named_in_errors(world: dict) -> None:
    with pytest.raises(UsageError, match="--set EPOCHS=many: EPOCHS: expected a whole number"):
        run(world, "--set", "EPOCHS=many")
    with pytest.raises(UsageError, match="--set EPOCHS: not understood"):
        run(world, "--set", "EPOCHS")


def test_malformed_json_names_the_line(world: dict, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"img_size": 32,\n oops}')
    with pytest.raises(MedSoftError, match=r"bad.json: not valid JSON \(line 2"):
        classifier.main(classifier.build_parser().parse_args([str(tmp_path / "bad.json")]))


@pytest.mark.parametrize("name", ["args1.json", "args2.json", "phantom.json"])
def test_shipped_configurations_say_what_data_they_expect(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MedSoftError, match=r"_train.json.*does not exist.*--root_dir.*--output_file.*--set train_json=PATH"
    ):
        classifier.main(classifier.build_parser().parse_args([name]))
    assert not list(tmp_path.iterdir())


def test_one_class_in_test_leaves_the_auc_undefined(world: dict, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "sick", "sick", 4, 7, kinds=("osteolytic",))
    assert run(world | {"test_json": str(folder)}) == 0
    metrics = metrics_of(world)
    undefined = ("auc", "average_precision", "balanced_accuracy", "specificity")
    assert [metrics["test"][key]["value"] for key in undefined] == [None] * 4
    assert [metrics["test"][key]["low"] for key in undefined] == [None] * 4
    assert metrics["test"]["recall"]["value"] is not None
    assert "AUC is undefined" in metrics["notes"][0]
    page = Path(world["output_dir"], "report.html").read_text()
    assert "curves are undefined: the test set holds one class" in page
    assert "t-SNE needs at least 10 images, there are 4" in page


def test_one_class_in_validation_chooses_by_loss(world: dict, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "well", "well", 4, 8, kinds=("healthy",))
    assert run(world | {"val_json": str(folder), "EPOCHS": 3}) == 0
    history = rows_of(Path(world["output_dir"], "history.csv"))
    best = min(history, key=lambda row: float(row["val_loss"]))
    assert metrics_of(world)["chosen_by"] == "validation loss"
    assert metrics_of(world)["epoch"] == int(best["epoch"])


def test_class_with_one_sample_is_warned_about_and_trained(
    world: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_set(tmp_path / "rare", "rare", 5, 8, kinds=("healthy", "healthy", "healthy", "healthy", "osteolytic"))
    assert run(world | {"train_json": str(folder), "Batch_Size": 2}) == 0  # 5 samples: no batch of one is left over
    assert "train: only one sample of class diseased" in caplog.text
    assert metrics_of(world)["n_train_diseased"] == 1


def test_training_without_diseased_samples_is_refused(world: dict, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "well", "well", 4, 8, kinds=("healthy",))
    with pytest.raises(MedSoftError, match=r"training needs healthy and diseased samples, found {'healthy': 4}"):
        run(world | {"train_json": str(folder)})


@pytest.mark.parametrize(
    ("patient", "parent"), [("test-patient1", "elsewhere"), ("val-patient1", "val001"), ("unknown", "test001")]
)
def test_child_of_a_held_out_patient_stops_the_run(world: dict, tmp_path: Path, patient: str, parent: str) -> None:
    folder = synthetic_set(tmp_path / "results", patient, parent)
    with pytest.raises(
        MedSoftError, match=f"synthetic sample s0 was inpainted into {parent}, patient {patient} in the"
    ):
        run(world | {"synthetic": [folder]})


def test_synthetic_folder_of_another_dataset_is_refused(world: dict, tmp_path: Path) -> None:
    folder = synthetic_set(tmp_path / "results", "stranger", "somewhere")
    message = (
        f"synthetic {folder}: none of its 6 samples was inpainted into a sample of the training set .the first, s0: "
        "parent somewhere, patient stranger; training has for instance train000, patient train-patient0"
    )
    with pytest.raises(MedSoftError, match=message):
        run(world | {"synthetic": [folder]})


def test_synthetic_folder_with_some_strangers_is_warned_about(
    world: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    (Path(folder) / "s3" / "meta.json").write_text('{"patient_id": "x", "parent_id": "y", "lesion_type": "osteolytic"}')
    assert run(world | {"synthetic": [folder]}) == 0
    assert "1 of 6 samples name no parent in the training set (the first: s3)" in caplog.text


def test_pretraining_without_diseased_synthetic_images_is_refused(world: dict, tmp_path: Path) -> None:
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000", count=1)
    with pytest.raises(MedSoftError, match="use_synthetic pretrain needs synthetic diseased images, found none in"):
        run(world | {"synthetic": [folder], "use_synthetic": "pretrain"})


def test_equal_sample_names_of_different_patients_are_no_leak(world: dict, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    add_sample(tmp_path / "test" / "train000", "healthy", draw(rng, "healthy"), patient_id="somebody-else")
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    assert run(world | {"synthetic": [folder]}) == 0


def test_synthetic_child_of_a_test_image_under_other_names_stops_the_run(world: dict, tmp_path: Path) -> None:
    """As when results were made before the patients got their ids, or from another copy of the data."""
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    meta, parent = Path(folder) / "s2" / "meta.json", tmp_path / "test" / "test001" / "image.png"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"parent_sha256": sha256_file(parent)}))
    with pytest.raises(
        MedSoftError, match="synthetic sample s2 was inpainted into test001 of the test set, says the SHA"
    ):
        run(world | {"synthetic": [folder]})


def test_synthetic_copy_of_a_test_picture_stops_the_run(world: dict, tmp_path: Path) -> None:
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    (Path(folder) / "s2" / "image.png").write_bytes((tmp_path / "test" / "test001" / "image.png").read_bytes())
    with pytest.raises(MedSoftError, match="synthetic sample s2 is pixel for pixel sample test001 of the test set"):
        run(world | {"synthetic": [folder]})


def test_patient_on_both_sides_is_refused(world: dict, tmp_path: Path) -> None:
    rng = np.random.default_rng(21)
    add_sample(tmp_path / "test" / "zz", "healthy", draw(rng, "healthy"), patient_id="train-patient3")
    with pytest.raises(MedSoftError, match="patient train-patient3 is in the train set and in the test set"):
        run(world)


@pytest.mark.parametrize(("child", "parent"), [("train", "test"), ("test", "train"), ("val", "train")])
def test_picture_drawn_on_a_sample_of_another_set_is_refused(
    world: dict, tmp_path: Path, child: str, parent: str
) -> None:
    """Images that were put among the real ones, as if they were real, under another patient than their parent's."""
    image = draw(np.random.default_rng(22), "osteolytic")
    meta = {"patient_id": "unknown", "parent_id": f"{parent}002", "synthetic": False}
    add_sample(tmp_path / child / "zz", "osteolytic", image, **meta)
    with pytest.raises(
        MedSoftError, match=f"sample zz of the {child} set was inpainted into {parent}002 of the {parent} set"
    ):
        run(world)


@pytest.mark.parametrize(("name", "left"), [("train", (6, 5, 4, 4)), ("val", (6, 6, 4, 4)), ("test", (6, 6, 4, 3))])
def test_synthetic_samples_never_count_as_real_ones(world: dict, tmp_path: Path, name: str, left: tuple) -> None:
    """They are left out of the set and counted, whether or not it is trained on."""
    meta = tmp_path / name / f"{name}001" / "meta.json"
    meta.write_text('{"patient_id": "someone", "lesion_type": "osteolytic", "synthetic": true}')
    assert run(world) == 0
    metrics = metrics_of(world)
    assert f"1 synthetic sample was left out of the {name} set." in metrics["notes"]
    counts = metrics["n_train_healthy"], metrics["n_train_diseased"], metrics["n_test"] - metrics["n_test_diseased"]
    assert (*counts, metrics["n_test_diseased"]) == left
    assert metrics["n_val"] == (7 if name == "val" else 8)


def test_a_test_set_of_synthetic_samples_is_refused(world: dict, tmp_path: Path) -> None:
    folder = Path(synthetic_set(tmp_path / "results", "stranger", "somewhere"))
    for meta in folder.glob("*/meta.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"synthetic": True}))
    with pytest.raises(MedSoftError, match=r"the test set has no usable sample \(0 rejected, 6 synthetic\)"):
        run(world | {"test_json": str(folder)})


def test_few_patients_of_a_class_give_no_interval(
    world: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """20 healthy and 2 diseased patients: an interval of their AUC, such as 1.000 to 1.000, would say nothing."""
    caplog.set_level("INFO")
    folder = make_set(tmp_path / "few", "few", 22, 7, kinds=("healthy",) * 10 + ("osteolytic",))
    assert run(world | {"test_json": str(folder)}) == 0
    metrics = metrics_of(world)
    assert (metrics["n_test_diseased"], metrics["n_test_patients"]) == (2, 22)
    assert metrics["test"]["auc"]["value"] is not None
    assert {(entry["low"], entry["high"]) for entry in metrics["test"].values()} == {(None, None)}
    note = "The test set holds few patients of a class (2 diseased): an interval from fewer than 10 is meaningless"
    assert any(each.startswith(note) for each in metrics["notes"])
    assert "(no interval), 22 samples (2 diseased)" in caplog.text
    assert "meaningless: few patients" in Path(world["output_dir"], "report.html").read_text()


def test_what_separates_the_classes_besides_lesions_is_said(world: dict, tmp_path: Path) -> None:
    for meta in (tmp_path / "train").glob("*/meta.json"):
        known = json.loads(meta.read_text())
        meta.write_text(json.dumps(known | {"scanner": "A" if "lesion_type" in known else "B"}))
    assert run(world) == 0
    metrics = metrics_of(world)
    (row,) = [row for row in metrics["confounds"] if row["auc"] == 1]
    assert (row["set"], row["attribute"]) == ("train", "scanner")
    warning = "train: scanner alone tells diseased from healthy samples (AUC 1.00; healthy: b (6 of 6), diseased: a (6"
    assert any(note.startswith(warning) for note in metrics["notes"])
    assert "<td>scanner</td>" in Path(world["output_dir"], "report.html").read_text()


def test_identical_picture_in_train_and_test_is_refused(world: dict, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(tmp_path / "train" / "train002" / "image.png") as picture:
        picture.save(tmp_path / "test" / "test004" / "image.png", compress_level=9)  # other bytes, same pixels
    with pytest.raises(
        MedSoftError, match=r"train002 of the train set and sample test004 of the test set are the same"
    ):
        run(world)


def test_corrupt_image_is_listed_and_skipped(world: dict, tmp_path: Path) -> None:
    broken = tmp_path / "train" / "train004" / "image.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert run(world) == 3
    rejects = rows_of(Path(world["output_dir"], "rejects.csv"))
    assert [(row["set"], row["sample_id"]) for row in rejects] == [("train", "train004")]
    assert metrics_of(world)["n_train_healthy"] == 5
    assert run(world) == 3  # already complete, and what it rejected is still rejected


def test_nothing_usable_left_stops(world: dict, tmp_path: Path) -> None:
    for image in (tmp_path / "test").glob("*/image.png"):
        image.write_bytes(b"")
    with pytest.raises(MedSoftError, match="test"):
        run(world)


@pytest.mark.parametrize("meta", ["{}", '{"lesion_type": " "}', '{"lesion_type": "Healthy"}'])
def test_type_task_rejects_diseased_without_type(world: dict, tmp_path: Path, meta: str) -> None:
    (tmp_path / "train" / "train001" / "meta.json").write_text(meta)
    assert run(world | {"task": "type"}) == 3
    rejects = rows_of(Path(world["output_dir"], "rejects.csv"))
    assert "lesion_type is missing or healthy" in rejects[0]["reason"]


def test_values_that_are_not_finite_stop_the_run(world: dict) -> None:
    with pytest.raises(MedSoftError, match=r"not finite|not a number"):
        run(world | {"lr": 1e30, "EPOCHS": 3})
    assert not Path(world["output_dir"], "classifier.safetensors").exists()


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_malicious_pretrained_weights_are_not_run(world: dict, tmp_path: Path) -> None:
    import torch

    torch.save({"conv1.weight": Malicious(tmp_path / "broken_in")}, tmp_path / "weights.pth")
    with pytest.raises(MedSoftError, match=r"weights.pth: refused, it asks for \w+; nothing in it was run"):
        run(world | {"pretrained": str(tmp_path / "weights.pth")})
    assert not (tmp_path / "broken_in").exists()


def test_blank_prompt_is_listed_and_skipped(world: dict, tmp_path: Path) -> None:
    (tmp_path / "train" / "train001" / "prompt.txt").write_text("  \n")
    assert run(world) == 3
    (reject,) = rows_of(Path(world["output_dir"], "rejects.csv"))
    assert reject["file"].endswith("prompt.txt")
    assert metrics_of(world)["n_train_diseased"] == 5


def test_byte_order_mark_in_the_json_is_read(world: dict, tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_text(json.dumps(world | {"Batch_Size": 1}), encoding="utf-8-sig")
    with pytest.raises(UsageError, match=r"bom.json: Batch_Size: expected at least 2"):
        classifier.main(classifier.build_parser().parse_args([str(tmp_path / "bom.json")]))


def test_missing_folder_to_predict_stops_before_training(world: dict, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match="nowhere: the folder that `predict` names does not exist"):
        run(world | {"predict": [str(tmp_path / "nowhere")]})
    assert not Path(world["output_dir"]).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"<html>not weights</html>", "expected a checkpoint .* found a web page"),
        ("resnet18", "do not fit the model"),
    ],
)
def test_foreign_pretrained_weights_are_refused(world: dict, tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        import torch

        torch.save({"conv1.weight": torch.zeros(4, 3, 7, 7)}, path)
    with pytest.raises(MedSoftError, match=message):
        run(world | {"pretrained": str(path)})


def test_pretrained_weights_that_are_replaced_before_they_are_read_are_refused(
    world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    import torch

    from ldm.classifier.run import load_data

    path, weights = tmp_path / "weights.pth", timm.create_model("test_resnet").state_dict()
    torch.save(weights, path)

    def loaded(*given: object) -> object:
        found = load_data(*given)
        torch.save({name: value + 1 for name, value in weights.items()}, path)
        return found

    monkeypatch.setattr("ldm.classifier.run.load_data", loaded)
    with pytest.raises(
        MedSoftError, match=r"weights\.pth: was replaced or changed after it had been read; run the same"
    ):
        run(world | {"pretrained": str(path), "model": "test_resnet"})
    assert not Path(world["output_dir"], "classifier.safetensors").exists()


def test_hub_weights_without_a_network_say_what_to_do(world: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        MedSoftError, match=r"weights of test_resnet could not be fetched .*set pretrained to that file"
    ):
        run(world | {"pretrained": "hub"})
    assert run(world) == 0  # the folder is free for a run without them


def test_foreign_file_as_saved_classifier_is_refused(world: dict) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(MedSoftError, match="there is no saved classifier"):
        run(world | {"train": False})
    saved = Path(world["output_dir"], "classifier.safetensors")
    saved.mkdir(parents=True)
    with pytest.raises(MedSoftError, match=r"classifier.safetensors: .*found a folder"):
        run(world | {"train": False})
    saved.rmdir()
    for content, message in (
        (bytes(40), "expected a checkpoint .*found bytes that start with"),
        (b"\x10" + bytes(7) + b"{" + bytes(31), "damaged safetensors file"),
        (b"PK\x03\x04" + bytes(36), "expected a classifier that classifier.py has saved, found a checkpoint of torch"),
    ):
        saved.write_bytes(content)
        with pytest.raises(MedSoftError, match=rf"classifier.safetensors: {message}"):
            run(world | {"train": False})
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(MedSoftError, match=r"not a classifier saved by classifier.py"):
        run(world | {"train": False})


def test_exit_code_and_help_without_torch(tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHONPROFILEIMPORTTIME="1")
    shown = subprocess.run(
        [sys.executable, str(ROOT / "classifier.py"), "--help"], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0
    assert "--set KEY=VALUE" in shown.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "timm", "cv2", "numpy", "matplotlib", "sklearn"}
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "classifier.py"), "nowhere.json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: nowhere.json: no such configuration here")
    assert "Traceback" not in wrong.stderr
