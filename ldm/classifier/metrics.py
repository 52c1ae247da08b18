"""Numbers of a classifier's predictions, each with a 95 % bootstrap interval over patients. No torch.

Disease against health: P(disease) is the sum over all lesion classes, and P >= 0.5 is called diseased; the threshold is
not tuned. Of lesion types, the most probable class is named; their numbers are means over one-against-rest problems.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.classifier.data import DISEASED, HEALTHY, ImageSet
from ldm.core.files import named_seed
from ldm.data.checks import FEWEST_PATIENTS

THRESHOLD = 0.5
RESAMPLES = 1000  # of patients, for the intervals
BINS = 10  # of equal width, for the calibration error
AVERAGED = ("auc", "average_precision", "precision", "recall", "specificity", "f1")  # over classes, as macro_...
ELEMENTS = 4_000_000  # resamples x samples held at once


def disease_probability(probabilities: np.ndarray) -> np.ndarray:
    """Sum over the classes other than healthy, from (N, K): keeps digits that 1 - P(healthy) would lose."""
    return probabilities[:, 1:].sum(1)


def predicted_classes(probabilities: np.ndarray) -> np.ndarray:
    """Class index (N,) from (N, K): of two classes diseased at P >= 0.5, of more the most probable one."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= THRESHOLD).astype(int)
    return probabilities.argmax(1)


def summarise(images: ImageSet, probabilities: np.ndarray, classes: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """What metrics.json says about a test set: ``test`` (see ``compute_metrics``), counts, confusion matrix and notes.

    ``probabilities`` (N, K), column 0 = healthy.
    """
    labels = label_indices(images, classes)
    truth, called = labels > 0, disease_probability(probabilities) >= THRESHOLD
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (labels, predicted_classes(probabilities)), 1)
    patients = [sample.patient_id for sample in images.samples]
    measured = compute_metrics(labels, probabilities, patients, seed)
    return {
        "test": measured,
        "threshold": THRESHOLD,
        "resamples": RESAMPLES,
        "calibration_bins": BINS,
        "n_test": len(images),
        "n_test_diseased": int(truth.sum()),
        "n_test_patients": len(set(patients)),
        "tp": int(np.sum(called & truth)),
        "fp": int(np.sum(called & ~truth)),
        "fn": int(np.sum(~called & truth)),
        "tn": int(np.sum(~called & ~truth)),
        "confusion": confusion.tolist(),  # rows: truth, columns: prediction, both in the order of classes
        "notes": _notes(images, measured, truth),
    }


def label_indices(images: ImageSet, classes: Sequence[str]) -> np.ndarray:
    """The true classes (N,) as positions in ``classes``."""
    return np.array([classes.index(label) for label in images.labels])


def _notes(images: ImageSet, measured: Mapping[str, Mapping[str, Any]], truth: np.ndarray) -> list[str]:
    notes = []
    if len(np.unique(truth)) < 2:
        only = "diseased" if truth.any() else "healthy"
        notes.append(f"The test set holds only {only} samples: the AUC is undefined.")
    elif measured["precision"]["value"] is None:
        notes.append("No test sample was called diseased: the precision is undefined.")
    patients = [sample.patient_id for sample in images.samples]
    names = np.where(truth, DISEASED, HEALTHY)
    counts = patients_by_class(images.labels, patients) | patients_by_class(names, patients)
    few = [f"{count} {name}" for name, count in counts.items() if count < FEWEST_PATIENTS]
    if few:
        notes.append(
            f"The test set holds few patients of a class ({', '.join(sorted(few))}): an interval from fewer than "
            f"{FEWEST_PATIENTS} is meaningless and left out."
        )
    skipped = max((entry["skipped"] for entry in measured.values() if entry["low"] is not None), default=0)
    if skipped:
        notes.append(
            f"In up to {skipped} of {RESAMPLES} resamples a number was undefined (a class is missing, or nothing was "
            "called diseased); its interval is over the others."
        )
    return notes


def patients_by_class(classes: Sequence[Any] | np.ndarray, patients: Sequence[str]) -> dict[Any, int]:
    """How many patients have samples of each class, from the class and the patient of every sample."""
    return dict(Counter(name for name, _ in set(zip(classes, patients, strict=True))))


