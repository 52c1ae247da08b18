"""What a study's page says: tables, a plot, careful sentences, and every cell in a CSV file. No torch."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core.files import write_text
from ldm.core.tables import counted, markdown_table, write_csv
from ldm.reports.figures import write_figure
from ldm.reports.html import write_page
from ldm.workflow.study_hypotheses import Outcome, share_of_attainable
from ldm.workflow.study_results import OLDER_RULE, OPEN, Drawings, Interval, Study, Treatment
from ldm.workflow.study_rows import DRAWINGS, RESULTS, cell_rows, drawing_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {"auc": "test AUC", "average_precision": "average precision", "balanced_accuracy": "balanced accuracy"}
SHOWN |= {
    "recall": "recall",
    "specificity": "specificity",
    "sensitivity_at_95_specificity": "recall at 95 % specificity",
}
SHOWN |= {"macro_auc": "macro AUC", "macro_auc_by_type": "macro AUC by type"}
SHOWN |= {"calibration_error": "calibration error", "brier": "Brier score", "dice": "Dice"}
SHOWN |= {"validation_auc": "validation AUC", "validation_dice": "validation Dice"}
# Numbers of which less is better.
ERRORS = ("brier", "calibration_error", "type_calibration_error", "false_alarms", "seam_error", "changed_outside")
DRAWN = {"detection": "called diseased", "agreement": "type agrees", "asked_drawn": "asked in drawn, bits"}
DRAWN |= {"seam": "seam", "seam_error": "seam's distance from 1", "changed_outside": "pixels changed outside"}


def paragraph(study: Study, hypotheses: bool = False, tested_by: str | None = None) -> str:
    """What the cells support and what they do not, in sentences that follow from the intervals alone.

    ``hypotheses``: whether the study has some; ``tested_by``: the study that tests hypotheses about this one.
    """
    if study.compare is None:
        return f"No classifier learns from these drawings; a judge reads them. {_claim(study, hypotheses, tested_by)}"
    compared, ratio = study.comparison, study.chosen_ratio()
    if ratio is None:
        return f"Nothing can be said yet: no finished cell of {compared.main} has a number from validation."
    how = "fixed beforehand" if compared.ratio is not None else "the one that is best on validation in these worlds"
    main, control = Treatment(compared.main, ratio), Treatment(compared.control, ratio)
    nothing = Treatment(compared.baseline)
    claim = _sentence(study, main, control, "The main comparison, ") or f"{main} and {control}: no finished pair yet."
    parts = [f"The ratio is {ratio:g} ({how}).", claim]
    parts += [_sentence(study, main, nothing), _sentence(study, control, nothing)]
    for other in study.treatments:
        if other.arm not in (compared.main, compared.control, compared.baseline) and other.ratio is not None:
            parts.append(_sentence(study, Treatment(compared.main, other.ratio), other))
    if compared.ratio is None:
        parts.append(
            "The ratio was chosen in these very worlds, and other settings may have been: they suggest, and only "
            "worlds that nothing was tuned on can confirm."
        )
    parts.append(_claim(study, hypotheses, tested_by))
    return " ".join(part for part in parts if part)


def _claim(study: Study, hypotheses: bool, tested_by: str | None) -> str:
    """Which comparisons claim something."""
    main = ", the main comparison among them," if study.compare else ""
    if hypotheses:
        claim = f"The hypotheses below are the claim; all others{main}"
    elif tested_by:
        claim = f"What is claimed of these worlds are the hypotheses of {tested_by}; all comparisons here{main}"
    else:
        claim = "One comparison is the claim; all others" if study.compare else "All comparisons"
    return f"{claim} are looks at the same worlds, and their intervals are not widened for their number."


def _sentence(study: Study, first: Treatment, second: Treatment, lead: str = "") -> str:
    """What one difference of the endpoint says; empty if there is none."""
    change = study.difference(first, second)
    if change is None:
        return ""
    gain, loss = ("lower", "higher") if study.comparison.endpoint in ERRORS else ("higher", "lower")
    shown = {gain: "a gain is shown", loss: "a loss is shown"}
    said = shown.get(change.verdict, f"a difference is {change.verdict}")
    return f"{lead}{first} minus {second}: {change} of {study.endpoint} over {counted(change.worlds, 'world')}; {said}."


def mean_rows(study: Study, metrics: Sequence[str]) -> list[list[str]]:
    """One row a treatment: its name, worlds, then mean and interval of each metric."""
    rows = []
    for treatment in study.treatments:
        means = [study.mean(treatment, metric) for metric in metrics]
        rows.append([str(treatment), *_with_worlds(means, "{:.3f}")])
    return rows


def difference_rows(study: Study) -> list[list[str]]:
    """One row a pair: both names, the difference of the endpoint with its interval, worlds, verdict."""
    return [
        [str(first), str(second), mean_with_bounds(change, "{:+z.3f}"), str(change.worlds), change.verdict]
        for first, second, change in study.differences()
    ]


def _with_worlds(found: Sequence[Interval | None], form: str) -> list[str]:
    """The number of worlds of a row, then its numbers; one of fewer worlds says of how many."""
    most = max((each.worlds for each in found if each), default=0)
    texts = []
    for each in found:
        fewer = f" ({counted(each.worlds, 'world')})" if each and each.worlds < most else ""
        texts.append(mean_with_bounds(each, form) + fewer)
    return [str(most), *texts]


def mean_with_bounds(found: Interval | None, form: str) -> str:
    """A mean in this format, its interval behind it; a dash if there is none."""
    if found is None:
        return "-"
    mean = form.format(found.mean)
    return mean if found.low is None else f"{mean} ({form.format(found.low)} to {form.format(found.high)})"


def reach(found: Interval) -> tuple[float, float]:
    """From the mean down to the lower and up to the upper bound; 0 where there are none."""
    if found.low is None or found.high is None:
        return 0.0, 0.0
    return found.mean - found.low, found.high - found.mean


def dose_figure(study: Study) -> "Figure":
    """What main arm and control change against the baseline, by ratio: the paired difference with its interval.

    Differences, since worlds differ more among each other than arms do within one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    compared, nothing = study.comparison, Treatment(study.comparison.baseline)
    axes.axhline(0, color="0.45", linestyle="--", label=compared.baseline)
    every = sorted({*study.ratios(compared.main), *study.ratios(compared.control)})
    for arm, colour, shift in ((compared.control, "tab:orange", -0.04), (compared.main, "tab:blue", 0.04)):
        found = {ratio: study.difference(Treatment(arm, ratio), nothing) for ratio in study.ratios(arm)}
        shown = {every.index(ratio) + shift: change for ratio, change in found.items() if change is not None}
        if shown:
            heights = [each.mean for each in shown.values()]
            reaches = list(zip(*map(reach, shown.values()), strict=True))
            axes.errorbar(list(shown), heights, reaches, color=colour, marker="o", capsize=3, label=arm)
    axes.set_xticks(range(len(every)), [f"{ratio:g}" for ratio in every])
    axes.set_xlim(-0.5, max(len(every), 1) - 0.5)
    label = f"{study.endpoint} minus that of {compared.baseline}\n(mean and 95 % over worlds)"
    axes.set(xlabel="images added per real diseased image", ylabel=label)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return figure


