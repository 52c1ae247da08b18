"""Numbers on the command line: every flag of every command has a range, and refuses the rest in one line."""

import argparse
import importlib.util
import re
from collections.abc import Iterator

import children
import pytest
from tiny import ROOT

from ldm.core import cli
from ldm.core.command import SCRIPTS
from ldm.core.errors import UsageError


def parser_of(script: str) -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser()


def numbers() -> Iterator[tuple[str, argparse.Action]]:
    for script in SCRIPTS.values():
        for action in parser_of(script)._actions:
            if isinstance(action.type, cli.Number) or action.type in (int, float, cli.devices):
                yield script, action


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_help_says_each_default_once_and_breaks_its_lines(script: str) -> None:
    made = parser_of(script)
    said = " ".join(made.format_help().split())
    assert "(default: )" not in said
    assert not re.search(r"\(default: [^)]*\) \(default:", said)
    assert max(map(len, (made.description or "").splitlines())) <= 120


FLAGS = [pytest.param(script, action, id=f"{script} {action.dest}") for script, action in numbers()]


@pytest.mark.parametrize(("script", "action"), FLAGS)
def test_a_number_out_of_range_is_wrong_usage(script: str, action: argparse.Action) -> None:
    assert isinstance(action.type, cli.Number) or action.type is cli.devices, "a flag without a range"
    flag, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
    low = action.type.low if isinstance(action.type, cli.Number) else 1
    wrong = [f"{low - 3}", "nan", "1e999", "9" * 40, "9" * 5000, "x", "", "0x1", *(["0"] if low > 0 else [])]
    for text in wrong:
        with pytest.raises(UsageError, match=rf"argument {flag}: expected a (whole )?number from {low} to .*, found "):
            parser_of(script).parse_args([flag, *[text] * count])


@pytest.mark.parametrize("text", ["auto", "-1", "2", "0,1"])
def test_devices_of_a_training(text: str) -> None:
    assert cli.devices(text) == text


def test_wrong_usage_is_one_line_and_exit_code_2() -> None:
    done = children.run(ROOT / "tool" / "doctor.py", "--devices", 0, folder=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: argument --devices: expected a whole number from 1 to 1024, found 0; --help shows")
