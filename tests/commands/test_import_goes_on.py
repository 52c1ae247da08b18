"""tool/import_volumes.py goes on: with a source that has changed, after a kill, and in processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made
import pytest
from test_import_volumes import content, run
from tiny import ROOT

from ldm.exchange import importing


def test_what_comes_changes_or_goes_in_the_source_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    affine = made.grid(made.AXIAL, (16, 16, 16), (1, 1, 1))
    for name in ("a", "b"):
        made.write_nifti(tmp_path / f"{name}.nii.gz", made.marked((16, 16, 16)), affine)
    out = tmp_path.with_name(f"{tmp_path.name}_out")
    assert run(tmp_path, out) == 0
    first = content(out)
    made.write_nifti(tmp_path / "c.nii.gz", made.marked((16, 16, 16), 2), affine)
    made.write_nifti(tmp_path / "a.nii.gz", made.marked((16, 16, 16), 3), affine)
    (tmp_path / "b.nii.gz").unlink()
    assert run(tmp_path, out) == 0
    images = {path.read_bytes() for path in out.rglob("image.png")}
    assert len(images) == 2
    assert not images & {data for name, data in first.items() if name.endswith("image.png")}


def test_killed_and_run_again_it_gives_the_same_files(tmp_path: Path) -> None:
    affine = made.grid(made.AXIAL, (32, 32, 32), (1, 1, 1))
    (tmp_path / "scans").mkdir()
    for number in range(5):
        made.write_nifti(tmp_path / "scans" / f"p{number}.nii.gz", made.marked((32, 32, 32), number), affine)
    (tmp_path / "key").write_text("ab" * 32)
    flags = ["--key", str(tmp_path / "key"), "--slices", "all", "--window", "0", "4000"]
    assert run(tmp_path / "scans", tmp_path / "whole", *flags) == 0
    out = tmp_path / "out"
    command = [sys.executable, "tool/import_volumes.py", str(tmp_path / "scans"), "--output_dir", str(out), *flags]
    for stop_at in (3, 80):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum("meta.json" in names for _, _, names in os.walk(out)) < stop_at:
            time.sleep(0.01)
        assert process.poll() is None  # it is killed in the middle of its work
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(tmp_path / "scans", out, *flags) == 0
    assert content(out) == content(tmp_path / "whole")
    assert content(tmp_path / "out.private") == content(tmp_path / "whole.private")


def test_patients_in_processes_of_their_own_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine = made.grid(made.AXIAL, (16, 16, 16), (1, 1, 1))
    (tmp_path / "scans").mkdir()
    for number in range(3):
        made.write_nifti(tmp_path / "scans" / f"p{number}.nii.gz", made.marked((16, 16, 16), number), affine)
    (tmp_path / "key").write_text("ab" * 32)
    assert run(tmp_path / "scans", tmp_path / "one", "--key", tmp_path / "key") == 0
    monkeypatch.setattr(importing, "SMALL", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert run(tmp_path / "scans", tmp_path / "two", "--key", tmp_path / "key") == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
