"""A study's cells and drawings as rows of CSV files: written beside its report, read where another machine has computed
them. No torch.

A row holds what tables and hypotheses need. The numbers by kind and severity stay in the cells' own folders.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.tables import counted, read_table
from ldm.workflow.study_results import COUNTS, Cell, Drawing, DrawingKey, Drawings, Key, Study, Treatment

RESULTS, DRAWINGS = "results.csv", "drawings.csv"
WHAT = "rows of a study"
ELSEWHERE = "elsewhere"  # in a study's folder: such files of other machines, under any names
CELL_FIRST = ("world", "arm", "ratio", "generator_seed", "seed")  # columns before a cell's numbers
CELL_LAST = ("n_train_diseased", "converged", "seconds", "machine", "commit")  # and behind them
SETTINGS = "settings"  # the last column; rows of older versions have none
DRAWING_COLUMNS = ("world", "generator", "generator_seed", "endpoint", "value", "n", "machine", "commit")


def cell_rows(study: Study) -> list[dict[str, Any]]:
    """Every cell as a row of results.csv."""
    values = list(dict.fromkeys(name for cell in study.cells for name in cell.values))
    return [
        {"world": cell.world, "arm": cell.treatment.arm, "ratio": cell.treatment.ratio}
        | {"generator_seed": cell.generator_seed, "seed": cell.seed}
        | {name: cell.values.get(name) for name in values}
        | {name: cell.counts.get(name) for name in COUNTS}
        | {name: getattr(cell, name) for name in (*CELL_LAST, SETTINGS)}
        for cell in study.cells
    ]


def drawing_rows(drawings: Drawings) -> list[dict[str, Any]]:
    """Every number of every judged generator as a row of drawings.csv."""
    return [
        {"world": each.world, "generator": each.generator, "generator_seed": each.generator_seed}
        | {"endpoint": name, "value": value, "n": each.counts[name], "machine": each.machine, "commit": each.commit}
        | {SETTINGS: each.settings}
        for each in drawings.judged
        for name, value in each.values.items()
    ]


def with_rows_from_elsewhere(study: Study, folder: Path) -> Study:
    """The study with the rows of ``read_rows`` as further cells and drawings.

    MedSoftError for a world of which something is computed in ``folder`` as well: classifiers of two machines differ by
    more than arms do.
    """
    cells, drawings = read_rows(study, folder)
    here = {each.world for found in (study.cells, study.drawings.judged) for each in found}
    for world in sorted(here & {each.world for found in (cells, drawings) for each in found}):
        raise MedSoftError(
            f"{world}: has rows in {folder / ELSEWHERE} and results in {folder / world}; a world is computed on one "
            "machine: remove either"
        )
    judged = replace(study.drawings, judged=[*study.drawings.judged, *drawings])
    return replace(study, cells=[*study.cells, *cells], drawings=judged)


def read_rows(study: Study, folder: Path) -> tuple[list[Cell], list[Drawing]]:
    """What the rows of all CSV files in ``folder``/elsewhere say.

    MedSoftError for a file that is neither a results.csv nor a drawings.csv, a row that the study does not plan, one of
    other settings than the study's, one without a number where one is due, and two rows of one cell or number.
    """
    cells: dict[Key, Cell] = {}
    drawings: dict[DrawingKey, Drawing] = {}
    for path in sorted((folder / ELSEWHERE).glob("*.csv")):
        of_cells = "arm" in read_table(path, ("world",), WHAT)[0]
        columns = CELL_FIRST + CELL_LAST if of_cells else DRAWING_COLUMNS
        for line, row in enumerate(read_table(path, columns, WHAT), 2):  # the first line is the header
            try:
                if of_cells:
                    _add_cell(cells, row, study)
                else:
                    _add_drawing(drawings, row, study)
            except ValueError as error:
                raise MedSoftError(f"{path}, line {line}: {error}") from error
    return list(cells.values()), list(drawings.values())


def what_rows_say(study: Study, cells: Sequence[Cell], drawings: Sequence[Drawing], commit: str) -> str:
    """How many rows of other machines there are, what of them could not be checked, and what their worlds still lack.

    ``commit``: that of the code that reads them.
    """
    rows: list[Cell | Drawing] = [*cells, *drawings]
    unchecked = []
    if silent := sum(not row.settings for row in rows):
        unchecked.append(f"the settings of {silent} of them, which do not say theirs")
    ours = commit if commit.isalnum() and commit != "unknown" else None  # else nobody knows which code that is
    if others := dict.fromkeys(row.commit or "unknown" for row in rows if row.commit != ours):
        unchecked.append(f"whether code of another commit does the same ({', '.join(others)})")
    worlds = {row.world for row in rows}
    planned: set[Key | DrawingKey] = {*study.planned, *study.drawings.planned}
    missing = Counter(key[0] for key in planned - {row.key for row in rows} if key[0] in worlds)
    drawn = counted(len(drawings), "generator's drawings", "generators' drawings")
    said = f"of other machines ({ELSEWHERE}/*.csv): {counted(len(cells), 'cell')}, {drawn}"
    if unchecked:
        said += f"; not checked: {', and '.join(unchecked)}"
    if missing:
        said += f"; not there, and not run here: {', '.join(f'{missing[name]} of {name}' for name in sorted(missing))}"
    return said


def _add_cell(known: dict[Key, Cell], row: dict[str, str], study: Study) -> None:
    """Add the row's cell to those known; ValueError where it is none that is planned so, or known already."""
    names = [name for name in row if name not in (*CELL_FIRST, *COUNTS, *CELL_LAST, SETTINGS)]
    found = Cell(
        row["world"],
        Treatment(row["arm"], _number(row, "ratio")),
        _whole(row, "seed"),
        {name: _number(row, name) for name in names},
        {name: _whole(row, name) for name in COUNTS if name in row},
        _whole(row, "generator_seed"),
        _number(row, "seconds"),
        row["machine"],
        row["commit"],
        row.get(SETTINGS) or "",
        _whole(row, "n_train_diseased"),
        row["converged"],
    )
    if found.key not in study.planned:
        raise ValueError(f"the study plans no cell {_words(found.key)}; is it a row of another study?")
    _check_settings(found, study)
    if found.key in known:
        raise ValueError(f"a second row of the cell {_words(found.key)}; keep one")
    known[found.key] = found


