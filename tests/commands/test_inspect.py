"""tool/inspect_checkpoint.py on everything that a user may point it at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import golden
from test_checkpoint_files import flip_in_record
from tiny import SD, edit, inspect

from ldm.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from ldm.core.errors import MedSoftError
from ldm.core.files import sha256_file

STAGES = ("stage1", "stage2_1", "stage2_2", "unet_only")
FITS = ["models/phantom.yaml", "models/phantom_large.yaml"]  # the same networks


def inspected(path: Path, capsys: pytest.CaptureFixture) -> dict[str, Any]:
    capsys.readouterr()
    assert inspect(path, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_converted_file(converted: Path, capsys: pytest.CaptureFixture) -> None:
    found = inspected(converted, capsys)
    assert found["kind"] == "zip"
    assert found["bytes"] == converted.stat().st_size
    assert found["integrity"] == "CRC-32 of 536 records"
    state = read_checkpoint(converted).state
    assert sum(row["tensors"] for row in found["parts"].values()) == len(state)
    assert sum(row["parameters"] for row in found["parts"].values()) == sum(value.numel() for value in state.values())
    assert {tuple(row["dtypes"]) for row in found["parts"].values()} == {("float32",)}
    assert list(found["parts"]) == ["U-Net", "third attention", "autoencoder", "text encoder", "MSC"]
    assert (found["missing"], found["stage"], found["step"]) == ([], "converted", 0)
    assert found["origin"] == {"file": SD.name, "sha256": sha256_file(SD)}
    assert found["fits"] == FITS
    assert found["can_start"] == [f"models/phantom{size}_{stage}.yaml" for size in ("_large", "") for stage in STAGES]


def test_base_before_conversion(capsys: pytest.CaptureFixture) -> None:
    found = inspected(SD, capsys)
    assert found["missing"] == ["msc"]
    assert (found["fits"], found["unconverted"], found["can_start"]) == ([], FITS, [])
    assert found["parts"]["U-Net"]["dtypes"] == ["float16"]


@pytest.mark.parametrize("part", ["msc", "rest"])
def test_part_of_a_model(converted: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture) -> None:
    """What stage1 and unet_only leave."""
    path = edit(
        converted, tmp_path / "in.ckpt", keep=lambda k, v: v if k.startswith("msc.") == (part == "msc") else None
    )
    found = inspected(path, capsys)
    assert found["missing"] == (["unet", "autoencoder", "text"] if part == "msc" else ["msc"])
    assert found["fits"] == FITS
    stage = "stage1" if part == "msc" else "unet_only"
    assert found["can_start"] == [f"models/phantom_large_{stage}.yaml", f"models/phantom_{stage}.yaml"]


def test_text_says_it_all(converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = read_checkpoint(converted)
    origin = {flag: {"file": f"{flag}.ckpt", "sha256": "ab" * 32} for flag in ("stage1_path", "input_path")}
    about = {**found.metadata, "stage": "merged", "step": 9, "origin": origin}
    write_checkpoint(tmp_path / "in.ckpt", found.state, about, optimizer_states=[])
    assert inspect(tmp_path / "in.ckpt") == 0
    said = [record.message for record in caplog.records]
    for line in (
        "integrity: CRC-32 of 536 records",
        "missing: nothing",
        "stage: merged, step 9",
        f"origin: stage1_path stage1_path.ckpt (SHA-256 {'ab' * 32})",
        "besides tensors: optimizer_states",
        f"fits: {', '.join(FITS)}",
    ):
        assert line in said


def test_true_size_original_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All 1145 keys at their true shapes; one number each on the disk, seen through strides of zero."""
    state = {key: torch.zeros((), dtype=dtype).expand(shape) for key, (shape, dtype) in golden().items()}
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    assert (tmp_path / "sd.ckpt").stat().st_size < 1e6
    found = inspected(tmp_path / "sd.ckpt", capsys)
    assert found["unconverted"] == ["models/mldm_v15.yaml"]
    assert found["parts"]["U-Net"]["parameters"] == 859_535_364
    assert found["parts"]["other"]["tensors"] == 14


def test_heads_that_no_yaml_has(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = read_checkpoint(converted)
    config = {**found.metadata["config"], "msc": {**found.metadata["config"]["msc"], "heads": 2}}
    write_checkpoint(tmp_path / "in.ckpt", found.state, {**found.metadata, "config": config})
    assert inspected(tmp_path / "in.ckpt", capsys)["fits"] == []


def test_foreign_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "in.ckpt")
    found = inspected(tmp_path / "in.ckpt", capsys)
    assert list(found["parts"]) == ["other"]
    assert (found["fits"], found["can_start"]) == ([], [])
    assert found["missing"] == ["unet", "autoencoder", "text", "msc"]


def test_damage_is_named(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(converted.read_bytes())
    record = flip_in_record(tmp_path / "bad.ckpt", "/data/9")
    with pytest.raises(MedSoftError, match=rf"bad\.ckpt: damaged, record {record}"):
        inspect(tmp_path / "bad.ckpt")


def test_values_that_are_not_numbers(converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told after the description, which a user may still need."""
    caplog.set_level("INFO")
    bad = edit(converted, tmp_path / "nan.ckpt", keep=lambda k, v: v * float("nan") if k == "msc.position" else v)
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensor holds NaN or infinite values, first msc\.position"):
        inspect(bad)
    assert f"fits: {FITS[0]}" in caplog.text
