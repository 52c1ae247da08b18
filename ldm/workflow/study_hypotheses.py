"""Hypotheses that a study has written down: t tests over worlds, equivalence, Holm's correction, Fieller's interval.

Every test takes one number a world. Differences are tested two-sided; equivalence by two one-sided tests (TOST,
Schuirmann 1987), whose larger p value counts. Holm's step-down correction (1979) is over all hypotheses of the study,
unfinished ones counting as p = 1, so that a look before the end cannot make a threshold easier. No torch.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ldm.core.tables import counted
from ldm.workflow.study_keys import Hypothesis
from ldm.workflow.study_results import LEVEL, Interval, Study, interval


@dataclass(frozen=True)
class Outcome:
    """A hypothesis and what the cells say of it; ``change`` and ``p`` are None without worlds to tell.

    ``adjusted`` is Holm's p value, ``missing`` how many cells of its two arms, or drawings of its two generators, are
    still to come, ``unequal`` how their worlds or numbers of images differ, in words.
    """

    name: str
    asked: str
    endpoint: str
    hypothesis: Hypothesis
    change: Interval | None
    p: float | None
    adjusted: float
    missing: int
    unequal: str | None = None

    @property
    def worlds(self) -> int:
        """How many worlds the difference is of."""
        return self.change.worlds if self.change else 0

    @property
    def verdict(self) -> str:
        """What the corrected test supports; nothing before all that it is about is finished."""
        if self.missing:
            return f"open: {counted(self.missing, self.hypothesis.of.removesuffix('s'))} to come"
        if self.change is None or self.p is None:
            return "cannot be tested: two worlds at least"
        shown, margin = self.adjusted < 1 - LEVEL, self.hypothesis.equivalence
        if margin is not None:
            return f"equivalent within ±{margin:g}" if shown else f"equivalence within ±{margin:g} is not shown"
        return ("higher" if self.change.mean > 0 else "lower") if shown else "a difference is not shown"


@dataclass(frozen=True)
class Share:
    """A part of what can be gained at most, with its 95 % interval; the bounds are None where there is none."""

    value: float
    low: float | None
    high: float | None
    worlds: int


def outcomes(hypotheses: Mapping[str, Hypothesis], own: Study, others: Mapping[str, Study]) -> list[Outcome]:
    """Every hypothesis tested on cells or drawings of the study, or on those of the one of ``others`` that it names."""
    found: list[Outcome] = []
    for name, hypothesis in hypotheses.items():
        study = others[hypothesis.study] if hypothesis.study else own
        if hypothesis.of == "drawings":
            one, other = hypothesis.minus
            asked, endpoint = f"{one} minus {other}", hypothesis.endpoint or ""
            values = list(study.drawings.paired(one, other, endpoint).values())
            missing = study.drawings.unfinished((one, other))
            unequal = study.drawings.unequal(one, other, endpoint)
        else:
            first, second = (study.at(arm, study.chosen_ratio()) for arm in hypothesis.minus)
            asked, endpoint = f"{first} minus {second}", hypothesis.endpoint or study.comparison.endpoint
            values = list(study.paired(first, second, endpoint).values())
            missing = study.unfinished((first, second))
            unequal = study.unequal(first, second, endpoint)
        p = None
        if len(values) > 1:
            margin = hypothesis.equivalence
            p = t_test(values) if margin is None else equivalence_test(values, margin)
        place = f" ({hypothesis.study})" if hypothesis.study else ""
        change = interval(values) if values else None
        found.append(Outcome(name, asked + place, endpoint, hypothesis, change, p, 1.0, missing, unequal))
    adjusted = holm([1.0 if each.p is None or each.missing else each.p for each in found])
    return [replace(each, adjusted=value) for each, value in zip(found, adjusted, strict=True)]


def t_test(values: Sequence[float]) -> float:
    """Two-sided p value of Student's one-sample t test of the mean against 0; of two values at least."""
    return min(1.0, 2 * min(_below(values, 0.0), _below([-value for value in values], 0.0)))


def equivalence_test(values: Sequence[float], margin: float) -> float:
    """The larger p value of the two one-sided t tests of the mean against -``margin`` and ``margin``."""
    return max(_below(values, margin), _below([-value for value in values], margin))


def _below(values: Sequence[float], bound: float) -> float:
    """p value of the one-sided t test that the mean lies below ``bound``."""
    from scipy.stats import t

    distance, error = statistics.fmean(values) - bound, statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:  # all worlds say the same
        return 0.0 if distance < 0 else 1.0
    return float(t.cdf(distance / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order of the given ones."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def share_of_attainable(study: Study, arm: str) -> Share | None:
    """(``arm`` - control) / (oracle - control) of the endpoint at the study's ratio.

    None without common worlds, and where the oracle gains nothing: there is nothing to have a share of.
    """
    compared, ratio = study.comparison, study.chosen_ratio()
    if compared.oracle is None:
        return None
    control = study.at(compared.control, ratio)
    gains = study.paired(study.at(arm, ratio), control)
    attainable = study.paired(study.at(compared.oracle, ratio), control)
    worlds = [world for world in gains if world in attainable]
    if not worlds or statistics.fmean(attainable[world] for world in worlds) <= 0:
        return None
    return fieller([gains[world] for world in worlds], [attainable[world] for world in worlds])


def fieller(above: Sequence[float], below: Sequence[float]) -> Share:
    """The ratio of two means, paired by world, with Fieller's interval (1954).

    It holds those r for which the mean of above - r * below is not told from 0 by Student's t test. A bootstrap over
    five or eight worlds is too narrow, and one of single ratios has no mean. Where the mean of ``below`` is not told
    from 0 itself, no r is excluded on one side at least: then there are no bounds.
    """
    count, top, bottom = len(above), statistics.fmean(above), statistics.fmean(below)
    value = top / bottom
    if count < 2:
        return Share(value, None, None, count)
    from scipy.stats import t

    scale = float(t.ppf((1 + LEVEL) / 2, count - 1)) ** 2 / count
    a = bottom**2 - scale * statistics.variance(below)
    b = top * bottom - scale * statistics.covariance(above, below)
    c = top**2 - scale * statistics.variance(above)
    if a <= 0:
        return Share(value, None, None, count)
    half = math.sqrt(max(0.0, b * b - a * c))
    return Share(value, (b - half) / a, (b + half) / a, count)
