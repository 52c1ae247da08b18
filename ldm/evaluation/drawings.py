"""What a judge, a classifier of lesion types, says of drawn lesions, and how visible their border is. No torch."""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.files import sha256_file, unchanged, write_json
from ldm.data.annotations import load_samples
from ldm.data.checks import real_ones
from ldm.data.images import border_gradient, intensity_range_of, read_image, to_unit
from ldm.data.masks import read_mask
from ldm.data.samples import HEALTHY, Reject, Sample
from ldm.evaluation.information import asked_drawn, asked_type
from ldm.reports.comparison import read_result

log = logging.getLogger("judge")

FAINT = "subtle"  # severities that a reader may miss: no rate and no bit is about them
Predict = Callable[[Path], tuple[list[dict[str, Any]], list[Reject]]]


@dataclass(frozen=True)
class JudgedImage:
    """What the judge says about one image.

    ``diseased``: of all its classes the most probable one is a lesion; ``lesion_type``: the most probable lesion,
    ``healthy`` left aside; ``probability``: of all lesions together.
    """

    diseased: bool
    lesion_type: str
    probability: float


def verdict_of(row: Mapping[str, Any]) -> JudgedImage:
    """The verdict in a row of predictions_*.csv."""
    lesions = {key[2:]: float(value) for key, value in row.items() if key.startswith("p_") and key != f"p_{HEALTHY}"}
    likeliest = max(lesions, key=lambda name: lesions[name])
    return JudgedImage(row["predicted"] != HEALTHY, likeliest, float(row["disease_probability"]))


@dataclass(frozen=True)
class Measured:
    """One drawing. ``asked``: its type in lower case, None where nobody said; ``border``: see ``contour_gradient``."""

    sample_id: str
    patient_id: str
    asked: str | None
    severity: str | None
    diseased: bool
    lesion_type: str
    border: float | None
    changed_outside: int | None


def judge_results(results: Path, judge: Path, predict: Predict, real: Path | None, output: Path) -> int:
    """Write to ``output``, as JSON, what the classifier ``judge`` says of the drawn lesions in ``results``.

    ``predict`` is that classifier's: rows as in predictions_*.csv, and what could not be read, whose number is
    returned. ``real``: lesions whose border is that of a real one (None: no seam). MedSoftError where nothing was
    drawn, for a classifier that names no lesion types, and for one that does not know a type that was asked for.
    """
    with unchanged(judge):
        (rows, rejects), digest = predict(results), sha256_file(judge)
    said = {row["sample_id"]: row for row in rows}
    samples = [each for each in load_samples(results)[0] if not each.healthy and each.sample_id in said]
    if not samples:
        raise MedSoftError(f"{results}: holds no image with a lesion that can be read; nothing to judge")
    known = {key[2:].lower() for key in rows[0] if key.startswith("p_")} - {HEALTHY}
    if known == {"diseased"}:
        raise MedSoftError(f"{judge}: names no lesion types; expected a classifier with task: type")
    measured = [_measure(sample, verdict_of(said[sample.sample_id])) for sample in samples]
    if strange := sorted({each.asked for each in measured if each.asked} - known):
        raise MedSoftError(
            f"{judge}: knows no {strange[0]}, which {results} was asked for, only {', '.join(sorted(known))}; give a "
            "classifier that has learned all types asked for"
        )
    lesions = [each for each in real_ones(real, load_samples(real)[0]) if not each.healthy] if real else []
    borders = [each for each in map(contour_gradient, lesions) if each is not None]
    found = endpoints(measured, borders)
    about = {"results": str(results), "real": str(real) if real else None, "judge_sha256": digest}
    refused, pictures = [str(reject) for reject in rejects], [asdict(each) for each in measured]
    write_json(output, {**about, "endpoints": found, "rejected": refused, "pictures": pictures})
    for name, entry in found.items():
        log.info("%-16s %s of %d images", name, "-" if entry["value"] is None else f"{entry['value']:.3f}", entry["n"])
    log.info("%s", output)
    return len(rejects)


def _measure(sample: Sample, verdict: JudgedImage) -> Measured:
    try:
        changed = read_result(sample).changed_outside
    except MedSoftError:  # real images and other programs' have no parent
        changed = None
    given = sample.sample_id, sample.patient_id, asked_type(sample), sample.severity
    found = verdict.diseased, verdict.lesion_type.strip().lower()
    return Measured(*given, *found, contour_gradient(sample), changed)


def contour_gradient(sample: Sample) -> float | None:
    """Mean absolute difference of neighbours on both sides of the mask's contour, the image in [0, 1].

    None without a mask, or where it has no contour.
    """
    if sample.mask is None:
        return None
    pixels = read_image(sample.image)
    unit = to_unit(pixels, intensity_range_of(pixels, sample.meta.get("window")))
    found = border_gradient(unit, read_mask(sample.mask, pixels.shape).hard)
    return found if math.isfinite(found) else None


def endpoints(drawings: Sequence[Measured], real_borders: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Each number of a set of drawings with ``n``, how many it is about; ``value`` None where nothing tells.

    Of lesions that are not subtle: ``detection``: the share called diseased; ``agreement``: whose most probable lesion
    type, healthy left aside, is the one asked for; ``asked_drawn``: bits (``ldm.evaluation.information``). Of all:
    ``seam``: mean gradient across the masks' contours over that of real lesions (above 1: a border that real lesions
    do not show, below: blurred); ``seam_error``: how far it is from 1; ``changed_outside``: pixels, together.
    """
    clear = [each for each in drawings if (each.severity or "").strip().lower() != FAINT]
    asked = [each for each in clear if each.asked is not None]
    borders = [each.border for each in drawings if each.border is not None]
    changed = [each.changed_outside for each in drawings if each.changed_outside is not None]
    seam = statistics.fmean(borders) / statistics.fmean(real_borders) if borders and real_borders else None
    bits = None
    if asked:
        drawn = [each.lesion_type if each.diseased else HEALTHY for each in asked]
        kinds = [each.asked for each in asked if each.asked is not None]
        bits = asked_drawn(kinds, drawn, [each.patient_id for each in asked])["value"]
    values = {
        "detection": (statistics.fmean(each.diseased for each in clear) if clear else None, len(clear)),
        "agreement": (statistics.fmean(e.lesion_type == e.asked for e in asked) if asked else None, len(asked)),
        "asked_drawn": (bits, len(asked)),
        "seam": (seam, len(borders)),
        "seam_error": (None if seam is None else abs(seam - 1), len(borders)),
        "changed_outside": (sum(changed) if changed else None, len(changed)),
    }
    return {name: {"value": value, "n": n} for name, (value, n) in values.items()}
