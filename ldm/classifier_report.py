"""Numbers, tables and plots of a classifier's predictions. No torch."""

import csv
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.classifier_data import HEALTHY, ImageSet
from ldm.files import atomic_file, named_seed, write_text

log = logging.getLogger(__name__)

THRESHOLD = 0.5
RESAMPLES = 500  # patients resampled for the interval of the AUC
REJECT_COLUMNS = ["set", "sample_id", "file", "reason"]


def auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve; None where ``truth`` (N,) holds one class only."""
    from sklearn.metrics import roc_auc_score

    return None if len(np.unique(truth)) < 2 else float(roc_auc_score(truth, score))


def macro_auc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Mean one-against-rest AUC over the classes present; ``labels`` (N,) indices, ``probabilities`` (N, K)."""
    values = [auc(labels == k, probabilities[:, k]) for k in range(probabilities.shape[1])]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def auc_interval(truth: np.ndarray, score: np.ndarray, patients: Sequence[str], seed: int = 0) -> list[float] | None:
    """95 % percentile bootstrap interval of the AUC, patients resampled with replacement; None where undefined."""
    if len(np.unique(truth)) < 2:
        return None
    known = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    owner = np.array([known[patient] for patient in patients])
    rng = np.random.default_rng(named_seed(seed, "bootstrap"))
    draws = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=RESAMPLES)
    weights = draws[:, owner].astype(np.float32)  # (resamples, N): how often each sample was drawn
    positive, negative = score[truth][:, None], score[~truth][None, :]
    wins = (positive > negative).astype(np.float32) + 0.5 * (positive == negative)  # the AUC is their weighted mean
    pairs = weights[:, truth].sum(1) * weights[:, ~truth].sum(1)
    won = ((weights[:, truth] @ wins) * weights[:, ~truth]).sum(1)
    defined = pairs > 0  # a resample may hold one class only
    if not defined.any():
        return None
    return [float(bound) for bound in np.percentile(won[defined] / pairs[defined], [2.5, 97.5])]


def measure(images: ImageSet, probabilities: np.ndarray, classes: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The test numbers: ``probabilities`` (N, K), column 0 = healthy. What is undefined is None, with a note.

    Disease against health is decided at P(disease) >= 0.5; for lesion types the most probable class is named.
    """
    from sklearn.metrics import average_precision_score

    labels = np.array([classes.index(label) for label in images.labels])
    truth, score = labels > 0, disease_probability(probabilities)
    called = score >= THRESHOLD
    tp, fp = int(np.sum(called & truth)), int(np.sum(called & ~truth))
    fn, tn = int(np.sum(~called & truth)), int(np.sum(~called & ~truth))
    recall, specificity = _share(tp, tp + fn), _share(tn, tn + fp)
    both = recall is not None and specificity is not None
    numbers: dict[str, Any] = {
        "auc": auc(truth, score),
        "auc_ci95": auc_interval(truth, score, [s.patient_id for s in images.samples], seed),
        "average_precision": float(average_precision_score(truth, score)) if both else None,
        "accuracy": _share(tp + tn, len(truth)),
        "balanced_accuracy": (recall + specificity) / 2 if both else None,
        "precision": _share(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": _share(2 * tp, 2 * tp + fp + fn),
        "threshold": THRESHOLD,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "n_test": len(images),
        "n_test_diseased": int(truth.sum()),
        "notes": [],
    }
    if not both:
        only = "diseased" if truth.any() else "healthy"
        numbers["notes"].append(f"The test set holds only {only} samples: the AUC is undefined.")
    if numbers["precision"] is None:
        numbers["notes"].append("No test sample was called diseased: the precision is undefined.")
    if len(classes) > 2 or classes[1] != "diseased":
        named = probabilities.argmax(1)
        confusion = np.zeros((len(classes), len(classes)), dtype=int)
        np.add.at(confusion, (labels, named), 1)
        numbers["macro_auc"] = macro_auc(labels, probabilities)
        numbers["type_accuracy"] = float(np.mean(labels == named))
        numbers["confusion"] = confusion.tolist()  # rows: truth, columns: prediction, both in the order of classes
    return numbers


def disease_probability(probabilities: np.ndarray) -> np.ndarray:
    """Sum over the classes other than healthy, from (N, K): keeps digits that 1 - P(healthy) would lose."""
    return probabilities[:, 1:].sum(1)


def predicted_class(row: np.ndarray, classes: Sequence[str]) -> str:
    """Binary: diseased at P >= 0.5; by lesion type: the most probable class. ``row`` (K,)."""
    if len(classes) == 2:
        return classes[int(row[1] >= THRESHOLD)]
    return classes[int(row.argmax())]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# --- tables -----------------------------------------------------------------------------------------------------


def prediction_rows(images: ImageSet, probabilities: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per sample, as in predictions_*.csv: who it is, what it is, what the classifier says."""
    score = disease_probability(probabilities)
    rows = []
    for position, sample in enumerate(images.samples):
        rows.append(
            {
                "sample_id": sample.sample_id,
                "patient_id": sample.patient_id,
                "parent_id": sample.parent_id or "",
                "prompt": sample.prompt,
                "lesion_type": sample.lesion_type or "",
                "severity": sample.severity or "",
                "label": images.labels[position],
                "disease_probability": float(score[position]),
                "predicted": predicted_class(probabilities[position], classes),
                **{f"p_{name}": float(p) for name, p in zip(classes, probabilities[position], strict=True)},
            }
        )
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows atomically under the header ``columns`` (default: the first row's keys); None becomes empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_roc(path: Path, title: str, truth: np.ndarray, score: np.ndarray, interval: list[float] | None) -> None:
    """The ROC curve of P(disease); a picture that says so where it is undefined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    value = auc(truth, score)
    if value is None:
        axes.text(0.5, 0.5, "AUC undefined:\nthe test set holds one class", ha="center", va="center")
    else:
        from sklearn.metrics import roc_curve

        false_rate, true_rate, _ = roc_curve(truth, score)
        text = f"AUC {value:.3f}" + (f" (95 % {interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
        axes.plot(false_rate, true_rate, color="tab:blue", label=text)
        axes.legend(loc="lower right")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="1 - specificity", ylabel="recall", title=title, xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph of the dataset's name that the font lacks
        with atomic_file(path) as handle:
            figure.savefig(handle, format="png", dpi=120)


def write_test(
    folder: Path, images: ImageSet, probabilities: np.ndarray, metrics: dict[str, Any], title: str, suffix: str = ""
) -> None:
    """predictions_test.csv, roc.png and metrics.csv; the caller writes metrics.json last, as the sign of completion."""
    write_csv(folder / f"predictions_test{suffix}.csv", prediction_rows(images, probabilities, metrics["classes"]))
    truth = np.array([label != HEALTHY for label in images.labels])
    write_roc(folder / f"roc{suffix}.png", title, truth, disease_probability(probabilities), metrics["auc_ci95"])
    flat = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    interval = metrics["auc_ci95"] or [None, None]
    write_csv(folder / f"metrics{suffix}.csv", [{**flat, "auc_low": interval[0], "auc_high": interval[1]}])
