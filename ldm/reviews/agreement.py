"""How far reviewers agree: Cohen's kappa of every pair, shares of equal verdicts, tables of verdicts. No torch.

Kappa is that of Cohen (1960), without weights, of the three verdicts, and of rejected or not, which is what decides.
Intervals are percentiles over patients drawn with replacement, since drawings of one patient are alike.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ldm.core.files import named_seed
from ldm.data.checks import FEWEST_PATIENTS
from ldm.data.samples import Sample
from ldm.reviews.choice import Judged
from ldm.reviews.table import REJECT, VERDICTS, Review

RESAMPLES = 2000
UNKNOWN = "unknown"


def kappas(counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa of contingency tables (..., K, K): rows are one reviewer's verdicts, columns the other's.

    NaN where it is undefined: no image, or both gave one and the same verdict to all of them.
    """
    total = counts.sum(axis=(-2, -1))
    rows, columns = counts.sum(axis=-1), counts.sum(axis=-2)
    observed = np.trace(counts, axis1=-2, axis2=-1) * total
    expected = (rows * columns).sum(axis=-1)
    left = total * total - expected
    return np.divide(observed - expected, left, out=np.full(total.shape, np.nan), where=left > 0)


def shares(counts: np.ndarray) -> np.ndarray:
    """The share of equal verdicts in tables as ``kappas`` takes them; NaN without an image."""
    total = counts.sum(axis=(-2, -1))
    same = np.trace(counts, axis1=-2, axis2=-1)
    return np.divide(same, total, out=np.full(total.shape, np.nan), where=total > 0)


def reject_or_not(counts: np.ndarray) -> np.ndarray:
    """Tables (..., 3, 3) in the order of VERDICTS as (..., 2, 2): not rejected, rejected."""
    groups = np.array([[name != REJECT, name == REJECT] for name in VERDICTS], int)
    return groups.T @ counts @ groups


def estimates(by_patient: np.ndarray, seed: int = 0) -> dict[str, dict[str, float | None]]:
    """Kappas and shares of two reviewers with 95 % intervals, from their tables (P, 3, 3) of each of P patients.

    Each number is {value, low, high}; value is None where it is undefined, the interval with fewer than FEWEST_PATIENTS
    patients, and where it is undefined in half of the resamples or more.
    """
    patients = len(by_patient)
    rng = np.random.default_rng(named_seed(seed, "agreement of reviewers"))
    draws = rng.multinomial(patients, np.full(patients, 1 / patients), size=RESAMPLES)
    again = np.tensordot(draws, by_patient, axes=1)
    once = by_patient.sum(axis=0)
    found = {}
    for name, measure, change in (
        ("kappa", kappas, np.asarray),
        ("agreement", shares, np.asarray),
        ("kappa_rejected", kappas, reject_or_not),
        ("agreement_rejected", shares, reject_or_not),
    ):
        value, values = float(measure(change(once))), measure(change(again))
        known = values[~np.isnan(values)]
        enough = patients >= FEWEST_PATIENTS and len(known) > RESAMPLES / 2 and not np.isnan(value)
        low, high = np.percentile(known, [2.5, 97.5]).tolist() if enough else (None, None)
        found[name] = {"value": None if np.isnan(value) else value, "low": low, "high": high}
    return found


def agreement(judged: Judged, samples: Sequence[Sample]) -> dict[str, Any]:
    """What agreement.json holds: ``reviewers``, ``pairs``, ``verdicts`` and ``reasons`` by lesion type, as rows."""
    rows = [(sample, review) for sample in samples for review in judged.reviews.get(sample.image, [])]
    names = sorted({review.reviewer for _, review in rows})
    return {
        "samples": len(samples),
        "never_reviewed": sum(sample.image not in judged.reviews for sample in samples),
        "renamed": judged.renamed,
        "changed": judged.changed,
        "unknown": judged.unknown,
        "reviewers": [_reviewer(name, [review for _, review in rows if review.reviewer == name]) for name in names],
        "pairs": [_pair(judged, samples, *pair) for pair in combinations(names, 2)],
        "verdicts": _by_type(rows, names, samples),
        "reasons": _reasons(rows),
    }


def _reviewer(name: str, reviews: Sequence[Review]) -> dict[str, Any]:
    counts = Counter(review.verdict for review in reviews)
    seconds = [review.seconds for review in reviews if review.seconds is not None]
    about = {verdict: counts[verdict] for verdict in VERDICTS}
    return {
        "reviewer": name,
        "judged": len(reviews),
        **about,
        "median_seconds": float(np.median(seconds)) if seconds else None,
    }


def _pair(judged: Judged, samples: Sequence[Sample], first: str, second: str) -> dict[str, Any]:
    """Two reviewers on the images that both have judged."""
    tables: dict[str, np.ndarray] = {}
    for sample in samples:
        said = {review.reviewer: VERDICTS.index(review.verdict) for review in judged.reviews.get(sample.image, [])}
        if first in said and second in said:
            table = tables.setdefault(sample.patient_id, np.zeros((3, 3), int))
            table[said[first], said[second]] += 1
    about: dict[str, Any] = {"first": first, "second": second, "both": 0, "patients": len(tables)}
    if not tables:
        return about
    by_patient = np.array(list(tables.values()))
    counts = by_patient.sum(axis=0)
    return about | {"both": int(counts.sum()), "table": counts.tolist()} | estimates(by_patient)


def _type_of(sample: Sample) -> str:
    return sample.lesion_type or UNKNOWN


def _by_type(rows: Sequence[tuple[Sample, Review]], names: Sequence[str], samples: Sequence[Sample]) -> list[Any]:
    """How often each reviewer gave each verdict to each lesion type."""
    counts = Counter((_type_of(sample), review.reviewer, review.verdict) for sample, review in rows)
    kinds = Counter(map(_type_of, samples))
    found = []
    for kind in sorted(kinds):
        for name in names:
            about = {verdict: counts[kind, name, verdict] for verdict in VERDICTS}
            known = {"lesion_type": kind, "images": kinds[kind], "reviewer": name, "judged": sum(about.values())}
            found.append(known | about)
    return found


def _reasons(rows: Sequence[tuple[Sample, Review]]) -> list[dict[str, Any]]:
    """Why images were rejected: how often each reason was given to each lesion type, the commonest first."""
    counts = Counter((r.reason or "(none given)", _type_of(s), r.reviewer) for s, r in rows if r.verdict == REJECT)
    keys = ("reason", "lesion_type", "reviewer")
    return [dict(zip(keys, key, strict=True)) | {"count": n} for key, n in sorted(counts.items(), key=_commonest)]


def _commonest(item: tuple[tuple[str, str, str], int]) -> tuple[int, tuple[str, str, str]]:
    return -item[1], item[0]
