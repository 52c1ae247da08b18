"""requirements.lock beside pyproject.toml: whole, with digests, nothing in it that pyproject.toml does not allow."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
EXTRAS = [line for line in EXTRAS if not line.startswith(PROJECT["name"])]  # one extra in another
WANTED = [*PROJECT["dependencies"], *EXTRAS]


def test_every_package_has_a_floor_and_a_cap() -> None:
    for requirement in map(Requirement, WANTED):
        assert sorted(each.operator for each in requirement.specifier) == ["<", ">="], requirement


def test_the_lock_holds_every_package_in_a_version_that_is_allowed() -> None:
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]
    pinned = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
        pinned[canonicalize_name(name)] = version
    for requirement in map(Requirement, WANTED):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_lock_names_no_place_to_download_from() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_the_other_lists_point_to_the_one() -> None:
    for name in ("requirements.txt", "environment.yaml"):
        assert "-e .[test]" in (ROOT / name).read_text()
