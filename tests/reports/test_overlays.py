"""The doctor's page of samples with their outlines, and what it warns of in single files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import call

from ldm.data.folders import read_sample
from ldm.data.png import write_png
from ldm.reports.overlays import LABEL_COLOURS, MASK_COLOUR, TILE, overlay, write_overlays
from tool import doctor


def warnings_of(tmp_path: Path) -> tuple[int, str]:
    """Exit code and findings of the doctor on ``tmp_path / "data"``."""
    flags = ("--output", tmp_path / "found.json", "--overlays", tmp_path / "overlays.html", "--workers", 1)
    code = call(doctor, "--data", tmp_path / "data", *flags)
    return code, "\n".join(
        f"{item['where']}: {item['text']}" for item in json.loads((tmp_path / "found.json").read_text())
    )


def places(tile: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Middle row and column of the pixels of one colour, as shares of the tile."""
    rows, columns = np.nonzero((tile == colour).all(axis=2))
    return (rows.min() + rows.max() + 1) / 2 / TILE, (columns.min() + columns.max() + 1) / 2 / TILE


@pytest.mark.parametrize(("height", "width"), [(40, 60), (900, 300)])
def test_outlines_lie_where_mask_and_labels_are(
    tmp_path: Path, write_sample: Callable[..., Path], height: int, width: int
) -> None:
    mask, anatomy = np.zeros((2, height, width), np.uint8)
    mask[height // 4 : height // 2, width // 2 : width // 2 + 3] = 255
    anatomy[: height // 2, : width // 2], anatomy[height // 2 :, : width // 2] = 1, 3
    image = np.full((height, width), 90, np.uint8)
    sample = read_sample("a", write_sample(tmp_path / "a", image=image, mask=mask, anatomy=anatomy))
    tile = overlay(sample)
    assert tile.shape == (TILE, TILE, 3)
    longest = max(height, width)

    def expected(row: float, column: float) -> tuple[Any, Any]:
        middle = ((row - height / 2) / longest + 0.5, (column - width / 2) / longest + 0.5)
        return tuple(pytest.approx(value, abs=0.01) for value in middle)

    assert places(tile, MASK_COLOUR) == expected(0.375 * height, width / 2 + 1.5)
    assert places(tile, LABEL_COLOURS[1]) == expected(height / 4, width / 4)
    assert places(tile, LABEL_COLOURS[3]) == expected(0.75 * height, width / 4)
    assert not (tile == LABEL_COLOURS[2]).all(axis=2).any()


def test_a_sheet_for_twenty_samples_and_a_page_that_shows_them(
    tmp_path: Path, write_sample: Callable[..., Path]
) -> None:
    names = [f"s{number:02d}" for number in range(41)]
    samples = [read_sample(name, write_sample(tmp_path / name, meta={"level": "L3"})) for name in names]
    write_png(samples[3].mask, np.zeros((2, 2), np.uint8))  # unreadable for this image: left out
    page = tmp_path / "overlays.html"
    assert write_overlays(page, samples) == 40
    sheets = sorted((tmp_path / "overlays_files").iterdir())
    assert [sheet.name for sheet in sheets] == ["sheet_0001.png", "sheet_0002.png"]
    html = page.read_text()
    assert all(name in html for name in names if name != "s03")
    assert "s03" not in html
    assert html.count("<img") == 2
    assert write_overlays(page, samples[:5]) == 4
    assert [sheet.name for sheet in (tmp_path / "overlays_files").iterdir()] == ["sheet_0001.png"]


def test_an_orientation_of_image_or_mask_alone_is_warned_of(tmp_path: Path, write_sample: Callable[..., Path]) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:8, 3:9] = 255
    for name, on_image, on_mask in (("none", 1, 1), ("both", 6, 6), ("image", 6, 1), ("mask", 1, 3)):
        folder = write_sample(tmp_path / "data" / name, image=None, mask=None)
        for stem, orientation, pixels in (("image", on_image, mask // 2 + 9), ("mask", on_mask, mask)):
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(pixels).save(folder / f"{stem}.png", exif=exif)
    code, found = warnings_of(tmp_path)
    assert code == 0
    assert found.count("different EXIF orientations") == 2
    assert f"{tmp_path / 'data' / 'image' / 'image.png'}: its image, mask and label map have different" in found
    assert f"{tmp_path / 'data' / 'mask' / 'image.png'}: its image, mask and label map have different" in found
    assert (tmp_path / "overlays_files" / "sheet_0001.png").exists()


def test_stray_pixels_noise_and_other_label_maps_are_named(tmp_path: Path, write_sample: Callable[..., Path]) -> None:
    mask = np.zeros((200, 200), np.uint8)
    mask[20:60, 30:70] = 255
    image = np.random.default_rng(0).integers(0, 256, mask.shape, dtype=np.uint8)
    stray = mask.copy()
    stray[190, 5] = 255
    write_sample(tmp_path / "data" / "stray", image=image, mask=stray)
    noisy = write_sample(tmp_path / "data" / "noisy", image=image // 2, mask=None)
    Image.fromarray(mask).save(noisy / "mask.jpg", quality=60)
    labels = np.where(mask > 0, 20, 0).astype(np.uint8)
    write_sample(tmp_path / "data" / "labels", image=image // 3, mask=mask, anatomy=labels)
    code, found = warnings_of(tmp_path)
    assert code == 3
    assert (
        "tiny, or far from the largest one (stray pixels?), which makes the crop wider: 1 pixel from row 190" in found
    )
    assert "mask.jpg: its mask has compression noise" in found
    assert "anatomy.png: has the levels 0, 20; expected a label map of 0 background" in found
