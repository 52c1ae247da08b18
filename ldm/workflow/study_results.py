"""What the cells of a study say together: means, paired differences, intervals. No torch.

A cell is one classifier: (world, arm, ratio, generator seed, seed). A world is the unit of chance: the seeds of
generators and classifiers are averaged within it first, and intervals are Student's t over worlds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ldm.core.errors import MedSoftError
from ldm.core.files import read_json
from ldm.core.tables import counted
from ldm.workflow.study_keys import Compared

Name = TypeVar("Name")
LEVEL = 0.95  # of every interval
OPEN = "open"  # a verdict on convergence that nobody can give
OLDER_RULE = " (older rule)"  # behind a verdict by the rule of versions that wrote no standard error
COUNTS = ("n_synthetic_used", "n_duplicated")  # of metrics.json: images that joined the real ones
SHARE = (0.0, 1.0)  # between which every number of a classifier lies
# Of the drawings' numbers. The asked type in the drawn one is corrected for chance, and may be below 0.
DRAWN_WITHIN = {"detection": SHARE, "agreement": SHARE}
DRAWN_WITHIN |= dict.fromkeys(("seam", "seam_error", "changed_outside"), (0.0, math.inf))
CHOSEN_BY = ("auc", "dice")  # what the epoch is chosen by on validation, and so the ratio: the first that there is


@dataclass(frozen=True, order=True)
class Treatment:
    """An arm, and how many extra images per real diseased one; None where there is nothing to count."""

    arm: str
    ratio: float | None = None

    def __str__(self) -> str:
        return self.arm if self.ratio is None else f"{self.arm} at {self.ratio:g}"


Key = tuple[str, Treatment, int | None, int]  # world, treatment, generator seed, seed
DrawingKey = tuple[str, str, int | None]  # world, generator, generator seed


@dataclass(frozen=True)
class Cell:
    """One finished classifier; ``values`` are test metrics by name and validation_auc (or _dice), None where undefined.

    ``converged``: True, False or OPEN as text, perhaps with OLDER_RULE; empty where metrics.json has no verdict.
    ``groups``: of lesions of one kind and severity the test AUC against all healthy images, or the Dice, by "kind,
    severity".
    """

    world: str
    treatment: Treatment
    seed: int
    values: dict[str, float | None]
    counts: dict[str, int | None]
    generator_seed: int | None = None
    seconds: float | None = None
    machine: str = ""  # empty where the record does not say
    commit: str = ""
    settings: str = ""  # a fingerprint of what it was made with, see ``settings_of``
    n_train_diseased: int | None = None
    converged: str = ""
    groups: dict[str, float | None] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What no two cells of a study share."""
        return self.world, self.treatment, self.generator_seed, self.seed

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
        bounds = "one world: no interval" if self.low is None else f"95 % {self.low:+z.3f} to {self.high:+z.3f}"
        return f"{self.mean:+z.3f} ({bounds})"

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
        values |= {f"validation_{name}": found["validation"][name] for name in CHOSEN_BY if name in found["validation"]}
        counts = {name: found.get(name) for name in COUNTS}
        groups = {
            f"{each['lesion_type']}, {each['severity']}": next(each[name] for name in CHOSEN_BY if name in each)[
                "value"
            ]
            for each in found.get("groups", [])
        }
        if not any(name in values and f"validation_{name}" in values for name in CHOSEN_BY):
            raise KeyError(f"test and validation, {' or '.join(CHOSEN_BY)}")
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise MedSoftError(f"{path}: not the metrics of a tested classifier ({error}); delete its folder") from error
    more = {"n_train_diseased": found.get("n_train_diseased"), "converged": _verdict_on_convergence(found)}
    return Cell(world, treatment, seed, values, counts, groups=groups, **more)


def _verdict_on_convergence(metrics: Mapping[str, Any]) -> str:
    """As in ``Cell.converged``, from the content of metrics.json."""
    if "converged" not in metrics:
        return ""
    if metrics["converged"] is None:
        return OPEN
    return f"{metrics['converged']}{'' if 'score_rise_error' in metrics.get('convergence', {}) else OLDER_RULE}"


@dataclass(frozen=True)
class Drawing:
    """What the judge says of a generator's drawings in a world; ``counts``: of how many images each number is."""

    world: str
    generator: str
    generator_seed: int | None
    values: dict[str, float | None]
    counts: dict[str, int]
    machine: str = ""
    commit: str = ""
    settings: str = ""  # as a cell's

    @property
    def key(self) -> DrawingKey:
        """What no two of a study share."""
        return self.world, self.generator, self.generator_seed


