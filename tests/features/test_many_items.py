"""What a start takes with 50,000 cached items; only in ``make test-full``. ``pytest -s`` shows the figures."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from feature_cache import FeatureCache

from ldm.data.samples import Sample
from ldm.features.build import FeatureBuilder
from ldm.features.names import Item

ITEMS, VARIANTS, IN_A_SHARD = 50_000, 4, 100  # as many items in a shard as at true size


def many_items() -> Iterator[Item]:
    for number in range(ITEMS // VARIANTS):
        folder = Path(f"/data/sample_{number:06d}")
        box = (0.1, 0.2, 0.3, number / ITEMS)
        sample = Sample(folder.name, folder / "image.png", folder / "mask.png", f"lesion {number % 500}", box, "p")
        yield from (Item(sample, variant) for variant in range(VARIANTS))


@pytest.mark.slow
def test_a_start_with_many_items_takes_seconds(cache: FeatureCache) -> None:
    """Tiny features of the same number of keys and shards: of a shard only the head and its keys are read."""
    items = list(many_items())
    digests = {
        path: hashlib.sha256(str(path).encode()).hexdigest() for item in items for path in item.sample.files if path
    }
    builder = FeatureBuilder(cache.folder, cache.config.data, cache.model, cache.clip, digests)
    tiny = {
        "clip": {"context_tokens": torch.zeros(2), "mask": torch.zeros(1, 4, 4)},
        "latents": {"latent_mean": torch.zeros(2)},
    }
    cache.folder.mkdir(parents=True)
    for first in range(0, ITEMS, IN_A_SHARD):
        keys = [builder.store.of_item(item) for item in items[first : first + IN_A_SHARD]]
        for kind, features in tiny.items():
            builder.store.write(kind, {each[kind]: features for each in keys})
    prompts = {item.sample.prompt for item in items} | {""}
    keys = {builder.store.of_prompt(prompt)["clip_text"]: {"prompt_embedding": torch.zeros(2)} for prompt in prompts}
    builder.store.write("clip_text", keys)

    wall, processor = time.perf_counter(), time.process_time()
    builder = FeatureBuilder(cache.folder, cache.config.data, cache.model, cache.clip, digests)
    assert builder.build(items) == []
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    files = len(list(cache.folder.iterdir()))
    print(f"\n{ITEMS} items in {files} files: {processor:.1f} s of processor, {wall:.1f} s")
    assert processor < 10
    assert builder.store.load(items[-1])["prompt_embedding"].shape == (2,)
