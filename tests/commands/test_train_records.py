"""What a run says about itself: dry run, records, pictures, averages, warnings; and what it refuses to learn from."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODELS, call, changed, infer, tensors, train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import config_from_dict, load_config
from ldm.core.devices import out_of_memory
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.features.shards import keys_of
from ldm.training.dataset import Batch
from ldm.training.estimates import fake_batch, fake_stage, stage_disk, stage_memory, step_operations
from ldm.training.loop import Training
from ldm.training.stage import Stage
from tool import bench, doctor

import ver_openImagesDatasets  # isort: skip


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_dry_run_says_it_all(world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert train("stage1", converted, tmp_path / "s", world, "--dry_run", ema_decay=0.9) == 0
    said = caplog.text
    assert "ema_decay: 0.9" in said  # the resolved configuration
    assert "train: 4 diseased and 5 healthy samples of 9 patients" in said
    assert "trains msc: 68 tensors, 0.90 M parameters, learning rate 0.001" in said
    assert f"memory on {'cuda' if torch.cuda.is_available() else 'cpu'}: about" in said
    assert "average 3.4 MiB" in said
    assert re.search(
        r"memory for features, before: about [\d.]+ MiB \(encoders [\d.]+ MiB, 2 items at a time [\d.]+ MiB\)", said
    )
    assert "disk: at most" in said
    assert not (tmp_path / "s").exists()
    assert not list(tmp_path.iterdir())


def test_resolved_configuration_is_in_folder_and_checkpoint(trained: dict) -> None:
    run = trained["stage1"]
    stored = config_from_dict(read_checkpoint(run.last).metadata["config"], "checkpoint")
    assert load_config(run.folder / "config.yaml") == stored
    assert stored.training.batch_size == 3


def test_memory_estimate_is_what_autograd_keeps() -> None:
    """Against the same networks with real tensors; and checkpointing keeps less."""
    config = load_config(MODELS / "phantom_unet_only.yaml", ["training.mask_weight=0"])
    estimate = stage_memory(config.architecture, config.training, 2, half=False)
    stage, kept = fake_stage(config.architecture, config.training, False), {}
    own = {value.data_ptr() for value in stage.parameters()}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = stage(fake_batch(config.architecture, 2), 0.0)[0].sum()
    assert estimate.activations == pytest.approx(sum(v.untyped_storage().nbytes() for v in kept.values()), rel=0.05)
    assert loss.requires_grad
    assert estimate.parameters == sum(4 * value.numel() for value in stage.net.parameters())
    assert estimate.gradients * 2 == estimate.optimizer
    config.training.activation_checkpointing = True
    assert stage_memory(config.architecture, config.training, 2, half=False).activations < estimate.activations / 2


def test_memory_estimate_for_a_gpu() -> None:
    """Against what an NVIDIA H200 allocated (`bench.py batches`, docs/memory.md): 69.5 GiB."""
    config = load_config(MODELS / "mldm_v15_unet_only.yaml", [])
    assert stage_memory(
        config.architecture, config.training, 64, half=True, device="cuda"
    ).total / 2**30 == pytest.approx(69.5, rel=0.05)


def test_memory_estimate_of_weights_that_are_shared_out() -> None:
    """The full model on four devices: a quarter of what is trained, all that is frozen, and three times a block."""
    config = load_config(MODELS / "mldm_v15_stage2_2.yaml", ["training.strategy=fsdp"])
    alone, shared = (stage_memory(config.architecture, config.training, 1, False, devices=n) for n in (1, 4))
    frozen = alone.parameters - alone.gradients
    assert shared.parameters == pytest.approx(frozen + alone.gradients / 4, rel=1e-6)
    assert (shared.gradients, shared.optimizer) == (alone.gradients // 4, alone.optimizer // 4)
    assert (alone.gathered, shared.activations) == (0, alone.activations)
    assert 0.1 * alone.gradients < shared.gathered < 0.4 * alone.gradients
    assert shared.total < alone.total / 2


@pytest.mark.parametrize("stage", ["stage1", "unet_only"])
def test_disk_estimate_covers_what_is_written(trained: dict, stage: str) -> None:
    run = trained[stage]
    config = load_config(run.folder / "config.yaml")
    last, best = stage_disk(config.architecture, config.training)
    files = {path.name: path.stat().st_size for path in run.folder.glob("*.ckpt")}
    assert files["last.ckpt"] < last  # finished: without the optimizer's state
    assert sum(files.values()) < 2 * last + best < 10 * sum(files.values())


def test_every_step_is_recorded(trained: dict) -> None:
    found = rows(trained["stage2_2"].folder / "steps.csv")
    assert [(row["epoch"], row["step"]) for row in found] == [("0", "1"), ("0", "2"), ("0", "3")]
    for row in found:
        assert float(row["loss"]) > 0
        assert float(row["items_per_second"]) > 0
        assert all(float(row[f"grad_norm_{name}"]) > 0 for name in ("msc", "attn3", "unet"))
    assert float(found[0]["lr_unet"]) == pytest.approx(5e-4)
    assert float(found[-1]["lr_unet"]) < 5e-4  # cosine
    epoch = rows(trained["stage2_2"].folder / "metrics.csv")[0]
    assert float(epoch["train_loss"]) == pytest.approx(np.mean([float(row["loss"]) for row in found]), rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3 * 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),  # half a wave over six steps
    ],
)
def test_learning_rates_warm_up_and_fall(
    world: Path, converted: Path, tmp_path: Path, schedule: str, factors: list[float]
) -> None:
    given = {"warmup_steps": 3, "schedule": schedule, "max_epochs": 2, "rates.msc": 0.004}
    assert train("stage1", converted, tmp_path / "s", world, **given) == 0
    found = [float(row["lr_msc"]) for row in rows(tmp_path / "s" / "steps.csv")]
    assert found == pytest.approx([0.004 * factor for factor in factors], rel=1e-6)


def test_next_stage_starts_from_the_weights_of_the_one_before(trained: dict, world: Path, tmp_path: Path) -> None:
    """With steps too small to change a float32, it validates to the number that the stage before ended with."""
    still = {f"rates.{name}": 1e-30 for name in ("msc", "attn3", "unet")}
    assert train("stage2_2", trained["stage2_1"].last, tmp_path / "s", world, batch_size=9, **still) == 0
    before, after = (rows(folder / "metrics.csv")[-1] for folder in (trained["stage2_1"].folder, tmp_path / "s"))
    assert float(after["val_loss"]) == pytest.approx(float(before["val_loss"]), rel=1e-5)


def test_tensorboard_has_the_same_numbers(trained: dict) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained["unet_only"].folder
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [float(row["loss"]) for row in rows(folder / "steps.csv")]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in board.Scalars("train/lr_attn3")] == [1, 2, 3]
    assert [event.step for event in board.Images("pictures")] == [3]
    (value,) = board.Scalars("epoch/val_loss")
    assert value.value == pytest.approx(float(rows(folder / "metrics.csv")[0]["val_loss"]), rel=1e-5)


def test_pictures_of_fixed_items(world: Path, converted: Path, trained: dict, tmp_path: Path) -> None:
    """Original, hidden, drawn: only the last depends on the weights."""
    given = {"max_epochs": 8, "batch_size": 9, "rates.attn3": 0.05, "pictures": 2}
    assert train("unet_only", converted, tmp_path / "s", world, "sampling.steps=2", **given) == 0
    names = sorted(path.name for path in (tmp_path / "s" / "pictures").iterdir())
    assert names == [f"epoch_000{epoch}.png" for epoch in (1, 3, 5, 7)]
    first, last = (read_image(tmp_path / "s" / "pictures" / names[place]) for place in (0, -1))
    assert first.shape == last.shape == (2 * 64, 3 * 64, 3)  # two diseased validation samples
    assert np.array_equal(first[:, :128], last[:, :128])
    assert not np.array_equal(first[:, 128:], last[:, 128:])


def test_moving_average_is_validated_and_left(world: Path, converted: Path, tmp_path: Path) -> None:
    given = {"batch_size": 9, "max_epochs": 3, "rates.msc": 0.01, "save_every_minutes": 0}
    states: list[dict[str, torch.Tensor]] = []

    plain_end = Training.end_epoch

    def keep(self: Training, *values: float) -> None:
        states.append({key: value.detach().clone() for key, value in self.stage.trained.items()})
        plain_end(self, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "end_epoch", keep)
        assert train("stage1", converted, tmp_path / "average", world, ema_decay=0.5, **given) == 0
    assert train("stage1", converted, tmp_path / "plain", world, **given) == 0
    average, start = tensors(tmp_path / "average" / "last.ckpt"), tensors(converted)
    assert not changed(tensors(tmp_path / "plain" / "last.ckpt"), states[-1])  # training itself is the same
    expected = {key: start[key] for key in states[0]}
    for step, state in enumerate(states, 1):
        decay = min(0.5, step / (10 + step))
        expected = {key: decay * value + (1 - decay) * state[key] for key, value in expected.items()}
    for key, value in expected.items():
        assert torch.allclose(average[key], value, atol=1e-6), key
    plain, smooth = (rows(tmp_path / name / "metrics.csv") for name in ("plain", "average"))
    assert [row["train_loss"] for row in plain] == [row["train_loss"] for row in smooth]
    assert plain[1]["val_loss"] != smooth[1]["val_loss"]


def test_tensors_without_gradient_are_warned_about(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stage 2.1 on a checkpoint whose third attention is still silent: the MSC cannot learn from it."""
    assert train("stage2_1", converted, tmp_path / "s", world) == 0
    assert "warning: msc: 66 of 66 trained tensors had no gradient in the first 3 steps" in caplog.text
    assert "have not moved" in caplog.text