def read_drawing(path: Path, world: str, generator: str, seed: int | None, judge: str | None) -> Drawing | None:
    """What tool/judge_results.py has written; None where it has not, or with another ``judge`` (SHA-256)."""
    if not path.exists():
        return None
    found = read_json(path, "judge's numbers")
    try:
        if found["judge_sha256"] != judge:
            return None
        values = {name: each["value"] for name, each in found["endpoints"].items()}
        counts = {name: each["n"] for name, each in found["endpoints"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise MedSoftError(f"{path}: not the numbers of a judge ({error}); delete it to judge again") from error
    return Drawing(world, generator, seed, values, counts)


@dataclass
class Drawings:
    """All drawings that are judged, looked at together; ``planned``: the keys of all that are to be.

    ``by_another_judge``: how many were read by another judge than the study's, and are left out.
    """

    judged: list[Drawing] = field(default_factory=list)
    planned: frozenset[DrawingKey] = frozenset()
    by_another_judge: int = 0

    @property
    def generators(self) -> list[str]:
        """Those with at least one judged drawing, in the order in which they were given."""
        return list(dict.fromkeys(each.generator for each in self.judged))

    def by_world(self, generator: str, endpoint: str) -> dict[str, float]:
        """The number by world, generator seeds averaged, without undefined ones."""
        return _means((each.world, each.values.get(endpoint)) for each in self.judged if each.generator == generator)

    def mean(self, generator: str, endpoint: str) -> Interval | None:
        """Over worlds; None if nothing is defined."""
        found = self.by_world(generator, endpoint)
        return interval(list(found.values()), *DRAWN_WITHIN.get(endpoint, ())) if found else None

    def paired(self, first: str, second: str, endpoint: str) -> dict[str, float]:
        """``first`` - ``second`` by world, of worlds that have both."""
        ours, theirs = self.by_world(first, endpoint), self.by_world(second, endpoint)
        return {world: ours[world] - theirs[world] for world in ours if world in theirs}

    def difference(self, first: str, second: str, endpoint: str) -> Interval | None:
        """Mean of ``paired`` over worlds; None without a common world."""
        found = self.paired(first, second, endpoint)
        return interval(list(found.values())) if found else None

    def unequal(self, first: str, second: str, endpoint: str) -> str | None:
        """In words, how the worlds or the numbers of drawings of two generators that are compared differ."""
        names = (first, second)
        found = _unequal_worlds({name: self.by_world(name, endpoint) for name in names})
        counts = {
            name: _means((each.world, each.counts.get(endpoint)) for each in self.judged if each.generator == name)
            for name in names
        }
        return _joined(found, _unequal_counts(counts, "of drawings was read", "of"))

    def several(self, what: str) -> dict[str, list[str]]:
        """The machines on which a world's drawings were read, or the commits, of worlds with several."""
        return _several(self.judged, what)

    def unfinished(self, generators: Iterable[str]) -> int:
        """How many planned drawings of these generators are not judged."""
        done = {each.key for each in self.judged}
        return sum(key[1] in generators and key not in done for key in self.planned)


def interval(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Interval:
    """Mean and Student's t interval of independent values, one for each world; it ends at ``least`` and ``most``."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(mean - half, min(least, mean)), min(mean + half, max(most, mean)), len(values))


@dataclass
class Study:
    """All finished cells, looked at together; ``planned``: the keys of all that are to be.

    ``drawings``: what the judge says. A study of nothing else has no cells, and no comparison of arms. ``settings``:
    what each planned cell and drawing is made with, as ``Cell.settings``.
    """

    cells: list[Cell]
    compare: Compared | None
    planned: frozenset[Key] = frozenset()
    drawings: Drawings = field(default_factory=Drawings)
    settings: Mapping[Key | DrawingKey, str] = field(default_factory=dict)

    @property
    def comparison(self) -> Compared:
        """Which arms are compared. MedSoftError for a study of drawings alone."""
        if self.compare is None:
            raise MedSoftError("compare: expected which arms are compared; this study is of drawings alone")
        return self.compare

    @property
    def treatments(self) -> list[Treatment]:
        """Those with at least one finished cell, in the order in which they were given."""
        return list(dict.fromkeys(cell.treatment for cell in self.cells))

    def _runs(self, treatment: Treatment, metric: str) -> dict[tuple[str, int], float]:
        """Value by (world, seed), generator seeds averaged, without undefined ones."""
        own = (cell for cell in self.cells if cell.treatment == treatment)
        return _means(((cell.world, cell.seed), cell.values.get(metric)) for cell in own)

    @property
    def endpoint(self) -> str:
        """The endpoint for a reader."""
        name = self.comparison.endpoint
        return "test AUC" if name == "auc" else f"test {name.replace('_', ' ')}"

    def mean(self, treatment: Treatment, metric: str | None = None) -> Interval | None:
        """Of the metric, or the endpoint, over worlds, seeds averaged first; None if nothing is defined."""
        return _over_worlds(self._runs(treatment, metric or self.comparison.endpoint))

    def paired(self, first: Treatment, second: Treatment, metric: str | None = None) -> dict[str, float]:
        """``first`` - ``second`` by world, paired by world and seed; without worlds that have no common pair."""
        metric = metric or self.comparison.endpoint
        ours, theirs = self._runs(first, metric), self._runs(second, metric)
        return _by_world({run: ours[run] - theirs[run] for run in ours if run in theirs})

    def difference(self, first: Treatment, second: Treatment, metric: str | None = None) -> Interval | None:
        """Mean of ``paired`` over worlds; None without a common pair."""
        found = self.paired(first, second, metric)
        return interval(list(found.values())) if found else None

    def unequal(self, first: Treatment, second: Treatment, metric: str | None = None) -> str | None:
        """In words, how the worlds or the numbers of added images of two treatments that are compared differ."""
        found = self.unequal_worlds(first, second, metric)
        if None in (first.ratio, second.ratio):
            return found
        added = {
            str(one): _means((cell.world, cell.added) for cell in self.cells if cell.treatment == one)
            for one in (first, second)
        }
        return _joined(found, _unequal_counts(added, "of images was added", "in"))

    def unequal_worlds(self, first: Treatment, second: Treatment, metric: str | None = None) -> str | None:
        """In words, how the worlds of two treatments that are compared differ."""
        metric = metric or self.comparison.endpoint
        return _unequal_worlds({str(each): _by_world(self._runs(each, metric)) for each in (first, second)})

    def at(self, arm: str, ratio: float | None) -> Treatment:
        """An arm at this ratio, or at none if its cells have none."""
        known = {*self.treatments, *(treatment for _, treatment, _, _ in self.planned)}
        return Treatment(arm) if Treatment(arm) in known else Treatment(arm, ratio)

    def unfinished(self, treatments: Iterable[Treatment]) -> int:
        """How many planned cells of these treatments are not finished."""
        done = {cell.key for cell in self.cells}
        return sum(key[1] in treatments and key not in done for key in self.planned)

    def several(self, what: str) -> dict[str, list[str]]:
        """The machines on which a world's cells were computed, or the commits, of worlds with several."""
        return _several(self.cells, what)

    def by_kind(self) -> "Study":
        """The same cells with the numbers of their kinds and severities as values."""
        return replace(self, cells=[replace(cell, values=dict(cell.groups)) for cell in self.cells])

    def ratios(self, arm: str) -> list[float]:
        """The ratios at which an arm has finished cells, from the smallest on."""
        return sorted(t.ratio for t in self.treatments if t.arm == arm and t.ratio is not None)

    def chosen_ratio(self) -> float | None:
        """The main arm's ratio: given, or the one with the best mean on validation over the runs that all ratios have
        (the smaller one on a tie). The test sets have no part in it. None while there is nothing to choose from."""
        if self.comparison.ratio is not None:
            return self.comparison.ratio
        ratios = self.ratios(self.comparison.main)
        chosen_by = f"validation_{'dice' if self.comparison.endpoint == 'dice' else 'auc'}"
        runs = {ratio: self._runs(Treatment(self.comparison.main, ratio), chosen_by) for ratio in ratios}
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
        for (world, treatment, generated, seed), number in added.items():
            control = Treatment(self.comparison.control, treatment.ratio)
            other = added.get((world, control, generated, seed), added.get((world, control, None, seed)))
            if None not in (treatment.ratio, number, other) and number != other:
                found.append(f"{world}, seed {seed}: {number} in {treatment}, {other} in {control}")
        return found


def _several(rows: Iterable[Cell | Drawing], what: str) -> dict[str, list[str]]:
    """What each world's rows say of ``what``, of worlds with several; rows that do not say it are left out."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if getattr(row, what):
            found[row.world][getattr(row, what)] = None
    return {world: list(names) for world, names in found.items() if len(names) > 1}


def _unequal_worlds(values: Mapping[str, Mapping[str, float]]) -> str | None:
    """In words, how the worlds of two named rows of numbers by world differ; None where one has none yet."""
    (first, ours), (second, theirs) = values.items()
    if ours.keys() == theirs.keys() or not ours or not theirs:
        return None
    both = len(ours.keys() & theirs.keys())
    over = f"the {both} that both have" if both else "none"
    there = f"{first} is there in {counted(len(ours), 'world')}, {second} in {len(theirs)}"
    return f"{there}; their difference is over {over}"


def _unequal_counts(counts: Mapping[str, Mapping[str, float]], what: str, of: str) -> str | None:
    """In words, in how many worlds two named rows of mean counts by world differ, and the first such world."""
    (first, ours), (second, theirs) = counts.items()
    worlds = [world for world in ours if world in theirs and ours[world] != theirs[world]]
    if not worlds:
        return None
    shown = f"{worlds[0]}: {ours[worlds[0]]:g} {of} {first}, {theirs[worlds[0]]:g} {of} {second}"
    return f"in {counted(len(worlds), 'world')} another number {what} ({shown})"


def _joined(*parts: str | None) -> str | None:
    return "; ".join(part for part in parts if part) or None


def _means(values: Iterable[tuple[Name, float | None]]) -> dict[Name, float]:
    """The mean of the values that are defined of each name, names in the order in which they come."""
    found: dict[Name, list[float]] = defaultdict(list)
    for name, value in values:
        if value is not None:
            found[name].append(value)
    return {name: statistics.fmean(each) for name, each in found.items()}


def _by_world(runs: dict[tuple[str, int], float]) -> dict[str, float]:
    return _means((world, value) for (world, _), value in runs.items())


def _over_worlds(runs: dict[tuple[str, int], float]) -> Interval | None:
    return interval(list(_by_world(runs).values()), *SHARE) if runs else None
