"""Shards of features: how numbers and masks are stored, what a start trusts, what a kill or a full disk leaves."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from feature_cache import FeatureCache, cut, flip_a_bit, items_of, shards
from tiny import CLIP, MODELS

from ldm.core.errors import MedSoftError
from ldm.features import build as building
from ldm.features.build import FeatureBuilder
from ldm.features.shards import keys_of, read_row, write_shard
from ldm.features.store import VERIFIED

# ------------------------------------------------------------------------------------------------ what a shard holds


def key(number: int) -> bytes:
    return bytes([number]) * 32


def stored(file: Path, *values: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What is read of ``values`` after they have been written."""
    write_shard(file, {key(number): value for number, value in enumerate(values)})
    assert keys_of(file) == [key(number) for number in range(len(values))]
    return [read_row(file, row) for row in range(len(values))]


def test_numbers_keep_eleven_bits(tmp_path: Path) -> None:
    values = torch.randn(3, 50, 20) * 10
    found = stored(tmp_path / "a", *({"latent_mean": value} for value in values))
    for value, row in zip(values, found, strict=True):
        assert row["latent_mean"].dtype == torch.float32
        assert ((row["latent_mean"] - value).abs() <= 2**-11 * value.abs()).all()
        assert not torch.equal(row["latent_mean"], value)


def test_numbers_beyond_float16_keep_float32(tmp_path: Path) -> None:
    values = [torch.tensor([1 / 3, 7e4]), torch.tensor([1 / 3, 1.0])]
    first, second = stored(tmp_path / "a", *({"text": value} for value in values))
    assert torch.equal(first["text"], values[0])
    assert torch.equal(second["text"], values[1].half().float())


def masks() -> dict[str, torch.Tensor]:
    levels = torch.arange(256).float().reshape(1, 16, 16) / 255
    corner = torch.zeros(1, 16, 16)
    corner[0, 12:, 13:] = 128 / 255
    return {
        "every level": levels,
        "a corner": corner,
        "empty": torch.zeros(1, 16, 16),
        "full": torch.ones(1, 16, 16),
        "other values": levels**2,
    }


def test_masks_are_exact(tmp_path: Path) -> None:
    """Whatever rectangle they fill, also beside one whose values are no levels of 255."""
    found = stored(tmp_path / "a", *({"mask": mask} for mask in masks().values()))
    for row, (name, mask) in zip(found, masks().items(), strict=True):
        assert torch.equal(row["mask"], mask), name


def test_a_true_size_item_takes_half_of_what_it_took_at_most(tmp_path: Path) -> None:
    """Before: two grids and globals of tokens and three latents in float32, the mask twice, one byte a pixel."""
    before = 4 * (2 * 197 * 768 + 12 * 64 * 64) + 2 * 512**2
    clip = {name: torch.randn(196, 768) for name in ("context_tokens", "target_tokens")}
    clip |= {name: torch.randn(768) for name in ("context_global", "target_global")}
    mask = torch.zeros(1, 512, 512)
    mask[0, 100:300, 100:300] = 1
    latents = {name: torch.randn(4, 64, 64) for name in ("latent_mean", "latent_logvar", "masked_latent")}
    write_shard(tmp_path / "clip", {key(n): clip | {"mask": mask} for n in range(10)})
    write_shard(tmp_path / "latents", {key(n): latents for n in range(10)})
    now = sum(file.stat().st_size for file in tmp_path.iterdir()) / 10
    assert now < 0.4 * before
    write_shard(tmp_path / "clip", {key(n): clip | {"mask": torch.ones(1, 512, 512)} for n in range(10)})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) / 10 < 0.501 * before  # the largest mask there is


