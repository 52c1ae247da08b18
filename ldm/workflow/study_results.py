"""What the cells of a study say together: means, paired differences, intervals, a plot, careful sentences. No torch.

A cell is one classifier: (world, arm, ratio, seed). A world is the unit of chance: classifier seeds are averaged within
it first, and intervals are Student's t over worlds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, write_text
from ldm.core.tables import markdown_table, write_csv
from ldm.reports.figures import write_figure
from ldm.reports.html import write_page
from ldm.workflow.study_design import Compared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95  # of every interval
AUC, CHOICE = "auc", "validation_auc"  # what is reported first; what the ratio is chosen by
SHOWN = {AUC: "test AUC", "average_precision": "average precision", "balanced_accuracy": "balanced accuracy"}
SHOWN |= {"recall": "recall", "specificity": "specificity", CHOICE: "validation AUC"}


@dataclass(frozen=True, order=True)
class Treatment:
    """An arm, and how many extra images per real diseased one; None where there is nothing to count."""

    arm: str
    ratio: float | None = None

    def __str__(self) -> str:
        return self.arm if self.ratio is None else f"{self.arm} at {self.ratio:g}"


@dataclass(frozen=True)
class Cell:
    """One finished classifier; ``values`` are test metrics by name and validation_auc, None where undefined."""

    world: str
    treatment: Treatment
    seed: int
    values: dict[str, float | None]
    counts: dict[str, int | None]

    @property
    def key(self) -> tuple[str, Treatment, int]:
        """What no two cells of a study share."""
        return self.world, self.treatment, self.seed

    @property
    def added(self) -> int | None:
        """Images that joined the real ones: synthetic, or repeated. None where the metrics do not say."""
        known = [count for count in self.counts.values() if count is not None]
        return sum(known) if known and len(known) == len(self.counts) else None


@dataclass(frozen=True)
class Interval:
    """A mean over worlds with its 95 % interval; the bounds are None for a single world."""

    mean: float
    low: float | None
    high: float | None
    worlds: int

    def __str__(self) -> str:
        bounds = "one world: no interval" if self.low is None else f"95 % {self.low:+.3f} to {self.high:+.3f}"
        return f"{self.mean:+.3f} ({bounds})"

    @property
    def verdict(self) -> str:
        """What the interval of a difference supports."""
        if self.low is None or self.high is None:
            return "not shown (one world)"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not shown (the interval contains 0)"


def read_cell(folder: Path, world: str, treatment: Treatment, seed: int) -> Cell | None:
    """The cell in a classifier's output folder; None if it is not finished."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    found = read_json(path, "classifier's metrics")
    try:
        values = {name: each["value"] for name, each in found["test"].items() if isinstance(each, dict)}
        values[CHOICE] = found["validation"][AUC]
        counts = {name: found.get(name) for name in ("n_synthetic_used", "n_duplicated")}
        if AUC not in values:
            raise KeyError("test.auc")
    except (KeyError, TypeError, AttributeError) as error:
        raise MedSoftError(f"{path}: not the metrics of a tested classifier ({error}); delete its folder") from error
    return Cell(world, treatment, seed, values, counts)


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of independent values, one for each world."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


