"""report.html beside synthetic images: each with its original, soft mask, result and difference. No torch.

One small image per result, loaded when it comes into view, and a few lines of script to filter by prompt: a page of
2,000 results opens at once. It opens from disk and loads nothing from anywhere else.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.files import read_json, write_json
from ldm.data.crop import Fit
from ldm.data.images import border_gradient
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.reports.comparison import ResultImage, colour, read_all_results, read_result, signed_colours
from ldm.reports.html import files_folder, write_page

TILE = 160  # pixels of a panel
PANELS = ("original", "soft mask", "result", "difference")


def write_gallery(folder: Path) -> Path:
    """Write ``report.html`` and its thumbnails beside the results in ``folder``; what is there already is kept."""
    page = folder / "report.html"
    samples = read_all_results(folder)
    with ThreadPoolExecutor(4) as pool:
        cards = list(pool.map(lambda sample: _card(page, sample), samples))
    shown = {_thumbnail(page, sample).stem for sample in samples}
    for file in files_folder(page).iterdir():
        if file.stem not in shown:  # a thumbnail of a result that is no longer there
            file.unlink()
    write_page(page, "gallery", name=folder.name, cards=cards, panels=PANELS, tile=TILE)
    return page


def measures(image: ResultImage) -> dict[str, Any]:
    """Pixels changed outside the mask, the border's gradient over the original's, and the mean change on the lesion."""
    original, result = image.shown()
    before, after = border_gradient(original, image.soft), border_gradient(result, image.soft)
    lesion = image.soft >= 0.5
    change = np.abs(result - original)[lesion].mean() if lesion.any() else 0.0
    return {
        "outside": image.changed_outside,
        "seam": round(after / before, 3) if before > 0 else None,
        "inside": round(float(change), 4),
    }


def _thumbnail(page: Path, sample: Sample) -> Path:
    return files_folder(page) / f"{sample.sample_id.replace('/', '__')}.png"


def _card(page: Path, sample: Sample) -> dict[str, Any]:
    """What the page shows of one result; makes its thumbnail and its numbers unless they are there from before."""
    thumbnail = _thumbnail(page, sample)
    stored = thumbnail.with_suffix(".json")
    meta = sample.image.with_name("meta.json")
    if not (thumbnail.exists() and stored.exists() and stored.stat().st_mtime_ns >= meta.stat().st_mtime_ns):
        image = read_result(sample)
        write_png(thumbnail, _strip(image))
        write_json(stored, measures(image))
    numbers = read_json(stored)
    facts = {
        "seed": sample.meta.get("seed"),
        "variant": sample.meta.get("variant"),
        "changed outside": numbers["outside"],
        "seam": numbers["seam"],
        "change inside": numbers["inside"],
    }
    known = {name: value for name, value in facts.items() if value is not None}
    source = f"{thumbnail.parent.name}/{thumbnail.name}"
    return {"sample_id": sample.sample_id, "prompt": sample.prompt, "source": source, "facts": known}


def _strip(image: ResultImage) -> np.ndarray:
    """The four panels side by side around the lesion, TILE x 4 TILE x 3 uint8."""
    crop = Fit("crop", TILE, 2.0).crop_window(image.soft.shape, image.soft)
    original, result = (crop.forward(unit) for unit in image.shown())
    panels = [colour(original), colour(crop.forward_mask(image.soft)), colour(result)]
    return np.concatenate([*panels, signed_colours(result, original)], axis=1)
