"""Numbers of a classifier's predictions, each with a 95 % bootstrap interval over patients. No torch.

Disease against health: P(disease) is the sum over all lesion classes, and P >= 0.5 is called diseased; the threshold is
not tuned. Of lesion types, the most probable class is named; their numbers are means over one-against-rest problems.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.classifier.data import DISEASED, HEALTHY, ImageSet
from ldm.core.files import named_seed
from ldm.data.checks import FEWEST_PATIENTS
from ldm.data.samples import Sample

THRESHOLD = 0.5
RESAMPLES = 1000  # of patients, for the intervals
BINS = 10  # of equal width, for the calibration error
SPECIFICITY = 0.95  # at which the sensitivity is measured
MOST_GROUPS = 30  # rows of the table by lesion type and severity, the largest ones
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
    kinds = [known_kind(sample) for sample in images.samples]
    measured = compute_metrics(labels, probabilities, patients, seed, kinds)
    return {
        "test": measured,
        "groups": compute_groups(truth, disease_probability(probabilities), images.samples, seed),
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


def known_kind(sample: Sample) -> str:
    """``healthy``, or the lesion type in lower case of a diseased sample; "" where that is not known."""
    kind = (sample.lesion_type or "").strip().lower()
    return HEALTHY if sample.healthy else "" if kind == HEALTHY else kind


def _notes(images: ImageSet, measured: Mapping[str, Mapping[str, Any]], truth: np.ndarray) -> list[str]:
    notes = []
    if len(np.unique(truth)) < 2:
        only = "diseased" if truth.any() else "healthy"
        notes.append(f"The test set holds only {only} samples: the AUC is undefined.")
    elif measured["precision"]["value"] is None:
        notes.append("No test sample was called diseased: the precision is undefined.")
    if few := few_patients(images):
        notes.append(
            f"The test set holds few patients of a class ({few}): an interval from fewer than {FEWEST_PATIENTS} is "
            "meaningless and left out."
        )
    skipped = max((entry["skipped"] for entry in measured.values() if entry["low"] is not None), default=0)
    if skipped:
        notes.append(
            f"In up to {skipped} of {RESAMPLES} resamples a number was undefined (a class is missing, or nothing was "
            "called diseased); its interval is over the others."
        )
    return notes


def few_patients(images: ImageSet) -> str:
    """The classes of a set that fewer than FEWEST_PATIENTS patients show, with their number; "" where there are none.

    Healthy and diseased count as classes too, also where lesion types are told apart.
    """
    patients = [sample.patient_id for sample in images.samples]
    sides = [HEALTHY if label == HEALTHY else DISEASED for label in images.labels]
    counts = {HEALTHY: 0, DISEASED: 0} | patients_by_class(images.labels, patients) | patients_by_class(sides, patients)
    return ", ".join(sorted(f"{count} {name}" for name, count in counts.items() if count < FEWEST_PATIENTS))


def patients_by_class(classes: Sequence[Any] | np.ndarray, patients: Sequence[str]) -> dict[Any, int]:
    """How many patients have samples of each class, from the class and the patient of every sample."""
    return dict(Counter(name for name, _ in set(zip(classes, patients, strict=True))))


def compute_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[str],
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every number by name: ``value``, ``low`` and ``high`` (95 % percentile interval), ``skipped`` resamples.

    ``labels`` (N,) class indices, 0 = healthy; ``probabilities`` (N, K); ``kinds``: see ``known_kind``. The patients
    are resampled with replacement, RESAMPLES times; a resample where a number is undefined is skipped and counted.
    Undefined values are None, and so are intervals where a class that the number is about has fewer than
    FEWEST_PATIENTS patients.
    """
    truth, score = labels > 0, disease_probability(probabilities)
    each_kind = np.array(kinds if kinds is not None else [""] * len(labels))
    known = each_kind != ""

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every number (B,) by name, for each row of ``weights`` (B, N) of the samples."""
        found = _numbers(labels, probabilities, weights)
        return found | _by_kind(truth, score, each_kind, weights) if (truth & known).any() else found

    of_sides, of_types = (patients_by_class(each, patients).values() for each in (truth, labels))
    of_kinds = patients_by_class(each_kind[known], np.array(patients)[known]).values()
    enough = {"macro_": min(of_types), "type_": min(of_types), "macro_auc_by_type": min(of_kinds, default=0)}

    def fewest(name: str) -> int:
        """Patients of the rarest class that the number ``name`` is about."""
        return enough.get(name, enough.get(f"{name.partition('_')[0]}_", min(of_sides)))

    return with_intervals(measure, patients, fewest, seed)


def compute_groups(
    truth: np.ndarray, score: np.ndarray, samples: Sequence[Sample], seed: int = 0
) -> list[dict[str, Any]]:
    """The diseased samples of each lesion type and severity, each group against all healthy ones.

    A row has ``lesion_type`` and ``severity`` ("all" where it is about all of them), ``n`` samples, ``n_patients`` and,
    as ``compute_metrics`` gives them, ``auc``, ``recall`` and ``sensitivity_at_95_specificity``. At most MOST_GROUPS
    rows, those with the most samples.
    """
    return [
        {"lesion_type": kind, "severity": severity} | _group(truth, score, samples, inside, seed)
        for (kind, severity), inside in sample_groups(samples).items()
    ]


def _group(
    truth: np.ndarray, score: np.ndarray, samples: Sequence[Sample], inside: np.ndarray, seed: int
) -> dict[str, Any]:
    """What ``compute_groups`` says of the samples ``inside`` (N,) a group."""
    kept = np.flatnonzero(~truth | inside)
    group, scores = inside[kept], score[kept]
    patients = [samples[i].patient_id for i in kept.tolist()]
    among = patients_by_class(group, patients)
    fewest = min(among.get(True, 0), among.get(False, 0))

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = _binary(group, scores, scores >= THRESHOLD, weights)
        return {name: found[name] for name in ("auc", "recall", "sensitivity_at_95_specificity")}

    numbers = with_intervals(measure, patients, lambda _: fewest, seed)
    return {"n": int(inside.sum()), "n_patients": among[True]} | numbers


def sample_groups(samples: Sequence[Sample]) -> dict[tuple[str, str], np.ndarray]:
    """Which (N,) samples are diseased and of a lesion type and severity, by both; "all" stands for any of them.

    Only types and severities that are known; the MOST_GROUPS largest groups, sorted by name, "all" first.
    """
    kinds = np.array(["" if sample.healthy else known_kind(sample) for sample in samples])
    grades = np.array(["" if sample.healthy else (sample.severity or "").strip().lower() for sample in samples])
    found = {}
    for kind in ("all", *sorted(set(kinds) - {""})):
        for grade in ("all", *sorted(set(grades) - {""})):
            inside = ((kinds == kind) | (kind == "all")) & ((grades == grade) | (grade == "all"))
            if (kind, grade) != ("all", "all") and inside.any():
                found[kind, grade] = inside
    largest = sorted(found, key=lambda names: -found[names].sum())[:MOST_GROUPS]
    return {names: inside for names, inside in found.items() if names in largest}


def with_intervals(
    measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    patients: Sequence[str],
    fewest: Callable[[str], int],
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Numbers of N samples with 95 % intervals by bootstrap over their patients, as ``compute_metrics`` gives them.

    ``measure`` makes of weights (R, N), how often each sample counts, the numbers (R,) by name, NaN where undefined;
    ``fewest`` tells how many patients the smallest class has that a number is about.
    """
    count = len(patients)
    values = measure(np.ones((1, count)))
    known = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    owner = np.array([known[patient] for patient in patients])
    rng = np.random.default_rng(named_seed(seed, "bootstrap"))
    draws = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=RESAMPLES)
    pieces = np.array_split(draws, -(-RESAMPLES * count // ELEMENTS))
    resampled = [measure(piece[:, owner].astype(float)) for piece in pieces]
    measured = {}
    for name, (value,) in values.items():
        values_again = np.concatenate([numbers[name] for numbers in resampled])
        defined = values_again[~np.isnan(values_again)]
        shown = not np.isnan(value) and fewest(name) >= FEWEST_PATIENTS and len(defined)
        low, high = np.percentile(defined, [2.5, 97.5]).tolist() if shown else (None, None)
        point = None if np.isnan(value) else float(value)
        measured[name] = {"value": point, "low": low, "high": high, "skipped": RESAMPLES - len(defined)}
    return measured


def point_values(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Every number by name, None where undefined, without intervals; arguments as for ``compute_metrics``."""
    numbers = _numbers(labels, probabilities, np.ones((1, len(labels))))
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in numbers.items()}


def _numbers(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    truth, score = labels > 0, disease_probability(probabilities)
    numbers = _binary(truth, score, score >= THRESHOLD, weights)
    numbers["calibration_error"] = _calibration_error(truth, score, weights)
    numbers["brier"] = weights @ (score - truth) ** 2 / weights.sum(1)
    return numbers if probabilities.shape[1] == 2 else numbers | _by_type(labels, probabilities, weights)


def _binary(truth: np.ndarray, score: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    cells = np.stack([called & truth, called & ~truth, ~called & truth, ~called & ~truth], axis=1)
    tp, fp, fn, tn = (weights @ cells).T
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    auc, average_precision, sensitivity = _ranking(truth, score, weights)
    return {
        "auc": auc,
        "average_precision": average_precision,
        "sensitivity_at_95_specificity": sensitivity,
        "accuracy": (tp + tn) / weights.sum(1),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": _ratio(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def _ranking(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC (ties count half), average precision (a step at each distinct score) and the highest recall of all thresholds
    whose specificity is at least SPECIFICITY; NaN without both classes."""
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
    allowed = alarms <= (1 - SPECIFICITY) * negatives[:, None] + 1e-9
    auc = (positive * beaten).sum(1) / (both * negatives.clip(1))
    return auc, (positive * precision).sum(1) / both, (found * allowed).max(1) / both


def _by_kind(truth: np.ndarray, score: np.ndarray, kinds: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The mean AUC of P(disease) over the known lesion types, each against all healthy samples."""
    aucs = []
    for kind in sorted(set(kinds[truth]) - {""}):
        kept = ~truth | (kinds == kind)
        aucs.append(_ranking(truth[kept], score[kept], weights[:, kept])[0])
    return {"macro_auc_by_type": np.mean(aucs, axis=0)}


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
