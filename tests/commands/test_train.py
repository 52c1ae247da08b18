"""ver_train.py through its command line, with the shipped YAMLs on phantoms."""

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODELS, ROOT, STAGES, changed, on_cpu, tensors, train, ver_train

import dataset_infer
from ldm.config import load_config
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.features.build import FeatureBuilder
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel
from ldm.training import run as training_run
from ldm.training.dataset import Batch
from ldm.training.loop import Training
from ldm.training.saving import Checkpoints
from ldm.training.stage import training_groups


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run leaves SIGINT to the system after an interruption."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def about(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["medsoft"]


def metrics(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


# ------------------------------------------------------------------------------------------- what each stage trains


def belongs(stage: str, key: str) -> bool:
    """The design's table, on checkpoint keys."""
    controller = key.startswith("msc.") and not key.startswith("msc.global_head.")
    if stage == "stage1":
        return key.startswith("msc.")
    if stage == "unet_only":
        return ".attn3." in key or ".norm4." in key
    return controller or (stage == "stage2_2" and key.startswith("model.diffusion_model."))


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_named_parameters_get_gradients_and_change(trained: dict, stage: str) -> None:
    run = trained[stage]
    before, after = tensors(run.source), tensors(run.last)
    if stage.startswith("stage2"):
        silent = [key for key, value in before.items() if ".attn3.to_out.0.weight" in key and not value.any()]
        assert not silent  # else the MSC could have no gradient
    wanted = {key for key in after if belongs(stage, key)}
    assert wanted
    assert run.graded == wanted
    assert changed(before, after) == wanted
    assert about(run.last)["step"] == 3


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_leaves(trained: dict, stage: str) -> None:
    folder = trained[stage].folder
    parts = {"stage1": ("msc.",), "unet_only": ("model.", "first_stage_model.", "cond_stage_model.")}
    wanted = parts.get(stage, ("model.", "first_stage_model.", "cond_stage_model.", "msc."))
    assert {key.split(".")[0] + "." for key in tensors(folder / "last.ckpt")} == set(wanted)
    assert load_config(folder / "config.yaml").training.stage == stage
    rows = metrics(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "3")]
    for name in ("val_cosine", "val_lesion_cosine"):
        assert bool(rows[0][name]) == (stage != "unet_only")  # which predicts no tokens
    assert float(rows[0]["train_loss"]) > 0
    assert float(rows[0]["val_loss"]) > 0
    (best,) = folder.glob("best_*.ckpt")
    assert best.name == f"best_epoch0000_loss{rows[0]['val_loss']}.ckpt"
    assert set(torch.load(best, weights_only=True)) == set(torch.load(folder / "last.ckpt", weights_only=True))
    left = {"config.yaml", "last.ckpt", "metrics.csv", "steps.csv", "tensorboard", best.name}
    assert {file.name for file in folder.iterdir()} == left | ({"pictures"} if stage != "stage1" else set())


