"""report.html beside drawn pictures: each with its original, soft mask, result and difference. No torch.

One small image per picture, loaded when it comes into view, and a few lines of script to filter by prompt: a page of
2,000 pictures opens at once. It opens from disk and loads nothing from anywhere else.
"""

import html
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.files import read_json, write_json, write_text
from ldm.data.crop import Fit
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.data.seam import border_gradient
from ldm.reports.pages import STYLE, ResultImage, colour, files_folder, read_all_results, read_result, signed_colours

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
        if file.stem not in shown:  # of pictures that are no longer there
            file.unlink()
    write_text(page, _page(folder.name, cards))
    return page


def measures(picture: ResultImage) -> dict[str, Any]:
    """Pixels changed outside the mask, the border's gradient over the original's, and the mean change on the lesion."""
    original, result = picture.shown()
    before, after = border_gradient(original, picture.soft), border_gradient(result, picture.soft)
    lesion = picture.soft >= 0.5
    change = np.abs(result - original)[lesion].mean() if lesion.any() else 0.0
    return {
        "outside": picture.changed_outside,
        "seam": round(after / before, 3) if before > 0 else None,
        "inside": round(float(change), 4),
    }


def _thumbnail(page: Path, sample: Sample) -> Path:
    return files_folder(page) / f"{sample.sample_id.replace('/', '__')}.png"


def _card(page: Path, sample: Sample) -> str:
    """The HTML of one picture; makes its thumbnail and its numbers unless they are there from before."""
    strip = _thumbnail(page, sample)
    kept = strip.with_suffix(".json")
    meta = sample.image.with_name("meta.json")
    if not (strip.exists() and kept.exists() and kept.stat().st_mtime_ns >= meta.stat().st_mtime_ns):
        picture = read_result(sample)
        write_png(strip, _strip(picture))
        write_json(kept, measures(picture))
    return _article(f"{strip.parent.name}/{strip.name}", sample, read_json(kept))


def _strip(picture: ResultImage) -> np.ndarray:
    """The four panels side by side around the lesion, TILE x 4 TILE x 3 uint8."""
    window = Fit("crop", TILE, 2.0).crop_window(picture.soft.shape, picture.soft)
    original, result = (window.forward(unit) for unit in picture.shown())
    panels = [colour(original), colour(window.forward_mask(picture.soft)), colour(result)]
    return np.concatenate([*panels, signed_colours(result, original)], axis=1)


def _article(source: str, sample: Sample, numbers: dict[str, Any]) -> str:
    facts = {
        "seed": sample.meta.get("seed"),
        "variant": sample.meta.get("variant"),
        "changed outside": numbers["outside"],
        "seam": numbers["seam"],
        "change inside": numbers["inside"],
    }
    shown = " · ".join(f"{name} <b>{html.escape(str(value))}</b>" for name, value in facts.items() if value is not None)
    prompt, name = html.escape(sample.prompt), html.escape(sample.sample_id)
    alt = f"{', '.join(PANELS)} of {name}"
    return (
        f'<article data-prompt="{prompt.lower()}"><h3>{prompt}</h3>'
        f'<img loading="lazy" width="{4 * TILE}" height="{TILE}" src="{html.escape(source)}" alt="{alt}">'
        f'<p class="facts">{name} · {shown}</p></article>'
    )


def _page(name: str, cards: list[str]) -> str:
    heads = "".join(f"<span>{panel}</span>" for panel in PANELS)
    title = html.escape(f"{name}: {len(cards)} drawn pictures")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{MORE_STYLE}</style></head>\n<body><header><h1>{title}</h1>"
        '<p class="lead">Synthetic pictures, not for clinical use. The difference is red where the result is brighter, '
        "blue where it is darker. Changed outside: pixels beyond the soft mask that differ. Seam: mean gradient across "
        "the mask's border over the original's. Change inside: mean, as a share of the grey range.</p>"
        '<p><label>Prompt holds <input id="filter" type="search"></label> <span id="count"></span></p>'
        f'<p class="heads">{heads}</p></header>\n<main>\n' + "\n".join(cards) + f"\n</main>{SCRIPT}</body></html>\n"
    )


MORE_STYLE = """
main { display: grid; gap: 14px; padding-bottom: 40px; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px;
  content-visibility: auto; contain-intrinsic-size: auto 260px; }
article[hidden] { display: none; }
article img { width: 100%; max-width: 960px; image-rendering: pixelated; }
.heads { display: grid; grid-template-columns: repeat(4, 1fr); color: var(--soft); margin: 0 15px; max-width: 960px; }
"""

SCRIPT = """
<script>
const box = document.getElementById("filter"), cards = [...document.querySelectorAll("article")];
function show() {
  const words = box.value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    card.hidden = !card.dataset.prompt.includes(words);
    count += !card.hidden;
  }
  document.getElementById("count").textContent = count + " pictures";
}
box.addEventListener("input", show);
show();
</script>
"""
