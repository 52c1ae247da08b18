"""Whether a training had converged: one rule for every run, from its history.csv. No torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.core.tables import read_table

COLUMNS = ("phase", "epoch", "train_loss", "val_loss")
SCORES = {"val_auc": "AUC", "val_dice": "Dice"}  # the columns by which an epoch is chosen, with names for readers
PARTS = 5  # the last fifth of the epochs is compared with the fifth before
LEAST = 2  # epochs that are compared with as many before, at least: one alone has no standard error
RISE = 0.01  # of the mean validation AUC (or Dice): less matters to nobody
FALL = 0.03  # of the mean validation loss, as a share of it, likewise
ROUNDING = 1e-9  # a change that is longer than its bound by less is as long


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv; none where there is no such file."""
    path = folder / "history.csv"
    return read_table(path, COLUMNS, "training log") if path.exists() else []


def score_column(row: Mapping[str, Any]) -> str:
    """The column of a row of history.csv by which the epoch is chosen."""
    return next(name for name in SCORES if name in row)


class Change(NamedTuple):
    """How a mean differs from the one before, and the standard error of that by the scatter within both."""

    value: float
    error: float


def convergence(rows: Sequence[Mapping[str, str]], few: bool = False) -> dict[str, Any]:
    """``converged`` and, as ``convergence``, the numbers behind it, from the rows of the last phase.

    The means over the last fifth of the epochs (LEAST at least) are compared with those over as many before. Training
    had not converged where the validation AUC (or Dice), by which the epoch is chosen, rose by more than RISE and by
    more than one standard error: so a plateau counts as one however noisy it is. The images are the same in all
    epochs, so it is the scatter of the epochs that says what is noise. The validation loss decides only where the AUC
    is undefined: it falls as the learning rate does, long after the AUC has stopped rising.

    ``converged`` is None where nobody can tell: for fewer than 2 * LEAST + 1 epochs or numbers that are not finite,
    without numbers then, and where the AUC did not rise although validation holds ``few`` patients, whose order may be
    right by luck. The learning rate falls to zero at the end, which flattens both curves: the rule finds what is far
    from trained, not what twice the steps would still gain.
    """
    last = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    count, column = max(LEAST, len(last) // PARTS), score_column(last[0])
    compared = last[-2 * count :]
    losses = [float(row["val_loss"]) for row in compared]
    scores = [float(row[column]) for row in compared] if all(row[column] for row in last) else []  # none of one class
    if len(last) < PARTS or not all(map(math.isfinite, losses + scores)):
        return {"converged": None, "convergence": {}}
    before, fall = statistics.fmean(losses[:count]), _change([-loss for loss in losses])
    fall = Change(fall.value / max(before, 1e-12), fall.error / max(before, 1e-12))
    rise = _change(scores) if scores else None
    change, least = (rise, RISE) if rise else (fall, FALL)
    better = change.value > max(least, change.error) + ROUNDING
    numbers = {"epochs": count, "score": SCORES[column], "score_rise": None, "score_rise_error": None}
    numbers |= {"score_rise": rise.value, "score_rise_error": rise.error} if rise else {}
    numbers |= {"loss_fall": fall.value, "loss_fall_error": fall.error}
    return {"converged": False if better else None if few and rise else True, "convergence": numbers}


def _change(values: Sequence[float]) -> Change:
    """The mean of the second half of the values minus that of the first, with its standard error."""
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    first, second = map(statistics.fmean, halves)
    return Change(second - first, math.sqrt(sum(statistics.variance(half) / len(half) for half in halves)))


def convergence_note(found: Mapping[str, Any]) -> str | None:
    """A sentence for the reader where training had not converged, or nobody can tell; None where it had."""
    numbers = found["convergence"]
    if not numbers:
        return (
            f"Whether training had converged cannot be told from fewer than {PARTS} epochs, or from numbers in "
            "history.csv that are not finite."
        )
    if found["converged"] is None:
        return (
            "Whether training had converged cannot be told from so few validation patients; their score did not rise."
        )
    if found["converged"]:
        return None
    if numbers["score_rise"] is None:
        loss, error = 100 * numbers["loss_fall"], 100 * numbers["loss_fall_error"]
        change = f"the validation loss fell by {loss:.1f} % (standard error {error:.1f} %)"
    else:
        rise, error = numbers["score_rise"], numbers["score_rise_error"]
        change = f"the validation {numbers['score']} rose by {rise:.3f} (standard error {error:.3f})"
    return (
        f"Training had not converged: over the last {numbers['epochs']} epochs, compared with as many before, {change};"
        " train longer (`steps` or EPOCHS), in every arm that is compared."
    )
