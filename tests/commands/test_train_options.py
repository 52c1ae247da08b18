"""Options of a stage: validation that sees lesions, the MSC's own loss, frozen groups."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny import CLIP, MODELS, SD, TRAIN, VAL, changed, convert, infer, merge, metas, on_cpu, tensors, train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.images import to_unit
from ldm.data.preparation import prepare, whole_pictures
from ldm.features.build import MASK_SEED, FeatureBuilder
from ldm.features.known import KnownFiles
from ldm.features.names import training_items
from ldm.inference.inpainter import Inpainter, Job
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_model
from ldm.networks.sampling import latent_of
from ldm.training.dataset import Batch
from ldm.training.estimates import stage_disk, stage_memory
from ldm.training.loop import Training
from ldm.training.objectives import semantic_tokens_of


def last_row(folder: Path) -> dict[str, str]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))[-1]


def validation_set(world: Path, path: Path, healthy: bool) -> Path:
    """Annotations of the healthy or the diseased validation samples alone."""
    write_annotations(path, [each for each in load_samples(world / VAL)[0] if each.healthy == healthy])
    return path


def test_validation_of_lesions_is_that_of_the_diseased_samples_alone(
    trained: dict, world: Path, converted: Path, tmp_path: Path
) -> None:
    """Same training, a validation set of diseased samples: its loss is the other set's loss of lesions."""
    diseased = validation_set(world, tmp_path / "val.json", healthy=False)
    given = ("--val_json", diseased, "training.best_by=val_lesion_loss")
    assert train("stage1", converted, tmp_path / "s", world, *given) == 0
    alone, mixed = last_row(tmp_path / "s"), last_row(trained["stage1"].folder)
    assert alone["train_loss"] == mixed["train_loss"]
    for name in ("loss", "cosine"):
        assert float(alone[f"val_{name}"]) == pytest.approx(float(mixed[f"val_lesion_{name}"]), rel=1e-4)
        assert float(mixed[f"val_{name}"]) != pytest.approx(float(mixed[f"val_lesion_{name}"]), rel=1e-3)


def test_the_best_epoch_may_be_that_of_the_lesions(trained: dict, world: Path, tmp_path: Path) -> None:
    merged = trained["stage2_1"].source
    assert train("stage2_1", merged, tmp_path / "s", world, "training.best_by=val_lesion_loss") == 0
    row = last_row(tmp_path / "s")
    (best,) = (tmp_path / "s").glob("best_*.ckpt")
    assert best.name == f"best_epoch0000_loss{row['val_lesion_loss']}.ckpt"
    assert row["val_loss"] == last_row(trained["stage2_1"].folder)["val_loss"] != row["val_lesion_loss"]


def test_no_lesion_to_choose_the_best_epoch_by(world: Path, converted: Path, tmp_path: Path) -> None:
    given = ("--val_json", validation_set(world, tmp_path / "val.json", healthy=True))
    with pytest.raises(MedSoftError, match=r"val\.json: training\.best_by=val_lesion_loss needs diseased samples"):
        train("stage1", converted, tmp_path / "s", world, *given, "training.best_by=val_lesion_loss")
    assert not (tmp_path / "s").exists()


def test_the_mscs_own_loss_trains_its_global_head_too(trained: dict, world: Path, tmp_path: Path) -> None:
    """What is validated stays the published loss."""
    merged = trained["stage2_1"].source
    assert train("stage2_1", merged, tmp_path / "s", world, "training.msc_weight=0.1") == 0
    moved = changed(tensors(merged), tensors(tmp_path / "s" / "last.ckpt"))
    assert moved == {key for key in tensors(merged) if key.startswith("msc.")}
    with_own, without = last_row(tmp_path / "s"), last_row(trained["stage2_1"].folder)
    assert float(with_own["train_loss"]) > float(without["train_loss"]) + 0.01
    assert float(with_own["val_loss"]) == pytest.approx(float(without["val_loss"]), abs=0.01)
    assert with_own["val_lesion_cosine"] != without["val_lesion_cosine"]