def timing(cells: Sequence[float], generators: Mapping[str, float]) -> str:
    """What cells and generators took, in seconds."""
    parts = []
    if cells:
        parts.append(f"a cell took {statistics.median(cells):.0f} s (median; at most {max(cells):.0f} s)")
    if generators:
        slowest = max(generators, key=lambda name: generators[name])
        middle = statistics.median(generators.values())
        parts.append(f"a generator {middle:.0f} s (median; at most {generators[slowest]:.0f} s, {slowest})")
    total = (sum(cells) + sum(generators.values())) / 3600
    return f"{', '.join(parts)}; {total:.2f} h together." if parts else "not recorded."


def outcome_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row a hypothesis."""
    return [
        [
            *(each.name, each.asked, endpoint_text(each), mean_with_bounds(each.change, "{:+z.3f}"), str(each.worlds)),
            *("-" if each.p is None else _p_text(each.p), _p_text(each.adjusted), each.verdict),
        ]
        for each in outcomes
    ]


def _p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def endpoint_text(outcome: Outcome) -> str:
    """What a hypothesis is about, and of what less is better."""
    of = " of the drawings" if outcome.hypothesis.of == "drawings" else ""
    return f"{outcome.endpoint}{of}{' (less is better)' if outcome.endpoint in ERRORS else ''}"


def hypothesis_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every hypothesis as a row of hypotheses.csv."""
    return [
        {"name": each.name, "asked": each.asked, "endpoint": each.endpoint, "of": each.hypothesis.of}
        | {name: getattr(each.change, name, None) for name in ("mean", "low", "high")}
        | {"worlds": each.worlds, "p": each.p, "p_holm": each.adjusted, "equivalence": each.hypothesis.equivalence}
        | {"missing": each.missing, "verdict": each.verdict}
        for each in outcomes
    ]


