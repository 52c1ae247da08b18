"""Sheets of samples with the outlines of their masks and label maps, to be looked at before a training. No torch.

A mirrored, transposed or shifted mask is a sound file of the right size: only a person sees that it lies elsewhere.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ldm.core.errors import MedSoftError
from ldm.core.tables import shortened
from ldm.core.threads import thread_pool
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import LABELS, Mask, read_anatomy, read_mask
from ldm.data.samples import Sample, shown
from ldm.reports.comparison import colour
from ldm.reports.html import files_folder, write_image, write_page

TILE, GAP, CAPTION, HEAD = 240, 10, 36, 30  # pixels
COLUMNS, ROWS = 5, 4  # of a sheet
WIDTH = GAP + COLUMNS * (TILE + GAP)  # of a sheet, pixels
BACKGROUND = (12, 14, 18)
MASK_COLOUR, LETTER_COLOUR = (255, 64, 64), (255, 210, 120)
LABEL_COLOURS = {1: (80, 220, 100), 2: (90, 150, 255), 3: (245, 210, 70), 4: (90, 225, 230)}


class OverlayPage:
    """A page (HTML) and its sheets, a PNG for each 20 samples, which are written as the tiles come."""

    def __init__(self, page: Path) -> None:
        self.page, self.count = page, 0
        self._sheets: list[dict[str, Any]] = []
        self._tiles: list[tuple[Sample, np.ndarray]] = []

    def add(self, sample: Sample, tile: np.ndarray) -> None:
        """Show a sample by its ``tile`` (see ``overlay``)."""
        self._tiles.append((sample, tile))
        self.count += 1
        if len(self._tiles) == COLUMNS * ROWS:
            self._write_sheet()

    def _write_sheet(self) -> None:
        tiles, self._tiles = self._tiles, []
        source = write_image(self.page, f"sheet_{len(self._sheets) + 1:04d}", _sheet(tiles))
        names = [shown(sample.sample_id) for sample, _ in tiles]
        first, last = self.count - len(tiles) + 1, self.count
        self._sheets.append({"source": source, "names": names, "first": first, "last": last})

    def finish(self) -> None:
        """Write the page. Sheets of an earlier, longer page are removed."""
        if self._tiles:
            self._write_sheet()
        for file in files_folder(self.page).glob("sheet_*.png"):
            if file.stem not in {Path(sheet["source"]).stem for sheet in self._sheets}:
                file.unlink()
        values = {"sheets": self._sheets, "count": self.count, "legend": _legend(), "width": WIDTH}
        write_page(self.page, "overlays", **values)


def write_overlays(page: Path, samples: Sequence[Sample]) -> int:
    """Write ``page`` (HTML) and its sheets, a PNG for each 20 samples; returns how many samples they show.

    Samples whose files cannot be read are left out. Sheets of an earlier, longer page are removed.
    """
    written = OverlayPage(page)
    for sample, tile in _readable(samples):
        written.add(sample, tile)
    written.finish()
    return written.count


def _readable(samples: Sequence[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples and their tiles, made by several threads, a few at a time: a data set's tiles do not fit into memory."""
    with thread_pool() as pool, tqdm(total=len(samples), desc="overlays", unit=" samples", disable=None) as bar:
        for first in range(0, len(samples), 100):
            part = samples[first : first + 100]
            for sample, tile in zip(part, pool.map(_tile_of, part), strict=True):
                bar.update()
                if tile is not None:
                    yield sample, tile


def _tile_of(sample: Sample) -> np.ndarray | None:
    """The sample's ``overlay``; None where it cannot be read, which is a finding of the doctor's by itself."""
    try:
        return overlay(sample)
    except MedSoftError:
        return None


def overlay(sample: Sample) -> np.ndarray:
    """The sample's image, TILE x TILE x 3 uint8, with the outlines of its mask and of each label of its anatomy."""
    image = read_image(sample.image)
    labels = None if sample.anatomy is None else read_anatomy(sample.anatomy, image.shape)
    return outlined(sample, image, None if sample.mask is None else read_mask(sample.mask, image.shape), labels)


