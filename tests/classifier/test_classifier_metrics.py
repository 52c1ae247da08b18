"""The numbers of ldm/classifier/metrics.py against scikit-learn and torchmetrics; the intervals against plain loops."""

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from ldm.classifier.metrics import BINS, RESAMPLES, compute_groups, compute_metrics, point_values
from ldm.data.samples import Sample


def make_predictions(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), every class among them, and probabilities (N, K) that are often right and tied now and then."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    logits = rng.normal(0, 1.2, (count, classes)) + 1.5 * np.eye(classes)[labels]
    logits = np.round(logits, 1)
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def sensitivity_at(truth: np.ndarray, score: np.ndarray, specificity: float = 0.95) -> float:
    false_rate, true_rate, _ = sk.roc_curve(truth, score, drop_intermediate=False)
    return float(true_rate[1 - false_rate >= specificity - 1e-12].max())


def make_samples(kinds: list[str], grades: list[str]) -> list[Sample]:
    """One sample a patient; its kind is a lesion type or ``healthy``."""
    made = []
    for i, (kind, grade) in enumerate(zip(kinds, grades, strict=True)):
        prompt, box = "healthy" if kind == "healthy" else "a lesion", (0.0, 0.0, 0.0, 0.0)
        about = {"patient_id": f"p{i}", "lesion_type": kind, "severity": grade}
        made.append(Sample(f"s{i}", Path("image.png"), None, prompt, box, **about))
    return made


def test_binary_numbers_agree_with_sklearn_and_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, binary_specificity

    labels, probabilities = make_predictions(120, 2)
    truth, score = labels == 1, probabilities[:, 1]
    called = score >= 0.5
    expected = {
        "auc": sk.roc_auc_score(truth, score),
        "average_precision": sk.average_precision_score(truth, score),
        "accuracy": sk.accuracy_score(truth, called),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, called),
        "precision": sk.precision_score(truth, called),
        "recall": sk.recall_score(truth, called),
        "specificity": sk.recall_score(~truth, ~called),
        "f1": sk.f1_score(truth, called),
        "brier": sk.brier_score_loss(truth, score),
        "sensitivity_at_95_specificity": sensitivity_at(truth, score),
    }
    tensors = torch.from_numpy(score.copy()), torch.from_numpy(labels)
    expected["calibration_error"] = float(binary_calibration_error(*tensors, n_bins=BINS, norm="l1"))
    assert expected["specificity"] == pytest.approx(float(binary_specificity(*tensors)))
    assert point_values(labels, probabilities) == pytest.approx(expected, abs=1e-6)


def test_numbers_by_type_agree_with_sklearn_and_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_specificity

    labels, probabilities = make_predictions(150, 4)
    named = probabilities.argmax(1)
    tensors = torch.from_numpy(probabilities), torch.from_numpy(labels)
    expected = {
        "macro_auc": sk.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "macro_average_precision": sk.average_precision_score(np.eye(4)[labels], probabilities),
        "macro_precision": sk.precision_score(labels, named, average="macro"),
        "macro_recall": sk.balanced_accuracy_score(labels, named),
        "macro_specificity": float(multiclass_specificity(*tensors, num_classes=4)),
        "macro_f1": sk.f1_score(labels, named, average="macro"),
        "type_accuracy": sk.accuracy_score(labels, named),
        "type_calibration_error": float(multiclass_calibration_error(*tensors, num_classes=4, n_bins=BINS)),
    }
    found = point_values(labels, probabilities)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(labels > 0, probabilities[:, 1:].sum(1)))


def test_class_that_is_never_named_counts_as_in_sklearn() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]] * 2)
    named = probabilities.argmax(1)
    assert 2 not in named
    found = point_values(labels, probabilities)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["macro_precision"] == pytest.approx(sk.precision_score(labels, named, average="macro"))
        assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, named, average="macro"))


def test_each_lesion_type_against_healthy_agrees_with_sklearn() -> None:
    labels, probabilities = make_predictions(120, 2)
    truth, score = labels == 1, probabilities[:, 1]
    kinds = np.where(truth, np.resize(["a", "b", "c", "", ""], 120), "healthy")
    patients = [f"p{number}" for number in range(120)]
    found = compute_metrics(labels, probabilities, patients, kinds=kinds.tolist())["macro_auc_by_type"]
    groups = [~truth | (kinds == kind) for kind in sorted(set(kinds) - {"", "healthy"})]
    assert found["value"] == pytest.approx(np.mean([sk.roc_auc_score(truth[g], score[g]) for g in groups]))
    assert found["low"] < found["value"] < found["high"]
    few = np.where(
        (kinds == kinds[1]) & (np.arange(120) > 30), "", kinds
    )  # of a type that fewer than ten patients have
    assert compute_metrics(labels, probabilities, patients, kinds=few.tolist())["macro_auc_by_type"]["low"] is None
    assert "macro_auc_by_type" not in compute_metrics(labels, probabilities, patients)


