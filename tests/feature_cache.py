"""A feature cache on phantoms, and what tests do to its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.config import Config
from ldm.data.annotations import load_samples
from ldm.features.build import FeatureBuilder
from ldm.features.known import KnownFiles
from ldm.features.names import Item, training_items
from ldm.networks.model import MedSoftModel


@dataclass
class FeatureCache:
    """A builder and its store, each time for the files as they are at that moment."""

    folder: Path
    config: Config
    model: MedSoftModel
    clip: Any

    def builder(self, *items: Item) -> FeatureBuilder:
        samples = (sample for item in items for sample in (item.sample, item.donor) if sample)
        return FeatureBuilder(self.folder, self.config.data, self.model, self.clip, KnownFiles().read(samples))

    def build(self, items: list[Item]) -> list:
        return self.builder(*items).build(items)

    def load(self, item: Item) -> dict[str, torch.Tensor]:
        return self.builder(item).store.load(item)


def items_of(folder: Path, networks: tuple) -> list:
    return training_items(load_samples(folder)[0], networks[0].data)[0]


def shards(cache: FeatureCache, kind: str = "*") -> dict[Path, int]:
    """The shards of a kind, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in cache.folder.glob(f"v*-{kind}-*.safetensors")}


def equal_when_stored(found: torch.Tensor, computed: torch.Tensor) -> bool:
    """Whether ``found`` is ``computed`` rounded to 11 bits, up to what another batch changes before."""
    return bool(((found - computed).abs() <= 2**-11 * computed.abs() + 2e-5).all())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
