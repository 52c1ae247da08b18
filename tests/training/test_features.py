"""What the stages learn from: BiomedCLIP's folder, the cached features, the order of an epoch."""

import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLIP, MODELS, train

import ldm.core.files
from ldm.config import Config, load_config
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.preparation import digests_of, prepare
from ldm.features.build import FeatureBuilder
from ldm.features.names import Item, training_items
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel, hidden_region, hide
from ldm.training.dataset import EpochOrder, StageData, read_training_inputs

# --------------------------------------------------------------------------------------------------- BiomedCLIP


def clip_copy(target: Path, *without: str) -> Path:
    shutil.copytree(CLIP, target, ignore=lambda _, names: set(without) & set(names))
    return target


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
    from ldm.checkpoints.checkpoint import read_checkpoint
    from ldm.checkpoints.fitting import load_parts

    config = load_config(MODELS / "phantom.yaml")
    model = MedSoftModel(config.architecture, ["autoencoder"]).eval()
    load_parts(model, read_checkpoint(converted), ["autoencoder"], config.architecture)
    return config, model, BiomedClip(CLIP)


@dataclass
class FeatureCache:
    """A builder and its store, each time for the files as they are at that moment."""

    folder: Path
    config: Config
    model: MedSoftModel
    clip: Any

    def builder(self, *items: Item) -> FeatureBuilder:
        return FeatureBuilder(
            self.folder, self.config.data, self.model, self.clip, digests_of(item.sample for item in items)
        )

    def build(self, items: list[Item]) -> list:
        return self.builder(*items).build(items)

    def load(self, item: Item) -> dict[str, torch.Tensor]:
        return self.builder(item).store.load(item)


@pytest.fixture
def cache(tmp_path: Path, networks: tuple) -> FeatureCache:
    return FeatureCache(tmp_path / "features", *networks)


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
            masked = model.encode(hide(image, mask)).mean * 0.18215
        seen, _ = clip.encode_image(image, hidden_region(mask))
        true, true_global = clip.encode_image(image)
        assert torch.equal(found["mask"], picture.mask)
        expected = {
            "latent_mean": posterior.mean,
            "masked_latent": masked,
            "context_tokens": seen,
            "target_tokens": true,
        }
        for name, value in {**expected, "latent_logvar": posterior.logvar, "target_global": true_global}.items():
            assert torch.allclose(found[name], value[0], atol=2e-5), name
    assert (found["context_tokens"] != found["target_tokens"]).any()


