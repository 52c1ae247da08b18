"""How wide the interval of a reader study is going to be, and how many readers and pictures a narrower one needs.

The model is that of Obuchowski and Rockette (1995) for one modality. The mean AUC (or accuracy) of R readers varies
with the readers, whose true values have the standard deviation READER_SD, and with the pictures: an AUC of one reader
from N real and N drawn pictures has the variance V(N) of Hanley and McNeil (1982), and readers of the same pictures
share CORRELATION of it. So Var = (READER_SD^2 + (1 - CORRELATION) V) / R + CORRELATION V; the interval uses Student's
t with the degrees of freedom of Hillis (2007). Both constants are assumptions.
"""

import math
from collections.abc import Iterable
from functools import cache

from scipy.stats import t as student

from ldm.core.tables import counted

READER_SD = 0.06
CORRELATION = 0.4
EXPECTED = 0.65  # AUC or accuracy that is expected: drawn pictures that readers can tell, but not easily
MOST_READERS, MOST_CASES = 50, 2000


def half_width(readers: int, cases: int, design: str) -> float:
    """Half the expected 95 % interval of the mean AUC (single) or accuracy (pairs).

    ``cases``: drawn pictures, as many as real ones; for pairs the number of pairs.
    """
    variance = _pair_variance(cases) if design == "pairs" else _auc_variance(cases)
    own, shared = (READER_SD**2 + (1 - CORRELATION) * variance) / readers, CORRELATION * variance
    if readers == 1:
        return 1.96 * math.sqrt(variance)  # of this reader, not of readers
    freedom = (readers - 1) * ((own + shared) / own) ** 2
    return _quantile(round(freedom, 3)) * math.sqrt(own + shared)


@cache
def _quantile(freedom: float) -> float:
    return float(student.ppf(0.975, freedom))


def _auc_variance(cases: int) -> float:
    """Hanley and McNeil's variance of an AUC of EXPECTED from as many real as drawn pictures."""
    area = EXPECTED
    both, either = area / (2 - area), 2 * area**2 / (1 + area)
    return (area * (1 - area) + (cases - 1) * (both - area**2 + either - area**2)) / cases**2


def _pair_variance(cases: int) -> float:
    return EXPECTED * (1 - EXPECTED) / cases


def fewest(wanted: float, numbers: Iterable[tuple[int, int]], design: str) -> tuple[int, int] | None:
    """The first (readers, cases) of ``numbers`` whose half width is at most ``wanted``; None if there is none."""
    return next((pair for pair in numbers if half_width(*pair, design) <= wanted), None)


def what_it_needs(wanted: float, readers: int, cases: int, design: str) -> str:
    """In words: how many readers with these ``cases``, or cases with these ``readers``, a half width needs."""
    what = "pairs" if design == "pairs" else "drawn and as many real pictures"
    by_readers = fewest(wanted, ((each, cases) for each in range(2, MOST_READERS + 1)), design)
    by_cases = fewest(wanted, ((readers, each) for each in range(2, MOST_CASES + 1)), design)
    ways = [f"{by_readers[0]} readers with {cases} {what}"] if by_readers else []
    ways += [f"{counted(readers, 'reader')} with {by_cases[1]} {what}"] if by_cases else []
    if not ways:
        both = fewest(wanted, ((each, 10 * each) for each in range(2, MOST_CASES // 10)), design)
        ways = [f"{both[0]} readers with {both[1]} {what}"] if both else ["more than this can plan for"]
    return f"plus or minus {wanted:g} needs about " + ", or ".join(ways)
