"""Tables and the page of a classifier's test: numbers, curves, confusion matrix, features, mistakes. No torch."""

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.classifier.convergence import SCORES, read_history, score_column
from ldm.classifier.data import ImageSet
from ldm.classifier.metrics import BINS, calibration_bins, disease_probability, label_indices, predicted_classes
from ldm.core.files import named_seed
from ldm.core.tables import write_csv
from ldm.reports.figures import loss_figure, roc_figure
from ldm.reports.html import files_folder, number, write_image, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MISTAKES = 24  # shown, the most confident ones first
PERPLEXITY = 30.0
LEAST_POINTS, MOST_POINTS = 10, 2000  # of the map of features
FACTS = (
    *("dataset", "model", "task", "epoch", "chosen_by", "converged", "use_synthetic", "n_train_healthy"),
    *("n_train_diseased", "n_synthetic_used", "n_duplicated", "n_val", "n_test", "n_test_diseased", "n_test_patients"),
    "threshold",
)
# What names of metrics.json are on a page; underscores of the others become spaces, "n" the number of something.
NAMES = {"auc": "AUC", "f1": "F1", "brier": "Brier score", "dice": "Dice", "iou": "intersection over union"}
NAMES |= {"sensitivity_at_95_specificity": "sensitivity at 95 % specificity", "macro_auc": "macro AUC"}
NAMES |= {"macro_auc_by_type": "macro AUC by lesion type", "found": "share of lesions found"}
NAMES |= {"false_alarms": "share of healthy images with a false alarm", "use_synthetic": "use of synthetic images"}
NAMES |= {"n_train_healthy": "healthy images trained on", "n_train_diseased": "diseased images trained on"}
NAMES |= {"n_synthetic_used": "synthetic images trained on", "n_duplicated": "repeated real images trained on"}
NAMES |= {"n_val": "validation images", "n_test": "test images", "n_test_diseased": "diseased test images"}
NAMES |= {"n_test_patients": "test patients"}
GROUP_FACTS = ("lesion_type", "severity", "n", "n_patients")  # of the table by lesion type and severity
GROUP_NUMBERS = ("auc", "sensitivity_at_95_specificity", "recall")


@dataclass
class Scored:
    """A set as the classifier sees it: ``probabilities`` (N, K), and ``features`` (P, D) of those that ``map_points``
    has chosen, in its order."""

    images: ImageSet
    probabilities: np.ndarray
    features: np.ndarray


