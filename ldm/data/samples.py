"""A sample, a sample that cannot be used, and what prompts, ids and the values of ``meta.json`` may be."""

import functools
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ldm.core.schema import Rule
from ldm.levels import without_mentions

HEALTHY = "healthy"
META_TEXTS = ("patient_id", "parent_id", "lesion_type", "level", "severity")
NO_META: dict[str, Any] = {}  # of all samples that have none: a hundred thousand of them share it, nobody fills it


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its mask and prompt. Paths are absolute; ``box`` is x, y, w, h as fractions of the image."""

    sample_id: str
    image: Path
    mask: Path | None
    prompt: str
    box: tuple[float, float, float, float]
    patient_id: str
    anatomy: Path | None = None
    soft_mask: Path | None = None
    parent_id: str | None = None
    lesion_type: str | None = None
    level: str | None = None
    severity: str | None = None
    synthetic: bool = False
    meta: dict[str, Any] = field(default_factory=lambda: NO_META)
    # Of the reading, not of the sample: what a person should know of its files, and the SHA-256 of its image's.
    notes: tuple[str, ...] = field(default=(), compare=False)
    image_sha256: str | None = field(default=None, compare=False)

    @property
    def healthy(self) -> bool:
        """Whether the prompt is the word ``healthy``."""
        return self.prompt.strip().lower() == HEALTHY

    @property
    def files(self) -> tuple[Path | None, ...]:
        """Every file that it is read from; None for one that it does not have."""
        return self.image, self.mask, self.soft_mask, self.anatomy


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used: its id, the file at fault (as the user named its folder) and the reason."""

    sample_id: str
    file: Path
    reason: str

    def __str__(self) -> str:
        return shown(f"{self.file}: {self.reason}")


