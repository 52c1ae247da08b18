"""Files of answers as the page saves them, checked against the key, and the table that numbers are computed from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import read_json
from ldm.data.samples import Reject, is_number
from ldm.readers.making import DRAWN, KEY

CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}")
STEPS = (1, 2, 3, 4, 5, 6)  # certainly real ... certainly drawn
CALLED_DRAWN = 4  # from this step on a picture is called drawn
SIDES = ("left", "right")


@dataclass(frozen=True)
class Key:
    """What ``make`` has kept: ``pictures`` by name, ``items`` by name (see ``ldm.readers.making``)."""

    path: Path
    study: str
    design: str
    pictures: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]

    @property
    def pairs(self) -> bool:
        """Whether an item is a pair of pictures."""
        return self.design == "pairs"

    def drawn_side(self, item: str) -> str:
        """Which picture of a pair is the drawn one: left or right."""
        return SIDES[[self.pictures[name]["kind"] for name in self.items[item]["pictures"]].index(DRAWN)]

    def drawn(self, item: str) -> Mapping[str, Any]:
        """The drawn picture of a pair, or the single picture."""
        names = self.items[item]["pictures"]
        return next(
            (self.pictures[name] for name in names if self.pictures[name]["kind"] == DRAWN), self.pictures[names[0]]
        )


@dataclass(frozen=True)
class Reader:
    """One reader's answers: item -> step 1 to 6, or left or right; item -> seconds."""

    path: Path
    code: str
    years: float
    speciality: str
    seen: str
    complete: bool
    comment: str
    answers: Mapping[str, int | str]
    seconds: Mapping[str, float]

    @property
    def order(self) -> list[str]:
        """The items in the order in which they were answered."""
        return list(self.answers)


def read_key(study: Path) -> Key:
    """The key of a study's folder. MedSoftError naming the key that is missing."""
    path = study / KEY
    content = read_json(path, "key of a reader study")
    wanted = {"study": str, "design": str, "pictures": dict, "items": dict, "notes": list}
    for name, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise FileError(
                path, f"{name}: expected what `reader_study.py make` has written there; make the study again"
            )
    return Key(path, *(content[name] for name in wanted))


