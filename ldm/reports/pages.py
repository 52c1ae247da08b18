"""HTML pages and figures that show drawn pictures: cards, sheet, loss and ROC curves. No torch.

A page lies beside a folder ``<page>_files`` that holds its images, and opens from disk: nothing is loaded from anywhere
else.
"""

import csv
import html
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file, read_text
from ldm.data.crop import Fit
from ldm.data.folders import scan_folder
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import read_mask
from ldm.data.png import write_png
from ldm.data.samples import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FULL_COLOUR = 0.5  # a change of half the grey range has the strongest colour


@dataclass(frozen=True)
class ResultImage:
    """A drawn picture with the image it was drawn on.

    ``original`` and ``result``: HxW or HxWx3, uint8 or uint16, as in the files; ``soft``: float32 HxW in [0, 1].
    """

    sample: Sample
    original: np.ndarray
    result: np.ndarray
    soft: np.ndarray

    @property
    def changed_outside(self) -> int:
        """Pixels where the soft mask is 0 and the result differs from the original."""
        differs = self.result != self.original
        if differs.ndim == 3:
            differs = differs.any(axis=2)
        return int(np.count_nonzero(differs & (self.soft == 0)))

    def panels(self) -> dict[str, np.ndarray]:
        """What a reader compares, each HxWx3 uint8: original, soft mask, result, difference."""
        original, result = self.shown()
        return {
            "original": colour(original),
            "soft mask": colour(self.soft),
            "result": colour(result),
            "difference": signed_colours(result, original),
        }

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Original and result as float32 in [0, 1], both in the original's window."""
        window = intensity_range_of(self.original, self.sample.meta.get("window"))
        return to_unit(self.original, window), to_unit(self.result, window)


def read_all_results(folder: str | Path) -> list[Sample]:
    """All samples of a folder that dataset_infer.py wrote; MedSoftError if one of them cannot be read."""
    samples, rejects = scan_folder(folder)
    if rejects:
        raise MedSoftError(f"{rejects[0]}; remove that folder and run dataset_infer.py again to make it anew")
    return samples


def read_result(sample: Sample) -> ResultImage:
    """Read one drawn sample with its parent. MedSoftError if either is missing or their sizes differ."""
    parent = sample.meta.get("parent_image")
    meta = sample.image.with_name("meta.json")
    if not isinstance(parent, str):
        raise MedSoftError(f"{meta}: expected parent_image, the path of the original, found {parent!r}")
    if sample.soft_mask is None:
        raise MedSoftError(f"{sample.image.with_name('soft_mask.png')}: does not exist; draw this sample again")
    original, result = read_image(parent), read_image(sample.image)
    if original.shape != result.shape or original.dtype != result.dtype:
        raise MedSoftError(
            f"{sample.image}: {result.dtype} pixels of shape {result.shape}, but its original {parent} has "
            f"{original.dtype} pixels of shape {original.shape}; draw this sample again"
        )
    return ResultImage(sample, original, result, read_mask(sample.soft_mask, result.shape, soft=True).values)


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

    The choice depends on types, severities and names only, never on how good a picture is.
    """
    order = ("severe", "moderate", "subtle")
    ranked = sorted(
        samples, key=lambda s: (order.index(s.severity) if s.severity in order else len(order), s.sample_id)
    )
    kinds: dict[str, list[Sample]] = {}
    for sample in ranked:
        kinds.setdefault(sample.lesion_type or "", []).append(sample)
    queues = [kinds[kind] for kind in sorted(kinds)]
    rounds = range(max(map(len, queues), default=0))
    return [queue[turn] for turn in rounds for queue in queues if turn < len(queue)][:count]


# ------------------------------------------------------------------------------------------------------ pages


def facts(picture: ResultImage) -> dict[str, Any]:
    """The lines under a picture: prompt first, then what is known about it."""
    sample = picture.sample
    values = {
        "prompt": sample.prompt,
        "lesion": " ".join(filter(None, (sample.severity, sample.lesion_type))) or None,
        "drawn on": sample.parent_id,
        "seed": sample.meta.get("seed"),
        "pixels changed outside the mask": picture.changed_outside,
    }
    return {key: value for key, value in values.items() if value is not None}


def write_cards(
    page_path: str | Path, prefix: str, cards: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
) -> str:
    """Write the panels (HxWx3 uint8) of each card beside the page and return the HTML that shows them.

    A card is its panels by name and its facts by name; the fact named ``prompt`` becomes the heading.
    """
    shown = []
    for number, (panels, known) in enumerate(cards):
        figures = []
        for name, pixels in panels.items():
            source = write_image(page_path, f"{prefix}_{number:04d}_{name.replace(' ', '_')}", pixels)
            figures.append(f"<figure>{image(source, name)}<figcaption>{html.escape(name)}</figcaption></figure>")
        rest = [f"{html.escape(k)}: <b>{html.escape(str(v))}</b>" for k, v in known.items() if k != "prompt"]
        shown.append(
            f'<article class="card"><h3>{html.escape(str(known.get("prompt", "")))}</h3>'
            f'<div class="panels">{"".join(figures)}</div><p class="facts">{" · ".join(rest)}</p></article>'
        )
    return "\n".join(shown)


def files_folder(page_path: str | Path) -> Path:
    """The folder of a page's images: ``report.html`` -> ``report_files``."""
    path = Path(page_path)
    return path.with_name(path.stem + "_files")