def test_sound_stage_is_not_warned_about(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("stage1", converted, tmp_path / "s", world) == 0
    assert "trained tensors" not in caplog.text


def test_gradient_that_is_not_a_number(world: Path, converted: Path, tmp_path: Path) -> None:
    """The loss is fine, its gradient is not: stops before the step breaks the weights."""
    plain, calls = Stage.forward, []

    def forward(self: Stage, batch: Batch, dropout: float) -> tuple:
        found = plain(self, batch, dropout)
        calls.extend([batch] if dropout else [])  # without: validation, or an estimate
        if dropout and len(calls) == 3:
            nothing = (self.net.msc.position[0, 0] * 0).sqrt()  # its slope is infinity times 0
            found = found._replace(loss=found.loss + nothing)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "forward", forward)
        with pytest.raises(
            MedSoftError, match=r"a gradient became nan in step 3 \(samples w5p\d+.*last good checkpoint"
        ):
            train("stage1", converted, tmp_path / "s", world, save_every_minutes=0)
    found = tensors(tmp_path / "s" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in found.values())
    assert read_checkpoint(tmp_path / "s" / "last.ckpt").metadata["step"] == 2


def test_out_of_memory_is_one_line(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "forward_backward", lambda self, batch: torch.empty(1 << 55))
        with pytest.raises(
            MedSoftError, match=r"out of memory in step 1 .*a smaller --batch_size with training\.accum"
        ):
            train("stage1", converted, tmp_path / "s", world)


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("shapes differ", False),
    ],
)
def test_what_counts_as_out_of_memory(said: str, full: bool) -> None:
    """Triton and cuBLAS ask the driver themselves, and fail with errors of their own."""
    assert out_of_memory(RuntimeError(said)) == full


