"""What a start takes with 50,000 cached items; only in ``make test-full``. ``pytest -s`` shows the figures."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_cache import FeatureCache

from ldm.data.annotations import load_samples, write_annotations
from ldm.data.png import encode_png
from ldm.data.samples import Sample
from ldm.features.build import FeatureBuilder
from ldm.features.names import Item
from ldm.training.dataset import TrainingInputs, read_training_inputs

SAMPLES, ITEMS, IN_A_SHARD = 12_500, 50_000, 100  # as many items in a shard as at true size
SIDE, LESION = 48, 8  # pixels


def tiny_sample(folder: Path, number: int) -> Sample:
    """Half of them have a lesion, in a mask, the others a vertebra, in a label map."""
    rng, name = np.random.default_rng(number), f"s{number:06d}"
    diseased = number % 2 == 1
    marked = np.zeros((SIDE, SIDE), np.uint8)
    row, column = rng.integers(LESION, SIDE - 2 * LESION, 2)
    marked[row : row + LESION, column : column + LESION] = 255 if diseased else 1
    image, other = (folder / f"{name}_{what}.png" for what in ("image", "mask" if diseased else "anatomy"))
    image.write_bytes(encode_png(rng.integers(20, 230, (SIDE, SIDE), dtype=np.uint8)))
    other.write_bytes(encode_png(marked))
    if not diseased:
        return Sample(name, image, None, "healthy", (0, 0, 0, 0), name, anatomy=other)
    box = (column / SIDE, row / SIDE, LESION / SIDE, LESION / SIDE)
    return Sample(name, image, other, f"lesion {number % 500}", box, name)


def measured(what: str, function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returns, and the seconds of processor that it took."""
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{what}: {processor:.1f} s of processor, {wall:.1f} s")
    return found, processor


@pytest.mark.slow
def test_a_second_start_with_many_items_takes_seconds(cache: FeatureCache, tmp_path: Path) -> None:
    """From the annotation files to the last feature that is found; the networks' own start does not count."""
    (tmp_path / "data").mkdir()
    samples = [tiny_sample(tmp_path / "data", number) for number in range(SAMPLES + 2)]
    paths = {"train": tmp_path / "train.jsonl", "val": tmp_path / "val.jsonl"}
    write_annotations(paths["train"], samples[:-2])
    write_annotations(paths["val"], samples[-2:])
    config = replace(cache.config, data=replace(cache.config.data, min_crop=2 * LESION))

    def read() -> TrainingInputs:
        inputs = read_training_inputs(paths, config, cache.folder)
        inputs.known.write()
        return inputs

    def builder(inputs: TrainingInputs) -> FeatureBuilder:
        return FeatureBuilder(cache.folder, config.data, cache.model, cache.clip, inputs.digests)

    def start() -> TrainingInputs:
        inputs = read()
        assert builder(inputs).build(inputs.all_items) == []
        return inputs

    print()
    time.sleep(3)  # the last file has settled
    inputs, first = measured("reading the data for the first time", read)
    assert len(inputs.items["train"]) == ITEMS
    write_tiny_features(builder(inputs), inputs.all_items)
    _, annotations = measured("reading the annotation files", lambda: [load_samples(path) for path in paths.values()])
    again, second = measured(f"a start with {len(inputs.all_items)} items", start)
    print(f"beyond reading the annotation files: {second - annotations:.1f} s of processor")
    assert second - annotations < min(10, first)
    assert (again.items, again.digests) == (inputs.items, inputs.digests)
    assert builder(inputs).store.load(inputs.all_items[-1])["prompt_embedding"].shape == (2,)


def write_tiny_features(builder: FeatureBuilder, items: list[Item]) -> None:
    """As many keys and shards as at true size: of a shard a start reads only the head and its keys."""
    tiny = {
        "clip": {"context_tokens": torch.zeros(2), "mask": torch.zeros(1, 4, 4)},
        "latents": {"latent_mean": torch.zeros(2)},
    }
    builder.store.folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(items), IN_A_SHARD):
        keys = [builder.store.of_item(item) for item in items[first : first + IN_A_SHARD]]
        for kind, features in tiny.items():
            builder.store.write(kind, {each[kind]: features for each in keys})
    prompts = {item.sample.prompt for item in items} | {""}
    keys = {builder.store.of_prompt(prompt)["clip_text"]: {"prompt_embedding": torch.zeros(2)} for prompt in prompts}
    builder.store.write("clip_text", keys)
