"""Tables and the page of a classifier's test: numbers, curves, confusion matrix, features, mistakes. No torch."""

import html
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.classifier.data import ImageSet
from ldm.classifier.metrics import BINS, calibration_bins, disease_probability, label_indices, predicted_classes
from ldm.core.files import named_seed, write_text
from ldm.core.tables import write_csv
from ldm.reports.pages import files_folder, image, loss_figure, number, page, read_table, roc_figure, table, write_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

REJECT_COLUMNS = ["set", "sample_id", "file", "reason"]
MISTAKES = 24  # shown, the most confident ones first
PERPLEXITY = 30.0
LEAST_POINTS, MOST_POINTS = 10, 2000  # of the map of features
FACTS = (
    *("dataset", "model", "task", "epoch", "chosen_by", "use_synthetic", "n_train_healthy", "n_train_diseased"),
    *("n_synthetic_used", "n_duplicated", "n_val", "n_test", "n_test_diseased", "n_test_patients", "threshold"),
)


@dataclass
class Scored:
    """A set as the classifier sees it: ``probabilities`` (N, K) and ``features`` (N, D)."""

    images: ImageSet
    probabilities: np.ndarray
    features: np.ndarray


# --- tables -----------------------------------------------------------------------------------------------------


def prediction_rows(images: ImageSet, probabilities: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per sample, as in predictions_*.csv: who it is, what it is, what the classifier says."""
    score, named = disease_probability(probabilities), predicted_classes(probabilities)
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
                "predicted": classes[named[position]],
                **{f"p_{name}": float(p) for name, p in zip(classes, probabilities[position], strict=True)},
            }
        )
    return rows


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json as one row: numbers and texts; ``<name>``, ``<name>_low``, ``<name>_high`` of each test number."""
    row = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    row |= {f"val_{name}": value for name, value in metrics["validation"].items()}
    for name, entry in metrics["test"].items():
        row |= {name: entry["value"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
    return row


# --- everything of one test -------------------------------------------------------------------------------------


def write_test(
    folder: Path, metrics: dict[str, Any], test: Scored, synthetic: Scored | None = None, suffix: str = ""
) -> None:
    """predictions_test.csv, metrics.csv and report.html; the caller writes metrics.json last, the sign of completion.

    ``synthetic``: the synthetic pictures of the training, shown in the map of features only.
    """
    rows = prediction_rows(test.images, test.probabilities, metrics["classes"])
    write_csv(folder / f"predictions_test{suffix}.csv", rows)
    write_csv(folder / f"metrics{suffix}.csv", [flat_metrics(metrics)])
    path = folder / f"report{suffix}.html"
    shutil.rmtree(files_folder(path), ignore_errors=True)
    sections = [
        ("numbers", "Test numbers", _numbers_html(metrics)),
        ("training", "Training", _training_html(folder, path, metrics["epoch"])),
        ("curves", "Curves", _curves_html(path, metrics, test)),
        ("calibration", "Confusion and calibration", _calls_html(path, metrics, test)),
        ("features", "Features", _features_html(path, metrics, test, synthetic)),
        ("mistakes", "Worst mistakes", _mistakes_html(path, rows, test.images)),
    ]
    intro = (
        f"Research software, not for clinical use. Epoch chosen by {metrics['chosen_by']}; the test set was read once; "
        f"P(disease) >= {metrics['threshold']:g} is called diseased. Intervals hold 95 % of "
        f"{metrics['resamples']} bootstrap resamples of the {metrics['n_test_patients']} test patients."
    )
    write_text(path, page(f"Classifier: {metrics['dataset']}", sections, intro))


def _numbers_html(metrics: Mapping[str, Any]) -> str:
    notes = "".join(f'<p class="warning">{html.escape(note)}</p>' for note in metrics["notes"])
    rows = [
        (name.replace("_", " "), entry["value"], _interval(entry), metrics["validation"].get(name))
        for name, entry in metrics["test"].items()
    ]
    numbers = table(["number", "test", "95 % interval", "validation"], rows)
    facts = table(["this run", ""], [(key.replace("_", " "), metrics.get(key)) for key in FACTS])
    return f'{notes}<div class="plots">{numbers}{facts}</div>'


def _interval(entry: Mapping[str, Any]) -> str:
    return number(None) if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"


def _training_html(folder: Path, path: Path, chosen: int) -> str:
    history = folder / "history.csv"
    if not history.exists():
        return '<p class="note">No history.csv lies beside these weights.</p>'
    rows = read_table(history, ("phase", "epoch", "train_loss", "val_loss", "val_auc"), "training log")
    plots = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        figure = loss_figure([row for row in rows if row["phase"] == phase], phase)
        plots.append(_plot(path, f"loss_{phase}", figure, f"loss of the phase {phase}"))
    figure = auc_figure([row for row in rows if row["phase"] == "train" and row["val_auc"]], chosen)
    plots.append(_plot(path, "val_auc", figure, "validation AUC by epoch"))
    return f'<div class="plots">{"".join(plots)}</div>'


def _curves_html(path: Path, metrics: Mapping[str, Any], test: Scored) -> str:
    truth = label_indices(test.images, metrics["classes"]) > 0
    score = disease_probability(test.probabilities)
    if metrics["test"]["auc"]["value"] is None:
        return '<p class="note">ROC and precision-recall curves are undefined: the test set holds one class.</p>'
    pairs = ("roc", roc_figure({"test": (truth, score)})), ("pr", pr_figure(truth, score))
    return f'<div class="plots">{"".join(_plot(path, name, figure, f"{name} curve") for name, figure in pairs)}</div>'


def _calls_html(path: Path, metrics: Mapping[str, Any], test: Scored) -> str:
    truth = label_indices(test.images, metrics["classes"]) > 0
    figures = {
        "confusion": confusion_figure(np.array(metrics["confusion"]), metrics["classes"]),
        "reliability": reliability_figure(truth, disease_probability(test.probabilities)),
    }
    return f'<div class="plots">{"".join(_plot(path, name, figure, name) for name, figure in figures.items())}</div>'


def _features_html(path: Path, metrics: Mapping[str, Any], test: Scored, synthetic: Scored | None) -> str:
    names = [f"test: {label}" for label in test.images.labels]
    features = [test.features]
    if synthetic is not None:
        names += [f"synthetic: {label}" for label in synthetic.images.labels]
        features.append(synthetic.features)
    kept = np.random.default_rng(named_seed("t-SNE", len(names))).permutation(len(names))[:MOST_POINTS]
    points, perplexity = embed(np.concatenate(features)[kept])
    if points is None:
        text = f"The map of features is left out: t-SNE needs at least {LEAST_POINTS} pictures, there are {len(kept)}"
        return f'<p class="note">{text} (those that the network does not tell apart count once).</p>'
    figure = map_figure(points, [names[i] for i in kept])
    text = (
        f"t-SNE of what the last layer reads, {len(kept)} of {len(names)} pictures, perplexity {perplexity:g}. "
        "Distances between groups and their sizes mean little in such a map."
    )
    return f'<div class="plots">{_plot(path, "tsne", figure, "t-SNE of the features")}<p class="note">{text}</p></div>'


def _mistakes_html(path: Path, rows: Sequence[Mapping[str, Any]], images: ImageSet) -> str:
    """The most confident wrong predictions: the picture as the network sees it, truth, prediction, P, prompt."""
    wrong = [i for i, row in enumerate(rows) if row["predicted"] != row["label"]]
    certainty = {i: rows[i][f"p_{rows[i]['predicted']}"] for i in wrong}
    worst = sorted(wrong, key=lambda i: (-certainty[i], rows[i]["sample_id"]))[:MISTAKES]
    if not worst:
        return "<p>None: every test sample was named correctly.</p>"
    cards = []
    for place, i in enumerate(worst):
        row = rows[i]
        source = write_image(path, f"mistake_{place:02d}", images.images[i])
        facts = (
            f"{row['label']}, called {row['predicted']} with P {certainty[i]:.3f}",
            " ".join(filter(None, (row["severity"], row["lesion_type"]))),
            f"“{row['prompt']}”",
            row["sample_id"],
        )
        caption = "<br>".join(html.escape(fact) for fact in facts if fact)
        cards.append(f"<figure>{image(source, row['sample_id'])}<figcaption>{caption}</figcaption></figure>")
    return (
        f"<p>{len(worst)} of {len(wrong)} wrong ones, the most confident first.</p>"
        f'<div class="panels">{"".join(cards)}</div>'
    )


# --- figures ----------------------------------------------------------------------------------------------------


def _plot(path: Path, name: str, figure: "Figure", alt: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph of a class's name that the font lacks
        return image(write_image(path, name, figure), alt, "plot")


def _axes(width: float = 4.6, height: float = 4.6) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def auc_figure(rows: Sequence[Mapping[str, str]], chosen: int) -> "Figure":
    """Validation AUC by epoch, rows of history.csv where it is defined; the chosen epoch is marked."""
    axes = _axes(5, 3.2)
    axes.plot([int(row["epoch"]) for row in rows], [float(row["val_auc"]) for row in rows], color="tab:orange")
    axes.axvline(chosen, color="0.6", linestyle="--", linewidth=1, label=f"chosen: epoch {chosen}")
    axes.set(title="train", xlabel="epoch", ylabel="validation AUC")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return axes.figure


def pr_figure(truth: np.ndarray, score: np.ndarray) -> "Figure":
    """Precision over recall of P(disease), with the share of diseased samples as the level of chance."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, score)
    axes = _axes()
    label = f"test: average precision {average_precision_score(truth, score):.3f}"
    axes.plot(recall, precision, drawstyle="steps-post", label=label)
    axes.axhline(truth.mean(), color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    axes.legend(loc="lower left", fontsize=9)
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
    filled = np.unique(bins)
    counts = np.array([np.sum(bins == b) for b in filled])
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