def write_image(page_path: str | Path, name: str, content: "np.ndarray | Figure") -> str:
    """Write pixels or a figure as ``<page>_files/<name>.png``; returns the path to use inside the page."""
    target = files_folder(page_path) / f"{name}.png"
    if isinstance(content, np.ndarray):
        write_png(target, content)
    else:
        with atomic_file(target) as handle:
            content.savefig(handle, format="png", dpi=150)
    return f"{target.parent.name}/{target.name}"


def image(source: str, alt: str, kind: str = "pixels") -> str:
    """An <img>; ``kind`` is ``pixels`` (enlarged without smoothing) or ``plot``."""
    return f'<img class="{kind}" loading="lazy" src="{html.escape(source)}" alt="{html.escape(alt)}">'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table of text and numbers; everything is escaped, numbers are shown with three decimals."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(number(value))}</td>" for value in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value: Any) -> str:
    """A value for a reader: floats with three decimals, None as a dash."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def page(title: str, sections: Sequence[tuple[str, str, str]], intro: str = "") -> str:
    """A whole HTML page from (anchor, heading, HTML) sections; ``intro`` is plain text."""
    links = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{html.escape(heading)}</h2>\n{content}\n</section>'
        for anchor, heading, content in sections
    )
    lead = f'<p class="lead">{html.escape(intro)}</p>' if intro else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{html.escape(title)}</h1>{lead}<nav>{links}</nav></header>\n<main>{body}</main></body></html>\n"
    )


STYLE = """
:root { --ink: #1c2733; --soft: #5d6b7a; --line: #dfe5ec; --paper: #ffffff; --ground: #f4f6f9; --accent: #1f6feb;
  --good: #1a7f37; --bad: #c62828; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 0 0 10px; font-weight: 600; }
.lead { color: var(--soft); max-width: 75ch; margin: 0 0 16px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 8px; }
nav a { color: var(--accent); background: var(--paper); border: 1px solid var(--line); border-radius: 999px;
  padding: 3px 13px; text-decoration: none; font-size: 0.9rem; }
nav a:hover { border-color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 22px; margin: 20px 0; }
.card { border-top: 1px solid var(--line); padding: 16px 0 6px; }
.card:first-of-type { border-top: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
.plots > * { min-width: 0; }
figure { margin: 0; }
figcaption, .facts, .note { color: var(--soft); font-size: 0.87rem; }
.facts { margin: 6px 0 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
img.pixels { image-rendering: pixelated; border: 1px solid var(--line); }
img.sheet { width: auto; max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.warning { border-left: 4px solid #d99a00; background: #fff8e6; padding: 10px 14px; border-radius: 6px; }
.met { color: var(--good); font-weight: 600; } .missed { color: var(--bad); font-weight: 600; }
"""


# ---------------------------------------------------------------------------------------------------- figures


def write_sheet(path: str | Path, pictures: Sequence[ResultImage]) -> None:
    """A PNG with one row per picture: original, result and difference around the lesion, the prompt as caption.

    Small images are cut to 96 native pixels and enlarged three times without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    tile, gap, caption, head = 288, 12, 36, 34
    width, row_height = 3 * tile + 4 * gap, caption + tile
    sheet = Image.new("RGB", (width, head + len(pictures) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(("original", "result", "difference (red brighter, blue darker)")):
        draw.text((gap + column * (tile + gap), 10), name, "#5d6b7a", ImageFont.load_default(16))
    for row, picture in enumerate(pictures):
        top = head + row * row_height
        draw.text((gap, top + 8), _shortened(picture.sample.prompt, 100), "#1c2733", ImageFont.load_default(17))
        for column, pixels in enumerate(_close_up(picture, tile)):
            left = gap + column * (tile + gap)
            sheet.paste(Image.fromarray(pixels), (left, top + caption))
            draw.rectangle((left, top + caption, left + tile - 1, top + caption + tile - 1), outline="#dfe5ec")
    write_png(path, np.asarray(sheet))


def _close_up(picture: ResultImage, tile: int) -> list[np.ndarray]:
    """Original, result and difference around the lesion, each tile x tile x 3 uint8."""
    zoom = 3 if max(picture.soft.shape) < tile else 1
    window = Fit("crop", tile // zoom, 2.0).crop_window(picture.soft.shape, picture.soft)
    original, result = (window.forward(unit) for unit in picture.shown())
    small = [colour(original), colour(result), signed_colours(result, original)]
    return [pixels.repeat(zoom, axis=0).repeat(zoom, axis=1) for pixels in small]


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def read_table(path: str | Path, columns: Sequence[str], what: str = "table") -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries; MedSoftError if it is missing, empty or lacks one of ``columns``."""
    rows = list(csv.DictReader(io.StringIO(read_text(path, what))))
    if not rows:
        raise MedSoftError(f"{path}: expected a header and at least one row, found none")
    for column in columns:
        if rows[0].get(column) is None:
            raise MedSoftError(f"{path}: expected a column {column}, found {', '.join(map(str, rows[0]))}")
    return rows


def loss_figure(rows: Sequence[Mapping[str, str]], title: str) -> "Figure":
    """Training and validation loss by epoch from a stage's metrics.csv; its cosine, if any, on a second axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for column, style, label in (("train_loss", "tab:blue", "training"), ("val_loss", "tab:orange", "validation")):
        axes.plot(*_series(rows, column), color=style, label=label, marker="." if len(rows) < 40 else None)
    axes.set(title=title, xlabel="epoch", ylabel="loss")
    axes.grid(alpha=0.25)
    cosine = _series(rows, "val_cosine")
    if cosine[0]:
        second = axes.twinx()
        axes.set_zorder(second.get_zorder() + 1)  # the legend stays readable
        axes.patch.set_visible(False)
        second.plot(*cosine, color="tab:green", linestyle="--")
        second.set_ylabel("validation cosine", color="tab:green")
    axes.legend(loc="best", fontsize=8)
    return figure


def validation_figure(stages: Mapping[str, Sequence[Mapping[str, str]]]) -> "Figure":
    """Validation loss by epoch of each stage (name -> rows of its metrics.csv) side by side, each on its own scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(stages), 2.7), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        axes.plot(*_series(rows, "val_loss"), color="tab:orange", marker=".")
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.25)
    figure.supylabel("validation loss")
    return figure


def _series(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    filled = [row for row in rows if row.get(column)]
    return [float(row["epoch"]) for row in filled], [float(row[column]) for row in filled]


def roc_figure(curves: Mapping[str, tuple[Sequence[bool], Sequence[float]]]) -> "Figure":
    """ROC curves by name from (is diseased, P(disease)); curves with one class only are left out."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (truth, score) in curves.items():
        if len(set(truth)) == 2:
            false_rate, true_rate, _ = roc_curve(truth, score)
            axes.plot(false_rate, true_rate, label=f"{name}: AUC {roc_auc_score(truth, score):.3f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="1 - specificity", ylabel="recall", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=9)
    axes.grid(alpha=0.25)
    return figure
