"""What ldm/data/checks.py finds to separate healthy from diseased samples besides their lesions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ldm.data.checks import Separation, sample_attributes, separations
from ldm.data.samples import Sample


def a_sample(number: int, healthy: bool, patient: str | None = None, suffix: str = ".png", **meta: Any) -> Sample:
    prompt = "healthy" if healthy else "an osteolytic lesion"
    level, image = meta.pop("level", None), Path(f"s{number}/image{suffix}")
    return Sample(f"s{number}", image, None, prompt, (0, 0, 0, 0), patient or f"p{number}", level=level, meta=meta)


def compare(
    samples: list[Sample], shapes: list[tuple[int, ...]] | None = None, depth: Any = np.uint8
) -> list[Separation]:
    pixels = [np.zeros(shape, depth) for shape in shapes or [(64, 64)] * len(samples)]
    return separations(samples, [sample_attributes(*each) for each in zip(samples, pixels, strict=True)])


def suspicious(found: list[Separation]) -> set[str]:
    return {each.attribute for each in found if each.suspicious}


@pytest.mark.parametrize(
    ("key", "healthy", "diseased"),
    [
        ("site", "north", "south"),
        ("scanner", "A", "B"),
        ("Manufacturer", "A", "B"),
        ("modality", "MR", "CT"),
        ("spacing_mm", 0.5, [0.8, 0.9]),
        ("window", [0, 100], [0, 200]),
        ("level", "L1", "L5"),
        ("site", None, "south"),  # known of one class only
        ("age", 10**400, 60),
        ("site", "x" * 100_000 + "north", "x" * 100_000 + "south"),
        ("kvp", [80, 120], {"value": 80}),
    ],
)
def test_an_attribute_that_follows_the_class_is_suspicious(key: str, healthy: Any, diseased: Any) -> None:
    values = [healthy, diseased] * 10
    found = compare([a_sample(n, n % 2 == 0, **({key: v} if v else {})) for n, v in enumerate(values)])
    assert suspicious(found) == {key}
    assert found[0].auc == 1
    assert len(found[0].warning) < 500
    assert f"{key} alone tells diseased from healthy samples (AUC 1.00" in found[0].warning


def test_properties_of_the_file_are_compared() -> None:
    samples = [a_sample(n, n % 2 == 0, suffix=".jpg" if n % 2 else ".png") for n in range(20)]
    shapes = [(64, 64 + n) if n % 2 else (128, 128 + n) for n in range(20)]
    assert suspicious(compare(samples, shapes)) == {"size in pixels", "file format"}  # though no two sizes are the same
    samples = [a_sample(n, n % 2 == 0) for n in range(20)]
    deep = [sample_attributes(s, np.zeros((8, 8), np.uint16 if n % 2 else np.uint8)) for n, s in enumerate(samples)]
    assert suspicious(separations(samples, deep)) == {"bits"}
    assert suspicious(compare(samples, [(8, 8, 3) if n % 2 else (8, 8) for n in range(20)])) == {"colour"}


def test_an_attribute_that_says_nothing_is_not_suspicious() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        meta = [
            {
                "site": str(rng.integers(3)),
                "level": f"L{rng.integers(5)}",
                "age": float(rng.normal(60, 9)),
                "series": str(n),
            }
            for n in range(40)
        ]
        found = compare([a_sample(n, n % 2 == 0, **each) for n, each in enumerate(meta)])
        assert {each.attribute for each in found} == {"site", "level", "age"}  # all texts of `series` differ
        assert not suspicious(found)
        assert all(0.5 <= each.auc < 0.85 for each in found)


def test_a_level_that_only_diseased_samples_have_is_no_separation() -> None:
    samples = [a_sample(n, n % 2 == 0, **({"level": f"L{n % 4}"} if n % 2 else {})) for n in range(40)]
    assert compare(samples) == []


def test_many_images_of_few_patients_prove_nothing() -> None:
    """Forty slices of two patients are two patients: their sites may differ by chance."""
    samples = [a_sample(n, n % 2 == 0, patient=f"p{n % 4}", site="AB"[n % 2]) for n in range(40)]
    assert compare(samples)[0].auc == 1
    assert not suspicious(compare(samples))


def test_the_auc_is_that_of_guessing_by_the_share_of_diseased_samples() -> None:
    rng = np.random.default_rng(1)
    sites, healthy = rng.integers(0, 4, 60), rng.random(60) < 0.5
    (found,) = compare([a_sample(n, bool(healthy[n]), site=f"site {sites[n]}") for n in range(60)])
    shares = np.array([(~healthy[sites == site]).mean() for site in range(4)])
    assert found.auc == pytest.approx(roc_auc_score(~healthy, shares[sites]))


def test_one_class_has_nothing_to_be_compared_with() -> None:
    assert compare([a_sample(n, True, site="AB"[n % 2]) for n in range(20)]) == []
    assert compare([]) == []