def test_networks_are_in_memory_only_while_they_are_needed(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While features are computed neither U-Net nor MSC is there; before these two come the encoders are gone."""
    build, loaded = FeatureBuilder.build, training_run.loaded
    others, encoders = weakref.WeakSet(models()), []

    def building(self: FeatureBuilder, items: Any) -> Any:
        assert [net.parts for net in models() if net not in others] == [["autoencoder", "text"]]
        encoders.extend([weakref.ref(self.model), weakref.ref(self.clip)])
        return build(self, items)

    def loading(*given: Any) -> MedSoftModel:
        assert [each() for each in encoders] == [None, None]
        return loaded(*given)

    monkeypatch.setattr(FeatureBuilder, "build", building)
    monkeypatch.setattr(training_run, "loaded", loading)
    assert train("stage2_2", trained["stage2_1"].last, tmp_path / "s", world, batch_size=9) == 0
    assert encoders


def models() -> list[MedSoftModel]:
    """All models that this process holds, those without content left out."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) is MedSoftModel]
    return [net for net in found if not next(net.parameters()).is_meta]


def test_same_command_again_is_complete(
    trained: dict, world: Path, converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = trained["stage1"].last.read_bytes()
    assert train("stage1", converted, trained["stage1"].folder, world) == 0
    assert "already complete (3 steps)" in caplog.text
    assert trained["stage1"].last.read_bytes() == before


def test_that_a_run_is_complete_is_said_before_biomedclip_is_built(
    trained: dict, world: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BiomedClip, "__init__", lambda *given: pytest.fail("it takes a gigabyte"))
    assert train("stage1", converted, trained["stage1"].folder, world) == 0


def test_other_settings_in_the_same_folder_are_refused(trained: dict, world: Path, converted: Path) -> None:
    with pytest.raises(
        UsageError, match=r"stage1: holds checkpoints of another run \(training\.seed: 0 -> 1\); .*--overwrite"
    ):
        train("stage1", converted, trained["stage1"].folder, world, seed=1)


def test_overwrite_starts_again(trained: dict, world: Path, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(trained["stage1"].folder, tmp_path / "s")
    assert train("stage1", converted, tmp_path / "s", world, "--overwrite", seed=1, max_epochs=2, batch_size=9) == 0
    assert about(tmp_path / "s" / "last.ckpt")["step"] == 2
    assert [row["epoch"] for row in metrics(tmp_path / "s")] == ["0", "1"]


def test_published_step_2_4_starts_at_step_0_from_those_weights(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Same YAML as 2.3, new folder, --ckpt stage2_1/last.ckpt."""
    caplog.set_level("INFO")
    first = trained["stage2_1"].last
    seen: dict[str, Any] = {}

    plain = Training.run

    def run(self: Training) -> None:
        seen["step"] = self.progress.step
        seen["weights"] = {key: value.clone() for key, value in self.stage.weights().items()}
        plain(self)

    monkeypatch.setattr(Training, "run", run)
    assert train("stage2_1", first, tmp_path / "stage2_2", world) == 0
    assert seen["step"] == 0
    assert not changed(tensors(first), seen["weights"])
    assert about(tmp_path / "stage2_2" / "last.ckpt")["step"] == 3
    assert "ending in _stage2_2.yaml" in caplog.text


def test_true_size_yaml_shrunk_by_overrides_trains(trained: dict, world: Path, tmp_path: Path) -> None:
    """mldm_v15_stage2_2.yaml itself, brought to the phantom base's sizes on the command line."""
    small = load_config(MODELS / "phantom.yaml")
    sizes = {
        "data": ("image_size",),
        "unet": ("model_channels", "channel_mult", "num_res_blocks", "attention_levels", "num_heads", "context_dim"),
        "autoencoder": ("channels", "channel_mult", "num_res_blocks"),
        "text_encoder": ("width", "layers", "heads"),
        "biomedclip": ("grid", "token_dim", "text_dim"),
        "msc": ("width", "layers", "heads"),
    }
    given = [f"{part}.{key}={getattr(getattr(small, part), key)}" for part, keys in sizes.items() for key in keys]
    given = [word.replace(" ", "") for word in given] + [f"unet.semantic_dim={small.unet.semantic_dim}"]
    source = trained["stage2_1"].last
    assert train("stage2_2", source, tmp_path / "s", world, *given, family="mldm_v15", batch_size=9) == 0
    assert about(tmp_path / "s" / "last.ckpt")["config"]["training"]["rates"]["unet"] == 1e-5
    after = tensors(tmp_path / "s" / "last.ckpt")
    assert changed(tensors(source), after) == {key for key in after if belongs("stage2_2", key)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_true_size_stage_builds_what_it_names(stage: str) -> None:
    config = load_config(MODELS / f"mldm_v15_{stage}.yaml")
    with torch.device("meta"):
        model = MedSoftModel(config.architecture, config.training.builds)
    built = {"stage1": {"msc"}, "unet_only": {"unet", "autoencoder", "text"}}
    assert set(model.parts) == built.get(stage, {"unet", "autoencoder", "text", "msc"})
    groups = training_groups(model, config.training)
    sizes = {name: sum(value.numel() for value in members.values()) for name, members in groups.items()}
    expected = {"msc": (160e6, 180e6), "attn3": (43_987_520, 43_987_520), "unet": (859_535_364, 859_535_364)}
    wanted = {"stage1": {"msc"}, "unet_only": {"attn3"}, "stage2_1": {"msc"}}.get(stage, {"msc", "attn3", "unet"})
    assert set(sizes) == wanted
    for name, size in sizes.items():
        low, high = expected[name]
        assert low <= size <= high, f"{name}: {size}"


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_leaves_whole_weights(trained: dict, world: Path, tmp_path: Path, stage: str) -> None:
    """What training.precision auto means on machines that multiply bfloat16."""
    source = trained[stage].source
    assert train(stage, source, tmp_path / "s", world, precision="bf16-mixed", batch_size=9) == 0
    after = tensors(tmp_path / "s" / "last.ckpt")
    moved = changed(tensors(source), after)  # not all in one step: attn3 starts with an output projection of zeros
    assert moved
    assert moved <= {key for key in after if belongs(stage, key)}
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in after.values())


def test_dry_run_writes_nothing(world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert train("unet_only", converted, tmp_path / "s", world, "--dry_run") == 0
    assert "trains attn3" in caplog.text
    assert "4 diseased and 5 healthy samples of 9 patients" in caplog.text
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------------- interruptions


IN_TWO_EPOCHS = {"max_epochs": 2, "rates.attn3": 0.01, "schedule": "cosine", "pictures": 1}


@pytest.fixture(scope="module")
def unbroken(world: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two epochs of unet_only in one go, with one and with two batches a step."""
    folder = tmp_path_factory.mktemp("unbroken")
    for accumulate in (1, 2):
        given = {**IN_TWO_EPOCHS, "accumulate": accumulate}
        words = (small.last, folder / str(accumulate), world, "sampling.steps=2", *small.sizes)
        assert train("unet_only", *words, **given) == 0
    return {accumulate: folder / str(accumulate) for accumulate in (1, 2)}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, how: Any) -> None:
    """In the training step that follows ``after`` others, call ``how``."""
    plain, count = Training.forward_backward, 0

    def forward_backward(self: Training, batch: Batch) -> None:
        nonlocal count
        count += 1
        if count == after + 1:
            how()
        plain(self, batch)

    monkeypatch.setattr(Training, "forward_backward", forward_backward)


def crash() -> None:
    raise ArithmeticError("pulled the plug")


def press_control_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@on_cpu
@pytest.mark.parametrize(
    ("how", "after", "accumulate", "ends", "step"),
    [
        (crash, 4, 1, ArithmeticError, 4),  # one batch into the second epoch
        (crash, 3, 1, ArithmeticError, 3),  # between two epochs
        (press_control_c, 1, 1, KeyboardInterrupt, 1),  # which cli.run makes 130
        (terminate, 1, 1, 143, 2),  # the running batch is finished and kept
        (terminate, 2, 1, 143, 3),  # the epoch is finished and kept; its previews are drawn when the run goes on
        (terminate, 5, 1, 143, 6),  # the same of the last epoch
        (crash, 5, 2, ArithmeticError, 3),  # batch 2 of the second epoch is done: a whole step
        (crash, 4, 2, ArithmeticError, 2),  # inside a step: back to the epoch's start
    ],
)
def test_interrupted_and_resumed_equals_unbroken(
    world: Path,
    small: Any,
    unbroken: dict,
    tmp_path: Path,
    how: Any,
    after: int,
    accumulate: int,
    ends: Any,
    step: int,
) -> None:
    given = {**IN_TWO_EPOCHS, "accumulate": accumulate, "save_every_minutes": 0}
    words = (small.last, tmp_path / "s", world, "sampling.steps=2", *small.sizes)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after, how)
        if isinstance(ends, type):
            with pytest.raises(ends):
                train("unet_only", *words, **given)
        else:
            assert train("unet_only", *words, **given) == ends
    assert about(tmp_path / "s" / "last.ckpt")["step"] == step
    assert train("unet_only", *words, **given) == 0
    last = tmp_path / "s" / "last.ckpt"
    whole = unbroken[accumulate]
    assert about(last)["step"] == about(whole / "last.ckpt")["step"] == {1: 6, 2: 4}[accumulate]
    assert not changed(tensors(whole / "last.ckpt"), tensors(last))
    assert [row["epoch"] for row in metrics(tmp_path / "s")] == ["0", "1"]
    assert [row["val_loss"] for row in metrics(tmp_path / "s")] == [row["val_loss"] for row in metrics(whole)]
    pictures = sorted((whole / "pictures").iterdir())
    assert [path.name for path in pictures] == ["epoch_0000.png", "epoch_0001.png"]
    for path in pictures:
        assert (tmp_path / "s" / "pictures" / path.name).read_bytes() == path.read_bytes()


def test_stopped_before_it_could_say_complete(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "finish", lambda self: crash())
        with pytest.raises(ArithmeticError):
            train("stage1", converted, tmp_path / "s", world)
    before = tensors(tmp_path / "s" / "last.ckpt")
    assert not about(tmp_path / "s" / "last.ckpt").get("complete")
    assert train("stage1", converted, tmp_path / "s", world) == 0
    assert about(tmp_path / "s" / "last.ckpt")["complete"]
    assert not changed(before, tensors(tmp_path / "s" / "last.ckpt"))
    assert len(metrics(tmp_path / "s")) == 1


def test_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil() -> None:
        monkeypatch.setattr(
            "ldm.training.objectives.msc_loss", lambda tokens, *rest: tokens.mean((1, 2)) * float("nan")
        )

    interrupt(monkeypatch, 3, spoil)
    with pytest.raises(MedSoftError, match=r"the loss became nan in step 4 \(samples w5p\d+"):
        train("stage1", converted, tmp_path / "s", world, max_epochs=2)
    assert about(tmp_path / "s" / "last.ckpt")["step"] == 3
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path / "s" / "last.ckpt").values())


def test_weights_that_break_in_the_last_step_keep_the_last_good_checkpoint(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is fine, and there is no later one that would not be."""
    plain = Training.optimizer_step

    def optimizer_step(self: Training) -> None:
        plain(self)
        if self.progress.epoch == 1:
            self.stage.net.msc.position.data[0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "optimizer_step", optimizer_step)
        with pytest.raises(MedSoftError, match=r"msc\.position holds NaN or infinite values after step 2; the last"):
            train("stage1", converted, tmp_path / "s", world, max_epochs=2, batch_size=9)
    last = tmp_path / "s" / "last.ckpt"
    assert about(last)["step"] == 1
    assert all(torch.isfinite(value).all() for value in tensors(last).values())
    assert train("stage1", converted, tmp_path / "s", world, max_epochs=2, batch_size=9) == 0
    assert (about(last)["step"], about(last)["complete"]) == (2, True)
    assert [row["epoch"] for row in metrics(tmp_path / "s")] == ["0", "1"]


def test_failed_start_does_not_claim_the_folder(world: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(converted.read_bytes()[:100_000])
    with pytest.raises(MedSoftError, match=r"cut\.ckpt: damaged or cut short"):
        train("stage1", tmp_path / "cut.ckpt", tmp_path / "s", world)
    assert not (tmp_path / "s").exists()
    assert train("stage1", converted, tmp_path / "s", world, batch_size=9) == 0


def test_first_weights_may_not_be_the_file_to_write(trained: dict, world: Path) -> None:
    folder = trained["stage2_1"].folder
    for file in (folder / "last.ckpt", next(folder.glob("best_epoch*.ckpt"))):
        before = file.stat().st_mtime_ns
        with pytest.raises(UsageError, match=rf"{file.name}: lies in --save_path and would be replaced"):
            train("stage2_1", file, folder, world, "--overwrite")
        assert file.stat().st_mtime_ns == before


def test_changed_data_is_another_run(world: Path, converted: Path, tmp_path: Path) -> None:
    """What decides a healthy sample's masks and every sample's grey levels: anatomy.png and meta.json."""
    shutil.copytree(world / "train", tmp_path / "data")
    given = ("--train_json", tmp_path / "data")
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=9) == 0
    sample = next(sample for sample in load_samples(tmp_path / "data")[0] if sample.healthy)
    folder = sample.image.parent
    labels, meta = read_image(folder / "anatomy.png"), (folder / "meta.json").read_text()

    def refused() -> None:
        with pytest.raises(UsageError, match=r"of another run \(data or --ckpt: \w+… -> \w+…\)"):
            train("stage1", converted, tmp_path / "s", world, *given, batch_size=9)

    write_png(folder / "anatomy.png", np.where(labels == 2, 0, labels))
    refused()
    write_png(folder / "anatomy.png", labels)
    for change in ({"spacing_mm": 2.5}, {"window": [10, 240]}):
        (folder / "meta.json").write_text(json.dumps(json.loads(meta) | change))
        refused()


def test_damaged_last_checkpoint_is_named(trained: dict, world: Path, converted: Path, tmp_path: Path) -> None:
    whole = trained["stage1"].last.read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MedSoftError, match=r"last\.ckpt: damaged or cut short"):
        train("stage1", converted, tmp_path, world)


# ------------------------------------------------------------------------------------------------ the command itself


def test_help_does_not_import_torch_and_works_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "pytorch_lightning.py").write_text("raise SystemExit('lightning was imported')")
    for script in ("ver_train.py", "dataset_infer.py", "tool/model_convert.py", "tool/tool_merge_for_stage2.py"):
        found = subprocess.run(
            [sys.executable, ROOT / script, "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == 0, found.stderr
        assert "--config" in found.stdout


@pytest.mark.parametrize("script", [ver_train, dataset_infer])
def test_overrides_between_flags(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # else pytest's own handlers go
    seen = []
    words = ["--ckpt", "c", "--config", "y", "--save_path", "s", "--output_dir", "s", "a.b=1", "--seed", "1", "c.d=2"]
    unknown = words.index("--output_dir" if script is ver_train else "--save_path")
    with pytest.raises(SystemExit) as caught:
        cli.run(script.build_parser(), seen.append, words[:unknown] + words[unknown + 2 :])
    assert caught.value.code == 0
    assert (seen[0].overrides, seen[0].seed) == (["a.b=1", "c.d=2"], 1)


def test_one_line_and_exit_code(tmp_path: Path) -> None:
    given = ["--ckpt", "none.ckpt", "--config", MODELS / "phantom_stage1.yaml", "--save_path", "s", "training.sede=1"]
    found = subprocess.run(
        [sys.executable, ROOT / "ver_train.py", *given], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "training.sede; did you mean training.seed?" in line
