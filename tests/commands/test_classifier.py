"""classifier.py through its command line, on tiny drawn pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load as read_safetensors
from toy import SIZE, add_sample, make_set, make_world, metrics_of, rows_of, run, synthetic_set

from ldm.core.errors import MedSoftError, UsageError


@pytest.fixture
def world(tmp_path: Path) -> dict:
    return make_world(tmp_path)


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
    auc = metrics["test"]["auc"]
    assert auc["value"] > 0.9
    assert auc["low"] <= auc["value"] <= auc["high"]
    assert metrics["classes"] == ["healthy", "osteoblastic", "osteolytic"]
    assert (metrics["n_synthetic_used"], metrics["n_duplicated"], metrics["drawn_by"]) == (0, 0, [])
    assert (folder / "epoch_4.safetensors").exists()
    assert (folder / "epoch_8.safetensors").exists()
    history = rows_of(folder / "history.csv")
    assert [row["epoch"] for row in history] == [str(n) for n in range(1, 9)]
    ranked = sorted(history, key=lambda row: (-round(float(row["val_auc"]), 6), float(row["val_loss"])))
    assert metrics["epoch"] == int(ranked[0]["epoch"])
    assert metrics["validation"]["loss"] == float(ranked[0]["val_loss"])
    assert metrics["validation"]["macro_auc"] == float(ranked[0]["val_auc"])
    assert metrics["converged"] in (None, False)  # validation holds few patients
    said = "cannot be told" if metrics["converged"] is None else "had not converged"
    assert any(said in note for note in metrics["notes"])
    assert not list(folder.glob("last.pt")) + list(folder.glob(".partial-*"))
    table = rows_of(folder / "metrics.csv")
    assert len(table) == 1
    assert float(table[0]["auc"]) == pytest.approx(auc["value"])
    assert float(table[0]["auc_low"]) == pytest.approx(auc["low"])


def test_predicts_folders_and_through_the_library(learned: dict) -> None:
    from ldm.classifier.run import predict

    folder = Path(learned["output_dir"])
    written = rows_of(folder / "predictions_other.csv")
    rows, rejects = predict(folder / "classifier.safetensors", learned["predict"][0], gpu="cpu")
    assert not rejects
    assert [row["sample_id"] for row in written] == [row["sample_id"] for row in rows]
    assert len(rows) == 8
    assert [float(row["disease_probability"]) for row in written] == [row["disease_probability"] for row in rows]


def test_classifier_saved_before_a_key_existed_is_read(learned: dict, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ldm.classifier.run import predict

    saved = Path(learned["output_dir"]) / "classifier.safetensors"
    with safe_open(saved, "pt") as handle:
        info = json.loads(handle.metadata()["classifier"])
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    info["config"].pop("channels")
    info.pop("few_validation_patients")
    save_file(state, tmp_path / "old.safetensors", {"classifier": json.dumps(info)})
    expected, _ = predict(saved, learned["predict"][0], gpu="cpu")
    assert predict(tmp_path / "old.safetensors", learned["predict"][0], gpu="cpu")[0] == expected
    copied = tmp_path / "out"
    copied.mkdir()
    shutil.copy(Path(learned["output_dir"]) / "history.csv", copied)
    shutil.copy(tmp_path / "old.safetensors", copied / "classifier.safetensors")
    again = learned | {"train": False, "predict": [], "output_dir": str(copied)}
    assert run(again) == 0
    assert "converged" not in metrics_of(again)  # nobody knows of how few patients its validation was


def test_saved_epoch_can_be_tested_without_training(learned: dict) -> None:
    before = metrics_of(learned)
    assert run(learned | {"train": False, "test_epoch": 4, "predict": []}) == 0
    other = json.loads((Path(learned["output_dir"]) / "metrics_epoch_4.json").read_text())
    assert other["epoch"] == 4
    assert other["converged"] == before["converged"]  # few validation patients, whom this test does not read
    assert {note for note in before["notes"] if "converged" in note or "few patients of a class" in note} <= {
        *other["notes"]
    }
    assert metrics_of(learned) == before
    assert (Path(learned["output_dir"]) / "report_epoch_4.html").exists()
    with pytest.raises(MedSoftError, match=r"epoch 3 was not saved \(saved: \[4, 8\]\)"):
        run(learned | {"train": False, "test_epoch": 3})
    with pytest.raises(UsageError, match="trained with img_size 32"):
        run(learned | {"train": False, "img_size": 48})


def test_several_seeds_give_what_each_gives_alone(world: dict) -> None:
    assert run(world, "--seeds", "3", "5") == 0
    out = Path(world["output_dir"])
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["seed_3", "seed_5"]
    assert run(world, "--set", "seed=5", "--set", f"output_dir={out}_alone") == 0
    weights = [(folder / "classifier.safetensors").read_bytes() for folder in (out / "seed_5", Path(f"{out}_alone"))]
    assert read_safetensors(weights[0]).keys() == read_safetensors(weights[1]).keys()
    for name, tensor in read_safetensors(weights[0]).items():
        assert tensor.equal(read_safetensors(weights[1])[name])
    tables = [(out / f"seed_{seed}" / "predictions_test.csv").read_bytes() for seed in (3, 5)]
    assert tables[0] != tables[1]
    with pytest.raises(UsageError, match="--seeds 1 2 1: expected each seed once"):
        run(world, "--seeds", "1", "2", "1")


def test_second_run_is_already_complete_and_changes_need_overwrite(world: dict, capsys: pytest.CaptureFixture) -> None:
    from ldm.classifier.config import load_classifier_config
    from ldm.classifier.run import run_classifier

    assert run(world) == 0
    args = Path(world["output_dir"]).parent / "args.json"
    stamp = (Path(world["output_dir"]) / "classifier.safetensors").stat().st_mtime_ns
    assert run_classifier(load_classifier_config(args))["already_complete"]
    assert (Path(world["output_dir"]) / "classifier.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match=r"holds results of another run \(EPOCHS: 1 -> 2\).*overwrite"):
        run(world, "--set", "EPOCHS=2")
    assert run(world, "--set", "EPOCHS=2", "--overwrite") == 0
    assert len(rows_of(Path(world["output_dir"]) / "history.csv")) == 2


@pytest.mark.parametrize(
    ("change", "killed_in", "left"),
    [
        ({"EPOCHS": 3}, ("train", 3), [("train", 3)]),
        ({"EPOCHS": 2, "balance": "sampler"}, ("train", 2), [("train", 2)]),
        (
            {"EPOCHS": 3, "steps": 7, "augmentation": "trivial"},
            ("train", 3),
            [("train", 3)],
        ),
        ({"EPOCHS": 2, "task": "segment"}, ("train", 2), [("train", 2)]),
        (
            {"EPOCHS": 2, "use_synthetic": "pretrain", "pretrain_epochs": 2},
            ("pretrain", 2),
            [("pretrain", 2), ("train", 1), ("train", 2)],
        ),
        (
            {"EPOCHS": 2, "use_synthetic": "pretrain", "pretrain_epochs": 2},
            ("train", 1),
            [("train", 1), ("train", 2)],
        ),
    ],
)
def test_interrupted_run_goes_on_to_the_same_weights(
    world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, killed_in: tuple, left: list
) -> None:
    from ldm.classifier import training as classifier_training

    world |= change | {"synthetic": [synthetic_set(tmp_path / "results", "train-patient0", "train000")]}
    world["test_json"] = None
    assert run(world) == 0
    weights = Path(world["output_dir"], "classifier.safetensors").read_bytes()
    history = rows_of(Path(world["output_dir"], "history.csv"))

    monkeypatch.setattr(classifier_training, "STATE_EVERY_SECONDS", 0.0)
    train_epoch = classifier_training.train_epoch
    trained = []

    def killed(network: Any, optimizer: Any, phase: classifier_training.Phase, number: int, config: Any) -> float:
        trained.append((phase.name, number))
        if trained[-1] == killed_in:
            raise KeyboardInterrupt
        return train_epoch(network, optimizer, phase, number, config)

    monkeypatch.setattr(classifier_training, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, "--overwrite")
    assert not Path(world["output_dir"], "metrics.json").exists()
    trained.clear()
    killed_in = None
    assert run(world) == 0
    assert trained == left
    assert rows_of(Path(world["output_dir"], "history.csv")) == history
    assert Path(world["output_dir"], "classifier.safetensors").read_bytes() == weights


def test_synthetic_images_join_training_at_the_ratio(world: dict, tmp_path: Path) -> None:
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    assert run(world | {"synthetic": [folder], "ratio": 0.5}) == 0
    assert metrics_of(world)["n_synthetic_used"] == 3  # half of 6 real diseased; the healthy sample is never taken
    assert metrics_of(world)["n_train_diseased"] == 6
    assert run(world | {"synthetic": [folder], "overwrite": True}) == 0
    assert metrics_of(world)["n_synthetic_used"] == 5


@pytest.mark.parametrize(("ratio", "copies"), [(0.5, 3), (1.5, 9), (0, 0)])
def test_duplicates_are_as_many_as_synthetic_ones_would_be(world: dict, ratio: float, copies: int) -> None:
    """The control opens no synthetic folder: the one that is named does not exist."""
    control = {"use_synthetic": "duplicate_real", "ratio": ratio, "synthetic": ["nowhere"]}
    assert run(world | control) == 0
    metrics = metrics_of(world)
    assert (metrics["n_duplicated"], metrics["n_synthetic_used"], metrics["n_train_diseased"]) == (copies, 0, 6)


def test_duplicates_repeat_each_diseased_image_equally_often(world: dict) -> None:
    from ldm.classifier.config import ClassifierConfig
    from ldm.classifier.data import load_data
    from ldm.classifier.training import make_phases

    control = world | {"use_synthetic": "duplicate_real", "ratio": 1.5}
    data = load_data(ClassifierConfig(**control))
    names = [sample.sample_id for sample in data.duplicates.samples]
    assert sorted(names.count(name) for name in set(names)) == [1, 1, 1, 2, 2, 2]
    assert set(data.duplicates.labels) == {"diseased"}
    other = load_data(ClassifierConfig(**control | {"seed": 1})).duplicates
    assert names != [sample.sample_id for sample in other.samples]
    (phase,) = make_phases(ClassifierConfig(**control), data)
    assert len(phase.labels) == 12 + 9
    assert len(set(phase.names)) == len(phase.names)  # copies are not augmented alike


def test_pretraining_sees_synthetic_and_healthy_then_real_images_only(world: dict, tmp_path: Path) -> None:
    from ldm.classifier.config import ClassifierConfig
    from ldm.classifier.data import load_data
    from ldm.classifier.training import make_phases

    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    world |= {"synthetic": [folder], "use_synthetic": "pretrain", "pretrain_epochs": 2, "EPOCHS": 1}
    config = ClassifierConfig(**world)
    first, second = make_phases(config, load_data(config))
    assert {name.split("/")[0] for name in first.names} == {"train", "synthetic"}
    assert first.labels.tolist() == [0] * 6 + [1] * 5
    assert {name.split("/")[0] for name in second.names} == {"train"}
    assert run(world) == 0
    history = rows_of(Path(world["output_dir"], "history.csv"))
    assert [(row["phase"], row["epoch"]) for row in history] == [("pretrain", "1"), ("pretrain", "2"), ("train", "1")]
    assert metrics_of(world)["n_synthetic_used"] == 5


def test_sampler_draws_healthy_and_diseased_equally_often_and_by_seed(world: dict, tmp_path: Path) -> None:
    from ldm.classifier.config import ClassifierConfig
    from ldm.classifier.data import load_data
    from ldm.classifier.training import epoch_order, make_phases

    few = make_set(tmp_path / "few", "few", 120, 30, kinds=("healthy",) * 9 + ("osteolytic",))
    config = ClassifierConfig(**world | {"train_json": str(few), "balance": "sampler"})
    (phase,) = make_phases(config, load_data(config))
    epochs = [epoch_order(phase, epoch, config)[0] for epoch in (1, 2, 3, 1)]
    assert np.array_equal(epochs[0], epochs[3])
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.mean(phase.labels.numpy()[np.concatenate(epochs[:3])]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("channels", "shape"), [("grey", (2, 16, 16)), ("rgb", (2, 16, 16, 3))])
def test_deep_and_coloured_images_of_any_size_become_equal_squares(tmp_path: Path, channels: str, shape: tuple) -> None:
    from ldm.classifier.data import load_images

    ramp = np.tile(np.linspace(0, 4095, 64, dtype=np.uint16), (48, 1))
    add_sample(tmp_path / "deep", "healthy", ramp)
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 255
    add_sample(tmp_path / "red", "healthy", red)
    images = load_images("test", str(tmp_path), 16, "binary", channels)
    assert images.images.shape == shape
    assert images.images[0].min() < 10
    assert images.images[0].max() > 245
    assert np.all(images.images[1] == (76 if channels == "grey" else [255, 0, 0]))  # 0.299 * 255


def test_colour_pictures_of_mixed_sizes_train_any_timm_model(world: dict, tmp_path: Path) -> None:
    """A vision transformer has a fixed input size, which img_size replaces."""
    rng = np.random.default_rng(31)
    wide = rng.integers(0, 65536, (40, 70), dtype=np.uint16)
    add_sample(tmp_path / "train" / "wide", "healthy", wide, patient_id="wide")
    add_sample(tmp_path / "train" / "rgb", "osteolytic", rng.integers(0, 256, (50, 30, 3), dtype=np.uint8))
    assert run(world | {"channels": "rgb", "model": "test_vit", "predict": [world["val_json"]]}) == 0
    assert metrics_of(world)["n_train_healthy"] == 7
    assert len(rows_of(Path(world["output_dir"], "predictions_val.csv"))) == 8


@pytest.mark.parametrize("counts", [[30, 6], [40, 4, 8, 1, 2]])
def test_class_weights_give_healthy_and_diseased_half_each(counts: list[int]) -> None:
    import torch

    from ldm.classifier.training import class_weights

    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    total = class_weights(labels, len(counts)) * torch.tensor(counts)
    assert total.sum().item() == pytest.approx(sum(counts))
    shares = (total / total.sum()).tolist()
    assert shares == pytest.approx([0.5, *[0.5 / (len(counts) - 1)] * (len(counts) - 1)])


def test_colour_stem_weights_fit_a_grey_network(tmp_path: Path) -> None:
    import timm
    import torch

    from ldm.classifier.network import build_network

    colour = timm.create_model("test_resnet", num_classes=5)
    torch.save(colour.state_dict(), tmp_path / "weights.pth")
    grey = build_network("test_resnet", 2, pretrained=str(tmp_path / "weights.pth"))
    picture = torch.rand(2, 1, SIZE, SIZE)
    with torch.inference_mode():
        expected = colour.eval().forward_features(picture.expand(-1, 3, -1, -1))
        assert torch.allclose(grey.eval().forward_features(picture), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "folder"), [("args1.json", "VerTumor1200"), ("args2.json", "RSNA")])
def test_published_command_runs_where_its_data_folder_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    """Sample folders alone are enough: the annotation files are made, and only once."""
    import classifier

    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "data" / folder, "sample", 24, 50)
    small = ["EPOCHS=1", "img_size=32", "model=test_resnet", "GPU=cpu"]
    words = [name, *(word for text in small for word in ("--set", text))]
    assert classifier.main(classifier.build_parser().parse_args(words)) == 0
    settings = {"output_dir": f"classifier_results/{folder}"}
    assert metrics_of(settings)["n_test"] == 5
    split = tmp_path / "data" / folder / "openimages_format_train.json"
    written = split.stat().st_mtime_ns
    assert classifier.main(classifier.build_parser().parse_args(words)) == 0
    assert split.stat().st_mtime_ns == written