def shown(text: object) -> str:
    """``text`` on one printable line, whatever characters a folder name contains."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]


def packed_samples(path: Path) -> str | None:
    """Why a WebDataset tar, or a folder of them, is not read, with the line that unpacks them; None for others."""
    folder = path.parent if path.suffix == ".tar" else path
    if folder == path and not any(path.glob("*.tar")):
        return None
    unpacked = f"{folder}_unpacked"
    return (
        f"{path}: samples in WebDataset tars are not read; unpack them: mkdir {unpacked}; for tar in {folder}/*.tar; "
        f"do tar -xf $tar -C {unpacked} --transform 's|\\.\\([a-z_]*\\.[A-Za-z]*\\)$|/\\1|'; done"
    )


def wrong_value(
    values: Mapping[str, Any], rules: Mapping[str, Rule], required: Sequence[str] = ()
) -> tuple[str, str] | None:
    """The first key whose value breaks its rule, and what was expected and found there.

    Null and empty text are as good as no key, which is wrong for the keys ``required`` only.
    """
    for key, rule in rules.items():
        value = values.get(key)
        if key in required if value in (None, "") else not rule.holds(value):
            found = f"{value!r}"[:80] if key in values else "nothing"
            return key, f"expected {rule.expected}, found {found}"
    return None


NO_TEXT = ("", "nan", "nat", "none", "null", "<na>", "n/a")  # what tables write where nothing is known


def text_of(value: str | int | None) -> str | None:
    """An id or a class as text without spaces around it; None for no text, and for words such as ``nan``."""
    text = str(value).strip()
    return None if text.casefold() in NO_TEXT else text


@functools.lru_cache(4096)
def plain(text: str) -> str:
    """``text`` as it is compared: without case, invisible characters, repeated spaces and the form of accents."""
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


_AROUND = re.compile("^[\\s\u200b-\u200f\u2060\ufeff\u00ad]+|[\\s\u200b-\u200f\u2060\ufeff\u00ad]+$")
_CONTROL = re.compile("[\0-\x08\x0e-\x1b\x7f]")  # none that separates words or lines
_DECORATED = re.compile(r"""[\s"'`‘’‚“”„«»‹›「」(\[]*healthy[\s"'`‘’‚“”„«»‹›「」)\].,;:!。]*""")


@functools.lru_cache(4096)
def prompt_of(text: str) -> str:
    """The prompt that a text means: nothing invisible around it, and ``healthy`` where that word stands alone.

    Alone: apart from case, invisible characters, and quotes, brackets or a full stop around it.
    """
    text = _AROUND.sub("", text)
    return HEALTHY if _DECORATED.fullmatch(plain(text)) else text


def _any(words: str) -> str:
    """A pattern for any of these, which are separated by spaces; ``_`` is a space within one."""
    return "(?:" + "|".join(words.replace("_", " ") for words in words.split()) + ")"


# What says in a prompt, as ``plain`` makes it, that there is no lesion; docs/data.md has the same in words. Its two
# patterns of letters catch misspelled ones.
_HEALTH = re.compile(
    r"health|\bh[ealthy]{5,8}\b|\bn[ormal]{4,6}\b|\bo\.? ?b\.?$|gesund|unauff|正常|健康|норм|здоров|\b"
    + _any(r"normal norma\b intact negative\b nad\b wnl\b unremarkable inconspicuous controls?\b sain san[oa]\b")
)
_NO = _any(
    r"""no non none nil not nothing without w/o free_of free_from negative_for absen\w+ kein\w* nichts ohne aucune?
    pas_de sans rien sin ningun\w* nessun\w* senza sem geen zonder без нет"""
)
_ABSENT = _any("(?:not|never|nicht)_(?:seen|present|visible|found|identified|detected|nachweisbar) absent excluded")
_WITHOUT = re.compile(  # with what it denies, up to the next clause
    rf"\b{_NO}\b(?!-| {_any('other further additional more longer')})"
    rf"(?:(?!\b{_any('but with except aber mais pero')}\b)[^.,;:])*"
    rf"|\b\w+[- ]free\b|[^.,;:]*\b{_ABSENT}\b"
    rf"|\b\w+ ?[:=] ?(?:no(?: evidence| signs?)?\b(?! \w)|{_any('none nil 0 absent negative')}\b)"
    r"|[无無没未].*|.*なし"
)
_NOTHING = re.compile(r"\W*(?:n/?a|nan|nat|null|0)?\W*")  # all of it: what tables write where there is nothing
_BESIDE = re.compile(rf"\b{_any('otherwise elsewhere sonst ansonsten')}\b")  # said after a lesion has been named
_LESION = re.compile(
    _any(
        r"""l[eéäa]sion lytic blastic m[eé]tasta tumou?r tumeur fra[ck]tur sclero cancer \bmass defe[ck]t abnormal
        patholog destr[uo] collaps compress ero[ds] infiltr o?edema cyst nod[eu] hernia degenerat lucen hyper hypo
        deform wedg bone_island diseased (?:oma|itis|osis|pathy|penia|plasia|plasty|phyte)s?\b"""
    )
)
_NEUTRAL = _any(  # of these words alone nobody learns whether there is a lesion
    r"""an? the this of in on at and with there is are was were seen shows? shown found any findings? evidence signs?
    vertebra\w* body bone level spine lumbar thoracic cervical image scan slice sagittal mri? ct x-?ray
    es gibt ist im am de[rs]? die das la le wirbel\w*"""
)
_ONLY_NEUTRAL = re.compile(rf"(?:\W|\b{_NEUTRAL}\b)*")


def probably_healthy(prompt: str) -> bool:
    """Whether a prompt that is not ``healthy`` reads as if there were no lesion: ``normal``, ``no lesion``, ``n/a``."""
    text = plain(prompt)[:500]  # nobody says it later
    if text == HEALTHY or _BESIDE.search(text):
        return False
    rest = _WITHOUT.sub(" ", text)
    denied = rest != text and _ONLY_NEUTRAL.fullmatch(without_mentions(rest))
    return bool(_HEALTH.search(rest) or _NOTHING.fullmatch(text) or denied) and not _LESION.search(rest)


def contradicts_type(sample: Sample) -> bool:
    """Whether one of prompt and ``lesion_type`` says that there is a lesion, and the other one that there is none."""
    kind = sample.lesion_type
    return kind is not None and sample.healthy != (plain(kind) == HEALTHY or probably_healthy(kind))


def prompt_fault(prompt: str) -> str | None:
    """What is wrong with a prompt that ``prompt_of`` gave, in words; None if it is one sentence."""
    if not prompt:
        return "the prompt is empty; write what the image shows, or `healthy`"
    lines = len([line for line in prompt.splitlines() if line.strip()])
    if lines > 1:
        return f"holds {lines} lines; expected one sentence: join them, or keep the right one"
    if found := _CONTROL.search(prompt):
        return f"holds the control character U+{ord(found[0]):04X}, which no text has; take it out"
    return None


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_spacing(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) in (1, 2) and all(is_number(number) and 0.001 <= number <= 1000 for number in numbers)


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]


def is_trained_on(value: Any) -> bool:
    """True for groups of digests as ``ldm.data.checks.trained_on`` makes them."""

    def texts(found: Any) -> bool:
        return isinstance(found, list) and all(isinstance(each, str) for each in found)

    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("salt"), str)
        and texts(group.get("steps"))
        and texts(group.get("patients"))
        for group in value
    )


def is_box(value: Any) -> bool:
    """True for [x, y, w, h], fractions inside an image."""
    numbers = isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
    return numbers and min(value) >= 0 and value[0] + value[2] <= 1 + 1e-6 and value[1] + value[3] <= 1 + 1e-6


META_RULES = {
    **dict.fromkeys(
        META_TEXTS, Rule(lambda value: isinstance(value, (str, int)) and not isinstance(value, bool), "text")
    ),
    "synthetic": Rule(lambda value: isinstance(value, bool), "true or false"),
    "spacing_mm": Rule(_is_spacing, "one or two numbers of mm, each from 0.001 to 1000"),
    "window": Rule(_is_window, "two numbers [low, high] with low < high"),
    "trained_on": Rule(is_trained_on, "a list of {salt, steps, patients}, as results have it"),
}
