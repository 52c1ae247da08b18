"""What an evaluation writes: the page, the figures, and the tables of the nearest training lesions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.core.files import write_json
from ldm.core.tables import shortened, write_csv
from ldm.data.annotations import write_rejects
from ldm.data.png import write_png
from ldm.data.samples import Reject
from ldm.evaluation.copies import CopyCheck, Neighbour
from ldm.evaluation.lesions import MEASURES, Lesion, known_values
from ldm.reports.figures import write_figure
from ldm.reports.html import number, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN_FILES = ("report.html", "closest_pairs.png", "lesions.png", "neighbours.csv", "copies.json", "rejects.json")
DISTANCES = {"frechet": "Frechet distance", "kernel": "kernel distance"}  # as the page names them
LIKENESS = {"ssim": "SSIM", "psnr": "PSNR, dB"}
REGIONS = {"outside": "outside the soft mask", "inside": "on the lesion"}
SETS = {"real": "real", "synthetic": "synthetic", "train": "of the training set"}
COPIES = {
    "count": "synthetic lesions that are copies",
    "threshold": "correlation with a training lesion from which one is a copy",
    "source_threshold": "the same of a lesion that is turned onto its own source",
    "not_comparable": "flat ones, which cannot be compared",
    "closest_pair_of_training_patients": "highest correlation of two training patients",
    "training_samples_without_patient_id": "training samples without patient_id",
    "nearer_than_95_percent_of_held_out": "share nearer to a training lesion than 95 % of the held-out real ones",
}
OF_SOURCES = {"pasted": "lesions that were pasted", "mask": "lesions in the mask of a training lesion"}
SHOWN_PAIRS = 12
TILE = 192  # pixels of a crop in the sheet of pairs


def write_files(
    folder: Path,
    measured: Mapping[str, Any],
    check: CopyCheck,
    lesions: Mapping[str, Sequence[Lesion]],
    rejects: list[Reject],
) -> None:
    """Write ``OWN_FILES``; ``measured`` is what evaluation.json will hold."""
    neighbours = [_neighbour_row(each, check.is_copy(each)) for each in check.ranked]
    write_csv(folder / "neighbours.csv", neighbours)
    write_json(folder / "copies.json", [row for row in neighbours if row["copy"]])
    write_rejects(folder / "rejects.json", rejects)
    write_figure(folder / "lesions.png", lesion_figure(lesions["real"], lesions["synthetic"]), dpi=120)
    write_png(folder / "closest_pairs.png", pair_sheet(check.ranked[:SHOWN_PAIRS], check.is_copy))
    write_page(
        folder / "report.html",
        "evaluation",
        counts={SETS[name]: count for name, count in measured["pictures"].items()},
        warnings=measured["warnings"],
        extractor=measured["extractor"],
        parents=measured["parents"],
        distance_rows=[
            [DISTANCES.get(name, name), estimate_text(each), value_text(each["between_halves_of_real"])]
            for name, each in measured["distances"].items()
        ],
        parent_rows=_parent_rows(measured["parents"]),
        text_rows=[[name, *map(estimate_text, (known or {}).values())] for name, known in measured["text"].items()],
        information_rows=_information_rows(measured.get("asked_drawn")),
        lesion_rows=list(_lesion_rows(measured["lesions"])),
        copy_rows=list(_copy_rows(measured["copies"])),
    )


def copy_numbers(check: CopyCheck) -> dict[str, Any]:
    """What evaluation.json says about copies."""
    return {
        "count": len(check.copies),
        "threshold": check.threshold,
        "source_threshold": check.source_threshold,
        "not_comparable": check.not_comparable,
        "closest_pair_of_training_patients": check.closest_real and check.closest_real.correlation,
        "training_samples_without_patient_id": check.without_patient,
        "nearer_than_95_percent_of_held_out": check.nearer_than_real,
        "median_correlation_with_the_source": check.likeness_of_sources or None,
    }


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """A number of evaluation.json with its interval, if it has one, for a reader."""
    if estimate is None:
        return number(None)
    value = value_text(estimate["value"])
    if estimate["low"] is None:
        return value
    return f"{value} ({value_text(estimate['low'])} to {value_text(estimate['high'])})"


def value_text(value: float | None) -> str:
    """A number with three decimals, or with two digits where these would show less of it."""
    return f"{value:.2g}" if value and abs(value) < 0.01 else number(value if value is None else float(value))


def _information_rows(found: Mapping[str, Any] | None) -> list[list[Any]]:
    if found is None:
        return []
    rows = [["information, bits", estimate_text(found)], ["at most", found["maximum"]]]
    return [
        *rows,
        ["as counted", found["as_counted"]],
        ["by chance, as counted", found["by_chance"]],
        ["agreement", estimate_text(found["agreement"])],
    ]


def _parent_rows(parents: Mapping[str, Any]) -> list[list[Any]]:
    pairs = [(key, region) for region in ("outside", "inside") for key in ("ssim", "psnr")]
    rows = [[f"{LIKENESS[key]}, {REGIONS[region]}", estimate_text(parents[region][key])] for key, region in pairs]
    return [*rows, ["share of images without a change outside", number(parents["outside"]["unchanged_pictures"])]]


def _copy_rows(copies: Mapping[str, Any]) -> Iterator[list[Any]]:
    yield from ([told, number(copies[name])] for name, told in COPIES.items())
    for kind, correlation in (copies["median_correlation_with_the_source"] or {}).items():
        yield [f"median correlation with the source, {OF_SOURCES[kind]}", number(correlation)]


def _lesion_rows(measured: Mapping[str, Any]) -> Iterator[list[Any]]:
    for name, numbers in measured.items():
        both = (numbers[f"{source}_quartiles"] for source in ("real", "synthetic"))
        digits = 1 if name.startswith("diameter") else 3
        quartiles = [", ".join(f"{value:.{digits}f}" for value in each) for each in both]
        yield [MEASURES[name], *quartiles, f"{numbers['wasserstein']:.{max(digits, 2)}f}"]


def _neighbour_row(each: Neighbour, is_copy: bool) -> dict[str, Any]:
    return {
        "sample_id": each.lesion.sample.sample_id,
        "image": str(each.lesion.sample.image),
        "nearest": each.match.sample.sample_id,
        "nearest_image": str(each.match.sample.image),
        "correlation": round(each.correlation, 4),
        "cosine": round(each.cosine, 4),
        "copy": is_copy,
        "comparable": each.comparable,
        "source_correlation": each.source and round(each.source, 4),
    }


def lesion_figure(real: Sequence[Lesion], synthetic: Sequence[Lesion]) -> "Figure":
    """Histograms of size, contrast and texture."""
    from matplotlib.figure import Figure

    values_of = {name: [known_values(lesions, name) for lesions in (real, synthetic)] for name in MEASURES}
    shown = {name: both for name, both in values_of.items() if all(map(len, both))}
    figure = Figure(figsize=(10 / 3 * len(shown), 3), layout="constrained")
    for axes, (name, both) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate(both), 20)
        for values, colour, who in zip(both, ("tab:green", "tab:blue"), ("real", "synthetic"), strict=True):
            axes.hist(values, edges, density=True, alpha=0.5, color=colour, label=who)
        axes.set_xlabel(MEASURES[name], fontsize=9)
        axes.set(yticks=[])
    axes.legend(fontsize=8)
    figure.supylabel("density", fontsize=9)
    return figure


def pair_sheet(pairs: Sequence[Neighbour], is_copy: Callable[[Neighbour], bool]) -> np.ndarray:
    """HxWx3 uint8: a synthetic crop, its nearest training crop and both lesions alone, one row a pair in this order."""
    gap, caption, head = 10, 44, 36
    sheet = Image.new("RGB", (4 * TILE + 5 * gap, head + len(pairs) * (TILE + caption + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(("synthetic", "nearest training image", "synthetic lesion", "training lesion")):
        pen.text((gap + column * (TILE + gap), 8), name, "#5d6b7a", ImageFont.load_default(15))
    for row, pair in enumerate(pairs):
        top = head + row * (TILE + caption + gap)
        verdict = "not a copy" if pair.comparable else "flat, cannot be compared"
        verdict = "COPY" if is_copy(pair) else verdict
        numbers = f"{verdict}: correlation {pair.correlation:.3f}, cosine of the features {pair.cosine:.3f}"
        names = shortened(f"{pair.lesion.sample.sample_id}; nearest: {pair.match.sample.sample_id}", 105)
        for line, (text, colour) in enumerate(
            ((numbers, "#c62828" if is_copy(pair) else "#1c2733"), (names, "#5d6b7a"))
        ):
            pen.text((gap, top + 19 * line), text, colour, ImageFont.load_default(14))
        crops = [pair.lesion.crop, pair.match.crop]
        alone = [np.where(each.inside, each.crop, 255) for each in (pair.lesion, pair.match)]
        for column, crop in enumerate([*crops, *alone]):
            tile = Image.fromarray(crop.astype(np.uint8)).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (TILE + gap), top + caption))
    return np.asarray(sheet)
