"""tool/crop_table.py: what real images become for the model, for usual sizes and for a user's own data."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import MODELS, PHANTOM, ROOT, TRAIN, call

from ldm.bench.crops import GEOMETRIES, CropFacts, Geometry, Grids, geometry_facts
from ldm.config import load_config
from ldm.core.errors import MedSoftError
from tool import crop_table

# The smallest lesions of the phantoms, on which all results rest, fill 2.2 % of their crop and hit 7 patches of
# BiomedCLIP's grid; nobody knows that less is enough.
SHARE, PATCHES = 0.02, 4
SMALLEST = Geometry("CT", (512, 512), (0.7, 0.7), (12, 12))


def facts(geometry: Geometry, *overrides: str) -> CropFacts:
    config = load_config(MODELS / "mldm_v15.yaml", overrides)
    return geometry_facts(geometry, config.data, Grids(config.biomedclip.grid, config.architecture.latent_size))


def test_documented_table_is_the_commands(tmp_path: Path) -> None:
    assert call(crop_table, "--config", MODELS / "mldm_v15.yaml", "--output", tmp_path / "table.md") == 0
    table = (tmp_path / "table.md").read_text()
    assert table in (ROOT / "docs" / "data.md").read_text()
    assert len(table.splitlines()) == 2 + len(GEOMETRIES) >= 8


def test_smallest_lesion_fills_enough_of_the_crop_by_default() -> None:
    found = facts(SMALLEST)
    assert found.share >= SHARE
    assert found.patches >= PATCHES
    native = facts(SMALLEST, "data.min_crop=512")
    assert native.share < SHARE / 40  # as it was while a crop had at least the model's own size


def test_every_geometry_is_cropped_alike_by_default() -> None:
    """No lesion of the table fills less than the smallest one may, or more than half of the crop."""
    for geometry in GEOMETRIES:
        found = facts(geometry)
        assert SHARE <= found.share <= 0.5
        assert found.patches >= PATCHES
        assert found.crops == 4


def test_millimetres_a_model_pixel_are_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(crop_table, "--config", MODELS / "mldm_v15.yaml", "data.mm_per_pixel=0.1") == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert sum("data.mm_per_pixel=0.162 is wide enough" in row for row in rows) == 1  # 80 pixels of 0.7 mm
    assert sum("| 0.100 |" in row or "| 0.100 x 0.098 |" in row or "| 0.101 |" in row for row in rows) == len(rows) - 1


def test_own_data(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert call(crop_table, "--config", PHANTOM, "--data", world / TRAIN, "--limit", 6) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| smallest", "| 10 %", "| median", "| 90 %", "| largest"]
    assert "64 x 64" in lines[2]

    shutil.copytree(world / "train", tmp_path / "data")
    changed = next((tmp_path / "data").glob("*/meta.json"))
    meta = json.loads(changed.read_text())
    changed.write_text(json.dumps({key: value for key, value in meta.items() if key != "spacing_mm"}))
    assert call(crop_table, "--config", PHANTOM, "--data", tmp_path / "data", "data.mm_per_pixel=0.8") == 3
    assert f"cannot be cropped: {changed.with_name('image.png')}: data.mm_per_pixel=0.8: the sample's" in caplog.text


def test_data_of_which_nothing_can_be_cropped(tmp_path: Path, write_sample: object) -> None:
    write_sample(tmp_path / "data" / "a", prompt="healthy", mask=None)  # type: ignore[operator]
    with pytest.raises(
        MedSoftError, match=r"data: none of its samples can be cropped; the first, .*its vertebra is not"
    ):
        call(crop_table, "--config", PHANTOM, "--data", tmp_path / "data")
