"""Numbers and names of label maps: the presets, map files, and what is refused with which advice."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.volumes.labels import (
    LEVELS,
    PRESETS,
    names_lesion,
    read_map,
    region_of,
    scheme,
    structure_named,
    structures_of,
)

# Lines of the tools' own tables, written down apart from the code.
KNOWN = {
    "totalsegmentator": "25 sacrum, 26 S1, 27 L5, 28 L4, 29 L3, 30 L2, 31 L1, 32 T12, 43 T1, 44 C7, 50 C1, 79 canal, "
    "1 ignore, 51 ignore, 92 ignore, 117 ignore",
    "verse": "1 C1, 7 C7, 8 T1, 19 T12, 20 L1, 24 L5, 25 L6, 26 sacrum, 27 ignore, 28 T13",
    "spider": "1 L5, 5 L1, 6 T12, 17 T1, 18 C7, 24 C1, 100 canal, 101 partial, 125 partial, 201 disc, 225 disc",
    "totalspineseg": "1 canal, 2 canal, 11 C1, 17 C7, 21 T1, 32 T12, 41 L1, 45 L5, 46 L6, 50 sacrum, 63 disc, 67 disc, "
    "71 disc, 82 disc, 91 disc, 95 disc, 100 disc",
}
UNKNOWN = {"totalsegmentator": 118, "verse": 29, "spider": 25, "totalspineseg": 18}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_table_of_its_tool(preset: str) -> None:
    for line in KNOWN[preset].split(", "):
        number, name = line.split(" ")
        assert PRESETS[preset].numbers[int(number)] == name
    assert UNKNOWN[preset] not in PRESETS[preset].numbers
    assert 0 not in PRESETS[preset].numbers


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_that_a_preset_does_not_know_are_refused_with_their_voxels(preset: str) -> None:
    vertebra = next(number for number, name in PRESETS[preset].numbers.items() if name == "L3")
    with pytest.raises(MedSoftError, match=rf"{preset} does not know {UNKNOWN[preset]} \(7 voxels\)") as caught:
        structures_of({0: 99, vertebra: 40, UNKNOWN[preset]: 7}, PRESETS[preset], "labels.nii.gz")
    assert str(caught.value).startswith("labels.nii.gz: ")


def test_a_wrong_preset_is_told_with_the_one_that_fits() -> None:
    with pytest.raises(MedSoftError, match=r"does not know 201.*--preset spider"):
        structures_of({1: 500, 2: 400, 100: 30, 201: 20}, PRESETS["totalsegmentator"], "labels.mha")
    with pytest.raises(MedSoftError, match=r"totalsegmentator knows no vertebra.*--preset verse or spider"):
        structures_of({20: 500, 21: 400, 22: 10}, PRESETS["totalsegmentator"], "labels.nii.gz")


def test_without_a_scheme_the_numbers_are_shown_and_a_preset_is_proposed() -> None:
    with pytest.raises(MedSoftError, match=r"27 \(500 voxels\), 79 \(1 voxel\); its numbers fit --preset totalseg"):
        structures_of({27: 500, 79: 1}, None, "labels.nii.gz")
    with pytest.raises(MedSoftError, match=r'--map with {"255": "vertebra"}'):
        structures_of({0: 5, 255: 500}, None, "labels.nii.gz")


def test_an_empty_label_map_is_refused() -> None:
    with pytest.raises(MedSoftError, match="holds no label"):
        structures_of({0: 1000}, PRESETS["verse"], "labels.nii.gz")


@given(
    st.sampled_from(LEVELS), st.sampled_from(["{}", "vertebrae_{}", "vertebra {}", "{} body", "{}_arch", "Corpus {}"])
)
def test_levels_are_read_as_tools_and_people_write_them(level: str, form: str) -> None:
    assert structure_named(form.format(level)) == structure_named(form.format(level).lower()) == level


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Th12", "T12"),
        ("D 5", "T5"),
        ("LWK3", "L3"),
        ("BWK 11", "T11"),
        ("disc_L4_L5", "disc"),
        ("L5-S", "disc"),
        ("T12/L1", "disc"),
        ("L4 5", "disc"),
        ("LWK4/5", "disc"),
        ("Th11/12", "disc"),
        ("D12-L1", "disc"),
        ("L2 to L4", None),
        ("L2 to 4", None),
        ("L1-3", None),
        ("L4 2", None),
        ("lumbar vertebra 2", "L2"),
        ("Lumbar_Vertebra_5", "L5"),
        ("vertebra l 2", "L2"),
        ("Bandscheibe", "disc"),
        ("spinal_canal", "canal"),
        ("spinal cord", "canal"),
        ("Sacrum", "sacrum"),
        ("S2", "sacrum"),
        ("vertebrae", "vertebra"),
        ("background", "ignore"),
        ("rib_left_1", None),
        ("L7", None),
        ("T14", None),
        ("kidney_left", None),
        ("L3 nerve root", None),
        ("L3 left pedicle", None),
        ("liver", None),
        ("L3 metastasis", None),
        ("GTV_L3", None),
        ("PTV L3", None),
        ("L2_lesion_1", None),
        ("", None),
    ],
)
def test_other_names(text: str, name: str | None) -> None:
    assert structure_named(text) == name


def test_names_of_lesions() -> None:
    for text in ("GTV_L3", "ctv1", "Lytic lesion", "L3_metastasis", "Läsion", "compression fracture T12"):
        assert names_lesion(text)
    assert not any(map(names_lesion, ("L3", "PTV", "vertebrae_L5", "canal", "")))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("map.json", json.dumps({"27": "L5", "100": "Canal", "7": "ignore", "Segment_1": "Th12"})),
        ("map.csv", "number,name\n27,L5\n100,canal\n7,ignore\nsegment_1,T12\n"),
        ("map.csv", "27;vertebrae_L5\n100;spinal canal\n7;other\nSegment_1;D12\n"),
        ("dataset.json", json.dumps({"labels": {"background": 0, "L5": 27, "canal": 100, "ignore": 7}})),
    ],
)
def test_a_map_file_gives_numbers_and_segments_their_meaning(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    found = scheme(None, tmp_path / file)
    assert found is not None
    assert found.numbers == {27: "L5", 100: "canal", 7: "ignore"}
    assert found.segments in ({"segment_1": "T12"}, {})


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("map.json", '{"27": "L9"}', "'27' stands for 'L9'; expected a level"),
        ("map.json", "[1, 2]", "expected an object such as"),
        ("map.json", '{"100": "canal"}', "names no vertebra"),
        ("map.json", '{"27": "L5", "27": "L4"}', "stands twice"),
        ("map.csv", "27,L5\n27,L4\n", "names 27 twice"),
        ("map.csv", "27,L5,x\n", "expected two columns"),
        ("map.csv", "27,L5\n28,aorta\n", "'28' stands for 'aorta'"),
    ],
)
def test_a_faulty_map_file_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(FileError, match=message) as caught:
        read_map(tmp_path / file)
    assert file in str(caught.value)


def test_flags_that_cannot_be(tmp_path: Path) -> None:
    assert scheme(None, None) is None
    with pytest.raises(UsageError, match="found both"):
        scheme("verse", tmp_path / "map.json")
    with pytest.raises(UsageError, match="expected one of totalsegmentator, verse"):
        scheme("total", None)


def test_the_region_of_a_level() -> None:
    found = [region_of(level) for level in ("C7", "T13", "L6", "S1", "sacrum", None, "vertebra")]
    assert found == ["cervical", "thoracic", "lumbar", "sacral", "sacral", None, None]