def test_only_healthy_samples_are_refused(world: Path, converted: Path, tmp_path: Path) -> None:
    for folder in (world / "train").iterdir():
        if (folder / "prompt.txt").read_text().strip() == "healthy":
            (tmp_path / "data" / folder.name).parent.mkdir(exist_ok=True)
            (tmp_path / "data" / folder.name).symlink_to(folder)
    with pytest.raises(MedSoftError, match=r"data: all 5 samples that can be used are healthy; there is no lesion"):
        train("stage1", converted, tmp_path / "s", world, "--train_json", tmp_path / "data")


def test_no_healthy_sample_is_warned_about(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for folder in (world / "train").iterdir():
        if (folder / "prompt.txt").read_text().strip() != "healthy":
            (tmp_path / "data" / folder.name).symlink_to(folder)
    given = ("--train_json", tmp_path / "data")
    assert train("stage1", converted, tmp_path / "s", world, *given, balance="true") == 0
    assert "has no healthy sample: the prompt `healthy` will not be learned" in caplog.text


def test_sample_that_cannot_be_drawn_on_is_listed(
    world: Path, converted: Path, tmp_path: Path, write_sample: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is sound, so it does not count as damage; the classifier can use it."""
    (tmp_path / "data").mkdir()
    for folder in (world / "train").iterdir():
        (tmp_path / "data" / folder.name).symlink_to(folder)
    bare = write_sample(tmp_path / "data" / "bare", prompt="healthy", mask=None)
    given = ("--train_json", tmp_path / "data", "training.max_rejected=0")
    for _ in range(2):  # trained, then complete already
        assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=9) == 3
        (reject,) = json.loads((tmp_path / "s" / "rejects.json").read_text())
        assert (reject["sample_id"], reject["file"]) == ("bare", str(bare / "image.png"))
        assert reject["reason"].startswith("healthy, and its vertebra is not known: neither anatomy.png nor a mask nor")
        assert "skipped " + reject["file"] in caplog.text
    assert len(rows(tmp_path / "s" / "steps.csv")) == 1  # the other nine


def test_healthy_samples_with_a_black_mask_are_left_out_before_any_feature_is_computed(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published layout: such a mask is sound, but says of no place where a lesion may be."""
    shutil.copytree(world / "train", tmp_path / "data")
    black = [sample for sample in load_samples(tmp_path / "data")[0] if sample.healthy][:4]
    for sample in black[:2]:
        sample.anatomy.unlink()
    for sample in black[2:]:  # no vertebra in it
        labels = read_image(sample.anatomy)
        write_png(sample.anatomy, np.where(labels == 1, 0, labels))
    for sample in black:
        write_png(sample.image.with_name("mask.png"), np.zeros(read_image(sample.image).shape[:2], np.uint8))
    given = ("--train_json", tmp_path / "data", "--cache_dir", tmp_path / "features", "training.max_rejected=0")
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=5) == 3
    rejects = json.loads((tmp_path / "s" / "rejects.json").read_text())
    assert [reject["sample_id"] for reject in rejects] == [sample.sample_id for sample in black]
    assert rejects[0]["reason"] == "healthy, and its vertebra is not known: nothing is marked in mask.png"
    assert "anatomy.png and mask.png" in rejects[3]["reason"]
    assert "train: 4 samples cannot be inpainted; left out, which is no damage" in caplog.text
    assert sum(len(keys_of(file)) for file in (tmp_path / "features").glob("v*-clip-*")) == 2 * (5 + 3)
    assert call(doctor, "--data", tmp_path / "data", "--output", tmp_path / "found.json") == 0
    (finding,) = [each for each in json.loads((tmp_path / "found.json").read_text()) if "inpainted" in each["text"]]
    assert finding["text"].startswith("4 of 5 healthy samples cannot be inpainted, so training leaves out the same")
    assert infer(converted, tmp_path / "out", "--data", tmp_path / "data", "--prompt", "x") == 3
    assert len(json.loads((tmp_path / "out" / "rejects.json").read_text())) == 4


def test_one_corrupt_image_in_a_hundred_is_skipped_and_two_stop(
    world: Path, converted: Path, tmp_path: Path, write_sample: Any
) -> None:
    """max_rejected is 1 %; the files are damaged after preparation, in two different ways."""
    for split, members in (("train", range(90)), ("val", range(90, 100))):
        for number in members:
            image = np.random.default_rng(number).integers(0, 256, (20, 24), dtype=np.uint8)
            write_sample(tmp_path / split / f"s{number:03}", image=image, meta={"patient_id": f"p{number}"})
        write_annotations(tmp_path / f"{split}.json", load_samples(tmp_path / split)[0])
    given = ["--train_json", tmp_path / "train.json", "--val_json", tmp_path / "val.json", "data.diseased_crops=1"]
    given += ["--cache_dir", tmp_path / "features"]
    first = tmp_path / "train" / "s007" / "image.png"
    first.write_bytes(first.read_bytes()[:-200])
    assert train("stage1", converted, tmp_path / "one", world, *given, batch_size=50) == 3
    (reject,) = json.loads((tmp_path / "one" / "rejects.json").read_text())
    assert (reject["sample_id"], reject["file"]) == ("s007", str(first))
    assert "truncated" in reject["reason"]
    assert [row["step"] for row in rows(tmp_path / "one" / "steps.csv")] == ["1", "2"]
    (tmp_path / "val" / "s095" / "image.png").unlink()
    expected = r"2 of 100 samples cannot be read, more than training\.max_rejected=0\.01 allows; the first: .*s007"
    with pytest.raises(MedSoftError, match=expected):
        train("stage1", converted, tmp_path / "two", world, *given, batch_size=50)
    assert not (tmp_path / "two").exists()


def test_similar_prompts_and_twins_are_said_in_preparation(
    tmp_path: Path, write_sample: Any, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    for number in range(6):
        prompt = "lytic lesion" if number % 2 else "Lytic lesion!"
        write_sample(tmp_path / "data" / f"s{number}", prompt=prompt, image=image, meta={"patient_id": f"p{number}"})
    given = ("--root_dir", tmp_path / "data", "--output_file", tmp_path / "o.json", "--fractions", 0.5, 0.25, 0.25)
    assert call(ver_openImagesDatasets, *given) == 0
    assert "nearly the same prompt, learned as different ones: 'Lytic lesion!' | 'lytic lesion'" in caplog.text
    assert "are the same image, pixel for pixel; remove one of them" in caplog.text


HALF = ["features on the fly, bf16", "nothing frozen", "float32"]


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        ("stage1", "32-true", []),
        ("stage1", "bf16-mixed", [HALF[0], HALF[-1]]),
        ("unet_only", "bf16-mixed", HALF),
        ("unet_only", "32-true", ["nothing frozen"]),
    ],
)
def test_bench_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str, precision: str, more: list[str]
) -> None:
    caplog.set_level("INFO")
    given = ("--config", MODELS / f"phantom_{stage}.yaml", "--batch_size", 1, "--repeats", 1)
    assert call(bench, "training", *given, "--output", tmp_path / "b.json", f"training.precision={precision}") == 0
    found = json.loads((tmp_path / "b.json").read_text())
    names = [row["variant"] for row in found["stages"]]
    assert names == ["as trained", "features on the fly", *more]
    assert found["precision"] == precision
    assert all(row["ratio"] > 0 and row["ratio_of_core_time"] > 0 for row in found["stages"])
    assert f"{stage:10} features on the fly" in caplog.text
    assert found["stages"][0]["operations_per_second"] > 0
    assert f"{stage:10} " in caplog.text
    assert "TFLOP/s as trained" in caplog.text
    assert "most memory" in caplog.text


