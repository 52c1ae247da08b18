"""report.html beside synthetic images: each with its original, soft mask, result and difference. No torch.

One small image per result, loaded when it comes into view, and a few lines of script to filter by prompt: a page of
2,000 results opens at once. It opens from disk and loads nothing from anywhere else.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.files import fingerprint, read_json, read_text, write_json
from ldm.data.folders import read_sample
from ldm.data.images import border_gradient
from ldm.data.png import write_png
from ldm.reports.comparison import ResultImage, read_result
from ldm.reports.html import files_folder, write_page

TILE = 160  # pixels of a panel
LONGEST_NAME = 120  # characters of a thumbnail's name; file systems take 255 bytes
PANELS = ("original", "soft mask", "result", "difference")


def write_gallery(folder: Path) -> Path:
    """Write ``report.html`` beside the results in ``folder``, with the thumbnails that are not there yet."""
    page = folder / "report.html"
    names = sorted(meta.parent.relative_to(folder).as_posix() for meta in folder.rglob("*__v*/meta.json"))
    with ThreadPoolExecutor(4) as pool:
        cards = list(pool.map(lambda name: _card(folder, name), names))
    shown = {_thumbnail(folder, name).stem for name in names}
    for file in files_folder(page).iterdir():
        if file.stem not in shown:  # a thumbnail of a result that is no longer there
            file.unlink()
    write_page(page, "gallery", name=folder.name, cards=cards, panels=PANELS, tile=TILE)
    return page


def write_thumbnail(folder: Path, name: str, image: ResultImage) -> None:
    """Write what the page shows of the result ``name`` beside the results in ``folder``: panels and numbers."""
    thumbnail = _thumbnail(folder, name)
    write_png(thumbnail, np.concatenate(list(image.panels(TILE).values()), axis=1))
    write_json(thumbnail.with_suffix(".json"), measures(image))


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


def _thumbnail(folder: Path, name: str) -> Path:
    """The file of a result's panels, whose name can stand in a link as it is.

    A result's name that cannot, since it has ``/``, ``#``, ``%`` or the like in it, or that is long, gets a digest.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    if plain != name or len(name) > LONGEST_NAME:
        plain = f"{plain[: LONGEST_NAME // 2]}-{fingerprint(name)[:16]}"
    return files_folder(folder / "report.html") / f"{plain}.png"


def _card(folder: Path, name: str) -> dict[str, Any]:
    """What the page shows of one result; its images are read only if its thumbnail is missing or older."""
    thumbnail, meta = _thumbnail(folder, name), folder / name / "meta.json"
    stored = thumbnail.with_suffix(".json")
    if not (thumbnail.exists() and stored.exists() and stored.stat().st_mtime_ns >= meta.stat().st_mtime_ns):
        write_thumbnail(folder, name, read_result(read_sample(name, folder / name)))
    numbers, record = read_json(stored), read_json(meta)
    facts = {
        "seed": record.get("seed"),
        "variant": record.get("variant"),
        "changed outside": numbers["outside"],
        "seam": numbers["seam"],
        "change inside": numbers["inside"],
    }
    known = {name: value for name, value in facts.items() if value is not None}
    prompt = read_text(folder / name / "prompt.txt").strip()
    source = f"{thumbnail.parent.name}/{thumbnail.name}"
    return {"sample_id": name, "prompt": prompt, "source": source, "facts": known}