def outlined(sample: Sample, image: np.ndarray, mask: Mask | None, labels: np.ndarray | None) -> np.ndarray:
    """``overlay`` of a sample whose files are decoded: its image (HxW or HxWx3), its mask and its label map (HxW)."""
    scale = TILE / max(image.shape[:2])
    width, height = (max(1, round(scale * length)) for length in image.shape[1::-1])
    unit = to_unit(image, intensity_range_of(image, sample.meta.get("window")))
    if scale < 1:
        filter_, small = cv2.INTER_AREA, colour(cv2.resize(unit, (width, height), interpolation=cv2.INTER_AREA))
    else:  # pixels are repeated: coloured before, there are fewer of them
        filter_, small = cv2.INTER_NEAREST, cv2.resize(colour(unit), (width, height), interpolation=cv2.INTER_NEAREST)
    regions = []
    if labels is not None:
        regions += [(labels == label, LABEL_COLOURS[label]) for label in LABEL_COLOURS]
    if mask is not None:
        regions.append((mask.hard, MASK_COLOUR))
    for region, rgb in regions:
        kind = np.float32 if scale < 1 else np.uint8  # means lie between 0 and 1, repeated pixels do not
        reduced = (cv2.resize(region.astype(kind), (width, height), interpolation=filter_) > 0).view(np.uint8)
        inner = cv2.erode(reduced, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT)
        small[reduced > inner] = rgb
    if width == height:
        return small
    tile = np.full((TILE, TILE, 3), 24, np.uint8)
    top, left = (TILE - height) // 2, (TILE - width) // 2
    tile[top : top + height, left : left + width] = small
    return tile


def _legend() -> dict[str, tuple[int, int, int]]:
    """Colours by what they outline."""
    return {"mask": MASK_COLOUR} | {LABELS[label]: rgb for label, rgb in LABEL_COLOURS.items()}


def _sheet(tiles: Sequence[tuple[Sample, np.ndarray]]) -> np.ndarray:
    """The tiles under a legend, in rows, each over its caption. Only what text is on goes through Pillow."""
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.empty((HEAD + rows * (TILE + CAPTION) + GAP, WIDTH, 3), np.uint8)
    sheet[:] = np.tile(np.array(BACKGROUND, np.uint8), (WIDTH, 1))  # row by row, far faster than pixel by pixel
    sheet[:HEAD] = _legend_strip(WIDTH)
    for row in range(rows):
        members, top = tiles[row * COLUMNS : (row + 1) * COLUMNS], HEAD + row * (TILE + CAPTION)
        for column, (sample, tile) in enumerate(members):
            left = GAP + column * (TILE + GAP)
            sheet[top : top + TILE, left : left + TILE] = _with_directions(sample, tile)
        sheet[top + TILE : top + TILE + CAPTION] = _captions([sample for sample, _ in members], WIDTH)
    return sheet


@cache
def _legend_strip(width: int) -> np.ndarray:
    strip = Image.new("RGB", (width, HEAD), BACKGROUND)
    pen, place = ImageDraw.Draw(strip), GAP
    for name, rgb in _legend().items():
        pen.text((place, 8), name, rgb, _font())
        place += 24 + int(pen.textlength(name, _font()))
    return np.asarray(strip)


def _captions(samples: Sequence[Sample], width: int) -> np.ndarray:
    """The captions of one row of tiles, CAPTION x ``width`` x 3."""
    strip = Image.new("RGB", (width, CAPTION), BACKGROUND)
    pen, font = ImageDraw.Draw(strip), _font()
    for column, sample in enumerate(samples):
        left = GAP + column * (TILE + GAP)
        kind = "healthy" if sample.healthy else sample.lesion_type or "diseased"
        pen.text((left, 2), _fitting(pen, shown(sample.sample_id), font), (235, 238, 242), font)
        pen.text((left, 17), shortened(f"{sample.level or 'no level'}, {kind}", 36), (150, 160, 172), font)
    return np.asarray(strip)


def _with_directions(sample: Sample, tile: np.ndarray) -> np.ndarray:
    """A tile with the letters of ``_directions``, if there are any."""
    letters = list(_directions(sample))
    if not letters:
        return tile
    shown_tile = Image.fromarray(tile)
    pen = ImageDraw.Draw(shown_tile)
    for letter, place, anchor in letters:
        pen.text(place, letter, LETTER_COLOUR, _font(), anchor=anchor)
    return np.asarray(shown_tile)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _directions(sample: Sample) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Where left, right, top and bottom of an imported image lie in the patient: a letter, its place and its anchor.

    By ``affine`` of its meta.json, which takes (row, column) to the patient's left, posterior and head.
    """
    try:
        axes = np.array(sample.meta.get("affine"), float)[:3, :2]
    except (TypeError, ValueError, IndexError):
        return
    if axes.shape != (3, 2) or not np.isfinite(axes).all():
        return
    middle = TILE // 2
    places = {1: (TILE - 4, middle, "rm"), -1: (4, middle, "lm"), 2: (middle, TILE - 2, "mb"), -2: (middle, 2, "mt")}
    for sign, (x, y, anchor) in places.items():
        direction = np.sign(sign) * axes[:, 1 if abs(sign) == 1 else 0]
        axis = int(np.abs(direction).argmax())
        yield "LPHRAF"[axis + 3 * (direction[axis] < 0)], (x, y), anchor


def _fitting(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text`` cut on the left, where names differ least, until it is no wider than a tile."""
    cut = text
    while pen.textlength(cut, font) > TILE:
        cut = "…" + cut[2:]
    return cut
