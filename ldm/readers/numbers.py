"""Accuracy and AUC of many readers of many pictures, with intervals over readers, over cases and over both.

Bootstrap: readers and, independently of them, cases are drawn with replacement (the pictures of one patient together,
real and drawn ones apart), as for a multi-reader multi-case study. The analysis of variance of Obuchowski and Rockette
(1995) with the degrees of freedom of Hillis (2007) stands beside it; its covariance of readers comes from the same
resampled cases. docs/readers.md has how often either holds the truth.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import t as student

from ldm.core.files import named_seed
from ldm.data.checks import FEWEST_PATIENTS
from ldm.readers.answers import CALLED_DRAWN, STEPS, Readings

RESAMPLES = 2000


def case_draws(readings: Readings, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """(B, N) int: how often each item counts in each resample. All items of a patient and a kind share theirs."""
    rng = np.random.default_rng(named_seed(seed, "cases of a reader study"))
    draws = np.zeros((resamples, len(readings.items)), int)
    kinds = np.zeros(len(readings.items), bool) if readings.pairs else readings.drawn
    patients = np.array(readings.patients)
    for kind in np.unique(kinds):
        inside = np.flatnonzero(kinds == kind)
        names, owner = np.unique(patients[inside], return_inverse=True)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        draws[:, inside] = drawn[:, owner]
    return draws


def reader_values(readings: Readings, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every number (B, R) by name, of each reader and each row of weights (B, N); NaN where it is undefined."""
    answers, drawn = readings.answers, readings.drawn
    known = ~np.isnan(answers)
    called = answers >= (1 if readings.pairs else CALLED_DRAWN)
    hits, weights = (called == drawn) & known, weights.astype(float)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        total = weights @ whole.T
        return np.divide(weights @ part.T, total, out=np.full(total.shape, np.nan), where=total > 0)

    found = {"accuracy": share(hits, known)}
    if readings.pairs:
        return found | {"called_left": share(called & known, known)}
    found |= {"sensitivity": share(hits & drawn, known & drawn), "specificity": share(hits & ~drawn, known & ~drawn)}
    return {"auc": _auc(readings, weights)} | found | {"called_drawn": share(called & known, known)}


def _auc(readings: Readings, weights: np.ndarray) -> np.ndarray:
    """(B, R): the share of pairs of a drawn and a real picture whose drawn one has the higher step; ties are half."""
    won = below = 0.0
    for step in STEPS:
        positive, negative = (
            weights @ ((readings.answers == step) & kind).T for kind in (readings.drawn, ~readings.drawn)
        )
        won, below = won + positive * (below + negative / 2), below + negative
    every = [weights @ (~np.isnan(readings.answers) & kind).T for kind in (readings.drawn, ~readings.drawn)]
    pairs = every[0] * every[1]
    return np.divide(won, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def measure(readings: Readings, seed: int = 0, names: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Every number of all readers: the mean over readers, its intervals, and those of each reader over cases.

    ``value``; ``low``, ``high``: readers and cases resampled; ``over_readers``, ``over_cases``: one of them alone;
    ``obuchowski_rockette``: [low, high]; ``readers``: a {value, low, high} each. Intervals are None where there are
    fewer than FEWEST_PATIENTS patients of a kind, those over readers with a single reader.
    """
    draws = case_draws(readings, seed)
    once = reader_values(readings, np.ones((1, len(readings.items))))
    again = reader_values(readings, draws)
    count = len(readings.readers)
    rng = np.random.default_rng(named_seed(seed, "readers of a reader study"))
    times = rng.multinomial(count, np.full(count, 1 / count), size=len(draws))
    enough = fewest_patients(readings) >= FEWEST_PATIENTS
    found = {}
    for name in names or once:
        values, resampled = once[name][0], again[name]
        both = _bounds(_means(resampled, times)) if enough and count > 1 else None
        cases = _bounds(_means(resampled, np.ones_like(times))) if enough else None
        low, high = both or (None, None)
        readers = []
        for value, column in zip(values, resampled.T, strict=True):
            least, most = (_bounds(column) if enough else None) or (None, None)
            readers.append({"value": _number(value), "low": least, "high": most})
        found[name] = {
            "value": _number(np.nanmean(values)) if not np.isnan(values).all() else None,
            "low": low,
            "high": high,
            "over_readers": _bounds(_means(np.broadcast_to(values, times.shape), times)) if count > 1 else None,
            "over_cases": cases,
            "obuchowski_rockette": obuchowski_rockette(values, resampled) if enough and count > 1 else None,
            "readers": readers,
        }
    return found


def obuchowski_rockette(values: np.ndarray, resampled: np.ndarray) -> list[float] | None:
    """[low, high] of the mean of the readers' ``values`` (R,); ``resampled`` (B, R): the same from resampled cases."""
    rows = resampled[~np.isnan(resampled).any(axis=1)]
    count = len(values)
    if np.isnan(values).any() or len(rows) < 2 or count < 2:
        return None
    covariances = np.cov(rows.T)
    shared = max((covariances.sum() - np.trace(covariances)) / (count * (count - 1)), 0.0)
    between = float(values.var(ddof=1))
    total = between + count * shared
    if total == 0:
        return None
    freedom = (count - 1) * (total / between) ** 2 if between > 0 else np.inf
    half = float(student.ppf(0.975, freedom) * np.sqrt(total / count))
    return [max(float(values.mean()) - half, 0.0), min(float(values.mean()) + half, 1.0)]


def fewest_patients(readings: Readings) -> int:
    """How many patients the smaller kind has; of pairs, how many there are."""
    kinds = [np.ones(len(readings.items), bool)] if readings.pairs else [readings.drawn, ~readings.drawn]
    return min(len(set(itertools.compress(readings.patients, kind))) for kind in kinds)


def _means(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(B,): the mean over readers of values (B, R), each counted ``times`` (B, R); NaN values do not count."""
    weights = times * ~np.isnan(values)
    total = weights.sum(axis=1)
    return np.divide(
        (np.nan_to_num(values) * weights).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0
    )


def _bounds(values: np.ndarray) -> tuple[float, float] | None:
    known = values[~np.isnan(values)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def shares_of_steps(readings: Readings) -> Mapping[str, list[float]]:
    """How often each step was given to real and to drawn pictures, all readers together: {kind: six shares}."""
    found = {}
    for name, kind in (("real", ~readings.drawn), ("drawn", readings.drawn)):
        given = readings.answers[:, kind]
        found[name] = [float((given == step).sum() / max((~np.isnan(given)).sum(), 1)) for step in STEPS]
    return found
