"""Vertebrae in words: what a text names, how ranges and lists are read, and what is left unread."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.samples import Sample
from ldm.inference.prompts import ImageFacts, agreeing, contradiction, image_facts, levels_named
from ldm.levels import NAMES, REGIONS, mentions

USUAL = [name for name in NAMES if name not in ("T13", "L6")]
BONES = [name for name in USUAL if name not in ("T1", "T2")]  # what is no MR sequence either
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
TO = ("-", " - ", "–", "—", " to ", " through ", " bis ", "~", " up to ", " vertebra to ")
LISTED = ("/", ", ", " and ", " & ", " und ", ", and ", " / ", " or ")


def read(text: str) -> list[str]:
    return [name for mention in mentions(text) for name in mention.names]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("T12-L1", "T12 L1"),
        ("T12/L1", "T12 L1"),
        ("Th12/L1 junction", "T12 L1"),
        ("L2 to L4", "L2 L3 L4"),
        ("from the L4 down to the L2 body", "L4 L3 L2"),
        ("between L2 and L4", "L2 L3 L4"),
        ("L1-3", "L1 L2 L3"),
        ("L1 – 3 vertebrae", "L1 L2 L3"),
        ("l 2", "L2"),
        ("L-2", "L2"),
        ("L-2 to L-4", "L2 L3 L4"),
        ("lumbar vertebra 2", "L2"),
        ("lumbar vertebrae 2 and 3", "L2 L3"),
        ("lumbar vertebral bodies 2-4", "L2 L3 L4"),
        ("D12", "T12"),
        ("D11/12", "T11 T12"),
        ("LWK 4/5", "L4 L5"),
        ("lwk4", "L4"),
        ("L5/S1", "L5 S1"),
        ("L5/1 disc, L5-1 disc", "L5 S1 L5 S1"),
        ("C7/1", "C7 T1"),
        ("L4 to S1", "L4 L5 S1"),
        ("T11-L2", "T11 T12 L1 L2"),
        ("T11-T13", "T11 T12 T13"),
        ("L2, 3 and 5 are destroyed", "L2 L3 L5"),
        ("L1, L3-5", "L1 L3 L4 L5"),
        ("second and third lumbar vertebrae", "L2 L3"),
        ("the second to the fourth lumbar vertebra", "L2 L3 L4"),
        ("12th thoracic and first lumbar vertebrae", "T12 L1"),
        ("腰2-4椎体, 第3腰椎, 胸12至腰1", "L2 L3 L4 L3 T12 L1"),
        ("T3 and T5", "T3 T5"),
        # What is no vertebra, or cannot be told which:
        ("L2 and 3 lesions, L4, 12 mm, L1-3 mm", "L2 L4 L1"),
        ("2 lesions in L2, 3 in L4; lesions of L5, 2 of them large; C2 and 3 others", "L2 L4 L5 C2"),
        ("L2 - 2 intraosseous lesions; L4, 1 lesion", "L2 L4"),
        ("L3, 3.5 cm and 40 HU; L5, 2 x 3 cm", "L3 L5"),
        ("L3, 3-5 mm wide; L4, 2 to 4 cm; lumbar 3-5 mm lesion; L5, 2.5 by 4 mm", "L3 L4 L5"),
        ("T12-3, L4-1, L4/2", ""),
        ("T11, 12 and 1; L5, 1; C7 and 1", ""),
        ("L4, 2 and 1", "L4 L2 L1"),
        ("the vertebra's 2 lesions; vitamin D3; type C1 fracture; 3D; CT 5; 1.5 T, T 1.5", ""),
        ("L12, C9, T14 and lumbar 3 lesions", ""),
        ("'L3' and \"L4\"", "L3 L4"),
    ],
)
def test_what_a_text_names(text: str, names: str) -> None:
    assert read(text) == names.split()


def spellings(name: str) -> list[str]:
    """Ways to write one vertebra."""
    letter, number = name[0], int(name[1:])
    german = {"C": "HWK", "T": "BWK", "L": "LWK", "S": "SWK"}[letter]
    found = [name, name.lower(), f"{letter}-{number}", f"{letter} {number}", f"{letter.lower()} {number}"]
    found += [f"{german}{number}", f"{german} {number}", f"{REGIONS[letter]} vertebra {number}"]
    found += [f"{REGIONS[letter]} {number}", f"{ORDINALS[number - 1]} {REGIONS[letter]}"]
    return found + (
        [f"Th{number}", f"Th {number}", f"TH-{number}", f"D{number}", f"D {number}"] if letter == "T" else []
    )


@given(st.data())
def test_every_spelling_of_one_vertebra_is_that_vertebra_alone(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(USUAL))
    said = data.draw(st.sampled_from(spellings(name)))
    text = data.draw(
        st.sampled_from(["{}", "lesion of {}", "a lytic lesion in the {} body, 12 mm wide", "({}), severe"])
    )
    assert read(text.format(said)) == [name]


@given(st.data())
def test_a_range_names_what_lies_in_it_and_a_list_what_it_lists(data: st.DataObject) -> None:
    first, last = sorted(data.draw(st.lists(st.integers(0, len(USUAL) - 1), min_size=2, max_size=2, unique=True)))
    upper, lower = (data.draw(st.sampled_from(spellings(USUAL[rank]))) for rank in (first, last))
    inside = USUAL[first : last + 1]
    assert read(f"lesion of {upper}{data.draw(st.sampled_from(TO))}{lower}") == inside
    assert read(f"lesion of {upper}{data.draw(st.sampled_from(LISTED))}{lower}") == [inside[0], inside[-1]]


@given(st.data())
def test_a_second_number_without_its_letter_is_one_of_the_same_region(data: st.DataObject) -> None:
    letter, last = data.draw(st.sampled_from([("C", 7), ("T", 12), ("L", 5)]))
    low = data.draw(st.integers(1, last - 1))
    high = data.draw(st.integers(low + 1, last))
    inside = [f"{letter}{number}" for number in range(low, high + 1)]
    assert read(f"{letter}{low}{data.draw(st.sampled_from(TO))}{high}") == inside
    assert read(f"{letter}{low}{data.draw(st.sampled_from(LISTED))}{high}") == [inside[0], inside[-1]]


@given(st.text(st.sampled_from("CTDLShHbBwWkKlsthd0123459 -–/,.to'\n\u212a腰椎第")))
def test_whatever_a_text_is_what_it_names_are_vertebrae_in_their_places(text: str) -> None:
    found = mentions(text)
    assert all(name in NAMES for mention in found for name in mention.names)
    places = [place for mention in found for place in (mention.start, mention.end)]
    assert places == sorted(places)


@given(st.data())
def test_no_sentence_contradicts_the_image_of_a_vertebra_that_it_says(data: st.DataObject) -> None:
    """Neither as it is nor joined to others; and an image of none of them does not get it unnoticed."""
    ranks = data.draw(st.lists(st.integers(0, len(BONES) - 1), min_size=1, max_size=3, unique=True))
    texts = [data.draw(st.sampled_from(spellings(BONES[rank]))) for rank in ranks]
    prompt = f"severe lesion of {data.draw(st.sampled_from([*TO, *LISTED])).join(texts)}"
    for rank in ranks:
        assert contradiction(prompt, ImageFacts(BONES[rank], None, None)) is None
    other = data.draw(st.sampled_from(BONES))
    if other not in levels_named(prompt):
        assert contradiction(prompt, ImageFacts(other, None, None)) is not None


def test_the_level_of_an_image_may_be_several() -> None:
    facts = image_facts_of("T12/L1")
    assert contradiction("lesion of L1", facts) is None
    assert contradiction("lesion of T12-L1", facts) is None
    assert contradiction("lesion of L2", facts) == "the prompt names L2, the image's level is t12/l1"


def image_facts_of(level: str) -> ImageFacts:
    return image_facts(Sample("a", Path("i.png"), None, "healthy", (0, 0, 0, 0), "p", level=level))


def test_a_sentence_of_which_nobody_knows_the_vertebra_is_given_to_no_image() -> None:
    assert contradiction("lesion of T12-3", ImageFacts("L2", None, None)) is None
    assert agreeing("lesion of T12-3", ImageFacts("L2", None, None)) is None
    assert agreeing("lesion of L1-3", ImageFacts("L5", None, None)) is None
    assert agreeing("lesion of L1-3", ImageFacts("L2", None, None)) == "lesion of L1-3"


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("T1/T2-weighted image", []),
        ("dark on T1 and T2", []),
        ("T1-T2 vertebrae", ["T1", "T2"]),
        ("T2 and T3 vertebrae", ["T2", "T3"]),
        ("fracture of C7 and T1", ["C7", "T1"]),
        ("fracture of vertebra T1", ["T1"]),
        ("T1-T3", ["T1", "T2", "T3"]),
        ("bright on T2, L3 is destroyed", ["L3"]),
        ("bright on T2 and L3 is destroyed", ["L3"]),
    ],
)
def test_mr_sequences_are_no_vertebrae(prompt: str, names: list[str]) -> None:
    assert levels_named(prompt) == names
