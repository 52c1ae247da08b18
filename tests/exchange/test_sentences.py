"""Sentences of imported slices: where they come from, and what does not fit its vertebra or its mask."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.core.errors import FileError, MedSoftError
from ldm.exchange.sentences import read_sentences, sentence, template
from ldm.volumes.labels import LEVELS, Lesion


def lesion(description: str | None = None, **more: str) -> Lesion:
    return Lesion(np.ones((1, 1, 1), bool), "lesion 1", description, more or None)


def test_the_prompt_of_a_row() -> None:
    rows = [
        {"prompt": " moderate osteolytic\nlesion of the L3 vertebra ", "lesion_type": "osteolytic", "severity": "nan"}
    ]
    found = sentence("L3", lesion(), rows, diseased=True)
    assert found.prompt == "moderate osteolytic lesion of the L3 vertebra"
    assert found[1:] == ("L3", "osteolytic", None, ())


def test_fields_go_through_the_template() -> None:
    rows = [{"lesion_type": "osteolytic", "severity": "moderate", "level": "Th12"}]
    found = sentence("T12", lesion(), rows, diseased=True)
    assert found.prompt == "moderate osteolytic lesion of the T12 vertebra"
    assert (found.level, found.severity) == ("T12", "moderate")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (("osteoblastic metastasis", None, "L1"), "osteoblastic metastasis of the L1 vertebra"),
        (("compression fracture", "2", "T8"), "grade 2 compression fracture of the T8 vertebra"),
        (("haemangioma", None, None), "haemangioma of the vertebra"),
        (("sclerotic", "mild", "sacrum"), "mild sclerotic lesion of the sacrum"),
    ],
)
def test_the_template(fields: tuple, text: str) -> None:
    assert template(*fields) == text


@given(st.sampled_from(LEVELS), st.sampled_from(["lytic", "mixed", "tumor"]), st.sampled_from([None, "severe", "3"]))
def test_what_the_template_makes_agrees_with_its_level(level: str, kind: str, severity: str | None) -> None:
    rows = [{"lesion_type": kind, "severity": severity or "", "level": level}]
    assert level in sentence(level, lesion(), rows, diseased=True).prompt


def test_the_words_of_a_segmentation_and_that_a_table_goes_before_them() -> None:
    told = lesion("lytic lesion of L3")
    assert sentence("L3", told, [], diseased=True).prompt == "lytic lesion of L3"
    assert sentence("L3", told, [{"prompt": "severe lytic lesion"}], diseased=True).prompt == "severe lytic lesion"
    assert sentence("L3", told, [{"patient": "7", "prompt": ""}], diseased=True).prompt == "lytic lesion of L3"


def test_of_several_rows_the_one_of_the_level_counts() -> None:
    rows = [
        {"level": "L3", "prompt": "lytic lesion"},
        {"level": "L4", "prompt": "blastic lesion"},
        {"prompt": "mixed lesion of T12 vertebra"},
    ]
    found = [sentence(level, lesion(), rows, diseased=True).prompt for level in ("L3", "L4", "T12")]
    assert found == ["lytic lesion", "blastic lesion", "mixed lesion of T12 vertebra"]
    assert sentence("L4", lesion(level="L4", prompt="own row"), rows, diseased=True).prompt == "own row"


def test_the_level_comes_from_the_row_where_the_labels_do_not_know_it() -> None:
    rows = [{"level": "lwk 2", "lesion_type": "lytic"}]
    assert sentence(None, lesion(), rows, diseased=True)[:2] == ("lytic lesion of the L2 vertebra", "L2")


def test_what_names_a_part_of_the_sacrum_is_about_the_sacrum() -> None:
    assert (
        sentence("sacrum", lesion(), [{"prompt": "lytic lesion of S2"}], diseased=True).prompt == "lytic lesion of S2"
    )
    assert sentence("sacrum", lesion(), [{"level": "S1", "prompt": "lytic lesion"}], diseased=True).level == "sacrum"
    with pytest.raises(MedSoftError, match="is about L5"):
        sentence("sacrum", lesion(), [{"prompt": "lytic lesion of L5"}], diseased=True)


def test_no_lesion_is_healthy_also_beside_another_vertebra_with_one() -> None:
    rows = [{"level": "L3", "prompt": "lytic lesion"}]
    assert sentence("L4", None, rows, diseased=True) == ("healthy", "L4", None, None, ())
    assert sentence("L4", None, [{"prompt": "lytic lesion"}], diseased=True).prompt == "healthy"
    assert sentence("L4", None, [{"prompt": "Healthy."}, {}], diseased=False).prompt == "healthy"
    assert sentence(None, None, [], diseased=False).prompt == "healthy"


@pytest.mark.parametrize(
    ("level", "rows", "message"),
    [
        ("L3", [], "has no sentence; give a table"),
        ("L3", [{"severity": "moderate"}], "has no sentence"),
        ("L3", [{"prompt": "'healthy'"}], "has a mask, but its row says healthy"),
        ("L3", [{"prompt": "healthy", "lesion_type": "lytic"}], "has a mask, but its row says healthy"),
        ("L3", [{"prompt": "lytic lesion of the L4 vertebra"}], "lies in L3 of the labels, but .* is about L4"),
        ("L3", [{"level": "L4", "prompt": "lytic lesion"}], "lies in L3 of the labels, but .* is about L4"),
        ("L3", [{"level": "L3", "prompt": "lytic lesion of L4"}], "the prompt names L4, the image's level is L3"),
        ("L3", [{"prompt": "lesion of the thoracic spine"}], "the prompt names the thoracic spine"),
        ("L3", [{"prompt": "lytic lesion"}, {"prompt": "blastic lesion"}], "2 sentences fit"),
        (None, [{"level": "L3", "prompt": "a"}, {"level": "L4", "prompt": "b"}], "2 sentences fit"),
        ("L3", [{"level": "third", "prompt": "lytic lesion"}], "has the level 'third'; expected"),
    ],
)
def test_a_lesion_without_its_sentence_is_refused(level: str | None, rows: list, message: str) -> None:
    with pytest.raises(MedSoftError, match=message):
        sentence(level, lesion(), rows, diseased=True)


def test_words_of_a_segmentation_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MedSoftError, match="names L5, the image's level is L3"):
        sentence("L3", lesion("lytic lesion of L5"), [], diseased=True)
    with pytest.raises(MedSoftError, match="the segment's description says healthy"):
        sentence("L3", lesion("healthy"), [], diseased=True)


@pytest.mark.parametrize(
    ("level", "row", "diseased"),
    [
        ("L3", {"prompt": "lytic lesion"}, False),
        (None, {"lesion_type": "lytic"}, False),
        ("L3", {"level": "L3", "prompt": "lytic lesion"}, True),
        ("L3", {"prompt": "lytic lesion of the L3 vertebra"}, True),
    ],
)
def test_a_described_lesion_without_a_mask_is_no_healthy_sample(level: str | None, row: dict, diseased: bool) -> None:
    with pytest.raises(MedSoftError, match=r"is described .* has no lesion mask"):
        sentence(level, None, [row], diseased=diseased)


def test_a_sentence_that_reads_as_healthy_is_said() -> None:
    assert sentence("L3", lesion(), [{"prompt": "normal"}], diseased=True).notes


def test_a_text_file_of_a_case(tmp_path: Path) -> None:
    path = tmp_path / "case.txt"
    path.write_text("lytic lesion of L3\n\n blastic  lesion of L4 \n")
    rows = read_sentences(path)
    assert rows == [{"prompt": "lytic lesion of L3"}, {"prompt": "blastic lesion of L4"}]
    assert sentence("L4", lesion(), rows, diseased=True).prompt == "blastic lesion of L4"
    path.write_text(" \n")
    with pytest.raises(FileError, match="is empty; expected one sentence a line"):
        read_sentences(path)
