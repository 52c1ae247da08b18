"""review.csv: what people said of drawn images. A row is one verdict; rows are added at the end and never changed.

Its columns: ``sample_id``, ``reviewer`` (a code of letters, digits, ``.``, ``_`` and ``-``; capitals do not matter),
``verdict`` (accept, reject or flag), ``reason`` (free text, may be empty), ``image_sha256`` (of the image file that was
judged), ``seconds`` (how long it was looked at) and ``when`` (UTC), both of which may be empty. Of several rows of one
reviewer about one image the last one counts. Every row is one line of UTF-8 text. No torch.
"""

import csv
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import sync
from ldm.core.locks import exclusive
from ldm.core.schema import Rule
from ldm.core.tables import counted, csv_lines, shortened, without_mark

log = logging.getLogger("review")

ACCEPT, REJECT, FLAG = VERDICTS = ("accept", "reject", "flag")
COLUMNS = ("sample_id", "reviewer", "verdict", "reason", "image_sha256", "seconds", "when")
HEADER = ",".join(COLUMNS)
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_TEXT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_ENDED = re.compile(rb",[-\dT:]{19}Z\r?$")  # the last cell of a row that was not cut short


@dataclass(frozen=True)
class Review:
    """One verdict of one reviewer about one image; ``seconds`` is None, and ``when`` empty, where nobody knows."""

    sample_id: str
    reviewer: str
    verdict: str
    image_sha256: str
    reason: str = ""
    seconds: float | None = None
    when: str = ""


def _is_line(text: str) -> bool:
    return not set(text) & set("\n\r\0") and text == text.encode("utf-8", "replace").decode()


def _is_time(text: str) -> bool:
    if not _TIME_TEXT.fullmatch(text):
        return not text
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


