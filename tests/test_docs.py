"""What README.md, CONTRIBUTING.md and docs/ say exists: commands, flags, files, links, functions, packages."""

import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ldm.core.command import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path) -> list[str]:
    """The lines of the page's shell blocks, continued lines joined."""
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    return text.replace("\\\n", " ").splitlines()


def inline(page: Path) -> list[str]:
    """What stands between backticks in the page's text; a line end is a space."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of the page that runs a script of ours: the script's path, then its arguments."""
    found = []
    for line in [*blocks(page), *inline(page)]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe in a text that is no command
            continue
        for position, word in enumerate(words[:-1]):
            if word == "medsoft" and words[position + 1] in SCRIPTS:
                found.append([SCRIPTS[words[position + 1]], *words[position + 2 :]])
            if word == "python" and words[position + 1].removeprefix("./") in SCRIPTS.values():
                found.append([words[position + 1].removeprefix("./"), *words[position + 2 :]])
    return found


COMMANDS = [(name, words) for name, page in zip(NAMES, PAGES, strict=True) for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_is_one_its_script_accepts(page: str, words: list[str]) -> None:
    script, *given = words
    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {word.partition("=")[0] for word in given if word.startswith("--")} <= flags
    if given and "..." not in given and given != ["--help"]:
        parser.parse_intermixed_args(given)
    for word in given:
        if re.match(r"(\./)?(models|configs)/", word):
            assert (ROOT / word).exists()


def test_the_published_commands_are_among_them() -> None:
    named = {words[0] for _, words in COMMANDS}
    assert named >= {*SCRIPTS.values()} - {"tool/measure_seam.py", "tool/demo_report.py", "tool/make_soft_masks.py"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_make_task_and_path_exists(page: Path) -> None:
    tasks = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in [*blocks(page), *inline(page)]:
        words = shlex.split(line, comments=True) if re.match(r"make( |$)", line) else []
        assert {word for word in words[1:] if word.islower() and "=" not in word} <= tasks
    for code in inline(page):
        if re.fullmatch(r"(\./)?(ldm|tool|tests|models|configs|docs)/[\w./-]+", code) and "NAME" not in code:
            assert (ROOT / code).exists(), code
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {heading.replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_anchor_is_a_heading(page: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.suffix != ".md" or anchor in anchors(target), f"{name}#{anchor}"


def resolve(name: str) -> Any:
    """The object a dotted name means; LookupError if there is none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = getattr(found, part, fields.get(part))
        if found is not None:
            return found
    raise LookupError(name)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_dotted_name_is_an_object(page: Path) -> None:
    for code in inline(page):
        if re.fullmatch(r"ldm(\.\w+)+", code):
            resolve(code)


def test_every_name_in_the_table_of_equations_is_an_object_or_an_argument() -> None:
    """Short names stand beside or below the full name of something in the same module."""
    rows = [line.split(" | ")[-1] for line in (ROOT / "docs/method.md").read_text().splitlines() if "`ldm." in line]
    known: list[Any] = []
    for code in re.findall(r"`([\w.]+)`", "\n".join(rows)):
        if code.startswith("ldm."):
            found = resolve(code)
            known += [found, importlib.import_module(found.__module__)]
            continue
        head, *rest = code.split(".")
        owners = [each for each in known if hasattr(each, head)]
        arguments = [name for each in known if callable(each) for name in inspect.signature(each).parameters]
        assert owners or head in arguments, code
        found = getattr(owners[-1], head) if owners else None
        for part in rest:
            found = getattr(found, part)
    assert len(known) > 40


def test_the_map_in_the_readme_names_every_package() -> None:
    (table,) = re.findall(r"^```text\nldm/\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    named = re.findall(r"^ +([\w.]+)", table, re.MULTILINE)
    there = [path.name for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert sorted(named) == sorted(set(there) - {"__init__.py"})


@pytest.mark.parametrize("page", ["training", "scale"])
@pytest.mark.parametrize("code", [0, 1, 3, 143])
def test_a_job_script_ends_as_its_command_does(page: str, code: int, tmp_path: Path) -> None:
    """SLURM takes a job's success from its script; srun and scontrol are stand-ins that note what they are given."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    (script,) = re.findall(r"^```(?:sh|bash)\n(#!/bin/bash\n#SBATCH .*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "job.sh").write_text(script.replace("/project/medsoft", str(tmp_path)))
    for name, ends in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "77"}
    assert subprocess.run(["bash", tmp_path / "job.sh"], cwd=tmp_path, env=given).returncode == code
    assert (tmp_path / "scontrol.txt").exists() is (code == 143)
    python, command, *words = (tmp_path / "srun.txt").read_text().splitlines()
    assert python == "python"
    importlib.import_module(command.removesuffix(".py")).build_parser().parse_intermixed_args(words)
