"""What the frozen encoders say about the training items: BiomedCLIP's folder, which features are computed when."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import torch
from feature_cache import FeatureCache, cut, equal_when_stored, flip_a_bit, items_of, shards
from tiny import CLIP, MODELS, train

from ldm.config import load_config
from ldm.core.errors import MedSoftError
from ldm.core.files import named_seed
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.masks import Mask, read_anatomy
from ldm.data.png import write_png
from ldm.data.preparation import fit_sample, prepare
from ldm.features.build import FeatureBuilder
from ldm.features.names import with_donors
from ldm.features.shards import keys_of, write_shard
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel, hidden_region, hide
from ldm.transfer.carrying import carry, read_donor

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


def blurred(folder: Path) -> None:
    """The same weights, another normalisation of images."""
    path = folder / "open_clip_config.json"
    path.write_text(path.read_text().replace("0.5", "0.25"))


def other_words(folder: Path) -> None:
    """The same weights, other ids of words."""
    for name in ("vocab.txt", "tokenizer.json"):
        path = folder / name
        path.write_text(path.read_text().replace("lesion", "nothere"))


@pytest.mark.parametrize(("change", "kind"), [(blurred, "images"), (other_words, "prompts")])
def test_the_same_weights_with_another_preparation_are_another_biomedclip(
    trained: dict, world: Path, tmp_path: Path, cache: FeatureCache, networks: tuple, change: Callable, kind: str
) -> None:
    other, before = clip_copy(tmp_path / "clip"), BiomedClip(CLIP).preparation
    config = other / "open_clip_config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))  # the same, written otherwise
    assert BiomedClip(other).preparation == before
    change(other)
    here = BiomedClip(other)
    assert [name for name in before if before[name] != here.preparation[name]] == [kind]
    with pytest.raises(MedSoftError, match=r"clip: prepares images or prompts otherwise than the BiomedCLIP that "):
        train("stage2_2", trained["stage2_1"].last, tmp_path / "s", world, f"biomedclip.path={other}")
    items = items_of(world / "val", networks)
    names = [replace(cache, clip=each).builder(*items).store.of_item(items[0])["clip"] for each in (cache.clip, here)]
    assert (names[0] == names[1]) == (kind == "prompts")
    texts = [replace(cache, clip=each).builder(*items).store.of_prompt("a")["clip_text"] for each in (cache.clip, here)]
    assert (texts[0] == texts[1]) == (kind == "images")


# ------------------------------------------------------------------------------------------------ cached features


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
            assert equal_when_stored(found[name], value[0]), name
    assert (found["context_tokens"] != found["target_tokens"]).any()


def test_second_run_computes_nothing(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = items_of(world / "val", networks)
    cache.build(items)
    monkeypatch.setattr(FeatureBuilder, "compute", lambda self, items: pytest.fail("computed again"))
    monkeypatch.setattr(FeatureBuilder, "compute_prompt", lambda self, prompt: pytest.fail("computed again"))
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


@pytest.mark.parametrize("name", ["image.png", "mask.png"])
def test_a_file_that_is_replaced_before_its_features_are_computed_has_none_under_its_old_name(
    cache: FeatureCache, world: Path, tmp_path: Path, networks: tuple, name: str
) -> None:
    diseased = next(path.parent for path in sorted((world / "val").glob("*/mask.png")))
    shutil.copytree(diseased, tmp_path / "data" / diseased.name)
    (item, *_) = items_of(tmp_path / "data", networks)
    builder, path = cache.builder(item), item.sample.image.with_name(name)
    write_png(path, np.flip(read_image(path), axis=0))
    said = rf"{name}: was replaced or changed after it had been read; run the same .*, delete \S+/data/verified\.jsonl$"
    with pytest.raises(MedSoftError, match=said):
        builder.build([item])
    assert not shards(cache)
    assert not cache.build([item])


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
    before = shards(cache, "clip")
    cache.build(other)
    assert shards(cache, "clip") == before


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
            assert equal_when_stored(found["text"], model.cond_stage_model(prompts)[0])
            assert equal_when_stored(found["prompt_embedding"], clip.encode_text(prompts)[0])
        assert equal_when_stored(cache.builder(*items).store.empty_text(), model.cond_stage_model([""]))
        before = shards(cache)
        next(model.cond_stage_model.parameters()).add_(1)
    FeatureCache(cache.folder, config, model, clip).build(items)
    assert (shards(cache).keys() - before).pop() in shards(cache, "text")
    (new,) = shards(cache).keys() - before
    assert len(keys_of(new)) == len({item.sample.prompt for item in items} | {""})


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
    store = cache.builder(item).store
    store.load(item)
    (file,) = shards(cache, "clip")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        MedSoftError, match=rf"{file.name}: the cached features of .* are gone or damaged .*same command"
    ):
        store.load(item)


def test_features_whose_folder_was_deleted_are_named(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    shutil.rmtree(cache.folder)
    with pytest.raises(
        MedSoftError, match=r"the cached features of .* are gone or damaged \(no file there holds them\)"
    ):
        cache.load(item)


@pytest.mark.parametrize("kind", ["clip", "latents", "clip_text"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_damaged_features_are_computed_again(
    world: Path, cache: FeatureCache, networks: tuple, kind: str, damage: Any
) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    good = {name: value.clone() for name, value in cache.load(item).items()}
    before = shards(cache)
    (file,) = shards(cache, kind)
    damage(file)
    assert cache.build([item]) == []
    assert {other for other in before if shards(cache)[other] != before[other]} == {file}
    found = cache.load(item)
    assert found.keys() == good.keys()
    assert all(torch.equal(found[name], good[name]) for name in good)


def test_features_are_memory_mapped(world: Path, cache: FeatureCache, networks: tuple) -> None:
    """Reading an item takes little memory, however large the shard."""
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    (file,) = shards(cache, "latents")
    rows = {bytes([n]) * 32: {"latent_mean": torch.full((4, 256, 256), n / 8)} for n in range(100)}
    write_shard(file, rows)
    code = "from pathlib import Path; from ldm.features.shards import read_row\n"
    code += "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    code += (
        f"file = Path({str(file)!r}); read_row(file, 8); before = peak(); found = read_row(file, 9)['latent_mean']\n"
    )
    code += "assert (found == 9 / 8).all() and str(found.dtype) == 'torch.float32'; print(peak() - before)"
    grown = int(children.run("-c", code).stdout)
    assert grown < 8_000 < file.stat().st_size / 1000


def test_other_encoder_weights_are_other_features(world: Path, cache: FeatureCache, networks: tuple) -> None:
    config, model, clip = networks
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    before = shards(cache)
    with torch.no_grad():
        bias = model.first_stage_model.encoder.conv_in.bias
        kept = bias.clone()
        bias.add_(1)
    try:
        FeatureCache(cache.folder, config, model, clip).build([item])
    finally:
        bias.data.copy_(kept)
    (new,) = shards(cache).keys() - before
    assert new in shards(cache, "latents")


@pytest.mark.parametrize(
    "setting", ["data.feather=0.5", "data.feather_unit=pixels", "data.context=3", "data.fit=pad", "data.image_size=128"]
)
def test_another_preparation_is_other_features(world: Path, cache: FeatureCache, networks: tuple, setting: str) -> None:
    _, model, clip = networks
    items = items_of(world / "val", networks)
    assert not cache.build(items)
    before = shards(cache)
    other = FeatureCache(cache.folder, load_config(MODELS / "phantom.yaml", [setting]), model, clip)
    assert not other.build(items)
    new = shards(cache).keys() - before
    assert Counter(file.name.split("-")[1] for file in new) == {"clip": 1, "latents": 1}
    assert {len(keys_of(file)) for file in new} == {len(items)}
    assert any(not torch.equal(cache.load(item)["mask"], other.load(item)["mask"]) for item in items)


def test_masks_of_healthy_items_are_carried_over_from_their_donors(
    world: Path, cache: FeatureCache, networks: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each mask has the donor's share of its vertebra. Without a label map it has the lesion's form, without a vertebra
    in that map it is a blob: both are counted."""
    caplog.set_level("INFO")
    diseased = [sample for sample in load_samples(world / "train")[0] if not sample.healthy]
    write_png(tmp_path / "none.png", np.zeros_like(read_donor(diseased[0]).hard, np.uint8))
    homeless = replace(diseased[0], sample_id="homeless", anatomy=tmp_path / "none.png")
    formal = replace(diseased[0], sample_id="form", anatomy=None)
    plain = [item for item in items_of(world / "val", networks) if item.sample.healthy]
    items = with_donors(plain, [diseased[0]])
    fallen = with_donors(plain, [homeless])
    forms = with_donors(plain, [formal])
    assert not cache.build([*items, *fallen, *forms])
    assert "masks of healthy images: 8 carried over" in caplog.text
    assert "4 of 12 masks are not placed by two vertebrae: the prompt's sample has no anatomy.png: only" in caplog.text
    assert (
        "4 of 12 masks are lesion-shaped instead of carried over: the prompt's sample marks no vertebra" in caplog.text
    )
    donor = read_donor(diseased[0])
    for item in items:
        shape = read_image(item.sample.image).shape
        target = read_anatomy(item.sample.anatomy, shape) == 1
        mask = carry(donor, target, shape, named_seed("carried", 0, item.sample.sample_id, item.variant)).hard
        assert mask.sum() / target.sum() == pytest.approx(donor.hard.sum() / donor.body.sum(), rel=0.3)
        seen = fit_sample(item.sample, read_image(item.sample.image), Mask(mask.astype(np.float32)), networks[0].data)
        assert torch.equal(cache.load(item)["mask"], seen.mask)
    for form, item in zip(forms, items, strict=True):
        assert cache.load(form)["mask"].sum() == pytest.approx(cache.load(item)["mask"].sum().item(), rel=0.5)
        assert not torch.equal(cache.load(form)["mask"], cache.load(item)["mask"])
    for given, other_spacing_is_another in (
        (formal, True),
        (diseased[0], False),
    ):  # a form has the size that it had in mm
        rescaled = replace(given, meta=given.meta | {"spacing_mm": 0.123})
        both = [each for donor in (given, rescaled) for each in with_donors(plain[:1], [donor])]
        first, second = map(cache.builder(*both).store.of_item, both)
        assert (first != second) == other_spacing_is_another
    for blob, item in zip(fallen, plain, strict=True):
        prepared = prepare(item.sample, networks[0].data, 0, item.variant, training=True)
        assert torch.equal(cache.load(blob)["mask"], prepared.mask)


@pytest.mark.parametrize(
    "setting", ["training.batch_size=2", "training.seed=5", "training.mask_weight=4", "data.healthy_masks=9"]
)
def test_settings_that_decide_no_feature_compute_nothing(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    _, model, clip = networks
    items = items_of(world / "val", networks)
    cache.build(items)
    monkeypatch.setattr("ldm.features.store.write_shard", lambda *_: pytest.fail("computed again"))
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
    assert [file.name.split("-")[1] for file in sorted(first)] == ["clip", "clip_text"]
    assert [file.name.split("-")[1] for file in third.keys() - first] == ["clip"]


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
    cache.folder.mkdir(parents=True)
    (cache.folder / ".partial-x").write_bytes(b"half")
    (cache.folder / ".lock").touch()  # its holder was killed: nobody holds it
    cache.build([item])
    assert not list(cache.folder.rglob(".partial-*"))


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