def test_operations_of_a_step() -> None:
    """Stage 1 against the sizes of its layers; twice the batch counts twice, recomputation does not count."""
    config = load_config(MODELS / "phantom_stage1.yaml", [])
    width, count, batch, clip = config.msc.width, config.biomedclip.grid**2 + 2, 3, config.biomedclip
    layer = 12 * width**2 * count + 2 * count**2 * width  # matrices; scores and their sums
    inputs = (clip.token_dim * width + width**2) * (count - 1) + clip.text_dim * width + width**2
    outputs = clip.token_dim * width * (count - 1)
    forward = 2 * batch * (config.msc.layers * layer + inputs + outputs)
    first = (
        2 * batch * (clip.token_dim * width * (count - 1) + clip.text_dim * width)
    )  # need no gradient of their input
    assert step_operations(config.architecture, config.training, batch) == 3 * forward - first
    plain = load_config(MODELS / "phantom_unet_only.yaml", [])
    again = load_config(MODELS / "phantom_unet_only.yaml", ["training.activation_checkpointing=true"])
    once = step_operations(plain.architecture, plain.training, 1)
    assert 2 * once == step_operations(again.architecture, again.training, 2)


def test_bench_of_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    given = ("--config", MODELS / "phantom_unet_only.yaml", "--batch_size", 1)
    assert call(bench, "memory", *given, "--output", tmp_path / "m.json") == 0
    found = json.loads((tmp_path / "m.json").read_text())
    kept = {(row["precision"], row["checkpointing"]): row["activations"] for row in found["computed"]}
    assert len(kept) == 4
    for precision in ("32-true", "bf16-mixed"):
        assert kept[precision, True] < kept[precision, False] / 2
        assert kept["bf16-mixed", False] < kept["32-true", False]
    (step,) = found["measured"]
    assert step["peak"] > step["computed"] > 0  # torch itself is in it
    assert "| unet_only | 32-true | no | " in caplog.text