def test_table_by_lesion_type_and_severity_is_each_group_against_healthy() -> None:
    labels, probabilities = make_predictions(160, 2)
    truth, score = labels == 1, probabilities[:, 1]
    kinds = np.where(truth, np.resize(["lytic", "Lytic", "blastic", "blastic", ""], 160), "healthy").tolist()
    grades = np.where(truth, np.resize(["mild", "severe", "mild"], 160), "").tolist()
    rows = compute_groups(truth, score, make_samples(kinds, grades))
    named = {(row["lesion_type"], row["severity"]): row for row in rows}
    assert list(named) == [
        *(("all", "mild"), ("all", "severe"), ("blastic", "all"), ("blastic", "mild"), ("blastic", "severe")),
        *(("lytic", "all"), ("lytic", "mild"), ("lytic", "severe")),
    ]
    lower = np.array([kind.lower() for kind in kinds])
    for (kind, grade), row in named.items():
        inside = truth & ((lower == kind) | (kind == "all")) & ((np.array(grades) == grade) | (grade == "all"))
        kept = ~truth | inside
        assert (row["n"], row["n_patients"]) == (inside.sum(), inside.sum())
        assert row["auc"]["value"] == pytest.approx(sk.roc_auc_score(inside[kept], score[kept]))
        assert row["recall"]["value"] == pytest.approx(np.mean(score[inside] >= 0.5))
        at = row["sensitivity_at_95_specificity"]["value"]
        assert at == pytest.approx(sensitivity_at(inside[kept], score[kept]))
        assert (row["auc"]["low"] is None) == (inside.sum() < 10)


def test_intervals_are_those_of_resampled_patients() -> None:
    labels, probabilities = make_predictions(120, 2)
    order = np.random.default_rng(1).permutation(120)
    labels, probabilities = labels[order], probabilities[order]
    owner = np.arange(120) // 3
    plain = {
        "auc": lambda t, s: sk.roc_auc_score(t, s),
        "average_precision": lambda t, s: sk.average_precision_score(t, s),
        "balanced_accuracy": lambda t, s: np.mean([np.mean(s[t] >= 0.5), np.mean(s[~t] < 0.5)]),
        "precision": lambda t, s: np.mean(t[s >= 0.5]),
    }
    rng = np.random.default_rng(0)
    values = {name: [] for name in plain}
    for _ in range(500):
        rows = np.concatenate([np.flatnonzero(owner == patient) for patient in rng.integers(40, size=40)])
        for name, number in plain.items():
            values[name].append(number(labels[rows] == 1, probabilities[rows, 1]))
    measured = compute_metrics(labels, probabilities, [f"p{number}" for number in owner])
    for name, drawn in values.items():
        found = measured[name]
        assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02), name
        assert found["skipped"] == 0


def test_more_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    labels, probabilities = make_predictions(40, 2)
    patients = [f"p{number}" for number in range(40)]
    once = compute_metrics(labels, probabilities, patients)["auc"]
    again = compute_metrics(np.tile(labels, 5), np.tile(probabilities, (5, 1)), patients * 5)["auc"]
    assert again == pytest.approx(once)


def test_resamples_of_one_class_are_skipped_and_counted() -> None:
    labels = np.array([1, 0, 0, 0, 0, 0])
    probabilities = np.array([[0.3, 0.7], [0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    measured = compute_metrics(labels, probabilities, list("abcdef"))
    # the diseased patient is left out of a resample with probability (5/6)^6 = 0.335
    assert measured["auc"]["skipped"] == pytest.approx(0.335 * RESAMPLES, rel=0.15)
    assert measured["accuracy"]["skipped"] == 0
    assert (measured["auc"]["low"], measured["auc"]["high"]) == (None, None)  # of one diseased patient


@pytest.mark.parametrize("diseased", [9, 10])
def test_an_interval_needs_ten_patients_of_each_class_that_it_is_about(diseased: int) -> None:
    labels = np.array([0] * 30 + [1] * diseased + [2] * 40)
    patients = [f"p{number}" for number in range(len(labels))]
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], len(labels))
    by_type = compute_metrics(labels, probabilities, patients)
    assert by_type["auc"]["low"] < by_type["auc"]["high"]  # 30 healthy and more than 10 diseased patients
    assert (by_type["macro_auc"]["low"] is None) == (by_type["type_accuracy"]["low"] is None) == (diseased < 10)
    kept = labels < 2
    patients = [patient for patient, keep in zip(patients, kept, strict=True) if keep]
    binary = compute_metrics(labels[kept], probabilities[kept][:, :2], patients)
    assert (binary["auc"]["low"] is None) == (binary["accuracy"]["low"] is None) == (diseased < 10)
    doubled = [patients[0] if place < 25 else patient for place, patient in enumerate(patients)]
    assert compute_metrics(labels[kept], probabilities[kept][:, :2], doubled)["auc"]["low"] is None  # 6 healthy ones


def test_what_is_undefined_is_none_and_one_patient_has_no_interval() -> None:
    labels, probabilities = np.zeros(4, int), np.array([[0.9, 0.1]] * 4)
    measured = compute_metrics(labels, probabilities, list("abcd"))
    for name in ("auc", "average_precision", "balanced_accuracy", "precision", "recall", "f1"):
        assert measured[name] == {"value": None, "low": None, "high": None, "skipped": RESAMPLES}, name
    assert measured["specificity"]["value"] == 1
    single = compute_metrics(*make_predictions(20, 2), ["same"] * 20)
    assert single["auc"]["value"] is not None
    assert (single["auc"]["low"], single["auc"]["high"]) == (None, None)


def test_same_seed_same_interval() -> None:
    labels, probabilities = make_predictions(30, 2)
    patients = [f"p{number}" for number in range(30)]
    assert compute_metrics(labels, probabilities, patients, 1) == compute_metrics(labels, probabilities, patients, 1)
    assert compute_metrics(labels, probabilities, patients, 1) != compute_metrics(labels, probabilities, patients, 2)


def test_a_thousand_resamples_take_moments() -> None:
    labels, probabilities = make_predictions(1500, 2)
    patients = [f"p{number // 2}" for number in range(1500)]
    start = time.process_time()
    compute_metrics(labels, probabilities, patients)
    assert time.process_time() - start < 3
