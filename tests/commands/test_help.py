"""Every command answers --help at once, from any working directory, without loading what makes commands slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ver_openImagesDatasets", "ver_train", "dataset_infer", "classifier")
SCRIPTS = [*(ROOT / f"{name}.py" for name in NAMES), *sorted((ROOT / "tool").glob("*.py"))]
HEAVY = {"torch", "torchvision", "lightning", "timm", "open_clip", "transformers", "diffusers"}
HEAVY |= {"numpy", "cv2", "PIL", "pandas", "sklearn", "matplotlib"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_from_elsewhere_imports_nothing_heavy(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {script.name}")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY
    assert not list(tmp_path.iterdir())
