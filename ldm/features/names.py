"""The items to learn from, and the names of their cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import DataConfig
from ldm.core.files import fingerprint
from ldm.core.schema import identity
from ldm.data.preparation import inpainting_obstacle
from ldm.data.samples import Reject, Sample

FORMAT = 2  # raise when what is stored changes its meaning
ITEM_KINDS, PROMPT_KINDS = ("clip", "latents"), ("clip_text", "text")


@dataclass(frozen=True)
class Item:
    """One image to learn from: a sample, and which of its fixed masks (healthy) or crops (diseased)."""

    sample: Sample
    variant: int

    @property
    def name(self) -> str:
        """The item's name, unique in a data set."""
        return f"{self.sample.sample_id}#{self.variant}"


def training_items(samples: Sequence[Sample], data: DataConfig) -> tuple[list[Item], list[Reject]]:
    """Every mask or crop of every sample that can be drawn on, and the samples that cannot, with the reason."""
    items, rejects = [], []
    for sample in samples:
        reason = inpainting_obstacle(sample)
        if reason:
            rejects.append(Reject(sample.sample_id, sample.image, reason))
        else:
            variants = data.healthy_masks if sample.healthy else data.diseased_crops
            items += [Item(sample, variant) for variant in range(variants)]
    return items, rejects


class FeatureNames:
    """A file for each item (or prompt) and kind of feature, named by all that decides what it holds: the content of
    the sample's files, the preparation, and the encoder's weights."""

    def __init__(
        self, folder: str | Path, data: DataConfig, encoders: Mapping[str, str], digests: Mapping[Path | None, str]
    ) -> None:
        """``encoders``: kind of feature -> fingerprint of the encoder. ``digests``: SHA-256 of each file of the items;
        the items of a file without one have no names."""
        self.folder, self.encoders, self.digests = Path(folder), encoders, digests
        self.preparation = identity(data, "features")
        self.item_kinds = [kind for kind in ITEM_KINDS if kind in encoders]
        self.prompt_kinds = [kind for kind in PROMPT_KINDS if kind in encoders]
        self._known: dict[tuple[str, str], Path] = {}

    def of_item(self, item: Item, kind: str) -> Path:
        """The file of this kind of feature of an item."""
        # Two folders may both have a sample of this name.
        name = f"{item.sample.image} {item.name}"
        if (name, kind) not in self._known:
            self._known[name, kind] = self._path(self._item_key(item, kind), kind)
        return self._known[name, kind]

    def of_prompt(self, prompt: str, kind: str) -> Path:
        """The file of this kind of feature of a prompt."""
        if (prompt, kind) not in self._known:
            key = fingerprint([FORMAT, "prompt", prompt, kind, self.encoders[kind]])
            self._known[prompt, kind] = self._path(key, kind)
        return self._known[prompt, kind]

    def _path(self, key: str, kind: str) -> Path:
        return self.folder / key[:2] / f"{key}.{kind}.safetensors"

    def _item_key(self, item: Item, kind: str) -> str:
        sample = item.sample
        content = [self.digests[path] if path else None for path in sample.files]
        # The sample's name decides masks and shifted crops, its prompt only which of the two it gets.
        name = (sample.sample_id, sample.healthy) if sample.healthy or item.variant else None
        extra = {key: sample.meta.get(key) for key in ("window", "spacing_mm")}
        settings = [extra, self.preparation, kind, self.encoders[kind]]
        return fingerprint([FORMAT, content, name, item.variant, list(sample.box), *settings])
