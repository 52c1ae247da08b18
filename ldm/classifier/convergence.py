"""Whether a training had converged: one rule for every run, from its history.csv. No torch."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.core.tables import read_table

COLUMNS = ("phase", "epoch", "train_loss", "val_loss")
SCORES = {"val_auc": "AUC", "val_dice": "Dice"}  # the columns by which an epoch is chosen, with names for readers
PARTS = 5  # the last fifth of the epochs is compared with the fifth before
RISE = 0.01  # of the mean validation AUC (or Dice), above which training had not converged
LOSS_FALL = 0.03  # of the mean validation loss, as a share of it, above which it had not


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv; none where there is no such file."""
    path = folder / "history.csv"
    return read_table(path, COLUMNS, "training log") if path.exists() else []


def score_column(row: Mapping[str, Any]) -> str:
    """The column of a row of history.csv by which the epoch is chosen."""
    return next(name for name in SCORES if name in row)


def convergence(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """``converged`` and, as ``convergence``, the numbers behind it, from the rows of the last phase.

    The means over the last fifth of the epochs are compared with those over the fifth before. Training had not
    converged where the validation AUC (or Dice) still rose by more than RISE or the validation loss still fell by more
    than LOSS_FALL of itself. ``converged`` is None for fewer than PARTS epochs. The learning rate falls to zero at the
    end, which flattens both curves: the rule finds what is far from trained, not what twice the steps would still gain.
    """
    last = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    count = len(last) // PARTS
    if not count:
        return {"converged": None, "convergence": {}}
    before, after = last[-2 * count : -count], last[-count:]
    loss_before, loss = (statistics.fmean(float(row["val_loss"]) for row in part) for part in (before, after))
    fall = 1 - loss / max(loss_before, 1e-12)
    rise, column = None, score_column(last[0])
    if all(row[column] for row in last):  # an AUC of one class is undefined throughout
        score_before, score = (statistics.fmean(float(row[column]) for row in part) for part in (before, after))
        rise = score - score_before
    converged = fall <= LOSS_FALL and (rise is None or rise <= RISE)
    return {
        "converged": converged,
        "convergence": {"epochs": count, "score": SCORES[column], "score_rise": rise, "loss_fall": fall},
    }


def convergence_note(found: Mapping[str, Any]) -> str | None:
    """A sentence for the reader where training had not converged, or nobody can tell; None where it had."""
    if found["converged"] is None:
        return f"Whether training had converged cannot be told from fewer than {PARTS} epochs."
    if found["converged"]:
        return None
    numbers = found["convergence"]
    score = f"the validation {numbers['score']} changed by"
    rise = "" if numbers["score_rise"] is None else f"{score} {numbers['score_rise']:+.3f} and "
    return (
        f"Training had not converged: from the fifth of the epochs before to the last one {rise}the validation loss "
        f"by {-100 * numbers['loss_fall']:+.1f} %; train longer (`steps` or EPOCHS), in every arm that is compared."
    )
