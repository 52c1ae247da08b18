"""Warnings in small number: the first ones by name, how many there were at the end."""

import logging
import subprocess
import sys

import pytest
from tiny import ROOT

from ldm.core.errors import FewWarnings, warn_of_first

log = logging.getLogger("a test")
ABOVE = "of which the first 3 are named above"


@pytest.mark.parametrize(("count", "last"), [(0, []), (1, []), (3, []), (4, ["... and 1 more like that"])])
def test_lines_that_are_known_at_once(caplog: pytest.LogCaptureFixture, count: int, last: list[str]) -> None:
    lines = [f"skipped {number} (100 %d)" for number in range(count)]
    warn_of_first(log, iter(lines))
    assert caplog.messages == [*lines[:3], *last]


def test_where_all_of_them_are_is_said_where_some_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_first(log, "abc", "rejects.json")
    warn_of_first(log, "abc", "rejects.json", shown=1)
    assert caplog.messages == ["a", "b", "c", "a", "... and 2 more like that; all are listed in rejects.json"]


def test_lines_that_come_one_by_one_are_counted_and_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    few = FewWarnings(log, "masks that are inverted")
    for count in (49, 3):
        for number in range(count):
            few.warn(f"mask {number}, 100 %")
        few.close()
    first = [f"mask {number}, 100 %" for number in range(3)]
    assert caplog.messages == [
        *first,
        "masks that are inverted: 49 in all, of which the first 3 are named above",
        *first,
    ]


WARNS = """
import logging
from ldm.core import cli
from ldm.core.errors import FewWarnings

def main(args):
    few = FewWarnings(logging.getLogger("a test"), "prompts that are cut")
    for number in range(5):
        few.warn(f"prompt {number}")
"""


@pytest.mark.parametrize(
    "end",
    [
        "cli.run(cli.parser(None), main, [])",
        "cli.run(cli.parser(None), main, [], at_once=True)",
        "cli.run(cli.parser(None), lambda args: main(args) or 1 / 0, [])",
        "main(None)",  # no command: a program of somebody else's
    ],
)
def test_how_many_there_were_is_said_at_the_end_of_a_command_or_program(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", WARNS + end], capture_output=True, text=True, cwd=ROOT, check=False)
    said = [line for line in f"{done.stdout}{done.stderr}".splitlines() if line.startswith("prompt")]
    assert said == [*(f"prompt {n}" for n in range(3)), f"prompts that are cut: 5 in all, {ABOVE}"], done.stderr