def _add_drawing(known: dict[DrawingKey, Drawing], row: dict[str, str], study: Study) -> None:
    """Add the row's number to those of its drawings; ValueError where they are none that are planned so, or it is known
    already."""
    key = row["world"], row["generator"], _whole(row, "generator_seed")
    if key not in study.drawings.planned:
        raise ValueError(f"the study judges no drawings {_words(key)}; is it a row of another study?")
    new = Drawing(*key, {}, {}, row["machine"], row["commit"], row.get(SETTINGS) or "")
    _check_settings(new, study)
    found = known.setdefault(key, new)
    if row["endpoint"] in found.values:
        raise ValueError(f"a second {row['endpoint']} of {_words(key)}; keep one")
    found.values[row["endpoint"]] = _number(row, "value")
    found.counts[row["endpoint"]] = _whole(row, "n") or 0


def _check_settings(row: Cell | Drawing, study: Study) -> None:
    """ValueError where the row says that it was made with other settings than the study's."""
    ours = study.settings.get(row.key, row.settings)
    if row.settings not in ("", ours):
        raise ValueError(
            f"{_words(row.key)} was made with other settings (expected {ours}, found {row.settings}, commit "
            f"{row.commit or 'unknown'}): another study YAML, or other files of models/ and configs/; compute it again "
            "with these, or take the row out"
        )


def _words(key: Sequence[object]) -> str:
    return ", ".join(str(part) for part in key if part is not None)


def _number(row: dict[str, str], column: str) -> float | None:
    """The finite number in this column; None where it is empty, ValueError where it is something else."""
    text = row[column]
    if text == "":
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column}: expected a number or nothing, found {text!r}")
    return value


def _whole(row: dict[str, str], column: str) -> Any:
    """The whole number in this column; None where it is empty, ValueError where it is something else."""
    value = _number(row, column)
    if value is not None and not value.is_integer():
        raise ValueError(f"{column}: expected a whole number or nothing, found {row[column]!r}")
    return None if value is None else int(value)
