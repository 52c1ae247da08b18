"""ldm/core/tables.py: CSV, Markdown, and rows in a file."""

import csv
from pathlib import Path

import numpy as np
import pytest

from ldm.core import tables
from ldm.core.errors import MedSoftError
from ldm.core.tables import (
    RowFile,
    counted,
    csv_lines,
    markdown_head,
    markdown_row,
    markdown_table,
    read_table,
    read_whole_lines,
    write_csv,
)


def test_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"a": 'x, "y"', "b": 1.5}, {"a": None, "b": 2}])
    assert path.read_text() == 'a,b\n"x, ""y""",1.5\n,2\n'
    assert read_table(path, ["a", "b"]) == [{"a": 'x, "y"', "b": "1.5"}, {"a": "", "b": "2"}]
    with pytest.raises(MedSoftError, match=r"table\.csv: expected a column c, found a, b"):
        read_table(path, ["c"])


def test_a_markdown_table_is_its_head_and_its_rows() -> None:
    rows = [("a", 1), ("b", None)]
    lines = ["| name | value |", "| --- | --- |", "| a | 1 |", "| b | None |"]
    assert markdown_table(["name", "value"], rows).split("\n") == lines
    assert [*markdown_head(["name", "value"]).split("\n"), *map(markdown_row, rows)] == lines


def test_what_would_end_a_cell_or_a_line_of_a_markdown_table_does_not() -> None:
    assert markdown_row(["lytic|blastic", r"a\|b", "two\r\nlines", 1]) == r"| lytic\|blastic | a\\\|b | two lines | 1 |"


def test_lines_are_added_and_one_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    assert read_whole_lines(path) == []
    write_csv(path, [], ["step", "loss"])
    with path.open("a") as handle:
        handle.write(csv_lines([{"step": 1, "loss": 0.5}, {"step": 2}], ["step", "loss"]) + "3,0.")
    assert read_whole_lines(path) == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": ""}]


TEXTS = [
    "=1+1",
    "+cmd",
    "-lytic",
    "@x",
    "\tx",
    "\rx",
    "\n=1",
    "＝1",
    "'=1",
    "''@",
    "'plain",
    "'",
    "a=b",
    " =1",
    "",
    "-1.5",
    "+3",
    "-",
]


def test_text_that_a_spreadsheet_would_run_is_written_as_text_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"name": text, "number": -0.5} for text in TEXTS])
    assert [row["name"] for row in read_table(path, ["name"])] == TEXTS
    with path.open(encoding="utf-8", newline="") as handle:
        cells = [row["name"] for row in csv.DictReader(handle)]
    for text, cell in zip(TEXTS, cells, strict=True):
        runs = cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))
        assert not runs or cell in ("-1.5", "+3")
        assert cell in (text, f"'{text}")
    assert {row["number"] for row in read_table(path, ["number"])} == {"-0.5"}


def test_paths_and_names_of_columns_are_text_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [{"@a": Path("=b"), "c": None, "d": float("-inf")}])
    assert (tmp_path / "table.csv").read_text() == "'@a,c,d\n'=b,,-inf\n"


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "try was", "tries were") for number in (1, 3)] == ["1 try was", "3 tries were"]


def test_rows_in_a_file_are_what_was_appended_and_leave_nothing_behind(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (7, 3, 2), np.uint8)
    made = RowFile(tmp_path / "not" / "yet", (3, 2), "uint8", 7, "images")
    made.append(rows[0])
    made.append(rows[1:6])
    made.append(rows[6])
    assert not list(tmp_path.iterdir())
    array = made.array()
    assert np.array_equal(array, rows)
    assert np.array_equal(array[[5, 0, 5]], rows[[5, 0, 5]])
    assert RowFile(tmp_path, (3, 2), "bool", 7, "masks").array().shape == (0, 3, 2)
    (tmp_path / "file").touch()
    assert len(RowFile(tmp_path / "file" / "out", (2,), "uint8", 1, "images").array()) == 0  # the run refuses it itself


def test_rows_without_room_are_refused_before_any_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "free_bytes", lambda _: 4_000_000_000)
    said = r"the images \(100000 of 224 x 224\) need 5\.02 GB on the disk, 4\.00 GB are free there; make room"
    with pytest.raises(MedSoftError, match=said):
        RowFile(tmp_path, (224, 224), "uint8", 100_000, "images")
