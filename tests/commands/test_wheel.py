"""The wheel: what it holds, and that its one command finds what came with it, in a folder that has nothing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT

from ldm.core.command import SCRIPTS

RUN = "from ldm.core.command import main; main()"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("medsoft_diffusion-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def medsoft(site: Path, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_contents(site: Path) -> None:
    (info,) = site.glob("*.dist-info")
    assert "medsoft = ldm.core.command:main" in (info / "entry_points.txt").read_text()
    ours = {"ldm", "medsoft.py", info.name}  # nothing else that another package may have
    assert {path.name for path in site.iterdir()} == ours
    shipped = {
        str(path.relative_to(site / "ldm/shipped")) for path in (site / "ldm/shipped").rglob("*") if path.is_file()
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert shipped == {name for name in tracked if name.startswith(("models/", "configs/"))} | set(SCRIPTS.values())
    kinds = (".py", ".j2", ".html", ".js", ".css")
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "ldm").rglob("*") if path.suffix in kinds}
    assert code <= {str(path.relative_to(site)) for path in site.rglob("*")}


def test_installed_command_finds_the_shipped_files(site: Path, tmp_path: Path) -> None:
    assert medsoft(site, tmp_path).stdout.count("\n  ") == len(SCRIPTS)
    told = medsoft(site, tmp_path, "run", "configs/demo.yaml", "--list")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("demo [1/20] phantoms (to do): python tool/make_phantoms.py")
    given = ("--healthy", "2", "--diseased", "2", "--output_dir", "data")
    (tmp_path / "plan.yaml").write_text(
        f"name: small\noutput_dir: out\nsteps:\n- name: a\n  run: python tool/make_phantoms.py {' '.join(given)}\n"
        "- name: b\n  run: python ./tool/run_stages.py configs/demo.yaml --list\n  makes: [data]\n"
    )
    ran = medsoft(site, tmp_path, "run", "plan.yaml")
    assert "[2/2] b" in ran.stdout, ran.stderr
    assert (tmp_path / "out" / "stages.json").is_file()
    assert (tmp_path / "data" / "phantoms.json").is_file()


def test_a_file_of_the_working_directory_comes_first(site: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "phantom_stage1.yaml").write_text("nonsense: 1\n")
    words = ("train", "--ckpt", "none", "--save_path", "run", "--config", "models/phantom_stage1.yaml", "--dry_run")
    done = medsoft(site, tmp_path, *words)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