def drawing_tables(drawings: Drawings) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Means of each generator, and what the first one changes against each of the others."""
    names = [name for name in DRAWN if any(name in each.values for each in drawings.judged)]
    means, changes = [], []
    for generator in drawings.generators:
        found = [drawings.mean(generator, name) for name in names]
        means.append([generator, *_with_worlds(found, "{:.3f}")])
    for other in drawings.generators[1:]:
        found = [drawings.difference(drawings.generators[0], other, name) for name in names]
        changes.append([drawings.generators[0], other, *_with_worlds(found, "{:+z.3f}")])
    titles = [DRAWN[name] for name in names]
    return {
        "Drawings, as the judge reads them": (["generator", "worlds", *titles], means),
        "Differences of the drawings": (["", "minus", "worlds", *titles], changes),
    }


def share_rows(study: Study) -> list[list[str]]:
    """One row an arm that has the study's ratio: its share of the attainable gain."""
    compared, ratio, rows = study.comparison, study.chosen_ratio(), []
    for arm in dict.fromkeys(treatment.arm for treatment in study.treatments if treatment.ratio == ratio):
        share = share_of_attainable(study, arm) if arm not in (compared.control, compared.oracle) else None
        if share is not None:
            bounds = "no bounds" if share.low is None else f"{share.low:.2f} to {share.high:.2f}"
            rows.append([str(study.at(arm, ratio)), f"{share.value:.2f}", bounds, str(share.worlds)])
    return rows


def warnings(study: Study, outcomes: Sequence[Outcome] = ()) -> list[str]:
    """What makes cells, drawings and the arms of hypotheses unfair to each other, in sentences."""
    found = []
    if undefined := sum(cell.values.get(study.comparison.endpoint) is None for cell in study.cells):
        cells = counted(undefined, "cell has", "cells have")
        found.append(f"{cells} no {study.endpoint}: another task, or a test set of one class.")
    found += _warnings_of_convergence([cell.converged for cell in study.cells])
    if uneven := study.uneven():
        found.append(
            f"In {counted(len(uneven), 'cell')} another number of images was added than in the control, which is "
            f"unfair (the first: {uneven[0]}); give `draw` a larger --limit, or --variants."
        )
    compared = [(first, second) for first, second, _ in study.differences()] if study.cells else []
    if unequal := [said for pair in compared if (said := study.unequal_worlds(*pair))]:
        found.append(
            f"{counted(len(unequal), 'comparison is', 'comparisons are')} of arms that are finished in different "
            f"worlds (the first: {unequal[0]}): their means are of different worlds."
        )
    found += [f"{each.name}: {each.unequal}." for each in outcomes if each.unequal]
    found += _warnings_of_drawings(study.drawings)
    found += [
        f"Cells of {world} come from several machines ({'; '.join(names)}), whose classifiers differ by more than arms "
        "do: compute the whole world on one of them."
        for world, names in study.several("machine").items()
    ]
    return found + [
        f"{what} of {world} were made by the code of several commits ({'; '.join(names)}): whether it does the same in "
        "all of them was not checked."
        for what, rows in (("Cells", study), ("Drawings", study.drawings))
        for world, names in rows.several("commit").items()
    ]


def _warnings_of_convergence(verdicts: Sequence[str]) -> list[str]:
    """How many of the classifiers, whose ``verdicts`` are those of ``Cell.converged``, may not have converged."""
    short = sum(each.startswith("False") for each in verdicts)
    unknown = sum(each in ("", OPEN) for each in verdicts)
    older = sum(each.endswith(OLDER_RULE) for each in verdicts)
    of = f"of {len(verdicts)} classifiers"
    said = [
        (short, f"{short} {of} had not converged; give them more `steps`, the same in every arm."),
        (unknown, f"Whether {unknown} {of} had converged is open: the notes in their metrics.json say why."),
        (
            older,
            f"{older} {of} were judged by the rule of an older version, which took a falling validation loss for a "
            "sign that training had not converged, and was never open because of few validation patients.",
        ),
    ]
    return [text for count, text in said if count]


