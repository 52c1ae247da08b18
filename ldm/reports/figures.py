"""Figures that several pages show: losses by epoch and ROC curves. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(path: Path, figure: "Figure", dpi: int = 150) -> None:
    """Write a figure as PNG or SVG, by the name's suffix, whole or not at all."""
    with atomic_file(path) as handle:
        figure.savefig(handle, format=path.suffix[1:], dpi=dpi)


def loss_figure(rows: Sequence[Mapping[str, str]], title: str) -> "Figure":
    """Losses by epoch from a stage's metrics.csv; cosines of predicted and true tokens, if any, on a second axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    columns = {
        "train_loss": ("tab:blue", "training"),
        "val_loss": ("tab:orange", "validation"),
        "val_lesion_loss": ("tab:red", "validation, lesions"),
    }
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    for column, (style, label) in columns.items():
        values = _series(rows, column)
        if values[0]:
            axes.plot(*values, color=style, label=label, marker="." if len(rows) < 40 else None)
    axes.set(title=title, xlabel="epoch", ylabel="loss")
    axes.grid(alpha=0.25)
    cosines = {"tab:green": _series(rows, "val_cosine"), "tab:olive": _series(rows, "val_lesion_cosine")}
    if any(values[0] for values in cosines.values()):
        second = axes.twinx()
        axes.set_zorder(second.get_zorder() + 1)  # the legend stays readable
        axes.patch.set_visible(False)
        for style, values in cosines.items():
            second.plot(*values, color=style, linestyle="--")
        second.set_ylabel("validation cosine (olive: lesions)", color="tab:green")
    axes.legend(loc="best", fontsize=8)
    return figure


def validation_figure(stages: Mapping[str, Sequence[Mapping[str, str]]]) -> "Figure":
    """Validation loss by epoch of each stage (name -> rows of its metrics.csv) side by side, each on its own scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(stages), 2.7), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        axes.plot(*_series(rows, "val_loss"), color="tab:orange", marker=".")
        axes.set(title=name, xlabel="epoch")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.grid(alpha=0.25)
    figure.supylabel("validation loss")
    return figure


def _series(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    filled = [row for row in rows if row.get(column)]
    return [float(row["epoch"]) for row in filled], [float(row[column]) for row in filled]


def roc_figure(curves: Mapping[str, tuple[Iterable[bool], Iterable[float]]]) -> "Figure":
    """ROC curves by name from (is diseased, P(disease)); curves with one class only are left out."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (truth, score) in curves.items():
        if len(set(truth)) == 2:
            false_rate, true_rate, _ = roc_curve(truth, score)
            axes.plot(false_rate, true_rate, label=f"{name}: AUC {roc_auc_score(truth, score):.3f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="1 - specificity", ylabel="recall", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=9)
    axes.grid(alpha=0.25)
    return figure
