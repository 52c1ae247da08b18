"""classifier.py through its command line, on tiny drawn pictures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import classifier
from ldm.errors import MedSoftError, UsageError
from ldm.images import write_png

ROOT = Path(classifier.__file__).resolve().parent
SIZE = 32


def draw(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Noise; a bright blob when osteoblastic, a dark one when osteolytic."""
    image = rng.normal(120, 12, (SIZE, SIZE))
    if kind != "healthy":
        rows, columns = np.mgrid[:SIZE, :SIZE]
        y, x = rng.uniform(10, 22, 2)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 30)
        image += blob * (110 if kind == "osteoblastic" else -110)
    return image.clip(0, 255).astype(np.uint8)


def add_sample(folder: Path, kind: str, image: np.ndarray, **meta: str) -> Path:
    write_png(folder / "image.png", image)
    if kind != "healthy":
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[8:24, 8:24] = 255
        write_png(folder / "mask.png", mask)
        meta["lesion_type"] = kind
    (folder / "prompt.txt").write_text("healthy" if kind == "healthy" else f"{kind} lesion of L3")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def make_set(root: Path, prefix: str, count: int, seed: int, kinds: tuple[str, ...] = ()) -> Path:
    rng = np.random.default_rng(seed)
    kinds = kinds or ("healthy", "osteoblastic", "healthy", "osteolytic")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        add_sample(root / f"{prefix}{number:03d}", kind, draw(rng, kind), patient_id=f"{prefix}-patient{number}")
    return root


@pytest.fixture
def world(tmp_path: Path) -> dict:
    """Folders with 12 training, 8 validation and 8 test pictures, and a one-epoch configuration for them."""
    for name, count, seed in (("train", 12, 0), ("val", 8, 1), ("test", 8, 2)):
        make_set(tmp_path / name, name, count, seed)
    settings = {f"{name}_json": str(tmp_path / name) for name in ("train", "val", "test")}
    settings |= {"img_size": SIZE, "Batch_Size": 8, "EPOCHS": 1, "model": "test_resnet", "GPU": "cpu"}
    return settings | {"output_dir": str(tmp_path / "out"), "dataset": "toy", "lr": 3e-3}


def run(settings: dict, *flags: str) -> int:
    path = Path(settings["output_dir"]).parent / "args.json"
    path.write_text(json.dumps(settings))
    return classifier.main(classifier.build_parser().parse_args([str(path), *flags]))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def metrics_of(settings: dict) -> dict:
    return json.loads((Path(settings["output_dir"]) / "metrics.json").read_text())


# --- what it does -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A problem that can be learned, trained by lesion type for enough epochs, with a folder to predict."""
    root = tmp_path_factory.mktemp("learned")
    for name, count, seed in (("train", 80, 3), ("val", 24, 4), ("test", 32, 5), ("other", 8, 6)):
        make_set(root / name, name, count, seed)
    settings = {f"{name}_json": str(root / name) for name in ("train", "val", "test")}
    settings |= {"img_size": SIZE, "Batch_Size": 16, "EPOCHS": 8, "model": "test_resnet", "GPU": "cpu", "task": "type"}
    settings |= {"output_dir": str(root / "out"), "lr": 5e-3, "predict": [str(root / "other")], "save_epoch": 4}
    assert run(settings) == 0
    return settings


def test_learns_and_writes_everything(learned: dict) -> None:
    folder = Path(learned["output_dir"])
    metrics = metrics_of(learned)
    assert metrics["auc"] > 0.9
    assert metrics["auc_ci95"][0] <= metrics["auc"] <= metrics["auc_ci95"][1]
    assert metrics["classes"] == ["healthy", "osteoblastic", "osteolytic"]
    assert (folder / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "epoch_4.safetensors").exists()
    assert (folder / "epoch_8.safetensors").exists()
    history = rows_of(folder / "history.csv")
    assert [row["epoch"] for row in history] == [str(n) for n in range(1, 9)]
    ranked = sorted(history, key=lambda row: (-round(float(row["val_auc"]), 6), float(row["val_loss"])))
    assert metrics["epoch"] == int(ranked[0]["epoch"])
    assert not list(folder.glob("last.pt")) + list(folder.glob(".partial-*"))
    table = rows_of(folder / "metrics.csv")
    assert len(table) == 1
    assert float(table[0]["auc"]) == pytest.approx(metrics["auc"])


