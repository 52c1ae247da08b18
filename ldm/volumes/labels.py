"""Label numberings: which number of a label map, or which name of a segment, stands for which part of the spine.

A structure has one of these names: a level (``C1`` to ``C7``, ``T1`` to ``T13``, ``L1`` to ``L6``, ``S1``),
``vertebra`` (one or many, of unknown level), ``partial`` (a vertebra that the image cuts off), ``sacrum``, ``disc``,
``canal`` (the spinal cord stands for it where a tool labels the cord) or ``ignore``. The tables of numbers:

totalsegmentator  class map ``total`` of TotalSegmentator 2 (CT): every number from 1 to 117 is known; ribs, organs and
                  muscles are ignored. Version 1 and the tasks for MR number otherwise.
verse             VerSe 2019 and 2020, as in the data set's own description: C1 is 1, L5 is 24, T13 is 28.
spider            SPIDER (van der Graaf et al., Scientific Data 11:264, 2024): vertebrae counted upward from L5 = 1.
totalspineseg     TotalSpineSeg, file ``tss_map.json`` of its label maps. Releases before that map had other numbers.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import read_json, read_text
from ldm.data.samples import shown
from ldm.levels import NAMES, REGIONS, VARIANTS, are_neighbours, mentions

LEVELS = tuple(name for name in NAMES if name[0] != "S" or name == "S1")  # from the head; then the sacrum
VERTEBRAE = (*LEVELS, "vertebra", "sacrum", "partial")  # names of what is bone of the spine

_USUAL = [name for name in LEVELS[:-1] if name not in VARIANTS]  # C1 to L5


@dataclass(frozen=True)
class Scheme:
    """What the numbers of label maps mean, and perhaps the names of segments (in small letters)."""

    name: str
    numbers: Mapping[int, str]
    segments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map on the grid of an image: values (I, J, K), 0 background; what structure each number stands for.

    ``lesions``: names of segments of the same file that are lesions, and are no part of the label map.
    """

    values: np.ndarray
    structures: Mapping[int, str]
    notes: tuple[str, ...] = ()
    lesions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Lesion:
    """A lesion, or several of one kind: mask (I, J, K) bool on the grid of an image.

    ``name`` is for messages. ``description``: what a segmentation says of it in words, free text that may identify
    somebody. ``row``: its row of a user's table.
    """

    mask: np.ndarray
    name: str
    description: str | None = None
    row: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def _upward(first: int, levels: Iterable[str]) -> dict[int, str]:
    return dict(enumerate(levels, first))


_TOTALSEGMENTATOR = dict.fromkeys(range(1, 118), "ignore") | {25: "sacrum", 26: "S1", 79: "canal"}
_TOTALSEGMENTATOR |= _upward(27, reversed(_USUAL))
_VERSE = _upward(1, _USUAL) | {25: "L6", 26: "sacrum", 27: "ignore", 28: "T13"}
_SPIDER = _upward(1, reversed(_USUAL)) | {100: "canal"}
_SPIDER |= dict.fromkeys(range(101, 126), "partial") | dict.fromkeys(range(201, 226), "disc")
_TOTALSPINESEG = {1: "canal", 2: "canal", 50: "sacrum", 100: "disc"}
_TOTALSPINESEG |= _upward(11, _USUAL[:7]) | _upward(21, _USUAL[7:19]) | _upward(41, [*_USUAL[19:], "L6"])
_TOTALSPINESEG |= dict.fromkeys([*range(63, 68), *range(71, 83), *range(91, 96)], "disc")

PRESETS: Mapping[str, Scheme] = {
    name: Scheme(name, numbers)
    for name, numbers in (
        ("totalsegmentator", _TOTALSEGMENTATOR),
        ("verse", _VERSE),
        ("spider", _SPIDER),
        ("totalspineseg", _TOTALSPINESEG),
    )
}

_DISC = re.compile(r"\bdis[ck]s?\b|\bivds?\b|intervertebral|bandscheibe|[ctl]\d{1,2} ?[-/ ] ?[ctls]\b")
_WORDS = {
    "ignore": r"ignored?|background|other|coccyx|cocygis",
    "canal": r"(?:spinal )?(?:canal|cord)|myelon|thecal sac|csf|spinalkanal",
    "sacrum": r"sacrum|sacral bone|s[2-5]|vertebrae? s[2-5]",
    "vertebra": r"vertebrae?|vertebral (?:body|bodies|column)|wirbel(?:körper)?|spine|vb",
    "partial": r"partial(?:ly visible)?(?: vertebrae?)?",
}
# What is named after a vertebra without being one: lesions, and what else there is.
_LESION = re.compile(
    r"lesion|läsion|metasta|tumou?r|neoplas|cancer|carcinom|sarcom|myelom|fractur|fraktur|lytic|lysis|blastic|sclero|"
    r"ha?emangiom|cyst|nodul|\bmass\b|o?edema|ödem|abscess|defect|abnormal|\b[gci]tv\d*\b"
)
_NO_VERTEBRA = re.compile(
    r"\b(?:ribs?|costa|nerves?|roots?|muscles?|ganglion|left|right|implant|screws?|cage|p[tr]v\d*)\b"
)


def names_lesion(text: str) -> bool:
    """Whether the name of a segment is one of a lesion (``lytic lesion``, ``GTV_L3``)."""
    return bool(_LESION.search(_plain(text)))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[_\s]+", " ", text).casefold().split())


