"""What the stages learn from: BiomedCLIP's folder, the cached features, the order of an epoch."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLIP, MODELS, train

from ldm.annotations import load_samples
from ldm.config import load_config
from ldm.dataset import EpochOrder, StageData, prepare, training_items
from ldm.encoders import BiomedClip
from ldm.errors import MedSoftError
from ldm.feature_cache import FeatureCache
from ldm.images import read_image, write_png
from ldm.model import MedSoftModel, hidden_region, hide

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
    assert len(items) == 4 + 8  # masks of the healthy samples, crops of the diseased ones
    assert not cache.build(items)
    config, model, clip = networks
    for item in (items[0], items[-1]):
        picture = prepare(item.sample, config.data, 0, item.variant, training=True)
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
    item, *_ = items_of(tmp_path / "data", networks)
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


def test_training_crops_of_a_lesion_are_shifted_and_hold_it(world: Path, networks: tuple) -> None:
    data = replace(networks[0].data, diseased_crops=6, image_size=32)
    for sample in load_samples(world / "train")[0]:
        if sample.healthy:
            continue
        drawn = prepare(sample, data, 0, 3).window
        crops = [prepare(sample, data, 0, variant, training=True) for variant in range(6)]
        assert crops[0].window == drawn  # the first is what drawing sees, and no variant of a drawing is shifted
        assert len({(crop.window.top, crop.window.left) for crop in crops}) > 1
        assert {(crop.window.height, crop.window.width) for crop in crops} == {(drawn.height, drawn.width)}
        for crop in crops:
            inside = np.zeros(crop.soft.shape, bool)
            window = crop.window
            inside[window.top : window.top + window.height, window.left : window.left + window.width] = True
            assert not (crop.soft > 0)[~inside].any()


def test_two_folders_may_have_samples_of_the_same_name(
    tmp_path: Path, cache: FeatureCache, networks: tuple, write_sample
) -> None:
    rng = np.random.default_rng(0)
    for side in ("train", "val"):
        write_sample(tmp_path / side / "a", image=rng.integers(0, 256, (20, 24), dtype=np.uint8))
    items = [items_of(tmp_path / side, networks)[0] for side in ("train", "val")]
    assert items[0].name == items[1].name
    assert not cache.build(items)
    assert not torch.equal(cache.load(items[0])["true"], cache.load(items[1])["true"])
