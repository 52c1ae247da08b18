"""Training sentences of tens of thousands of samples: found by type, severity and vertebra, and never all at once."""

import json
from pathlib import Path

import pytest

from ldm.data.samples import Sample
from ldm.workbench.sentences import LISTED, Sentences


def samples(*texts: tuple[str, str | None, str | None, str | None]) -> list[Sample]:
    """Diseased samples: prompt, lesion type, severity and level of each."""
    return [
        Sample(f"s{n}", Path("i.png"), None, prompt, (0, 0, 0, 0), "p", lesion_type=kind, severity=grade, level=level)
        for n, (prompt, kind, grade, level) in enumerate(texts)
    ]


def prompts(sentences: Sentences, **asked: str) -> list[str]:
    return [each["prompt"] for each in sentences.matching(asked)["sentences"]]


FEW = Sentences(
    samples(
        ("lytic lesion of L3", "lytic", "mild", "L3"),
        *[("lytic lesion", "lytic", "mild", level) for level in ("T12/L1", "L2", "T11", "L2")],
        ("severe lytic lesion of the lumbar vertebra L4", "lytic", "severe", "L4"),
        ("severe lytic lesions of L2 to L4", "lytic", "severe", "L3"),
        ("severe blastic lesion of the L3 vertebra", "blastic", "severe", "L3"),
        ("severe blastic lesion of the L4 vertebra", "blastic", "severe", "L4"),
    )
)


def test_the_state_holds_the_menus_and_a_number_only() -> None:
    many = Sentences(
        samples(*[(f"lesion number {n} of L{1 + n % 5}", "lytic", "mild", f"L{1 + n % 5}") for n in range(20000)])
    )
    assert many.menus()["count"] == 20000
    assert len(json.dumps(many.menus())) < 500
    for asked, count in ({}, 20000), ({"level": "L2"}, 4000), ({"level": "T5"}, LISTED):
        found = many.matching(asked)
        assert (found["count"], len(found["sentences"]), found["borrowed"]) == (count, LISTED, "T5" in asked.values())


def test_each_sentence_once_the_most_frequent_first_with_all_its_vertebrae() -> None:
    assert FEW.menus() == {
        "types": ["lytic", "blastic"],
        "severities": ["mild", "severe"],
        "levels": ["T11", "T12/L1", "L2", "L3", "L4"],
        "count": 6,
    }
    assert prompts(FEW, lesion_type="lytic", severity="mild", level="") == ["lytic lesion", "lytic lesion of L3"]
    assert prompts(FEW, level="T11") == prompts(FEW, level="L2") == ["lytic lesion"]
    assert FEW.matching({"severity": "mild"})["count"] == 2
    assert prompts(FEW, lesion_type="mixed") == []


@pytest.mark.parametrize(
    ("level", "kind", "found"),
    [
        ("T12", "lytic", ["severe lytic lesion of the thoracic vertebra T12"]),  # and none of L2 to L4
        ("T12", "blastic", ["severe blastic lesion of the T12 vertebra"]),  # once, though L3 and L4 have it
        ("Th12", "blastic", ["severe blastic lesion of the T12 vertebra"]),
        ("T12/L1", "blastic", []),  # nobody can put two in
    ],
)
def test_of_a_vertebra_without_sentences_those_of_others_with_its_name_put_in(
    level: str, kind: str, found: list[str]
) -> None:
    answer = FEW.matching({"lesion_type": kind, "severity": "severe", "level": level})
    assert [each["prompt"] for each in answer["sentences"]] == found
    assert (answer["count"], answer["borrowed"]) == (len(found), bool(found))