def structure_named(text: str) -> str | None:
    """The structure that a name in a map file or of a segment means (``vertebrae_L5``, ``LWK 5``, ``Th12``, ``L4-L5``).

    None if it names a lesion, no part of the spine, or a part of one that is none of ours.
    """
    plain = _plain(text)
    if _LESION.search(plain):
        return None
    for name, words in _WORDS.items():
        if re.fullmatch(words, plain):
            return name
    if _NO_VERTEBRA.search(plain):
        return None
    if _DISC.search(plain):
        return "disc"
    # Two numbers side by side are two vertebrae, as in L4_5 and L4_L5; small letters are as good as large ones.
    text = re.sub(r"(\d) (?=(?:[ctdls]|th)?\d)", r"\1-", plain).upper()
    found = {name for mention in mentions(text) for name in mention.names or ("?",)}
    if len(found) == 2 and are_neighbours(*found):
        return "disc"
    return found.pop() if len(found) == 1 and found <= {*LEVELS} else None


def region_of(level: str | None) -> str | None:
    """``lumbar`` for ``L3``; None for a level that is not known."""
    return REGIONS["S"] if level == "sacrum" else REGIONS[level[0]] if level in LEVELS else None


def scheme(preset: str | None, map_file: Path | None) -> Scheme | None:
    """The numbering that the flags ``--preset`` and ``--map`` choose; None for neither of them."""
    if preset and map_file:
        raise UsageError("--preset and --map: expected one of them, found both; a map file stands alone")
    if preset and preset not in PRESETS:
        raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, found {preset}")
    return PRESETS[preset] if preset else read_map(map_file) if map_file else None


def read_map(path: Path) -> Scheme:
    """The numbering in a map file; FileError for one that cannot be used.

    That is a JSON object {"27": "L5", ...}, nnU-Net's ``dataset.json``, or a CSV file of two columns: number (or name
    of a segment) and structure.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path, "map file")
        if not isinstance(found, dict):
            raise FileError(path, 'expected an object such as {"27": "L5", "100": "canal"}')
        if isinstance(found.get("labels"), dict):  # nnU-Net's dataset.json: from names to numbers
            found = {number: name for name, number in found["labels"].items() if number != 0}
        pairs = [(str(key), str(value)) for key, value in found.items()]
    else:
        pairs = _csv_pairs(path)
    numbers, segments = {}, {}
    for key, value in pairs:
        name = structure_named(value)
        if name is None:
            raise FileError(
                path,
                f"{shown(key)!r} stands for {shown(value)!r}; expected a level (C1 to C7, T1 to T13, L1 to L6, S1), "
                "vertebra, partial, sacrum, disc, canal or ignore",
            )
        if key.strip().isdecimal():
            numbers[int(key)] = name
        else:
            segments[key.strip().casefold()] = name
    if not {*VERTEBRAE}.intersection([*numbers.values(), *segments.values()]):
        raise FileError(path, "names no vertebra; expected at least one number or segment that stands for one")
    return Scheme(path.name, numbers, segments)


def _csv_pairs(path: Path) -> list[tuple[str, str]]:
    text = read_text(path, "map file")
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=";" if ";" in text else ",") if any(row)]
    for row in rows:
        if len(row) != 2:
            raise FileError(path, f"expected two columns, a number and a name, found {shown(row)}")
    if rows and not rows[0][0].strip().isdecimal() and structure_named(rows[0][1]) is None:
        rows = rows[1:]  # a header
    keys = [row[0].strip() for row in rows]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise FileError(path, f"names {shown(min(twice))} twice; expected one line a number")
    return [(row[0], row[1]) for row in rows]


def structures_of(counts: Mapping[int, int], scheme: Scheme | None, where: str) -> dict[int, str]:
    """The structures of the numbers in a label map. ``counts``: voxels of each number; 0 is the background.

    Refused, with a guess of the numbering that fits: no numbering, a number that it does not know, no vertebra.
    """
    present = {number: count for number, count in sorted(counts.items()) if number and count}
    if not present:
        raise MedSoftError(f"{where}: holds no label, every voxel is 0; expected numbered vertebrae")
    listed = _listed(present)
    if scheme is None:
        raise MedSoftError(f"{where}: nothing says what its numbers mean, {listed}; {_advice(present)}")
    if unknown := {number: count for number, count in present.items() if number not in scheme.numbers}:
        raise MedSoftError(
            f"{where}: {scheme.name} does not know {_listed(unknown)}; "
            f'{_advice(present, but=scheme.name)} (a number that is to be left out stands there for "ignore")'
        )
    found = {number: scheme.numbers[number] for number in present}
    if not {*VERTEBRAE}.intersection(found.values()):
        raise MedSoftError(
            f"{where}: {scheme.name} knows no vertebra among its numbers, {listed}; {_advice(present, but=scheme.name)}"
        )
    return found


def _listed(counts: Mapping[int, int], most: int = 8) -> str:
    """Numbers with the voxels they have, in words."""
    first = [f"{number} ({count} voxel{'s' * (count != 1)})" for number, count in [*counts.items()][:most]]
    return ", ".join(first) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _advice(present: Mapping[int, int], but: str = "") -> str:
    """What to give instead: the presets that know all numbers and find a vertebra, or a map file."""
    if len(present) == 1:
        number = next(iter(present))
        return f'if this is one label for all vertebrae, give --map with {{"{number}": "vertebra"}}'
    fits = [each for each in PRESETS if each != but and fits_preset(present, each)]
    return f"its numbers fit --preset {' or '.join(fits)}; else" * bool(fits) + " give --map FILE with their names"


def fits_preset(numbers: Iterable[int], preset: str) -> bool:
    """Whether a preset knows all of the numbers, and one of them as a vertebra."""
    names = {PRESETS[preset].numbers.get(number) for number in numbers}
    return None not in names and not names.isdisjoint(VERTEBRAE)