def test_metrics_agree_with_sklearn_on_the_predictions(learned: dict) -> None:
    from sklearn import metrics as sk

    rows = rows_of(Path(learned["output_dir"]) / "predictions_test.csv")
    truth = np.array([row["label"] != "healthy" for row in rows])
    score = np.array([float(row["disease_probability"]) for row in rows])
    called = score >= 0.5
    expected = {
        "auc": sk.roc_auc_score(truth, score),
        "average_precision": sk.average_precision_score(truth, score),
        "accuracy": sk.accuracy_score(truth, called),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, called),
        "precision": sk.precision_score(truth, called),
        "recall": sk.recall_score(truth, called),
        "specificity": sk.recall_score(~truth, ~called),
        "f1": sk.f1_score(truth, called),
    }
    found = metrics_of(learned)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    labels, named = [row["label"] for row in rows], [row["predicted"] for row in rows]
    assert found["confusion"] == sk.confusion_matrix(labels, named, labels=found["classes"]).tolist()
    columns = np.array([[float(row[f"p_{name}"]) for name in found["classes"]] for row in rows])
    assert found["macro_auc"] == pytest.approx(sk.roc_auc_score(labels, columns, multi_class="ovr"))


def test_interval_resamples_patients() -> None:
    from sklearn.metrics import roc_auc_score

    from ldm.classifier_report import auc_interval

    rng = np.random.default_rng(0)
    truth = np.arange(120) % 2 == 0
    score = np.round(truth + rng.normal(0, 1.2, 120), 1)  # with ties
    patients = [f"p{number // 3}" for number in range(120)]
    owner = np.arange(120) // 3
    values = []
    for _ in range(500):
        rows = np.concatenate([np.flatnonzero(owner == p) for p in rng.integers(40, size=40)])
        values.append(roc_auc_score(truth[rows], score[rows]))
    assert auc_interval(truth, score, patients) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.02)


def test_predicts_folders_and_through_the_library(learned: dict) -> None:
    from ldm.classification import predict

    folder = Path(learned["output_dir"])
    written = rows_of(folder / "predictions_other.csv")
    rows, rejects = predict(folder / "classifier.safetensors", learned["predict"][0], gpu="cpu")
    assert not rejects
    assert [row["sample_id"] for row in written] == [row["sample_id"] for row in rows]
    assert len(rows) == 8
    assert [float(row["disease_probability"]) for row in written] == [row["disease_probability"] for row in rows]


def test_saved_epoch_can_be_tested_without_training(learned: dict) -> None:
    before = metrics_of(learned)
    assert run(learned | {"train": False, "test_epoch": 4, "predict": []}) == 0
    other = json.loads((Path(learned["output_dir"]) / "metrics_epoch_4.json").read_text())
    assert other["epoch"] == 4
    assert metrics_of(learned) == before
    with pytest.raises(MedSoftError, match=r"epoch 3 was not saved \(saved: \[4, 8\]\)"):
        run(learned | {"train": False, "test_epoch": 3})
    with pytest.raises(UsageError, match="trained with img_size 32"):
        run(learned | {"train": False, "img_size": 48})