def test_second_run_computes_nothing(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = items_of(world / "val", networks)
    cache.build(items)
    monkeypatch.setattr(FeatureBuilder, "compute", lambda self, items: pytest.fail("computed again"))
    monkeypatch.setattr(FeatureBuilder, "compute_prompts", lambda self, prompts: pytest.fail("computed again"))
    assert cache.build(items) == []


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
    again = cache
    again.build([item])
    assert not torch.equal(before["context_tokens"], again.load(item)["context_tokens"])


def test_sample_that_turns_healthy_is_computed_again(cache: FeatureCache, world: Path, networks: tuple) -> None:
    """Its files stay, but a healthy one has lesion-shaped masks, a diseased one shifted crops: none may be mixed up."""
    diseased = [item for item in items_of(world / "val", networks) if not item.sample.healthy][:4]
    healthy = [replace(item, sample=replace(item.sample, prompt="healthy")) for item in diseased]
    assert len({item.name for item in diseased}) == 4
    later = cache
    cache.build(diseased)
    later.build(healthy)
    for before, after in zip(diseased, healthy, strict=True):
        assert not torch.equal(cache.load(before)["mask"], later.load(after)["mask"])
    other = [replace(item, sample=replace(item.sample, prompt="another lesion")) for item in diseased]
    before = set(cache.folder.rglob("*.clip.safetensors"))
    cache.build(other)
    assert set(cache.folder.rglob("*.clip.safetensors")) == before


def test_cached_sentences_equal_direct_computation(world: Path, tmp_path: Path, networks: tuple, trained: dict) -> None:
    from ldm.checkpoints.checkpoint import read_checkpoint
    from ldm.checkpoints.fitting import load_parts

    config, _, clip = networks
    model = MedSoftModel(config.architecture, ["text"]).eval()
    load_parts(model, read_checkpoint(trained["stage2_1"].last), ["text"], config.architecture)
    cache = FeatureCache(tmp_path / "features", config, model, clip)
    items = items_of(world / "val", networks)
    cache.build(items)
    with torch.no_grad():
        for item in items:
            found, prompts = cache.load(item), [item.sample.prompt]
            assert torch.allclose(found["text"], model.cond_stage_model(prompts)[0], atol=1e-5)
            assert torch.allclose(found["prompt_embedding"], clip.encode_text(prompts)[0], atol=1e-5)
        assert torch.allclose(cache.builder(*items).store.empty_text(), model.cond_stage_model([""]), atol=1e-5)
        before = set(cache.folder.rglob("*.safetensors"))
        next(model.cond_stage_model.parameters()).add_(1)
    FeatureCache(cache.folder, config, model, clip).build(items)
    new = set(cache.folder.rglob("*.safetensors")) - before
    prompts = {item.sample.prompt for item in items} | {""}
    assert Counter(file.suffixes[0] for file in new) == {".text": len(prompts)}


def test_damaged_mask_is_named_beside_its_image(
    world: Path, cache: FeatureCache, networks: tuple, tmp_path: Path
) -> None:
    folder = next(path.parent for path in (world / "val").glob("*/mask.png"))
    shutil.copytree(folder, tmp_path / "data" / folder.name)
    item, *_ = items_of(tmp_path / "data", networks)
    item.sample.mask.write_bytes(b"<html>not found</html>")
    (reject,) = cache.build([item])
    assert str(reject).startswith(f"{item.sample.image}: {item.sample.mask}: not an image")


def test_features_damaged_while_training_are_named(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    file = next(cache.folder.rglob("*.clip.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        MedSoftError, match=rf"{file.name}: the cached features of .* are gone or damaged .*same command"
    ):
        cache.load(item)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_reject_of_an_unreadable_file_says_why(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[-1]
    folder = item.sample.image.parent
    (reject,) = cache.build([replace(item, sample=replace(item.sample, mask=folder))])
    assert str(reject) == f"{item.sample.image}: {folder}: could not be read (Is a directory)"


@pytest.mark.parametrize("kind", ["clip", "latents", "clip_text"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_damaged_features_are_computed_again(
    world: Path, cache: FeatureCache, networks: tuple, kind: str, damage: Any
) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    good = {name: value.clone() for name, value in cache.load(item).items()}
    file = next(cache.folder.rglob(f"*.{kind}.safetensors"))
    damage(file)
    again = cache
    assert again.build([item]) == []
    found = again.load(item)
    assert found.keys() == good.keys()
    assert all(torch.equal(found[name], good[name]) for name in good)


def test_features_are_memory_mapped(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    found = cache.load(item)
    maps = Path("/proc/self/maps").read_text()
    assert str(cache.folder) in maps
    assert found["latent_mean"].dtype == torch.float32


def test_other_encoder_weights_are_other_features(world: Path, cache: FeatureCache, networks: tuple) -> None:
    config, model, clip = networks
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    before = set(cache.folder.rglob("*.safetensors"))
    with torch.no_grad():
        bias = model.first_stage_model.encoder.conv_in.bias
        kept = bias.clone()
        bias.add_(1)
    try:
        FeatureCache(cache.folder, config, model, clip).build([item])
    finally:
        bias.data.copy_(kept)
    (new,) = set(cache.folder.rglob("*.safetensors")) - before
    assert new.name.endswith(".latents.safetensors")


@pytest.mark.parametrize(
    "setting", ["data.feather=0.5", "data.feather_unit=pixels", "data.context=3", "data.fit=pad", "data.image_size=128"]
)
def test_another_preparation_is_other_features(world: Path, cache: FeatureCache, networks: tuple, setting: str) -> None:
    _, model, clip = networks
    items = items_of(world / "val", networks)
    assert not cache.build(items)
    before = set(cache.folder.rglob("*.safetensors"))
    other = FeatureCache(cache.folder, load_config(MODELS / "phantom.yaml", [setting]), model, clip)
    assert not other.build(items)
    new = set(cache.folder.rglob("*.safetensors")) - before
    assert Counter(file.suffixes[0] for file in new) == {".clip": len(items), ".latents": len(items)}
    assert any(not torch.equal(cache.load(item)["mask"], other.load(item)["mask"]) for item in items)


@pytest.mark.parametrize(
    "setting", ["training.batch_size=2", "training.seed=5", "training.mask_weight=4", "data.healthy_masks=9"]
)
def test_settings_that_decide_no_feature_compute_nothing(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    _, model, clip = networks
    items = items_of(world / "val", networks)
    cache.build(items)
    monkeypatch.setattr("ldm.features.build.write_features", lambda *_: pytest.fail("computed again"))
    other = FeatureCache(cache.folder, load_config(MODELS / "phantom.yaml", [setting]), model, clip)
    assert other.build(items) == []
    assert torch.equal(other.load(items[0])["context_tokens"], cache.load(items[0])["context_tokens"])


def test_a_learning_rate_computes_nothing_and_a_feather_does(world: Path, converted: Path, tmp_path: Path) -> None:
    """Through the command line: the features of three runs in one folder."""

    def files(name: str, *given: str) -> dict[Path, int]:
        more = ("--cache_dir", tmp_path / "features", *given)
        assert train("stage1", converted, tmp_path / name, world, *more, batch_size=9) == 0
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*.safetensors")}

    first = files("a")
    assert files("b", "training.rates.msc=0.0001") == first
    third = files("c", "data.feather=0.5")
    assert {file: third[file] for file in first} == first
    assert len(third) == 2 * len(first) - sum(file.name.endswith(".clip_text.safetensors") for file in first)


def test_two_runs_at_once_compute_each_feature_once(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first and then finds everything there."""
    items = items_of(world / "val", networks)
    computed: list[str] = []
    plain, started = FeatureBuilder.compute, threading.Event()

    def slowly(self: FeatureBuilder, members: Any) -> list:
        computed.extend(item.name for item in members)
        started.set()
        time.sleep(0.5)
        return plain(self, members)

    monkeypatch.setattr(FeatureBuilder, "compute", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.build, items)
        assert started.wait(30)
        second = pool.submit(cache.build, items)
        assert first.result(60) == second.result(60) == []
    assert sorted(computed) == sorted(item.name for item in items)


def test_orphans_of_a_killed_builder_are_removed(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    (cache.folder / "ab").mkdir(parents=True)
    (cache.folder / "ab" / ".partial-x").write_bytes(b"half")
    (cache.folder / ".lock").touch()  # its holder was killed: nobody holds it
    cache.build([item])
    assert not list(cache.folder.rglob(".partial-*"))


# ---------------------------------------------------------------------------------------------- order and randomness


class Features:
    """Stands for a FeatureCache: latents whose value is the item's variant."""

    def load(self, item: Any) -> dict[str, torch.Tensor]:
        return {"latent_mean": torch.full((4, 2, 2), float(item.variant))}


@pytest.fixture
def stage_data(world: Path, networks: tuple) -> Any:
    items = items_of(world / "train", networks)

    def make(fixed: bool = False) -> StageData:
        return StageData(items, Features(), networks[0].training, fixed)

    return make


def uses(data: StageData, world: int, rank: int, epoch: int = 0, **settings: Any) -> list:
    order = EpochOrder(data, replace(data.training, **settings), True, rank, world)
    order.epoch = epoch
    return list(order)


def test_two_processes_see_the_same_global_batches(stage_data: Any) -> None:
    data = stage_data()
    alone = uses(data, 1, 0, balance=True, batch_size=4)
    halves = [uses(data, 2, rank, balance=True, batch_size=4) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1])
    for first in range(0, len(alone), 4):
        joined = [use for half in halves for use in half[first // 2 : first // 2 + 2]]
        assert sorted(joined) == sorted(alone[first : first + 4])


def test_a_last_batch_that_cannot_be_shared_has_the_same_mean(stage_data: Any) -> None:
    """Nine samples in batches of four for two processes: the last batch is one sample, and one without weight."""
    data = stage_data()
    alone = uses(data, 1, 0, balance=False, batch_size=4)
    halves = [uses(data, 2, rank, balance=False, batch_size=4) for rank in (0, 1)]
    assert [len(half) for half in halves] == [5, 5]
    value = {number: float(number) for number in range(9)}
    for first in (0, 4, 8):
        expected = np.mean([value[number] for _, number, _, _ in alone[first : first + 4]])
        parts = [half[first // 2 : first // 2 + 2] for half in halves]
        means = [np.mean([weight * value[number] for _, number, _, weight in part]) for part in parts]
        assert np.mean(means) == pytest.approx(expected)


def test_validation_sees_each_sample_at_times_spread_over_the_schedule(stage_data: Any) -> None:
    data = stage_data(fixed=True)
    data.training = replace(data.training, val_draws=1)
    once = {key[1]: float(data[key]["t"]) for key in EpochOrder(data, data.training, shuffle=False)}
    data.training = replace(data.training, val_draws=4)
    order = EpochOrder(data, data.training, shuffle=False)
    seen = list(order)
    assert len(order) == len(seen) == 4 * 9
    order.epoch = 1
    times: dict[int, list[float]] = {}
    for key, later in zip(seen, order, strict=True):
        item = data[key]
        assert torch.equal(item["noise"], data[later]["noise"])  # the same in every epoch
        times.setdefault(key[1], []).append(float(item["t"]))
    assert all([int(4 * t) for t in found] == [0, 1, 2, 3] for found in times.values())
    assert len(once) == 9
    assert max(once.values()) > 0.5  # one draw: anywhere in the schedule
    variants = [float(data[0, 0, draw, 1.0]["latent_mean"][0, 0, 0]) for draw in range(5)]
    assert variants == [0, 1, 2, 3, 0]  # and over the sample's masks or crops
    assert all(found[0] == pytest.approx(once[number] / 4) for number, found in times.items())
    assert len(uses(stage_data(), 1, 0, balance=False, val_draws=4)) == 9  # training is not concerned


def test_resumed_order_is_the_rest_of_the_order(stage_data: Any) -> None:
    data = stage_data()
    for rank in (0, 1):
        whole = uses(data, 2, rank, balance=False, batch_size=4)
        order = EpochOrder(data, replace(data.training, balance=False, batch_size=4), True, rank, 2)
        order.start = 2
        assert list(order) == whole[2:]
        assert list(order) == whole  # the next epoch is a whole one


def test_balanced_by_prompt(stage_data: Any) -> None:
    data = stage_data()
    prompts = [data.sample(number).prompt for number in range(9)]
    assert Counter(prompts)["healthy"] == 5
    seen: Counter = Counter()
    for epoch in range(20):
        order = uses(data, 1, 0, epoch, balance=True, balance_by="prompt", batch_size=4)
        assert len(order) == 9
        assert len(set(order)) == 9
        seen.update(number for _, number, _, _ in order)
    by_prompt = Counter()
    for number, count in seen.items():
        by_prompt[prompts[number]] += count
    assert set(seen) == set(range(9))  # over some epochs nobody is left out
    assert max(by_prompt.values()) - min(by_prompt.values()) <= 1


def test_balance_gives_equal_counts_and_loses_nobody(stage_data: Any) -> None:
    data = stage_data()
    order = uses(data, 1, 0, balance=True)
    sick = sum(not data.sample(number).healthy for _, number, _, _ in order)
    assert (sick, len(order)) == (5, 10)
    assert {number for _, number, _, _ in order} == set(range(9))
    assert len(set(order)) == 10  # a repeated sample is another use, with its own noise


def test_epochs_differ_and_every_sample_comes_once(stage_data: Any) -> None:
    data = stage_data()
    orders = [[number for _, number, _, _ in uses(data, 1, 0, epoch, balance=False)] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(9))] * 2
    assert orders[0] != orders[1]


def test_validation_numbers_are_fixed_and_training_numbers_are_not(stage_data: Any) -> None:
    training, validation = stage_data(), stage_data(fixed=True)
    for name in ("noise", "posterior_noise", "t", "coin"):
        assert torch.equal(validation[0, 2, 0, 1.0][name], validation[7, 2, 0, 1.0][name])
        assert not torch.equal(training[0, 2, 0, 1.0][name], training[7, 2, 0, 1.0][name])
        assert not torch.equal(training[0, 2, 0, 1.0][name], training[0, 2, 1, 1.0][name])
        assert torch.equal(training[3, 2, 0, 1.0][name], stage_data()[3, 2, 0, 1.0][name])


def test_healthy_samples_use_all_their_masks(stage_data: Any) -> None:
    data = stage_data()
    healthy = next(number for number in range(9) if data.sample(number).healthy)
    assert {float(data[epoch, healthy, 0, 1.0]["latent_mean"][0, 0, 0]) for epoch in range(40)} == {0, 1, 2, 3}


def test_training_crops_of_a_lesion_are_shifted_and_hold_it(world: Path, networks: tuple) -> None:
    data = replace(networks[0].data, diseased_crops=6, image_size=32)
    for sample in load_samples(world / "train")[0]:
        if sample.healthy:
            continue
        drawn = prepare(sample, data, 0, 3).crop_window
        crops = [prepare(sample, data, 0, variant, training=True) for variant in range(6)]
        assert crops[0].crop_window == drawn  # the first is what drawing sees, and no variant of a drawing is shifted
        assert len({(crop.crop_window.top, crop.crop_window.left) for crop in crops}) > 1
        assert {(crop.crop_window.height, crop.crop_window.width) for crop in crops} == {(drawn.height, drawn.width)}
        for crop in crops:
            inside = np.zeros(crop.soft.shape, bool)
            window = crop.crop_window
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
    assert not torch.equal(cache.load(items[0])["target_tokens"], cache.load(items[1])["target_tokens"])


def test_every_file_is_hashed_once_at_a_start(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the run's identity, the check that the sets are disjoint, and the names of the features."""
    plain, hashed = ldm.core.files.sha256_file, Counter()

    def counted(path: Path) -> str:
        hashed[Path(path)] += 1
        return plain(path)

    for name, module in sys.modules.items():
        if name.startswith("ldm.") and hasattr(module, "sha256_file"):
            monkeypatch.setattr(module, "sha256_file", counted)
    given = ("--train_json", world / "train", "--val_json", world / "val")
    assert train("stage1", converted, tmp_path / "s", world, *given, batch_size=9) == 0
    images = {sample.image for split in ("train", "val") for sample in load_samples(world / split)[0]}
    assert {path: hashed[path] for path in images} == dict.fromkeys(images, 1)
    assert set(hashed.values()) == {1}


def test_inputs_carry_their_digests(world: Path) -> None:
    config = load_config(MODELS / "phantom_stage1.yaml", ["training.balance=false"])
    inputs = read_training_inputs({"train": world / "train", "val": world / "val"}, config)
    files = {path for item in inputs.all_items for path in item.sample.files if path}
    assert set(inputs.digests) == files
