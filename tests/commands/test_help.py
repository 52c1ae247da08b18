"""Every command answers --help at once, from any working directory, without loading what makes commands slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.core.command import SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "lightning", "timm", "open_clip", "transformers", "diffusers"}
HEAVY |= {"numpy", "cv2", "PIL", "pandas", "sklearn", "matplotlib"}


def started(*words: object, folder: Path) -> "subprocess.CompletedProcess[str]":
    """``python WORDS`` in ``folder``, without help from PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_help_from_elsewhere_imports_nothing_heavy(script: str, tmp_path: Path) -> None:
    done = started("-X", "importtime", ROOT / script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {Path(script).name}")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY
    assert not list(tmp_path.iterdir())


def medsoft(*words: str) -> "subprocess.CompletedProcess[str]":
    return started("-c", "from ldm.core.command import main; main()", *words, folder=ROOT)


def test_medsoft_has_every_script() -> None:
    there = [path.name for path in ROOT.glob("*.py")] + [f"tool/{path.name}" for path in ROOT.glob("tool/*.py")]
    assert sorted([*SCRIPTS.values(), "medsoft.py"]) == sorted(there)  # which is a module, no script


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_medsoft_lists_its_commands(words: tuple[str, ...]) -> None:
    done = medsoft(*words)
    assert (done.returncode, done.stderr) == (0, "")
    for name in SCRIPTS:
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 4, "no description"


@pytest.mark.parametrize(("wrong", "meant"), [("NOTHING", ""), ("trian", "; did you mean train?")])
def test_medsoft_with_an_unknown_command_lists_them(wrong: str, meant: str) -> None:
    done = medsoft(wrong, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"\nerror: medsoft has no command {wrong}{meant}\n")
    assert all(f"\n  {name} " in done.stderr for name in SCRIPTS)


def test_medsoft_passes_words_and_exit_code_on(tmp_path: Path) -> None:
    done = medsoft("prepare", "--root_dir", str(tmp_path / "none"), "--output_file", str(tmp_path / "a.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert medsoft("train", "--help").stdout.startswith("usage: medsoft train ")
    assert medsoft("train").returncode == 2