def test_second_run_is_already_complete_and_changes_need_overwrite(world: dict, capsys: pytest.CaptureFixture) -> None:
    from ldm.classification import load_config, run_classifier

    assert run(world) == 0
    args = Path(world["output_dir"]).parent / "args.json"
    stamp = (Path(world["output_dir"]) / "classifier.safetensors").stat().st_mtime_ns
    assert run_classifier(load_config(args))["already_complete"]
    assert (Path(world["output_dir"]) / "classifier.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match=r"holds another run \(EPOCHS: 1 -> 2\).*overwrite"):
        run(world, "--set", "EPOCHS=2")
    assert run(world, "--set", "EPOCHS=2", "--overwrite") == 0
    assert len(rows_of(Path(world["output_dir"]) / "history.csv")) == 2


def test_same_seed_same_weights_and_interrupted_run_goes_on(world: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm import classification

    world |= {"EPOCHS": 3}
    assert run(world) == 0
    weights = Path(world["output_dir"], "classifier.safetensors").read_bytes()
    history = rows_of(Path(world["output_dir"], "history.csv"))

    monkeypatch.setattr(classification, "STATE_EVERY_SECONDS", 0.0)
    epoch = classification.Trainer._epoch

    def killed(trainer: classification.Trainer, number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    monkeypatch.setattr(classification.Trainer, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, "--overwrite")
    assert not Path(world["output_dir"], "metrics.json").exists()
    trained = []
    monkeypatch.setattr(classification.Trainer, "_epoch", lambda t, n: trained.append(n) or epoch(t, n))
    assert run(world) == 0
    assert trained == [3]
    assert rows_of(Path(world["output_dir"], "history.csv")) == history
    assert Path(world["output_dir"], "classifier.safetensors").read_bytes() == weights


def synthetic_set(root: Path, patient: str, parent: str, count: int = 6) -> str:
    rng = np.random.default_rng(9)
    for number in range(count):
        kind = "healthy" if number == 0 else "osteolytic"
        add_sample(root / f"s{number}", kind, draw(rng, kind), patient_id=patient, parent_id=parent)
    return str(root)


def test_synthetic_images_join_training_at_the_ratio(world: dict, tmp_path: Path) -> None:
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    assert run(world | {"synthetic": [folder], "ratio": 0.5}) == 0
    assert metrics_of(world)["n_synthetic"] == 3  # half of 6 real diseased; the healthy sample is never taken
    assert metrics_of(world)["n_train_diseased"] == 6
    assert run(world | {"synthetic": [folder], "overwrite": True}) == 0
    assert metrics_of(world)["n_synthetic"] == 5


def test_deep_and_coloured_images_of_any_size_become_grey_squares(tmp_path: Path) -> None:
    from ldm.classifier_data import load_images

    ramp = np.tile(np.linspace(0, 4095, 64, dtype=np.uint16), (48, 1))
    add_sample(tmp_path / "deep", "healthy", ramp)
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 255
    add_sample(tmp_path / "red", "healthy", red)
    images = load_images("test", str(tmp_path), 16, "binary")
    assert images.images.shape == (2, 16, 16)
    assert images.images[0].min() < 10
    assert images.images[0].max() > 245
    assert np.all(images.images[1] == 76)  # 0.299 * 255


@pytest.mark.parametrize("counts", [[30, 6], [40, 4, 8, 1, 2]])
def test_class_weights_give_healthy_and_diseased_half_each(counts: list[int]) -> None:
    import torch

    from ldm.classification import class_weights

    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    total = class_weights(labels, len(counts)) * torch.tensor(counts)
    assert total.sum().item() == pytest.approx(sum(counts))
    shares = (total / total.sum()).tolist()
    assert shares == pytest.approx([0.5, *[0.5 / (len(counts) - 1)] * (len(counts) - 1)])


def test_colour_stem_weights_fit_a_grey_network(tmp_path: Path) -> None:
    import timm
    import torch

    from ldm.classifier_network import build_network

    colour = timm.create_model("test_resnet", num_classes=5)
    torch.save(colour.state_dict(), tmp_path / "weights.pth")
    grey = build_network("test_resnet", 2, str(tmp_path / "weights.pth"))
    picture = torch.rand(2, 1, SIZE, SIZE)
    with torch.inference_mode():
        expected = colour.eval().forward_features(picture.expand(-1, 3, -1, -1))
        assert torch.allclose(grey.eval().forward_features(picture), expected, atol=1e-5)


# --- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_siz": 32}, "args.json: unknown key img_siz; did you mean img_size"),
        ({"batch_size": 8}, "unknown key batch_size; did you mean Batch_Size"),
        ({"img_size": "256"}, 'img_size must be a whole number, found "256"'),
        ({"train": 1}, "train must be true or false, found 1"),
        ({"synthetic": "results"}, "synthetic must be a list of texts"),
        ({"Batch_Size": 0}, "Batch_Size must be at least 2 for training"),
        ({"test_epoch": 7}, "test_epoch must be at most EPOCHS, which is 1"),
        ({"train_json": None}, "train_json must be the path of a dataset, found null"),
        ({"task": "types"}, 'task must be "binary" or "type"'),
        ({"model": "resnet81"}, "model resnet81 is not known to timm; near: resnet"),
        ({"GPU": "first"}, "GPU must hold device numbers"),
    ],
)
def test_wrong_configurations_are_refused(world: dict, change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        run(world | change)
    assert not Path(world["output_dir"], "metrics.json").exists()


def test_overrides_are_named_in_errors(world: dict) -> None:
    with pytest.raises(UsageError, match="--set EPOCHS=many: EPOCHS must be a whole number"):
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
    assert [metrics[key] for key in ("auc", "auc_ci95", "average_precision", "specificity")] == [None] * 4
    assert metrics["recall"] is not None
    assert "AUC is undefined" in metrics["notes"][0]
    assert Path(world["output_dir"], "roc.png").exists()


def test_one_class_in_validation_chooses_by_loss(world: dict, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "well", "well", 4, 8, kinds=("healthy",))
    assert run(world | {"val_json": str(folder), "EPOCHS": 3}) == 0
    history = rows_of(Path(world["output_dir"], "history.csv"))
    best = min(history, key=lambda row: float(row["val_loss"]))
    assert metrics_of(world)["chosen_by"] == "validation loss"
    assert metrics_of(world)["epoch"] == int(best["epoch"])


def test_training_without_diseased_samples_is_refused(world: dict, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "well", "well", 4, 8, kinds=("healthy",))
    with pytest.raises(MedSoftError, match=r"training needs healthy and diseased samples, found {'healthy': 4}"):
        run(world | {"train_json": str(folder)})


@pytest.mark.parametrize(
    ("patient", "parent"), [("test-patient1", "elsewhere"), ("val-patient1", "val001"), ("unknown", "test001")]
)
def test_child_of_a_held_out_patient_stops_the_run(world: dict, tmp_path: Path, patient: str, parent: str) -> None:
    folder = synthetic_set(tmp_path / "results", patient, parent)
    with pytest.raises(MedSoftError, match=f"synthetic sample s0 was drawn on {parent}, patient {patient} in the"):
        run(world | {"synthetic": [folder]})


def test_equal_sample_names_of_different_patients_are_no_leak(world: dict, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    add_sample(tmp_path / "test" / "train000", "healthy", draw(rng, "healthy"), patient_id="somebody-else")
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    assert run(world | {"synthetic": [folder]}) == 0


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


def test_type_task_rejects_diseased_without_type(world: dict, tmp_path: Path) -> None:
    (tmp_path / "train" / "train001" / "meta.json").write_text("{}")
    assert run(world | {"task": "type"}) == 3
    rejects = rows_of(Path(world["output_dir"], "rejects.csv"))
    assert "no lesion_type" in rejects[0]["reason"]


def test_values_that_are_not_finite_stop_the_run(world: dict) -> None:
    with pytest.raises(MedSoftError, match=r"not finite|not a number"):
        run(world | {"lr": 1e30, "EPOCHS": 3})
    assert not Path(world["output_dir"], "classifier.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"<html>not weights</html>", "not readable as weights|not a file of plain tensors"),
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


def test_foreign_file_as_saved_classifier_is_refused(world: dict) -> None:
    with pytest.raises(MedSoftError, match="there is no saved classifier"):
        run(world | {"train": False})
    Path(world["output_dir"]).mkdir()
    Path(world["output_dir"], "classifier.safetensors").write_bytes(b"\x10" + bytes(40))
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