# ------------------------------------------------------------------------------------------- what a start looks at


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items in a shard."""
    monkeypatch.setattr(building, "SHARD_BYTES", 100_000)


def test_a_start_reads_only_what_has_changed(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    items = items_of(world / "val", networks)
    cache.build(items)
    assert len(shards(cache, "clip")) > 3
    read: list[Path] = []
    plain = building.FeatureStore.verify
    monkeypatch.setattr(building.FeatureStore, "verify", lambda self, files: (read.extend(files), plain(self, files)))
    monkeypatch.setattr(FeatureBuilder, "compute", lambda *_: pytest.fail("computed again"))
    cache.build(items)
    assert not read
    touched = max(shards(cache, "clip"))
    os.utime(touched)
    cache.build(items)
    assert read == [touched]
    read.clear()
    (cache.folder / VERIFIED).unlink()  # a thorough start
    cache.build(items)
    assert sorted(read) == sorted(shards(cache))
    read.clear()
    (cache.folder / VERIFIED).write_text("[half a li")
    cache.build(items)
    assert sorted(read) == sorted(shards(cache))


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_only_a_damaged_shard_is_computed_again(
    world: Path,
    cache: FeatureCache,
    networks: tuple,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: None,
    damage: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = items_of(world / "val", networks)
    cache.build(items)
    good, before = [cache.load(item) for item in items], shards(cache)
    file = max(shards(cache, "clip"))
    lost = keys_of(file)
    damage(file)
    computed: list[str] = []
    plain = FeatureBuilder.compute
    monkeypatch.setattr(
        FeatureBuilder,
        "compute",
        lambda self, members: (computed.extend(item.name for item in members), plain(self, members))[1],
    )
    assert cache.build(items) == []
    assert sorted(computed) == sorted(
        item.name for item in items if cache.builder(item).store.of_item(item)["clip"] in lost
    )
    assert {other for other in before if shards(cache)[other] != before[other]} == {file}
    assert caplog.text.count("1 damaged file of features is deleted") == (damage is not Path.unlink)
    for item, features in zip(items, good, strict=True):
        found = cache.load(item)
        assert all(torch.allclose(found[name], features[name], atol=0.01) for name in features)


def test_another_kind_is_computed_without_the_first(world: Path, cache: FeatureCache, networks: tuple) -> None:
    """unet_only after stage1: BiomedCLIP is not asked again."""
    _, model, clip = networks
    items = items_of(world / "val", networks)
    everything = list(model.parts)
    model.parts = []
    cache.build(items)
    model.parts = everything
    before, encode = shards(cache), type(clip).encode_image
    try:
        type(clip).encode_image = lambda *_: pytest.fail("encoded again")
        assert cache.build(items) == []
    finally:
        type(clip).encode_image = encode
    assert {file.name.split("-")[1] for file in shards(cache).keys() - before} == {"latents"}
    assert all(shards(cache)[file] == before[file] for file in before)


@pytest.mark.parametrize("name", [f"ab/ab{'0' * 62}.clip.safetensors", f"v4-clip-{'0' * 8}-{'0' * 16}.safetensors"])
def test_a_cache_of_an_older_version_is_named(
    world: Path, cache: FeatureCache, networks: tuple, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Files of one item in folders, as before there were shards; and shards of another format."""
    old = cache.folder / name
    old.parent.mkdir(parents=True)
    old.write_bytes(b"features of format 4")
    item = items_of(world / "val", networks)[0]
    assert cache.build([item]) == []
    entry = cache.folder / Path(name).parts[0]
    expected = f"{cache.folder}: 1 file or folder in it ({entry.name}) holds features of another version"
    assert caplog.text.count(expected) == 1
    assert "delete them" in caplog.text
    assert old.read_bytes() == b"features of format 4"
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    caplog.clear()
    (cache.folder / VERIFIED).unlink()
    assert cache.build([item]) == []
    assert "another version" not in caplog.text


