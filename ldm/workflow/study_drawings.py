"""What the generators of a study have drawn, side by side. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.core.paths import ROOT
from ldm.data.annotations import read_samples
from ldm.data.crop import CropWindow
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import TARGET_LABEL, extents, read_anatomy, read_mask
from ldm.data.samples import Sample
from ldm.workflow.study_design import Design, World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_A_KIND = 2
AROUND, TILE = 1.6, 128  # side of what is shown: over the vertebra's longer one, and in pixels of the figure

Drawn = Mapping[str, Sample]  # by name, which says the parent and the variant


def drawings_figure(design: Design) -> "Figure | None":
    """The same healthy images after each generator, of the first world in which two have drawn; None if there is none.

    A row for each of two images a lesion type, subtle ones left out where there are others; ``original``, then a column
    a generator. Only generators that were given the same sentences are shown, as others have no drawing to compare: an
    oracle has sentences of its own.
    """
    for world in design.worlds:
        drawn = drawings(design, world)
        if len(drawn) > 1:
            originals = {sample.sample_id: sample for sample in read_samples(ROOT / world.train)[0]}
            shown = comparable(drawn, originals)
            if len(shown) > 1:
                return sheet(shown, originals, chosen_names(shown), world.name)
    return None


def drawings(design: Design, world: World) -> dict[str, Drawn]:
    """By generator, in the order of the YAML, the lesions that lie in its folder."""
    found: dict[str, Drawn] = {}
    for name in design.keys.generators:
        for made in filter(None, design.all_made(name)):
            folder = ROOT / design.home(world, made) / "pictures"
            if any(folder.glob("*/image.png")):
                samples, _ = read_samples(folder)
                found[str(made)] = {sample.sample_id: sample for sample in samples if not sample.healthy}
    return found


def comparable(drawn: Mapping[str, Drawn], originals: Mapping[str, Sample]) -> dict[str, Drawn]:
    """The generators that mostly had the sentences of the first one, and what all of them have drawn by these."""
    first = {name: each for name, each in next(iter(drawn.values())).items() if each.parent_id in originals}

    def same(other: Drawn) -> set[str]:
        return {name for name, each in first.items() if name in other and other[name].prompt == each.prompt}

    kept = {name: each for name, each in drawn.items() if 2 * len(same(each)) > len(first)}
    shared = set(first).intersection(*map(same, kept.values()))
    return {name: {each: of[each] for each in sorted(shared)} for name, of in kept.items()} if shared else {}


def chosen_names(drawn: Mapping[str, Drawn]) -> list[str]:
    """Names of the first two drawings of each lesion type, subtle ones last."""
    kinds: dict[str, list[tuple[bool, str]]] = {}
    for name, sample in next(iter(drawn.values())).items():
        kinds.setdefault(sample.lesion_type or "", []).append((sample.severity == "subtle", name))
    return [name for kind in sorted(kinds) for _, name in sorted(kinds[kind])[:ROWS_A_KIND]]


def sheet(drawn: Mapping[str, Drawn], originals: Mapping[str, Sample], names: Sequence[str], world: str) -> "Figure":
    """Squares around the vertebra: a row a name, the original and a column a generator."""
    from matplotlib.figure import Figure

    columns = len(drawn) + 1
    figure = Figure(figsize=(1.25 * columns + 0.3, 1.25 * len(names) + 0.5), layout="constrained")
    figure.suptitle(f"the same images of {world} after each generator", fontsize=9)
    axes = figure.subplots(len(names), columns, squeeze=False)
    for place, title in zip(axes[0], ["original", *drawn], strict=True):
        place.set_title(title, fontsize=8)
    for row, name in zip(axes, names, strict=True):
        samples = [each[name] for each in drawn.values()]
        window = square_around_vertebra(samples[0])
        for place, sample in zip(row, [originals[samples[0].parent_id or ""], *samples], strict=True):
            place.imshow(tile(sample, window), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(samples[0].lesion_type or "lesion", fontsize=7)
    return figure


def square_around_vertebra(sample: Sample) -> CropWindow:
    """A square around the vertebra that ``anatomy.png`` marks, or around the lesion."""
    assert sample.mask is not None  # a drawn lesion has one
    mask = read_mask(sample.mask)
    region = mask.hard
    if sample.anatomy is not None:
        vertebra = read_anatomy(sample.anatomy, mask.values.shape) == TARGET_LABEL
        region = vertebra if vertebra.any() else region
    (top, bottom), (left, right) = extents(region)
    side = round(AROUND * max(bottom - top, right - left))
    return CropWindow((top + bottom - side) // 2, (left + right - side) // 2, side, side, TILE)


def tile(sample: Sample, window: CropWindow) -> np.ndarray:
    """What the window shows of a sample's image, in [0, 1]."""
    image = read_image(Path(sample.image))
    return window.forward(to_unit(image, intensity_range_of(image, sample.meta.get("window"))))
