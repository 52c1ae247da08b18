"""What a run learns from: the samples that are read at its start, the order of an epoch, the numbers of a use."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODELS, train, without_label_1

import ldm.core.files
from ldm.config import Config, DataConfig, load_config
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.crop import CropWindow
from ldm.data.folders import mask_box
from ldm.data.masks import Mask
from ldm.data.png import write_png
from ldm.data.preparation import prepare
from ldm.data.samples import Sample
from ldm.features.names import training_items
from ldm.training.dataset import EpochOrder, StageData, read_training_inputs


class Features:
    """Stands for a FeatureCache: latents whose value is the item's variant."""

    def load(self, item: Any) -> dict[str, torch.Tensor]:
        return {"latent_mean": torch.full((4, 2, 2), float(item.variant))}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(MODELS / "phantom.yaml")


@pytest.fixture
def stage_data(world: Path, config: Config) -> Any:
    items = training_items(load_samples(world / "train")[0], config.data)[0]

    def make(fixed: bool = False) -> StageData:
        return StageData(items, Features(), config.training, fixed)

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


def test_training_crops_of_a_lesion_are_shifted_and_hold_it(world: Path, config: Config) -> None:
    data = replace(config.data, diseased_crops=6, image_size=32)
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


def test_no_crop_is_an_item_twice(world: Path, config: Config) -> None:
    """As many as there are, and one where the window is as wide as the image."""
    samples = [sample for sample in load_samples(world / "train")[0] if not sample.healthy]

    def crops(data: DataConfig) -> list[list[CropWindow]]:
        found: dict[str, list[CropWindow]] = {sample.sample_id: [] for sample in samples}
        for item in training_items(samples, data)[0]:
            made = prepare(item.sample, data, 0, item.variant, training=True)
            found[item.sample.sample_id].append(made.crop_window)
        return list(found.values())

    assert [len(set(each)) for each in crops(config.data)] == [config.data.diseased_crops] * len(samples)
    for change in ({"min_crop": 512.0}, {"context": 40.0}, {"fit": "pad"}, {"mm_per_pixel": 5.0}):
        assert [len(each) for each in crops(replace(config.data, **change))] == [1] * len(samples)


@pytest.mark.parametrize(("suffix", "orientation"), [("png", None), ("jpg", None), ("jpg", 6)])
def test_a_window_as_long_as_an_image_that_is_not_square_has_one_place(
    tmp_path: Path, suffix: str, orientation: int | None
) -> None:
    """Also where EXIF turns the image."""
    mask, exif = np.zeros((256, 64), np.uint8), Image.Exif()
    mask[8:248, 28:36] = 255
    if orientation:
        exif[0x0112] = orientation
    image, marked = tmp_path / f"image.{suffix}", tmp_path / "mask.png"
    Image.fromarray(np.full_like(mask, 90)).save(image, **({"exif": exif} if orientation else {}))
    mask = np.rot90(mask, -1) if orientation else mask
    Image.fromarray(np.ascontiguousarray(mask)).save(marked)
    sample = Sample("s", image, marked, "lytic lesion", mask_box(Mask(mask / np.float32(255))), "s")
    assert len(training_items([sample], DataConfig())[0]) == 1
    prepare(sample, DataConfig(), 0, 0)


