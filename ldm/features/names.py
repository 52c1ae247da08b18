"""The items to learn from, and the names of their cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ldm.config import DataConfig
from ldm.core.files import fingerprint, named_seed
from ldm.core.schema import identity
from ldm.core.tables import counted
from ldm.core.threads import thread_pool
from ldm.data.preparation import distinct_crops
from ldm.data.regions import Recall, computed, inpainting_obstacle
from ldm.data.samples import Reject, Sample
from ldm.networks.msc import ControllerInputs

FORMAT = 5  # of what is stored; raise the number when it changes its meaning
ITEM_KINDS, PROMPT_KINDS = ("clip", "latents"), ("clip_text", "text")


@dataclass(frozen=True, slots=True)
class Item:
    """One image to learn from: a sample, and which of its fixed masks (healthy) or crops (diseased).

    ``donor``: the diseased sample whose mask is carried over, where a healthy one's is not to be lesion-shaped.
    """

    sample: Sample
    variant: int
    donor: Sample | None = None

    @property
    def name(self) -> str:
        """The item's name, unique in a data set."""
        return f"{self.sample.sample_id}#{self.variant}"


def training_items(
    samples: Sequence[Sample], data: DataConfig, recall: Recall = computed
) -> tuple[list[Item], list[Reject]]:
    """Every mask or distinct crop of every sample that can be drawn on, and the samples that cannot, with the reason.

    No image is decoded, but masks and label maps of which ``recall`` knows nothing: see ``distinct_crops``.
    """

    def variants(sample: Sample) -> int | str:
        reason = inpainting_obstacle(sample, recall=recall)
        return reason or (data.healthy_masks if sample.healthy else distinct_crops(sample, data, recall))

    with thread_pool() as pool:
        found = list(zip(samples, pool.map(variants, samples), strict=True))
    items = [Item(sample, variant) for sample, count in found if isinstance(count, int) for variant in range(count)]
    return items, [Reject(sample.sample_id, sample.image, why) for sample, why in found if isinstance(why, str)]


def with_donors(items: Sequence[Item], diseased: Sequence[Sample]) -> list[Item]:
    """The items, each of a healthy sample with one of ``diseased`` as its donor, by its name."""
    donors = sorted(diseased, key=lambda sample: sample.sample_id)
    return [
        replace(item, donor=donors[named_seed("donor", item.sample.sample_id, item.variant) % len(donors)])
        if item.sample.healthy
        else item
        for item in items
    ]


def item_counts(items: Sequence[Item]) -> str:
    """How many crops and masks there are to learn from, in words."""
    kinds: dict[bool, set[str]] = {False: set(), True: set()}
    for item in items:
        kinds[item.sample.healthy].add(item.sample.sample_id)
    masks = sum(item.sample.healthy for item in items)
    crops = f"{counted(len(items) - masks, 'distinct crop')} of {counted(len(kinds[False]), 'diseased image')}"
    return f"{crops}, {counted(masks, 'mask')} in {counted(len(kinds[True]), 'healthy one')}"


class FeatureNames:
    """A key for each item (or prompt) and kind of feature, made of all that decides what it is: the content of the
    sample's files, the preparation, and the encoder's weights."""

    def __init__(
        self, folder: str | Path, data: DataConfig, encoders: Mapping[str, str], digests: Mapping[Path | None, str]
    ) -> None:
        """``encoders``: kind of feature -> encoder's fingerprint. ``digests``: SHA-256 of every file of the items."""
        self.folder, self.encoders, self.digests = Path(folder), encoders, digests
        self._made_by = fingerprint([ControllerInputs._fields, identity(data, "features")])

    def group(self, kind: str) -> str:
        """What a kind of feature has in common with all others of its encoder and preparation, in hexadecimal."""
        return sha256(f"{self._made_by if kind in ITEM_KINDS else ''} {self.encoders[kind]}".encode()).hexdigest()

    def of_item(self, item: Item) -> dict[str, bytes]:
        """Kind of feature -> its key, of an item."""
        sample = item.sample
        content = [self.digests[path] if path else None for path in sample.files]
        # The sample's name decides masks and shifted crops, its prompt only which of the two it gets.
        name = (sample.sample_id, sample.healthy) if sample.healthy or item.variant else None
        extra = [sample.meta.get(key) for key in ("window", "spacing_mm")]
        named_by = [content, name, item.variant, sample.box, extra, self._made_by]
        if item.donor is not None:
            named_by.append([self.digests[path] if path else None for path in item.donor.files])
            if item.donor.anatomy is None:  # its form is carried over in its own size
                named_by.append(["form", item.donor.meta.get("spacing_mm")])
        return self._keys(ITEM_KINDS, named_by)

    def of_prompt(self, prompt: str) -> dict[str, bytes]:
        """Kind of feature -> its key, of a prompt."""
        return self._keys(PROMPT_KINDS, ["prompt", prompt])

    def _keys(self, kinds: Sequence[str], named_by: Sequence[Any]) -> dict[str, bytes]:
        name = fingerprint(named_by)
        used = [kind for kind in kinds if kind in self.encoders]
        return {kind: sha256(f"{name} {kind} {self.encoders[kind]}".encode()).digest() for kind in used}