def test_a_shard_that_may_not_be_read_is_named(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    (file,) = shards(cache, "latents")

    def denied(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    os.utime(file)
    monkeypatch.setattr("ldm.features.shards.safe_open", denied)
    with pytest.raises(MedSoftError, match=r"safetensors: could not be read \(Permission denied\); make it readable"):
        cache.build([item])


def test_a_cache_that_has_changed_and_may_not_be_written_to_names_the_cure(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of somebody else, copied without the times of its files, on a file system that is read only."""
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    monkeypatch.setattr("os.access", lambda path, mode: not (path == cache.folder and mode & os.W_OK))
    assert cache.build([item]) == []  # what is verified is used
    os.utime(min(shards(cache)))
    with pytest.raises(MedSoftError, match=r"features: features .* verified anew, .* another --cache_dir"):
        cache.build([item])


def test_a_shard_that_is_cut_while_it_is_in_use_is_named(world: Path, cache: FeatureCache, networks: tuple) -> None:
    item = items_of(world / "val", networks)[0]
    cache.build([item])
    store = cache.builder(item).store
    store.refresh()
    store.load(item)
    (file,) = shards(cache, "latents")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(MedSoftError, match=rf"{file.name}: .* gone or damaged \(.*run the same command again"):
        store.load(item)


# ------------------------------------------------------------------------- what is kept when a builder cannot go on

BUILD = """
import os, signal, sys
from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.checkpoints.fitting import load_parts
from ldm.config import load_config
from ldm.data.annotations import load_samples
from ldm.features.known import KnownFiles
from ldm.features import build, names, store
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel
config = load_config({yaml!r})
model = MedSoftModel(config.architecture, ["autoencoder"]).eval()
load_parts(model, read_checkpoint({ckpt!r}), ["autoencoder"], config.architecture)
items = names.training_items(load_samples({data!r})[0], config.data)[0]
build.SHARD_BYTES = 100_000
computed = 0
class Builder(build.FeatureBuilder):
    def compute(self, members):
        global computed
        computed += len(members)
        return super().compute(members)
digests = KnownFiles().read(item.sample for item in items)
builder = Builder({folder!r}, config.data, model, BiomedClip({clip!r}), digests, batch=1)
{before}
builder.build(items)
print(computed)
"""
KILL = """
plain, count = {owner}, 0
def counted(*given):
    global count
    count += 1
    if count == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*given)
{owner} = counted
"""


@pytest.fixture
def build_in_child(world: Path, converted: Path, cache: FeatureCache) -> Any:
    """Builds all features of the validation set in a process of its own, two items a shard; ``before``: more code."""

    def start(before: str = "") -> children.Child:
        given = {"yaml": str(MODELS / "phantom.yaml"), "ckpt": str(converted), "data": str(world / "val")}
        code = BUILD.format(**given, folder=str(cache.folder), clip=str(CLIP), before=before)
        return children.start("-c", code)

    return start


@pytest.mark.parametrize(
    ("owner", "number"), [("store.write_shard", 4), ("store.write_json", 3), ("build.compute_features", 7)]
)
def test_a_killed_builder_keeps_every_shard(
    world: Path, cache: FeatureCache, networks: tuple, build_in_child: Any, owner: str, number: int
) -> None:
    """Killed before a shard, between a shard and the note that it is sound, and while it computes."""
    items = items_of(world / "val", networks)
    assert build_in_child(KILL.format(owner=owner, number=number)).wait(120).returncode == -signal.SIGKILL
    kept = shards(cache)
    held = {name for file in kept for name in keys_of(file)}
    assert 3 <= len(kept) <= 6
    done = build_in_child().wait(120)
    assert done.returncode == 0
    names = [cache.builder(*items).store.of_item(item) for item in items]
    assert int(done.stdout) == sum(not held.issuperset(keys.values()) for keys in names) < len(items)
    assert all(shards(cache)[file] == when for file, when in kept.items())
    assert not list(cache.folder.rglob(".partial-*"))
    (cache.folder / VERIFIED).unlink()
    assert int(build_in_child().wait(120).stdout) == 0
    for item in items:
        assert torch.isfinite(cache.load(item)["latent_mean"]).all()


def test_two_processes_compute_each_feature_once(
    world: Path, cache: FeatureCache, networks: tuple, build_in_child: Any
) -> None:
    runs = [build_in_child(), build_in_child()]
    done = [run.wait(120) for run in runs]
    assert [run.returncode for run in done] == [0, 0]
    items = items_of(world / "val", networks)
    assert sorted(int(run.stdout) for run in done) == [0, len(items)]
    held = [name for file in shards(cache, "clip") for name in keys_of(file)]
    assert len(held) == len(set(held)) == len(items)


def test_a_full_disk_is_one_line_and_keeps_what_is_written(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    items = items_of(world / "val", networks)
    plain, written = os.fsync, []

    def full(descriptor: int) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(descriptor)
        plain(descriptor)

    monkeypatch.setattr("ldm.core.files.os.fsync", full)
    with pytest.raises(MedSoftError, match=r"could not be written \(No space left on device\)"):
        cache.build(items)
    monkeypatch.undo()
    before = shards(cache)
    assert before
    assert cache.build(items) == []
    assert all(shards(cache)[file] == when for file, when in before.items())


def test_what_is_computed_is_written_at_the_latest_after_some_minutes(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = items_of(world / "val", networks)
    monkeypatch.setattr(building, "SHARD_SECONDS", -1.0)
    cache.build(items)
    assert len(shards(cache, "clip")) == len(items)


def test_a_batch_that_does_not_fit_is_halved(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = items_of(world / "val", networks)
    plain, sizes = building.compute_features, []

    def small(model: Any, clip: Any, image: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(image))
        if len(image) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return plain(model, clip, image, *more)

    monkeypatch.setattr(building, "compute_features", small)
    assert cache.build(items) == []
    assert sizes == [2, *[1] * len(items)]
    assert caplog.text.count("out of memory with 2 items") == 1


def test_one_item_that_does_not_fit_is_one_line(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nMore lines")

    monkeypatch.setattr(building, "compute_features", never)
    expected = (
        r"image\.png: out of memory while its features were computed \(CUDA out of memory[^\n]*\); free some memory"
    )
    with pytest.raises(MedSoftError, match=expected):
        cache.build(items_of(world / "val", networks))


def test_another_error_of_the_networks_is_not_taken_for_a_full_memory(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(building, "compute_features", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cache.build(items_of(world / "val", networks))


def test_a_nearly_full_memory_makes_the_batch_smaller_from_the_start(
    world: Path, cache: FeatureCache, networks: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU raises no error: its system would end the process."""
    items = items_of(world / "val", networks)
    plain, sizes = building.compute_features, []

    def noted(model: Any, clip: Any, image: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(image))
        return plain(model, clip, image, *more)

    monkeypatch.setattr(building, "compute_features", noted)
    needed = building.image_memory(networks[0].architecture, networks[1].parts)
    monkeypatch.setattr(building, "free_memory", lambda device: 1.5 * needed)
    cache.build(items)
    assert max(sizes) == 1
    assert "little memory is free: computing features 1 at a time instead of 2" in caplog.text
