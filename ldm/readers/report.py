"""What an analysis of a reader study writes for people: page, figures, a paragraph for the paper, a row a reader."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.core.tables import counted
from ldm.readers.answers import STEPS, Key, Reader, readings_of
from ldm.reports.figures import write_figure
from ldm.reports.html import number, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN_FILES = (
    "report.html",
    "readers.csv",
    "answers.csv",
    "rejects.json",
    "by_reader.png",
    "steps.png",
    "roc.png",
    "time.png",
)
NAMES = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "sensitivity": "drawn pictures called drawn",
    "specificity": "real pictures called real",
    "called_drawn": "pictures called drawn",
    "called_left": "left picture called drawn",
}
SCALE = ("certainly\nreal", "probably\nreal", "rather\nreal", "rather\ndrawn", "probably\ndrawn", "certainly\ndrawn")
TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # seconds an item
REAL_COLOUR, DRAWN_COLOUR = "tab:green", "tab:blue"


def interval_of(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval to report: readers and cases resampled; None where there is none."""
    return None if entry["low"] is None else (entry["low"], entry["high"])


def with_bounds(value: float | None, bounds: Sequence[float] | None) -> str:
    """A number with its interval, for a reader."""
    text = number(value)
    return text if bounds is None else f"{text} ({bounds[0]:.3f} to {bounds[1]:.3f})"


def paragraph(key: Key, measured: Mapping[str, Any]) -> str:
    """The result in sentences that a paper can use, with what it does not show."""
    entry, agreement = measured["numbers"][measured["main"]], measured["agreement"]
    count, drawn = len(measured["readers"]), measured["drawn"]
    bounds = interval_of(entry)
    interval = f" (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""
    who = f"{count} readers" if count > 1 else "One reader"
    if key.pairs:
        text = [f"{who} saw {counted(drawn, 'pair')} of a real and a drawn picture and named the drawn one."]
        text.append(f"They were right in {entry['value']:.2f} of the pairs{interval}; chance is 0.50.")
    else:
        accuracy = measured["numbers"]["accuracy"]["value"]
        shown = f"{measured['items'] - drawn} real and {counted(drawn, 'drawn picture')}"
        text = [f"{who} rated {shown} in six steps from certainly real to certainly drawn."]
        auc = "undefined (nobody rated both kinds)" if entry["value"] is None else f"{entry['value']:.2f}{interval}"
        text.append(f"The mean AUC was {auc}, the accuracy {accuracy:.2f}; chance is 0.50.")
    if bounds:
        text.append(_against_chance(bounds))
    kappas = [
        f"{name} was {value:.2f}"
        for name, value in (
            ("Fleiss' kappa of real or drawn", agreement["fleiss_calls"]["value"]),
            ("the mean quadratic-weighted kappa of two readers", None if key.pairs else agreement["weighted_mean"]),
            (
                f"the kappa of readers with themselves on {agreement['repeats_answered']} hidden repeats",
                agreement["intra"],
            ),
        )
        if value is not None
    ]
    if kappas:
        text.append("; ".join(kappas) + ".")
    text.append(f"The median time was {measured['seconds']['median']:.1f} s.")
    return " ".join(text) + (" The interval is by bootstrap over readers and cases." if bounds else "")


def _against_chance(bounds: Sequence[float]) -> str:
    low, high = bounds
    if low > 0.5:
        return "So readers could tell drawn pictures from real ones."
    if high < 0.5:
        return "So readers took drawn pictures for real ones more often than real ones."
    return (
        f"So it is not shown that readers could tell them apart; nor that they could not: values up to {high:.2f} are "
        "compatible with these answers."
    )


