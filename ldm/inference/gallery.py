"""report.html beside synthetic images: each with its original, soft mask, result and difference. No torch.

One small image per result, loaded when it comes into view, and a few lines of script to filter by prompt. A page shows
500 results, so that it opens at once and is made in little memory; the pages after the first one lie in
``report_files``. They open from disk and load nothing from anywhere else.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence, Set
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

CHECK = "check.json"  # in a folder of results, what they were judged by; see ldm.evaluation.check
PAGE = 500  # results that a page shows
NEIGHBOURS = 3  # pages before and after it that a page links to
TILE = 160  # pixels of a panel
LONGEST_NAME = 120  # characters of a thumbnail's name; file systems take 255 bytes
PANELS = ("original", "soft mask", "result", "difference")


def write_gallery(folder: Path) -> Path:
    """Write the report of the sample folders in ``folder``, with the thumbnails that are not there yet.

    Returns its first page.
    """
    names = sorted(meta.parent.relative_to(folder).as_posix() for meta in folder.rglob("*__v*/meta.json"))
    starts = range(0, len(names), PAGE)
    with ThreadPoolExecutor(4) as pool:
        pages = (list(pool.map(lambda name: _fresh_card(folder, name), names[k : k + PAGE])) for k in starts)
        return write_pages(folder, len(names), pages, {_thumbnail(folder, name).stem for name in names})


def write_pages(folder: Path, total: int, pages: Iterable[Sequence[dict[str, Any]]], kept: Set[str]) -> Path:
    """Write ``report.html`` and its further pages in ``folder``, one page of cards after the other; returns the first.

    ``total``: how many cards ``pages`` give, PAGE at a time; a card is what ``card_of`` makes. ``kept``: stems of
    the image files that the cards show. What else lies beside the images, of results that are gone, is deleted.
    """
    files = [_page(folder, number) for number in range(1, max(1, math.ceil(total / PAGE)) + 1)]
    for number, cards in enumerate(pages if total else [[]], 1):
        _write_page(folder, files, number, total, cards)
    kept = kept | {file.stem for file in files}
    for file in files_folder(files[0]).glob("*"):
        if file.stem not in kept:
            file.unlink()
    return files[0]


def _page(folder: Path, number: int) -> Path:
    """The file of the page ``number``, counted from 1."""
    first = folder / "report.html"
    return first if number == 1 else files_folder(first) / f"page_{number}.html"


def _write_page(folder: Path, files: Sequence[Path], number: int, total: int, cards: Sequence[dict[str, Any]]) -> None:
    """Write page ``number`` of ``files`` with its ``cards`` out of ``total``, and links to others.

    The first page links to all, the others to the first, the last and their neighbours.
    """
    page, start = files[number - 1], (number - 1) * PAGE
    near = {1, len(files), *range(number - NEIGHBOURS, number + NEIGHBOURS + 1)}
    linked = [each for each in range(1, len(files) + 1) if number == 1 or each in near]
    links = {each: _relative(files[each - 1], page) for each in linked} if len(files) > 1 else {}
    shown = [card | {"source": _relative(folder / card["source"], page)} for card in cards]
    values = {"name": folder.name, "total": total, "first": start + 1, "number": number, "links": links}
    values["check"] = read_json(folder / CHECK) if number == 1 and (folder / CHECK).exists() else None
    write_page(page, "gallery", **values, cards=shown, panels=PANELS, tile=TILE)


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


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


def _fresh_card(folder: Path, name: str) -> dict[str, Any]:
    """``card_of``, for which the result's images are read if its thumbnail is missing or older."""
    thumbnail, meta = _thumbnail(folder, name), folder / name / "meta.json"
    stored = thumbnail.with_suffix(".json")
    if not (thumbnail.exists() and stored.exists() and stored.stat().st_mtime_ns >= meta.stat().st_mtime_ns):
        write_thumbnail(folder, name, read_result(read_sample(name, folder / name)))
    return card_of(folder, name)


def card_of(folder: Path, name: str) -> dict[str, Any]:
    """What a page shows of one result that has a thumbnail.

    ``source``: the image file with its thumbnail, seen from ``folder``; ``top``: where in a file of several thumbnails
    it begins, None in one of its own.
    """
    thumbnail = _thumbnail(folder, name)
    numbers, record = read_json(thumbnail.with_suffix(".json")), read_json(folder / name / "meta.json")
    facts = {
        "seed": record.get("seed"),
        "variant": record.get("variant"),
        "changed outside": numbers["outside"],
        "seam": _shown(numbers["seam"]),
        "change inside": _shown(numbers["inside"]),
        "accepted at try": (record.get("check") or {}).get("try"),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    prompt = read_text(folder / name / "prompt.txt").strip()
    source = f"{thumbnail.parent.name}/{thumbnail.name}"
    return {"sample_id": name, "prompt": prompt, "source": source, "top": None, "facts": known}


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