@dataclass
class Study:
    """All finished cells, looked at together."""

    cells: list[Cell]
    comparison: Compared

    @property
    def treatments(self) -> list[Treatment]:
        """Those with at least one finished cell, in the order in which they were given."""
        return list(dict.fromkeys(cell.treatment for cell in self.cells))

    def _runs(self, treatment: Treatment, metric: str) -> dict[tuple[str, int], float]:
        """Value by (world, seed), without undefined ones."""
        found = {(each.world, each.seed): each.values.get(metric) for each in self.cells if each.treatment == treatment}
        return {run: value for run, value in found.items() if value is not None}

    def mean(self, treatment: Treatment, metric: str = AUC) -> Interval | None:
        """Over worlds, seeds averaged first; None if nothing is defined."""
        return _over_worlds(self._runs(treatment, metric))

    def difference(self, first: Treatment, second: Treatment) -> Interval | None:
        """Test AUC of ``first`` - ``second``, paired by world and seed; None without a common pair."""
        ours, theirs = self._runs(first, AUC), self._runs(second, AUC)
        return _over_worlds({run: ours[run] - theirs[run] for run in ours if run in theirs})

    def ratios(self, arm: str) -> list[float]:
        """The ratios at which an arm has finished cells, from the smallest on."""
        return sorted(t.ratio for t in self.treatments if t.arm == arm and t.ratio is not None)

    def chosen_ratio(self) -> float | None:
        """The main arm's ratio: given, or the one with the best mean validation AUC over the runs that all ratios have
        (the smaller one on a tie). The test sets have no part in it. None while there is nothing to choose from."""
        if self.comparison.ratio is not None:
            return self.comparison.ratio
        ratios = self.ratios(self.comparison.main)
        runs = {ratio: self._runs(Treatment(self.comparison.main, ratio), CHOICE) for ratio in ratios}
        common = set.intersection(*(set(each) for each in runs.values())) if runs else set()
        if not common:
            return None
        over = {ratio: _over_worlds({run: runs[ratio][run] for run in common}) for ratio in ratios}
        means = {ratio: each.mean for ratio, each in over.items() if each is not None}
        return max(means, key=lambda ratio: (round(means[ratio], 6), -ratio))

    def differences(self) -> list[tuple[Treatment, Treatment, Interval]]:
        """Every treatment against the baseline, the control at its ratio and, for other arms, the main arm there."""
        found = []
        for treatment in self.treatments:
            others = [Treatment(self.comparison.baseline)]
            if treatment.arm != self.comparison.control and treatment.ratio is not None:
                others.append(Treatment(self.comparison.control, treatment.ratio))
                if treatment.arm != self.comparison.main:
                    others.append(Treatment(self.comparison.main, treatment.ratio))
            for other in others:
                if other != treatment and (change := self.difference(treatment, other)) is not None:
                    found.append((treatment, other, change))
        return found

    def uneven(self) -> list[str]:
        """Cells in which another number of images was added than in their control at that ratio, in words."""
        added = {cell.key: cell.added for cell in self.cells}
        found = []
        for (world, treatment, seed), number in added.items():
            control = Treatment(self.comparison.control, treatment.ratio)
            other = added.get((world, control, seed))
            if None not in (treatment.ratio, number, other) and number != other:
                found.append(f"{world}, seed {seed}: {number} in {treatment}, {other} in {control}")
        return found


def _over_worlds(runs: dict[tuple[str, int], float]) -> Interval | None:
    worlds: dict[str, list[float]] = defaultdict(list)
    for (world, _), value in runs.items():
        worlds[world].append(value)
    return interval([statistics.fmean(values) for values in worlds.values()]) if worlds else None


def paragraph(study: Study) -> str:
    """What the cells support and what they do not, in sentences that follow from the intervals alone."""
    compared, ratio = study.comparison, study.chosen_ratio()
    if ratio is None:
        return f"Nothing can be said yet: no finished cell of {compared.main} has a validation AUC."
    how = "fixed beforehand" if compared.ratio is not None else "the one with the best validation AUC of these worlds"
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
    parts.append(
        "One comparison is the claim; all others are looks at the same worlds, and their intervals are not widened for "
        "their number."
    )
    return " ".join(part for part in parts if part)


def _sentence(study: Study, first: Treatment, second: Treatment, lead: str = "") -> str:
    """What one difference of the test AUC says; empty if there is none."""
    change = study.difference(first, second)
    if change is None:
        return ""
    worlds = f"{change.worlds} world{'s' if change.worlds > 1 else ''}"
    shown = {"higher": "a gain is shown", "lower": "a loss is shown"}
    said = shown.get(change.verdict, f"a difference is {change.verdict}")
    return f"{lead}{first} minus {second}: {change} of test AUC over {worlds}; {said}."


def mean_rows(study: Study, metrics: Sequence[str]) -> list[list[str]]:
    """One row a treatment: its name, worlds, then mean and interval of each metric."""
    rows = []
    for treatment in study.treatments:
        means = [study.mean(treatment, metric) for metric in metrics]
        worlds = max((each.worlds for each in means if each), default=0)
        rows.append([str(treatment), str(worlds), *(_bounds(each, "{:.3f}") for each in means)])
    return rows