def reader_rows(readers: Sequence[Reader], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of readers.csv."""
    rows = []
    for place, reader in enumerate(readers):
        row: dict[str, Any] = {"reader": reader.code, "years": reader.years, "speciality": reader.speciality}
        row |= {"seen_before": reader.seen, "complete": reader.complete, "answers": len(reader.answers)}
        for name, entry in measured["numbers"].items():
            row[name] = entry["readers"][place]["value"]
        main = measured["numbers"][measured["main"]]["readers"][place]
        row |= {f"{measured['main']}_low": main["low"], f"{measured['main']}_high": main["high"]}
        kappas = measured["agreement"]["weighted"].items()
        own = [value for codes, value in kappas if value is not None and reader.code in codes.split(" ")]
        row |= {"kappa_with_others": float(np.mean(own)) if own else None}
        row |= {"kappa_with_oneself": measured["agreement"]["intra_by_reader"][reader.code]}
        rows.append(row | {"median_seconds": measured["seconds"][reader.code], "comment": reader.comment})
    return rows


def write_report(folder: Path, key: Key, readers: Sequence[Reader], measured: Mapping[str, Any]) -> None:
    """Write report.html and its figures."""
    figures = {"by_reader.png": reader_figure(measured), "time.png": time_figure(key, readers)}
    if not key.pairs:
        figures |= {"steps.png": step_figure(measured["steps"]), "roc.png": roc_figure(key, readers)}
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    rows = reader_rows(readers, measured)
    columns = [name for name in rows[0] if name not in ("comment", "complete", "seen_before")]
    write_page(
        folder / "report.html",
        "readers",
        study=key.study,
        pairs=key.pairs,
        counts={name: measured[name] for name in ("items", "drawn", "patients")} | {"readers": len(readers)},
        paragraph=measured["paragraph"],
        notes=measured["notes"],
        figures=sorted(figures),
        number_rows=[_number_row(name, entry) for name, entry in measured["numbers"].items()],
        agreement_rows=_agreement_rows(key, measured["agreement"]),
        group_rows=list(_group_rows(measured)),
        main=NAMES[measured["main"]],
        second_rows=[
            [name, _cell("median_seconds", measured["seconds"][of])]
            for name, of in (("all", "median"), ("right", "right"), ("wrong", "wrong"))
        ],
        halves=measured["halves"],
        reader_head=[_heading(name, measured["main"]) for name in columns],
        reader_rows=[[_cell(name, row[name]) for name in columns] for row in rows],
        comments={reader.code: reader.comment for reader in readers if reader.comment.strip()},
    )


def _heading(column: str, main: str) -> str:
    """A column of readers.csv as the page names it."""
    known = {f"{main}_low": f"{NAMES[main]}: 95 % from", f"{main}_high": "to"}
    return (NAMES | known).get(column, column.replace("_", " "))


def _cell(column: str, value: Any) -> Any:
    """A value of readers.csv with the digits that it has; the rates have three."""
    forms = {"years": "{:g}", "median_seconds": "{:.1f}"}
    return forms[column].format(value) if column in forms and value is not None else value


def _number_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    shown = [interval_of(entry), entry["obuchowski_rockette"], entry["over_readers"], entry["over_cases"]]
    texts = [number(None) if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}" for bounds in shown]
    return [NAMES[name], number(entry["value"]), *texts]


def _agreement_rows(key: Key, agreement: Mapping[str, Any]) -> list[list[str]]:
    calls = agreement["fleiss_calls"]
    rows = [["Fleiss' kappa, real or drawn", with_bounds(calls["value"], calls["interval"])]]
    if not key.pairs:
        steps = agreement["fleiss_steps"]
        rows.append(["Fleiss' kappa, six steps", with_bounds(steps["value"], steps["interval"])])
    rows.append(["weighted kappa of two readers, mean", number(agreement["weighted_mean"])])
    rows.append([f"weighted kappa with oneself, {agreement['repeats_answered']} repeats", number(agreement["intra"])])
    return [
        *rows,
        *(
            [f"weighted kappa of {codes.replace(' ', ' and ')}", number(value)]
            for codes, value in agreement["weighted"].items()
        ),
    ]


def _group_rows(measured: Mapping[str, Any]) -> list[list[Any]]:
    main, rows = measured["main"], []
    for title, what in (("by_type", "item"), ("by_severity", "item"), ("by_experience", "reader")):
        for name, entry in measured[title].items():
            count = counted(entry[f"{what}s"], what)
            rows.append([name, count, with_bounds(entry[main]["value"], interval_of(entry[main]))])
    return rows


def reader_figure(measured: Mapping[str, Any]) -> "Figure":
    """The main number of each reader with the interval over cases, and the mean with the interval to report."""
    from matplotlib.figure import Figure

    entry, codes = measured["numbers"][measured["main"]], measured["readers"]
    rows = [
        (code, each["value"], (each["low"], each["high"])) for code, each in zip(codes, entry["readers"], strict=True)
    ]
    rows.append(("mean", entry["value"], interval_of(entry) or (None, None)))
    figure = Figure(figsize=(5.4, 0.34 * len(rows) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for place, (code, value, (low, high)) in enumerate(rows):
        colour, width, marker = ("black", 2.2, "D") if code == "mean" else ("0.45", 1.4, "o")
        if low is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=width)
        if value is not None:
            axes.plot([value], [place], marker, color=colour, clip_on=False, zorder=3)
    axes.axvline(0.5, color="0.7", linestyle="--", linewidth=0.9)
    axes.set(
        xlim=(0, 1), xlabel=f"{NAMES[measured['main']]} (bars: 95 %; dashed: chance)", ylim=(len(rows) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    return figure


def step_figure(steps: Mapping[str, Sequence[float]]) -> "Figure":
    """How often each step was given to real and to drawn pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes, places = figure.add_subplot(), np.arange(len(STEPS))
    for shift, (kind, colour) in zip((-0.2, 0.2), (("real", REAL_COLOUR), ("drawn", DRAWN_COLOUR)), strict=True):
        axes.bar(places + shift, steps[kind], 0.38, color=colour, alpha=0.8, label=f"{kind} pictures")
    axes.set_xticks(places, SCALE, fontsize=8)
    axes.set(ylabel="share of answers")
    axes.legend(fontsize=9)
    return figure


def roc_figure(key: Key, readers: Sequence[Reader]) -> "Figure":
    """The six steps as ROC curves: a thin line a reader, a thick one for the mean of their points."""
    from matplotlib.figure import Figure

    readings, figure = readings_of(key, readers), Figure(figsize=(4.2, 4.2), layout="constrained")
    axes, curves = figure.add_subplot(), []
    for row in readings.answers:
        points = [
            [np.mean(row[kind & ~np.isnan(row)] >= step) for kind in (~readings.drawn, readings.drawn)]
            for step in (7, *reversed(STEPS))
            if all((kind & ~np.isnan(row)).any() for kind in (~readings.drawn, readings.drawn))
        ]
        if points:
            curves.append(points)
            told = None if len(curves) > 1 else "a reader"
            axes.plot(*np.transpose(points), color="0.65", linewidth=1, marker=".", label=told)
    if curves:
        axes.plot(*np.mean(curves, axis=0).T, color="black", linewidth=2.2, marker="o", markersize=4, label="mean")
        axes.legend(loc="lower right", fontsize=9)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="real pictures called drawn", ylabel="drawn pictures called drawn", aspect="equal")
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.01))
    return figure


def time_figure(key: Key, readers: Sequence[Reader]) -> "Figure":
    """Seconds an item by its position in each reader's order, the median over readers in black."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    figure = Figure(figsize=(5.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    rows = np.full((len(readers), len(key.items)), np.nan)
    told: str | None = "a reader"
    for row, reader in zip(rows, readers, strict=True):
        row[: len(reader.order)] = [reader.seconds[item] for item in reader.order]
        axes.plot(np.arange(1, len(row) + 1), row, color="0.8", linewidth=0.7, label=told)
        told = None  # the legend names one of them
    shown = ~np.isnan(rows).all(axis=0)
    axes.plot(
        np.flatnonzero(shown) + 1, np.nanmedian(rows[:, shown], axis=0), color="black", linewidth=1.6, label="median"
    )
    axes.set(xlabel="item in the order shown", ylabel="seconds", yscale="symlog")
    axes.set_ylim(0, 1.5 * max(1.0, float(np.nanmax(rows, initial=0))))
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)
    return figure