def _warnings_of_drawings(drawings: Drawings) -> list[str]:
    """What makes the drawings of generators unfair to each other, in sentences."""
    first, *others = drawings.generators or [""]
    found = []
    for other in others:
        names = [name for name in DRAWN if drawings.difference(first, other, name)]
        said = dict.fromkeys(said for name in names if (said := drawings.unequal(first, other, name)))
        found += [f"{first} and {other}: {each}." for each in said]
    return found + [
        f"Drawings of {world} come from several machines ({'; '.join(names)}), whose networks draw and judge "
        "differently: compute the whole world on one of them."
        for world, names in drawings.several("machine").items()
    ]


def write_study_report(
    folder: Path,
    name: str,
    study: Study,
    notes: Sequence[str],
    outcomes: Sequence[Outcome] = (),
    tested_by: str | None = None,
) -> None:
    """study.md and study.html in ``folder``; of cells results.csv (a row a cell) and dose_response.png, of drawings
    drawings.csv (a row a number), of hypotheses hypotheses.csv.

    ``notes``: how all of it came about; ``tested_by``: the study that tests hypotheses about this one.
    """
    notes = [f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", *notes, *reading_notes(study), *warnings(study, outcomes)]
    titles = ["", "", "endpoint", "difference", "worlds", "p", "p (Holm)", "verdict"]
    tables = {"Hypotheses": (titles, outcome_rows(outcomes))}
    if outcomes:
        write_csv(folder / "hypotheses.csv", hypothesis_rows(outcomes))
    rows: list[dict[str, Any]] = []
    if study.cells:
        rows = cell_rows(study)
        write_csv(folder / RESULTS, rows)
        write_figure(folder / "dose_response.png", dose_figure(study), dpi=130)
        tables |= cell_tables(study)
    if study.drawings.judged:
        write_csv(folder / DRAWINGS, drawing_rows(study.drawings))
        tables |= drawing_tables(study.drawings)
    tables = {title: table for title, table in tables.items() if table[1]}
    conclusion = paragraph(study, bool(outcomes), tested_by)
    parts = [f"# Study: {name}", *notes, conclusion]
    parts += [part for title, table in tables.items() for part in (f"## {title}", markdown_table(*table))]
    parts += [f"![{study.endpoint} by ratio](dose_response.png)"] if rows else []
    write_text(folder / "study.md", "\n\n".join(parts) + "\n")
    cells = ([SHOWN.get(key, key.replace("_", " ")) for key in rows[0]], list(map(_cell_texts, rows))) if rows else None
    values: dict[str, Any] = {"conclusion": conclusion, "notes": notes, "tables": tables, "cells": cells}
    if study.compare is not None and rows:
        compared = {arm: getattr(study.comparison, arm) for arm in ("main", "control", "baseline")}
        values["compared"] = {"endpoint": study.endpoint, **compared}
    write_page(folder / "study.html", "study", name=name, **values)


def _cell_texts(row: Mapping[str, Any]) -> list[Any]:
    """A row of results.csv for the page: ratio and seconds with the digits that they have, no empty cells."""
    forms = {"ratio": "{:g}", "seconds": "{:.0f}"}
    known = {key: None if value == "" else value for key, value in row.items()}
    return [forms[key].format(value) if key in forms and value is not None else value for key, value in known.items()]


def reading_notes(study: Study) -> list[str]:
    """How the tables are to be read."""
    notes = [
        "Means over worlds, the seeds of generators and classifiers averaged first; in brackets 95 % intervals, "
        "Student's t over worlds. Differences are paired by world and seed. Where the interval of a mean would leave "
        "the values that its number can have, it ends there."
    ]
    if study.drawings.judged:
        notes.append(
            "The judge is a classifier of lesion types that no generator and no other classifier has to do with. "
            "Detection, agreement and bits are about lesions that are not subtle. The seam is the gradient at the "
            "masks' contours over that of the real training lesions: 1 is a real border, more is an edge that they do "
            "not have, less is blurred; its distance from 1 is an error. A generator of true lesions (oracle) says how "
            "well the judge reads."
        )
    return notes


def cell_tables(study: Study) -> dict[str, tuple[list[str], list[list[str]]]]:
    """What the cells say, by title."""
    shown = [metric for metric in SHOWN if any(metric in cell.values for cell in study.cells)]
    return {
        "Share of the attainable gain": (["arm", "share", "95 % (Fieller)", "worlds"], share_rows(study)),
        "Means": (["arm", "worlds", *(SHOWN[metric] for metric in shown)], mean_rows(study, shown)),
        "Differences": (["", "minus", study.endpoint, "worlds", "verdict"], difference_rows(study)),
    }