def test_a_frozen_msc_stays_and_costs_no_gradients(trained: dict, world: Path, tmp_path: Path) -> None:
    source = trained["stage2_2"].source
    assert train("stage2_2", source, tmp_path / "s", world, "training.rates.msc=0") == 0
    moved = changed(tensors(source), tensors(tmp_path / "s" / "last.ckpt"))
    assert moved == {key for key in tensors(source) if key.startswith("model.diffusion_model.")}
    assert last_row(tmp_path / "s")["val_lesion_cosine"] == last_row(trained["stage2_1"].folder)["val_lesion_cosine"]
    trains, frozen = (
        stage_memory(config.architecture, config.training, 2, half=False)
        for config in (load_config(MODELS / "phantom_stage2_2.yaml", more) for more in ([], ["training.rates.msc=0"]))
    )
    assert frozen.activations < trains.activations
    assert frozen.optimizer < trains.optimizer


@on_cpu
@pytest.mark.usefixtures("one_thread")
def test_a_run_with_an_aligned_middle_block_goes_on_bit_for_bit(
    small: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projection lies in last.ckpt while the run goes on, beside the model; the finished checkpoint has none."""
    given = {"max_epochs": 2, "ema_decay": 0.9, "save_every_minutes": 0, "alignment_weight": 0.5}
    assert train("stage2_2", small.last, tmp_path / "whole", world, *small.sizes, **given) == 0
    plain, folder = Training.forward_backward, tmp_path / "s"

    def interrupted(self: Training, batch: Batch) -> None:
        if self.progress.step == 4:
            raise KeyboardInterrupt
        plain(self, batch)

    monkeypatch.setattr(Training, "forward_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("stage2_2", small.last, folder, world, *small.sizes, **given)
    monkeypatch.setattr(Training, "forward_backward", plain)
    stopped = read_checkpoint(folder / "last.ckpt")
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert stopped.rest["alignment"].keys() == {f"alignment.layers.{name}" for name in names}
    assert stopped.state.keys() == tensors(small.last).keys()
    assert train("stage2_2", small.last, folder, world, *small.sizes, **given) == 0
    finished, whole = (read_checkpoint(path / "last.ckpt") for path in (folder, tmp_path / "whole"))
    assert (finished.metadata["step"], finished.rest) == (6, {})
    assert finished.state.keys() == tensors(small.last).keys()
    assert not changed(whole.state, finished.state)
    losses = [float(row["train_loss"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    assert losses[1] < losses[0]


def test_what_an_aligned_middle_block_takes() -> None:
    without, with_it = (
        load_config(MODELS / "phantom_stage2_2.yaml", [f"training.alignment_weight={weight}"]) for weight in (0, 0.5)
    )
    values = 128 * 64 + 64 + 64 * 64 + 64
    disks = [stage_disk(config.architecture, config.training) for config in (without, with_it)]
    assert (disks[1][0] - disks[0][0], disks[1][1] - disks[0][1]) == (16 * values, 0)  # weights, moments, average
    one, two = (stage_memory(config.architecture, config.training, 2, half=False) for config in (without, with_it))
    assert (two.parameters - one.parameters, two.optimizer - one.optimizer) == (4 * values, 8 * values)
    assert 0 < two.activations - one.activations < 2**20


@pytest.fixture(scope="module")
def of_whole_images(world: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 with the global token of whole images."""
    folder = tmp_path_factory.mktemp("image") / "stage1"
    assert train("stage1", converted, folder, world, "biomedclip.view=image") == 0
    return folder


def test_the_global_token_may_be_of_the_whole_image(trained: dict, of_whole_images: Path, world: Path) -> None:
    """The cache then holds both; patch tokens are the same, and what a prediction is compared with has changed too."""
    config = load_config(MODELS / "phantom_stage1.yaml", ["biomedclip.view=image"])
    samples = load_samples(world / VAL)[0]
    items, _ = training_items(samples, config.data)
    digests, clip = KnownFiles().read(samples), BiomedClip(CLIP)
    found = {}
    for view in ("crop", "image"):
        config.biomedclip.view = view
        builder = FeatureBuilder(world / "features", config.data, MedSoftModel(config.architecture, []), clip, digests)
        item = next(item for item in items if not item.sample.healthy)
        assert not builder.build([item])
        found[view] = builder.store.load(item)
    for name in ("context_tokens", "target_tokens", "mask"):
        assert torch.equal(found["crop"][name], found["image"][name])
    prepared = prepare(item.sample, config.data, MASK_SEED, item.variant, training=True)
    height, width = prepared.original.shape[:2]
    side = max(height, width)
    unit = to_unit(prepared.original, prepared.intensity_range)
    padding = [(each // 2, each - each // 2) for each in (side - height, side - width)]
    square = np.pad(unit, padding, mode="edge")
    small = torch.from_numpy(cv2.resize(square, (64, 64), interpolation=cv2.INTER_AREA))
    whole_token = clip.encode_image((2 * small - 1).expand(1, 3, -1, -1))[1][0]
    torch.testing.assert_close(found["image"]["target_global"], whole_token, atol=0.05, rtol=0.01)
    assert not torch.allclose(found["crop"]["target_global"], whole_token, atol=0.1)
    seen, hidden = (found["image"][f"{name}_global"] for name in ("target", "context"))
    assert not torch.allclose(seen, hidden, atol=0.1)
    assert last_row(of_whole_images)["val_loss"] != last_row(trained["stage1"].folder)["val_loss"]


def test_another_view_than_that_of_training_is_refused(
    of_whole_images: Path, trained: dict, world: Path, tmp_path: Path
) -> None:
    stage1, rest = of_whole_images / "last.ckpt", trained["unet_only"].last
    with pytest.raises(UsageError, match=r"last\.ckpt: was trained with biomedclip\.view=image, this .* has crop"):
        merge(stage1, rest, tmp_path / "merged.ckpt")
    with pytest.raises(UsageError, match=r"last\.ckpt: was trained with biomedclip\.view=crop, this .* has image"):
        infer(trained["stage2_2"].last, tmp_path / "r", "--train_json", world / TRAIN, "biomedclip.view=image")


def test_training_and_drawing_see_the_same_whole_image(converted: Path, of_whole_images: Path, world: Path) -> None:
    config = load_config(MODELS / "phantom.yaml", ["biomedclip.view=image", f"biomedclip.path={CLIP}"])
    net, clip = open_model(config, read_checkpoint(converted))
    items, _ = training_items([each for each in load_samples(world / VAL)[0] if not each.healthy], config.data)
    digests = KnownFiles().read(item.sample for item in items)
    builder = FeatureBuilder(world / "features", config.data, net, clip, digests)
    assert not builder.build(items[:1])
    batch = {name: value[None] for name, value in builder.store.load(items[0]).items()}
    prepared = prepare(items[0].sample, config.data, MASK_SEED, items[0].variant, training=True)
    inpainter = Inpainter(net, clip, config.sampling)
    given = (prepared.image[None], prepared.mask[None], [items[0].sample.prompt])
    with torch.inference_mode():
        drawn = inpainter.condition(*given, whole_pictures([prepared], inpainter.device))[1]
        torch.testing.assert_close(drawn, semantic_tokens_of(net, batch, "msc"), atol=5e-3, rtol=0)  # float16 there


def test_a_third_attention_that_reads_a_learned_table(world: Path, tmp_path: Path) -> None:
    """Converted, trained without an MSC, drawn with; another kind of third attention does not take its weights."""
    table, base = "unet.third_attention=table", tmp_path / "base.ckpt"
    assert convert(SD, base, table) == 0
    assert train("attn3_table", base, tmp_path / "s", world, family="../configs/study/phantom") == 0
    before, after = tensors(base), tensors(tmp_path / "s" / "last.ckpt")
    key = "model.diffusion_model.attn3_table"
    assert before[key].shape == (25, 64)
    assert changed(before, after) == {name for name in after if name.startswith("model.diffusion_model.")}
    assert not any(name.startswith("msc.") for name in after)
    drawn = ("--train_json", world / TRAIN, "--limit", 1)
    assert infer(tmp_path / "s" / "last.ckpt", tmp_path / "r", *drawn, table) == 0
    assert len(metas(tmp_path / "r")) == 1
    with pytest.raises(MedSoftError, match=r"does not fit this configuration: .*left over \(.*attn3_table"):
        infer(tmp_path / "s" / "last.ckpt", tmp_path / "other", *drawn)


def test_a_unet_with_a_thumbnail_of_the_whole_image(world: Path, tmp_path: Path) -> None:
    """Converted with a new convolution, trained, drawn with; it sees what the crop does not show."""
    thumbnail, base, last = "unet.thumbnail=true", tmp_path / "base.ckpt", tmp_path / "s" / "last.ckpt"
    assert convert(SD, base, thumbnail) == 0
    assert train("no_msc", base, last.parent, world, thumbnail, family="../configs/study/phantom", pictures=1) == 0
    before, after = tensors(base), tensors(last)
    new = [key for key in after if ".thumbnail." in key]
    assert {before[key].shape for key in new} == {(64, 4, 3, 3), (64,)}
    assert all(before[key].abs().mean() > 0.01 for key in new)  # heard from the first step on
    assert set(new) <= changed(before, after)
    drawn = ("--train_json", world / TRAIN, "--limit", 1)
    assert infer(last, tmp_path / "r", *drawn, thumbnail) == 0
    assert len(metas(tmp_path / "r")) == 1
    with pytest.raises(MedSoftError, match=r"does not fit this configuration: .*left over \(.*thumbnail"):
        infer(last, tmp_path / "other", *drawn)

    config = load_config(MODELS / "phantom.yaml", [thumbnail, f"biomedclip.path={CLIP}"])
    net, clip = open_model(config, read_checkpoint(last))
    items, _ = training_items([each for each in load_samples(world / VAL)[0] if not each.healthy], config.data)
    digests = KnownFiles().read(item.sample for item in items)
    builder = FeatureBuilder(world / "features", config.data, net, clip, digests)
    assert not builder.build(items[:1])
    prepared = prepare(items[0].sample, config.data, MASK_SEED, items[0].variant, training=True)
    stored = builder.store.load(items[0])["masked_latent"]
    assert stored.shape == (8, 16, 16)
    inpainter, jobs = Inpainter(net, clip, config.sampling), [Job(0, "p", 0, items[0].sample.prompt)]
    whole = whole_pictures([prepared], inpainter.device)
    encode = partial(latent_of, net, dtype=torch.float32)
    with torch.inference_mode():
        seen = net.surroundings(encode, prepared.image[None], prepared.mask[None], whole)[0]
    torch.testing.assert_close(stored.float(), seen, atol=5e-3, rtol=0)  # float16 there
    around = replace(prepared, original=prepared.original[::-1].copy())  # the crop is as it was
    one, two = (inpainter.inpaint([each], jobs)[0].generated for each in (prepared, around))
    assert one is not None
    assert two is not None
    assert not np.array_equal(one[prepared.soft > 0], two[prepared.soft > 0])


def test_previews_begin_with_noise_and_say_so(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("sampling.init=image", "--dry_run")
    assert train("unet_only", converted, tmp_path / "s", world, *given, pictures=1) == 0
    assert "warning: sampling.init=image is not for previews; they begin with noise" in caplog.text
    caplog.clear()
    assert train("unet_only", converted, tmp_path / "s", world, *given) == 0
    assert "previews" not in caplog.text