def compute_metrics(
    labels: np.ndarray, probabilities: np.ndarray, patients: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every number by name: ``value``, ``low`` and ``high`` (95 % percentile interval), ``skipped`` resamples.

    ``labels`` (N,) class indices, 0 = healthy; ``probabilities`` (N, K). The patients are resampled with replacement,
    RESAMPLES times; a resample where a number is undefined is skipped and counted. Undefined values are None, and so
    are intervals where a class that the number is about has fewer than FEWEST_PATIENTS patients.
    """
    values = point_values(labels, probabilities)
    fewest_of_type = min(patients_by_class(labels, patients).values())
    fewest = min(patients_by_class(labels > 0, patients).values())
    known = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    owner = np.array([known[patient] for patient in patients])
    rng = np.random.default_rng(named_seed(seed, "bootstrap"))
    draws = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=RESAMPLES)
    pieces = np.array_split(draws, -(-RESAMPLES * len(labels) // ELEMENTS))
    resampled = [_numbers(labels, probabilities, piece[:, owner].astype(float)) for piece in pieces]
    measured = {}
    for name, value in values.items():
        values_again = np.concatenate([numbers[name] for numbers in resampled])
        defined = values_again[~np.isnan(values_again)]
        enough = (fewest_of_type if name.startswith(("macro_", "type_")) else fewest) >= FEWEST_PATIENTS
        shown = value is not None and enough and len(defined)
        low, high = np.percentile(defined, [2.5, 97.5]).tolist() if shown else (None, None)
        measured[name] = {"value": value, "low": low, "high": high, "skipped": RESAMPLES - len(defined)}
    return measured


def point_values(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Every number by name, None where undefined, without intervals; arguments as for ``compute_metrics``."""
    numbers = _numbers(labels, probabilities, np.ones((1, len(labels))))
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in numbers.items()}


def _numbers(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    truth, score = labels > 0, disease_probability(probabilities)
    numbers = _binary(truth, score, score >= THRESHOLD, weights)
    numbers["calibration_error"] = _calibration_error(truth, score, weights)
    return numbers if probabilities.shape[1] == 2 else numbers | _by_type(labels, probabilities, weights)


def _binary(truth: np.ndarray, score: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    cells = np.stack([called & truth, called & ~truth, ~called & truth, ~called & ~truth], axis=1)
    tp, fp, fn, tn = (weights @ cells).T
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    auc, average_precision = _ranking(truth, score, weights)
    return {
        "auc": auc,
        "average_precision": average_precision,
        "accuracy": (tp + tn) / weights.sum(1),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": _ratio(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def _ranking(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC (ties count half) and average precision (a step at each distinct score); NaN without both classes."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # of runs of equal scores, highest first
    weights, truth = weights[:, order], truth[order]
    positive = np.add.reduceat(weights * truth, starts, axis=1)
    negative = np.add.reduceat(weights * ~truth, starts, axis=1)
    found, alarms = positive.cumsum(1), negative.cumsum(1)
    positives, negatives = found[:, -1], alarms[:, -1]
    beaten = negatives[:, None] - alarms + 0.5 * negative
    precision = np.divide(found, found + alarms, out=np.zeros_like(found), where=found > 0)
    both = np.where((positives > 0) & (negatives > 0), positives, np.nan)
    return (positive * beaten).sum(1) / (both * negatives.clip(1)), (positive * precision).sum(1) / both


def _by_type(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Means over the classes that ``labels`` hold, each against the rest; NaN in a resample that lacks one of them.

    A class that is never named has precision 0, as in scikit-learn.
    """
    named = probabilities.argmax(1)
    parts = [_binary(labels == k, probabilities[:, k], named == k, weights) for k in np.unique(labels)]
    for part in parts:
        part["precision"] = np.where(np.isnan(part["recall"]), np.nan, np.nan_to_num(part["precision"]))
    numbers = {f"macro_{name}": np.mean([part[name] for part in parts], axis=0) for name in AVERAGED}
    numbers["type_accuracy"] = (weights @ (named == labels)) / weights.sum(1)
    numbers["type_calibration_error"] = _calibration_error(named == labels, probabilities.max(1), weights)
    return numbers


def _calibration_error(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: mean over samples of |share of ``truth`` - mean score| of their bin of scores."""
    bins = calibration_bins(score)[:, None] == np.arange(BINS)
    gaps = weights @ (bins * (truth - score)[:, None])
    return np.abs(gaps).sum(1) / weights.sum(1)


def calibration_bins(score: np.ndarray) -> np.ndarray:
    """The bin of each score (N,) in [0, 1]: 0 to BINS - 1."""
    return np.minimum((score * BINS).astype(int), BINS - 1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
