"""Agreement between readers, and of each reader with himself: Fleiss' kappa, Cohen's kappa with quadratic weights."""

import warnings
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from sklearn.metrics import cohen_kappa_score

from ldm.readers.answers import CALLED_DRAWN, STEPS, Key, Reader, Readings, as_number


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' kappa (1971) from (N, K): how many readers gave item n the answer k. None where it is undefined.

    Items may have different numbers of answers; those with fewer than two do not count.
    """
    counts = counts[counts.sum(axis=1) >= 2].astype(float)
    if not len(counts):
        return None
    totals = counts.sum(axis=1)
    observed = (((counts**2).sum(axis=1) - totals) / (totals * (totals - 1))).mean()
    expected = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return None if expected > 1 - 1e-12 else float((observed - expected) / (1 - expected))


def answer_counts(readings: Readings, calls: bool) -> np.ndarray:
    """(N, K) for ``fleiss_kappa``: of the answers as given, or of ``calls``, real or drawn."""
    values, answers = np.array([0, 1] if readings.pairs else STEPS), readings.answers
    if calls and not readings.pairs:
        values, answers = np.array([0, 1]), np.where(np.isnan(answers), np.nan, answers >= CALLED_DRAWN)
    return (answers[:, :, None] == values).sum(axis=0)


def weighted_kappa(first: Sequence[float], second: Sequence[float], pairs: bool) -> float | None:
    """Cohen's kappa of two lists of answers to the same items, with quadratic weights; None where it is undefined.

    Of pairs there are two answers, where weights change nothing.
    """
    if len(first) < 2:
        return None
    labels = [0, 1] if pairs else list(STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a division by zero, where both gave one answer to everything
        found = cohen_kappa_score(np.array(first, int), np.array(second, int), labels=labels, weights="quadratic")
    return None if np.isnan(found) else float(found)


def pairwise_kappas(readings: Readings) -> dict[tuple[int, int], float | None]:
    """The weighted kappa of every two readers, by their numbers, on the items that both have answered."""
    found = {}
    for first, second in combinations(range(len(readings.readers)), 2):
        both = ~np.isnan(readings.answers[[first, second]]).any(axis=0)
        ours, theirs = readings.answers[[first, second]][:, both]
        found[first, second] = weighted_kappa(ours, theirs, readings.pairs)
    return found


def repeated_answers(key: Key, reader: Reader) -> tuple[list[float], list[float]]:
    """What a reader said of the hidden repeats the first and the second time, as ``Readings`` has it.

    A repeated pair has changed sides, so the second answer is turned back.
    """
    first, second = [], []
    for item, about in key.items.items():
        answers = [as_number(key, reader, name) for name in (about["repeat_of"], item) if name]
        if len(answers) == 2 and not np.isnan(answers).any():
            first.append(answers[0])
            second.append(1 - answers[1] if key.pairs else answers[1])
    return first, second


def intra_kappa(key: Key, readers: Sequence[Reader]) -> float | None:
    """The weighted kappa of all these readers' repeats together; None where it is undefined."""
    both = [repeated_answers(key, reader) for reader in readers]
    first, second = ([value for each in both for value in each[k]] for k in (0, 1))
    return weighted_kappa(first, second, key.pairs)


def agreement_bounds(readings: Readings, draws: np.ndarray) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of Fleiss' kappa of calls and of steps over resampled items.

    ``draws`` (B, N): how often each item counts. None where most resamples leave it undefined.
    """
    found = {}
    for name, calls in (("fleiss_calls", True), ("fleiss_steps", False)):
        counts = answer_counts(readings, calls)
        values = [fleiss_kappa(np.repeat(counts, draw, axis=0)) for draw in draws]
        known = [value for value in values if value is not None]
        found[name] = tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) > len(values) / 2 else None
    return found
