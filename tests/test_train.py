"""ver_train.py through its command line, with the shipped YAMLs on phantoms."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLIP, MODELS, ROOT, STAGES, call, changed, edit, tensors, train, ver_train

from ldm.annotations import load_samples, write_annotations
from ldm.config import load_config
from ldm.dataset import EpochOrder, StageData, prepare, training_items
from ldm.encoders import BiomedClip
from ldm.errors import MedSoftError, UsageError
from ldm.feature_cache import FeatureCache
from ldm.images import read_image, write_png
from ldm.model import MedSoftModel, hidden_region, hide
from ldm.training import Stage


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Lightning leaves SIGINT ignored after an interruption."""
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
    assert bool(rows[0]["val_cosine"]) == (stage == "stage1")
    assert float(rows[0]["train_loss"]) > 0
    assert float(rows[0]["val_loss"]) > 0
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "last.ckpt", "metrics.csv"]


def test_same_command_again_is_complete(
    trained: dict, world: Path, converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = trained["stage1"].last.read_bytes()
    assert train("stage1", converted, trained["stage1"].folder, world) == 0
    assert "already complete (3 steps)" in caplog.text
    assert trained["stage1"].last.read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(trained: dict, world: Path, converted: Path) -> None:
    with pytest.raises(UsageError, match=r"last\.ckpt: belongs to a run with other .*--overwrite"):
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

    def on_train_start(self: Stage) -> None:
        seen["step"] = self.global_step
        seen["weights"] = {key: value.clone() for key, value in self.state_dict().items()}

    monkeypatch.setattr(Stage, "on_train_start", on_train_start)
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
        model = MedSoftModel(config, config.training.builds)
    built = {"stage1": {"msc"}, "unet_only": {"unet", "autoencoder", "text"}}
    assert set(model.parts) == built.get(stage, {"unet", "autoencoder", "text", "msc"})
    groups = model.groups(list(config.training.rates))
    sizes = {name: sum(value.numel() for value in members.values()) for name, members in groups.items()}
    expected = {"msc": (160e6, 180e6), "attn3": (43_987_520, 43_987_520), "unet": (859_535_364, 859_535_364)}
    wanted = {"stage1": {"msc"}, "unet_only": {"attn3"}, "stage2_1": {"msc"}}.get(stage, {"msc", "attn3", "unet"})
    assert set(sizes) == wanted
    for name, size in sizes.items():
        low, high = expected[name]
        assert low <= size <= high, f"{name}: {size}"


def test_dry_run_writes_nothing(world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert train("unet_only", converted, tmp_path / "s", world, "--dry_run") == 0
    assert "trains attn3" in caplog.text
    assert "4 diseased and 5 healthy samples of 9 patients" in caplog.text
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def unbroken(world: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two epochs of unet_only in one go, with one and with two batches a step."""
    folder = tmp_path_factory.mktemp("unbroken")
    for accumulate in (1, 2):
        given = {"accumulate": accumulate, "max_epochs": 2, "rates.attn3": 0.01, "schedule": "cosine"}
        assert train("unet_only", converted, folder / str(accumulate), world, **given) == 0
    return {accumulate: folder / str(accumulate) for accumulate in (1, 2)}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, how: Any) -> None:
    """In the training step that follows ``after`` others, call ``how``."""
    plain, count = Stage.training_step, 0

    def training_step(self: Stage, batch: dict, batch_idx: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == after + 1:
            how()
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Stage, "training_step", training_step)


def crash() -> None:
    raise MemoryError("pulled the plug")


def press_control_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("how", "after", "accumulate", "code", "step"),
    [
        (crash, 4, 1, None, 4),  # one batch into the second epoch
        (crash, 3, 1, None, 3),  # between two epochs
        (press_control_c, 1, 1, 130, 1),
        (terminate, 1, 1, 143, 2),  # the running batch is finished and kept
        (crash, 5, 2, None, 3),  # batch 2 of the second epoch is done: a whole step
        (crash, 4, 2, None, 2),  # inside a step: back to the epoch's start
    ],
)
def test_interrupted_and_resumed_equals_unbroken(
    world: Path,
    converted: Path,
    unbroken: dict,
    tmp_path: Path,
    how: Any,
    after: int,
    accumulate: int,
    code: int,
    step: int,
) -> None:
    given = {"accumulate": accumulate, "max_epochs": 2, "rates.attn3": 0.01, "schedule": "cosine"}
    given["save_every_minutes"] = 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after, how)
        if code is None:
            with pytest.raises(MemoryError):
                train("unet_only", converted, tmp_path / "s", world, **given)
        else:
            assert train("unet_only", converted, tmp_path / "s", world, **given) == code
    assert about(tmp_path / "s" / "last.ckpt")["step"] == step
    assert train("unet_only", converted, tmp_path / "s", world, **given) == 0
    last = tmp_path / "s" / "last.ckpt"
    whole = unbroken[accumulate]
    assert about(last)["step"] == about(whole / "last.ckpt")["step"] == {1: 6, 2: 4}[accumulate]
    assert not changed(tensors(whole / "last.ckpt"), tensors(last))
    assert [row["epoch"] for row in metrics(tmp_path / "s")] == ["0", "1"]
    assert [row["val_loss"] for row in metrics(tmp_path / "s")] == [row["val_loss"] for row in metrics(whole)]


def test_stopped_before_it_could_say_complete(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "on_train_end", lambda self: crash())
        with pytest.raises(MemoryError):
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
        monkeypatch.setattr("ldm.training.msc_loss", lambda tokens, *rest: tokens.mean((1, 2)) * float("nan"))

    interrupt(monkeypatch, 3, spoil)
    with pytest.raises(MedSoftError, match=r"the loss became nan at step 3 \(samples w5p\d+"):
        train("stage1", converted, tmp_path / "s", world, max_epochs=2)
    assert about(tmp_path / "s" / "last.ckpt")["step"] == 3
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path / "s" / "last.ckpt").values())


def test_damaged_last_checkpoint_is_named(trained: dict, world: Path, converted: Path, tmp_path: Path) -> None:
    whole = trained["stage1"].last.read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MedSoftError, match=r"last\.ckpt: damaged or cut short"):
        train("stage1", converted, tmp_path, world)


# ------------------------------------------------------------------------------------------------------ bad input


def test_annotation_of_vanished_files(world: Path, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "train", tmp_path / "data")
    write_annotations(tmp_path / "train.json", load_samples(tmp_path / "data")[0])
    gone = tmp_path / "data" / "w5p000001_L3" / "image.png"
    gone = gone if gone.exists() else next((tmp_path / "data").glob("*1_*/image.png"))
    gone.unlink()
    given = ("--train_json", tmp_path / "train.json")
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
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=8) == 3
    rejects = json.loads((tmp_path / "s" / "rejects.json").read_text())
    assert {reject["sample_id"] for reject in rejects} == {bad.parent.name}
    assert metrics(tmp_path / "s")[0]["step"] == "1"


def test_patient_on_both_sides(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"patient w5p\d+ is also in .*train; split by patient"):
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


def test_checkpoint_for_another_configuration(converted: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"another size.*made with another model configuration; use the YAML it was"):
        train("stage1", converted, tmp_path / "s", world, "msc.width=64")


def test_checkpoint_with_a_value_that_is_not_a_number(converted: Path, world: Path, tmp_path: Path) -> None:
    spoilt = edit(
        converted, tmp_path / "nan.ckpt", keep=lambda key, v: v * float("nan") if key == "msc.position" else v
    )
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensors hold NaN .* msc\.position"):
        train("stage1", spoilt, tmp_path / "s", world)


def test_yaml_without_a_stage(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"phantom\.yaml: names no stage"):
        call(ver_train, "--ckpt", converted, "--config", MODELS / "phantom.yaml", "--save_path", tmp_path / "s")


# --------------------------------------------------------------------------------------------------- BiomedCLIP


def clip_copy(target: Path, *without: str) -> Path:
    shutil.copytree(CLIP, target, ignore=lambda _, names: set(without) & set(names))
    return target


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (("open_clip_config.json",), r"open_clip_config\.json: this BiomedCLIP configuration does not exist"),
        (("open_clip_pytorch_model.bin",), r"clip: no weights; expected one of"),
        (("tokenizer.json", "vocab.txt"), r"clip: no tokenizer; expected tokenizer\.json or vocab\.txt"),
    ],
)
def test_incomplete_biomedclip_folder(tmp_path: Path, without: tuple[str, ...], message: str) -> None:
    with pytest.raises(MedSoftError, match=message):
        BiomedClip(clip_copy(tmp_path / "clip", *without))


def test_missing_biomedclip_folder(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"nowhere: BiomedCLIP folder not found; download .*--biomedclip"):
        train("stage1", converted, tmp_path / "s", world, "biomedclip.path=nowhere")


def test_biomedclip_as_downloaded_has_no_bert_configuration(tmp_path: Path) -> None:
    bare = BiomedClip(clip_copy(tmp_path / "clip", "config.json"))
    full = BiomedClip(CLIP)
    text = ["osteolytic lesion of L3"]
    assert torch.equal(bare.encode_text(text), full.encode_text(text))


def test_shipped_biomedclip_is_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert BiomedClip(load_config(MODELS / "phantom.yaml").biomedclip.path).fingerprint


def test_stage_2_refuses_another_biomedclip(trained: dict, world: Path, tmp_path: Path) -> None:
    other = clip_copy(tmp_path / "clip")
    weights = other / "open_clip_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    torch.save({key: value.clone() for key, value in state.items()}, weights)  # same values, another file
    state["visual.trunk.cls_token"] += 1
    torch.save(state, weights)
    with pytest.raises(MedSoftError, match=r"clip: is not the BiomedCLIP that .*last\.ckpt was trained with"):
        train("stage2_2", trained["stage2_1"].last, tmp_path / "s", world, f"biomedclip.path={other}")


# ------------------------------------------------------------------------------------------------ cached features


@pytest.fixture(scope="module")
def networks(converted: Path) -> tuple[Any, MedSoftModel, BiomedClip]:
    from ldm.checkpoint import load_parts, read_checkpoint

    config = load_config(MODELS / "phantom.yaml")
    model = MedSoftModel(config, ["autoencoder"]).eval()
    load_parts(model, read_checkpoint(converted), ["autoencoder"], config)
    return config, model, BiomedClip(CLIP)


@pytest.fixture
def cache(tmp_path: Path, networks: tuple) -> FeatureCache:
    return FeatureCache(tmp_path / "features", *networks)


def fresh(cache: FeatureCache) -> FeatureCache:
    return FeatureCache(cache.folder, cache.config, cache.model, cache.clip)


def items_of(folder: Path, networks: tuple) -> list:
    return training_items(load_samples(folder)[0], networks[0].data)[0]


def test_features_equal_direct_computation(world: Path, cache: FeatureCache, networks: tuple) -> None:
    items = items_of(world / "val", networks)
    assert len(items) == 4 + 2
    assert not cache.build(items)
    config, model, clip = networks
    for item in (items[0], items[-1]):
        picture = prepare(item.sample, config.data, 0, item.variant)
        image, mask = picture.image[None], picture.mask[None]
        found = cache.load(item)
        with torch.no_grad():
            posterior = model.encode(image)
            masked = model.encode(hide(image, mask)).mode * 0.18215
        seen, _ = clip.encode_image(image, hidden_region(mask))
        true, true_global = clip.encode_image(image)
        assert torch.equal(found["mask"], picture.mask)
        expected = {"latent_mean": posterior.mean, "masked_latent": masked, "seen": seen, "true": true}
        for name, value in {**expected, "latent_logvar": posterior.logvar, "true_global": true_global}.items():
            assert torch.allclose(found[name], value[0], atol=2e-5), name
    assert (found["seen"] != found["true"]).any()


def test_second_run_computes_nothing(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = items_of(world / "val", networks)
    cache.build(items)
    monkeypatch.setattr(FeatureCache, "_compute", lambda self, items: pytest.fail("computed again"))
    assert fresh(cache).build(items) == []


@pytest.mark.parametrize("name", ["image.png", "mask.png"])
def test_changed_file_is_computed_again(
    world: Path, cache: FeatureCache, networks: tuple, tmp_path: Path, name: str
) -> None:
    folder = next(path.parent for path in (world / "val").glob("*/mask.png"))
    shutil.copytree(folder, tmp_path / "data" / folder.name)
    (item,) = items_of(tmp_path / "data", networks)
    cache.build([item])
    before = cache.load(item)
    file = tmp_path / "data" / folder.name / name
    write_png(file, read_image(file)[:, ::-1])
    again = fresh(cache)
    again.build([item])
    assert not torch.equal(before["seen"], again.load(item)["seen"])


def test_damaged_features_are_named(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    file = next(cache.folder.rglob("*.clip.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MedSoftError, match=rf"{file.name}: damaged features of .*; delete this file and run again"):
        cache.load(item)


# ---------------------------------------------------------------------------------------------- order and randomness


class Features:
    """Stands for a FeatureCache: latents whose value is the item's variant."""

    def load(self, item: Any) -> dict[str, torch.Tensor]:
        return {"latent_mean": torch.full((4, 2, 2), float(item.variant))}


@pytest.fixture
def stage_data(world: Path, networks: tuple) -> Any:
    items = items_of(world / "train", networks)
    prompts = {item.sample.prompt: {} for item in items}

    def make(fixed: bool = False) -> StageData:
        return StageData(items, Features(), prompts, networks[0].training, fixed)

    return make


def uses(data: StageData, world: int, rank: int, epoch: int = 0, **settings: Any) -> list:
    from dataclasses import replace

    order = EpochOrder(data, replace(data.training, **settings), True, rank, world)
    order.set_epoch(epoch)
    return list(order)


def test_two_processes_see_the_same_global_batches(stage_data: Any) -> None:
    data = stage_data()
    alone = uses(data, 1, 0, balance=True)
    halves = [uses(data, 2, rank, balance=True) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1])
    for first in range(0, len(alone), 4):
        joined = [use for half in halves for use in half[first // 2 : first // 2 + 2]]
        assert sorted(joined) == sorted(alone[first : first + 4])


def test_balance_gives_equal_counts_and_loses_nobody(stage_data: Any) -> None:
    data = stage_data()
    order = uses(data, 1, 0, balance=True)
    sick = sum(data.diseased(number) for _, number, _ in order)
    assert (sick, len(order)) == (5, 10)
    assert {number for _, number, _ in order} == set(range(9))
    assert len(set(order)) == 10  # a repeated sample is another use, with its own noise


def test_epochs_differ_and_every_sample_comes_once(stage_data: Any) -> None:
    data = stage_data()
    orders = [[number for _, number, _ in uses(data, 1, 0, epoch, balance=False)] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(9))] * 2
    assert orders[0] != orders[1]


def test_validation_numbers_are_fixed_and_training_numbers_are_not(stage_data: Any) -> None:
    training, validation = stage_data(), stage_data(fixed=True)
    for name in ("noise", "posterior_noise", "t", "coin"):
        assert torch.equal(validation[0, 2, 0][name], validation[7, 2, 0][name])
        assert not torch.equal(training[0, 2, 0][name], training[7, 2, 0][name])
        assert not torch.equal(training[0, 2, 0][name], training[0, 2, 1][name])
        assert torch.equal(training[3, 2, 0][name], stage_data()[3, 2, 0][name])


def test_healthy_samples_use_all_their_masks(stage_data: Any) -> None:
    data = stage_data()
    healthy = next(number for number in range(9) if not data.diseased(number))
    assert {float(data[epoch, healthy, 0]["latent_mean"][0, 0, 0]) for epoch in range(40)} == {0, 1, 2, 3}


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


def test_one_line_and_exit_code(tmp_path: Path) -> None:
    given = ["--ckpt", "none.ckpt", "--config", MODELS / "phantom_stage1.yaml", "--save_path", "s", "training.sede=1"]
    found = subprocess.run(
        [sys.executable, ROOT / "ver_train.py", *given], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "training.sede; did you mean training.seed?" in line