@pytest.mark.parametrize(
    ("feather", "unit", "side", "box"),
    [
        (0.25, "diameter", 40, (0.3, 0.3, 0.2, 0.2)),
        (0.25, "diameter", 40, (0.5, 0.5, 0.05, 0.05)),
        (40, "pixels", 20, (0.3, 0.3, 0.2, 0.2)),
    ],
)
def test_no_crop_is_counted_twice_where_the_box_does_not_show_it(
    tmp_path: Path, feather: float, unit: Any, side: int, box: tuple[float, float, float, float]
) -> None:
    """A box half, and an eighth, as long as its mask; a soft border that fills the window."""
    mask = np.zeros((100, 100), np.uint8)
    mask[30 : 30 + side, 30 : 30 + side] = 255
    write_png(tmp_path / "mask.png", mask)
    write_png(tmp_path / "image.png", mask // 2 + 20)
    sample = Sample("s", tmp_path / "image.png", tmp_path / "mask.png", "lytic lesion", box, "s")
    data = DataConfig(context=2.5, feather=feather, feather_unit=unit)
    windows = {prepare(sample, data, 0, variant, training=True).crop_window for variant in range(4)}
    assert len(training_items([sample], data)[0]) == len(windows) == 1


def test_every_file_is_hashed_once_at_a_first_start_and_not_again(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the run's identity, the check that the sets are disjoint, and the names of the features."""
    given = ("--train_json", world / "train", "--val_json", world / "val")

    def start(name: str) -> None:
        assert train("stage1", converted, tmp_path / name, world, *given, batch_size=9) == 0

    monkeypatch.setattr("ldm.features.known.SETTLED", 0)
    start("computes the features")
    (world / "features" / "data" / "verified.jsonl").unlink()
    plain, hashed = ldm.core.files.sha256_file, Counter()

    def counted(path: Path) -> str:
        hashed[Path(path)] += 1
        return plain(path)

    for name, module in sys.modules.items():
        if name.startswith("ldm.") and hasattr(module, "sha256_file"):
            monkeypatch.setattr(module, "sha256_file", counted)
    start("first")
    files = {file for split in ("train", "val") for sample in load_samples(world / split)[0] for file in sample.files}
    files -= {None}
    assert files <= hashed.keys()
    assert set(hashed.values()) == {1}
    hashed.clear()
    start("second")
    assert hashed  # weights
    assert not hashed.keys() & files


def test_inputs_carry_their_digests(world: Path) -> None:
    config = load_config(MODELS / "phantom_stage1.yaml", ["training.balance=false"])
    inputs = read_training_inputs({"train": world / "train", "val": world / "val"}, config)
    files = {path for item in inputs.all_items for path in item.sample.files if path}
    assert set(inputs.digests) == files


def test_a_file_that_vanishes_while_a_run_starts_is_skipped_by_name(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = next((world / "train").glob("*/mask.png"))
    plain = ldm.core.files.content_id
    monkeypatch.setattr("ldm.features.known.content_id", lambda path: None if path == lost else plain(path))
    paths = {"train": world / "train", "val": world / "val"}
    config = load_config(MODELS / "phantom_stage1.yaml", ["training.balance=false", "training.max_rejected=0.1"])
    inputs = read_training_inputs(paths, config)
    (reject,) = inputs.rejects
    assert str(reject) == f"{lost.with_name('image.png')}: {lost}: could not be read any more"
    assert lost.parent.name not in {sample.sample_id for sample in inputs.samples("train")}
    config.training.max_rejected = 0.01
    with pytest.raises(MedSoftError, match=r"1 of 12 samples cannot be read, more than training\.max_rejected"):
        read_training_inputs(paths, config)


CARRIED = ["training.balance=false", "data.healthy_masks_from=carry"]


def test_masks_are_carried_over_from_training_patients_only(world: Path) -> None:
    config = load_config(MODELS / "phantom_stage1.yaml", CARRIED)
    inputs = read_training_inputs({"train": world / "train", "val": world / "val"}, config)
    train_patients = {sample.patient_id for sample in inputs.samples("train")}
    donors = {item.sample.healthy: {} for item in inputs.all_items}
    for item in inputs.all_items:
        donors[item.sample.healthy][item.name] = item.donor
    assert set(donors[False].values()) == {None}
    assert all(not donor.healthy and donor.patient_id in train_patients for donor in donors[True].values())
    assert len({donor.sample_id for donor in donors[True].values()}) > 1
    again = read_training_inputs({"train": world / "train", "val": world / "val"}, config)
    assert again.all_items == inputs.all_items


def test_masks_of_samples_that_mark_no_vertebra_cannot_be_carried_over(world: Path, tmp_path: Path) -> None:
    """An ``anatomy.png`` without label 1 says that the vertebra is elsewhere; none at all says nothing."""
    write_annotations(tmp_path / "train.json", without_label_1(load_samples(world / "train")[0], tmp_path))
    config = load_config(MODELS / "phantom_stage1.yaml", CARRIED)
    with pytest.raises(
        MedSoftError, match=r"train.json: data.healthy_masks_from=carry needs diseased samples with a mask, and"
    ):
        read_training_inputs({"train": tmp_path / "train.json", "val": world / "val"}, config)
