"""What a judge says of drawings: which are counted, which type was asked for, how a border is measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldm.data.samples import Sample
from ldm.evaluation.drawings import Measured, endpoints, verdict_of
from ldm.evaluation.information import asked_drawn, asked_type

SEEN = Measured("a", "p1", "lytic", "moderate", True, "lytic", 0.2, 0)


def test_subtle_lesions_count_for_the_border_alone() -> None:
    drawings = [
        SEEN,
        replace(SEEN, asked="blastic"),
        replace(SEEN, severity=None, diseased=False),  # missed, and yet most like the type that was asked for
        replace(SEEN, severity="subtle", diseased=False, lesion_type="blastic", border=0.4, changed_outside=3),
        replace(SEEN, asked=None, lesion_type="blastic", border=None, changed_outside=None),
    ]
    found = endpoints(drawings, [0.1, 0.3])
    assert {name: (each["value"], each["n"]) for name, each in found.items()} == {
        "detection": (3 / 4, 4),
        "agreement": (2 / 3, 3),
        "asked_drawn": (pytest.approx(asked_drawn(["l", "b", "l"], ["l", "l", "healthy"], ["p"] * 3)["value"]), 3),
        "seam": (pytest.approx(0.25 / 0.2), 4),
        "seam_error": (pytest.approx(0.25), 4),
        "changed_outside": (3, 4),
    }
    blurred = endpoints([replace(SEEN, border=0.1)], [0.2])
    assert (blurred["seam"]["value"], blurred["seam_error"]["value"]) == (0.5, 0.5)


def test_what_nothing_tells_is_not_a_number() -> None:
    found = endpoints([replace(SEEN, asked=None, severity="Subtle", changed_outside=None)], [])
    assert {each["value"] for each in found.values()} == {None}


def test_the_sign_says_which_type_belongs_into_the_image() -> None:
    sample = Sample("a", Path("i"), None, "a lesion of L3", (0, 0, 1, 1), "p", lesion_type=" Lytic")
    assert asked_type(sample) == "lytic"
    assert asked_type(replace(sample, meta={"sign": "Blastic"})) == "blastic"
    assert asked_type(replace(sample, lesion_type=None)) is None


def test_the_type_is_named_with_healthy_left_aside() -> None:
    row = {
        "predicted": "healthy",
        "disease_probability": "0.4",
        "p_healthy": "0.6",
        "p_lytic": "0.3",
        "p_blastic": "0.1",
    }
    found = verdict_of(row)
    assert (found.diseased, found.lesion_type, found.probability) == (False, "lytic", 0.4)
