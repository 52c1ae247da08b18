"""Cohen's kappa against scikit-learn and a published table; intervals; what is undefined; tables of verdicts."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from ldm.data.samples import Sample
from ldm.reviews.agreement import agreement, estimates, kappas, reject_or_not, shares
from ldm.reviews.choice import Judged
from ldm.reviews.table import VERDICTS, Review

RNG = np.random.default_rng(0)
DIGEST = "0" * 64
TRIALS = 15  # in 150 of 20, 40 and 80 patients the interval held the truth in 93, 95 and 92 %


def table(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (first, second), 1)
    return counts


@pytest.mark.parametrize("size", [3, 30, 400])
def test_kappa_is_that_of_scikit_learn(size: int) -> None:
    for _ in range(10):
        first = RNG.integers(0, 3, size)
        second = np.where(RNG.random(size) < 0.5, first, RNG.integers(0, 3, size))
        counts = table(first, second)
        known = cohen_kappa_score(first, second, labels=[0, 1, 2])
        assert float(kappas(counts)) == pytest.approx(known, nan_ok=True)
        assert float(shares(counts)) == pytest.approx((first == second).mean())
        rejected = cohen_kappa_score(first == 1, second == 1)
        assert float(kappas(reject_or_not(counts))) == pytest.approx(rejected, nan_ok=True)


def test_kappa_of_a_published_table() -> None:
    """Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, 3rd edition, table 18.1: two raters, 100
    subjects; observed agreement 0.89, expected 0.66, so kappa = 0.23 / 0.34 = 0.676."""
    counts = np.array([[75, 1, 4], [5, 4, 1], [0, 0, 10]])
    assert float(shares(counts)) == pytest.approx(0.89)
    assert float(kappas(counts)) == pytest.approx(0.23 / 0.34)


def test_kappa_is_undefined_without_an_image_and_where_both_always_say_the_same() -> None:
    both = np.array([np.zeros((3, 3), int), np.diag([7, 0, 0]), np.diag([5, 2, 0])])
    assert np.isnan(kappas(both)).tolist() == [True, True, False]
    found = estimates(np.array([np.diag([1, 0, 0])] * 12))
    assert found["kappa"] == {"value": None, "low": None, "high": None}
    assert found["agreement"] == {"value": 1, "low": 1, "high": 1}


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Two reviewers who both reject 40 %, and in 60 % of the images say the same on purpose: kappa is 0.6."""
    held = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        first, own = rng.random((2, 80)) < 0.4
        second = np.where(rng.random(80) < 0.6, first, own)
        by_patient = np.array([table(*pair) for pair in zip(first[:, None] * 1, second[:, None] * 1, strict=True)])
        found = estimates(by_patient, trial)["kappa"]
        held += found["low"] <= 0.6 <= found["high"]
    assert held >= 12


def test_drawings_of_one_patient_are_resampled_together_and_few_patients_have_no_interval() -> None:
    alone = np.array([table(np.array([n % 2]), np.array([n % 4 // 2])) for n in range(40)])
    together = alone.reshape(10, 4, 3, 3).sum(axis=1)
    wide, narrow = (estimates(each)["agreement"] for each in (alone, together))
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 0.2
    assert narrow["high"] == narrow["low"] == 0.5  # each patient is half of each, so resamples are all alike
    assert estimates(together[:9])["agreement"]["low"] is None


def test_tables_by_lesion_type_and_reason() -> None:
    images = [Path(f"/{n}/image.png") for n in range(4)]
    kinds = ["lytic", "lytic", "blastic", None]
    samples = [
        Sample(f"s{n}", images[n], None, "x", (0, 0, 1, 1), f"p{n}", lesion_type=kinds[n]) for n in range(len(images))
    ]

    def said(place: int, who: str, verdict: str, reason: str = "", seconds: float | None = None) -> Review:
        return Review(f"s{place}", who, verdict, DIGEST, reason, seconds)

    reviews = {
        images[0]: [said(0, "a", "reject", "seam", 2.0), said(0, "b", "reject", "seam")],
        images[1]: [said(1, "a", "reject", "seam", 4.0), said(1, "b", "accept")],
        images[2]: [said(2, "a", "flag", seconds=9.0), said(2, "c", "reject")],
    }
    found = agreement(Judged(reviews, [], ["s9"], []), samples)
    assert (found["samples"], found["never_reviewed"], found["changed"]) == (4, 1, ["s9"])
    first = {"reviewer": "a", "judged": 3, "accept": 0, "reject": 2, "flag": 1, "median_seconds": 4.0}
    assert found["reviewers"][0] == first
    assert found["reviewers"][1]["median_seconds"] is None
    assert [(pair["first"], pair["second"], pair["both"]) for pair in found["pairs"]] == [
        ("a", "b", 2),
        ("a", "c", 1),
        ("b", "c", 0),
    ]
    assert found["pairs"][0]["table"] == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found["pairs"][0]["agreement"]["value"] == 0.5
    assert "kappa" not in found["pairs"][2]
    rows = {(row["lesion_type"], row["reviewer"]): [row[name] for name in VERDICTS] for row in found["verdicts"]}
    assert rows["lytic", "a"] == [0, 2, 0]
    assert rows["unknown", "b"] == [0, 0, 0]
    assert found["reasons"][0] == {"reason": "seam", "lesion_type": "lytic", "reviewer": "a", "count": 2}
    assert {row["reason"] for row in found["reasons"]} == {"seam", "(none given)"}
