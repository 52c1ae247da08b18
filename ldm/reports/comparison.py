"""Inpainted images beside the images they were inpainted into: reading them, and showing them on pages and sheets.
No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.core.errors import MedSoftError
from ldm.core.tables import shortened
from ldm.data.crop import Fit
from ldm.data.folders import parent_image, scan_folder
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import read_mask
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.reports.html import write_image

FULL_COLOUR = 0.5  # a change of half the grey range has the strongest colour


@dataclass(frozen=True)
class ResultImage:
    """An inpainted image with the original it was inpainted into.

    ``original`` and ``result``: HxW or HxWx3, uint8 or uint16, as in the files; ``soft``: float32 HxW in [0, 1];
    ``intensity_range``: the original's (low, high) values that are shown as black and white.
    """

    original: np.ndarray
    result: np.ndarray
    soft: np.ndarray
    intensity_range: tuple[float, float]

    @property
    def changed_outside(self) -> int:
        """Pixels where the soft mask is 0 and the result differs from the original."""
        differs = self.result != self.original
        if differs.ndim == 3:
            differs = differs.any(axis=2)
        return int(np.count_nonzero(differs & (self.soft == 0)))

    def panels(self, side: int | None = None) -> dict[str, np.ndarray]:
        """What a reader compares, each HxWx3 uint8: original, soft mask, result, difference.

        With ``side`` only a square around the lesion, brought to ``side`` x ``side`` pixels.
        """
        original, result, soft = *self.shown(), self.soft
        if side is not None:
            crop = Fit("crop", side, context=2.0, min_crop=side).crop_window(soft.shape, soft)
            original, result, soft = crop.forward(original), crop.forward(result), crop.forward_mask(soft)
        return {
            "original": colour(original),
            "soft mask": colour(soft),
            "result": colour(result),
            "difference": signed_colours(result, original),
        }

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Original and result as float32 in [0, 1], both in the original's intensity range."""
        return to_unit(self.original, self.intensity_range), to_unit(self.result, self.intensity_range)


def read_all_results(folder: str | Path) -> list[Sample]:
    """All samples of a folder that dataset_infer.py wrote; MedSoftError if one of them cannot be read."""
    samples, rejects = scan_folder(folder)
    if rejects:
        raise MedSoftError(f"{rejects[0]}; remove that folder and run dataset_infer.py again to make it anew")
    return samples


def read_result(sample: Sample) -> ResultImage:
    """Read one synthetic sample with its parent. MedSoftError if either is missing or they do not fit."""
    parent = parent_image(sample)
    if sample.soft_mask is None:
        raise MedSoftError(f"{sample.image.with_name('soft_mask.png')}: does not exist; inpaint this sample again")
    original, result = read_image(parent), read_image(sample.image)
    if original.shape != result.shape or original.dtype != result.dtype:
        found, expected = (f"{each.dtype} pixels of shape {each.shape}" for each in (result, original))
        raise MedSoftError(f"{sample.image}: {found}, but its original {parent} has {expected}; inpaint it again")
    soft = read_mask(sample.soft_mask, result.shape, soft=True).values
    return ResultImage(original, result, soft, intensity_range_of(original, sample.meta.get("window")))


def colour(unit: np.ndarray) -> np.ndarray:
    """HxW or HxWx3 in [0, 1] -> HxWx3 uint8."""
    levels = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels


def signed_colours(result: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Result minus original, both in [0, 1], as HxWx3 uint8: white = equal, red = brighter, blue = darker."""
    change = result - original
    if change.ndim == 3:
        change = change.mean(axis=2)
    paler = 1 - np.clip(np.abs(change) / FULL_COLOUR, 0, 1)
    red, blue = np.where(change < 0, paler, 1), np.where(change > 0, paler, 1)
    return np.rint(np.stack([red, paler, blue], axis=2) * 255).astype(np.uint8)


def interleave(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first ``count`` samples when lesion types take turns, within each the severe ones first, then by name.

    The choice depends on types, severities and names only, never on how good an image is.
    """
    order = {"severe": 0, "moderate": 1, "subtle": 2}
    kinds: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: (order.get(s.severity or "", len(order)), s.sample_id)):
        kinds.setdefault(sample.lesion_type or "", []).append(sample)
    queues = [kinds[kind] for kind in sorted(kinds)]
    rounds = range(max(map(len, queues), default=0))
    return [queue[turn] for turn in rounds for queue in queues if turn < len(queue)][:count]


def facts(sample: Sample, image: ResultImage) -> dict[str, Any]:
    """What is known about a synthetic image, by name; what is not known is left out."""
    values = {
        "lesion": " ".join(filter(None, (sample.severity, sample.lesion_type))) or None,
        "original": sample.parent_id,
        "seed": sample.meta.get("seed"),
        "pixels changed outside the mask": image.changed_outside,
    }
    return {key: value for key, value in values.items() if value is not None}


def write_cards(
    page_path: str | Path, prefix: str, cards: Iterable[tuple[str, Mapping[str, np.ndarray], Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Write the panels (HxWx3 uint8) of each (prompt, panels, facts) beside the page.

    Returns the same with the panels' files, as the card of ``templates/macros.html`` shows them.
    """
    written = []
    for index, (prompt, panels, known) in enumerate(cards):
        names = {name: f"{prefix}_{index:04d}_{name.replace(' ', '_')}" for name in panels}
        sources = {name: write_image(page_path, names[name], pixels) for name, pixels in panels.items()}
        written.append({"prompt": prompt, "panels": sources, "facts": known})
    return written


def write_sheet(path: str | Path, images: Sequence[tuple[str, ResultImage]]) -> None:
    """A PNG with one row per (prompt, image): original, result and difference around the lesion under the prompt.

    Small images are cut to 96 native pixels and enlarged three times without smoothing.
    """
    tile, gap, caption, head = 288, 12, 36, 34
    width, row_height = 3 * tile + 4 * gap, caption + tile
    sheet = Image.new("RGB", (width, head + len(images) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(("original", "result", "difference (red brighter, blue darker)")):
        draw.text((gap + column * (tile + gap), 10), name, "#5d6b7a", ImageFont.load_default(16))
    for row, (prompt, image) in enumerate(images):
        top = head + row * row_height
        draw.text((gap, top + 8), shortened(prompt, 100), "#1c2733", ImageFont.load_default(17))
        zoom = 3 if max(image.soft.shape) < tile else 1
        panels = image.panels(tile // zoom)
        for column, name in enumerate(("original", "result", "difference")):
            left = gap + column * (tile + gap)
            pixels = panels[name].repeat(zoom, axis=0).repeat(zoom, axis=1)
            sheet.paste(Image.fromarray(pixels), (left, top + caption))
            draw.rectangle((left, top + caption, left + tile - 1, top + caption + tile - 1), outline="#dfe5ec")
    write_png(path, np.asarray(sheet))
