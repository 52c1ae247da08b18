"""The sentence of an imported slice: from a table, a text file, fields through a template, or a segmentation's words.

A lesion without a sentence is refused, a slice without a lesion is ``healthy``. A sentence must not name another
vertebra than the labels do, and what describes a lesion of this vertebra must come with its mask.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import read_text
from ldm.data.samples import HEALTHY, plain, probably_healthy, prompt_of, shown, text_of
from ldm.inference.prompts import ImageFacts, contradiction, levels_named
from ldm.volumes.labels import Lesion, region_of, structure_named

Row = Mapping[str, str]  # of a table: prompt, lesion_type, severity, level; empty text where nothing is known

# Words after which "lesion" is not added: osteoblastic metastasis, compression fracture, haemangioma.
_NOUN = re.compile(
    r"(?:lesions?|metastas[ie]s|fractures?|tumou?rs?|\w+oma(?:s|ta)?|cysts?|defects?|o?edema|mass(?:es)?|nodes?|"
    r"infiltrat\w+|deformity|abscess|spondyl\w+|disease)$",
    re.IGNORECASE,
)


class Sentence(NamedTuple):
    """What a sample's ``prompt.txt`` and ``meta.json`` say; notes: what a person should know."""

    prompt: str
    level: str | None = None
    lesion_type: str | None = None
    severity: str | None = None
    notes: tuple[str, ...] = ()


def sentence(level: str | None, lesion: Lesion | None, rows: Sequence[Row], *, diseased: bool) -> Sentence:
    """The sentence for a slice of the vertebra ``level`` (None: unknown) with this lesion (None: without one).

    ``rows``: those of the case, unless the lesion has one of its own; the one for this level is taken, by its ``level``
    or the vertebra that its prompt names. A row goes before the words of a segmentation. ``diseased``: whether the case
    has any lesion mask. MedSoftError for a lesion without a sentence or with two, a sentence for another vertebra, and
    a lesion that is described but has no mask.
    """
    if lesion is None:
        _check_healthy(level, rows, diseased)
        return Sentence(HEALTHY, level)
    row = _row_for(level, lesion.name, [lesion.row] if lesion.row is not None else rows)
    fields = {key: _field(row, key) for key in ("lesion_type", "severity")}
    known = level or _level_of(row)
    if _prompt(row):
        text, where = _prompt(row), "the prompt"
    elif fields["lesion_type"]:
        text, where = template(fields["lesion_type"], fields["severity"], known), "the sentence of the fields"
    else:
        text, where = " ".join((lesion.description or "").split()), "the segment's description"
    text = prompt_of(text)
    if not text:
        raise MedSoftError(
            f"{shown(lesion.name)} in {known or 'a vertebra of unknown level'} has no sentence; give a table with a "
            "prompt or a lesion_type, a text file for the case, or a description in the segmentation"
        )
    if text == HEALTHY:
        raise MedSoftError(f"{shown(lesion.name)} has a mask, but {where} says healthy")
    if wrong := contradiction(text, ImageFacts(known, region_of(known), None)):
        raise MedSoftError(f"{shown(lesion.name)}: {wrong} (the labels' or the table's)")
    notes = ("its sentence reads as if there were no lesion",) if probably_healthy(text) else ()
    return Sentence(text, known, fields["lesion_type"], fields["severity"], notes)


def template(lesion_type: str, severity: str | None, level: str | None) -> str:
    """``moderate osteolytic lesion of the L3 vertebra`` from the fields of a table."""
    grade = f"grade {severity}" if severity and severity.isdecimal() else severity
    kind = lesion_type if _NOUN.search(lesion_type) else f"{lesion_type} lesion"
    where = level if level == "sacrum" else f"{level} vertebra" if level else "vertebra"
    return " ".join(filter(None, (grade, kind, "of the", where)))


def read_sentences(path: Path) -> list[dict[str, str]]:
    """The rows that a case's text file stands for: one sentence a line, each for the vertebra that it names."""
    lines = [" ".join(line.split()) for line in read_text(path, "text file of a case").splitlines()]
    rows = [{"prompt": line} for line in lines if line]
    if not rows:
        raise FileError(path, "is empty; expected one sentence a line, or healthy")
    return rows


def _field(row: Row, name: str) -> str | None:
    """What a row says in a column; None where nothing is known."""
    return text_of(row.get(name) or "")


def _prompt(row: Row) -> str:
    return " ".join((_field(row, "prompt") or "").split())


def _level_of(row: Row) -> str | None:
    """The level of a row as the labels name it; MedSoftError for text that is none."""
    text = _field(row, "level")
    if text is None:
        return None
    level = structure_named(text)
    if level in (None, "ignore", "disc", "canal", "vertebra", "partial"):
        raise MedSoftError(
            f"its row has the level {shown(text)!r}; expected C1 to C7, T1 to T13, L1 to L6, S1 or sacrum"
        )
    return level


def _describes_lesion(row: Row) -> bool:
    kind = plain(_field(row, "lesion_type") or "")
    prompt = prompt_of(_prompt(row))
    return prompt != HEALTHY if prompt else kind not in ("", HEALTHY, "normal")


def _levels(row: Row, level: str | None) -> set[str]:
    """The vertebrae that a row is about: of its level, else of its prompt; none where it does not say."""
    own = _level_of(row)
    named = {own} if own else {*levels_named(_prompt(row), level)}
    return {"sacrum" if level == "sacrum" and name[0] == "S" else name for name in named}


def _row_for(level: str | None, name: str, rows: Sequence[Row]) -> Row:
    """The row that describes the lesion of a vertebra; an empty one if none says anything of a lesion."""
    telling = [row for row in rows if _describes_lesion(row)]
    if not telling:
        if any(_prompt(row) or _field(row, "lesion_type") for row in rows):
            raise MedSoftError(f"{shown(name)} has a mask, but its row says healthy")
        return rows[0] if len(rows) == 1 else {}
    about = [row for row in telling if level is None or level in _levels(row, level)]
    about = about or [row for row in telling if not _levels(row, level)]
    if not about:
        others = ", ".join(sorted(set().union(*(_levels(row, level) for row in telling))))
        raise MedSoftError(f"{shown(name)} lies in {level} of the labels, but what describes it is about {others}")
    said = {tuple(str(row.get(key) or "") for key in ("prompt", "lesion_type", "severity", "level")) for row in about}
    if len(said) > 1:
        raise MedSoftError(
            f"{shown(name)} in {level or 'a vertebra of unknown level'}: {len(said)} sentences fit; expected one: give "
            "each row the level or the lesion file that it is about"
        )
    return about[0]


def _check_healthy(level: str | None, rows: Sequence[Row], diseased: bool) -> None:
    """MedSoftError if a row describes a lesion here that has no mask."""
    for row in filter(_describes_lesion, rows):
        about = _levels(row, level)
        if level in about or (not diseased and (level is None or not about)):
            words = _prompt(row) or str(row.get("lesion_type"))
            raise MedSoftError(
                f"a lesion is described ({shown(words)[:60]!r}), but {level or 'the image'} has no lesion mask; give "
                "the mask with --lesions, or take the description out"
            )