def answer_files(paths: Iterable[Path]) -> list[Path]:
    """The JSON files among ``paths`` and directly in those that are folders. MedSoftError where there is none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise MedSoftError(f"{path}: does not exist; expected files of answers, or folders of them")
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not found:
        raise MedSoftError(f"{', '.join(map(str, paths))}: holds no file of answers (*.json)")
    return list(dict.fromkeys(found))


def read_readers(key: Key, paths: Sequence[Path], unfinished: bool) -> tuple[list[Reader], list[Reject], list[str]]:
    """Readers by code, files that are refused, and what of the others a person should know.

    A file is refused that is damaged, of another study, edited in its items or answers, or of a reader who has another
    file too: then none of them is used. Readers who did not finish are left out unless ``unfinished``.
    """
    readers, rejects, notes = [], [], []
    for path in paths:
        try:
            readers.append(read_reader(key, path))
        except FileError as error:
            rejects.append(Reject(path.stem, path, error.reason))
    by_code: dict[str, list[Reader]] = {}
    for reader in readers:
        by_code.setdefault(reader.code.upper(), []).append(reader)
    kept = []
    for code, same in sorted(by_code.items()):
        for reader in same:
            if len(same) > 1:
                others = ", ".join(each.path.name for each in same if each is not reader)
                rejects.append(
                    Reject(code, reader.path, f"reader.code: {code} is the reader of {others} too; keep one")
                )
            elif reader.complete or unfinished:
                kept.append(reader)
        if len(same) == 1 and not same[0].complete:
            what = "is used as far as it goes" if unfinished else "is left out (--unfinished uses it)"
            notes.append(f"Reader {code} has answered {len(same[0].answers)} of {len(key.items)} items; this {what}.")
    return kept, rejects, notes


def read_reader(key: Key, path: Path) -> Reader:
    """The answers in one file. FileError naming the key at fault."""
    content = read_json(path, "file of answers")
    if not isinstance(content, dict) or "reader" not in content or not isinstance(content.get("answers"), list):
        raise FileError(path, "reader, answers: expected a file that the study's page has saved")
    if content.get("study") != key.study:
        raise FileError(path, f"study: expected {key.study}, found {content.get('study')!r}: answers of another study")
    about = content["reader"]
    code = about.get("code") if isinstance(about, dict) else None
    if not isinstance(code, str) or not CODE.fullmatch(code):
        raise FileError(path, f"reader.code: expected up to 20 letters and digits, found {code!r}")
    years = about.get("years")
    if not is_number(years) or not 0 <= years <= 70:
        raise FileError(path, f"reader.years: expected a number from 0 to 70, found {years!r}")
    answers, seconds = _read_answers(key, path, content["answers"])
    complete = len(answers) == len(key.items)
    if content.get("complete") is True and not complete:
        missing = next(item for item in key.items if item not in answers)
        raise FileError(path, f"answers: says it is complete, but lacks {missing}; the file was edited")
    speciality, seen = (str(about.get(name) or "") for name in ("speciality", "seen"))
    comment = str(content.get("comment") or "")
    return Reader(path, code, float(years), speciality, seen, complete, comment, answers, seconds)


def _read_answers(key: Key, path: Path, rows: list[Any]) -> tuple[dict[str, int | str], dict[str, float]]:
    """The answer to each item that has one, and the seconds it took. FileError naming the key at fault."""
    answers: dict[str, int | str] = {}
    seconds: dict[str, float] = {}
    allowed: tuple[int | str, ...] = SIDES if key.pairs else STEPS
    for place, row in enumerate(rows):
        known = row if isinstance(row, dict) else {}
        item, answer, spent = (known.get(name) for name in ("item", "answer", "seconds"))
        if not isinstance(item, str) or item not in key.items:
            raise FileError(path, f"answers[{place}].item: {item!r} is none of this study; the file was edited")
        if item in answers:
            raise FileError(path, f"answers[{place}].item: {item} is answered twice; the file was edited")
        if isinstance(answer, bool) or answer not in allowed:
            expected = ", ".join(map(str, allowed))
            raise FileError(path, f"answers[{place}].answer: expected one of {expected}, found {answer!r}")
        if not is_number(spent) or spent < 0:
            raise FileError(path, f"answers[{place}].seconds: expected seconds, found {spent!r}")
        answers[item], seconds[item] = answer, float(spent)
    if all(key.items[item]["repeat_of"] for item in answers):
        raise FileError(path, "answers: holds none, or of hidden repeats alone")
    return answers, seconds


@dataclass(frozen=True)
class Readings:
    """The first answers of R readers to N items, without the hidden repeats.

    ``answers`` (R, N) float, NaN where there is none: the step 1 to 6, or, of pairs, 1 where the left picture was taken
    for the drawn one, else 0. ``drawn`` (N,): whether the picture is drawn, or, of pairs, whether the left one is.
    ``patients``: who is behind each item (of a pair: its drawn picture). ``seconds`` (R, N).
    """

    readers: Sequence[Reader]
    items: Sequence[str]
    pairs: bool
    answers: np.ndarray
    drawn: np.ndarray
    patients: Sequence[str]
    seconds: np.ndarray

    def only(self, items: np.ndarray | None = None, readers: Sequence[int] | None = None) -> "Readings":
        """Some of the items (bool N) or readers (their numbers)."""
        inside = np.ones(len(self.items), bool) if items is None else items
        chosen = list(range(len(self.readers))) if readers is None else list(readers)
        places = np.flatnonzero(inside).tolist()
        return Readings(
            [self.readers[k] for k in chosen],
            [self.items[k] for k in places],
            self.pairs,
            self.answers[np.ix_(chosen, places)],
            self.drawn[places],
            [self.patients[k] for k in places],
            self.seconds[np.ix_(chosen, places)],
        )


def readings_of(key: Key, readers: Sequence[Reader]) -> Readings:
    """The table of all readers."""
    items = [name for name, item in key.items.items() if item["repeat_of"] is None]
    answers = np.array([[as_number(key, reader, item) for item in items] for reader in readers])
    seconds = np.array([[reader.seconds.get(item, np.nan) for item in items] for reader in readers])
    if key.pairs:
        drawn = np.array([key.drawn_side(item) == "left" for item in items])
    else:
        drawn = np.array([key.drawn(item)["kind"] == DRAWN for item in items])
    patients = [str(key.drawn(item)["patient_id"]) for item in items]
    return Readings(readers, items, key.pairs, answers, drawn, patients, seconds)


def as_number(key: Key, reader: Reader, item: str) -> float:
    """One answer as ``Readings`` has it; NaN where there is none."""
    answer = reader.answers.get(item)
    if answer is None:
        return float("nan")
    return float(answer == "left") if key.pairs else float(answer)


def answer_rows(key: Key, readers: Sequence[Reader]) -> list[dict[str, Any]]:
    """A row for every answer, repeats among them, for other programs."""
    rows = []
    for reader in readers:
        for place, item in enumerate(reader.order, 1):
            about = key.drawn(item)
            truth = key.drawn_side(item) if key.pairs else about["kind"]
            known = {name: about[name] for name in ("patient_id", "sample_id", "lesion_type", "severity", "level")}
            row = {"reader": reader.code, "item": item, "repeat_of": key.items[item]["repeat_of"], "truth": truth}
            rows.append(
                row | {"answer": reader.answers[item], "seconds": reader.seconds[item], "position": place} | known
            )
    return rows