def difference_rows(study: Study) -> list[list[str]]:
    """One row a pair: both names, the difference of the test AUC with its interval, worlds, verdict."""
    return [
        [str(first), str(second), _bounds(change, "{:+.3f}"), str(change.worlds), change.verdict]
        for first, second, change in study.differences()
    ]


def _bounds(found: Interval | None, form: str) -> str:
    if found is None:
        return "-"
    mean = form.format(found.mean)
    return mean if found.low is None else f"{mean} ({form.format(found.low)} to {form.format(found.high)})"


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
            below = [0.0 if each.low is None else each.mean - each.low for each in shown.values()]
            above = [0.0 if each.high is None else each.high - each.mean for each in shown.values()]
            axes.errorbar(list(shown), heights, [below, above], color=colour, marker="o", capsize=3, label=arm)
    axes.set_xticks(range(len(every)), [f"{ratio:g}" for ratio in every])
    label = f"test AUC minus that of {compared.baseline}\n(mean and 95 % over worlds)"
    axes.set(xlabel="images added per real diseased image", ylabel=label)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return figure


def timing(seconds: Mapping[Any, float | None], generators: Mapping[str, float]) -> str:
    """What cells and generators took."""
    cells, parts = [value for value in seconds.values() if value is not None], []
    if cells:
        parts.append(f"a cell took {statistics.median(cells):.0f} s (median; at most {max(cells):.0f} s)")
    if generators:
        slowest = max(generators, key=lambda name: generators[name])
        middle = statistics.median(generators.values())
        parts.append(f"a generator {middle:.0f} s (median; at most {generators[slowest]:.0f} s, {slowest})")
    total = (sum(cells) + sum(generators.values())) / 3600
    return f"{', '.join(parts)}; {total:.2f} h together." if parts else "not recorded."


def write_study_report(
    folder: Path, name: str, study: Study, seconds: Mapping[Any, float | None], notes: Sequence[str]
) -> None:
    """results.csv (a row a cell), dose_response.png, study.md and study.html in ``folder``.

    ``seconds`` by the cell's key; ``notes``: how the cells came about.
    """
    values = list(dict.fromkeys(name for cell in study.cells for name in cell.values))
    rows = [
        {"world": cell.world, "arm": cell.treatment.arm, "ratio": cell.treatment.ratio, "seed": cell.seed}
        | {name: cell.values.get(name) for name in values}
        | cell.counts
        | {"seconds": seconds.get(cell.key)}
        for cell in study.cells
    ]
    write_csv(folder / "results.csv", rows)
    write_figure(folder / "dose_response.png", dose_figure(study), dpi=130)
    shown = [metric for metric in SHOWN if any(metric in cell.values for cell in study.cells)]
    heads = (["arm", "worlds", *(SHOWN[metric] for metric in shown)], ["", "minus", "test AUC", "worlds", "verdict"])
    tables = (mean_rows(study, shown), difference_rows(study))
    notes = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        *notes,
        "Means over worlds, the classifier seeds averaged first; in brackets 95 % intervals, Student's t over worlds. "
        "Differences are paired by world and seed.",
    ]
    if undefined := sum(cell.values.get(AUC) is None for cell in study.cells):
        notes.append(f"{undefined} cells have no test AUC: their test set holds one class.")
    if uneven := study.uneven():
        notes.append(
            f"In {len(uneven)} cells another number of images was added than in the control, which is unfair (the "
            f"first: {uneven[0]}); give `draw` a larger --limit, or --variants."
        )
    conclusion = paragraph(study)
    parts = [f"# Study: {name}", *notes, conclusion, "## Means", markdown_table(heads[0], tables[0])]
    parts += ["## Differences", markdown_table(heads[1], tables[1]), "![AUC by ratio](dose_response.png)"]
    write_text(folder / "study.md", "\n\n".join(parts) + "\n")
    pairs = {"means": (heads[0], tables[0]), "differences": (heads[1], tables[1])}
    write_page(folder / "study.html", "study", name=name, conclusion=conclusion, notes=notes, **pairs)