_RULES = {
    "sample_id": Rule(lambda text: text and _is_line(text), "the id of a sample, on one line"),
    "reviewer": Rule(
        re.compile(r"[\w.-]{1,32}").fullmatch, "a code of 1 to 32 letters, digits, '.', '_', '-', no blank"
    ),
    "verdict": Rule(lambda text: text in VERDICTS, "accept, reject or flag"),
    "reason": Rule(lambda text: _is_line(text) and len(text) <= 1000, "text of at most 1000 characters on one line"),
    "image_sha256": Rule(re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits"),
    "seconds": Rule(re.compile(r"(\d{1,9}(\.\d{1,9})?)?").fullmatch, "a number of seconds, or nothing"),
    "when": Rule(_is_time, "a time in UTC such as 2026-01-31T12:00:00Z, or nothing"),
}


def check_value(column: str, text: str) -> None:
    """MedSoftError, with what was expected, for a text that may not stand in this column."""
    if not _RULES[column].holds(text):
        raise MedSoftError(f"{column}: expected {_RULES[column].expected}, found {shortened(repr(text))}")


def now() -> str:
    """The time for the column ``when``."""
    return datetime.now(UTC).strftime(_TIME)


def read_reviews(path: str | Path) -> list[Review]:
    """All rows of a review.csv, in their order; each reviewer's code as it was spelled first.

    A last line that a crash has cut short is left out, with a warning. FileError, naming line and column, for a file
    that is not there, has other columns, or has a row that is malformed.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(path, "this review does not exist; medsoft review RESULTS makes one") from error
    except OSError as error:
        raise FileError(path, f"this review could not be read ({error.strerror or error})") from error
    reviews, whole = _parse(path, data)
    if whole < len(data):
        number = data.count(b"\n") + 1
        log.warning("warning: %s: line %d, the last one, is cut short and does not count", path, number)
    return reviews


def _parse(path: Path, data: bytes) -> tuple[list[Review], int]:
    """The rows of a file's bytes, and how many of these bytes are whole lines; FileError as in ``read_reviews``."""
    *lines, last = data.split(b"\n")
    if not lines and HEADER.encode().startswith(last.removeprefix(b"\xef\xbb\xbf")):
        return [], 0
    head, *rows = [*lines, last]
    if (found := head.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r")) != HEADER.encode():
        columns = shortened(found.decode("utf-8", "backslashreplace"), 100)
        raise FileError(path, f"line 1: expected the columns {HEADER}, found {columns!r}")
    reviews: list[Review] = []
    faults: list[str] = []
    for number, line in enumerate(rows, 2):
        try:
            reviews += [_row(line)] if line.strip() else []
        except MedSoftError as error:
            if number == len(rows) + 1 and not _ENDED.search(line):  # no line break follows it, and it has no end
                data = data[: -len(line)]
            else:
                faults.append(f"line {number}: {error}")
    if faults:
        others = counted(len(faults) - 1, "other line is", "other lines are")
        more = f" ({others} malformed too)" if len(faults) > 1 else ""
        raise FileError(path, f"{faults[0]}{more}; correct or delete that line")
    return one_spelling(reviews), len(data)


def _row(line: bytes) -> Review:
    """The review in one line; MedSoftError naming the column that is wrong."""
    try:
        (cells,) = csv.reader([line.decode("utf-8").rstrip("\r")], strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise MedSoftError(f"expected comma-separated UTF-8 text ({error})") from error
    if len(cells) != len(COLUMNS):
        raise MedSoftError(f"expected {len(COLUMNS)} cells, found {len(cells)}")
    row: dict[str, Any] = dict(zip(COLUMNS, map(without_mark, cells), strict=True))
    for column, text in row.items():
        check_value(column, text)
    return Review(**row | {"seconds": float(row["seconds"]) if row["seconds"] else None})


def one_spelling(reviews: Iterable[Review]) -> list[Review]:
    """The same rows with one spelling of each reviewer's code, the first: ``ann`` and ``Ann`` are one person."""
    first: dict[str, str] = {}
    known = [(each, first.setdefault(each.reviewer.casefold(), each.reviewer)) for each in reviews]
    return [each if each.reviewer == name else replace(each, reviewer=name) for each, name in known]


def add_review(path: str | Path, review: Review) -> None:
    """Add one row, which is on the disk when this returns; several processes may do so at once.

    A file that is not there is begun; a line at its end that a crash has cut short is removed. After an error (a full
    disk) the file is as it was. Raises MedSoftError, also for a value that may not stand in the table.
    """
    path = Path(path)
    row = asdict(review) | {"seconds": None if review.seconds is None else f"{review.seconds:.1f}"}
    for column in COLUMNS:
        check_value(column, row[column] or "")
    with exclusive(path.with_name(f".{path.name}.lock"), f"{path}: another process is writing; waiting", wait=True):
        try:
            with open(path, "a+b", buffering=0) as handle:
                handle.seek(0)
                data = handle.read()
                before, whole = len(data), _whole(path, data)
                text = csv_lines([row], COLUMNS) if whole else f"{HEADER}\n{csv_lines([row], COLUMNS)}"
                between = b"\n" if whole and data[whole - 1 : whole] != b"\n" else b""
                handle.truncate(whole)
                _append(handle, between + text.encode("utf-8"), min(before, whole))
        except OSError as error:
            cause = error.strerror or error
            raise MedSoftError(f"{path}: the verdict could not be written ({cause}); the file is as it was") from error


def _whole(path: Path, data: bytes) -> int:
    """How many bytes of a file are whole lines. Its rows are not read where it ends as it should."""
    if not data.endswith(b"\n"):
        return _parse(path, data)[1]
    _parse(path, data[: data.find(b"\n") + 1])  # the header
    return len(data)


def _append(handle: Any, data: bytes, size: int) -> None:
    """Write all of ``data`` at the end and have the disk keep it; if that fails, the file has ``size`` bytes again."""
    try:
        if os.write(handle.fileno(), data) < len(data):
            raise OSError(None, "only a part of it; is the disk full?")
        sync(handle.fileno())
    except OSError:
        handle.truncate(size)
        raise


def latest(reviews: Sequence[Review]) -> dict[tuple[str, str, str], Review]:
    """The review that counts of each reviewer about each image: by sample_id, SHA-256 of the image, and reviewer."""
    return {(each.sample_id, each.image_sha256, each.reviewer): each for each in reviews}
