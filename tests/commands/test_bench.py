"""tool/bench.py at phantom size."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ldm.bench import importing, inference
from ldm.core.errors import MedSoftError, UsageError
from ldm.diffusion.guidance import guided_steps
from tool import bench

ROOT = Path(__file__).resolve().parents[2]


def test_inference_measures_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = ["inference", "--config", str(ROOT / "models" / "phantom.yaml"), "--batch_size", "1", "--repeats", "1"]
    flags += ["--steps", "2", "--output", str(tmp_path / "bench.json"), "--precision", "bf16-true"]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["precision"], found["steps"], found["batch_size"]) == ("bf16-true", 2, 1)
    names = [row["what"] for row in found["measured"]]
    assert names[:5] == [
        "U-Net call with guidance",
        "U-Net call with the prompt alone",
        "encoded image",
        "decoded image",
        "image, 2 steps of DDIM with guidance",
    ]
    steps = inference.FAST["steps"]
    both = len(guided_steps(steps, inference.FAST["guidance_interval"]))
    assert names[5:] == [
        "50 steps of DDIM with guidance (sum of the calls)",
        f"{steps} steps of 2M, {both} guided / 50 of DDIM (sum of the calls)",
    ]
    guided, prompted, encoding, decoding, _, equal, fast = found["measured"]
    ends = 2 * encoding["ours_s"] + decoding["ours_s"]
    assert equal["ours_s"] == pytest.approx(50 * guided["ours_s"] + ends)
    calls = both * guided["ours_s"] + (steps - both) * prompted["ours_s"]
    assert fast["ours_s"] == pytest.approx(calls + ends)
    for row in (equal, fast):
        assert row["theirs_s"] == pytest.approx(50 * guided["theirs_s"] + encoding["theirs_s"] + decoding["theirs_s"])
    for row in found["measured"]:
        assert row["ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"])
        assert row["ours_s"] > 0
        assert row["ratio_of_core_time"] > 0
        assert any(line.startswith(row["what"]) for line in caplog.messages)


def test_whole_images_in_each_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled rows are measured with networks that a stand-in for the compiler leaves as they are."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward) or forward)
    for name in ("FAST", "REFERENCE"):
        monkeypatch.setattr(inference, name, getattr(inference, name) | {"steps": 2})
    flags = ["inference", "--config", str(ROOT / "models" / "phantom.yaml"), "--repeats", "1", "--steps", "0"]
    flags += ["--sizes", "1,2", "--compile", "--output", str(tmp_path / "bench.json")]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["drawing"]
    ways = [(row["batch"], row["sampler"], row["compile"]) for row in rows]
    assert ways == [(b, s, c) for b in (1, 2) for s in ("dpmpp_2m", "ddim") for c in (False, True)]
    assert len(compiled) == 3 * 4
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / statistics.median(row["seconds"]))
        assert row["first"] > 0
        assert row["difference"] <= 1
        assert row["memory"] > 0 or sys.platform == "win32"


def test_the_missing_package_of_an_extra_is_named_with_the_line_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MedSoftError, match=r"package diffusers is not installed.* -m pip install -e '\.\[test\]'"):
        bench.main(bench.build_parser().parse_args(["inference"]))


def test_batches_of_each_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = ["batches", "--config", str(ROOT / "models" / "phantom_unet_only.yaml"), "--sizes", "1,3"]
    flags += ["--repeats", "2"]
    assert bench.main(bench.build_parser().parse_args([*flags, "--output", str(tmp_path / "bench.json")])) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = found["steps"]
    assert [(row["stage"], row["batch"]) for row in rows] == [("unet_only", 1), ("unet_only", 3)]
    assert rows[1]["operations"] == 3 * rows[0]["operations"] > 0
    assert len(rows[1]["seconds"]) == 2
    line = next(line for line in caplog.messages if line.startswith("| unet_only | no | 3 |"))
    speed = statistics.median(rows[1]["seconds"])
    assert f"| {1000 * speed:.1f} | {3 / speed:.2f} |" in line


def test_batches_until_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def full(stage: Any, optimizer: Any, batch: dict, half: bool) -> torch.Tensor:
        if len(batch["mask"]) > 3:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(())

    monkeypatch.setattr("ldm.bench.batches.optimizer_step", full)
    flags = ["batches", "--config", str(ROOT / "models" / "phantom_stage1.yaml"), "--repeats", "1"]
    assert bench.main(bench.build_parser().parse_args([*flags, "--output", str(tmp_path / "bench.json")])) == 0
    assert [row["batch"] for row in json.loads((tmp_path / "bench.json").read_text())["steps"]] == [1, 2]
    assert "| stage1 | batch 4: out of memory |" in caplog.text


def test_batch_sizes_that_are_none() -> None:
    flags = ["batches", "--config", str(ROOT / "models" / "phantom_stage1.yaml"), "--sizes", "8,many"]
    with pytest.raises(UsageError, match=r"--sizes 8,many: expected batch sizes with commas"):
        bench.main(bench.build_parser().parse_args(flags))


def test_a_unet_that_diffusers_does_not_have() -> None:
    with pytest.raises(
        UsageError, match=r"unet\.thumbnail: expected false, as diffusers has no U-Net with a thumbnail"
    ):
        tiny.call(bench, "inference", "--config", ROOT / "models" / "phantom.yaml", "unet.thumbnail=true")


def test_import_measures_slices_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    for name, value in {"PATIENTS": 2, "SLICES": 3, "SIDE": 64}.items():
        monkeypatch.setattr(importing, name, value)
    flags = ["import", "--output", str(tmp_path / "bench.json")]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    found = json.loads((tmp_path / "bench.json").read_text())["measured"]
    assert [(row["files"], row["slices"]) for row in found] == [("uncompressed", 6), ("JPEG 2000, lossless", 6)]
    assert all(0 < row["seconds"] < 300 for row in found)
    if Path("/proc/self/smaps_rollup").exists():
        assert all(1e7 < row["memory"] < 4e9 for row in found)
    assert "| uncompressed | 6 |" in caplog.text


def test_data_of_many_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = ["data", "--samples", "40", "--output", str(tmp_path / "bench.json")]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    found = json.loads((tmp_path / "bench.json").read_text())["measured"]
    names = ["prepare, JSON", "prepare, JSON Lines", "read, JSON", "read, JSON Lines", "doctor"]
    assert [row["what"] for row in found] == names
    for row in found:
        assert row["samples"] == 40
        assert row["cpu_seconds"] > 0.05
        assert row["bytes"] > 20e6
        assert any(line.startswith(f"| 40 | {row['what']} |") for line in caplog.messages)
