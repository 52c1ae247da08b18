"""How much of the lesion type that was asked for can be read in what was drawn: mutual information in bits. No torch.

Raw agreement misleads: a generator that draws the commonest type whatever it is asked agrees often, and tells nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.errors import MedSoftError
from ldm.core.tables import counted, read_table
from ldm.data.checks import FEWEST_PATIENTS
from ldm.data.samples import HEALTHY, Sample

DRAWS = 2000  # resamplings of patients, shufflings of what was drawn


def asked_drawn(asked: Sequence[str], drawn: Sequence[str], patients: Sequence[str]) -> dict[str, Any]:
    """What ``drawn`` types, as a judge names them (``healthy`` among them), tell about the ``asked`` ones.

    ``value``: the mutual information of the two in bits (Shannon 1948), corrected by the jackknife over patients
    (Miller 1974), since few images always seem to tell something: of independent types it is 0 on average, and can be
    a little below; ``as_counted``: without the correction; ``maximum``: that of a perfect generator, the entropy of
    what was asked; ``by_chance``: the mean of ``as_counted`` where the drawn types are dealt out at random; ``low``,
    ``high``: a 95 % bootstrap interval over the patients, moved by the resamples' own bias. ``agreement``: the share of
    equal types with such an interval. There are no intervals with fewer than FEWEST_PATIENTS patients. Raises
    MedSoftError where nothing was asked.
    """
    if not len(asked):
        raise MedSoftError("no image says in its meta.json which lesion_type was asked for: nothing to compare")
    (kinds, row), (names, column) = (np.unique(list(each), return_inverse=True) for each in (asked, drawn))
    owners, owner = np.unique(list(patients), return_inverse=True)
    shape = len(kinds), len(names)
    by_patient = np.zeros((len(owners), *shape))
    np.add.at(by_patient, (owner, row, column), 1)
    same = (kinds[:, None] == names[None, :]).ravel()
    table = by_patient.sum(0)
    counted, agreement = float(mutual_bits(table[None])[0]), float(table.ravel()[same].sum() / table.sum())
    resampling, rng = np.random.default_rng(0), np.random.default_rng(1)
    shuffled = np.zeros((DRAWS, *shape))
    for each in shuffled:
        np.add.at(each, (row, rng.permutation(column)), 1)
    maximum = float(entropy_bits(table.sum(1)[None])[0])
    value = min(_jackknife(by_patient, counted), maximum)
    found: dict[str, Any] = {"value": value, "low": None, "high": None, "maximum": maximum, "as_counted": counted}
    found |= {"by_chance": float(mutual_bits(shuffled).mean()), "n": len(asked), "n_patients": len(owners)}
    found["agreement"] = {"value": agreement, "low": None, "high": None}
    if len(owners) >= FEWEST_PATIENTS:
        times = resampling.multinomial(len(owners), np.full(len(owners), 1 / len(owners)), size=DRAWS)
        again = (times @ by_patient.reshape(len(owners), -1)).reshape(DRAWS, *shape)
        bits = mutual_bits(again)
        low, high = np.percentile(bits, [2.5, 97.5]) - (bits.mean() - value)
        low, high = np.clip((low, high), min(value, 0), maximum)
        found |= {"low": float(low), "high": float(high)}
        flat = again.reshape(DRAWS, -1)
        low, high = np.percentile(flat[:, same].sum(1) / flat.sum(1), [2.5, 97.5])
        found["agreement"] |= {"low": float(low), "high": float(high)}
    return found


def _jackknife(by_patient: np.ndarray, counted: float) -> float:
    """Mutual information in bits without the bias of first order, from the tables of patients (P, A, B).

    The mean over the patients of what is counted without each of them is biased a little more; that step is taken back
    as often as there are patients. Of a single patient there is nothing to compare: it is ``counted``.
    """
    patients, table = len(by_patient), by_patient.sum(0)
    if patients < 2:
        return counted
    parts = np.array_split(by_patient, -(-patients // DRAWS))  # each at once, so that memory stays small
    without = sum(float(mutual_bits(table - part).sum()) for part in parts) / patients
    return patients * counted - (patients - 1) * without


def mutual_bits(tables: np.ndarray) -> np.ndarray:
    """Mutual information in bits (R,) of the rows and columns of tables of counts (R, A, B)."""
    joint = entropy_bits(tables.reshape(len(tables), -1))
    return np.maximum(entropy_bits(tables.sum(2)) + entropy_bits(tables.sum(1)) - joint, 0)


def entropy_bits(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits (R,) of counts (R, K)."""
    shares = counts / counts.sum(1, keepdims=True)
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)


def information_text(found: dict[str, Any]) -> str:
    """What ``asked_drawn`` found, in a line for a reader."""
    bounds = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    counted = f"{found['as_counted']:.2f} as counted, where chance alone gives {found['by_chance']:.2f}"
    return f"{found['value']:.2f} bits{bounds} of at most {found['maximum']:.2f} ({counted})"


def asked_type(sample: Sample) -> str | None:
    """The lesion type that should be drawn, in lower case: ``sign`` of meta.json where it is given, else its type.

    In the world ``elsewhere`` (docs/worlds.md) the image says which type belongs into it, whatever its sentence is.
    """
    asked = sample.meta.get("sign") or sample.lesion_type
    return str(asked).strip().lower() if asked else None


def judged_types(path: Path, samples: Sequence[Sample]) -> tuple[list[str], list[str], list[str]]:
    """Asked types, drawn types and patients of the diseased ``samples`` that say which type was asked for.

    ``path``: predictions_<name>.csv of a classifier with ``task: type`` about their folder. Raises MedSoftError for a
    table of another kind, and for one that does not hold a sample.
    """
    rows = {row["sample_id"]: row for row in read_table(path, ("sample_id", "predicted"), "predictions")}
    types = {name[2:] for name in next(iter(rows.values())) if name.startswith("p_")} - {HEALTHY}
    if types in (set(), {"diseased"}):
        raise MedSoftError(f"{path}: names no lesion types; expected the predictions of a classifier with task: type")
    asked = [sample for sample in samples if not sample.healthy and asked_type(sample)]
    if missing := [sample.sample_id for sample in asked if sample.sample_id not in rows]:
        cure = "predict the folder with classifier.py again"
        raise MedSoftError(
            f"{path}: holds nothing about {counted(len(missing), 'sample')} (the first: {missing[0]}); {cure}"
        )
    kinds = [str(asked_type(sample)) for sample in asked]
    drawn = [rows[sample.sample_id]["predicted"].strip().lower() for sample in asked]
    return kinds, drawn, [sample.patient_id for sample in asked]
