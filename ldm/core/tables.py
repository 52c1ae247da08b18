"""CSV tables, written whole and read with their columns checked; Markdown tables; texts cut to a length, and counts."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.files import read_text, write_text

# Text that a spreadsheet takes for a formula, and text that only an apostrophe of ours keeps from that.
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")

CELL_END, ESCAPED = re.compile(r"(\\*)\|"), r"\1\1\\|"  # of a cell of a Markdown table, and as text


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows atomically under the header ``columns`` (default: the first row's keys); None becomes empty."""
    columns = columns or list(rows[0])
    write_text(path, csv_lines([dict(zip(columns, columns, strict=True)), *rows], columns))


def csv_lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as lines of a CSV file without its header; what is None or missing stays empty."""
    lines = []
    for row in rows:
        buffer = io.StringIO(newline="")
        # With this end of a line the writer quotes cells that hold a carriage return; ours is a line feed.
        csv.DictWriter(buffer, columns, lineterminator="\r\n").writerow({k: _shown(v) for k, v in row.items()})
        lines.append(buffer.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _shown(value: Any) -> Any:
    """The value for a cell; text that a spreadsheet would run as a formula gets an apostrophe in front."""
    text = str(value)
    with suppress(ValueError):
        float(text)
        return value
    return f"'{text}" if FORMULA.match(text) else value


def without_mark(text: str) -> str:
    """The text of a cell as it was before an apostrophe was put in front of it."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def _read(lines: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file as they were before ``_shown``."""
    return [
        {name: without_mark(text) if isinstance(text, str) else text for name, text in row.items()}
        for row in csv.DictReader(lines)
    ]


def read_whole_lines(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file to which lines are added one by one: a last one that a crash cut short is left out.

    Empty if there is no such file.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return _read(text[: text.rfind("\n") + 1].splitlines())


def read_table(path: str | Path, columns: Sequence[str], what: str = "table") -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries; MedSoftError if it is missing, empty or lacks one of ``columns``."""
    rows = _read(io.StringIO(read_text(path, what), newline=""))
    if not rows:
        raise MedSoftError(f"{path}: expected a header and at least one row, found none")
    for column in columns:
        if column not in rows[0]:
            raise MedSoftError(f"{path}: expected a column {column}, found {', '.join(map(str, rows[0]))}")
        for number, row in enumerate(rows, 1):
            if row[column] is None:
                raise MedSoftError(f"{path}: row {number} below the header ends before its column {column}")
    return rows


def markdown_row(cells: Iterable[object]) -> str:
    """One line of a Markdown table; what would end a cell is escaped, what would end the line becomes a space."""
    lines = (" ".join(str(cell).splitlines()) for cell in cells)
    return f"| {' | '.join(re.sub(CELL_END, ESCAPED, line) for line in lines)} |"


def markdown_head(columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table, for rows that follow one by one."""
    return f"{markdown_row(columns)}\n{markdown_row(['---'] * len(columns))}"


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A whole Markdown table, without a line break at its end."""
    return "\n".join([markdown_head(columns), *map(markdown_row, rows)])


def shortened(text: str, longest: int = 60) -> str:
    """The text, cut to ``longest`` characters if it is longer."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 image", "2 images"; ``many``: what ``one`` becomes where that takes more than an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
