"""tool/measure_seam.py on phantoms, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import CLIP, PHANTOM, TEST, call

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.images import read_image
from ldm.data.png import write_png
from tool import measure_seam


def measure(ckpt: Path, data: Path, output: Path, *more: object) -> int:
    given = ["--ckpt", ckpt, "--config", PHANTOM, "--data", data, "--output", output, "--device", "cpu"]
    return call(measure_seam, *given, *more, f"biomedclip.path={CLIP}", "sampling.steps=2")


def test_soft_and_hard_composite_of_the_same_drawings(final: Path, world: Path, tmp_path: Path) -> None:
    assert measure(final, world / TEST, tmp_path / "seam.json") == 0
    found = json.loads((tmp_path / "seam.json").read_text())
    sick = [sample for sample in load_samples(world / TEST)[0] if not sample.healthy]
    for border in ("band", "contour"):
        for name in ("result", "hard"):
            row = found[border][name]
            assert row["pictures"] == len(sick)
            assert row["value"] > 0
            assert (row["low"], row["high"]) == (None, None)  # of fewer than ten patients
        # Two steps of a barely trained model draw anything but the real image: pasted hard, that shows.
        assert found[border]["result"]["value"] < found[border]["hard"]["value"]
    # The whole step of a hard paste is at the contour; the band spreads it over more neighbours.
    assert found["contour"]["hard"]["value"] > found["band"]["hard"]["value"]


def test_what_cannot_be_measured_is_refused(final: Path, world: Path, one: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--limit: expected a whole number from 1 "):
        measure(final, one, tmp_path / "seam.json", "--limit", 0)
    folder = next(one.iterdir())
    mask = read_image(folder / "mask.png")
    write_annotations(tmp_path / "one.json", load_samples(one)[0])
    write_png(folder / "mask.png", np.full_like(mask, 255))
    with pytest.raises(MedSoftError, match="no mask has a border with a gradient"):
        measure(final, tmp_path / "one.json", tmp_path / "seam.json")
    write_png(folder / "mask.png", mask)
    (folder / "prompt.txt").write_text("healthy")
    with pytest.raises(MedSoftError, match="has no diseased sample"):
        measure(final, one, tmp_path / "seam.json")
    assert not (tmp_path / "seam.json").exists()
