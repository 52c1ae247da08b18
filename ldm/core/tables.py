"""CSV tables, written whole and read with their columns checked; Markdown tables; texts cut to a length, and counts.

And rows of numbers that are too many for the memory.
"""

import csv
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core.errors import MedSoftError
from ldm.core.files import PARTIAL_PREFIX, free_bytes, nearest_existing, read_text, write_text

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

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


TOLD = 1e9  # bytes from which a file of rows is spoken of


class RowFile:
    """Rows of numbers, all of one shape and type, that are appended to a file and then read as one array.

    However many they are, they take no memory of the process. The file has no name, so that nothing is left of it when
    the process ends, however that happens. It lies on the disk of ``folder``, which need not exist yet, or among the
    system's temporary files without one, and where ``folder`` can be none that is written to.
    """

    def __init__(self, folder: Path | None, shape: Sequence[int], dtype: str, expected: int, what: str) -> None:
        """For ``expected`` rows or fewer of what messages call ``what``. MedSoftError where they have no room."""
        import numpy as np

        self.shape, self.dtype, self.what, self.count = tuple(shape), np.dtype(dtype), what, 0
        above = None if folder is None else nearest_existing(folder.absolute())
        usable = above is not None and above.is_dir() and os.access(above, os.W_OK | os.X_OK)
        self.folder = above if above is not None and usable else Path(tempfile.gettempdir())
        size = expected * self.dtype.itemsize * int(np.prod(self.shape))
        needed = f"the {what} ({expected} of {' x '.join(map(str, self.shape))}) need {size / 1e9:.2f} GB"
        if (free := free_bytes(self.folder)) < size:
            raise MedSoftError(f"{self.folder}: {needed} on the disk, {free / 1e9:.2f} GB are free there; make room")
        if size >= TOLD:
            log.info("%s on the disk of %s until this command ends", needed, self.folder)
        with self._writing():
            self.file = tempfile.TemporaryFile(prefix=PARTIAL_PREFIX, dir=self.folder)  # noqa: SIM115, as long as it lives

    def append(self, rows: "np.ndarray") -> None:
        """One row, or several (N, ...). MedSoftError on a disk that is full."""
        import numpy as np

        assert rows.shape[rows.ndim - len(self.shape) :] == self.shape, (rows.shape, self.shape)
        self.count += len(rows) if rows.ndim > len(self.shape) else 1
        with self._writing():
            self.file.write(np.asarray(rows, self.dtype).tobytes())

    def array(self) -> "np.ndarray":
        """All rows (N, ...), for whoever has no more to append. They are read from the file where they are needed."""
        import numpy as np

        if not self.count:
            return np.empty((0, *self.shape), self.dtype)
        with self._writing(), self.file:
            self.file.flush()
            return np.asarray(np.memmap(self.file, self.dtype, "r+", shape=(self.count, *self.shape)))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause = error.strerror or error
            raise MedSoftError(f"{self.folder}: the {self.what} could not be written there ({cause})") from error
