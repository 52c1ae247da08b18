"""tool/tool_merge_for_stage2.py on damaged, stale, swapped and mismatched files. The plain merge: test_convert.py."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint_files import flip_in_record
from tiny import edit, merge, tensors

from ldm.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from ldm.core.errors import MedSoftError, UsageError


@pytest.fixture(scope="module")
def pair(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What stage1 and unet_only leave, made from the converted base: the MSC, and all the rest."""
    folder = tmp_path_factory.mktemp("pair")
    found = read_checkpoint(converted)
    paths = folder / "stage1.ckpt", folder / "unet_only.ckpt"
    for path, stage in zip(paths, ("stage1", "unet_only"), strict=True):
        state = {key: value for key, value in found.state.items() if key.startswith("msc.") == (stage == "stage1")}
        write_checkpoint(path, state, {**found.metadata, "stage": stage, "step": 7})
    return paths


def written(source: Path, target: Path, **about: object) -> Path:
    """A copy that says something else about itself."""
    found = read_checkpoint(source)
    write_checkpoint(target, found.state, {**found.metadata, **about})
    return target


def test_table_says_which_part_comes_from_where(
    pair: tuple[Path, Path], converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert merge(*pair, tmp_path / "out.safetensors") == 0
    found = read_checkpoint(tmp_path / "out.safetensors").state
    whole = tensors(converted)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    lines = {record.message[:16].strip(): record.message for record in caplog.records}
    assert lines["MSC"].endswith(f"from {pair[0]} (step 7)")
    for part in ("U-Net", "third attention", "autoencoder", "text encoder"):
        assert lines[part].endswith(f"from {pair[1]} (step 7)")
    for path in pair:
        assert f"checked: {path}, CRC-32 of" in caplog.text


def test_again_is_byte_identical(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt", "a.safetensors", "b.safetensors"):
        assert merge(*pair, tmp_path / name) == 0
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_existing_output_is_refused_before_anything_large_is_read(
    pair: tuple[Path, Path], converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(converted, tmp_path / "out.ckpt")
    monkeypatch.setattr("ldm.core.files.sha256_file", lambda _: pytest.fail("a file was read as a whole"))
    with pytest.raises(UsageError, match=r"out\.ckpt: already exists; .*--overwrite"):
        merge(*pair, tmp_path / "out.ckpt")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_no_space_left_while_writing(pair: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    """A real limit on the size of a file: one message, nothing left behind, both inputs untouched."""
    before = [path.read_bytes() for path in pair]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    try:
        with pytest.raises(MedSoftError, match=rf"out\.{suffix}: could not be written \(File too large\); nothing was"):
            merge(*pair, tmp_path / f"out.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert [path.read_bytes() for path in pair] == before


@pytest.mark.parametrize("index", [0, 1])
def test_flipped_bit_in_either_file_is_found(pair: tuple[Path, Path], tmp_path: Path, index: int) -> None:
    files = list(pair)
    files[index] = tmp_path / "bad.ckpt"
    files[index].write_bytes(pair[index].read_bytes())
    flip_in_record(files[index], "/data/3")
    with pytest.raises(MedSoftError, match=r"bad\.ckpt: damaged, record \S+/data/3 \(Bad CRC-32"):
        merge(*files, tmp_path / "out.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.ckpt"]


def test_swapped_arguments_by_stage(pair: tuple[Path, Path], converted: Path, tmp_path: Path) -> None:
    """Both files hold everything: only what they say about themselves tells them apart."""
    one = written(converted, tmp_path / "one.ckpt", stage="unet_only")
    two = written(converted, tmp_path / "two.ckpt", stage="stage1")
    with pytest.raises(UsageError, match=r"was left by unet_only and .* by stage1: the two are swapped"):
        merge(one, two, tmp_path / "out.ckpt")
    assert merge(two, one, tmp_path / "out.ckpt") == 0


def test_number_of_heads_which_no_shape_shows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = read_checkpoint(pair[0]).metadata["config"]
    other = written(pair[0], tmp_path / "other.ckpt", config={**config, "msc": {**config["msc"], "heads": 2}})
    with pytest.raises(MedSoftError, match=r"other\.ckpt: was made with msc\.heads=2, this configuration has 4"):
        merge(other, pair[1], tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_files_of_different_preparations(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = read_checkpoint(pair[1]).metadata["config"]
    config = {**config, "diffusion": {**config["diffusion"], "beta_end": 0.02}}
    other = written(pair[1], tmp_path / "other.ckpt", config=config)
    with pytest.raises(UsageError, match=r"other\.ckpt: was trained with diffusion\.beta_end=0\.02"):
        merge(pair[0], other, tmp_path / "out.ckpt")


@pytest.mark.parametrize(("index", "key"), [(0, "msc.norm.weight"), (1, "first_stage_model.quant_conv.bias")])
def test_key_in_neither_file(pair: tuple[Path, Path], tmp_path: Path, index: int, key: str) -> None:
    files = list(pair)
    files[index] = edit(pair[index], tmp_path / "short.ckpt", keep=lambda name, value: None if name == key else value)
    with pytest.raises(MedSoftError, match=rf"short\.ckpt: does not fit this configuration: 1 missing \({key}\)"):
        merge(*files, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_newer_file_beside_is_pointed_out(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lightning's second run in one folder writes last-v1.ckpt and leaves the old last.ckpt."""
    last = written(pair[0], tmp_path / "last.ckpt", step=8)
    newer = written(pair[0], tmp_path / "last-v1.ckpt", step=24)
    os.utime(newer, (2e9, 2e9))
    assert merge(last, pair[1], tmp_path / "out.ckpt") == 0
    assert "last.ckpt (step 8, " in caplog.text
    assert "is older than last-v1.ckpt beside it (step 24, 2033-05-18" in caplog.text
    caplog.clear()
    assert merge(newer, pair[1], tmp_path / "other.ckpt") == 0
    assert "is older than" not in caplog.text


def test_training_state_is_left_out_and_said(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = read_checkpoint(pair[0])
    laden = {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1 << 20)}}}], "loops": {}}
    write_checkpoint(tmp_path / "laden.ckpt", found.state, found.metadata, **laden)
    assert merge(tmp_path / "laden.ckpt", pair[1], tmp_path / "out.ckpt") == 0
    assert "laden.ckpt: optimizer_states, loops (training state)" in caplog.text
    assert not read_checkpoint(tmp_path / "out.ckpt").rest


def test_full_disk_is_seen_before_reading(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(MedSoftError, match=r"out\.ckpt: needs 0\.04 GB, 0\.00 GB are free"):
        merge(tmp_path / "nobody.ckpt", tmp_path / "looked.ckpt", tmp_path / "out.ckpt")