def prediction_rows(images: ImageSet, probabilities: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per sample, as in predictions_*.csv: who it is, what it is, what the classifier says."""
    score, named = disease_probability(probabilities), predicted_classes(probabilities)
    return [
        {
            "sample_id": sample.sample_id,
            "patient_id": sample.patient_id,
            "parent_id": sample.parent_id or "",
            "prompt": sample.prompt,
            "lesion_type": sample.lesion_type or "",
            "severity": sample.severity or "",
            "label": images.labels[position],
            "disease_probability": float(score[position]),
            "predicted": classes[named[position]],
            **{f"p_{name}": float(p) for name, p in zip(classes, probabilities[position], strict=True)},
        }
        for position, sample in enumerate(images.samples)
    ]


def _facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and texts of metrics.json for a table, in which a verdict on convergence that is null reads open."""
    found = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    return found | ({"converged": "open"} if "converged" in found and found["converged"] is None else {})


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json as one row: numbers and texts; ``<name>``, ``<name>_low``, ``<name>_high`` of each test number."""
    row = _facts(metrics)
    row |= {f"val_{name}": value for name, value in metrics["validation"].items()}
    for name, entry in metrics["test"].items():
        row |= {name: entry["value"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
    return row


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], suffix: str) -> Path:
    """predictions_test.csv and metrics.csv; returns where the report belongs, whose earlier pictures are deleted."""
    write_csv(folder / f"predictions_test{suffix}.csv", rows)
    write_csv(folder / f"metrics{suffix}.csv", [flat_metrics(metrics)])
    path = folder / f"report{suffix}.html"
    shutil.rmtree(files_folder(path), ignore_errors=True)
    return path


def write_test(
    folder: Path, metrics: dict[str, Any], test: Scored, synthetic: Scored | None = None, suffix: str = ""
) -> None:
    """predictions_test.csv, metrics.csv and report.html; the caller writes metrics.json last, the sign of completion.

    ``synthetic``: the synthetic images of the training, shown in the map of features only.
    """
    rows = prediction_rows(test.images, test.probabilities, metrics["classes"])
    path = write_tables(folder, rows, metrics, suffix)
    count, mistakes = _mistakes(path, rows, test.images)
    write_page(
        path,
        "classifier",
        **number_tables(metrics, GROUP_NUMBERS),
        confound_rows=[list(row.values()) for row in metrics["confounds"]],
        training_plots=training_plots(folder, path, metrics["epoch"]),
        **_test_plots(path, metrics, test),
        map=_feature_map(path, test, synthetic),
        mistake_count=count,
        mistakes=mistakes,
    )


def shown_name(key: str) -> str:
    """A name of metrics.json as a page says it."""
    return NAMES.get(key, key.replace("_", " "))


def number_text(entry: Mapping[str, Any]) -> str:
    """A number of metrics.json with its interval, if it has one."""
    value = number(entry["value"])
    return value if entry["low"] is None else f"{value} ({interval_text(entry)})"


def number_tables(metrics: Mapping[str, Any], group_numbers: Sequence[str]) -> dict[str, Any]:
    """What every test's page shows of its ``metrics``; ``group_numbers``: the columns of each type and severity."""
    return {
        "metrics": metrics,
        "number_rows": [
            (shown_name(name), entry["value"], interval_text(entry), metrics["validation"].get(name))
            for name, entry in metrics["test"].items()
        ],
        "fact_rows": [(shown_name(key), _facts(metrics).get(key)) for key in FACTS],
        "group_rows": [
            [*(row[key] for key in GROUP_FACTS), *(number_text(row[key]) for key in group_numbers)]
            for row in metrics["groups"]
        ],
    }


def interval_text(entry: Mapping[str, Any]) -> str:
    """The interval of a number of metrics.json, or why it has none."""
    if entry["low"] is None:
        return number(None) if entry["value"] is None else "meaningless: few patients"
    return f"{entry['low']:.3f} to {entry['high']:.3f}"


def training_plots(folder: Path, path: Path, chosen: int) -> dict[str, str]:
    """Losses of each phase and what the epoch is chosen by, files by description; nothing without history.csv."""
    rows, plots = read_history(folder), {}
    if not rows:
        return {}
    for phase in dict.fromkeys(row["phase"] for row in rows):
        those = [row for row in rows if row["phase"] == phase]
        plots[f"loss of the phase {phase}"] = _plot(path, f"loss_{phase}", loss_figure(those, _title(those)))
    those = [row for row in rows if row["phase"] == "train"]
    column = score_column(rows[0])
    figure = score_figure([row for row in those if row[column]], column, chosen, _title(those))
    return plots | {f"validation {SCORES[column]} by epoch": _plot(path, column, figure)}


def _title(rows: Sequence[Mapping[str, str]]) -> str:
    """The name of a phase, from its rows of history.csv, and the steps that it has taken where they were asked for."""
    steps = rows[-1].get("step")
    return f"{rows[-1]['phase']}, {steps} steps" if steps else rows[-1]["phase"]


def _test_plots(path: Path, metrics: Mapping[str, Any], test: Scored) -> dict[str, dict[str, str]]:
    """Files by description: the curves (none where the test set holds one class), confusion and reliability."""
    truth = label_indices(test.images, metrics["classes"]) > 0
    score = disease_probability(test.probabilities)
    curves = {}
    if metrics["test"]["auc"]["value"] is not None:
        curves["roc curve"] = _plot(path, "roc", roc_figure({"test": (truth, score)}))
        curves["pr curve"] = _plot(path, "pr", pr_figure(truth, score))
    confusion = _plot(path, "confusion", confusion_figure(np.array(metrics["confusion"]), metrics["classes"]))
    reliability = _plot(path, "reliability", reliability_figure(truth, score))
    return {"curve_plots": curves, "calibration_plots": {"confusion": confusion, "reliability": reliability}}


def map_points(count: int) -> np.ndarray:
    """Which of so many images, those of the test and then the synthetic ones, the map of features shows."""
    return np.random.default_rng(named_seed("t-SNE", count)).permutation(count)[:MOST_POINTS]


def _feature_map(path: Path, test: Scored, synthetic: Scored | None) -> dict[str, Any]:
    """The t-SNE map's file (None with too few distinct features) and how many of the images it shows."""
    names = [f"test: {label}" for label in test.images.labels]
    if synthetic is not None:
        names += [f"synthetic: {label}" for label in synthetic.images.labels]
    kept = map_points(len(names))
    by_set = np.concatenate([each.features for each in (test, synthetic) if each is not None and len(each.features)])
    features = np.empty_like(by_set)
    features[np.argsort(kept >= len(test.images), kind="stable")] = by_set  # in the order of ``kept``
    points, perplexity = embed(features)
    source = None if points is None else _plot(path, "tsne", map_figure(points, [names[i] for i in kept]))
    counts = {"shown": len(kept), "count": len(names), "least": LEAST_POINTS}
    return {"source": source, "perplexity": perplexity, **counts}


def _mistakes(path: Path, rows: Sequence[Mapping[str, Any]], images: ImageSet) -> tuple[int, list[dict[str, Any]]]:
    """How many predictions are wrong, and the most confident of them, each image as the network sees it."""
    wrong = [i for i, row in enumerate(rows) if row["predicted"] != row["label"]]
    certainty = {i: rows[i][f"p_{rows[i]['predicted']}"] for i in wrong}
    worst = sorted(wrong, key=lambda i: (-certainty[i], rows[i]["sample_id"]))[:MISTAKES]
    shown = [
        {
            **{key: rows[i][key] for key in ("sample_id", "label", "predicted", "prompt")},
            "source": write_image(path, f"mistake_{place:02d}", images.images[i]),
            "certainty": certainty[i],
            "lesion": " ".join(filter(None, (rows[i]["severity"], rows[i]["lesion_type"]))),
        }
        for place, i in enumerate(worst)
    ]
    return len(wrong), shown


def _plot(path: Path, name: str, figure: "Figure") -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Matplotlib warns of glyphs in a class's name that its font lacks.
        return write_image(path, name, figure)


def _axes(width: float = 4.6, height: float = 4.6) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def score_figure(rows: Sequence[Mapping[str, str]], column: str, chosen: int, title: str) -> "Figure":
    """A score on validation by epoch, rows of history.csv where it is defined; the chosen epoch is marked."""
    axes = _axes(5, 3.2)
    epochs, marker = [int(row["epoch"]) for row in rows], "." if len(rows) < 40 else None
    axes.plot(epochs, [float(row[column]) for row in rows], color="tab:orange", marker=marker)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.axvline(chosen, color="0.6", linestyle="--", linewidth=1, label=f"chosen: epoch {chosen}")
    axes.set(title=title, xlabel="epoch", ylabel=f"validation {SCORES[column]}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return axes.figure


def pr_figure(truth: np.ndarray, score: np.ndarray) -> "Figure":
    """Precision over recall of P(disease), with the share of diseased samples as the level of chance."""
    from sklearn.metrics import PrecisionRecallDisplay

    axes = _axes()
    PrecisionRecallDisplay.from_predictions(truth, score, name="test", plot_chance_level=True, ax=axes)
    axes.set(xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.25)
    return axes.figure


def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Counts (K, K), rows truth and columns prediction, coloured by the share of the row."""
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    side = max(4.0, 0.75 * len(classes) + 2)
    axes = _axes(side, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=30, ha="right")
    axes.set_yticks(places, classes)
    axes.set(xlabel="predicted", ylabel="true")
    return axes.figure


def reliability_figure(truth: np.ndarray, score: np.ndarray) -> "Figure":
    """Share of diseased samples over mean P(disease), one point per bin; its size grows with the samples in it."""
    bins = calibration_bins(score)
    filled, counts = np.unique(bins, return_counts=True)
    axes = _axes()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    means = [[values[bins == b].mean() for b in filled] for values in (score, truth)]
    axes.plot(*means, color="tab:blue", linewidth=1)
    axes.scatter(*means, s=20 + 180 * counts / counts.max(), color="tab:blue", alpha=0.7)
    for mean, share, count in zip(*means, counts, strict=True):
        axes.annotate(str(count), (mean, share), textcoords="offset points", xytext=(8, -12), fontsize=8)
    axes.set(xlabel=f"mean P(disease) of a bin (of {BINS})", ylabel="share diseased", xlim=(0, 1), ylim=(-0.05, 1.05))
    axes.grid(alpha=0.25)
    return axes.figure


def embed(features: np.ndarray) -> tuple[np.ndarray | None, float]:
    """t-SNE of features (N, D): points (N, 2) and the perplexity, lowered where N is small.

    No points where fewer than LEAST_POINTS features differ: scikit-learn's t-SNE crashes when all are equal.
    """
    from sklearn.manifold import TSNE

    centred = features.astype(np.float64) - features.mean(0)
    scaled = centred / max(float(centred.std()), 1e-12)
    distinct = len(np.unique(scaled.round(4), axis=0))
    perplexity = min(PERPLEXITY, (distinct - 1) // 3)
    if distinct < LEAST_POINTS:
        return None, perplexity
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(scaled), perplexity


def map_figure(points: np.ndarray, names: Sequence[str]) -> "Figure":
    """Points (N, 2) coloured by class; circles are test samples, crosses synthetic ones."""
    axes = _axes(6, 5)
    groups = sorted(set(names), key=lambda name: (name.startswith("synthetic"), not name.endswith(": healthy"), name))
    labels = list(dict.fromkeys(name.partition(": ")[2] for name in groups))
    for name in groups:
        rows = np.array([other == name for other in names])
        kind, _, label = name.partition(": ")
        colour = f"C{labels.index(label) % 10}"
        marker = {"marker": "x", "linewidths": 1} if kind == "synthetic" else {"marker": "o", "linewidths": 0}
        axes.scatter(*points[rows].T, s=22, alpha=0.75, color=colour, label=f"{name} ({rows.sum()})", **marker)
    axes.set(xticks=[], yticks=[])
    axes.legend(fontsize=8, loc="best")
    return axes.figure
