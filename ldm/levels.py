"""The vertebrae that a text names: one reading for sentences, ``meta.json``, tables and the names of segments.

A vertebra is a letter or a word for its region and a number: "L3", "l 3", "L-3", "Th12", "D12", "LWK 4", "lumbar
vertebra 2", "third lumbar", "腰3椎". What is joined to it may leave the region out: a range ("L1-3", "T12-L1", "L2 to
L4") names all that lies in it, a list ("L5/S1", "L2, 3 and 5") what it lists. After the last vertebra of a region comes
the first of the next ("L5/1"). A range to any other number that is no larger than the one before it ("T12-3") may mean
two things, and so may a 1 that is listed after the last vertebra of a region ("T12 and 1"): then none is named.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

REGIONS = {"C": "cervical", "T": "thoracic", "L": "lumbar", "S": "sacral"}  # from the head down
LAST = {"C": 7, "T": 13, "L": 6, "S": 5}  # the last vertebra of each region, variants included
VARIANTS = ("T13", "L6")  # few people have them: a range from T12 to L1 names none, but in an image of one
NAMES = tuple(f"{letter}{number}" for letter, last in LAST.items() for number in range(1, last + 1))
SPINE = "|".join(REGIONS.values())
NEXT = {"C7": "T1", "T12": "L1", "T13": "L1", "L5": "S1", "L6": "S1"}  # where one region follows another
BORDERS = [{*pair} for pair in NEXT.items()]

_LETTERS = {"D": "T", "H": "C", "B": "T", "颈": "C", "胸": "T", "腰": "L", "骶": "S"}  # dorsal, HWK, BWK
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
_ORDINALS += ["seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]

_BONE = r"(?:vertebrae?|vertebral\s+bod(?:y|ies)|bod(?:y|ies)|levels?|segments?)"
_RANGE = (
    rf"\s*[-\u2010-\u2015\u2212~至到]\s*|(?:\s+{_BONE})?\s+(?:(?:up|down)\s+)?(?:to|through|thru|bis)\s+(?:the\s+)?"
)
_WORDS = r"(?:and/or|and|or|und|et|as\s+well\s+as)\s+(?:the\s+)?"
_LIST = rf"\s*[,&+、和及]\s*(?:{_WORDS})?|\s+{_WORDS}"
_JOINT = re.compile(rf"(?P<range>{_RANGE})|(?P<slash>\s*/\s*)|(?P<list>{_LIST})", re.IGNORECASE)
# A number that measures something or counts something is none of a vertebra.
_UNIT = r"(?:[mc]?m|hu|ml|cc)\b"
_WHOLE = rf"(?![A-Za-z0-9]|\.\d|\s?(?:{_UNIT}|%|[x×]\s?\d))"
_COUNTS = rf"(?!\s?(?:[-\u2010-\u2015]|(?:to|by)\b)\s?\d+(?:\.\d+)?\s?{_UNIT})"  # as in 3-5 mm
_COUNTS += r"""(?!\s+(?:(?!(?:with|shows?|are|is|and|have|has|in|of|or)\b)[\w-]+\s+){0,2}(?:lesions|metastases|
    fractures|tumou?rs|foci|nodules|masses|cysts|defects|spots|areas|others|patients|images|slices|(?:year|month|week|day)s?)\b)"""
_ORDINAL = rf"(?:{'|'.join(_ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))"
_NAME = re.compile(
    rf"""(?<![A-Za-z0-9])(?<!type\ )(?<!grade\ )(?<!class\ )(?<!stage\ )(?<!vitamin\ )(?:
        (?:(?P<letter>(?:(?-i:TH|Th|th|[CTDLS])|[HBLS]WK)[\s-]?|(?-i:[ctls])(?:(?<!['’][ctls])[\s-])?|(?-i:d)(?=\d\d?\b))
            |(?P<han>[颈胸腰骶])椎?)(?P<number>\d{{1,2}})
        | 第(?P<nth>\d{{1,2}})(?P<bone>[颈胸腰骶])椎
        | (?P<ordinals>{_ORDINAL}(?:(?:{_RANGE}|/|{_LIST}){_ORDINAL})*)\s+(?P<region>{SPINE})
        | (?P<spine>{SPINE})\s+(?:{_BONE}\s+)?(?:(?:no\.?|number|nr\.?)\s*)?(?P<count>\d{{1,2}}){_COUNTS}
    ){_WHOLE}""",
    re.VERBOSE | re.IGNORECASE,
)
_NUMBER = re.compile(rf"(\d{{1,2}}){_WHOLE}")
_ONE = r"(?!1\s+(?:[\w-]+\s+){0,2}(?:lesion|metastasis|fracture|tumou?r|focus|nodule|mass|cyst|defect|spot|area)\b)"
_UNCOUNTED = re.compile(rf"{_ONE}(\d{{1,2}}){_WHOLE}{_COUNTS}(?!\s+(?:of|in)\b)", re.VERBOSE | re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween\s+(?:the\s+)?$", re.IGNORECASE)


class Mention(NamedTuple):
    """A place in a text, from ``start`` to before ``end``, that names vertebrae, as in ("T12", "L1").

    No names: it names some, but nobody can say which.
    """

    start: int
    end: int
    names: tuple[str, ...]


class _Part(NamedTuple):
    """One vertebra of a mention, and whether the text goes on to it ("to") or lists it ("/", ","); None: the first."""

    name: str
    joint: str | None = None
    clear: bool = True


def mentions(text: str, own: str | None = None) -> list[Mention]:
    """The places that name vertebrae, in their order. T1 and T2 may also be MR sequences.

    ``own``: the vertebra that the text is about; one of VARIANTS is then named by a range that it lies in.
    """
    found, place = [], 0
    while name := _NAME.search(text, place):
        parts, place = list(_named(name)), name.end()
        while parts and (joined := _joined(text, name.start(), place, parts[-1].name)):
            more, place = joined
            parts += more
        if parts:
            found.append(Mention(name.start(), place, _names(parts, own)))
    return found


def without_mentions(text: str) -> str:
    """The text with a space for each place that names vertebrae."""
    for mention in reversed(mentions(text)):
        text = f"{text[: mention.start]} {text[mention.end :]}"
    return text


def are_neighbours(one: str, other: str) -> bool:
    """Whether two vertebrae have one disc between them."""
    return {one, other} in BORDERS or (one[0] == other[0] and abs(int(one[1:]) - int(other[1:])) == 1)


def _named(match: re.Match) -> Iterator[_Part]:
    """The vertebrae of one match of _NAME; none where no spine has them."""
    said = match.groupdict()
    first = (said["letter"] or said["han"] or said["bone"] or said["region"] or said["spine"])[0].upper()
    letter = _LETTERS.get(first, first)
    if not said["ordinals"]:
        numbers: list[tuple[str | None, int]] = [(None, int(said["number"] or said["nth"] or said["count"]))]
    else:
        numbers, end = [], 0
        for each in re.finditer(_ORDINAL, said["ordinals"], re.IGNORECASE):
            joint = _JOINT.match(said["ordinals"], end) if numbers else None
            numbers.append((joint and joint.lastgroup, _ordinal(each[0])))
            end = each.end()
    if all(1 <= number <= LAST[letter] for _, number in numbers):
        yield from (_Part(f"{letter}{number}", joint) for joint, number in numbers)


def _ordinal(word: str) -> int:
    return _ORDINALS.index(word.lower()) + 1 if word.lower() in _ORDINALS else int(word[:-2])


def _joined(text: str, start: int, end: int, before: str) -> tuple[list[_Part], int] | None:
    """What is joined to the vertebra ``before`` that ends at ``end``, and where that ends; None for nothing."""
    joint = _JOINT.match(text, end)
    if joint is None:
        return None
    kind = joint.lastgroup
    if kind == "list" and _BETWEEN.search(text, 0, start):
        kind = "range"
    if name := _NAME.match(text, joint.end()):
        parts = list(_named(name))
        near = parts and (parts[0].name[0] == before[0] or {before, parts[0].name} in BORDERS)
        if not parts or (kind == "list" and not near):
            return None  # it stands for itself, if for anything
        return [parts[0]._replace(joint=kind), *parts[1:]], name.end()
    tight = kind != "list" and not re.search(r"\s", joint[0])
    number = (_NUMBER if tight else _UNCOUNTED).match(text, joint.end())
    if number is None or not 1 <= int(number[1]) <= LAST[before[0]]:
        return None
    part = _Part(f"{before[0]}{int(number[1])}", kind)
    next_one = NEXT.get(before) if int(number[1]) == 1 else None
    if next_one and kind != "list":
        part = _Part(next_one, kind)
    elif next_one or (kind != "list" and int(number[1]) <= int(before[1:])):
        part = part._replace(clear=False)
    return [part], number.end()


def _names(parts: list[_Part], own: str | None) -> tuple[str, ...]:
    if not all(part.clear for part in parts):
        return ()
    found: dict[str, None] = {}
    for before, part in zip([parts[0], *parts], parts, strict=False):
        found |= dict.fromkeys(_between(before.name, part.name, own) if part.joint == "range" else [part.name])
    return tuple(found)


def _between(first: str, last: str, own: str | None) -> list[str]:
    """The vertebrae from one to another, both of them included."""
    one, other = NAMES.index(first), NAMES.index(last)
    step = 1 if one <= other else -1
    inside = [NAMES[rank] for rank in range(one, other + step, step)]
    return [name for name in inside if name not in VARIANTS or name in (first, last, own)]
